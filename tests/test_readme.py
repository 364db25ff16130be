"""The papers are true: commands parse, examples run, links lead somewhere, names exist."""

import argparse
import contextlib
import importlib
import inspect
import re
import shlex
import sys
import unicodedata
from pathlib import Path

import duckdb
import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("capture", "explorer", "kernels", "tests", ".github")
PAPERS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md")))
}
README = PAPERS["README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
MODULE = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:(?:\.venv/bin/)?python|torchrun(?: --[\w-]+ \w+)*) -m ([\w.]+)(.*)",
    re.DOTALL,
)
# the first column of the tables of what moved: names of before
BEFORE = re.compile(r"^\| `[^|]*`[^|]* \| ", re.MULTILINE)


def blocks(paper, language):
    return [text for name, text in FENCE.findall(PAPERS[paper]) if name == language]


def prose(paper):
    """Return a paper of today, without blocks of code and names of before."""
    text = FENCE.sub("", PAPERS[paper])
    return BEFORE.sub("", text) if paper.endswith("CHANGELOG.md") else text


def inline(paper):
    """Return what stands in backticks, on one line each."""
    found = re.findall(r"`([^`]+)`", prose(paper))
    return [" ".join(text.split()).replace(r"\|", "|") for text in found]


def commands_of(paper):
    shell = "".join(blocks(paper, "bash")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in shell if line.strip()] + [
        text
        for text in inline(paper)
        if MODULE.fullmatch(text) or text.startswith(("streamlit ", "python ", "PYTHONPATH="))
    ]


COMMANDS = sorted({command for paper in PAPERS for command in commands_of(paper)})
MODULES = [command for command in COMMANDS if MODULE.fullmatch(command)]


def section(paper, title):
    return PAPERS[paper].split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_readme_is_short_and_names_every_paper():
    assert len(README.splitlines()) <= 200
    named = set(re.findall(r"\]\(([^)#]+\.md)", README))
    ours = {paper for paper in PAPERS if paper != "README.md" and "ISSUE_TEMPLATE" not in paper}
    assert ours <= named


def test_ci_runs_the_readmes_test_command():
    command = re.search(r"```bash\n(.*?)\n```", section("README.md", "Run the tests"))[1]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


class Parsed(Exception):
    """A command line was understood; its options are the argument."""


@pytest.fixture
def parse(monkeypatch):
    """Return what gives a command of a module to the module's own parser, and no further."""
    understand = argparse.ArgumentParser.parse_args

    def parse_args(*args, **kwargs):
        raise Parsed(understand(*args, **kwargs))

    def parse(name, arguments):
        try:
            module = importlib.import_module(f"{name}.__main__")
        except ModuleNotFoundError as error:
            assert error.name in (f"{name}.__main__", name), error
            module = importlib.import_module(name)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        takes = inspect.signature(module.main).parameters
        try:
            module.main(*([arguments] if takes else []))
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as stop:
            assert stop.code == 0, "the parser refuses it"
            return None
        pytest.fail("the command reads no options")

    return parse


@pytest.mark.parametrize("command", MODULES)
def test_commands_parse(command, parse, capsys):
    name, rest = MODULE.fullmatch(command).groups()
    arguments = shlex.split(rest, comments=True)
    if name == "pytest":
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests"))
        return
    if not arguments:  # only named
        assert importlib.util.find_spec(name) is not None
        return
    options = parse(name, arguments)
    if getattr(options, "command", None) == "compare" and not options.router_file:
        from explorer.router_cards import parse_router, split_routers
        from explorer.routers import ROUTERS

        assert all(parse_router(r).name in ROUTERS for r in split_routers(options.routers or ""))


def test_other_commands_start_scripts_that_exist():
    """What is no module of ours is set-up or a script; the app's options are those it reads."""
    app = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "explorer" / "ui").glob("*.py"))
    for command in set(COMMANDS) - set(MODULES):
        known = (
            "python3 -m venv ",
            "python ",
            "streamlit run app.py",
            "PYTHONPATH=. ",
            ".venv/bin/",
        )
        assert command.startswith(known), command
        words = shlex.split(command, comments=True)
        assert all((ROOT / word).is_file() for word in words if word.endswith(".py")), command
        options = command.partition(" -- ")[2].split()
        assert all(f'"{word}"' in app for word in options if word.startswith("--")), command


