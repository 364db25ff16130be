"""The run file: every table, column and view, and the statements that fill them.

Tables live in the schema ``packed`` and may change with ``SCHEMA_VERSION``. The views are what
everybody reads; their names, columns and meanings stay.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from capture.store.codec import (
    Layout,
    sql_count_filled,
    sql_half,
    sql_id_code,
    sql_slots,
    sql_weight,
    sql_weight_code,
)

SCHEMA_VERSION = 1


class Column(NamedTuple):
    """One column of a table: its name, its SQL type and its Arrow type."""

    name: str
    sql: str
    arrow: pa.DataType


_INTEGER = ("INTEGER NOT NULL", pa.int32())
_TEXT = ("VARCHAR", pa.string())
_CODE = ("USMALLINT", pa.uint16())
_WORD = ("UBIGINT NOT NULL", pa.uint64())

STATISTICS = ("entropy", "margin", "logsumexp", "topk_mass")


def tables(layout: Layout) -> dict[str, list[Column]]:
    """List the columns of every table that grows with the tokens, in the order of storage.

    Grain: ``token`` one row per token; ``route`` one per token and site; ``score`` and
    ``hidden`` one per token and site that has them; ``sample`` one per sampled token; ``batch``
    one per forward pass; ``rollup`` one per site, domain and phase, with lists over experts.
    """
    place = [Column("token_id", *_INTEGER), Column("layer", *_INTEGER), Column("site", *_INTEGER)]
    floats = ("FLOAT[] NOT NULL", pa.large_list(pa.float32()))
    return {
        "token": [
            Column("token_id", *_INTEGER),
            Column("prompt_id", *_INTEGER),
            Column("position", *_INTEGER),
            Column("phase", "VARCHAR NOT NULL", pa.string()),
            Column("token", *_INTEGER),
            Column("text", *_TEXT),
            Column("loss", "FLOAT", pa.float32()),
            Column("batch_id", *_INTEGER),
            Column("row_in_batch", *_INTEGER),
        ],
        "batch": [
            Column("batch_id", *_INTEGER),
            Column("phase", "VARCHAR NOT NULL", pa.string()),
            Column("tokens", *_INTEGER),
            Column("seconds", "DOUBLE NOT NULL", pa.float64()),
        ],
        "route": [
            *place,
            *(Column(name, *_CODE) for name in STATISTICS),
            *(Column(f"ids{word}", *_WORD) for word in range(layout.id_words)),
            *(Column(f"weights{word}", *_WORD) for word in range(layout.weight_words)),
        ],
        "score": [*place, Column("scores", *floats)],
        "hidden": [*place, Column("hidden", *floats)],
        "sample": [Column("token_id", *_INTEGER)],
        "rollup": [
            Column("layer", *_INTEGER),
            Column("site", *_INTEGER),
            Column("domain", *_TEXT),
            Column("phase", "VARCHAR NOT NULL", pa.string()),
            Column("assignments", "BIGINT[] NOT NULL", pa.large_list(pa.int64())),
            Column("weight_sum", "DOUBLE[] NOT NULL", pa.large_list(pa.float64())),
            Column("prob_sum", "DOUBLE[]", pa.large_list(pa.float64())),
        ],
    }


# text in a JSON column is valid JSON; times are UTC
_FIXED_TABLES = """
CREATE SCHEMA packed;
CREATE TABLE packed.run (
    model VARCHAR NOT NULL, revision VARCHAR, architecture VARCHAR NOT NULL,
    dtype VARCHAR NOT NULL, device VARCHAR NOT NULL, level VARCHAR NOT NULL,
    vocab_size INTEGER NOT NULL, hidden_size INTEGER NOT NULL,
    backends VARCHAR NOT NULL, packages VARCHAR NOT NULL, config VARCHAR NOT NULL,
    sample VARCHAR NOT NULL, notes VARCHAR NOT NULL,
    id_bits INTEGER NOT NULL, slots INTEGER NOT NULL,
    started_at TIMESTAMP NOT NULL, seconds DOUBLE,
    schema_version INTEGER NOT NULL, complete BOOLEAN NOT NULL
);
CREATE TABLE packed.site (
    layer INTEGER NOT NULL, site INTEGER NOT NULL, module VARCHAR NOT NULL,
    n_experts INTEGER NOT NULL, top_k INTEGER NOT NULL, n_shared_experts INTEGER NOT NULL,
    score_function VARCHAR NOT NULL, PRIMARY KEY (layer, site)
);
CREATE TABLE packed.prompt (
    prompt_id INTEGER NOT NULL, text VARCHAR, domain VARCHAR, source VARCHAR,
    n_tokens INTEGER NOT NULL, truncated INTEGER NOT NULL
);
"""

_FIXED_VIEWS = """
CREATE VIEW tokens AS
    SELECT token_id, prompt_id, position, phase, token, text, loss FROM packed.token;
CREATE VIEW prompts AS SELECT prompt_id, text, domain, source FROM packed.prompt;
CREATE VIEW prompt_sizes AS SELECT prompt_id, n_tokens, truncated FROM packed.prompt;
CREATE VIEW scores AS SELECT token_id, layer, site, scores FROM packed.score;
CREATE VIEW hidden AS SELECT token_id, layer, site, hidden FROM packed.hidden;
CREATE VIEW sites AS
    SELECT layer, site, module, n_experts, top_k, n_shared_experts, score_function
    FROM packed.site;
CREATE VIEW batches AS SELECT batch_id, phase, tokens FROM packed.batch;
CREATE VIEW token_batches AS SELECT token_id, batch_id, row_in_batch FROM packed.token;
CREATE VIEW sampled_tokens AS
    SELECT token_id, domain FROM packed.sample
    JOIN packed.token USING (token_id) JOIN packed.prompt USING (prompt_id);
