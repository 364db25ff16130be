import gzip
from pathlib import Path

import duckdb
import numpy as np
import pytest
from store_runs import make_forward, make_site, write

from capture.errors import SchemaVersionError, StoreError
from capture.store import RunReader, migrate, schema
from capture.store.codec import Layout
from capture.store.rewrite import STEPS, Step

pytestmark = pytest.mark.slow

SITES = [make_site(1, 5, 2)]
# one file of every version that was released; the first has the sites of FIRST
FILES = sorted((Path(__file__).parents[1] / "data").glob("run_v*.duckdb.gz"))
FIRST = [make_site(1, 5, 2), make_site(4, 300, 9)]


@pytest.fixture
def old(tmp_path):
    """Make a run as an older version would have written it: one column fewer."""
    random = np.random.default_rng(0)
    path = write(tmp_path / "old.duckdb", SITES, [make_forward(0, 6, SITES, random)])
    with duckdb.connect(str(path)) as connection:
        connection.execute("ALTER TABLE packed.sample ADD COLUMN was_called INTEGER")
        connection.execute("UPDATE packed.run SET schema_version = -1")
    return path


def rename(connection):
    connection.execute("ALTER TABLE packed.sample RENAME COLUMN was_called TO is_called")


def drop(connection):
    connection.execute("ALTER TABLE packed.sample DROP COLUMN is_called")


def fail(connection):
    connection.execute("DELETE FROM packed.token")
    connection.execute("SELECT * FROM no_such_table")


def nothing(connection):
    pass


RENAME, DROP = Step(-1, "rename was_called", rename), Step(0, "drop is_called", drop)
# from the first released version on; these tests are about the two before it
REST = [Step(version, "nothing", nothing) for version in range(1, schema.SCHEMA_VERSION)]


def test_steps_run_in_order_into_a_new_file(old):
    before = old.read_bytes()
    new = old.with_name("new.duckdb")
    # handed over in the wrong order: only the versions count
    assert migrate(old, new, steps=[*REST, DROP, RENAME]) == new
    assert old.read_bytes() == before
    assert sorted(path.name for path in old.parent.iterdir()) == ["new.duckdb", "old.duckdb"]
    with RunReader.open(new) as run:
        assert run.info["schema_version"] == schema.SCHEMA_VERSION
        assert run.info["n_tokens"] == 6
        columns = run.query("SELECT * FROM packed.sample").column_names
    assert columns == ["token_id"]
    with pytest.raises(SchemaVersionError, match=r"schema version -1, .*python -m capture migrate"):
        RunReader.open(old)


def test_a_failing_step_leaves_nothing(old):
    before = old.read_bytes()
    new = old.with_name("new.duckdb")
    with pytest.raises(StoreError, match=r"The migration step 'broken' failed: .*no_such_table"):
        migrate(old, new, steps=[RENAME, Step(0, "broken", fail), *REST])
    assert old.read_bytes() == before
    assert [path.name for path in old.parent.iterdir()] == ["old.duckdb"]


def test_gaps_and_doubles_in_the_steps_are_refused(old):
    new = old.with_name("new.duckdb")
    with pytest.raises(SchemaVersionError, match="no step leads on from version 0"):
        migrate(old, new, steps=[RENAME])
    with pytest.raises(StoreError, match="Each version has one step"):
        migrate(old, new, steps=[RENAME, DROP, DROP])
    assert not new.exists()


def test_a_version_that_was_never_released_has_no_step(old):
    with pytest.raises(SchemaVersionError, match="no step leads on from version -1"):
        migrate(old, old.with_name("new.duckdb"))
    assert [step.before for step in STEPS] == list(range(1, schema.SCHEMA_VERSION))


@pytest.mark.parametrize(
    ("version", "words"),
    [(schema.SCHEMA_VERSION, "is up to date"), (99, "is newer than this code")],
)
def test_current_and_newer_runs_are_not_migrated(old, version, words):
    with duckdb.connect(str(old)) as connection:
        connection.execute("UPDATE packed.run SET schema_version = ?", [version])
    with pytest.raises(SchemaVersionError, match=f"schema version {version} and {words}"):
        migrate(old, old.with_name("new.duckdb"), steps=[RENAME, DROP, *REST])


def test_migration_overwrites_nothing_and_takes_runs_only(old, tmp_path):
    new = tmp_path / "new.duckdb"
    new.write_text("mine")
    with pytest.raises(StoreError, match="already exists"):
        migrate(old, new, steps=[RENAME, DROP, *REST])
    with pytest.raises(StoreError, match="it is not one"):
        migrate(new, tmp_path / "other.duckdb")
    with pytest.raises(StoreError, match="which is nothing"):
        migrate(tmp_path / "gone", tmp_path / "other.duckdb")
    assert new.read_text() == "mine" and not (tmp_path / "other.duckdb").exists()


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def released(request, tmp_path):
    """Unpack a run file that a released version wrote."""
    path = tmp_path / "released.duckdb"
    path.write_bytes(gzip.decompress(request.param.read_bytes()))
    return path


