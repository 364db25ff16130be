"""Put other routers in the model's place: by replay of what was recorded, and in the model.

PYTHONPATH=. python .github/examples/compare.py runs/example.duckdb
"""

import sys

from explorer import compare

COLUMNS = ["router", "mode", "loss_change", "loss_se", "experts_per_token", "agreement", "jaccard"]


def main(run: str) -> None:
    """Print a row a router; what was computed is kept beside the run and not computed again."""
    with compare(run, ["top_k(k=1)", "top_p(p=0.5)"], progress=False) as comparison:
        print(comparison.table.query("layer.isna()")[COLUMNS].to_string(index=False))
    with compare(
        run,
        ["top_k(k=1)"],
        live=True,
        replay=False,
        tokens=500,
        controls=False,
        latency=False,
        progress=False,
    ) as comparison:
        print(comparison.table.query("layer.isna()")[COLUMNS].to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
