"""Whether a run file that somebody gave us says the same thing everywhere, before it is kept."""

import json
import threading
from pathlib import Path

import duckdb

from capture.errors import StoreError
from capture.store.opening import not_a_run
from capture.store.records import LEVELS
from capture.store.sandbox import open_sandbox

SECONDS = 120.0  # what a check may take; a run of 100 M rows takes a tenth of it
_DOCUMENTS = ("backends", "packages", "config", "sample", "notes")
# what the pages count on, each as a count of what is wrong
_WRONG = {
    "tokens that its batches do not know": "SELECT abs((SELECT count(*) FROM packed.token)"
    " - (SELECT coalesce(sum(tokens), 0) FROM packed.batch))",
    "token ids that are there twice": "SELECT count(*) - count(DISTINCT token_id)"
    " FROM packed.token",
    "tokens of no prompt": "SELECT count(*) FROM packed.token ANTI JOIN packed.prompt"
    " USING (prompt_id)",
    "phases that are none": "SELECT count(*) FROM packed.token"
    " WHERE phase NOT IN ('prompt', 'generated')",
    "sums of a router that it does not have": "SELECT count(*) FROM packed.rollup"
    " LEFT JOIN packed.site USING (layer, site)"
    " WHERE n_experts IS NULL OR len(assignments) <> n_experts OR len(weight_sum) <> n_experts"
    " OR coalesce(len(prob_sum), n_experts) <> n_experts",
    "negative counts": "SELECT count(*) FROM expert_load_by WHERE assignments < 0",
    "choices of a router that it does not have": "SELECT count(*) FROM (SELECT DISTINCT layer, site"
    " FROM packed.route) ANTI JOIN packed.site USING (layer, site)",
    "scores of another number of experts": "SELECT count(*) FROM packed.score"
    " LEFT JOIN packed.site USING (layer, site)"
    " WHERE n_experts IS NULL OR len(scores) <> n_experts",
    "maps of another size than they say": "SELECT count(*) FROM packed.attention_head"
    " WHERE bins < 1 OR bins > 4096 OR len(cells) <> bins * (bins + 1) // 2"
    " OR len(received) <> bins",
    "counts of pairs of another size": "SELECT count(*) FROM packed.coactivation"
    " LEFT JOIN packed.site USING (layer, site)"
    " WHERE n_experts IS NULL OR len(tokens) <> n_experts * n_experts",
}


def check_run(path: str | Path, *, seconds: float = SECONDS) -> None:
    """Refuse a run file whose parts contradict each other.

    Parameters
    ----------
    seconds : float
        A file that takes longer is refused too: it would make every page wait.

    Raises
    ------
    SchemaVersionError, StoreError
        With what is wrong.
    """
    path = Path(path)
    connection = open_sandbox(path)
    alarm = threading.Timer(seconds, connection.interrupt)
    alarm.daemon = True
    alarm.start()
    try:
        _check_run(path, connection)
    except duckdb.InterruptException:
        raise StoreError(
            f"{path.name} could not be checked within {seconds:g} s. Record a smaller run."
        ) from None
    except duckdb.Error as error:
        raise not_a_run(path, error) from error
    finally:
        alarm.cancel()
        connection.close()


def _check_run(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    level, *documents = connection.sql(
        f"SELECT level, {', '.join(_DOCUMENTS)} FROM run"
    ).fetchall()[0]
    if level not in LEVELS:
        raise not_a_run(path, f"its level {level[:40]!r} is none of {', '.join(LEVELS)}")
    for name, text in zip(_DOCUMENTS, documents, strict=True):
        try:
            valid = isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            valid = False
        if not valid:
            raise not_a_run(path, f"its {name} are no JSON object")
    for what, sql in _WRONG.items():
        (wrong,) = connection.sql(sql).fetchall()[0]
        if wrong:
            raise not_a_run(path, f"it has {wrong:,} {what}")
