"""Other weights for a while, in a part of a model: other precision, fewer bits, lower rank."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils._pytree import tree_map

from capture.errors import quoted
from capture.model import attributes, inputs
from capture.model.flops import ATTENTION_NAMES, decoder_layers, expert_parameters
from capture.model.sites import Site
from explorer.comparison.conditions.condition import (
    CONDITIONS,
    Applied,
    Condition,
    ConditionInfo,
    Subject,
)
from explorer.errors import ConditionError

Part = Literal["attention", "router", "experts", "rest"]
PARTS: tuple[Part, ...] = get_args(Part)
STACK = 3  # axes of experts in one tensor: experts, and the two of a matrix
MATRIX = 2

Named = dict[str, nn.Parameter]


def check_parts(parts: Sequence[str]) -> tuple[Part, ...]:
    """Return names of parts, if they are some; one text may hold several: ``router+experts``.

    Raises
    ------
    ConditionError
        If there is none, or an unknown one.
    """
    parts = parts.split("+") if isinstance(parts, str) else parts
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ConditionError(
            f"Parts among {', '.join(PARTS)} were expected, got {', '.join(unknown) or 'none'}."
        )
    return tuple(part for part in PARTS if part in parts)


def part_modules(subject: Subject) -> dict[Part, list[nn.Module]]:
    """Return the modules of each part but the rest, in the order of layers."""
    attention = [
        module
        for layer in decoder_layers(subject.model).values()
        for name, module in layer.named_children()
        if name in ATTENTION_NAMES and not isinstance(module, nn.ModuleList)
    ]
    experts = [module for site in subject.sites for module in expert_modules(site)]
    return {
        "attention": attention,
        "router": [site.router for site in subject.sites],
        "experts": experts,
    }


def expert_modules(site: Site) -> list[nn.Module]:
    """Return the modules that hold a site's experts; JetMoE keeps their second layer apart."""
    second = getattr(site.parent, "output_linear", None)
    return [site.experts, *([second] if isinstance(second, nn.Module) else [])]


def part_parameters(subject: Subject) -> dict[Part, Named]:
    """Return all parameters by part and name; a router or experts within attention are theirs."""
    modules = part_modules(subject)
    owner: dict[nn.Parameter, Part] = {}
    inner: tuple[Part, ...] = ("router", "experts", "attention")
    for part in inner:
        for module in modules[part]:
            for parameter in module.parameters():
                owner.setdefault(parameter, part)
    found: dict[Part, Named] = {part: {} for part in PARTS}
    for name, parameter in subject.model.named_parameters():
        found[owner.get(parameter, "rest")][name] = parameter
    return found


def matrices(named: Named) -> Named:
    """Return the weights that tokens are multiplied by: matrices, and experts' stacks of them.

    Norms and biases are left out; beside stacked experts, what has two axes is a bias.
    """
    stacked = any(p.ndim == STACK for p in named.values())
    return {
        name: p
        for name, p in named.items()
        if p.ndim >= MATRIX and "bias" not in name.rsplit(".", 1)[-1] and 1 not in p.shape
        and not (stacked and p.ndim == MATRIX and "expert" in name)
    }  # fmt: skip


def input_axis(subject: Subject, parameter: nn.Parameter) -> int:
    """Return the axis of a weight that is summed over: the last, or -2 in transposed experts."""
    for site in subject.sites:
        for module in expert_modules(site):
            if any(p is parameter for p in module.parameters()):
                return -2 if _is_transposed(module, subject) else -1
    return -1


def _is_transposed(experts: nn.Module, subject: Subject) -> bool:
    """Whether experts hold [E, in, out]; said by transformers, else seen from the widths."""
    said = getattr(attributes.inner(experts), "is_transposed", None)
    if isinstance(said, bool):
        return said
    first = next((p for p in experts.parameters() if p.ndim == STACK), None)
    width = inputs.width(subject.model)
    return first is not None and first.shape[-2] == width and first.shape[-1] != width


