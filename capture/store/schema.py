"""The run file: every table, column and view, and the statements that fill them.

Tables live in the schema ``packed`` and may change with ``SCHEMA_VERSION``. The views are what
everybody reads; their names, columns and meanings stay.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from capture.store.codec import (
    NO_WEIGHT,
    Layout,
    sql_count_filled,
    sql_half,
    sql_id_code,
    sql_slots,
    sql_weight,
    sql_weight_code,
)

SCHEMA_VERSION = 5
OLDEST_READ = 2  # files of older versions have to be migrated
STATISTICS = ("entropy", "margin", "logsumexp", "topk_mass")
# the phase of sums that do not tell prompts from what was generated after them
ANY_PHASE = "any"
# of the sums of a counts-only run: small domains under one name, which no prompt need have
TOGETHER = "(domains put together)"
NO_TOKEN = -1  # a token id that is not known or was left out; the views show it as NULL


class Column(NamedTuple):
    """One column of a table: its name, its SQL type and its Arrow type."""

    name: str
    sql: str
    arrow: pa.DataType


_INTEGER = ("INTEGER NOT NULL", pa.int32())
_TEXT = ("VARCHAR", pa.string())
_CODE = ("USMALLINT", pa.uint16())
_WORD = ("UBIGINT NOT NULL", pa.uint64())

_FLOAT = ("FLOAT NOT NULL", pa.float32())
_CELLS = ("INTEGER[] NOT NULL", pa.large_list(pa.int32()))
ATTENTION_STATISTICS = ("entropy", "sink_mass", "mean_distance", "window_mass")
# a share of a map's row is a whole number of parts: within 4e-6, and a row sums to 1 exactly
MAP_PARTS = 2**18

_PAIR_TABLES = {
    "coactivation": [
        Column("layer", *_INTEGER),
        Column("site", *_INTEGER),
        Column("tokens", *_CELLS),
    ],
    "transition": [
        Column("layer", *_INTEGER),
        Column("next_layer", *_INTEGER),
        Column("n_next", *_INTEGER),
        Column("tokens", *_CELLS),
    ],
}
ATTENTION_TABLES = {
    "attention_prompt": [
        Column("prompt_id", *_INTEGER),
        Column("first_token", *_INTEGER),
        Column("tokens", *_INTEGER),
        Column("bins", *_INTEGER),
        Column("bin_width", *_INTEGER),
        Column("every", *_INTEGER),
    ],
    "attention_head": [
        Column("prompt_id", *_INTEGER),
        Column("layer", *_INTEGER),
        Column("head", *_INTEGER),
        Column("bins", *_INTEGER),
        Column("queries", *_INTEGER),
        *(Column(name, *_FLOAT) for name in ATTENTION_STATISTICS),
        Column("received", "FLOAT[] NOT NULL", pa.large_list(pa.float32())),
        # rows of the lower triangle, in parts; the rest is 0
        Column("cells", "UINTEGER[] NOT NULL", pa.large_list(pa.uint32())),
    ],
    "attention_key": [
        Column("token_id", *_INTEGER),
        Column("layer", *_INTEGER),
        # tokens back to the key; NULL = there are fewer keys
        Column("distances", "UINTEGER[] NOT NULL", pa.large_list(pa.uint32())),
        Column("weights", "USMALLINT[] NOT NULL", pa.large_list(pa.uint16())),
    ],
}
# sums of a window of time, where a trace has nothing finer
LOAD_WINDOW = "load_window"
LOAD_WINDOW_COLUMNS = [
    Column("step", "BIGINT NOT NULL", pa.int64()),
    Column("layer", *_INTEGER),
    Column("site", *_INTEGER),
    Column("assignments", "BIGINT[] NOT NULL", pa.large_list(pa.int64())),
]
LOAD_WINDOW_VIEW = f"""
CREATE VIEW load_windows AS
    SELECT step, layer, site, unnest(range(len(assignments)))::INTEGER AS expert_id,
        unnest(assignments) AS assignments
    FROM packed.{LOAD_WINDOW};
