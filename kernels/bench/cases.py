"""What is timed: an op on one input, the backends that run it, and what it is compared with.

Baselines are written as a user of PyTorch would without the ops.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from kernels.dispatch import backend_for
from kernels.ops.attention import attention
from kernels.ops.coactivation import coactivation
from kernels.ops.gate import gate, gate_batch
from kernels.ops.project_topk import project_topk

SEED = 0
CHECKED_TOKENS = 512
Baseline = Callable[[], object]
# Qwen3-30B-A3B: hidden size, experts chosen of a token, width of an expert
HIDDEN, CHOSEN, EXPERT_WIDTH = 2048, 8, 768


class BenchError(RuntimeError):
    """A backend disagrees with the reference, or a benchmark cannot run."""


class Tolerance(NamedTuple):
    """How far one field of an output may be from the reference."""

    error: float  # largest difference; for large values, this share of the reference
    share: float = 0.0  # of the elements that may be further away


@dataclass(frozen=True)
class Problem:
    """One op on one input, as the results name it.

    The reference is timed only where there is no ``check``: it cannot hold large inputs.
    """

    op: str
    shape: str
    run: Callable[[str], Any]  # from the name of a backend to the op's output
    backends: tuple[str, ...]  # to time: all but the reference, best first
    inputs: tuple[torch.Tensor, ...]
    baselines: Mapping[str, Baseline] = field(default_factory=dict)  # timed in the same run
    # by field of the output; without one, integers are equal and floats within 1e-4
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)
    check: Callable[[str], Any] | None = None  # like run, on a smaller input

    def timed(self) -> dict[str, Callable[[], object]]:
        """Return what is timed by name: backends, the reference where it fits, baselines."""
        names = self.backends if self.check else (*self.backends, "torch")
        return {**{name: partial(self.run, name) for name in names}, **self.baselines}

    def n_bytes(self) -> int:
        """Return the bytes that the op must move: its inputs once and its outputs once."""
        outputs = self.run(self.backends[0])
        tensors = [*self.inputs, *(x for x in outputs if x is not None)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def refuse_what_disagrees(self) -> None:
        """Compare every backend with the reference.

        Raises
        ------
        BenchError
            If one is too far from it.
        """
        run = self.check or self.run
        expected = run("torch")
        for name in self.backends:
            actual = run(name)
            for part in expected._fields:
                reason = disagreement(
                    getattr(actual, part), getattr(expected, part), self.tolerances.get(part)
                )
                if reason:
                    raise BenchError(
                        f"{self.op} ({self.shape}) with backend {name!r} disagrees with the "
                        f"reference in {part}: {reason}. It is not timed."
                    )


def disagreement(
    actual: torch.Tensor | None, expected: torch.Tensor | None, tolerance: Tolerance | None = None
) -> str | None:
    """Return how two outputs differ, or None where they agree; nan agrees with nan only."""
    if actual is None or expected is None:
        return None if actual is expected else "only one of them has it"
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return (
            f"{actual.dtype} of shape {list(actual.shape)} instead of "
            f"{expected.dtype} of shape {list(expected.shape)}"
        )
    allowed = tolerance or Tolerance(1e-4 if expected.is_floating_point() else 0.0)
    left, right = actual.double(), expected.double()
    limit = allowed.error * right.abs().nan_to_num(posinf=0.0).clamp_min(1.0)
    far = ~(((left - right).abs() <= limit) | (left == right) | (left.isnan() & right.isnan()))
    n_far = int(far.sum())
    if n_far <= allowed.share * far.numel():
        return None
    first = tuple(far.nonzero()[0].tolist())
    return (
        f"{n_far} of {far.numel()} elements, the first at {list(first)}: "
        f"{left[first].item():.7g} instead of {right[first].item():.7g}"
    )


@dataclass(frozen=True)
class Size:
    """Shapes of one kind of run."""

    gate: tuple[tuple[int, int, int], ...]  # T, E, k
    decode: tuple[tuple[int, int, int, int], ...]  # S, T, E, k of one step of decoding
    coactivation: tuple[tuple[int, int, int, int], ...]  # S, T, E, k
    project_topk: tuple[tuple[int, int, int, int, int], ...]  # T, D, R, E, k
    attention: tuple[tuple[int, int, int, int], ...]  # T, H, Hkv, D
    dtype: torch.dtype  # of logits, hidden states, queries and keys


CPU = Size(
    gate=((65536, 64, 8),),
    decode=((16, 32, 64, 8),),
    coactivation=((16, 4096, 64, 8),),
    project_topk=((4096, 256, 8, 64, 8),),
    attention=((1024, 8, 2, 64),),
    dtype=torch.float32,
)
CPU_MORE = Size(
    gate=((65536, 8, 2), (65536, 128, 8)),
    decode=(),
    coactivation=((1, 65536, 128, 8),),
    project_topk=((1024, 2048, 16, 128, 8),),
    attention=((4096, 4, 1, 64),),
    dtype=torch.float32,
)
CUDA = Size(
    gate=((65536, 128, 8),),
    decode=((48, 32, 128, 8),),
    coactivation=((48, 8192, 128, 8),),
    project_topk=((16384, 2048, 16, 128, 8),),
    attention=((8192, 32, 4, 128),),
    dtype=torch.bfloat16,
)
CUDA_MORE = Size(
    gate=((65536, 8, 2), (65536, 64, 8), (65536, 256, 8), (65536, 512, 10), (8192, 128, 8)),
    decode=((16, 32, 64, 8),),
    coactivation=((1, 65536, 128, 8), (48, 8192, 512, 10)),
    project_topk=((16384, 2048, 16, 64, 8), (16384, 2048, 16, 512, 10)),
    attention=((2048, 32, 4, 128), (8192, 16, 16, 128), (4096, 64, 8, 64)),
    dtype=torch.bfloat16,
)


def sizes(device: torch.device, *, more: bool) -> list[Size]:
    """Return what a device is asked to run."""
    if device.type == "cuda":
        return [CUDA, CUDA_MORE] if more else [CUDA]
    return [CPU, CPU_MORE] if more else [CPU]


def problems(op: str, size: Size, device: torch.device) -> Iterator[Problem]:
    """Yield the problems of an op, made one at a time: the large ones do not fit together."""
    if op == "gate":
        for shape in size.gate:
            routed = _routed(shape[:-1], shape[-1], size, device)
            yield _observe(routed, importance=False)
            yield _observe(routed, importance=True)
            yield _select(routed)
        for step in size.decode:
            yield _decode(_routed(step[:-1], step[-1], size, device))
    elif op == "coactivation":
        for count in size.coactivation:
            yield _coactivation(_routed(count[:-1], count[-1], size, device))
    elif op == "project_topk":
        for stack in size.project_topk:
            yield _project_topk(*stack, size, device)
    else:
        for heads in size.attention:
            yield from _attention(*heads, size, device)


class Routed(NamedTuple):
    """Logits [..., T, E], and the ids and weights [..., T, k] that a model gives them."""

    logits: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def __str__(self) -> str:
        """Say the shape as the results show it."""
        *sites, n_tokens, n_experts = self.logits.shape
        of_sites = f"S={sites[0]}, " if sites else ""
        return f"{of_sites}T={n_tokens}, E={n_experts}, k={self.ids.shape[-1]}"


def _routed(shape: tuple[int, ...], k: int, size: Size, device: torch.device) -> Routed:
    logits = _random(*shape, device=device, dtype=size.dtype) * 2
    weights, ids = logits.float().softmax(-1).topk(k)
    return Routed(logits, ids, (weights / weights.sum(-1, keepdim=True)).to(size.dtype))


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED)).to(device, dtype)


# sums over all tokens, in another order
SUMS = {"importance": Tolerance(1e-3), "weight_sum": Tolerance(1e-3)}
# packed outputs: neighbouring codes of weights, neighbouring float16 numbers
PACKED = {
    "weights": Tolerance(1e-3),
    **{name: Tolerance(2e-3) for name in ("entropy", "margin", "logsumexp", "topk_mass")},
    **SUMS,
}


def _observe(routed: Routed, *, importance: bool) -> Problem:
    logits, ids, weights = routed

    def run(backend: str) -> object:
        return gate(
            logits, top_k=ids.shape[-1], score_function="softmax", expert_ids=ids, weights=weights,
            importance=importance, packed=True, backend=backend,
        )  # fmt: skip

    return Problem(
        op="gate",
        shape=f"observe{' with importance' if importance else ''}, {routed}",
        run=run,
        backends=_fast("gate", logits),
        inputs=routed,
        baselines={"torch chain": observe_chain(logits, ids, weights, importance)},
        tolerances=PACKED,
    )


def _select(routed: Routed) -> Problem:
    logits, k = routed.logits, routed.ids.shape[-1]

    def run(backend: str) -> object:
        return gate(logits, top_k=k, score_function="softmax", backend=backend)

    return Problem(
        op="gate",
        shape=f"select with importance, {routed}",
        run=run,
        backends=_fast("gate", logits),
        inputs=(logits,),
        baselines={"torch chain": select_chain(logits, k)},
        tolerances=SUMS,
    )


def _decode(routed: Routed) -> Problem:
    logits, ids, weights = (list(tensor) for tensor in routed)

    def run(backend: str) -> object:
        return gate_batch(
            logits, expert_ids=ids, weights=weights, rows=None, n_experts=logits[0].shape[-1],
            top_k=ids[0].shape[-1], score_function="softmax", packed=True, backend=backend,
        )  # fmt: skip

    chains = [
        observe_chain(*site, importance=True) for site in zip(logits, ids, weights, strict=True)
    ]
    return Problem(
        op="gate",
        shape=f"observe a decoding step, {routed}",
        run=run,
        backends=_fast("gate", routed.logits),
        inputs=routed,
        baselines={"torch chain": lambda: [chain() for chain in chains]},
        tolerances=PACKED,
    )


def _coactivation(routed: Routed) -> Problem:
    n_experts = routed.logits.shape[-1]
    ids = routed.ids.to(torch.uint8 if n_experts <= 255 else torch.uint16)
    following = ids.roll(1, 0) if len(ids) > 1 else ids.flip(1)

    def run(backend: str) -> object:
        return coactivation(ids, following, n_experts=n_experts, backend=backend)

    return Problem(
        op="coactivation",
        shape=f"with transitions, {routed}",
        run=run,
        backends=_fast("coactivation", ids),
        inputs=(ids, following),
    )


def _project_topk(
    n_tokens: int,
    width: int,
    routers: int,
    n_experts: int,
    k: int,
    size: Size,
    device: torch.device,
) -> Problem:
    hidden = _random(n_tokens, width, device=device, dtype=size.dtype)
    projections = _random(routers, n_experts, width, device=device, dtype=size.dtype) / width**0.5

    def run(backend: str) -> object:
        return project_topk(hidden, projections, top_k=k, backend=backend)

    return Problem(
        op="project_topk",
        shape=f"T={n_tokens}, D={width}, R={routers}, E={n_experts}, k={k}",
        run=run,
        backends=_fast("project_topk", hidden),
        inputs=(hidden, projections),
        baselines={
            "matmul alone": all_logits(hidden, projections),
            "torch chain": project_chain(hidden, projections, k),
        },
        # logits that differ by rounding may be chosen in another order
        tolerances={"expert_ids": Tolerance(0.0, share=1e-3), "values": Tolerance(1e-3)},
    )


def _attention(
    n_tokens: int, heads: int, key_heads: int, width: int, size: Size, device: torch.device
) -> Iterator[Problem]:
    query = _random(1, heads, n_tokens, width, device=device, dtype=size.dtype)
    key = _random(1, key_heads, n_tokens, width, device=device, dtype=size.dtype)
    scaling = width**-0.5
    lse = logsumexp_of_scores(query, key, scaling)
    compared = {"the model's attention": model_attention(query, key, scaling)}
    if device.type == "cuda":
        layer = decoder_layer(n_tokens, heads, key_heads, width, query)
        compared["a decoder layer"] = layer

    def problem(label: str, given: torch.Tensor | None, every: int) -> Problem:
        def run(backend: str, n: int = n_tokens) -> object:
            return attention(
                query[:, :, :n], key[:, :, :n], scaling=scaling,
                lse=None if given is None else given[:, :, :n], every=every, backend=backend,
            )  # fmt: skip

        return Problem(
            op="attention",
            shape=f"{label}, causal, T={n_tokens}, H={heads}, Hkv={key_heads}, D={width}",
            run=run,
            backends=_fast("attention", query),
            inputs=(query, key) if given is None else (query, key, given),
            baselines=compared,
            tolerances={"mean_distance": Tolerance(1e-3)},
            # the reference holds all weights: past this compared on the first tokens, not timed
            check=None
            if n_tokens <= CHECKED_TOKENS
            else lambda backend: run(backend, CHECKED_TOKENS),
        )

    yield problem("without lse", None, 1)
    yield problem("lse given", lse, 1)
    yield problem("lse given, every=8", lse, 8)


def _fast(op: str, like: torch.Tensor) -> tuple[str, ...]:
    return (backend_for(op, like.device),)


def observe_chain(
    logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, importance: bool
) -> Baseline:
    """Return the statistics of a model's own choice, one PyTorch call after the other."""
    n_experts = logits.shape[-1]

    def run() -> object:
        x = logits.float()
        probabilities, lse = x.softmax(-1), x.logsumexp(-1)
        entropy = lse - (probabilities * x).sum(-1)
        chosen = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, ids, True)
        last = probabilities.masked_fill(~chosen, torch.inf).amin(-1)
        margin = last - probabilities.masked_fill(chosen, -torch.inf).amax(-1)
        mass = probabilities.gather(-1, ids).sum(-1)
        ordered, order = weights.float().sort(stable=True, dim=-1, descending=True)
        slots = ids.gather(-1, order)
        flat = slots.flatten()
        load = flat.new_zeros(n_experts).index_add_(0, flat, torch.ones_like(flat))
        weight_sum = x.new_zeros(n_experts).index_add_(0, flat, ordered.flatten())
        statistics = [value.half() for value in (entropy, margin, lse, mass)]
        sums = (load, weight_sum, probabilities.sum(0) if importance else None)
        return slots.to(torch.uint8 if n_experts <= 255 else torch.int32), ordered, statistics, sums

    return run


