"""What the host model makes of logits: scores, and the combine weights of chosen experts."""

import torch

from capture.swap.rules import Decision, PartMask, RouterInputs, Routing
from explorer.errors import RouterError

# a sum of weights below this is no sum to divide by; DeepSeek-V3's gate adds it for that reason
_TINY = 1e-20

_SOFTMAX = ("softmax", "softmax_topk")
_SIGMOID = ("sigmoid", "sigmoid_topk")


def host_scores(logits: torch.Tensor, inputs: RouterInputs) -> torch.Tensor:
    """Return the scores that the host model makes of its logits.

    Returns
    -------
    Tensor [T, E], float32
        Probabilities that sum to 1 for a softmax, sigmoids 0..1 for a sigmoid.

    Raises
    ------
    RouterError
        If it is not known what the model's logits are.
    """
    if inputs.score_function in _SOFTMAX:
        return logits.float().softmax(dim=-1)
    if inputs.score_function in _SIGMOID:
        return logits.float().sigmoid()
    if inputs.score_function == "probabilities":
        return logits.float()
    raise RouterError(
        f"Layer {inputs.layer} has a score function that RouteScope does not know "
        f"({inputs.score_function!r}), so other routers cannot be given its scale. "
        "Compare routers on the layers whose score function is known."
    )


def student_scores(logits: torch.Tensor, inputs: RouterInputs) -> torch.Tensor:
    """Return the host's kind of score from a new router's logits.

    As :func:`host_scores`, but where the model's own gate returns probabilities already, a new
    router's logits still need their softmax.
    """
    if inputs.score_function == "probabilities":
        return logits.float().softmax(dim=-1)
    return host_scores(logits, inputs)


def host_logits(inputs: RouterInputs) -> torch.Tensor:
    """Return recorded logits of which a softmax or sigmoid makes the scores, [T, E]."""
    logits = inputs.tensor("logits").float()
    if inputs.score_function == "probabilities":
        return logits.clamp_min(1e-12).log()
    host_scores(logits[:0], inputs)  # refuses what is not known
    return logits


def weigh(scores: torch.Tensor, expert_ids: torch.Tensor, inputs: RouterInputs) -> torch.Tensor:
    """Return the combine weights of chosen experts by the host model's convention.

    Parameters
    ----------
    scores : Tensor [T, E]
        On the host's scale.
    expert_ids : Tensor [T, K], int64
        -1 marks an empty slot.

    Returns
    -------
    Tensor [T, K], float32
        The chosen scores, divided by their sum where the model does so, times its factor; 0 in
        empty slots.
    """
    empty = expert_ids < 0
    weights = scores.gather(-1, expert_ids.clamp_min(0)).masked_fill(empty, 0.0)
    if inputs.renormalize or inputs.score_function == "softmax_topk":
        total = weights.sum(dim=-1, keepdim=True) if weights.shape[-1] > 1 else weights
        weights = weights / total.clamp_min(_TINY)
    return weights if inputs.scaling == 1 else weights * inputs.scaling


def target_scores(inputs: RouterInputs, target: Decision | None) -> torch.Tensor:
    """Return the expert scores that a router learns to imitate, [T, E] on the host's scale.

    Raises
    ------
    RouterError
        If the target is about parts, or there is none and no logits were recorded.
    """
    if target is None:
        return host_scores(inputs.tensor("logits"), inputs)
    if isinstance(target, PartMask):
        raise RouterError(
            f"Expected a target that routes to experts, got one about {target.part}s. "
            "Pass a Routing, or None to learn from the model's own scores."
        )
    return target.scores.float()


def target_logits(inputs: RouterInputs, target: Decision | None) -> torch.Tensor:
    """Return logits whose scores a router learns to imitate, [T, E].

    Those of a softmax are centred over the experts: only their differences are known.
    """
    sigmoid = inputs.score_function in _SIGMOID
    if target is None:
        logits = host_logits(inputs)
    else:
        scores = target_scores(inputs, target)
        logits = scores.logit(eps=1e-6) if sigmoid else scores.clamp_min(1e-12).log()
    return logits if sigmoid else logits - logits.mean(dim=-1, keepdim=True)


def target_importance(target: Decision | None, part: str) -> torch.Tensor:
    """Return the measured importance of parts that a rule learns to tell, [T, P], 0..1.

    Raises
    ------
    RouterError
        If there is none for this kind of part.
    """
    if not isinstance(target, PartMask) or target.part != part:
        came = f"one about {target.part}s" if isinstance(target, PartMask) else "none"
        raise RouterError(
            f"Expected a PartMask with the importance of each {part} as the target of fit, "
            f"got {came}. Measure it live, for example as the norm of each {part}'s output."
        )
    return target.gate.float()


def slots(
    scores: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    state: torch.Tensor | None = None,
) -> Routing:
    """Return a routing with its slots in order: heaviest first, ties by id, empty slots last.

    Parameters
    ----------
    scores : Tensor [T, E]
    expert_ids : Tensor [T, K], int64
        -1 anywhere.
    weights : Tensor [T, K]
    state : Tensor [T, P], optional
    """
    empty = expert_ids < 0
    if expert_ids.shape[-1] > 1 and not _in_order(expert_ids, weights.masked_fill(empty, -1.0)):
        by_id = expert_ids.where(~empty, scores.shape[-1]).argsort(dim=-1)
        expert_ids, weights = expert_ids.gather(-1, by_id), weights.gather(-1, by_id)
        heaviness = weights.masked_fill(expert_ids < 0, -1.0)
        order = heaviness.argsort(dim=-1, descending=True, stable=True)
        expert_ids, weights = expert_ids.gather(-1, order), weights.gather(-1, order)
        empty = expert_ids < 0
    if bool(empty.any()):
        used = max(1, int((~empty).sum(dim=-1).max()))
        expert_ids, weights = expert_ids[:, :used].contiguous(), weights[:, :used]
        weights = weights.masked_fill(empty[:, :used], 0.0)
    return Routing(scores.float(), expert_ids, weights.float(), state)


def _in_order(expert_ids: torch.Tensor, heaviness: torch.Tensor) -> bool:
    """Whether slots [T, K] go from heavy to light and equal ones by id; looking beats sorting."""
    first, then = heaviness[:, :-1], heaviness[:, 1:]
    by_id = expert_ids[:, :-1] <= expert_ids[:, 1:]
    return bool(((first > then) | ((first == then) & by_id)).all())


def masked_ids(mask: torch.Tensor) -> torch.Tensor:
    """Return the experts where a mask [T, E] holds, [T, K] int64, -1 where there are fewer."""
    widest = max(1, int(mask.sum(dim=-1).max()) if len(mask) else 1)
    numbers = torch.arange(mask.shape[-1], device=mask.device)
    last = mask.shape[-1]
    ids = numbers.where(mask, last).topk(widest, dim=-1, largest=False, sorted=True).values
    return ids.where(ids < last, -1)
