"""Load the model to record: the demo, a hub id, a local folder, or one that is loaded already."""

import importlib.metadata
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from capture.errors import ModelError, cut, first_line, quoted
from capture.model.compiled import Compiler, unwrapped
from capture.model.folder import check_model_folder, check_numbers, odd_one, read_document
from capture.model.inputs import embedding_weight, input_device
from capture.paths import given_path
from capture.store.records import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DEMO = Path(__file__).parent.parent / "demo" / "weights"
# how transformers says that an auto class has no model for a configuration
NO_CAUSAL_MODEL = "Unrecognized configuration class"
# and that weights have other shapes than the model
SHAPES, CONVERSION = "ignore_mismatched_sizes", "automatic conversion of the weights"


class LoadedModel(NamedTuple):
    """A model that is ready to run, and how to call it in the run file.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode, on its device.
    tokenizer : PreTrainedTokenizerBase or None
        None when the model comes without one.
    name : str
        As given by the caller, or what a loaded model calls itself.
    revision : str or None
        Commit of the hub repository, when known.
    compiler : callable or None
        What compiles its decoder while it is recorded; None = nothing does.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    name: str
    revision: str | None
    compiler: Compiler | None = None


def load_model(
    model: "str | Path | PreTrainedModel",
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, or take a loaded model as it is.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        ``"demo"``, a Hugging Face id, a local folder, or a loaded model, which is neither moved
        nor converted.
    revision : str, optional
        Branch, tag or commit of a hub id.
    dtype : str or torch.dtype, optional
        Default: float32 on CPU, the stored dtype elsewhere.
    device : str, optional
        Such as ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"`` to spread a large model over
        all devices. Default: CUDA where there is one.
    trust_remote_code : bool
        Whether Python code that comes with the model may run.
    allow_pickle : bool
        Whether ``.bin`` weights may be unpickled when there is no safetensors file.

    Raises
    ------
    ModelError
        If the model is missing, is not a causal language model, or needs a flag.
    """
    refuse_kernels_package()
    if not isinstance(model, str | Path):
        return _taken(model, dtype=dtype, device=device)
    source, name = _source(model)
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if Path(source).is_dir():
        check_model_folder(Path(source), allow_pickle=allow_pickle)
    with _unpickled(name, allow_pickle=allow_pickle):
        loaded = _load(source, name, hub, dtype, device, allow_pickle)
    commit = getattr(loaded.config, "_commit_hash", None)
    return LoadedModel(loaded, _tokenizer(source, hub), name, commit or revision)


@contextmanager
def loading_bars(*, shown: bool) -> Iterator[None]:
    """Let transformers draw its own progress bars inside the block, or not."""
    bars = transformers_library().utils.logging
    hide = not shown and bars.is_progress_bar_enabled()
    if hide:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            bars.enable_progress_bar()


def transformers_library() -> Any:
    """Import transformers, on first use, unless its import would end in a riddle.

    Raises
    ------
    ModelError
        See :func:`refuse_kernels_package`.
    """
    refuse_kernels_package()
    import transformers  # takes seconds

    return transformers


def refuse_kernels_package() -> None:
    """Refuse to import transformers beside Hugging Face's ``kernels`` distribution.

    transformers looks that distribution up by name and would import our package ``kernels``
    instead, which ends in an ImportError that explains nothing.
    """
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ModelError(
        "RouteScope's package 'kernels' cannot run beside the Hugging Face distribution of that "
        f"name, and version {version} of it is installed. Run: pip uninstall kernels"
    )


def own_device() -> str | None:
    """Return the GPU of this process among several that torchrun started on one machine."""
    local, count = os.environ.get("LOCAL_RANK", ""), torch.cuda.device_count()
    return f"cuda:{int(local) % count}" if local.isdigit() and count > 1 else None