"""


def tables(layout: Layout) -> dict[str, list[Column]]:
    """List the columns of every table that grows with the tokens, in the order of storage.

    Grain: ``token`` one row per token; ``route`` one per token and site; ``score`` and
    ``hidden`` one per token and site that has them; ``sample`` one per sampled token; ``batch``
    one per forward pass; ``rollup`` one per site, domain and phase, with lists over experts;
    ``coactivation`` one per site and ``transition`` one per site that leads to another, with a
    matrix row by row; ``attention_prompt`` one per prompt whose attention is recorded,
    ``attention_head`` one per such prompt, layer and head, ``attention_key`` one per token whose
    heaviest keys are kept and layer, with lists over heads and, within a head, ranks;
    ``load_window`` one per step of a recorder and site, at level counts, with a list over experts.
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
        **_PAIR_TABLES,
        **ATTENTION_TABLES,
        LOAD_WINDOW: LOAD_WINDOW_COLUMNS,
    }


# Beside the table ``site``, which older files have too. ``side`` is NULL in a model without both;
# ``expert_kinds`` has a word for every expert, and is NULL where the experts were not seen, as is
# ``dropped``.
SITE_FACT = "site_fact"
KINDS = ("routed", "identity", "zero", "constant", "skip")
SIDES = ("encoder", "decoder")

SITE_FACT_TABLE = f"""
CREATE TABLE packed.{SITE_FACT} (
    layer INTEGER NOT NULL, site INTEGER NOT NULL, side VARCHAR, expert_kinds VARCHAR[],
    dropped BIGINT, PRIMARY KEY (layer, site)
);
"""
SELECT_SITE_FACTS = (
    "SELECT layer, site, NULL::VARCHAR AS side, NULL::VARCHAR[] AS expert_kinds,"
    " NULL::BIGINT AS dropped FROM packed.site"
)
STORE_SITE_FACTS = f"INSERT INTO packed.{SITE_FACT} {SELECT_SITE_FACTS}"

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

_ATTENTION_LAYERS = """
CREATE TABLE packed.attention_layer (
    layer INTEGER NOT NULL, module VARCHAR NOT NULL, heads INTEGER, kind VARCHAR NOT NULL,
    reason VARCHAR, recorded INTEGER[] NOT NULL
);
"""

_EXPERT_LOAD = f"""
CREATE VIEW expert_load AS
    SELECT layer, site, expert_id,
        coalesce(sum(assignments), 0)::BIGINT AS assignments,
        coalesce(sum(weight_sum), 0)::DOUBLE AS weight_sum,
        CASE WHEN count(prob_sum) = count(*) THEN sum(prob_sum) END AS prob_sum,
        any_value(kind) AS kind
    FROM (
        SELECT layer, site, unnest(range(n_experts))::INTEGER AS expert_id,
            unnest(list_resize(coalesce(expert_kinds, []::VARCHAR[]), n_experts)) AS kind
        FROM packed.site LEFT JOIN packed.{SITE_FACT} USING (layer, site)
    )
    LEFT JOIN expert_load_by USING (layer, site, expert_id)
    GROUP BY layer, site, expert_id;
"""

SITES_VIEW = f"""
CREATE VIEW sites AS
    SELECT layer, site, module, n_experts, top_k, n_shared_experts, score_function, side,
        expert_kinds, dropped
    FROM packed.site LEFT JOIN packed.{SITE_FACT} USING (layer, site);
"""

