"""Whether a run file says the same thing everywhere.

``check_values`` asks this of a file that may come from a stranger, once for each file: what its
tables may be is the reader's matter, here are the values in them, table by table, as conditions of
a row that is wrong. The pages count on each of these: an expert that its router has, a token of a
prompt that exists, a vector as long as the others, a number that is one. A capture writes nothing
else; a file of a stranger may hold anything that its columns can. Where a condition is unknown
(NULL), the row is wrong, so that what may be missing says so. A verdict is remembered for as long
as the file stays the same.
"""

import json
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from capture.errors import StoreError, quoted
from capture.prompts import MAX_DOMAINS, MAX_PROMPT, MAX_SOURCE
from capture.store import schema
from capture.store.codec import Layout, unpack_ids
from capture.store.files import Identity, identity, is_partitioned, limited, not_a_run
from capture.store.records import LEVELS, SiteInfo, sites_of
from capture.store.schema import (
    ANY_PHASE,
    ATTENTION_STATISTICS,
    MAP_PARTS,
    NO_TOKEN,
    STATISTICS,
)

SECONDS = 60.0  # what a check may take; a run of 100 M rows takes a fifth of it
_DOCUMENTS = ("backends", "packages", "config", "sample", "notes")
_TEXTS = {"prompt": ("text", "domain", "source"), "token": ("text",)}
# of reading a damaged file: bytes that are not text, numbers and moments that Python does not have
UNREADABLE = (duckdb.Error, pa.ArrowException, ValueError, OverflowError, MemoryError)
_SALT_BITS = 62
_ROWS = 2**17  # routes that are unpacked at a time
_REMEMBERED = 1_000  # files
_lock = threading.Lock()
_verdicts: dict[Identity, StoreError | None] = {}
# characters
MAX_NAME = 1_000  # of a model, a module, a domain, a token
MAX_DOCUMENT = 1_000_000  # of JSON
MAX_LAYER = 100_000
MAX_HEADS = 10_000
MAX_BINS = 4_096
MAX_WIDTH = 1_000_000  # numbers in a vector
MAX_SECONDS = 1e10
MAX_NUMBER = 1e30  # of a score or a router's input: their squares still have a sum
MAX_LOSS = 1e6  # nats
MAX_HALF = 131_072  # what 16 bits of a statistic can say
MAX_WEIGHT = 512
MAX_TOKENS = 10**9  # of a prompt
MAX_LOAD = 2**53  # assignments of an expert that no token is known of; doubles count so far
# DuckDB knows moments that Python does not
_MOMENT = "isfinite(started_at) AND started_at BETWEEN '1970-01-01' AND '2200-01-01'"
PHASE = "phase NOT IN ('prompt', 'generated')"


class Question(NamedTuple):
    """Rows, and what must not be true of one."""

    rows: str  # what follows FROM
    wrong: Mapping[str, str]  # "it has ..." -> the condition of a row where it is so


def long(column: str, most: int = MAX_NAME) -> str:
    """Write the condition of a text that is too long; NULL is not."""
    return f"{column} IS NOT NULL AND strlen({column}) > {most}"


def number(column: str, least: float, most: float) -> str:
    """Write the condition of what is not a number, or outside of a range."""
    return f"NOT (isfinite({column}) AND {column} BETWEEN {least} AND {most})"


def numbers(column: str, least: str = f"{-MAX_NUMBER}", most: str = f"{MAX_NUMBER}") -> str:
    """Write the condition of a list with a gap, or with what is not a number in a range."""
    return f"(len({column}) <> list_count({column}) OR {beyond(column, least, most)})"


def beyond(column: str, least: str = f"{-MAX_NUMBER}", most: str = f"{MAX_NUMBER}") -> str:
    """Write the condition of a list with something that is not a number in a range; gaps may be."""
    # NaN is the largest number of all
    return (
        f"(coalesce(list_min({column}), {most}) < {least}"
        f" OR coalesce(list_max({column}), {least}) > {most})"
    )


