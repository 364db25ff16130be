"""What can be imported and asked without torch: each step in turn, in one fresh process."""

import json
import subprocess
import sys
from pathlib import Path

from explorer.comparison.results_file import FORMAT_VERSION, empty_rows, write_comparison

ROOT = Path(__file__).parent.parent
# pages may import Streamlit, but not what they ask and draw; the others run models
OTHERS = {"pages", "ui", "worker", "routers", "comparison", "survey", "commands", "rerouted.py"}
MODEL_CODE = ("torch", "transformers", "streamlit")

# reads steps (what to run, what must not be there afterwards); writes what is there all the same
STEPS = """
import json, sys
found = {}
for code, unwanted in json.loads(sys.stdin.read()):
    exec(code, {})
    there = sorted(set(unwanted) & set(sys.modules))
    if there:
        found[code] = there
print(json.dumps(found))
"""


def module_of(path):
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


def unwanted_after(steps):
    """Return {step: modules} of what steps load though they must not."""
    # numba warns while it is imported
    command = [sys.executable, "-W", "ignore", "-c", STEPS]
    result = subprocess.run(
        command, input=json.dumps(steps), cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_reading_needs_no_torch(tmp_path):
    explorer = [
        module_of(path)
        for path in sorted((ROOT / "explorer").rglob("*.py"))
        if not OTHERS & set(path.relative_to(ROOT).parts)
    ]
    asked_and_drawn = [
        module_of(path)
        for path in sorted((ROOT / "explorer" / "pages").rglob("*.py"))
        if path.stem == "data" or path.stem.endswith(("_data", "figure", "figures"))
    ]
    assert len(explorer) > 30 and len(asked_and_drawn) > 15
    rows = empty_rows()
    rows["comparison"] = [
        {"format_version": FORMAT_VERSION, "settings": "{}", "packages": "{}", "complete": True}
    ]
    comparison = tmp_path / "r.0123abcd.comparison"
    write_comparison(comparison, rows)
    names = ("capture", "capture.store", "capture.demo", "explorer", "explorer.run")
    names += ("explorer.router_cards", "explorer.comparison.conditions")
    names += ("explorer.comparison", "explorer.worker")
    metrics = "import explorer.metrics.load, explorer.metrics.capacity"
    steps = [
        ("import kernels.dispatch", ["torch"]),
        (metrics, [*MODEL_CODE, "plotly"]),
        *((f"import {name}", MODEL_CODE) for name in names),
        (f"import explorer; explorer.open_comparison({str(comparison)!r}).table", MODEL_CODE),
        *((f"import {name}", MODEL_CODE) for name in (*explorer, *asked_and_drawn)),
        # the app's side of a worker, and what prints a report
        ("import explorer.worker.capture_cost, explorer.worker.__main__", ["torch"]),
        ("import explorer.ui.printing, explorer.report", ["torch"]),
        # and what makes a map
        ("import explorer.maps.make, explorer.pages.clusters.points", ["torch"]),
        ("import umap, sklearn.cluster", ["torch"]),
    ]
    assert unwanted_after(steps) == {}


def test_what_must_not_be_loaded_is_found():
    steps = [("import json", ["decimal"]), ("import decimal", ["decimal", "json"])]
    assert unwanted_after(steps) == {"import decimal": ["decimal", "json"]}
