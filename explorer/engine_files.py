"""Files that serving engines load: placements of experts, and experts to keep in fast memory."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import yaml

from explorer.errors import MetricError
from explorer.metrics.cache import pins
from explorer.metrics.placement import Placement


class EngineFormat(NamedTuple):
    """A kind of file.

    Attributes
    ----------
    name : str
        Of the engine, or of what reads it.
    ending : str
        Which the engine may look at: SGLang takes anything else for the JSON text itself.
    how : str
        What makes the engine load it; ``{file}``, ``{copies}`` and ``{gpus}`` are filled in.
    """

    name: str
    ending: str
    how: str


PLACEMENT_FORMATS: dict[str, EngineFormat] = {
    "sglang": EngineFormat(
        "SGLang",
        ".json",
        "--init-expert-location {file} --ep-num-redundant-experts {copies} --ep-size {gpus}",
    ),
    "tensorrt-llm": EngineFormat(
        "TensorRT-LLM",
        ".yaml",
        "moe_config.load_balancer: {file}, with moe_expert_parallel_size: {gpus}",
    ),
    "eplb-json": EngineFormat("EPLB as JSON", ".json", "phy2log, log2phy and logcnt of {file}"),
}
PIN_FORMATS: dict[str, EngineFormat] = {
    "json": EngineFormat("JSON", ".json", "the experts of every layer"),
    "llama-cpp": EngineFormat(
        "llama.cpp, whole layers", ".txt", "xargs -a {file} llama-server -m MODEL"
    ),
    "llama-cpp-split": EngineFormat(
        "llama.cpp, a tensor for each expert", ".txt", "xargs -a {file} llama-server -m MODEL"
    ),
}
EXPERT_TENSORS = r"ffn_(gate|up|down|gate_up)"


def placement_file(made: Placement, layers: list[int], kind: str, hidden_layers: int) -> str:
    """Return a placement as the file that an engine loads.

    Parameters
    ----------
    made : Placement
        Of L layers.
    layers : list of int
        Their numbers in the model.
    kind : str
        ``sglang``: ``{"physical_to_logical_map": [hidden layers][physical]}`` for
        ``--init-expert-location``; a layer without experts has experts in order, which no router
        reads. ``tensorrt-llm``: the YAML of ``moe_config.load_balancer``. ``eplb-json``: what
        DeepSeek's ``rebalance_experts`` returns, with the layers' numbers.
    hidden_layers : int
        Decoder layers of the model.
    """
    if kind not in PLACEMENT_FORMATS:
        raise MetricError(f"Expected one of {', '.join(PLACEMENT_FORMATS)}; got {kind!r}.")
    rows = made.phy2log.tolist()
    if kind == "sglang":
        n_experts, slots = made.logcnt.shape[1], made.phy2log.shape[1]
        table = [[slot % n_experts for slot in range(slots)] for _ in range(hidden_layers)]
        for layer, row in zip(layers, rows, strict=True):
            table[layer] = row
        return json.dumps({"physical_to_logical_map": table}) + "\n"
    if kind == "tensorrt-llm":
        settings = {
            "num_slots": made.phy2log.shape[1],
            "initial_global_assignments": dict(zip(layers, rows, strict=True)),
            "layer_updates_per_iter": 0,
        }
        return str(yaml.safe_dump(settings, default_flow_style=None, width=2**30))
    arrays = {name: getattr(made, name).tolist() for name in ("phy2log", "log2phy", "logcnt")}
    return json.dumps({"layers": layers, **arrays}) + "\n"


def pins_file(load: npt.NDArray[np.float64], layers: Sequence[int], budget: int, kind: str) -> str:
    """Return which experts stay in fast memory, as a file.

    Parameters
    ----------
    load : array [L, E]
    layers : sequence of int
        Numbers of the L layers in the model.
    budget : int
        Experts of all layers together.
    kind : str
        ``json``: ``{"pins": {layer: [experts]}}``. ``llama-cpp``: arguments ``-ot`` for GGUF files
        that hold the experts of a layer in one tensor, as they do today, so that whole layers stay;
        those that use most of their experts, because the others read fewer. ``llama-cpp-split``:
        the same for files with a tensor for each expert.
    """
    n_experts = load.shape[1]
    if kind == "llama-cpp":
        n_layers = budget // n_experts
        if not n_layers:
            raise MetricError(
                f"--format llama-cpp keeps whole layers of {n_experts} experts, and --budget is "
                f"{budget}. Take a larger budget, or llama-cpp-split where the file has a tensor "
                "for each expert."
            )
        shares = load / np.maximum(load.sum(1, keepdims=True), 1)
        entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(1)
        kept = sorted(np.argsort(-entropy, kind="stable")[:n_layers].tolist())
        numbers = "|".join(str(layers[at]) for at in kept)
        return _overrides([rf"blk\.({numbers})\.{EXPERT_TENSORS}_exps"], "_exps")
    chosen = pins(load, budget)
    of_layer = {
        layer: np.flatnonzero(row).tolist() for layer, row in zip(layers, chosen, strict=True)
    }
    if kind == "json":
        return json.dumps({"budget": budget, "n_experts": n_experts, "pins": of_layer}) + "\n"
    patterns = [
        rf"blk\.{layer}\.{EXPERT_TENSORS}\.({'|'.join(map(str, experts))})\."
        for layer, experts in of_layer.items()
        if experts
    ]
    return _overrides(patterns, r"\.[0-9]+\.")


def _overrides(patterns: Sequence[str], rest: str) -> str:
    """Return the arguments of llama.cpp: the first pattern that fits a tensor decides."""
    kept = [f'-ot "{pattern}=CUDA0"' for pattern in patterns]
    return "\n".join([*kept, f'-ot "{EXPERT_TENSORS}{rest}=CPU"']) + "\n"
