"""Published rules that keep the model's own gate: noise, one expert, biases, groups."""

from dataclasses import replace
from math import log

import torch

from explorer.errors import RouterError
from explorer.routers.base import ROUTERS, Decision, RouterInfo, RouterInputs, Routing
from explorer.routers.native import (
    GateRouter,
    choice_scores,
    host_best,
    host_choice,
    keep_best_groups,
)
from explorer.routers.scores import host_logits, host_scores, slots, weigh
from explorer.routers.selectors import TopK
from explorer.routers.sequences import normal, token_keys


@ROUTERS.add("noisy_top_k")
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

    info = RouterInfo(
        name="noisy_top_k",
        family="literature",
        title="Noisy top-k",
        summary="The model's own gate with normal noise on its logits. Shows how much it bears.",
        formula="S = TopK(W h + noise * N(0, 1), k)",
        paper="1701.06538, eq. 4",
        differs=(
            "The size of the noise is given, where the source learns it for each token and expert."
        ),
        needs=frozenset({"logits", "token_ids", "starts"}),
        identity={"noise": 0.0},
    )

    def __init__(self, *, noise: float = log(2), k: int | None = None, seed: int = 0) -> None:
        self.noise = noise
        self.k = k
        self.seed = seed

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


@ROUTERS.add("switch")
class SwitchRouter(GateRouter):
    """Send every token to its single best expert, weighted with that expert's raw score.

    Parameters
    ----------
    renormalize : bool
        Whether the one weight becomes 1, as a model that renormalises would have it; the source
        keeps the probability.
    """

    info = RouterInfo(
        name="switch",
        family="literature",
        title="Switch (top-1)",
        summary="One expert per token, weighted with its probability. Half the experts of top-2.",
        formula="e = argmax p;  w = p_e",
        paper="2101.03961, eq. 1-2",
        differs="No capacity: nothing is dropped.",
        needs=frozenset({"logits"}),
        weighing="at_most",
        identity="One expert for every token; only a model of one expert is repeated by it.",
    )

    def __init__(self, *, renormalize: bool = False) -> None:
        self.renormalize = renormalize
        if renormalize:
            self.info = replace(self.info, formula="e = argmax p;  w = 1", weighing="own")

    def _route(self, inputs: RouterInputs) -> Routing:
        scores, ids = host_best(inputs, 1)
        weights = torch.ones_like(scores[:, :1]) if self.renormalize else scores.gather(-1, ids)
        return slots(scores, ids, weights * inputs.scaling)


@ROUTERS.add("loss_free_bias")
class LossFreeBiasRouter(GateRouter):
    """Choose by sigmoid scores plus a bias per expert that was fitted to even out the load.

    Parameters
    ----------
    update_rate : float
        What a step adds to the bias of an underloaded expert; the source's 0.001.
    steps : int
        Updates; the second half shrinks the rate to 0, so that the biases settle.
    batch_tokens : int
        Tokens drawn for each update.
    k : int, optional
        Experts per token; None = as many as the model takes.
    seed : int

    Notes
    -----
    Differs from the source: fitted after training on recorded logits; the model does not adapt.
    The weights stay those of the model's own score function; the bias never enters them. A model
    that has such a bias keeps it, with its own scores: the fitted one is added to what it sorts
    its experts by.
    """

    info = RouterInfo(
        name="loss_free_bias",
        family="literature",
        title="Sigmoid with loss-free bias",
        summary=(
            "A bias per expert, fitted so that all get equal load, shifts the choice but not the "
            "weights. Shows the price of balance."
        ),
        formula="S = TopK(sigmoid(W h) + b, k);  b_e += u sign(mean(c) - c_e)",
        paper="2408.15664, algorithm 1; 2412.19437, eq. 16",
        differs=(
            "The bias is fitted after training, on recorded scores; its steps shrink at the end, "
            "and weights follow the model's own convention."
        ),
        needs=frozenset({"logits"}),
        fits="statistics",
        identity={"steps": 0},
    )

    def __init__(
        self,
        *,
        update_rate: float = 1e-3,
        steps: int = 1000,
        batch_tokens: int = 2048,
        k: int | None = None,
        seed: int = 0,
    ) -> None:
        self.update_rate = update_rate
        self.steps = steps
        self.batch_tokens = batch_tokens
        self.k = k
        self.seed = seed

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        scores = self._choice(inputs)
        generator = torch.Generator().manual_seed(self.seed)
        bias = torch.zeros(scores.shape[-1])
        k = inputs.top_k if self.k is None else self.k
        for step in range(self.steps):
            rate = self.update_rate * min(1.0, 2 * (1 - step / self.steps))
            rows = torch.randint(len(scores), (self.batch_tokens,), generator=generator)
            ids = (scores[rows] + bias).topk(k, dim=-1).indices
            load = ids.flatten().bincount(minlength=len(bias)).float()
            bias += rate * (load.mean() - load).sign()
        self.bias_ = bias

    def _route(self, inputs: RouterInputs) -> Routing:
        scores = host_scores(inputs.tensor("logits"), inputs)
        order = self._choice(inputs) + self.bias_.to(scores.device)
        ids = TopK(inputs.top_k if self.k is None else self.k).ids(scores, order)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def _choice(self, inputs: RouterInputs) -> torch.Tensor:
        """Return what the bias is added to, [T, E]: the source's sigmoids, or the model's own."""
        if inputs.selection_bias is not None:
            return host_choice(inputs)[1]
        # in float64, where no two large logits have the same sigmoid
        return choice_scores(host_logits(inputs).double().sigmoid(), inputs)