def counts(column: str, most: str) -> str:
    """Write the condition of a list with something that is not a count from 0 to ``most``."""
    return (
        f"(len({column}) <> list_count({column}) OR coalesce(list_min({column}), 0) < 0"
        f" OR coalesce(list_max({column}), 0) > {most})"
    )


RUN = Question(
    "packed.run",
    {
        "a text of its description that is too long": " OR ".join(
            f"({long(name)})" for name in ("model", "revision", "architecture", "dtype", "device")
        ),
        "a document of over a million characters": " OR ".join(
            f"({long(name, MAX_DOCUMENT)})"
            for name in ("backends", "packages", "config", "sample", "notes")
        ),
        "a size that no model has": f"vocab_size < 0 OR hidden_size NOT BETWEEN 0 AND {MAX_WIDTH}",
        "a start that is not a date from 1970 to 2200": f"NOT ({_MOMENT})",
        "a duration that cannot be": f"seconds IS NOT NULL AND {number('seconds', 0, MAX_SECONDS)}",
    },
)
SITES = Question(
    "packed.site, packed.run",
    {
        "a router in a layer that cannot be": f"layer NOT BETWEEN 0 AND {MAX_LAYER}"
        f" OR site NOT BETWEEN 0 AND {MAX_LAYER}",
        "a top_k outside of 1 to the number of experts": "top_k NOT BETWEEN 1 AND n_experts"
        " OR top_k > slots",
        "a number of shared experts that cannot be": "n_shared_experts NOT BETWEEN 0 AND 65534",
        "a router with a name that is too long": f"({long('module')})"
        f" OR ({long('score_function')})",
    },
)
# of the whole table: facts of all its rows together
_ONCE = {
    "prompt": "prompt_id",
    "batch": "batch_id",
    "site": "layer, site",
    schema.SITE_FACT: "layer, site",
    "token": "token_id",
    "sample": "token_id",
    "rollup": "layer, site, domain, phase",
    "coactivation": "layer, site",
    "transition": "layer, next_layer",
    "attention_layer": "layer",
    "attention_prompt": "prompt_id",
    "attention_head": "prompt_id, layer, head",
    "attention_key": "token_id, layer",
    "gate_sum": "layer, site, domain, phase, statistic",
    "load_window": "step, layer, site",
}
_LAST_SITES = "(SELECT layer, max_by(n_experts, site) AS n_experts FROM packed.site GROUP BY layer)"
_RECORDED = (
    "(SELECT layer, unnest(recorded) AS head FROM packed.attention_layer)"
    " AS known USING (layer, head)"
)
_FACTS = "(SELECT level, vocab_size, hidden_size, (SELECT count(*) FROM packed.token) AS n_all"
_FACTS += " FROM packed.run) AS facts"
_MOST_WEIGHT = f"{MAX_WEIGHT}.0 * (n_all + 1)"

