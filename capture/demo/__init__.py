"""The embedded demo model: where its files are (no torch is imported here)."""

import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
WEIGHTS = FOLDER / "weights"
FIGURES = FOLDER / "figures.json"
TRENDS = FOLDER / "trends"
# a run of the prompts ``demo-sample``, to be shown while the whole demo is recorded
SAMPLE = FOLDER / "sample.duckdb.xz"


def work_folder() -> Path:
    """Return the folder where the corpus script keeps downloads, corpus and checkpoints."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "routescope-demo"
