"""The embedded demo model: where its files are, and its prompts (no torch is imported here)."""

import json
import lzma
import os
from pathlib import Path

__all__ = ["FIGURES", "PROMPTS", "TEXTS", "TRENDS", "WEIGHTS", "load_texts"]

FOLDER = Path(__file__).resolve().parent
WEIGHTS = FOLDER / "weights"
PROMPTS = FOLDER / "prompts.jsonl"
FIGURES = FOLDER / "figures.json"
TRENDS = FOLDER / "trends"
TEXTS = {
    "demo": PROMPTS,
    "demo-fit": FOLDER / "fit.jsonl.xz",
    "demo-heldout": FOLDER / "heldout.jsonl.xz",
}


def work_folder() -> Path:
    """Return the folder where the corpus script keeps downloads, corpus and checkpoints."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "routescope-demo"


def load_texts(name: str, *, corpus: Path | None = None) -> list[dict[str, str]]:
    """Load the demo prompts, or the text for fitting or judging routers.

    Parameters
    ----------
    name : {"demo", "demo-fit", "demo-heldout"}
        Which texts. No model of ours was trained on any of them.
    corpus : Path or None
        A corpus rebuilt by ``python -m capture.demo.train --corpus-only`` (its ``corpus``
        folder): fit and heldout then cover all domains, not only those whose licence lets
        them ship with the project.

    Returns
    -------
    list of dict
        ``text``, ``domain`` and ``source``; fit and heldout also ``licence`` and ``document``.
        Texts that share ``domain`` and ``document`` come from the same document.

    Raises
    ------
    KeyError
        For another name.
    """
    if name not in TEXTS:
        raise KeyError(f"Expected one of {', '.join(TEXTS)}, got {name!r}.")
    if corpus is not None and name != "demo":
        paths = sorted((corpus / name.removeprefix("demo-")).glob("*.jsonl"))
        lines = [line for path in paths for line in path.read_text("utf-8").split("\n") if line]
    else:
        data = TEXTS[name].read_bytes()
        plain = lzma.decompress(data) if TEXTS[name].suffix == ".xz" else data
        # not splitlines: a text may hold other line separators than the newline
        lines = [line for line in plain.decode().split("\n") if line]
    return [json.loads(line) for line in lines]