@contextmanager
def replaced(changes: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Give parameters other values until the block is left; their own tensors come back.

    Raises
    ------
    ConditionError
        If a weight is not in memory, as offloaded ones are not.
    """
    if any(parameter.device.type == "meta" for parameter in changes):
        raise ConditionError(
            "Weights in memory were expected, but some are offloaded. Load the model without a "
            "device map."
        )
    kept = {parameter: parameter.data for parameter in changes}
    try:
        for parameter, value in changes.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in kept.items():
            parameter.data = value


Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LEAST_SHARE = 0.001  # of the weights, that is written as a number
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@CONDITIONS.add("precision")
@dataclass(eq=False)
class Precision(Condition):
    """Compute the model, or some of its parts, in another dtype.

    Parameters
    ----------
    dtype : {"bfloat16", "float16", "float32"}
    parts : sequence of {"attention", "router", "experts", "rest"}
        With all four, the model runs in the dtype as if it had been loaded so. A part set apart
        gets its inputs rounded, computes in the dtype, and its outputs return to the model's.

    Notes
    -----
    Buffers stay: rotary frequencies and selection biases are kept in float32 by transformers too.
    """

    info = ConditionInfo(
        name="precision",
        kind="precision",
        title="Precision",
        summary=(
            "Weights and arithmetic in 16 bits, for the whole model or for attention, router or "
            "experts alone. Close decisions of the router may fall the other way."
        ),
        formula="y = f(round(W), round(x)),  p = 8 (bf16) or 11 (fp16) bits",
        paper="2101.03961, section 2.4",
        simulated=False,
    )

    dtype: Dtype = "bfloat16"
    parts: Sequence[Part] = PARTS

    def __post_init__(self) -> None:
        """Check what was given."""
        if self.dtype not in DTYPES:
            raise ConditionError(
                f"A dtype among {', '.join(DTYPES)} was expected, got {quoted(self.dtype)}."
            )
        self.parts = check_parts(self.parts)
        if "rest" in self.parts and self.parts != PARTS:
            raise ConditionError(
                "The rest of a model (embeddings, norms, output) has no boundary of its own where "
                "values could be rounded. Choose parts among attention, router and experts, or "
                "all four."
            )

    @property
    def label(self) -> str:
        """Dtype and parts, such as ``bf16 router``."""
        whole = self.parts == PARTS
        return SHORT[self.dtype] + ("" if whole else " " + "+".join(self.parts))

    def _open(self, subject: Subject, applied: Applied) -> AbstractContextManager[Any]:
        dtype, named = DTYPES[self.dtype], part_parameters(subject)
        changes = {
            p: p.data.to(dtype)
            for part in self.parts
            for p in named[part].values()
            if p.is_floating_point()
        }
        applied.weight_bytes += sum(
            p.numel() * (dtype.itemsize - p.element_size()) for p in changes
        )
        applied.method = _tested(changes)
        with ExitStack() as stack:
            if self.parts != PARTS:
                modules = part_modules(subject)
                for part in self.parts:
                    for module in modules[part]:
                        _cast_around(module, dtype, stack)
            stack.enter_context(replaced(changes))
            return stack.pop_all()


def _tested(changes: Mapping[nn.Parameter, torch.Tensor]) -> str:
    """Say whether weights lose anything, as those of a checkpoint in that dtype do not."""
    pairs = [(p.data, new) for p, new in changes.items() if p.device.type != "meta"]
    rounded = sum(int((new.to(old.dtype) != old).sum()) for old, new in pairs)
    if not rounded:
        return "no weight is rounded, as all are exact in this dtype: tests the arithmetic alone"
    share = rounded / sum(old.numel() for old, _ in pairs)
    told = f"{share:.1%}" if share >= LEAST_SHARE else f"less than {LEAST_SHARE:.1%}"
    return f"{told} of the weights are rounded: tests weights and arithmetic"


def _cast_around(module: nn.Module, dtype: torch.dtype, stack: ExitStack) -> None:
    """Round a module's floating inputs to the dtype, and give its outputs the dtype they had."""
    outside: list[torch.dtype] = []

    def cast(value: Any, to: torch.dtype) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(to) if is_float else value

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = [*args, *kwargs.values()]
        outside[:] = [v.dtype for v in given if cast(v, dtype) is not v][:1] or [dtype]
        rounded: tuple[Any, ...] = tree_map(lambda v: cast(v, dtype), args)
        named: dict[str, Any] = tree_map(lambda v: cast(v, dtype), kwargs)
        return rounded, named

    def after(_: nn.Module, args: object, output: Any) -> Any:
        return tree_map(lambda v: cast(v, outside[0]), output)

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(after).remove)


