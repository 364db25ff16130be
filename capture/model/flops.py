"""Floating-point operations of a mixture-of-experts model: on paper, and counted as they run.

A multiplication and an addition count as two. Norms, activations, positions and the softmax are
left out on both sides: they are linear in the width where products are quadratic.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from capture.errors import SwapError
from capture.model.adapters.replacing import deaf
from capture.model.sites import LAYER_LISTS, OTHER_STACKS, SHARED_NAMES, Site, text_config
from capture.store.records import Place

# the parts of a decoder layer that attend to other tokens
ATTENTION_NAMES = ("self_attn", "self_attention", "attention", "attn")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
# projections within attention whose rows or columns are single heads'
HEAD_PROJECTIONS = ("q_proj", "q_b_proj", "wq", "o_proj", "out_proj", "dense", "wo")
FUSED_PROJECTIONS = ("qkv_proj", "query_key_value", "Wqkv")
MATRIX, STACK = 2, 3


@dataclass(frozen=True)
class LayerFlops:
    """Operations of one decoder layer.

    Attributes
    ----------
    layer : int
    attention : float, a token
        Projections to queries, keys, values and back.
    attention_heads : float, a token
        The part of ``attention`` that a token saves whose heads are all closed: from the query
        and back. Keys and values stay, as later tokens attend to them.
    attention_key : float or None, a token and key
        Scores and weighted sum over all heads; None for a mixer that is no softmax attention.
    router : dict of (layer, site) to float, a token
        The model's own.
    expert : dict of (layer, site) to float, an assignment
        One expert on one token: ``6 d d_ff`` for a SwiGLU expert.
    shared : float, a token
        Experts that every token visits, and their gate.
    dense : float, a token
        Feed-forward blocks without a router.
    """

    layer: int
    attention: float
    attention_heads: float
    attention_key: float | None
    router: Mapping[Place, float]
    expert: Mapping[Place, float]
    shared: float
    dense: float


@dataclass(frozen=True)
class ModelFlops:
    """Operations of a model, part by part.

    Attributes
    ----------
    layers : tuple of LayerFlops
    head : float, a token
        Output layer; 0 where there is none.
    """

    layers: tuple[LayerFlops, ...]
    head: float

    def per_token(
        self,
        keys: float,
        experts: Mapping[Place, float],
        *,
        router: Mapping[Place, float] | None = None,
    ) -> float:
        """Return the operations of one token through the whole model.

        Parameters
        ----------
        keys : float
            Keys that a query meets. A forward pass over ``S`` tokens computes all ``S`` of them
            in most implementations, although the causal mask needs half.
        experts : mapping of (layer, site) to float
            Experts with weights that ran, a token: ``Swapped.experts``.
        router : mapping of (layer, site) to float, optional
            Operations of the rule that chose, in place of the model's own router.

        Raises
        ------
        SwapError
            If a layer mixes tokens by something else than softmax attention.
        """
        total = self.head
        for layer in self.layers:
            if layer.attention_key is None:
                raise SwapError(
                    f"Layer {layer.layer} mixes tokens by something else than softmax attention, "
                    "whose cost has no formula here. Count it: `with counted_flops(model)`."
                )
            total += layer.attention + layer.attention_key * keys + layer.shared + layer.dense
            own = layer.router if router is None else {**layer.router, **router}
            total += sum(own[key] for key in layer.router)
            total += sum(cost * experts[key] for key, cost in layer.expert.items())
        return total


def model_flops(model: nn.Module, sites: Sequence[Site]) -> ModelFlops:
    """Read the operations of a model off its weights and configuration.

    Parameters
    ----------
    model : PreTrainedModel
        Weights may be on the meta device.
    sites : sequence of Site
        All sites of the model.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    layers = [
        _layer_flops(number, layer, sites, text_config(model))
        for number, layer in decoder_layers(model).items()
    ]
    return ModelFlops(tuple(layers), 0.0 if head is None else 2.0 * head.weight.numel())


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the decoder layers of a text model by number.

    Raises
    ------
    SwapError
        If the model keeps no list of layers.
    """
    for name, module in model.named_modules():
        words = name.split(".")
        is_list = isinstance(module, nn.ModuleList) and words[-1] in LAYER_LISTS
        if is_list and not set(words) & set(OTHER_STACKS):
            return dict(enumerate(module))
    raise SwapError(
        f"A list of decoder layers named {' or '.join(LAYER_LISTS)} was expected in "
        f"{type(model).__name__}, but there is none."
    )


def _layer_flops(
    number: int, layer: nn.Module, sites: Sequence[Site], config: object
) -> LayerFlops:
    router: dict[Place, float] = {}
    expert: dict[Place, float] = {}
    counted: set[nn.Parameter] = set()
    for site in sites:
        if site.info.layer == number:
            key = (number, site.info.site)
            router[key] = 2.0 * matrix_elements(site.router)
            expert[key] = 2.0 * expert_elements(site)
            for module in (site.router, site.experts, *_parallel(site)):
                counted.update(module.parameters())
    sums = {"attention": 0.0, "shared": 0.0, "dense": 0.0}
    heads = 0.0
    for name, parameter in layer.named_parameters():
        elsewhere = parameter in counted or set(name.split(".")) & set(OTHER_STACKS)
        if _is_matrix(name, parameter) and not elsewhere:
            part = _part_of(name)
            sums[part] += 2.0 * parameter.numel()
            if part == "attention":
                heads += 2.0 * parameter.numel() * _share_of_heads(name, parameter, config)
    return LayerFlops(
        number, sums["attention"], heads, _attention_key(layer, config), router, expert,
        sums["shared"], sums["dense"],
    )  # fmt: skip


def _share_of_heads(name: str, parameter: nn.Parameter, config: object) -> float:
    """Return the share of an attention matrix that makes queries or leads heads back, 0..1."""
    projection = name.split(".")[-2] if "." in name else ""
    if projection not in FUSED_PROJECTIONS:
        return float(projection in HEAD_PROJECTIONS)
    heads = _own_or_common(None, config, HEAD_COUNTS) or 0
    width = _own_or_common(None, config, ("head_dim",)) or parameter.shape[1] // max(1, heads)
    return min(1.0, heads * width / parameter.shape[0])


def _part_of(name: str) -> str:
    """Return which part of a layer a parameter belongs to."""
    words = name.split(".")
    if any(word in SHARED_NAMES or word.startswith("shared_expert") for word in words):
        return "shared"
    return "attention" if set(words) & set(ATTENTION_NAMES) else "dense"


def _attention_key(layer: nn.Module, config: object) -> float | None:
    """Return the operations a token and key, ``2 H (d_qk + d_v)``; None where that is not all."""
    total = 0.0
    for module in attention_modules(layer):
        heads = _own_or_common(module, config, HEAD_COUNTS)
        width = _own_or_common(module, config, ("head_dim",))
        query = _own_or_common(module, config, ("qk_head_dim",)) or width
        value = _own_or_common(module, config, ("v_head_dim",)) or width
        if heads is None or query is None or value is None or not _is_plain(module):
            return None
        total += 2.0 * heads * (query + value)
    return total or None


def attention_modules(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a decoder layer in which tokens see each other, by their names."""
    named = [m for n, m in layer.named_modules() if n.split(".")[-1] in ATTENTION_NAMES]
    return [m for one in named for m in (one if isinstance(one, nn.ModuleList) else [one])]


