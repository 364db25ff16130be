"""Sums of the routers' statistics per site, domain and phase, so that no page reads every row.

They are counted from the rows once, when a run file is closed. A file of a version that had no
such table is read through the same SELECT in its place: slower, and equal.
"""

from capture.store.codec import sql_half

STATISTICS = ("entropy", "margin", "logsumexp", "topk_mass")
TABLE_NAME = "gate_sum"

TABLE = f"""
CREATE TABLE packed.{TABLE_NAME} (
    layer INTEGER NOT NULL, site INTEGER NOT NULL, domain VARCHAR, phase VARCHAR NOT NULL,
    statistic VARCHAR NOT NULL, tokens BIGINT NOT NULL, total DOUBLE NOT NULL
);
"""
VIEW = f"""
CREATE VIEW gate_sums AS
    SELECT layer, site, domain, phase, statistic, tokens, total FROM packed.{TABLE_NAME};
"""


def _counted(statistic: str) -> str:
    return (
        f"SELECT layer, site, domain, phase, '{statistic}' AS statistic,"
        f" count({statistic}) AS tokens, sum({sql_half(statistic)})::DOUBLE AS total"
        " FROM packed.route JOIN packed.token USING (token_id)"
        f" JOIN packed.prompt USING (prompt_id) WHERE {statistic} IS NOT NULL"
        " GROUP BY layer, site, domain, phase"
    )


# one branch per statistic: who asks for one reads the column of that one only
SELECT = " UNION ALL ".join(_counted(name) for name in STATISTICS)
# all of them in one pass over the rows
_ALL = ", ".join(
    f"count({name}) AS tokens_{name}, sum({sql_half(name)})::DOUBLE AS total_{name}"
    for name in STATISTICS
)
_APART = " UNION ALL ".join(
    f"SELECT layer, site, domain, phase, '{name}', tokens_{name}, total_{name} FROM sums"
    f" WHERE tokens_{name} > 0"
    for name in STATISTICS
)
# a sum that was there before is of fewer rows
STORE = (
    f"DELETE FROM packed.{TABLE_NAME};"
    f" INSERT INTO packed.{TABLE_NAME} WITH sums AS MATERIALIZED ("
    f"SELECT layer, site, domain, phase, {_ALL} FROM packed.route"
    " JOIN packed.token USING (token_id) JOIN packed.prompt USING (prompt_id)"
    f" GROUP BY layer, site, domain, phase) {_APART}"
)
