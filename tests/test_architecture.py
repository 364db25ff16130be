"""The shape of the code base, enforced."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {"README.md", "app.py", "capture", "explorer", "kernels", "requirements.txt", "tests"}
NOT_OURS = {"runs", "venv"}  # made by a user's own commands, git-ignored
MAY_IMPORT = {
    "kernels": {"kernels"},
    "capture": {"kernels", "capture"},
    "explorer": {"kernels", "capture", "explorer"},
}
STREAMLIT_ONLY_IN = ("app.py", "explorer/pages/")
MAX_LINES = 400
SOURCES = sorted(p for package in MAY_IMPORT for p in (ROOT / package).rglob("*.py"))


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module(path):
    where = path.relative_to(ROOT).as_posix()
    tops = {name.split(".")[0] for name in imported_modules(path)}
    assert tops & set(MAY_IMPORT) <= MAY_IMPORT[where.split("/")[0]], "imports against the arrows"
    assert "streamlit" not in tops or where.startswith(STREAMLIT_ONLY_IN)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES, "split the module by responsibility"
    assert ast.get_docstring(ast.parse("\n".join(lines))), "a module says what it is for"


def test_the_visible_top_level_is_fixed():
    visible = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))}
    assert visible - NOT_OURS == TOP_LEVEL


def test_app_is_short():
    assert len((ROOT / "app.py").read_text(encoding="utf-8").splitlines()) < 40


def test_kernels_stays_invisible_to_transformers():
    """Transformers probes for a package named kernels; a version would make it use ours."""
    import kernels

    assert not hasattr(kernels, "__version__")
    sources = [p for p in SOURCES if p.is_relative_to(ROOT / "kernels")]
    tops = {name.split(".")[0] for path in sources for name in imported_modules(path)}
    assert sources and "transformers" not in tops


@pytest.mark.parametrize(
    "module", ["capture", "capture.store", "capture.demo", "explorer", "explorer.run"]
)
def test_reading_needs_no_torch(module):
    code = (
        f"import sys, {module}; "
        "print(sorted({'torch', 'transformers', 'streamlit'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
