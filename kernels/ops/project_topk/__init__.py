"""The choices of many candidate routers on the same hidden states, in one pass."""

from typing import NamedTuple

import torch

from kernels.dispatch import BACKENDS, KernelError, implementation, resolve_backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# experts whose logits one Triton program can hold in registers, by bytes of an element
MAX_EXPERTS = {2: 1024, 4: 512}


class ProjectTopkOutput(NamedTuple):
    """What ``R`` routers of ``E`` experts would choose for ``T`` tokens, ``K`` experts each.

    Attributes
    ----------
    expert_ids : Tensor [T, R, K], int32
        Experts with the highest logits, best first. Ties go to the lower expert id.
    values : Tensor [T, R, K], float32
        Their logits.
    logsumexp : Tensor [T, R], float32
        Log of the sum of exponentials of all ``E`` logits: ``exp(values - logsumexp)`` are the
        softmax probabilities of the chosen.
    """

    expert_ids: torch.Tensor
    values: torch.Tensor
    logsumexp: torch.Tensor


def project_topk(
    hidden: torch.Tensor,
    projections: torch.Tensor,
    *,
    top_k: int,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> ProjectTopkOutput:
    """Project tokens through ``R`` routers and keep each router's ``top_k`` best experts.

    The logits of all routers are never held at once: a chunk of tokens on a CPU, the registers
    on a GPU. Products are summed in float32.

    Parameters
    ----------
    hidden : Tensor [T, D], float16 | bfloat16 | float32
        Router inputs, finite.
    projections : Tensor [R, E, D]
        A row of weights per router and expert; finite. ``hidden`` and ``projections`` are used
        in the wider of their two dtypes.
    top_k : int
        Experts kept, ``1 <= top_k <= E``.
    bias : Tensor [R, E], optional
        Added to the logits; ``-inf`` bars an expert.
    backend : {"auto", "triton", "numba", "torch"}
        A backend asked for by name is used or refused, never replaced.

    Raises
    ------
    KernelError
        If a shape, a dtype, ``top_k`` or the backend is not supported.
    """
    _check(hidden, projections, top_k, bias)
    dtype = torch.promote_types(hidden.dtype, projections.dtype)
    n_experts = projections.shape[1]
    limit = MAX_EXPERTS[dtype.itemsize]
    refusals = dict.fromkeys(BACKENDS)
    if n_experts > limit:
        refusals["triton"] = f"it holds at most {limit} experts of {dtype}, there are {n_experts}"
    name = resolve_backend(backend, device=hidden.device, refusals=refusals)
    if name == "triton":
        hidden, projections = hidden.to(dtype).contiguous(), projections.to(dtype).contiguous()
        bias = None if bias is None else bias.contiguous()
    run = implementation("project_topk", name)
    out: ProjectTopkOutput = run(hidden, projections, top_k=top_k, bias=bias)
    return out


def _check(
    hidden: torch.Tensor, projections: torch.Tensor, top_k: int, bias: torch.Tensor | None
) -> None:
    if hidden.ndim != 2:
        raise KernelError(
            f"hidden must have shape [tokens, width], got {list(hidden.shape)}. "
            "Flatten batch and sequence first: hidden.flatten(0, -2)."
        )
    if projections.ndim != 3 or projections.shape[2] != hidden.shape[1]:
        raise KernelError(
            f"projections must have shape [routers, experts, {hidden.shape[1]}] (the width of "
            f"hidden), got {list(projections.shape)}. One router is projection.unsqueeze(0)."
        )
    for name, value in (("hidden", hidden), ("projections", projections)):
        if value.dtype not in DTYPES:
            raise KernelError(f"{name} must be float16, bfloat16 or float32, got {value.dtype}.")
    n_routers, n_experts, _ = projections.shape
    if not 1 <= top_k <= n_experts:
        raise KernelError(f"top_k must be between 1 and {n_experts} (the experts), got {top_k}.")
    if bias is not None and bias.shape != (n_routers, n_experts):
        raise KernelError(
            f"bias must have shape [{n_routers}, {n_experts}], one value per router and expert, "
            f"got {list(bias.shape)}."
        )
    for name, other in (("projections", projections), ("bias", bias)):
        if other is not None and other.device != hidden.device:
            raise KernelError(f"hidden is on {hidden.device}, {name} on {other.device}. Move one.")


def project_topk_reference(
    hidden: torch.Tensor,
    projections: torch.Tensor,
    *,
    top_k: int,
    bias: torch.Tensor | None = None,
) -> ProjectTopkOutput:
    """Compute what :func:`kernels.project_topk` computes, a router at a time."""
    n_tokens, n_routers = len(hidden), len(projections)
    out = ProjectTopkOutput(
        expert_ids=hidden.new_empty((n_tokens, n_routers, top_k), dtype=torch.int32),
        values=hidden.new_empty((n_tokens, n_routers, top_k), dtype=torch.float32),
        logsumexp=hidden.new_empty((n_tokens, n_routers), dtype=torch.float32),
    )
    for router, projection in enumerate(projections):
        logits = hidden.float() @ projection.float().T  # [T, E]
        if bias is not None:
            logits = logits + bias[router].float()
        # torch.topk leaves the order of ties open; a stable sort keeps the lower id
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        out.expert_ids[:, router] = order[:, :top_k]
        out.values[:, router] = values[:, :top_k]
        out.logsumexp[:, router] = logits.logsumexp(dim=-1)
    return out