def _taken(model: Any, *, dtype: object, device: object) -> LoadedModel:
    """Check a model that the caller loaded."""
    model, compiler = unwrapped(model)
    if not hasattr(model, "named_modules") or not hasattr(model, "config"):
        raise ModelError(
            "A model name, a folder or a loaded PreTrainedModel was expected, "
            f"got {type(model).__name__}. Pass 'demo' to use the demo model."
        )
    if dtype is not None or device is not None:
        raise ModelError(
            "A loaded model is used as it is, but dtype or device was given as well. "
            "Leave both out, or convert the model with model.to(...) first."
        )
    if model.training:
        raise ModelError(
            f"A model in evaluation mode was expected, but this {type(model).__name__} is in "
            "training mode, where routers add noise. Call model.eval() first."
        )
    path = str(getattr(model.config, "_name_or_path", "") or "")
    model = speaking_part(model)
    config = model.config
    tokenizer = (
        _tokenizer(path, {"local_files_only": True, "trust_remote_code": False}) if path else None
    )
    name = path or type(model).__name__
    return LoadedModel(model, tokenizer, name, getattr(config, "_commit_hash", None), compiler)


def _source(model: str | Path) -> tuple[str, str]:
    """Return where to load from, and the name to record."""
    if model == "demo":
        return str(DEMO), "demo"
    text = str(model)
    if not text.strip():  # as a path it would be this folder
        raise _no_folder(text, "does not exist")
    folder = given_path(model, "the model", ModelError)
    if folder.is_dir():
        return str(folder), text
    local = isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if folder.exists() or local:
        raise _no_folder(text, "is a file" if folder.is_file() else "does not exist")
    return text, text


def _no_folder(text: str, what: str) -> ModelError:
    return ModelError(
        f"A model folder was expected, but {quoted(text)} {what}. Give the folder that holds "
        "config.json, a Hugging Face id such as allenai/OLMoE-1B-7B-0125, or demo."
    )


@contextmanager
def _unpickled(name: str, *, allow_pickle: bool) -> Iterator[None]:
    """Let nothing be unpickled inside the block: an index of a hub id may name any file."""

    def refuse(*args: object, **options: object) -> None:
        raise ModelError(
            f"Safetensors weights were expected, but {name} names pickled ones. If you trust them, "
            "pass allow_pickle=True (--allow-pickle)."
        )

    load = torch.load
    if not allow_pickle:
        torch.load = refuse
    try:
        yield
    finally:
        torch.load = load


def _load(
    source: str,
    name: str,
    hub: dict[str, Any],
    dtype: str | torch.dtype | None,
    device: str | None,
    allow_pickle: bool,
) -> "PreTrainedModel":
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {
        **hub,
        "dtype": _dtype(dtype, place),
        "device_map": _device_map(place),
        "use_safetensors": None if allow_pickle else True,
        "output_loading_info": True,
    }
    try:
        found: Any = None
        # a model that also sees or hears has a language model inside, which runs on text alone
        library = transformers_library()
        kinds = (
            library.AutoModelForCausalLM,
            library.AutoModelForImageTextToText,
            library.AutoModelForMultimodalLM,
            library.AutoModelForSeq2SeqLM,
        )
        for kind in kinds:
            try:
                found = kind.from_pretrained(source, **options)
                break
            except ValueError as error:
                if NO_CAUSAL_MODEL not in str(error) or kind is kinds[-1]:
                    raise
    except ModelError:
        raise
    except Exception as error:  # a configuration with a wrong value raises any kind
        raise _explained(error, source, name, hub) from error
    loaded, report = found
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"Weights for every parameter were expected, but {name} has none for {missing[0]} and "
            f"{len(missing) - 1} more, which would stay random. Give a complete checkpoint."
        )
    model: PreTrainedModel = speaking_part(loaded).eval()
    check_numbers(name, model)
    return model


def speaking_part(model: Any) -> Any:
    """Return the part of a model that reads and writes text: the model itself, as a rule.

    Models that also talk (Omni) have no forward pass of their own, only that of their parts. That
    of Llama 4 ends in an AttributeError in transformers 5.24, while its language model runs.
    """
    thinker = getattr(model, "thinker", None)
    if thinker is None:
        inner = getattr(model, "language_model", None)
        return inner if hasattr(inner, "lm_head") and not _reads_text(model) else model
    try:
        embedding_weight(model)
    except ModelError:
        return thinker
    return model


