"""Ask a run file, in SQL and by the metrics that the pages use.

PYTHONPATH=. python .github/examples/query.py runs/example.duckdb
"""

import sys

import duckdb

from explorer import open_run
from explorer.metrics.load import max_violation, sampling_floor

# a run file is read by plain DuckDB as well, from any language
FIRST_EXPERTS = """
    SELECT text, list(expert_id ORDER BY layer) AS heaviest_by_layer
    FROM assignments JOIN tokens USING (token_id)
    WHERE slot = 0 GROUP BY token_id, text ORDER BY token_id LIMIT 10
"""
LOAD = "SELECT assignments FROM expert_load WHERE layer = ? ORDER BY expert_id"


def main(path: str) -> None:
    """Print where the first tokens went, and whether each layer's experts share the work."""
    with duckdb.connect(path, read_only=True) as connection:
        for text, experts in connection.sql(FIRST_EXPERTS).fetchall():
            print(repr(text), experts)
    with open_run(path) as run:
        for site in run.sites:
            load = run.query(LOAD, [site.layer])["assignments"].to_numpy()
            floor = sampling_floor(
                "max_violation",
                n_tokens=run.info["n_tokens"],
                n_experts=site.n_experts,
                top_k=site.top_k,
            )
            print(
                f"layer {site.layer}: MaxVio {max_violation(load):.2f}, "
                f"uniform routing {floor.low:.2f} to {floor.high:.2f}"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