def select_chain(logits: torch.Tensor, k: int) -> Baseline:
    """Return a router's choice with statistics, one PyTorch call after the other."""
    n_experts = logits.shape[-1]

    def run() -> object:
        x = logits.float()
        probabilities, lse = x.softmax(-1), x.logsumexp(-1)
        entropy = lse - (probabilities * x).sum(-1)
        # one more than chosen: the best expert left out
        values, ids = probabilities.topk(min(k + 1, n_experts))
        margin = values[:, k - 1] - values[:, -1]
        mass = values[:, :k].sum(-1)
        flat = ids[:, :k].flatten()
        load = flat.new_zeros(n_experts).index_add_(0, flat, torch.ones_like(flat))
        weights = values[:, :k] / mass.unsqueeze(-1)
        weight_sum = x.new_zeros(n_experts).index_add_(0, flat, weights.flatten())
        sums = (load, weight_sum, probabilities.sum(0))
        return ids[:, :k].int(), weights, entropy, margin, lse, mass, sums

    return run


def all_logits(hidden: torch.Tensor, projections: torch.Tensor) -> Baseline:
    """Return the matrix product alone, with the logits of all routers in memory."""
    stacked = projections.flatten(0, 1).T
    return lambda: hidden @ stacked


def project_chain(hidden: torch.Tensor, projections: torch.Tensor, k: int) -> Baseline:
    """Return the product, then the choice from the logits in memory."""
    stacked = projections.flatten(0, 1).T

    def run() -> object:
        logits = (hidden @ stacked).view(len(hidden), *projections.shape[:2])
        return logits.topk(k), logits.float().logsumexp(-1)

    return run


