"""A run without its text: a new file with counts only, for people who may not read the prompts.

Text can be read off more than text. Token ids are the text in numbers, router inputs hold the
token, and whoever has the model finds the token from the experts that it visited. So nothing that
says what one token did is kept: the new run is of level ``stats``, and its tokens have a place in
a prompt and in a batch, and no more.
"""

import json
from pathlib import Path

import duckdb
import pyarrow as pa

from capture.errors import StoreError
from capture.store import schema
from capture.store.codec import Layout
from capture.store.files import check_new, made_whole
from capture.store.interrupts import as_keyboard_interrupt
from capture.store.opening import SAFE
from capture.store.reader import RunReader
from capture.store.writer import BLOCK_SIZE

# what a counts-only run says of itself in ``run.notes``
NOTE = "counts_only"
_TOKENS = (
    f"SELECT token_id, prompt_id, position, phase, {schema.NO_TOKEN}::INTEGER AS token,"
    " NULL::VARCHAR AS text, NULL::FLOAT AS loss, batch_id, row_in_batch"
    " FROM packed.token ORDER BY token_id"
)
_COPIED = {
    "site": "SELECT * FROM packed.site",
    "prompt": "SELECT prompt_id, NULL::VARCHAR AS text, domain, NULL::VARCHAR AS source, n_tokens,"
    " truncated FROM packed.prompt ORDER BY prompt_id",
    "token": _TOKENS,
    "batch": "SELECT * FROM packed.batch",
    "rollup": "SELECT * FROM packed.rollup",
    "coactivation": "SELECT * FROM packed.coactivation",
    "transition": "SELECT * FROM packed.transition",
    "run": "SELECT * REPLACE ('stats' AS level, '{}' AS sample, $notes AS notes,"
    f" {schema.SCHEMA_VERSION} AS schema_version) FROM packed.run",
}


@as_keyboard_interrupt()
def counts_only(path: str | Path, out: str | Path) -> Path:
    """Write the run at ``path`` as ``out``, without text, token ids and anything per token.

    Domains keep their names, and prompts their lengths. The old file is not touched.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    StoreError
        If ``path`` is no run, or ``out`` exists or cannot be written.
    """
    path, out = Path(path), Path(out)
    check_new(out)
    with RunReader.open(path) as run, made_whole(out) as fresh:
        (layout,) = run.query(schema.SELECT_LAYOUT).to_pylist()
        notes = json.dumps({NOTE: True})
        try:
            _write(fresh, run, Layout(**layout), notes)
        except duckdb.Error as error:
            raise StoreError(f"{out} could not be written: {error}. Choose another OUT.") from error
    return out


def _write(fresh: Path, run: RunReader, layout: Layout, notes: str) -> None:
    config = SAFE | {"default_block_size": str(BLOCK_SIZE)}
    with duckdb.connect(str(fresh), config=dict(config)) as connection:
        for statement in (*schema.create_statements(layout), schema.TOKENS_WITHOUT_IDS):
            connection.execute(statement)
        for table, sql in _COPIED.items():
            rows: pa.Table = run.query(sql, {"notes": notes} if table == "run" else None)
            connection.register("rows", rows)
            connection.execute(schema.insert(table))
            connection.unregister("rows")
        connection.execute("CHECKPOINT")
