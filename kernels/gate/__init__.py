"""Top-k gating with the statistics a routing explorer needs."""

import torch

from kernels.dispatch import resolve_backend
from kernels.errors import KernelError
from kernels.gate.reference import gate_reference
from kernels.gate.types import SCORE_FUNCTIONS, GateOutput, ScoreFunction

__all__ = ["BACKENDS", "SCORE_FUNCTIONS", "GateOutput", "ScoreFunction", "gate", "gate_reference"]

BACKENDS = ("torch",)


def gate(
    logits: torch.Tensor,
    *,
    top_k: int,
    score_function: ScoreFunction,
    selection_bias: torch.Tensor | None = None,
    n_groups: int | None = None,
    top_groups: int | None = None,
    renormalize: bool = True,
    expert_ids: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    importance: bool = True,
    backend: str = "auto",
) -> GateOutput:
    """Route tokens, or observe how a model routed them, with statistics of every token.

    With ``expert_ids`` and ``weights`` the op *observes*: nothing is selected again, the ids are
    the model's own. Without them it *selects* ``top_k`` experts a token; ties go to the lower id.

    Parameters
    ----------
    logits : Tensor [T, E], float16 | bfloat16 | float32
        Router output of each token. ``-inf`` bars an expert; nan is allowed in invalid rows only.
    top_k : int
        Slots per token, ``1 <= top_k <= E``.
    score_function : {"softmax", "sigmoid", "softmax_topk", "probabilities"}
        How scores follow from logits. ``softmax_topk`` selects on logits and takes the softmax
        over the chosen; ``probabilities`` says that ``logits`` holds probabilities already.
    selection_bias : Tensor [E], optional
        Added to the scores for the choice only, never to the weights (DeepSeek-V3).
    n_groups, top_groups : int, optional
        Choose only within the ``top_groups`` best of ``n_groups`` equal groups. A group counts by
        the sum of its two best scores when there is a bias (DeepSeek-V3), else by its best
        (DeepSeek-V2).
    renormalize : bool
        Whether selected weights sum to 1 per token.
    expert_ids : Tensor [T, K], integer, optional
        The model's own choice, -1 = empty slot; requires ``weights``.
    weights : Tensor [T, K], optional
        The model's own combine weights; requires ``expert_ids``.
    valid : Tensor [T], bool, optional
        False for padding, which counts nowhere.
    importance : bool
        Whether to sum the probabilities per expert.
    backend : {"auto", "torch"}
        A backend asked for by name is used or refused, never replaced.

    Raises
    ------
    KernelError
        If a shape, an option or the backend is not supported.

    References
    ----------
    Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5; DeepSeek-V3, arXiv:2412.19437, eq. 12-16.
    """
    _check(logits, top_k, score_function, selection_bias, n_groups, top_groups)
    _check_observed(logits, top_k, expert_ids, weights, valid)
    resolve_backend(backend, device=logits.device, refusals=dict.fromkeys(BACKENDS))
    return gate_reference(
        logits,
        top_k=top_k,
        score_function=score_function,
        selection_bias=selection_bias,
        n_groups=n_groups,
        top_groups=top_groups,
        renormalize=renormalize,
        expert_ids=expert_ids,
        weights=weights,
        valid=valid,
        importance=importance,
    )


def _check(
    logits: torch.Tensor,
    top_k: int,
    score_function: str,
    selection_bias: torch.Tensor | None,
    n_groups: int | None,
    top_groups: int | None,
) -> None:
    if logits.ndim != 2:
        raise KernelError(
            f"gate() takes router logits of shape [tokens, experts], got {list(logits.shape)}. "
            "Flatten batch and sequence first: logits.flatten(0, -2)."
        )
    n_experts = logits.shape[1]
    if not 1 <= top_k <= n_experts:
        raise KernelError(f"top_k must be between 1 and {n_experts} (the experts), got {top_k}.")
    if score_function not in SCORE_FUNCTIONS:
        raise KernelError(
            f"Unknown score_function {score_function!r}. "
            f"Choose one of {', '.join(SCORE_FUNCTIONS)}."
        )
    if selection_bias is not None and selection_bias.shape != (n_experts,):
        raise KernelError(
            f"selection_bias must have shape [{n_experts}], one value an expert, "
            f"got {list(selection_bias.shape)}."
        )
    if (n_groups is None) != (top_groups is None):
        raise KernelError("n_groups and top_groups belong together: pass both or neither.")
    if n_groups is None or top_groups is None:
        return
    if n_groups < 1 or n_experts % n_groups or not 1 <= top_groups <= n_groups:
        raise KernelError(
            f"{n_experts} experts cannot form n_groups={n_groups} equal groups of which "
            f"top_groups={top_groups} are kept."
        )
    if top_k > n_experts // n_groups * top_groups:
        raise KernelError(
            f"top_k={top_k} experts do not fit into {top_groups} groups of "
            f"{n_experts // n_groups}. Raise top_groups or lower top_k."
        )


def _check_observed(
    logits: torch.Tensor,
    top_k: int,
    expert_ids: torch.Tensor | None,
    weights: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> None:
    n_tokens = logits.shape[0]
    if (expert_ids is None) != (weights is None):
        raise KernelError("expert_ids and weights belong together: pass both or neither.")
    for name, value in (("expert_ids", expert_ids), ("weights", weights)):
        if value is not None and value.shape != (n_tokens, top_k):
            raise KernelError(
                f"{name} must have shape [{n_tokens}, {top_k}] ([tokens, top_k]), "
                f"got {list(value.shape)}."
            )
    if valid is not None and (valid.shape != (n_tokens,) or valid.dtype != torch.bool):
        raise KernelError(
            f"valid must be a boolean tensor of shape [{n_tokens}], "
            f"got {valid.dtype} of shape {list(valid.shape)}."
        )