def _reads_text(model: Any) -> bool:
    """Whether a forward pass over one token puts out what it should."""
    try:
        with torch.no_grad():
            model(input_ids=torch.ones((1, 1), dtype=torch.long, device=input_device(model)))
    except AttributeError:
        return False
    return True


def _device_map(place: str) -> Any:
    if place == "auto":
        return "auto"
    try:
        device = torch.device(place)
    except RuntimeError as error:
        raise ModelError(
            f"A device such as 'cpu', 'cuda' or 'cuda:0' was expected, got {quoted(place)}."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"device={quoted(place)} was asked for, but torch sees no CUDA "
            f"device. Use device='cpu'."
        )
    return None if device.type == "cpu" else {"": device}


def _dtype(dtype: str | torch.dtype | None, place: str) -> str | torch.dtype:
    if dtype is None:
        on_cpu = place.startswith("cpu") or (place == "auto" and not torch.cuda.is_available())
        return torch.float32 if on_cpu else "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, got {quoted(dtype)}.")
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def _explained(error: Exception, source: str, name: str, hub: dict[str, Any]) -> ModelError:
    """Turn what transformers raised into one error that says what to do."""
    text = str(error)
    first = cut(" ".join(text.split())) or type(error).__name__
    if "trust_remote_code" in text:
        return ModelError(
            f"{name} comes with Python code of its own, which does not run by default. "
            "If you trust it, pass trust_remote_code=True (--trust-remote-code)."
        )
    if "safetensors" in text:
        return ModelError(
            f"Safetensors weights were expected, but {name} has none. If you trust its pickled "
            "weights, pass allow_pickle=True (--allow-pickle)."
        )
    if NO_CAUSAL_MODEL in text or "model type" in text:
        return ModelError(f"A causal language model was expected, but {name} is none: {first}")
    if isinstance(error, OSError):
        at = f" at revision {hub['revision']}" if hub.get("revision") else ""
        return ModelError(
            f"No model {quoted(name)}{at} could be loaded: it is no local folder, and the Hugging "
            f"Face hub did not give it ({first}). Check the spelling and the network, or pass demo."
        )
    if SHAPES in text or CONVERSION in text:
        shapes = odd_one(Path(source)) or _mismatched(source, hub)
        return ModelError(
            f"{name} could not be loaded: its weights do not have the shapes that its config.json "
            f"says{f': {shapes}' if shapes else ''}. Check where the model came from."
        )
    field = _field_of(error, Path(source))
    return ModelError(f"{name} could not be loaded{field}: {first}")


def _field_of(error: Exception, folder: Path) -> str:
    """Name the field of config.json whose value an error is about, where that can be told."""
    if not isinstance(error, KeyError) or not (folder / "config.json").is_file():
        return ""
    config = read_document(folder / "config.json")
    named = [field for field, value in config.items() if error.args and value == error.args[0]]
    return f", config.json has an unknown {' or '.join(map(repr, named))}" if named else ""


def _mismatched(source: str, hub: dict[str, Any]) -> str:
    """Return the first tensor whose shape is not the model's, by loading all others."""
    try:
        loaded: Any = transformers_library().AutoModelForCausalLM.from_pretrained(
            source,
            **hub,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        key, stored, wanted = sorted(loaded[1]["mismatched_keys"])[0]
    except Exception:  # what was wrong is said without it
        return ""
    return f"{key} has {list(stored)}, and {list(wanted)} is expected"


def _tokenizer(source: str, hub: dict[str, Any]) -> "PreTrainedTokenizerBase | None":
    """Return the model's tokenizer, or None when it has none."""
    try:
        tokenizer: PreTrainedTokenizerBase
        tokenizer = transformers_library().AutoTokenizer.from_pretrained(source, **hub)
    except Exception as error:  # transformers raises a dozen kinds when files are missing
        if (Path(source) / "tokenizer.json").is_file():
            raise ModelError(
                f"The tokenizer of {source} could not be loaded from its tokenizer.json: "
                f"{first_line(error)}. Download it again, or remove its files."
            ) from error
        log.info("No tokenizer for %s: %s", source, error)
        return None
    return tokenizer
