"""Runs whose rows lie in partitioned Parquet: the same run, and nothing else that could be read."""

import lzma
import shutil

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capture.__main__ import main
from capture.demo import SAMPLE
from capture.errors import StoreError
from capture.store import RunReader, partition

pytestmark = pytest.mark.slow

TABLES = ("token", "route", "score", "hidden")
VIEWS = ("tokens", "assignments", "gates", "scores", "hidden", "prompts", "expert_load", "sites")
PLACE = "part=00001/rows.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.duckdb"
    path.write_bytes(lzma.decompress(SAMPLE.read_bytes()))
    return path


@pytest.fixture(scope="module")
def made(whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("parts") / "it's big.duckdb"
    assert main(["partition", str(whole), "--out", str(out), "--tokens", "500"]) == 0
    return out


@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / made.name


def rows(run, view):
    return run.query(f"SELECT * FROM {view} ORDER BY ALL")


def test_every_view_is_that_of_the_run_in_one_file(whole, made):
    with RunReader.open(made, checked=True) as parts, RunReader.open(whole) as one:
        for view in VIEWS:
            assert rows(parts, view).equals(rows(one, view)), view
        assert parts.info["notes"] != one.info["notes"]
        same = set(parts.info) - {"notes", "schema_version"}  # the sample is of an older one
        assert all(parts.info[name] == one.info[name] for name in same)
    folder = made.with_suffix(".parquet")
    files = {table: sorted((folder / table).glob("part=*/*.parquet")) for table in TABLES}
    assert [len(files[table]) for table in TABLES] == [5, 5, 5, 1]  # no router input was kept
    for number, file in enumerate(files["route"]):
        ids = pq.read_table(file)["token_id"].to_numpy()
        assert ((ids // 500) == number).all()
    # the file itself holds what does not grow with the tokens
    with duckdb.connect(str(made), read_only=True) as file:
        assert file.sql("SELECT count(*) FROM packed.route").fetchall() == [(0,)]
        assert file.sql("SELECT count(*) > 0 FROM packed.rollup").fetchall() == [(True,)]


def test_other_programs_read_the_documented_views(whole, made, monkeypatch):
    monkeypatch.chdir(made.parent)
    script = (made.with_suffix(".parquet") / "views.sql").read_text(encoding="utf-8")
    with duckdb.connect(":memory:") as own, RunReader.open(whole) as one:
        own.execute(script)
        for view in VIEWS:
            found = own.sql(f"SELECT * FROM {view} ORDER BY ALL").to_arrow_table()
            assert found.to_pylist() == rows(one, view).to_pylist(), view


def test_no_other_file_is_read(copied, tmp_path):
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"secret": [1]}), other)
    with RunReader.open(copied) as run:
        for place in (other, tmp_path / "it's big.parquet" / ".." / "other.parquet"):
            name = str(place).replace("'", "''")
            with pytest.raises(StoreError, match="Permission Error: Cannot access file"):
                run.query(f"SELECT * FROM read_parquet('{name}')")
    part = copied.with_suffix(".parquet") / "token" / PLACE
    part.rename(tmp_path / "moved.parquet")
    part.symlink_to(tmp_path / "moved.parquet")
    with (
        pytest.raises(StoreError, match="Permission Error: Cannot access file"),
        RunReader.open(copied) as run,
    ):
        rows(run, "tokens")


def test_rows_that_are_gone_or_are_not_its_own_are_refused(made, copied, tmp_path):
    folder = copied.with_suffix(".parquet")
    table = pq.read_table(folder / "token" / PLACE)
    pq.write_table(table.drop_columns(["loss"]), folder / "token" / PLACE)
    shutil.rmtree(folder / "token" / "part=00000")
    with pytest.raises(
        StoreError, match=r"its rows in it's big\.parquet/token are not as RouteScope"
    ):
        RunReader.open(copied)
    shutil.rmtree(folder)
    with pytest.raises(
        StoreError, match=r"lie in the folder it's big\.parquet, which is not beside"
    ):
        RunReader.open(copied)
    folder.symlink_to(made.with_suffix(".parquet"))
    with pytest.raises(StoreError, match="which is not beside it"):
        RunReader.open(copied)


def test_nothing_is_overwritten_and_nothing_half_done_remains(whole, made, tmp_path):
    for out in (made, tmp_path / "it's big.duckdb"):
        (tmp_path / "it's big.parquet").mkdir(exist_ok=True)
        with pytest.raises(StoreError, match="already exists"):
            partition(whole, out)
    (tmp_path / "it's big.parquet").rmdir()
    broken = tmp_path / "broken.duckdb"
    broken.write_bytes(b"no run")
    for source, tokens in ((broken, 10), (whole, 0)):
        with pytest.raises(StoreError):
            partition(source, tmp_path / "new.duckdb", tokens=tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.duckdb"]
