"""The README is true: its commands parse or run, its pictures exist, its views are the file's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.strip()
]


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_ci_runs_the_readmes_test_command():
    command = re.search(r"```bash\n(.*?)\n```", section("Run the tests"))[1]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m capture ")])
def test_capture_commands_parse(command):
    from capture.__main__ import _capture_parser

    arguments = shlex.split(command, comments=True)[3:]
    if arguments[0] in ("recover", "migrate"):
        assert len(arguments) == {"recover": 2, "migrate": 3}[arguments[0]]
    else:
        _capture_parser().parse_args(arguments)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m explorer ")])
def test_explorer_commands_parse_and_name_routers_that_exist(command):
    from explorer.__main__ import make_parser
    from explorer.comparison.router_names import parse_router, split_routers
    from explorer.routers import ROUTERS

    options = make_parser().parse_args(shlex.split(command, comments=True)[3:])
    if options.command == "compare" and not options.router_file:
        assert all(parse_router(r).name in ROUTERS for r in split_routers(options.routers or ""))


@pytest.mark.parametrize(
    "module", sorted({c.split()[2] for c in COMMANDS if c.startswith("python -m ")})
)
def test_modules_of_commands_exist(module):
    from importlib.util import find_spec

    assert find_spec(module) is not None


def test_pictures_exist_and_stay_small():
    pictures = re.findall(r"\]\(([^)]+\.png)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 150_000, picture


def test_every_page_is_shown():
    pages = set(re.findall(r"^    \"(\w+)\": \(", (ROOT / "app.py").read_text(), re.MULTILINE))
    assert "overview" in pages
    shown = {Path(p).stem for p in re.findall(r"\(explorer/assets/([^)]+)\)", README)}
    assert pages | {f"{page}_dark" for page in pages} <= shown


@pytest.mark.slow
def test_python_examples_run_and_the_documented_views_are_the_files(tmp_path):
    code = "\n".join(block for language, block in BLOCKS if language == "python")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (run,) = tmp_path.glob("*.duckdb")
    with duckdb.connect(str(run), read_only=True) as connection:
        rows = re.findall(r"^\| `(\w+)` \| `([\w, ]+)` \|$", section("The run file"), re.MULTILINE)
        assert len(rows) >= 8
        for view, columns in rows:
            found = connection.sql(f'SELECT * FROM "{view}" LIMIT 0').columns
            assert found == [c.strip() for c in columns.split(",")], view
        for language, query in BLOCKS:
            if language == "sql":
                assert connection.sql(query).fetchall() is not None
