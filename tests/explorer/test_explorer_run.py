"""Opening a run, and what it says of itself."""

import pandas as pd
import pytest
from synthetic import SITES, write_run

from capture.errors import StoreError
from explorer.errors import RunError
from explorer.registry import Registry
from explorer.run import open_run


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "a.duckdb").path


def test_a_run_lists_what_it_holds(path):
    with open_run(path) as run:
        assert run.sites == list(SITES)
        assert run.layers == [1, 3]
        assert run.domains == ["code", "law", "text", ""]
        assert run.phases == ["prompt", "generated"]
        assert run.info["n_tokens"] == 33 and run.info["complete"] is True
        assert run.records_ids
        assert run.site_info(3, 1) == SITES[2]
        with pytest.raises(RunError, match="layers 1, 3"):
            run.site_info(2)


def test_a_run_shows_itself_in_a_notebook(path, tmp_path):
    with open_run(write_run(tmp_path / "a.duckdb").path) as run:
        run.info |= {"model": "<script>m</script>", "complete": False}
        shown = run._repr_html_()
    assert "<b>Run a</b>" in shown and "33 of 6 prompts" in shown
    assert "3 in 2 layers, each choosing 1 to 2 of 4 to 6 experts" in shown
    assert "code, law, text, (no domain)" in shown
    assert f">{run.info['level']}<" in shown
    assert "<script" not in shown and "&lt;script&gt;m" in shown
    assert "no: the capture did not end" in shown


def test_missing_values_stay_missing(path):
    with open_run(path) as run:
        frame = run.query(
            "SELECT * FROM (VALUES (1, 'a', 0.5::FLOAT), (NULL, NULL, NULL)) AS t(n, s, x)"
        )
        assert frame["n"].tolist() == [1, pd.NA]
        assert frame["s"].tolist() == ["a", None]
        assert frame["x"].isna().tolist() == [False, True]
        values = run.query("SELECT $a::INTEGER + $b::INTEGER AS n", {"a": 1, "b": 2})
        assert values["n"].tolist() == [3]


def test_a_query_that_fails_names_the_run(path):
    with open_run(path) as run, pytest.raises(StoreError, match=r"a\.duckdb"):
        run.query("SELECT nothing FROM nowhere")


def test_files_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(RunError, match="there is no such file"):
        open_run(tmp_path / "absent.duckdb")
    with pytest.raises(RunError, match="capture recover"):
        open_run(tmp_path / "b.duckdb.partial")
    (tmp_path / "text.duckdb").write_text("not a run")
    with pytest.raises(StoreError):
        open_run(tmp_path / "text.duckdb")


def test_names_in_a_registry_are_unique():
    registry: Registry[int] = Registry("thing")
    registry.add("a")(1)
    assert "a" in registry and list(registry) == ["a"] and len(registry) == 1
    with pytest.raises(ValueError, match="unique"):
        registry.add("a")(2)