QUESTIONS = (
    Question(
        f"packed.site FULL JOIN packed.{schema.SITE_FACT} AS fact USING (layer, site), {_FACTS}",
        {
            "facts of a router that it does not have": "n_experts IS NULL",
            "a router on a side that is none": "side IS NOT NULL AND side NOT IN"
            f" ({', '.join(map(repr, schema.SIDES))})",
            "experts of a kind that is none": "expert_kinds IS NOT NULL AND (len(expert_kinds) <>"
            " n_experts OR len(list_filter(expert_kinds, lambda kind: kind IN"
            f" ({', '.join(map(repr, schema.KINDS))}))) <> n_experts)",
            "dropped assignments that cannot be": "dropped IS NOT NULL AND dropped NOT BETWEEN 0"
            " AND n_all * top_k::HUGEINT",
        },
    ),
    Question(
        "packed.prompt",
        {
            "a prompt with a negative number": "prompt_id < 0",
            "a prompt with a number of tokens that cannot be": f"n_tokens NOT BETWEEN 0 AND"
            f" {MAX_TOKENS} OR truncated NOT BETWEEN 0 AND {MAX_TOKENS}",
            "a prompt that is too long": long("text", MAX_PROMPT),
            "a domain with a name that is too long": long("domain"),
            "a prompt with a source that is too long": long("source", MAX_SOURCE),
        },
    ),
    Question(
        "packed.batch LEFT JOIN (SELECT batch_id, count(*) AS found FROM packed.token"
        " GROUP BY batch_id) AS stored USING (batch_id)",
        {
            "a batch with a negative number": "batch_id < 0 OR tokens < 0",
            "tokens that its batches do not know": "tokens <> coalesce(found, 0)",
            "batches of unknown phases": PHASE,
            "a batch at a time that cannot be": number("seconds", 0, MAX_SECONDS),
        },
    ),
    Question(
        "packed.token LEFT JOIN packed.prompt AS prompt USING (prompt_id)"
        " LEFT JOIN packed.batch AS batch USING (batch_id)",
        {
            "tokens of no prompt": "prompt.n_tokens IS NULL",
            "unknown phases": f"token.{PHASE}",
            "tokens of no batch": "batch.tokens IS NULL OR batch.phase <> token.phase",
            "tokens outside of their batch": "row_in_batch NOT BETWEEN 0 AND batch.tokens - 1",
            "a token with a negative number": "token_id < 0 OR position < 0",
        },
    ),
    Question(
        f"packed.token, {_FACTS}",
        {
            "a token that is not in the vocabulary": "token IS NOT NULL AND (token <"
            f" {NO_TOKEN} OR token >= vocab_size)",
            "a token with a text that is too long": long("token.text"),
            "a loss that is not a number": f"loss IS NOT NULL AND {number('loss', -1, MAX_LOSS)}",
        },
    ),
    Question(
        "(SELECT prompt_id, min(position) AS first, max(position) AS last, count(*) AS found,"
        " count(DISTINCT position) AS places, count(*) FILTER (phase = 'prompt') AS given,"
        " max(token_id::BIGINT - position) FILTER (phase = 'prompt')"
        " - min(token_id::BIGINT - position) FILTER (phase = 'prompt') AS apart"
        " FROM packed.token GROUP BY prompt_id) JOIN packed.prompt USING (prompt_id)",
        {
            "a prompt whose tokens do not follow each other": "first <> 0 OR last <> found - 1"
            " OR places <> found OR coalesce(apart, 0) <> 0",
            "a prompt with more tokens than it says": "given > n_tokens",
        },
    ),
    Question(
        "(SELECT max(token_id) AS last FROM packed.token),"
        " (SELECT count(*) AS generated FROM packed.token WHERE phase = 'generated'),"
        " (SELECT coalesce(sum(n_tokens), 0) AS planned, count(DISTINCT domain) AS domains"
        " FROM packed.prompt)",
        {
            "token ids beyond its tokens": "coalesce(last, -1) >= planned + generated",
            "too many domains": f"domains > {MAX_DOMAINS}",
        },
    ),
    Question(
        "packed.rollup LEFT JOIN packed.site USING (layer, site) LEFT JOIN (SELECT DISTINCT"
        " coalesce(domain, '') AS domain, true AS known FROM packed.prompt) AS named"
        f" ON coalesce(rollup.domain, '') = named.domain, {_FACTS}",
        {
            "sums of a router that it does not have": "n_experts IS NULL"
            " OR len(assignments) <> n_experts OR len(weight_sum) <> n_experts"
            " OR coalesce(len(prob_sum), n_experts) <> n_experts",
            "sums of a domain that no prompt has": "named.known IS NULL AND level <> 'counts'"
            f" AND NOT (level = 'stats' AND rollup.domain = '{schema.TOGETHER}')",
            "a domain of sums with a name that is too long": long("rollup.domain"),
            "sums of unknown phases": f"CASE level WHEN 'counts' THEN phase <> '{ANY_PHASE}'"
            f" ELSE {PHASE} END",
            "negative counts": "list_min(assignments) < 0",
            "counts that cannot be": counts(
                "assignments", f"CASE level WHEN 'counts' THEN {MAX_LOAD} ELSE n_all END"
            )
            + " OR (level <> 'counts' AND list_sum(assignments) > n_all * top_k::HUGEINT)",
            "sums that are not numbers": f"{beyond('weight_sum', '0', _MOST_WEIGHT)}"
            f" OR (prob_sum IS NOT NULL AND {numbers('prob_sum', '-1', _MOST_WEIGHT)})",
        },
    ),
    Question(
        "packed.run, (SELECT (SELECT count(*) FROM packed.token) + (SELECT count(*) FROM"
        " packed.prompt) + (SELECT count(*) FROM packed.batch) AS found),"
        " (SELECT count(DISTINCT domain) AS domains FROM packed.rollup)",
        {
            "tokens or prompts at level counts": "level = 'counts' AND found > 0",
            "too many domains of sums": f"domains > {MAX_DOMAINS + 1}",
        },
    ),
    Question(
        f"packed.load_window LEFT JOIN packed.site USING (layer, site), {_FACTS}",
        {
            "windows of a router that it does not have": "n_experts IS NULL OR level <> 'counts'"
            " OR len(assignments) <> n_experts",
            "windows of steps that cannot be": f"step NOT BETWEEN 0 AND {MAX_LOAD}",
            "windows with counts that cannot be": counts("assignments", f"{MAX_LOAD}"),
        },
    ),
    Question(
        "(SELECT layer, site, sum(list_sum(assignments)::HUGEINT) AS found FROM packed.load_window"
        " GROUP BY layer, site) AS windows LEFT JOIN (SELECT layer, site,"
        " sum(list_sum(assignments)::HUGEINT) AS total FROM packed.rollup GROUP BY layer, site)"
        " AS sums USING (layer, site)",
        {"windows that do not add up to the sums": "total IS NULL OR found <> total"},
    ),
    Question(
        "packed.score LEFT JOIN packed.site USING (layer, site) LEFT JOIN packed.token"
        " USING (token_id)",
        {
            "scores of no token": "token.position IS NULL",
            "scores of another number of experts": "n_experts IS NULL OR len(scores) <> n_experts",
            "a score that is not a number": "list_count(scores) = 0 OR " + beyond("scores"),
        },
    ),
    Question(
        "packed.hidden LEFT JOIN packed.site USING (layer, site) LEFT JOIN packed.token"
        " USING (token_id) LEFT JOIN (SELECT layer, site, any_value(len(hidden)) AS width"
        " FROM packed.hidden GROUP BY layer, site) AS usual USING (layer, site)",
        {
            "a router input of no token": "token.position IS NULL OR n_experts IS NULL",
            "router inputs of different lengths": "len(hidden) <> width"
            f" OR width NOT BETWEEN 1 AND {MAX_WIDTH}",
            "a router input that is not a number": numbers("hidden"),
        },
    ),
    Question(
        "packed.sample LEFT JOIN packed.token USING (token_id)",
        {"a sample of no token": "position IS NULL"},
    ),
    Question(
        f"packed.coactivation LEFT JOIN packed.site USING (layer, site), {_FACTS}",
        {
            "counts of pairs of another size": "n_experts IS NULL"
            " OR len(tokens) <> n_experts::BIGINT * n_experts",
            "counts of pairs that cannot be": counts("tokens", "n_all"),
        },
    ),
    Question(
        f"packed.transition LEFT JOIN {_LAST_SITES} AS here USING (layer) LEFT JOIN"
        f" {_LAST_SITES} AS there ON there.layer = next_layer, {_FACTS}",
        {
            "counts of transitions of another size": "here.n_experts IS NULL"
            " OR there.n_experts IS NULL OR n_next <> there.n_experts OR next_layer <="
            " transition.layer OR len(tokens) <> here.n_experts::BIGINT * there.n_experts",
            "counts of transitions that cannot be": counts("tokens", "n_all"),
        },
    ),
    Question(
        "packed.attention_layer",
        {
            "attention of a layer that cannot be": f"layer NOT BETWEEN 0 AND {MAX_LAYER}"
            f" OR (heads IS NOT NULL AND heads NOT BETWEEN 1 AND {MAX_HEADS})",
            "an attention layer with a text that is too long": f"({long('module')})"
            f" OR ({long('kind')}) OR ({long('reason', MAX_SOURCE)})",
            "attention of heads that the layer does not have": "len(recorded) > 0"
            f" AND ({counts('recorded', 'heads - 1')}"
            " OR len(list_distinct(recorded)) <> len(recorded))",
        },
    ),
    Question(
        "packed.attention_prompt LEFT JOIN packed.prompt AS prompt USING (prompt_id) LEFT JOIN"
        " (SELECT prompt_id, min(token_id) AS first, count(*) AS found FROM packed.token"
        " WHERE phase = 'prompt' GROUP BY prompt_id) AS stored USING (prompt_id)",
        {
            "attention of no prompt": "prompt.n_tokens IS NULL",
            "attention of tokens that the prompt does not have": "first_token <> first"
            " OR tokens NOT BETWEEN 1 AND found",
            "attention in bins that cannot be": f"bins NOT BETWEEN 1 AND {MAX_BINS}"
            " OR bin_width NOT BETWEEN 1 AND tokens OR every NOT BETWEEN 1 AND 1000000"
            " OR bins <> ceil(tokens / bin_width)",
        },
    ),
    Question(
        "packed.attention_head LEFT JOIN packed.attention_prompt AS attended USING (prompt_id)"
        f" LEFT JOIN {_RECORDED}",
        {
            "a map of no prompt": "attended.bins IS NULL",
            "a map of a head that is not recorded": "known.head IS NULL",
            "maps of another size than they say": "attention_head.bins <> attended.bins OR"
            " len(cells) <> attended.bins::BIGINT * (attended.bins + 1) // 2"
            " OR len(received) <> attended.bins",
            "a map of more queries than tokens": "queries NOT BETWEEN 0 AND attended.tokens",
            "a map of shares that cannot be": f"coalesce(list_max(cells), 0) > {MAP_PARTS}",
            "attention that is not a number": " OR ".join(
                number(name, -1, MAX_TOKENS) for name in ATTENTION_STATISTICS
            )
            + f" OR {numbers('received', '-1', str(MAX_TOKENS))}",
        },
    ),
    Question(
        "(SELECT count(*) AS found FROM packed.attention_head),"
        " (SELECT count(*) AS attended FROM packed.attention_prompt),"
        " (SELECT coalesce(sum(len(recorded)), 0) AS heads FROM packed.attention_layer)",
        {"prompts with attention of some heads only": "found <> attended * heads"},
    ),
    Question(
        "packed.attention_key LEFT JOIN packed.token USING (token_id) LEFT JOIN"
        " packed.attention_layer AS about USING (layer)",
        {
            "keys of no token": "position IS NULL",
            "keys of a layer that is not recorded": "about.recorded IS NULL"
            " OR len(about.recorded) = 0",
            "keys of another number than heads": "len(distances) <> len(weights)"
            " OR len(distances) % len(about.recorded) <> 0",
            "keys before the prompt": "coalesce(list_max(distances), 0) > position",
        },
    ),
    Question(
        "packed.gate_sum LEFT JOIN packed.site USING (layer, site) LEFT JOIN"
        " (SELECT DISTINCT coalesce(domain, '') AS domain, true AS known FROM packed.prompt)"
        " AS named ON coalesce(gate_sum.domain, '') = named.domain,"
        f" {_FACTS}",
        {
            "sums of statistics of no router": "n_experts IS NULL OR named.known IS NULL"
            f" OR {PHASE} OR statistic NOT IN ({', '.join(map(repr, STATISTICS))})",
            "sums of statistics that cannot be": "gate_sum.tokens NOT BETWEEN 0 AND n_all"
            f" OR NOT isfinite(total) OR abs(total) > {MAX_HALF}.0 * gate_sum.tokens",
        },
    ),
)
# what each of these tables holds once
TWICE = " UNION ALL ".join(
    f"SELECT '{table}' AS name, count(*) - count(DISTINCT ({key})) AS wrong FROM"  # a row is a key
    f" (SELECT {key} FROM packed.{table})"
    for table, key in _ONCE.items()
)