FEWEST_BITS, MOST_BITS = 2, 8
SCALE_BITS = 16  # a scale is stored as a half float
GROUP = 32


def fake_quantise(
    weight: torch.Tensor, bits: int, *, group: int = 0, axis: int = -1
) -> torch.Tensor:
    """Return a weight rounded to ``2^bits - 1`` evenly spaced values, symmetric around 0.

    Parameters
    ----------
    weight : Tensor [..., out, in]
        Any number of matrices.
    bits : int
    group : int
        Weights along ``axis`` that share a scale; 0 = all of them, a scale for each output.
    axis : int
        The one that products sum over.

    Returns
    -------
    Tensor
        Of the weight's shape and dtype; no value is off by more than half its group's scale.

    Notes
    -----
    ``w = s round(w / s)`` with ``s = max |w| / (2^(bits - 1) - 1)``: nothing is clipped. Rounding
    is torch's own; what is missing there, and in libraries that quantise the matrices of
    ``nn.Linear`` only, is a group of a stack of experts. torchao stores such stacks, but a model
    of transformers cannot run on what it stores.
    """
    moved = weight.movedim(axis, -1)
    size = group or moved.shape[-1]
    if moved.shape[-1] % size:
        raise ConditionError(
            f"A group that divides the {moved.shape[-1]} inputs of a weight was expected, got "
            f"{group}. Give a divisor, or 0 for one scale for each output."
        )
    grouped = moved.reshape(-1, size).float()
    top = 2 ** (bits - 1) - 1
    # a group of zeros stays zeros with any scale
    scale = grouped.abs().amax(dim=-1).div(top).clamp_min(torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(grouped, scale, zero, 0, -top, top)
    return rounded.reshape(moved.shape).movedim(-1, axis).to(weight.dtype).contiguous()


def usual_group(inputs: int) -> int:
    """Return 32, or the largest number below that divides the inputs of a weight."""
    return next(size for size in range(min(GROUP, inputs), 0, -1) if inputs % size == 0)


@CONDITIONS.add("quantised")
@dataclass(eq=False)
class Quantised(Condition):
    """Round weights to few bits; products are still computed in the model's own dtype.

    Parameters
    ----------
    bits : int, 2 to 8
    group : int or None
        Weights that share a scale; 0 = one scale for each output. None = one scale for each output
        at 8 bits, else 32, or the largest number below that divides the inputs.
    parts : sequence of {"attention", "router", "experts", "rest"}
        Whose matrices are rounded. The router is left out by default, as is usual.
    """

    info = ConditionInfo(
        name="quantised",
        kind="quantisation",
        title="Quantised weights",
        summary=(
            "Weights are rounded to 8, 4 or 3 bits with a scale per group, experts' stacks "
            "included. Fake quantisation: the rounding is real, the smaller memory is reckoned."
        ),
        formula="w = s round(w / s),  s = max |w_group| / (2^(bits-1) - 1)",
        paper="2508.01625",
    )

    bits: int = 8
    _: KW_ONLY
    group: int | None = None
    parts: Sequence[Part] = ("attention", "experts")

    def __post_init__(self) -> None:
        """Check what was given."""
        if not FEWEST_BITS <= self.bits <= MOST_BITS:
            raise ConditionError(
                f"{FEWEST_BITS} to {MOST_BITS} bits were expected, got {self.bits}."
            )
        if self.group is not None and self.group < 0:
            raise ConditionError(f"A group of 0 or more weights was expected, got {self.group}.")
        self.group = 0 if self.group is None and self.bits == MOST_BITS else self.group
        self.parts = check_parts(self.parts)

    @property
    def label(self) -> str:
        """Bits, and group and parts where they are not the usual ones."""
        usual = self.parts == ("attention", "experts")
        parts = "" if usual else " " + "+".join(self.parts)
        plain = self.group is None or (self.group == 0 and self.bits == MOST_BITS)
        return f"int{self.bits}{parts}" + ("" if plain else f" group {self.group}")

    def _open(self, subject: Subject, applied: Applied) -> AbstractContextManager[Any]:
        named = part_parameters(subject)
        changes = {}
        for part in self.parts:
            for parameter in matrices(named[part]).values():
                axis = input_axis(subject, parameter)
                inputs = parameter.shape[axis]
                size = usual_group(inputs) if self.group is None else self.group or inputs
                changes[parameter] = fake_quantise(parameter.data, self.bits, group=size, axis=axis)
                stored = parameter.numel() * (self.bits + SCALE_BITS / size) / 8
                applied.weight_bytes += stored - parameter.numel() * parameter.element_size()
        applied.chosen["bits"] = self.bits
        return replaced(changes)


@CONDITIONS.add("low_rank")
@dataclass(eq=False)
class LowRankExperts(Condition):
    """Replace each expert's matrices by their best approximation of a rank.

    Parameters
    ----------
    share : float
        Of the full rank, the smaller side of a matrix; rounded, at least 1.
    """

    info = ConditionInfo(
        name="low_rank",
        kind="factorisation",
        title="Low-rank experts (SVD)",
        summary=(
            "Every matrix of every expert becomes the nearest one of a lower rank, by its singular "
            "values. Two thin factors would hold it; here their product is computed with."
        ),
        formula="W ~ U_r S_r V_r^T,  r (out + in) weights instead of out * in",
        paper="",
    )

    share: float = 0.5

    def __post_init__(self) -> None:
        """Check what was given."""
        if not 0 < self.share <= 1:
            raise ConditionError(f"0 < share <= 1 of the full rank was expected, got {self.share}.")

    @property
    def label(self) -> str:
        """Name and share, such as ``low_rank 0.5``."""
        return f"{self.info.name} {self.share:.3g}"

    def _open(self, subject: Subject, applied: Applied) -> AbstractContextManager[Any]:
        changes = {}
        for site in subject.sites:
            for parameter in expert_parameters(site):
                if parameter.ndim != STACK:
                    raise ConditionError(
                        f"{site.info.module}: experts in stacks [E, out, in] were expected, got "
                        f"{list(parameter.shape)}. This family cannot be factorised."
                    )
                n, rows, columns = parameter.shape
                rank = max(round(self.share * min(rows, columns)), 1)
                changes[parameter] = truncated(parameter.data, rank)
                # where factors would be larger than the matrix, the matrix is kept
                fewer = rows * columns - min(rank * (rows + columns), rows * columns)
                applied.weight_bytes -= n * fewer * parameter.element_size()
                name = f"{rows} x {columns}"
                applied.chosen[name] = rank
        return replaced(changes)


def truncated(stack: torch.Tensor, rank: int) -> torch.Tensor:
    """Return matrices [E, out, in] with all but their largest ``rank`` singular values at 0."""
    u, s, v = torch.linalg.svd(stack.float(), full_matrices=False)
    product: torch.Tensor = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return product.to(stack.dtype)
