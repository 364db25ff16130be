"""The model's own decision, and the rules that stay closest to it: other k, noise, one expert."""

from dataclasses import replace
from math import log

import torch

from capture.swap.rules import RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.contract import RoutingRouter, registered
from explorer.routers.scores import host_scores, slots, weigh
from explorer.routers.selectors import SELECTOR_DECIDES, Selector, TopK
from explorer.routers.sequences import normal, token_keys


class GateRouter(RoutingRouter):
    """A rule that starts from the logits of the model's own gate."""

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the model's own linear gate; the rest is negligible."""
        return 2.0 * d * n_experts


@registered("native")
class NativeRouter(GateRouter):
    """Return the model's own decision, as it was recorded."""

    def _route(self, inputs: RouterInputs) -> Routing:
        recorded = inputs.decision()
        return slots(recorded.scores, recorded.expert_ids.long(), recorded.weights.float())


def choice_scores(scores: torch.Tensor, inputs: RouterInputs) -> torch.Tensor:
    """Return what the host model sorts its experts by, [T, E].

    Its scores plus its selection bias, ``-inf`` outside its best groups of experts. Where the model
    adds the bias to logits (Kolibri), scores are turned back into those.
    """
    if inputs.score_function == "sigmoid_topk" and inputs.selection_bias is not None:
        scores = scores.logit(eps=1e-7)
    return _with_bias_and_groups(scores, inputs)


def _with_bias_and_groups(ranked: torch.Tensor, inputs: RouterInputs) -> torch.Tensor:
    biased = ranked
    if inputs.selection_bias is not None:
        biased = ranked + inputs.selection_bias.to(ranked.device, torch.float32)
    if inputs.n_groups is None or inputs.top_groups is None or inputs.n_groups == 1:
        return biased
    two_best = inputs.selection_bias is not None
    return keep_best_groups(biased, inputs.n_groups, inputs.top_groups, 2 if two_best else 1)


