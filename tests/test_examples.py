"""The examples run: scripts and the notebook of ``.github/examples``, in one process."""

import ast
import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import duckdb
import pytest

from explorer.routers import ROUTERS

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / ".github" / "examples"
# each makes what the next ones read
SCRIPTS = {
    "record.py": "example.duckdb",
    "query.py": "example.duckdb",
    "compare.py": "example.duckdb",
    "own_router.py": "example.duckdb",
    "own_adapter.py": "own-adapter.duckdb",
    "own_loop.py": "own-loop.duckdb",
}
CHOICES = "SELECT token_id, layer, slot, expert_id FROM assignments ORDER BY ALL"


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Run every script as one does, and return what each printed."""
    folder = tmp_path_factory.mktemp("examples")
    told = {}
    with pytest.MonkeyPatch.context() as patch:
        for script, file in SCRIPTS.items():
            patch.setattr(sys, "argv", [script, str(folder / file)])
            with contextlib.redirect_stdout(io.StringIO()) as out:
                runpy.run_path(str(EXAMPLES / script), run_name="__main__")
            told[script] = out.getvalue().splitlines()
    yield told
    ROUTERS.discard("second_if_unsure")


def choices(path):
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.sql(CHOICES).fetchall()


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_says_how_to_start_it(script):
    about = ast.get_docstring(ast.parse((EXAMPLES / script).read_text(encoding="utf-8")))
    assert f"PYTHONPATH=. python .github/examples/{script} runs/" in about


def rows(lines):
    """Return the rows of a printed table, by what stands in the first column."""
    head = next(n for n, line in enumerate(lines) if line.split()[0] == "router")
    return {line.split()[0]: line.split()[1:] for line in lines[head + 1 :]}


@pytest.mark.slow(seconds=5)
def test_what_is_recorded_is_asked_and_compared(printed):
    (path,) = printed["record.py"]
    assert Path(path).is_file()
    tokens, layers = printed["query.py"][:10], printed["query.py"][10:]
    assert all(line.count(",") == 5 for line in tokens), "an expert in each of six layers"
    assert [line.split(":")[0] for line in layers] == [f"layer {n}" for n in range(6)]
    half = len(printed["compare.py"]) - 2
    replayed, live = rows(printed["compare.py"][:half]), rows(printed["compare.py"][half:])
    assert set(replayed) == {"top_k(k=1)", "top_p(p=0.5)"}
    assert replayed["top_k(k=1)"][:2] == ["replay", "NaN"]
    (mode, change, *_) = live["top_k(k=1)"]
    assert mode == "live" and float(change) != 0


@pytest.mark.slow(seconds=5)
def test_a_router_of_ones_own_uses_more_experts_the_surer_it_has_to_be(printed):
    found = rows(printed["own_router.py"])
    few, more = (float(found[f"second_if_unsure(p={p})"][0]) for p in (0.3, 0.7))
    assert 1 < few < more < 2


@pytest.mark.slow(seconds=5)
def test_an_adapter_of_ones_own_records_what_the_model_does(printed, tmp_path):
    import capture
    from capture.model.adapters import ADAPTERS

    refused, recorded, swapped = printed["own_adapter.py"]
    assert "workers (Workers) seems to route" in refused
    assert swapped == "swapped: 1.0 experts a token"
    assert "shares" not in {adapter.name for adapter in ADAPTERS}
    prompt = "The quick brown fox jumps over the lazy dog."
    usual = capture.record("demo", [prompt], tmp_path / "usual.duckdb", progress=False)
    assert choices(recorded.removeprefix("with: ")) == choices(usual)


@pytest.mark.slow(seconds=5)
def test_ones_own_loop_is_recorded(printed):
    (path,) = printed["own_loop.py"]
    with duckdb.connect(path, read_only=True) as run:
        texts = run.sql(
            "SELECT prompts.text, count(*) FILTER (phase = 'generated') FROM prompts JOIN tokens"
            " USING (prompt_id) GROUP BY prompt_id, prompts.text ORDER BY prompt_id"
        ).fetchall()
    fox, add = "The quick brown fox jumps over the lazy dog.", "def add(a, b):"
    # of three generated tokens the last is not read; one by hand; a step of training
    assert texts == [(fox, 2), (add, 2), (fox, 1), (fox, 0), (add, 0)]


@pytest.mark.slow(seconds=5)
def test_the_notebook_runs_from_top_to_bottom():
    notebook = json.loads((EXAMPLES / "walk.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names = {}
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == [], "an example is kept without its outputs"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "walk.ipynb", "exec"), names)
    assert len(names["difference"]) == 6  # layers
    assert set(names["table"]["router"]) == {"top_k(k=1)", "random"}