def head_count(attention: nn.Module, model: nn.Module) -> int:
    """Return how many attention heads a module has, 0 where it does not say."""
    return _own_or_common(attention, text_config(model), HEAD_COUNTS) or 0


def _own_or_common(module: object, config: object, names: tuple[str, ...]) -> int | None:
    """Return the first number under one of the names in the module or the configuration."""
    for owner in (module, config):
        for name in names:
            try:
                value = getattr(owner, name, None)
            except Exception:  # some configurations refuse what differs by layer, as they like
                return None
            if isinstance(value, int) and value > 0:
                return value
    return None


def _is_plain(attention: nn.Module) -> bool:
    """Whether a module is softmax attention over all keys: no convolution, state or index."""
    names = [name for name, _ in attention.named_modules()]
    return (
        all(p.ndim <= MATRIX for p in attention.parameters())
        and not any(hasattr(attention, n) for n in ("A_log", "dt_bias", "conv1d", "slope_rate"))
        and not any("index" in name or "compress" in name for name in names)
    )


def expert_parameters(site: Site) -> list[nn.Parameter]:
    """Return the weights of a site's experts, all experts together."""
    weights = [p for m in (site.experts, *_parallel(site)) for p in m.parameters()]
    # beside stacked matrices, what has two axes is a bias
    stacked = [p for p in weights if p.ndim == STACK]
    return stacked or [p for p in weights if p.ndim == MATRIX]


