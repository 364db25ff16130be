"""The shape of the code base, enforced."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {"README.md", "app.py", "capture", "explorer", "kernels", "requirements.txt", "tests"}
NOT_OURS = {"runs", "venv"}  # made by a user's own commands, git-ignored
MAY_IMPORT = {
    "kernels": {"kernels"},
    "capture": {"kernels", "capture"},
    "explorer": {"kernels", "capture", "explorer"},
}
STREAMLIT_ONLY_IN = ("app.py", "explorer/pages/", "explorer/ui/")
MAX_LINES = 600
# folders and modules of a package, lowest first: each may import what stands before it, lazily too
ORDER = {
    "capture": (
        *("errors", "interrupts", "paths", "progress", "prompt_rows", "prompts", "store"),
        *("model", "traces", "recorder", "swap", "demo", "engines", "matrix", "bench", "__main__"),
    ),
    "explorer": (
        *(
            "errors",
            "text",
            "registry",
            "router_cards",
            "metrics",
            "engine_files",
            "run",
            "queries",
            "findings",
            "routers",
            "comparison",
        ),
        *("maps", "survey", "worker", "writing", "slices", "saved_views", "run_files", "report"),
        *("playground", "ui", "pages", "figures", "commands", "__main__"),
    ),
}
SOURCES = sorted(p for package in MAY_IMPORT for p in (ROOT / package).rglob("*.py"))


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def place(name):
    """Return the package of a module and where its folder stands in ``ORDER``; the package's own
    names (``from capture import record``) are free to all, because they load on first use."""
    package, _, rest = name.partition(".")
    part = rest.split(".")[0]
    return (package, ORDER[package].index(part)) if package in ORDER and part else None


def of_source(path):
    """Return the dotted name of a module file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path):
    """Yield every module that a file imports, also as ``from folder import module``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            for alias in node.names:
                below = ROOT.joinpath(*node.module.split("."), alias.name)
                if below.is_dir() or below.with_suffix(".py").is_file():
                    yield f"{node.module}.{alias.name}"


def test_arrows_point_down_between_folders():
    wrong = [
        f"{of_source(path)} imports {name}"
        for path in SOURCES
        if (own := place(of_source(path)))
        for name in sorted(set(imported_names(path)))
        if (other := place(name)) and own[0] == other[0] and own[1] < other[1]
    ]
    assert wrong == []


def test_every_folder_and_module_has_a_place():
    for package, names in ORDER.items():
        found = {
            path.stem
            for path in (ROOT / package).iterdir()
            if path.suffix == ".py" or (path / "__init__.py").is_file()
        }
        assert found - {"__init__"} == set(names)


def test_only_the_app_opens_a_page():
    pages = {of_source(path) for path in (ROOT / "explorer" / "pages").glob("*/page.py")}
    assert len(pages) > 10
    assert [
        f"{of_source(path)} imports {name}"
        for path in SOURCES
        for name in set(imported_names(path)) & pages
    ] == []


def offences(path):
    """Yield what a module does against the rules, each with its file."""
    where = path.relative_to(ROOT).as_posix()
    text = path.read_text(encoding="utf-8")
    tops = {name.split(".")[0] for name in imported_modules(path)}
    if "" in tops:
        yield f"{where}: relative import"
    if not tops & set(MAY_IMPORT) <= MAY_IMPORT[where.split("/")[0]]:
        yield f"{where}: imports against the arrows"
    if "streamlit" in tops and not where.startswith(STREAMLIT_ONLY_IN):
        yield f"{where}: streamlit belongs to {' and '.join(STREAMLIT_ONLY_IN)}"
    if len(text.splitlines()) > MAX_LINES:
        yield f"{where}: more than {MAX_LINES} lines; split the module by responsibility"
    if not ast.get_docstring(ast.parse(text)):
        yield f"{where}: a module says what it is for"


def test_modules_keep_the_rules():
    assert len(SOURCES) > 100
    assert [offence for path in SOURCES for offence in offences(path)] == []


def test_an_offence_is_seen(tmp_path, monkeypatch):
    """The rules bite: a module that breaks all of them is told all of them."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "kernels" / "gate.py"
    path.parent.mkdir()
    path.write_text(
        "import streamlit\nfrom capture import store\nfrom . import x\n" + "\n" * MAX_LINES
    )
    words = (
        "relative import",
        "against the arrows",
        "streamlit belongs",
        "split the module",
        "what it is for",
    )
    found = list(offences(path))
    assert len(found) == len(words)
    assert all(word in offence for word, offence in zip(words, found, strict=True))


def test_the_visible_top_level_is_fixed():
    visible = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))}
    assert visible - NOT_OURS == TOP_LEVEL


def test_app_is_short():
    """A page is a line in its table; what it does stands elsewhere."""
    lines = (ROOT / "app.py").read_text(encoding="utf-8").splitlines()
    table = re.compile(r' +("[\w ]+": [({]|},$)')  # groups of pages, a page a line
    assert len([line for line in lines if not table.match(line)]) < 35


def test_kernels_stays_invisible_to_transformers():
    """Transformers probes for a package named kernels; a version would make it use ours."""
    import kernels

    assert not hasattr(kernels, "__version__")
    sources = [p for p in SOURCES if p.is_relative_to(ROOT / "kernels")]
    tops = {name.split(".")[0] for path in sources for name in imported_modules(path)}
    assert sources and "transformers" not in tops
