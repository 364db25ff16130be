"""Which experts load is of: those that compute. The one place that says so."""

from collections import Counter
from typing import NamedTuple

from explorer.run import Run

# the experts that load is of, a relation of layer, site and expert_id: those that compute. Whose
# kind was not recorded counts as one
ROUTED = """(
    SELECT layer, site, expert_id FROM (
        SELECT layer, site, unnest(range(n_experts))::INTEGER AS expert_id, unnest(
            list_resize(coalesce(expert_kinds, []::VARCHAR[]), n_experts, 'routed')) AS kind
        FROM sites
    ) WHERE kind = 'routed'
) AS routed"""


class Nothing(NamedTuple):
    """What an expert does that computes nothing, of one and of many."""

    one: str
    many: str


NOTHING = {
    "constant": Nothing("mixes in a constant", "mix in a constant"),
    "identity": Nothing("passes a token on as it is", "pass a token on as it is"),
    "skip": Nothing("stands for leaving out the block", "stand for leaving out the block"),
    "zero": Nothing("gives nothing", "give nothing"),
}


def left_out(run: Run) -> str:
    """Return a sentence on what the figures of load leave out; empty where that is nothing."""
    kinds = Counter(
        kind for site in run.sites for kind in site.expert_kinds or () if kind != "routed"
    )
    lost = int(run.query("SELECT coalesce(sum(dropped), 0) AS n FROM sites")["n"].iloc[0])
    said = []
    if kinds:
        total = sum(site.n_experts for site in run.sites)
        named = ", ".join(f"{count} {NOTHING[kind].many}" for kind, count in sorted(kinds.items()))
        said.append(f"Load counts routed experts only; of {total} in all layers, {named}.")
    if lost:
        said.append(f"{lost:,} assignments were dropped: no expert took them.")
    return " ".join(said)
