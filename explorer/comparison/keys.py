"""Names for content: a comparison is computed again when what it depends on has changed."""

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture.model.load import DEMO

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
# code that decides about the numbers in a comparison
SOURCES = (
    *("explorer/routers", "explorer/comparison", "explorer/metrics"),
    *("capture", "kernels"),
)
BLOCK, BLOCKS = 2**16, 1024  # of a file of weights: bytes at a time, and how often
SAMPLED = 256  # values of each weight that are looked at


def source_fingerprint(model: "str | Path | nn.Module", revision: str | None = None) -> str:
    """Return a short name for a model, without loading it where it is a folder.

    Parameters
    ----------
    model : str, Path or Module
        ``"demo"``, a folder, a Hugging Face id, or a loaded model.
    revision : str, optional
        Of the Hugging Face id, which is all that is known of its weights here.
    """
    if not isinstance(model, str | Path):
        return model_fingerprint(model)
    folder = DEMO if model == "demo" else Path(model).expanduser()
    found = hashlib.sha256()
    if not folder.is_dir():
        return hashlib.sha256(f"{model} {revision}".encode()).hexdigest()[:16]
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("config.json"))):
        found.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            for at in range(0, path.stat().st_size, max(BLOCK, path.stat().st_size // BLOCKS)):
                file.seek(at)
                found.update(file.read(BLOCK))
    return found.hexdigest()[:16]


def model_fingerprint(model: "nn.Module") -> str:
    """Return a short name for a model's weights, from values spread over each of them."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().flatten()
            few = flat[:: max(1, flat.numel() // SAMPLED)][: SAMPLED + 1]
            found.update(few.double().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


@cache
def code_fingerprint() -> str:
    """Return a short name for the code that a comparison comes from."""
    found = hashlib.sha256()
    for source in SOURCES:
        for path in sorted((ROOT / source).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def key_of(facts: dict[str, Any]) -> str:
    """Return the part of a file's name that says what it depends on."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def fingerprint(parts: Iterable[object]) -> str:
    """Return a short name for what one router's rows depend on."""
    return hashlib.sha256(repr(tuple(parts)).encode()).hexdigest()[:16]
