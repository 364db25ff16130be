"""A router of your own: a token whose best expert is good enough gets that expert alone.

PYTHONPATH=. python .github/examples/own_router.py runs/example.duckdb
python -m explorer compare RUN --router-file .github/examples/own_router.py --routers NAME
"""

import sys

from explorer import compare
from explorer.routers import ROUTERS, RouterInfo, RouterInputs, Routing, RoutingRouter
from explorer.routers.native import host_best
from explorer.routers.scores import slots, weigh


@ROUTERS.add("second_if_unsure")
class SecondIfUnsure(RoutingRouter):
    """Keep a second expert only where the best one scores less than ``p``."""

    info = RouterInfo(
        name="second_if_unsure",
        family="gating",
        title="More experts if unsure",
        summary="A token whose best expert scores at least p gets that expert alone.",
        formula="k_t = 1 if max score >= p else k",
        paper="",
        needs=frozenset({"logits"}),
        variable_k=True,
        identity={"p": float("inf")},
    )

    def __init__(self, *, p: float = 0.5) -> None:
        self.p = p

    def _route(self, inputs: RouterInputs) -> Routing:
        scores, ids = host_best(inputs)
        ids[scores.amax(-1) >= self.p, 1:] = -1
        return slots(scores, ids, weigh(scores, ids, inputs))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the model's own gate: nothing else is multiplied."""
        return 2.0 * d * n_experts


def main(run: str) -> None:
    """Replay the rule at two settings on what a run recorded."""
    names = ["second_if_unsure(p=0.3)", "second_if_unsure(p=0.7)"]
    with compare(run, names, progress=False) as comparison:
        whole = comparison.table.query("layer.isna()")
        print(whole[["router", "experts_per_token", "jaccard"]].to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
