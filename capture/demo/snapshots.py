"""Weights of moments of the training, and the demo prompts' routing through them."""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from capture import record
from capture.demo.model import random_model, save_weights

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
STAGES = "training.json"
RANDOM_SEED = 1


def snapshot_folder(work: Path, step: int, percent: int) -> Path:
    """Name the folder of a snapshot."""
    return work / "training" / "snapshots" / f"step_{step:05d}_{percent:03d}"


def list_snapshots(work: Path) -> list[Path]:
    """List the snapshots, earliest first."""
    return sorted((work / "training" / "snapshots").glob("step_*"))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put the tokenizer's files beside the weights."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)


def save_snapshot(model: PreTrainedModel, tokenizer: Path, folder: Path) -> None:
    """Save weights and tokenizer so that `from_pretrained` reads them.

    Parameters
    ----------
    model : PreTrainedModel
        The model, which stays as it is.
    tokenizer : Path
        Folder of the tokenizer.
    folder : Path
        Where to save.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder)
    copy_tokenizer(tokenizer, folder)


def read_stages(folder: Path) -> list[dict[str, Any]]:
    """Read how weights were trained, one entry a training run; empty where nothing is noted."""
    path = folder / STAGES
    stages: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return stages


def install(snapshot: Path, weights: Path) -> None:
    """Replace the shipped model by a snapshot."""
    weights.mkdir(parents=True, exist_ok=True)
    for path in snapshot.iterdir():
        shutil.copyfile(path, weights / path.name)


def record_snapshots(work: Path, folder: Path) -> list[Path]:
    """Record the demo prompts through a random-init model and through every snapshot.

    Parameters
    ----------
    work : Path
        Work folder of the training.
    folder : Path
        Where the run files go; runs that are there stay.

    Returns
    -------
    list of Path
        The run files, in the order of the training.
    """
    # the library's own entry point, imported late: training does not need it
    snapshots = list_snapshots(work)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        untrained = Path(scratch) / "random_init"
        save_snapshot(random_model(RANDOM_SEED), snapshots[-1], untrained)
        for snapshot in tqdm([untrained, *snapshots], desc="record", unit="run"):
            run = folder / f"{snapshot.name}.duckdb"
            if not run.exists():
                # a run keeps the model's name as given: the folder's, not this machine's path
                with contextlib.chdir(snapshot.parent):
                    record(snapshot.name, "demo", run, level="ids", sample_tokens=0)
            runs.append(run)
    return runs
