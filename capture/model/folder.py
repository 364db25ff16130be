"""What a model folder must hold before its weights are read, and numbers that are some after.

A folder may come from a stranger, or be damaged. What is wrong is said in one sentence that names
the file and the field, or the tensor; and no file but safetensors is read, whichever name an index
gives it.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from capture.errors import ModelError, cut, quoted

INDEX = "model.safetensors.index.json"
WEIGHTS = ".safetensors"
_DOCUMENTS = (
    *("config.json", "generation_config.json", INDEX, "adapter_config.json"),
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"),
)
# sizes in a configuration, by the families that we know: the least and the most of each
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), (1, 10_000)),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "vocab_size"), (1, 10**8)),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), (1, 10**8)),
    "head_dim": (0, 10**8),  # 0 where nothing of a head is rotated
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), (1, 10**5)),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), (0, 10**6)),
    **dict.fromkeys(("num_experts_per_tok", "max_position_embeddings"), (0, 10**9)),
}
_OBJECTS = ("quantization_config", "rope_parameters", "rope_scaling")
_HEADER = 100 * 10**6  # bytes, as safetensors itself allows
_PARAMETERS = (".weight", ".bias")
_TEXT_PARTS = ("text_config", "llm_config", "language_config")


def check_model_folder(folder: Path, *, allow_pickle: bool) -> None:
    """Refuse a local folder that holds no model, or only weights that need a flag.

    Raises
    ------
    ModelError
    """
    if not (folder / "config.json").is_file():
        holds = ", ".join(cut(p.name, 40) for p in sorted(folder.iterdir())[:5]) or "nothing"
        raise ModelError(
            f"A model folder with config.json was expected, but {folder} holds {holds}. "
            "Give the folder that model.save_pretrained(...) wrote."
        )
    found = {name: read_document(folder / name) for name in _DOCUMENTS if (folder / name).is_file()}
    check_config(found["config.json"], allow_pickle=allow_pickle)
    if INDEX in found and not (folder / "model.safetensors").is_file():
        check_index(found[INDEX], allow_pickle=allow_pickle)
    _check_weights(folder, allow_pickle=allow_pickle)
    adapted = "adapter_config.json" in found and (folder / "adapter_model.bin").is_file()
    if adapted and not (allow_pickle or (folder / "adapter_model.safetensors").is_file()):
        raise ModelError(
            f"An adapter in adapter_model.safetensors was expected, but {folder} holds a pickled "
            "one. If you trust it, pass allow_pickle=True (--allow-pickle)."
        )
    if found["config.json"].get("quantization_config") is None:
        _check_types(folder)


def _check_weights(folder: Path, *, allow_pickle: bool) -> None:
    pickled = any(folder.glob("*.bin"))
    if any(folder.glob(f"*{WEIGHTS}")) or (pickled and allow_pickle):
        return
    if pickled:
        raise ModelError(
            f"Safetensors weights were expected, but {folder} holds only pickled .bin files, "
            "which can run code when loaded. If you trust them, pass allow_pickle=True "
            "(--allow-pickle)."
        )
    raise ModelError(
        f"Weights in *.safetensors were expected, but {folder} holds none. "
        "Download the model completely."
    )


def read_document(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    ModelError
        With the place where it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ModelError(
            f"{path.name} in {path.parent} is no valid JSON ({place}: {error.msg}). Download the "
            "model again."
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(
            f"{path.name} in {path.parent} is no valid JSON ({cut(str(error))}). Download the "
            "model again."
        ) from None
    if not isinstance(found, dict):
        raise ModelError(
            f"{path.name} in {path.parent} must be a JSON object, got {quoted(found)}. Download "
            "the model again."
        )
    return found


def check_config(config: dict[str, Any], *, allow_pickle: bool) -> None:
    """Refuse sizes that are no counts, and weights under a name that is not safetensors.

    Raises
    ------
    ModelError
        That names the field.
    """
    parts = [config, *(config[name] for name in _TEXT_PARTS if name in config)]
    for part in [part for part in parts if isinstance(part, dict)]:
        for name, (least, most) in _SIZES.items():
            value = part.get(name)
            is_count = isinstance(value, int) and not isinstance(value, bool)
            # some families give a list with one size for each layer
            if value is None or isinstance(value, list):
                continue
            if not is_count or not least <= value <= most:
                raise ModelError(
                    f"config.json: the field {name!r} must be a whole number from {least} to "
                    f"{most:,}, got {quoted(value)}. Check where the model came from."
                )
    for name in _OBJECTS:
        if not isinstance(config.get(name), dict | None):
            raise ModelError(
                f"config.json: the field {name!r} must be a JSON object or null, got "
                f"{quoted(config[name])}. Check where the model came from."
            )
    named = config.get("transformers_weights")
    if named is not None:
        _check_name("config.json", "transformers_weights", named, allow_pickle=allow_pickle)


def check_index(index: dict[str, Any], *, allow_pickle: bool) -> None:
    """Refuse an index that names weights outside of the folder, or any but safetensors.

    Raises
    ------
    ModelError
        That names the tensor.
    """
    names = index.get("weight_map")
    if not isinstance(names, dict):
        raise ModelError(
            f"{INDEX}: the field 'weight_map' must name a file for each tensor, got "
            f"{quoted(names)}. Download the model again."
        )
    for tensor, name in names.items():
        _check_name(INDEX, tensor, name, allow_pickle=allow_pickle)


def _check_name(where: str, what: str, name: object, *, allow_pickle: bool) -> None:
    endings = (WEIGHTS, ".bin") if allow_pickle else (WEIGHTS,)
    if isinstance(name, str) and name.endswith(endings) and Path(name).name == name:
        return
    trusted = "" if allow_pickle else ", or pass allow_pickle=True (--allow-pickle) if you trust it"
    raise ModelError(
        f"{where}: weights of {quoted(what)} must be in a safetensors file of the same folder, got "
        f"{quoted(name)}. Give a model with safetensors weights{trusted}."
    )


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Return type and shape of every tensor in the safetensors files of a folder.

    A file whose header cannot be read says nothing here: loading it says what is wrong.
    """
    found = {}
    for path in sorted(folder.glob(f"*{WEIGHTS}")):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size)) if size <= _HEADER else {}
            for name, about in header.items():
                if name != "__metadata__":
                    found[name] = (str(about["dtype"]), list(about["shape"]))
        except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
            continue
    return found