def model_attention(query: torch.Tensor, key: torch.Tensor, scaling: float) -> Baseline:
    """Return the model's own attention: PyTorch's fused one, on the same queries and keys."""
    value = torch.randn_like(key)
    grouped = query.shape[1] != key.shape[1]
    return lambda: functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
    )


def logsumexp_of_scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return what a fused attention hands out beside its output, [B, H, T] float32."""
    n_tokens, group = query.shape[2], query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    positions = torch.arange(n_tokens, device=query.device)
    parts = []
    for block in torch.split(positions, 256):
        scores = query[:, :, block].float() @ keys.mT * scaling
        later = positions[None, :] > block[:, None]
        parts.append(scores.masked_fill(later, -torch.inf).logsumexp(-1))
    return torch.cat(parts, dim=-1)


def decoder_layer(
    n_tokens: int, heads: int, key_heads: int, width: int, like: torch.Tensor
) -> Baseline:
    """Return a lower bound on a decoder layer of Qwen3-30B-A3B's shape.

    Its experts are replaced by one dense network as wide as those a token visits: the same
    arithmetic, without the routing and without what grouping costs. A share of this time is an
    upper bound on the share of the layer's.
    """
    make = torch.Generator().manual_seed(1)

    def weight(rows: int, columns: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(rows, columns, generator=make) / rows**0.5
        return values.to(like.device, like.dtype)

    x = weight(n_tokens, HIDDEN)
    to_query, to_key = weight(HIDDEN, heads * width), weight(HIDDEN, key_heads * width)
    to_value, back = weight(HIDDEN, key_heads * width), weight(heads * width, HIDDEN)
    up, gate = weight(HIDDEN, CHOSEN * EXPERT_WIDTH), weight(HIDDEN, CHOSEN * EXPERT_WIDTH)
    down = weight(CHOSEN * EXPERT_WIDTH, HIDDEN)

    def split(flat: torch.Tensor, n: int) -> torch.Tensor:
        return flat.view(1, n_tokens, n, width).transpose(1, 2)

    def run() -> object:
        normed = functional.rms_norm(x, (HIDDEN,))
        attended = functional.scaled_dot_product_attention(
            split(normed @ to_query, heads),
            split(normed @ to_key, key_heads),
            split(normed @ to_value, key_heads),
            is_causal=True,
            enable_gqa=heads != key_heads,
        )
        y = x + attended.transpose(1, 2).reshape(n_tokens, -1) @ back
        normed = functional.rms_norm(y, (HIDDEN,))
        return y + (functional.silu(normed @ gate) * (normed @ up)) @ down

    return run