def test_pictures_exist_and_stay_small():
    pictures = re.findall(r"\]\(([^)]+\.png)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 150_000, picture


def test_every_page_is_shown():
    pages = set(re.findall(r"^        \"(\w+)\": \(", (ROOT / "app.py").read_text(), re.MULTILINE))
    assert "overview" in pages
    shown = {Path(p).stem for p in re.findall(r"\(explorer/assets/([^)]+)\)", README)}
    assert pages | {f"{page}_dark" for page in pages} <= shown


def test_every_page_is_described():
    titles = re.findall(r"^        \"\w+\": \(\"([^\"]+)\"", (ROOT / "app.py").read_text(), re.M)
    described = re.findall(r"^\| ([A-Z][\w ]+) \| ", section("explorer/README.md", "Pages"), re.M)
    assert sorted(titles) == sorted(described)


def test_every_family_is_described():
    from explorer.router_cards import FAMILIES

    families = re.findall(r"^\| `(\w+)` \|", section("explorer/README.md", "Routers"), re.MULTILINE)
    assert tuple(families) == FAMILIES


def test_every_module_of_metrics_is_described():
    table = section("explorer/README.md", "Metrics")
    names = re.findall(r"\| `([a-z]+\.\w+)` \|$", table, re.MULTILINE)
    assert all(resolves(f"explorer.metrics.{name}") for name in names)
    modules = {path.stem for path in (ROOT / "explorer" / "metrics").glob("[a-z]*.py")}
    assert {name.split(".")[0] for name in names} == modules


def test_every_op_is_described():
    import kernels

    described = re.findall(r"^\| `(\w+)`", PAPERS["kernels/README.md"], re.MULTILINE)
    assert sorted(described) == sorted(kernels.__all__)


def versions(title):
    """Return the rows of a table of versions in the changelog: version -> what it says."""
    rows = re.findall(
        r"^\| (\d+) \| (.*) \|$", section(".github/CHANGELOG.md", title), re.MULTILINE
    )
    return {int(version): text for version, text in rows}


def test_the_changelog_knows_every_version_of_run_files():
    from capture.store.rewrite import STEPS
    from capture.store.schema import SCHEMA_VERSION

    known = versions("Run files")
    assert list(known) == list(range(SCHEMA_VERSION, 0, -1))
    assert {step.before for step in STEPS} == set(known) - {SCHEMA_VERSION}


def test_the_changelog_knows_what_every_format_of_comparisons_added():
    from explorer.comparison import results_file

    known = versions("Comparison files")
    assert list(known) == list(range(results_file.FORMAT_VERSION, 0, -1))
    for (table, column), version in results_file.COLUMNS_SINCE.items():
        assert f"`{table}.{column}`" in known[version]
    for table, version in results_file.TABLES_SINCE.items():
        assert f"`{table}`" in known[version]


def slugs(paper):
    """Return the anchors of a paper's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", prose(paper), re.MULTILINE):
        kept = (c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN")
        found.append("".join(kept).replace(" ", "-"))
    return found


@pytest.mark.parametrize("paper", PAPERS)
def test_links_lead_somewhere(paper):
    folder = (ROOT / paper).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(paper)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        place = (folder / path).resolve() if path else ROOT / paper
        assert place.exists() and place.is_relative_to(ROOT), target
        if anchor:
            assert anchor in slugs(place.relative_to(ROOT).as_posix()), target


@pytest.mark.parametrize("paper", PAPERS)
def test_names_of_code_exist(paper):
    """Modules, files, tests and checks that a paper names in backticks."""
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`([^`\s]+)`", prose(paper)):
        if re.search(r"(?<![A-Z])(NAME|OP)(?![A-Z])", name):  # a recipe's
            continue
        if re.fullmatch(r"(capture|explorer|kernels)(\.\w+)+(\(\))?", name):
            assert resolves(name.removesuffix("()")), name
        if re.fullmatch(r"(capture|explorer|kernels|tests|\.github|\.ci)/[\w./]*", name):
            assert (ROOT / name).exists(), name
        if re.fullmatch(r"(test|check)_\w+", name):
            assert f"def {name}(" in tests, name


def resolves(name):
    """Whether a dotted name is a module, or what modules hold."""
    words = name.split(".")
    for end in range(len(words), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(".".join(words[:end]))
            for word in words[end:]:
                if not hasattr(found, word):
                    return False
                found = getattr(found, word)
            return True
    return False


@pytest.mark.parametrize("paper", [p for p in PAPERS if blocks(p, "python")])
def test_python_examples_compile(paper):
    for code in blocks(paper, "python"):
        compile(code, paper, "exec")


@pytest.mark.slow(seconds=5)
def test_python_examples_run_and_the_documented_views_are_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # the explorer's open the run that the capture's made
    for paper in ("README.md", "capture/README.md", "explorer/README.md"):
        exec(compile("\n".join(blocks(paper, "python")), paper, "exec"), {})
    with duckdb.connect("first.duckdb", read_only=True) as connection:
        views = section("capture/README.md", "The run file")
        rows = re.findall(r"^\| `(\w+)` \| `([\w, ]+)` \|$", views, re.MULTILINE)
        assert len(rows) >= 8
        for view, columns in rows:
            found = connection.sql(f'SELECT * FROM "{view}" LIMIT 0').columns
            assert found == [c.strip() for c in columns.split(",")], view
        queries = [query for paper in PAPERS for query in blocks(paper, "sql")]
        assert len(queries) >= 4
        for query in queries:
            assert connection.sql(query).fetchall()
