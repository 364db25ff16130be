"""DeepSeek's rules: a bias that evens out the load, and groups of experts."""

import torch

from capture.swap.rules import Decision, RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.contract import registered
from explorer.routers.native import (
    GateRouter,
    choice_scores,
    host_choice,
    keep_best_groups,
)
from explorer.routers.scores import host_logits, host_scores, slots, weigh
from explorer.routers.selectors import TopK


@registered("loss_free_bias")
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

    update_rate: float = 0.001
    steps: int = 1000
    batch_tokens: int = 2048
    k: int | None = None
    seed: int = 0

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


@registered("group_limited_v2")
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

    counted = 1

    n_groups: int | None = None
    top_groups: int = 1
    k: int | None = None

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


@registered("group_limited_v3")
class SummedGroupRouter(GroupLimitedRouter):
    """Choose within the best groups, a group counting by the sum of its two best experts."""

    counted = 2