def expert_elements(site: Site) -> float:
    """Return the weights of one expert; biases are left out."""
    total = 0.0
    for parameter in expert_parameters(site):
        # a family without stacked weights lays its experts out one below the other
        n_experts = parameter.shape[0] if parameter.ndim == STACK else site.info.n_experts
        total += parameter.numel() / n_experts
    return total


def _parallel(site: Site) -> list[nn.Module]:
    """Return the second layer of experts that come as two modules."""
    second = getattr(site.parent, "output_linear", None)
    return [second] if isinstance(second, nn.Module) else []


def matrix_elements(module: nn.Module) -> int:
    """Return the elements of a module's matrices."""
    return sum(p.numel() for n, p in module.named_parameters() if _is_matrix(n, p))


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether tokens are multiplied by a parameter; a bias may have an axis of length 1."""
    return parameter.ndim == MATRIX and not name.endswith("bias")


@dataclass
class CountedFlops:
    """Operations that ran, filled when the block of :func:`counted_flops` is left.

    Attributes
    ----------
    modules : dict of str to int
        Module's name -> operations in it and below; ``""`` is the whole model.
    """

    modules: dict[str, int]

    @property
    def total(self) -> int:
        """Operations of the whole model."""
        return self.modules.get("", 0)

    def of(self, name: str) -> int:
        """Operations of one module, 0 if it never ran."""
        return self.modules.get(name, 0)


@contextmanager
def counted_flops(model: nn.Module) -> Iterator[CountedFlops]:
    """Count the matrix products and attention that really run in ``model``.

    Works whatever the experts implementation: products over sorted rows are counted by the rows
    they cover, which waits for the device. Not for timings.
    """
    counted = CountedFlops({})
    running: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():

            @deaf
            def enter(*_: object, name: str = name) -> None:
                running.append(name)

            @deaf
            def leave(*_: object) -> None:
                running.pop()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(_FlopCounter(counted.modules, running))
        yield counted


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds every product's operations to all the modules that run it."""

    def __init__(self, modules: dict[str, int], running: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._modules, self._running = modules, running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        formula = _FORMULAS.get(str(packet)) or flop_registry.get(packet)
        if formula is not None:
            operations = formula(*args, **(kwargs or {}), out_val=output)
            for name in set(self._running):
                self._modules[name] = self._modules.get(name, 0) + operations
        return output


def _sdpa_flop(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    """Count attention on a CPU, which torch leaves out, by the shapes of its inputs."""
    shapes = query.shape, key.shape, value.shape
    return int(sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _grouped_mm_flop(
    left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor, *_: Any, **__: Any
) -> int:
    """Count a product over rows sorted by expert; rows past the last offset are not computed."""
    return 2 * int(offs[-1]) * int(right.shape[-2]) * int(right.shape[-1])


# by name: transformers registers its operation when it is imported
_FORMULAS: dict[str, Any] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _sdpa_flop,
    "aten._grouped_mm": _grouped_mm_flop,
    "transformers.grouped_mm_fallback": _grouped_mm_flop,
}