_FIXED_VIEWS = f"""
CREATE VIEW tokens AS
    SELECT token_id, prompt_id, position, phase, token, text, loss FROM packed.token;
CREATE VIEW prompts AS SELECT prompt_id, text, domain, source FROM packed.prompt;
CREATE VIEW prompt_sizes AS SELECT prompt_id, n_tokens, truncated FROM packed.prompt;
CREATE VIEW scores AS SELECT token_id, layer, site, scores FROM packed.score;
CREATE VIEW hidden AS SELECT token_id, layer, site, hidden FROM packed.hidden;
{SITES_VIEW}CREATE VIEW batches AS SELECT batch_id, phase, tokens FROM packed.batch;
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
{_EXPERT_LOAD}CREATE VIEW run AS
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

_PAIR_VIEWS = """
CREATE VIEW coactivation AS
    SELECT layer, site, (cell // n_experts)::INTEGER AS expert_a,
        (cell % n_experts)::INTEGER AS expert_b, tokens::BIGINT AS tokens
    FROM (
        SELECT layer, site, n_experts, unnest(range(len(tokens))) AS cell, unnest(tokens) AS tokens
        FROM packed.coactivation JOIN packed.site USING (layer, site)
    ) WHERE tokens > 0;
CREATE VIEW transitions AS
    SELECT layer, next_layer, (cell // n_next)::INTEGER AS expert_id,
        (cell % n_next)::INTEGER AS next_expert_id, tokens::BIGINT AS tokens
    FROM (
        SELECT layer, next_layer, n_next, unnest(range(len(tokens))) AS cell,
            unnest(tokens) AS tokens
        FROM packed.transition
    ) WHERE tokens > 0;
"""

_ATTENTION_VIEWS = f"""
CREATE VIEW attention_layers AS
    SELECT layer, module, heads, kind, reason FROM packed.attention_layer;
CREATE VIEW attention_prompts AS
    SELECT prompt_id, tokens, bins, bin_width, every FROM packed.attention_prompt;
CREATE VIEW attention_stats AS
    SELECT prompt_id, layer, head, queries, {", ".join(ATTENTION_STATISTICS)}
    FROM packed.attention_head;
CREATE VIEW attention_maps AS
    SELECT prompt_id, layer, head, bins,
        list_transform(range(bins * bins), lambda cell:
            CASE WHEN cells[(cell // bins) * (cell // bins + 1) // 2 + 1] IS NULL THEN NULL
            WHEN cell % bins > cell // bins THEN 0
            ELSE cells[(cell // bins) * (cell // bins + 1) // 2 + cell % bins + 1] / {MAP_PARTS}
            END)::FLOAT[] AS map
    FROM packed.attention_head;
CREATE VIEW attention_received AS
    SELECT prompt_id, layer, head, bins, received FROM packed.attention_head;
CREATE VIEW attention_top_keys AS
    SELECT token_id, layer, recorded[slot // ranks + 1] AS head, (slot % ranks)::INTEGER AS rank,
        (token_id - distance)::INTEGER AS key_token_id, {sql_weight("code")} AS weight
    FROM (
        SELECT token_id, layer, recorded, len(distances) // len(recorded) AS ranks,
            unnest(range(len(distances))) AS slot, unnest(distances) AS distance,
            unnest(weights) AS code
        FROM packed.attention_key JOIN packed.attention_layer USING (layer)
        WHERE len(recorded) > 0
    ) WHERE distance IS NOT NULL;
"""

# Sums of the routers' statistics, so that no page reads every row: counted from the rows when a
# run is closed. A file of an older version is read through the same SELECT: slower, and equal.
GATE_SUM = "gate_sum"

GATE_SUM_TABLE = f"""
CREATE TABLE packed.{GATE_SUM} (
    layer INTEGER NOT NULL, site INTEGER NOT NULL, domain VARCHAR, phase VARCHAR NOT NULL,
    statistic VARCHAR NOT NULL, tokens BIGINT NOT NULL, total DOUBLE NOT NULL
);
"""
GATE_SUM_VIEW = f"""
CREATE VIEW gate_sums AS
    SELECT layer, site, domain, phase, statistic, tokens, total FROM packed.{GATE_SUM};
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
SELECT_GATE_SUMS = " UNION ALL ".join(_counted(name) for name in STATISTICS)
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
STORE_GATE_SUMS = (
    f"DELETE FROM packed.{GATE_SUM};"
    f" INSERT INTO packed.{GATE_SUM} WITH sums AS MATERIALIZED ("
    f"SELECT layer, site, domain, phase, {_ALL} FROM packed.route"
    " JOIN packed.token USING (token_id) JOIN packed.prompt USING (prompt_id)"
    f" GROUP BY layer, site, domain, phase) {_APART}"
)
# tables that files from OLDEST_READ on lack -> their first version, the SELECT read instead before
STAND_INS = {
    GATE_SUM: (3, SELECT_GATE_SUMS),
    LOAD_WINDOW: (
        4,
        "SELECT NULL::BIGINT AS step, NULL::INTEGER AS layer, NULL::INTEGER AS site,"
        " NULL::BIGINT[] AS assignments WHERE false",
    ),
    SITE_FACT: (5, SELECT_SITE_FACTS),
}

# the accounting check compares these with what was handed in
COUNT_TOKENS = "SELECT count(*), count(DISTINCT token_id) FROM packed.token"
TOKEN_RANGE = "SELECT coalesce(min(token_id), 0), coalesce(max(token_id), -1) FROM packed.token"
COUNT_BATCH_TOKENS = "SELECT phase, sum(tokens)::BIGINT FROM packed.batch GROUP BY phase"
COUNT_LOAD = "SELECT layer, site, sum(assignments)::BIGINT FROM expert_load GROUP BY layer, site"
COUNT_DIAGONAL = (
    "SELECT layer, site, sum(tokens)::BIGINT FROM coactivation WHERE expert_a = expert_b"
    " GROUP BY layer, site"
)

SELECT_RUN = "SELECT * FROM run"
RUN_TABLE = "packed.run"
SELECT_LEVEL = "SELECT level FROM packed.run"
SELECT_COMPLETE = "SELECT complete FROM packed.run"
SELECT_NOTES = "SELECT notes FROM packed.run"
SELECT_LAYOUT = "SELECT id_bits, slots FROM packed.run"
SELECT_SITES = "SELECT * EXCLUDE (dropped) FROM sites ORDER BY layer, site"
SELECT_PACKED_SITES = "SELECT * FROM packed.site ORDER BY layer, site"  # of any version
LAST_SECOND = "SELECT coalesce(max(seconds), 0) FROM packed.batch"

CLEAR_PAIRS = "DELETE FROM packed.coactivation; DELETE FROM packed.transition"
CLEAR_ROLLUP = "DELETE FROM packed.rollup"
INSERT_RUN = (
    "INSERT INTO packed.run (model, revision, architecture, dtype, device, level, vocab_size,"
    " hidden_size, backends, packages, config, sample, notes, id_bits, slots, started_at,"
    " schema_version, complete)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '{}', ?, ?, ?, ?, false)"
)
INSERT_SITES = "INSERT INTO packed.site VALUES (?, ?, ?, ?, ?, ?, ?)"
INSERT_SITE_FACTS = f"INSERT INTO packed.{SITE_FACT} VALUES (?, ?, ?, ?, NULL)"
# slots of all tokens that get to a router, without those that are filled
STORE_DROPPED = f"""
UPDATE packed.{SITE_FACT} AS fact SET dropped = found.slots - found.filled FROM (
    SELECT layer, site, coalesce(tokens, 0) * top_k AS slots, coalesce(filled, 0) AS filled
    FROM packed.site JOIN packed.{SITE_FACT} AS known USING (layer, site) LEFT JOIN (
        SELECT layer, site, sum(list_sum(assignments)) AS filled FROM packed.rollup
        GROUP BY layer, site
    ) USING (layer, site) LEFT JOIN (
        SELECT side, sum(tokens) AS tokens FROM packed.batch
        JOIN (VALUES ('', 'prompt'), ('', 'generated'), ('encoder', 'prompt'),
            ('decoder', 'generated')) AS reads(side, phase) USING (phase)
        GROUP BY side
    ) AS read ON read.side = coalesce(known.side, '')
) AS found
WHERE found.layer = fact.layer AND found.site = fact.site AND expert_kinds IS NOT NULL
"""
INSERT_ATTENTION_LAYERS = "INSERT INTO packed.attention_layer VALUES (?, ?, ?, ?, ?, ?)"
CLOSE_RUN = "UPDATE packed.run SET seconds = ?, complete = ?"
SET_BACKENDS = "UPDATE packed.run SET backends = ?"
SET_NOTES = "UPDATE packed.run SET notes = ?"
SET_VERSION = "UPDATE packed.run SET schema_version = ?"


# of a file with token ids that are not known or were left out
TOKENS_WITHOUT_IDS = (
    "CREATE OR REPLACE VIEW tokens AS SELECT token_id, prompt_id, position, phase,"
    f" nullif(token, {NO_TOKEN}) AS token, text, loss FROM packed.token"
)
PROMPT_COLUMNS = ("prompt_id", "text", "domain", "source", "n_tokens", "truncated")


def select_version(table: str) -> str:
    """Write the query for the schema version in the run table, called ``table`` here."""
    return f"SELECT schema_version FROM {table}"


def count_rows(table: str) -> str:
    """Write the query that counts the rows of every site in ``route``, ``score`` or ``hidden``."""
    return f"SELECT layer, site, count(*) FROM packed.{table} GROUP BY layer, site"


def count_all(table: str) -> str:
    """Write the query that counts the rows of a table."""
    return f"SELECT count(*) FROM packed.{table}"


def routed_tokens(layout: Layout) -> str:
    """Write the query for the packed ids of a range of tokens, site after site."""
    words = ", ".join(f"ids{word}" for word in range(layout.id_words))
    return (
        f"SELECT layer, site, {words} FROM packed.route WHERE token_id >= ? AND token_id < ?"
        " ORDER BY layer, site, token_id"
    )


def insert(table: str) -> str:
    """Write the statement that appends the registered Arrow table ``rows``."""
    return f"INSERT INTO packed.{table} SELECT * FROM rows"


def _assignments(layout: Layout, code: str = "weight_code") -> str:
    """Write the view with one row per token, site and filled slot.

    A join with the list of slots reads the packed rows once, where a union over the slots reads
    them once per slot and takes 4 to 8 times as long to find one token.
    """
    return (
        f"SELECT token_id, layer, site, slot, id_code::INTEGER AS expert_id,"
        f" {sql_weight(code)} AS weight"
        f" FROM (SELECT token_id, layer, site, slot,"
        f" {sql_id_code('ids', layout)} AS id_code,"
        f" {sql_weight_code('weights', layout)} AS weight_code"
        f" FROM packed.route CROSS JOIN (VALUES {sql_slots(layout)})"
        f" AS slots(slot, id_word, id_shift, weight_word, weight_shift))"
        f" WHERE id_code <> {layout.empty}"
    )


def views_without_weights(layout: Layout) -> Sequence[str]:
    """Write the views that show weights which are not known as NULL, in place of the others."""
    # what is not known of the experts, and not what no token chose
    known = "count(weight_sum) > 0 OR count(assignments) = 0"
    total = "coalesce(sum(weight_sum), 0)::DOUBLE"
    load = _EXPERT_LOAD.replace(total, f"CASE WHEN {known} THEN {total} END")
    rows = _assignments(layout, f"nullif(weight_code, {NO_WEIGHT})")
    return [
        load.replace("CREATE VIEW", "CREATE OR REPLACE VIEW"),
        f"CREATE OR REPLACE VIEW assignments AS {rows}",
    ]


def count_assignments(layout: Layout) -> str:
    """Write the query that counts the filled slots of every site."""
    return (
        f"SELECT layer, site, sum({sql_count_filled('ids', layout)})::BIGINT"
        " FROM packed.route GROUP BY layer, site"
    )


def _create(columns_of: dict[str, list[Column]]) -> list[str]:
    return [
        f"CREATE TABLE packed.{name} ({', '.join(f'{c.name} {c.sql}' for c in columns)})"
        for name, columns in columns_of.items()
    ]


def statements_of_version_2() -> Sequence[str]:
    """Write the statements that add to a version 1 file what version 2 has more.

    When one of these tables or views changes, the old text moves to ``rewrite.py``.
    """
    growing = _create({**_PAIR_TABLES, **ATTENTION_TABLES})
    return [_ATTENTION_LAYERS, *growing, _PAIR_VIEWS, _ATTENTION_VIEWS]


def statements_of_version_4() -> Sequence[str]:
    """Write the statements that add to a version 3 file what version 4 has more."""
    return [*_create({LOAD_WINDOW: LOAD_WINDOW_COLUMNS}), LOAD_WINDOW_VIEW]


def create_statements(layout: Layout) -> Sequence[str]:
    """Write the statements that make an empty run file."""
    growing = _create(tables(layout))
    fixed = [_FIXED_TABLES, _ATTENTION_LAYERS, GATE_SUM_TABLE, SITE_FACT_TABLE]
    return [*fixed, *growing, *view_statements(layout)]


def views_of_version_5() -> Sequence[str]:
    """Write the views that version 5 shows more columns in, in place of those of a file."""
    views = (SITES_VIEW, _EXPERT_LOAD)
    return [view.replace("CREATE VIEW", "CREATE OR REPLACE VIEW") for view in views]


def view_statements(layout: Layout) -> Sequence[str]:
    """Write the statements that make the views over the tables."""
    statistics = ", ".join(f"{sql_half(name)} AS {name}" for name in STATISTICS)
    return [
        _FIXED_VIEWS,
        _PAIR_VIEWS,
        _ATTENTION_VIEWS,
        GATE_SUM_VIEW,
        LOAD_WINDOW_VIEW,
        f"CREATE VIEW assignments AS {_assignments(layout)}",
        f"CREATE VIEW gates AS SELECT token_id, layer, site, {statistics} FROM packed.route",
    ]