def _routes(layout: Layout) -> str:
    """Write the query for the packed ids of all routes, each with the number of its router."""
    words = ", ".join(f"ids{word}" for word in range(layout.id_words))
    return (
        f"SELECT place, {words} FROM packed.route JOIN (SELECT layer, site,"
        " row_number() OVER (ORDER BY layer, site) - 1 AS place FROM packed.site)"
        " USING (layer, site)"
    )


def _vectors(table: str, salt: int) -> str:
    """Write the query for how many rows every site has in a table, and the hash of their tokens.

    Hashes of tokens are added up, with a salt that no file knows: two tables with the same sum
    have the same tokens, each as often, and nothing has to be sorted or kept.
    """
    return (
        f"SELECT layer, site, count(*), {_hashed('token_id', salt)} FROM packed.{table}"
        " GROUP BY layer, site"
    )


def _repeated(table: str) -> str:
    """Write the query for how many tokens of one site a table holds twice."""
    return (
        f"SELECT count(*) - count(DISTINCT token_id) FROM packed.{table}"
        " WHERE layer = ? AND site = ?"
    )


def _hashed(column: str, salt: int) -> str:
    """Write the sum of the salted hashes of a column."""
    return f"coalesce(sum((hash({column}::BIGINT + {salt}) >> 8)::HUGEINT), 0)"