def host_choice(inputs: RouterInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the model's own scores, and what it sorts its experts by, both [T, E] float32.

    Scores weigh experts, see :func:`explorer.routers.scores.weigh`. What they are sorted by may be
    something else: the model's selection bias and groups are in it, see :func:`choice_scores`.
    """
    logits = inputs.tensor("logits")
    scores = host_scores(logits, inputs)
    # where logits are sorted before they become scores, these may have run into 0 or 1 together
    sorts_logits = inputs.score_function == "sigmoid_topk" or (
        inputs.score_function == "softmax_topk" and inputs.selection_bias is None
    )
    return scores, _with_bias_and_groups(logits.float() if sorts_logits else scores, inputs)


def host_best(inputs: RouterInputs, k: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the model's own scores [T, E], and its best experts by its own rule [T, k] int64.

    Start from here to change what the model does. With its own k the experts are those that it
    chose, on models with a selection bias or groups of experts too, which scores alone do not say.

    Parameters
    ----------
    inputs : RouterInputs
        With ``logits``.
    k : int, optional
        Experts per token, best first; None = as many as the model takes. -1 where the model's
        groups hold fewer.
    """
    scores, choice = host_choice(inputs)
    return scores, TopK(inputs.top_k if k is None else k).ids(scores, choice)


def keep_best_groups(
    scores: torch.Tensor, n_groups: int, top_groups: int, counted: int
) -> torch.Tensor:
    """Return scores with ``-inf`` outside the best groups of consecutive experts, [T, E].

    Parameters
    ----------
    scores : Tensor [T, E]
    n_groups, top_groups : int
        How many equal groups there are, and how many a token may use; ties go to the lower one.
    counted : int
        A group counts by the sum of so many of its best experts: 1 is DeepSeek-V2's rule, 2 is
        DeepSeek-V3's.

    Notes
    -----
    Outside means ``-inf`` as in DeepSeek's own code; the port in transformers writes 0.0, which
    lets such experts win when a bias makes scores negative.
    """
    n_experts = scores.shape[-1]
    if n_experts % n_groups or not 1 <= top_groups <= n_groups:
        raise RouterError(
            f"Expected groups that divide {n_experts} experts evenly and 1 <= top_groups <= "
            f"n_groups, got n_groups={n_groups}, top_groups={top_groups}."
        )
    grouped = scores.view(len(scores), n_groups, n_experts // n_groups)
    best = grouped.topk(min(counted, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    allowed = TopK(top_groups).mask(best)
    return grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)


def choose(
    scores: torch.Tensor,
    inputs: RouterInputs,
    *,
    k: int | None = None,
    selector: Selector | None = None,
) -> torch.Tensor:
    """Choose experts the host model's way, or by a selector, from scores on the host's scale.

    For scores that a new router made; from the model's own, start with :func:`host_best`.

    Parameters
    ----------
    scores : Tensor [T, E]
    k : int, optional
        Experts per token; None = as many as the model takes.
    selector : Selector, optional
        Another way to choose. Which expert is better, and which are out of the question, is said
        by the model's selection bias and groups too.

    Returns
    -------
    Tensor [T, K], int64
        -1 where the best groups hold fewer experts than are asked for.
    """
    wanted = selector or TopK(inputs.top_k if k is None else k)
    return wanted.ids(scores, choice_scores(scores, inputs))


@registered("top_k")
class TopKRouter(GateRouter):
    """Take the best experts by the model's own logits, any number of them.

    Parameters
    ----------
    k : int, optional
        Experts per token; None = as many as the model takes.
    selector : Selector, optional
        Another way to choose, on the model's scores; replaces ``k``.
    """

    k: int | None = None
    selector: Selector | None = None

    def __post_init__(self) -> None:
        """Check what was given."""
        if self.k is not None and self.selector is not None:
            raise RouterError("Expected k or selector, got both. TopK(k) is the selector of k.")
        if self.selector is not None:
            self.info = replace(
                self.info, variable_k=self.selector.variable, identity=SELECTOR_DECIDES
            )

    def _route(self, inputs: RouterInputs) -> Routing:
        scores, choice = host_choice(inputs)
        selector = self.selector or TopK(inputs.top_k if self.k is None else self.k)
        ids = selector.ids(scores, choice)
        return slots(scores, ids, weigh(scores, ids, inputs))


@registered("noisy_top_k")
class NoisyTopKRouter(GateRouter):
    """Add normal noise to the logits and take the best.

    Parameters
    ----------
    noise : float
        Standard deviation. The default is what the source starts training with,
        ``softplus(0) = ln 2``.
    k : int, optional
        Experts per token; None = as many as the model takes.
    seed : int

    Notes
    -----
    Differs from the source: there a second linear map, trained with the model, sets the noise of
    each expert and token. A model that was not trained so has none, and here one number serves
    as a probe of how much noise its routing bears.
    """

    noise: float = log(2)
    k: int | None = None
    seed: int = 0

    def _route(self, inputs: RouterInputs) -> Routing:
        logits = inputs.tensor("logits").float()
        noise = normal(token_keys(inputs, self.seed), inputs.n_experts) * self.noise
        if inputs.score_function == "probabilities":
            # noise on their logarithms, with the sum that they had
            noisy = logits * noise.exp()
            noisy = noisy * (logits.sum(-1, keepdim=True) / noisy.sum(-1, keepdim=True))
        else:
            noisy = logits + noise
        scores, ids = host_best(replace(inputs, logits=noisy), self.k)
        return slots(scores, ids, weigh(scores, ids, inputs))


@registered("switch")
class SwitchRouter(GateRouter):
    """Send every token to its single best expert, weighted with that expert's raw score.

    Parameters
    ----------
    renormalize : bool
        Whether the one weight becomes 1, as a model that renormalises would have it; the source
        keeps the probability.
    """

    renormalize: bool = False

    def __post_init__(self) -> None:
        """Fit the card to what was given."""
        if self.renormalize:
            self.info = replace(self.info, formula="e = argmax p;  w = 1", weighing="own")

    def _route(self, inputs: RouterInputs) -> Routing:
        scores, ids = host_best(inputs, 1)
        weights = torch.ones_like(scores[:, :1]) if self.renormalize else scores.gather(-1, ids)
        return slots(scores, ids, weights * inputs.scaling)