def test_every_released_version_is_read(released, tmp_path):
    with duckdb.connect(str(released), read_only=True) as connection:
        version = connection.sql("SELECT schema_version FROM run").fetchall()[0][0]
    current = released
    if version < schema.SCHEMA_VERSION:
        current = migrate(released, tmp_path / "current.duckdb")
    with RunReader.open(current) as run:
        assert run.info["n_tokens"] == 20
        assert run.sites == FIRST
        load = run.query("SELECT layer, sum(assignments) AS n FROM expert_load GROUP BY ALL")
        rows = run.query("SELECT layer, count(*) AS n FROM assignments GROUP BY ALL")
    counts = {1: 20 * 2, 4: 20 * 9}
    for table in (load, rows):
        assert dict(zip(*table.to_pydict().values(), strict=True)) == counts


def unpacked(version, tmp_path):
    path = tmp_path / f"v{version}.duckdb"
    path.write_bytes(gzip.decompress((FILES[0].parent / f"run_v{version}.duckdb.gz").read_bytes()))
    return path


def sums_of(path):
    with RunReader.open(path) as run:
        sums = run.query("SELECT * FROM gate_sums ORDER BY ALL").to_pylist()
        rows = run.query(
            "SELECT * FROM gates JOIN tokens USING (token_id) JOIN prompts USING (prompt_id)"
        ).to_pylist()
    return sums, rows


def test_a_file_without_sums_of_the_gates_is_read_as_if_it_had_them(tmp_path):
    old = unpacked(2, tmp_path)
    sums, rows = sums_of(old)
    assert len(sums) == 2 * 2 * 4  # sites, domains, statistics; one phase
    for entry in sums:
        values = [
            row[entry["statistic"]]
            for row in rows
            if all(row[name] == entry[name] for name in ("layer", "site", "domain", "phase"))
        ]
        assert entry["tokens"] == len(values)
        assert entry["total"] == pytest.approx(sum(values))
    new = migrate(old, tmp_path / "new.duckdb")
    with duckdb.connect(str(new), read_only=True) as connection:
        stored = connection.sql("SELECT count(*) FROM packed.gate_sum").fetchall()
    assert stored == [(len(sums),)]
    assert [{**entry, "total": pytest.approx(entry["total"])} for entry in sums] == sums_of(new)[0]


def test_a_migrated_file_has_the_tables_and_views_of_a_new_one(released, tmp_path):
    with duckdb.connect(str(released), read_only=True) as connection:
        if connection.sql("SELECT schema_version FROM run").fetchall() == [
            (schema.SCHEMA_VERSION,)
        ]:
            return
    migrated = migrate(released, tmp_path / "current.duckdb")
    assert described(migrated) == described(write(tmp_path / "fresh.duckdb", FIRST, []))


def described(path):
    with duckdb.connect(str(path), read_only=True) as connection:
        columns = connection.sql(
            "SELECT schema_name, table_name, column_name, data_type, is_nullable"
            " FROM duckdb_columns() WHERE NOT internal ORDER BY ALL"
        ).fetchall()
        views = connection.sql(
            "SELECT view_name, sql FROM duckdb_views() WHERE NOT internal ORDER BY ALL"
        ).fetchall()
    return columns, views


def test_a_changed_schema_has_a_new_version(tmp_path):
    released = tmp_path / "released.duckdb"
    newest = FILES[-1]
    assert newest.name == f"run_v{schema.SCHEMA_VERSION}.duckdb.gz"
    released.write_bytes(gzip.decompress(newest.read_bytes()))
    fresh = write(tmp_path / "fresh.duckdb", FIRST, [])
    # if this fails: raise SCHEMA_VERSION, add a step to migrations.py and a file of the new version
    assert described(released) == described(fresh)


def test_what_older_files_do_not_tell_of_routers_is_null(tmp_path):
    """Of version 4, read as it is and brought up to date; NULL weights stay NULL."""
    old = unpacked(4, tmp_path)
    new = migrate(old, tmp_path / "new.duckdb")
    for path in (old, new):
        with RunReader.open(path) as run:
            rows = run.query("SELECT side, expert_kinds, dropped FROM sites").to_pylist()
            kinds = run.query("SELECT DISTINCT kind FROM expert_load").to_pylist()
        assert rows == [{"side": None, "expert_kinds": None, "dropped": None}] * 2
        assert kinds == [{"kind": None}]
    with duckdb.connect(str(old)) as connection:
        connection.execute("UPDATE packed.rollup SET weight_sum = [NULL FOR x IN weight_sum]")
        for statement in schema.views_without_weights(Layout(16, 9)):
            if "VIEW expert_load" in statement:
                # as version 4 wrote it
                before = statement.replace(",\n        any_value(kind) AS kind", "")
                cut = before.index("unnest(range(n_experts))::INTEGER AS expert_id")
                end = before.index("USING (layer, site)", cut)
                plain = "unnest(range(n_experts))::INTEGER AS expert_id FROM packed.site"
                connection.execute(
                    before[:cut] + plain + before[end + len("USING (layer, site)") :]
                )
    migrate(old, tmp_path / "unknown.duckdb")
    with duckdb.connect(str(tmp_path / "unknown.duckdb"), read_only=True) as run:
        taken = run.sql("SELECT count(weight_sum) FROM expert_load WHERE assignments > 0")
        assert taken.fetchall() == [(0,)]
