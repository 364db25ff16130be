"""What a router did, in sentences for somebody who sees one for the first time."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.ui.number import number
from explorer.ui.text import visible as visible_name
from explorer.ui.visible import one_line

# bounds of the gate entropy as a share of ln(experts); words only, no statistics behind them
_SURE, _LEANING, _UNDECIDED = 0.4, 0.7, 0.9


def expert_label(site_name: str, expert: int) -> str:
    """Return how an expert is called: its layer and its number there."""
    return f"L{site_name}.E{expert}"


def undefined_load(n_experts: int) -> str:
    """Say why a measure of load is not defined for a layer."""
    return "not defined for one expert" if n_experts == 1 else "no assignment of these tokens"


def absent_gate(quantity: str, n_experts: int, top_k: int) -> str:
    """Say why a token has no value at a router: it is not defined there, or was not recorded.

    Parameters
    ----------
    quantity : str
        A name in ``queries.tokens.QUANTITIES``.
    """
    if quantity == "entropy" and n_experts == 1:
        return "not defined for one expert"
    if quantity == "margin" and top_k >= n_experts:
        return "not defined, as no expert is left out"
    return {
        "top1_weight": "no expert was chosen",
        "pinned_weight": "no expert is pinned there",
    }.get(quantity, "not recorded")


def prompt_name(row: pd.Series) -> str:
    """Return a prompt on one line, for a list to choose from."""
    text = "(token ids, no text)" if row["text"] is None else one_line(row["text"], 90)
    domain = f"{visible_name(row['domain'])} · " if row["domain"] else ""
    return f"{row['prompt_id']} · {domain}{row['tokens']:,} tokens · {text}"


def listed(parts: Sequence[str]) -> str:
    """Join words as a sentence does."""
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def routing_sentence(experts: pd.DataFrame, *, site_name: str, n_experts: int) -> str:
    """Say which experts a token went to; ``experts`` has one row per slot, best first."""
    if experts.empty:
        return f"In layer {site_name} the router chose no expert for this token."
    if len(experts) == 1:
        return (
            f"In layer {site_name} the router sent this token to expert "
            f"{experts['expert_id'].iloc[0]} alone, one of {n_experts}."
        )
    ids = [f"expert {row.expert_id}" for row in experts.itertuples()]
    if experts["weight_share"].isna().any():
        given = f"sent this token to {listed(ids)}"
    else:
        shares = [number(share, ".0%") for share in experts["weight_share"]]
        shares[0] += " of this token's weight"
        given = "gave " + listed([f"{s} to {e}" for s, e in zip(shares, ids, strict=True)])
    return f"In layer {site_name} the router {given}, choosing among {n_experts} experts."


def certainty_sentence(
    *, normalized_entropy: float, margin: float, topk_mass: float, n_experts: int, top_k: int
) -> str:
    """Say how sure the router was; nan where a number is not defined or was not recorded."""
    if n_experts == 1:
        return "With one expert there is no choice: gate entropy and margin are not defined."
    if math.isnan(normalized_entropy):
        return "How sure it was is not known: its gate entropy was not recorded."
    amount = f"(gate entropy {normalized_entropy:.0%}; 0 % = sure, 100 % = all experts alike)"
    if normalized_entropy < _SURE:
        text = f"It was sure {amount}"
    elif normalized_entropy < _LEANING:
        text = f"It leaned clearly to its choice {amount}"
    elif normalized_entropy < _UNDECIDED:
        text = f"It hesitated {amount}"
    else:
        text = f"It saw hardly any difference between the experts {amount}"
    if not math.isnan(topk_mass):
        chosen = "the chosen expert" if top_k == 1 else f"the {top_k} chosen experts"
        text += f": {chosen} had {topk_mass:.0%} of its probability"
    text += "."
    if not math.isnan(margin):
        text += f" The last choice was ahead of the next expert by {margin:.3g} in score."
    elif top_k >= n_experts:
        text += " No expert is left out, so that no margin is defined."
    return text


def probabilities(
    scores: npt.NDArray[np.float64], score_function: str
) -> tuple[npt.NDArray[np.float64], str, float | None]:
    """Return scores as a reader can compare them, their unit, and the value of no preference.

    Parameters
    ----------
    scores : array [E]
        As the router put them out; nan where it ruled an expert out.
    score_function : str
        As in the view ``sites``.
    """
    if score_function in ("softmax", "softmax_topk"):
        powers = np.exp(scores - np.nanmax(scores))
        return powers / np.nansum(powers), "probability (0..1)", 1 / len(scores)
    if score_function in ("sigmoid", "sigmoid_topk"):
        # in two halves, so that no power overflows
        small = np.exp(-np.abs(scores))
        return (
            np.where(scores >= 0, 1 / (1 + small), small / (1 + small)),
            "sigmoid of the score (0..1)",
            None,
        )
    if score_function == "probabilities":
        return scores, "probability (0..1)", 1 / len(scores)
    return scores, "raw router score", None
