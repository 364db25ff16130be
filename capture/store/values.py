"""What the values of a run file keep to, table by table, as conditions of a row that does not.

The pages count on each of these: an expert that its router has, a token of a prompt that exists, a
vector as long as the others, a number that is one. A capture writes nothing else; a file of a
stranger may hold anything that its columns can. Where a condition is unknown (NULL), the row is
wrong, so that what may be missing says so.
"""

from collections.abc import Mapping
from typing import NamedTuple

from capture.store.codec import Layout
from capture.store.schema import ATTENTION_STATISTICS, MAP_PARTS, NO_TOKEN, STATISTICS

# characters
MAX_NAME = 1_000  # of a model, a module, a domain, a token
MAX_SOURCE = 10_000
MAX_DOCUMENT = 1_000_000  # of JSON
MAX_PROMPT = 16_000_000  # bytes; a million tokens take a quarter
MAX_DOMAINS = 10_000
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
# DuckDB knows moments that Python does not
_MOMENT = "isfinite(started_at) AND started_at BETWEEN '1970-01-01' AND '2200-01-01'"
PHASE = "phase NOT IN ('prompt', 'generated')"


class Question(NamedTuple):
    """Rows, and what must not be true of one.

    Attributes
    ----------
    rows : str
        What follows FROM.
    wrong : mapping of str to str
        What is wrong, as in "it has ...", and the condition of a row where it is.
    """

    rows: str
    wrong: Mapping[str, str]


def long(column: str, most: int = MAX_NAME) -> str:
    """Write the condition of a text that is too long; NULL is none."""
    return f"{column} IS NOT NULL AND strlen({column}) > {most}"


def number(column: str, least: float, most: float) -> str:
    """Write the condition of a number that is none, or outside of a range."""
    return f"NOT (isfinite({column}) AND {column} BETWEEN {least} AND {most})"


def numbers(column: str, least: str = f"{-MAX_NUMBER}", most: str = f"{MAX_NUMBER}") -> str:
    """Write the condition of a list with a gap, or with something that is no number in a range."""
    return f"(len({column}) <> list_count({column}) OR {beyond(column, least, most)})"


def beyond(column: str, least: str = f"{-MAX_NUMBER}", most: str = f"{MAX_NUMBER}") -> str:
    """Write the condition of a list with something that is no number in a range; gaps may be."""
    # NaN is the largest number of all
    return (
        f"(coalesce(list_min({column}), {most}) < {least}"
        f" OR coalesce(list_max({column}), {least}) > {most})"
    )


def counts(column: str, most: str) -> str:
    """Write the condition of a list with something that is no count from 0 to ``most``."""
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
        "a start that is no date from 1970 to 2200": f"NOT ({_MOMENT})",
        "a duration that is none": f"seconds IS NOT NULL AND {number('seconds', 0, MAX_SECONDS)}",
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
}
_LAST_SITES = "(SELECT layer, max_by(n_experts, site) AS n_experts FROM packed.site GROUP BY layer)"
_RECORDED = (
    "(SELECT layer, unnest(recorded) AS head FROM packed.attention_layer)"
    " AS known USING (layer, head)"
)
_FACTS = "(SELECT vocab_size, hidden_size, (SELECT count(*) FROM packed.token) AS n_all"
_FACTS += " FROM packed.run) AS facts"

_MOST_WEIGHT = f"{MAX_WEIGHT}.0 * (n_all + 1)"

QUESTIONS = (
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
            "batches of phases that are none": PHASE,
            "a batch at a time that is none": number("seconds", 0, MAX_SECONDS),
        },
    ),
    Question(
        "packed.token LEFT JOIN packed.prompt AS prompt USING (prompt_id)"
        " LEFT JOIN packed.batch AS batch USING (batch_id)",
        {
            "tokens of no prompt": "prompt.n_tokens IS NULL",
            "phases that are none": f"token.{PHASE}",
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
            "a loss that is no number": f"loss IS NOT NULL AND {number('loss', -1, MAX_LOSS)}",
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
        "packed.rollup LEFT JOIN packed.site USING (layer, site) LEFT JOIN"
        " (SELECT DISTINCT coalesce(domain, '') AS domain, true AS known FROM packed.prompt)"
        " AS named ON coalesce(rollup.domain, '') = named.domain,"
        f" {_FACTS}",
        {
            "sums of a router that it does not have": "n_experts IS NULL"
            " OR len(assignments) <> n_experts OR len(weight_sum) <> n_experts"
            " OR coalesce(len(prob_sum), n_experts) <> n_experts",
            "sums of a domain that no prompt has": "named.known IS NULL",
            "sums of phases that are none": PHASE,
            "negative counts": "list_min(assignments) < 0",
            "counts that cannot be": counts("assignments", "n_all")
            + " OR list_sum(assignments) > n_all * top_k::HUGEINT",
            "sums that are no numbers": f"{numbers('weight_sum', '0', _MOST_WEIGHT)}"
            f" OR (prob_sum IS NOT NULL AND {numbers('prob_sum', '-1', _MOST_WEIGHT)})",
        },
    ),
    Question(
        "packed.score LEFT JOIN packed.site USING (layer, site) LEFT JOIN packed.token"
        " USING (token_id)",
        {
            "scores of no token": "token.position IS NULL",
            "scores of another number of experts": "n_experts IS NULL OR len(scores) <> n_experts",
            "a score that is no number": "list_count(scores) = 0 OR " + beyond("scores"),
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
            "a router input that is no number": numbers("hidden"),
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
            "attention that is no number": " OR ".join(
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


def routes(layout: Layout) -> str:
    """Write the query for the packed ids of all routes, each with the number of its router."""
    words = ", ".join(f"ids{word}" for word in range(layout.id_words))
    return (
        f"SELECT place, {words} FROM packed.route JOIN (SELECT layer, site,"
        " row_number() OVER (ORDER BY layer, site) - 1 AS place FROM packed.site)"
        " USING (layer, site)"
    )


def vectors(table: str, salt: int) -> str:
    """Write the query for how many rows every site has in a table, and the hash of their tokens.

    Hashes of tokens are added up, with a salt that no file knows: two tables with the same sum
    have the same tokens, each as often, and nothing has to be sorted or kept.
    """
    return (
        f"SELECT layer, site, count(*), {hashed('token_id', salt)} FROM packed.{table}"
        " GROUP BY layer, site"
    )


def repeated(table: str) -> str:
    """Write the query for how many tokens of one site are there twice in a table."""
    return (
        f"SELECT count(*) - count(DISTINCT token_id) FROM packed.{table}"
        " WHERE layer = ? AND site = ?"
    )


def hashed(column: str, salt: int) -> str:
    """Write the sum of the salted hashes of a column."""
    return f"coalesce(sum((hash({column}::BIGINT + {salt}) >> 8)::HUGEINT), 0)"