def check_values(
    path: Path, connection: duckdb.DuckDBPyConnection, *, seconds: float = SECONDS
) -> None:
    """Refuse an open run file whose parts contradict each other; a file is looked at once.

    Raises
    ------
    StoreError
        With what is wrong.
    """
    file = identity(path)
    with _lock:
        known, verdict = file in _verdicts, _verdicts.get(file)
    if not known:
        verdict = contradiction(path, connection, seconds=seconds)
        with _lock:
            _verdicts[file] = verdict
            while len(_verdicts) > _REMEMBERED:
                del _verdicts[next(iter(_verdicts))]
    if verdict is not None:
        # a new one: an error that is raised twice keeps what the first one held
        raise type(verdict)(*verdict.args)


def contradiction(
    path: Path, connection: duckdb.DuckDBPyConnection, *, seconds: float = SECONDS
) -> StoreError | None:
    """Return what is wrong with the values of an open run file, None where nothing is."""
    try:
        with limited(connection, seconds):
            _check(path, connection)
    except StoreError as error:
        return error
    except duckdb.InterruptException:
        return StoreError(
            f"{path.name} could not be checked within {seconds:g} s. Record a smaller run."
        )
    except UNREADABLE as error:
        return not_a_run(path, error)
    return None


def _check(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    for question in (RUN, SITES):
        _ask(path, connection, question)
    if connection.execute("SELECT count(*) FROM packed.site").fetchall() == [(0,)]:
        raise not_a_run(path, "it has no router")
    level = _check_documents(path, connection)
    if is_partitioned(*connection.execute(schema.SELECT_NOTES).fetchall()[0]):
        return  # its rows were looked at when it was written, and are too many for every start
    for table, wrong in connection.execute(TWICE).fetchall():
        if wrong:
            raise not_a_run(path, f"it holds rows of packed.{table} twice")
    for question in QUESTIONS:
        _ask(path, connection, question)
    _check_routes(path, connection, level)
    _check_text(connection)


def _ask(path: Path, connection: duckdb.DuckDBPyConnection, question: Question) -> None:
    counts = ", ".join(
        f"count(*) FILTER (coalesce({wrong}, true))" for wrong in question.wrong.values()
    )
    found = connection.execute(f"SELECT {counts} FROM {question.rows}").fetchall()[0]
    for what, wrong in zip(question.wrong, found, strict=True):
        if wrong:
            raise not_a_run(path, f"it has {what}, in {wrong:,} rows")


def _check_documents(path: Path, connection: duckdb.DuckDBPyConnection) -> str:
    """Refuse an unknown level, and documents that are not JSON; return the level."""
    level, *documents = connection.execute(
        f"SELECT level, {', '.join(_DOCUMENTS)} FROM run"
    ).fetchall()[0]
    if level not in LEVELS:
        raise not_a_run(path, f"its level {quoted(level)} is not one of {', '.join(LEVELS)}")
    for name, text in zip(_DOCUMENTS, documents, strict=True):
        if not _is_object(text):
            raise not_a_run(path, f"its {name} is not a JSON object")
    return str(level)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _check_routes(path: Path, connection: duckdb.DuckDBPyConnection, level: str) -> None:
    """Refuse routes that are not one for each token and router, or that lead to no expert."""
    layout = Layout(*connection.execute(schema.SELECT_LAYOUT).fetchall()[0])
    salt = secrets.randbits(_SALT_BITS)
    by_phase = connection.execute(
        f"SELECT phase, count(*), {_hashed('token_id', salt)} FROM packed.token GROUP BY phase"
    ).fetchall()
    n_tokens = sum(count for _, count, _ in by_phase)
    sites = sites_of(connection.execute(schema.SELECT_SITES).fetchall())
    known = {(site.layer, site.site): site for site in sites}
    rows_of = connection.execute(_vectors("route", salt)).fetchall()
    routed = LEVELS.index(level) >= LEVELS.index("ids") and n_tokens > 0
    for layer, site, rows, found in rows_of:
        if (layer, site) not in known:
            raise not_a_run(path, "it has choices of a router that it does not have")
        if (rows, found) != _reached(known[layer, site], by_phase):
            raise not_a_run(
                path, f"layer {layer} does not have one row for each of the {n_tokens:,} tokens"
            )
    # level stats has totals alone; routes that it holds nevertheless are compared with them
    if routed or rows_of:
        if len(rows_of) != len(sites):
            raise not_a_run(path, f"its level is {level}, and {len(rows_of)} routers have routes")
        _check_experts(path, connection, layout, sites)
    for table in ("score", "hidden"):
        for layer, site, rows, found in connection.execute(_vectors(table, salt)).fetchall():
            here = known.get((layer, site))
            if here is not None and (rows, found) == _reached(here, by_phase):
                continue
            if connection.execute(_repeated(table), [layer, site]).fetchall() != [(0,)]:
                raise not_a_run(path, f"it holds rows of packed.{table} twice")


def _reached(site: SiteInfo, by_phase: Sequence[tuple[str, int, int]]) -> tuple[int, int]:
    """Return how many tokens get to a site, and the sum of their hashes."""
    here = [one for one in by_phase if site.reads(one[0])]
    return sum(count for _, count, _ in here), sum(hashes for *_, hashes in here)


def _check_experts(
    path: Path, connection: duckdb.DuckDBPyConnection, layout: Layout, sites: Sequence[SiteInfo]
) -> None:
    """Refuse choices of experts that their router does not have, and totals that are not theirs."""
    load = {(layer, s): n or 0 for layer, s, n in connection.execute(schema.COUNT_LOAD).fetchall()}
    n_experts = np.array([site.n_experts for site in sites], np.int32)
    top_k = np.array([site.top_k for site in sites])
    filled = np.zeros(len(sites), np.int64)
    strange = False
    # all of them are read: a connection with a result that is not takes no other statement
    for batch in connection.sql(_routes(layout)).to_arrow_reader(_ROWS):
        place = batch.column(0).to_numpy()
        words = np.stack([column.to_numpy() for column in batch.columns[1:]], axis=1)
        ids = unpack_ids(words, layout)
        is_filled = ids >= 0
        beyond = np.arange(layout.slots) >= top_k[place, None]
        strange |= bool((ids >= n_experts[place, None]).any() or (is_filled & beyond).any())
        counts = np.bincount(place, is_filled.sum(axis=1), minlength=len(sites))
        filled += counts.astype(np.int64)
    if strange:
        raise not_a_run(path, "it has choices of experts that their router does not have")
    for site, found in zip(sites, filled.tolist(), strict=True):
        if found != load.get((site.layer, site.site), 0):
            raise not_a_run(path, f"layer {site.layer} chooses experts that its totals do not know")


def _check_text(connection: duckdb.DuckDBPyConnection) -> None:
    """Read every text once: bytes that are not text raise an error."""
    for table, columns in _TEXTS.items():
        read = ", ".join(f"max(strlen(decode(encode({column}))))" for column in columns)
        connection.execute(f"SELECT {read} FROM packed.{table}").fetchall()