@ROUTERS.add("group_limited_v2")
class GroupLimitedRouter(GateRouter):
    """Choose within the best groups of experts only, as a group is one device.

    Parameters
    ----------
    n_groups : int, optional
        Equal groups of consecutive experts; None = the model's own, or else four where that
        divides the experts, or two, or one.
    top_groups : int
        How many groups a token may use.
    k : int, optional
        Experts per token; None = as many as the model takes.

    Notes
    -----
    A model that has groups of its own keeps them, and this rule narrows what they leave. A token
    has fewer experts where that is less than ``k``.

    A group counts by its best expert, so with ``top_groups >= k`` the rule changes nothing: the
    groups of the ``k`` best experts are always among the best ``k`` groups. The default of one
    group is therefore the mildest rule with an effect on a top-2 model.
    """

    info = RouterInfo(
        name="group_limited_v2",
        family="literature",
        title="Group-limited (DeepSeek-V2)",
        summary=(
            "A token's experts must lie in its best groups, a group counting by its best expert. "
            "It bounds the devices that a token is sent to."
        ),
        formula="G = TopM(max_{e in g} p_e);  S = TopK(p_e : e in G)",
        paper="2405.04434, section 2.2.2",
        differs="",
        needs=frozenset({"logits"}),
        identity={"n_groups": 1},
    )
    counted = 1

    def __init__(
        self, *, n_groups: int | None = None, top_groups: int = 1, k: int | None = None
    ) -> None:
        self.n_groups = n_groups
        self.top_groups = top_groups
        self.k = k

    def _route(self, inputs: RouterInputs) -> Routing:
        k = inputs.top_k if self.k is None else self.k
        n_groups = self.n_groups or inputs.n_groups or self._groups(inputs.n_experts, k)
        if inputs.n_experts // n_groups * self.top_groups < k:
            raise RouterError(
                f"Expected groups with room for {k} experts a token, got {self.top_groups} of "
                f"{n_groups} groups of {inputs.n_experts} experts. Raise top_groups."
            )
        scores, choice = host_choice(inputs)
        allowed = keep_best_groups(choice, n_groups, self.top_groups, self.counted)
        ids = TopK(k).ids(scores, allowed)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def _groups(self, n_experts: int, k: int) -> int:
        """Return a number of groups that divides the experts and leaves room for k."""
        for n_groups in (4, 2):
            if n_experts % n_groups == 0 and n_experts // n_groups * self.top_groups >= k:
                return n_groups
        return 1


@ROUTERS.add("group_limited_v3")
class SummedGroupRouter(GroupLimitedRouter):
    """Choose within the best groups, a group counting by the sum of its two best experts."""

    info = replace(
        GroupLimitedRouter.info,
        name="group_limited_v3",
        title="Group-limited (DeepSeek-V3)",
        summary=(
            "A token's experts must lie in its best groups, a group counting by the sum of its "
            "two best experts. It bounds the devices that a token is sent to."
        ),
        formula="G = TopM(sum of the two best s_e + b_e in g);  S = TopK(s_e + b_e : e in G)",
        paper="2412.19437, section 2.1.2",
        differs="",
    )
    counted = 2