CREATE VIEW expert_load_by AS
    SELECT layer, site, domain, phase,
        unnest(range(len(assignments)))::INTEGER AS expert_id,
        unnest(assignments) AS assignments,
        unnest(weight_sum) AS weight_sum,
        unnest(coalesce(prob_sum, list_resize([NULL::DOUBLE], len(assignments)))) AS prob_sum
    FROM packed.rollup;
CREATE VIEW expert_load AS
    SELECT layer, site, expert_id,
        coalesce(sum(assignments), 0)::BIGINT AS assignments,
        coalesce(sum(weight_sum), 0)::DOUBLE AS weight_sum,
        CASE WHEN count(prob_sum) = count(*) THEN sum(prob_sum) END AS prob_sum
    FROM (SELECT layer, site, unnest(range(n_experts))::INTEGER AS expert_id FROM packed.site)
    LEFT JOIN expert_load_by USING (layer, site, expert_id)
    GROUP BY layer, site, expert_id;
CREATE VIEW run AS
    SELECT model, revision, architecture, dtype, device, level, vocab_size, hidden_size,
        backends, packages, config, sample, notes,
        (SELECT count(*) FROM packed.prompt) AS n_prompts,
        (SELECT coalesce(sum(tokens), 0) FROM packed.batch)::BIGINT AS n_tokens,
        (SELECT coalesce(sum(tokens), 0) FROM packed.batch
            WHERE phase = 'generated')::BIGINT AS n_generated,
        (SELECT count(*) FROM packed.prompt WHERE truncated > 0) AS n_truncated_prompts,
        (SELECT count(DISTINCT layer) FROM packed.site) AS n_layers,
        started_at, seconds, schema_version, complete
    FROM packed.run;
"""

# the accounting check compares these with what was handed in
COUNT_TOKENS = "SELECT count(*), count(DISTINCT token_id) FROM packed.token"
COUNT_BATCH_TOKENS = "SELECT coalesce(sum(tokens), 0)::BIGINT FROM packed.batch"
COUNT_LOAD = "SELECT layer, site, sum(assignments)::BIGINT FROM expert_load GROUP BY layer, site"

SELECT_RUN = "SELECT * FROM run"
SELECT_VERSION = "SELECT schema_version FROM packed.run"
SELECT_LEVEL = "SELECT level FROM packed.run"
SELECT_LAYOUT = "SELECT id_bits, slots FROM packed.run"
SELECT_SITES = "SELECT * FROM sites ORDER BY layer, site"
LAST_SECOND = "SELECT coalesce(max(seconds), 0) FROM packed.batch"

CLEAR_ROLLUP = "DELETE FROM packed.rollup"
INSERT_RUN = (
    "INSERT INTO packed.run (model, revision, architecture, dtype, device, level, vocab_size,"
    " hidden_size, backends, packages, config, sample, notes, id_bits, slots, started_at,"
    " schema_version, complete)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '{}', ?, ?, ?, ?, false)"
)
INSERT_SITES = "INSERT INTO packed.site VALUES (?, ?, ?, ?, ?, ?, ?)"
INSERT_PROMPTS = "INSERT INTO packed.prompt SELECT * FROM rows"
CLOSE_RUN = "UPDATE packed.run SET seconds = ?, complete = ?"
SET_BACKENDS = "UPDATE packed.run SET backends = ?"
SET_NOTES = "UPDATE packed.run SET notes = ?"
SET_VERSION = "UPDATE packed.run SET schema_version = ?"


PROMPT_COLUMNS = ("prompt_id", "text", "domain", "source", "n_tokens", "truncated")


def count_rows(table: str) -> str:
    """Write the query that counts the rows of every site in ``route``, ``score`` or ``hidden``."""
    return f"SELECT layer, site, count(*) FROM packed.{table} GROUP BY layer, site"


def insert(table: str) -> str:
    """Write the statement that appends the registered Arrow table ``rows``."""
    return f"INSERT INTO packed.{table} SELECT * FROM rows"


def _assignments(layout: Layout) -> str:
    """Write the view with one row per token, site and filled slot.

    A join with the list of slots reads the packed rows once, where a union over the slots reads
    them once per slot and takes 4 to 8 times as long to find one token.
    """
    return (
        f"SELECT token_id, layer, site, slot, id_code::INTEGER AS expert_id,"
        f" {sql_weight('weight_code')} AS weight"
        f" FROM (SELECT token_id, layer, site, slot,"
        f" {sql_id_code('ids', layout)} AS id_code,"
        f" {sql_weight_code('weights', layout)} AS weight_code"
        f" FROM packed.route CROSS JOIN (VALUES {sql_slots(layout)})"
        f" AS slots(slot, id_word, id_shift, weight_word, weight_shift))"
        f" WHERE id_code <> {layout.empty}"
    )


def count_assignments(layout: Layout) -> str:
    """Write the query that counts the filled slots of every site."""
    return (
        f"SELECT layer, site, sum({sql_count_filled('ids', layout)})::BIGINT"
        " FROM packed.route GROUP BY layer, site"
    )


def create_statements(layout: Layout) -> Sequence[str]:
    """Write the statements that make an empty run file."""
    growing = [
        f"CREATE TABLE packed.{name} ({', '.join(f'{c.name} {c.sql}' for c in columns)})"
        for name, columns in tables(layout).items()
    ]
    statistics = ", ".join(f"{sql_half(name)} AS {name}" for name in STATISTICS)
    return [
        _FIXED_TABLES,
        *growing,
        _FIXED_VIEWS,
        f"CREATE VIEW assignments AS {_assignments(layout)}",
        f"CREATE VIEW gates AS SELECT token_id, layer, site, {statistics} FROM packed.route",
    ]