def odd_one(folder: Path) -> str:
    """Return the name of a tensor whose shape is not that of its like in other layers or experts.

    "" where there is none, or the source is no folder.
    """
    alike: dict[str, dict[str, str]] = {}
    for name, (_, shape) in headers(folder).items() if folder.is_dir() else ():
        alike.setdefault(re.sub(r"\d+", "#", name), {})[name] = str(shape)
    for shapes in alike.values():
        usual = Counter(shapes.values()).most_common(1)[0][0]
        odd = next((name for name, shape in shapes.items() if shape != usual), None)
        if odd is not None:
            return f"{odd} has shape {shapes[odd]}, others like it have {usual}"
    return ""


def _check_types(folder: Path) -> None:
    """Refuse whole numbers as weights of a model that is not quantised."""
    for name, (dtype, _) in headers(folder).items():
        if name.endswith(_PARAMETERS) and "F" not in dtype:
            raise ModelError(
                f"{folder} stores {quoted(name)} as {cut(dtype, 20)}, and weights of a model "
                "without quantization_config are floating-point numbers. Check where it came from."
            )


def check_numbers(name: str, model: torch.nn.Module) -> None:
    """Refuse weights that are not finite: everything that the model says would be nan.

    Raises
    ------
    ModelError
        That names the first such tensor.
    """
    for tensor, weight in model.state_dict().items():
        if weight.is_meta or not weight.is_floating_point() or not weight.numel():
            continue
        if weight.element_size() == 1:  # no arithmetic on eight bits
            continue
        low, high = torch.aminmax(weight.detach())
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ModelError(
                f"Weights that are finite numbers were expected, but {tensor} of {name} holds nan "
                "or infinity. Check where the model came from."
            )
