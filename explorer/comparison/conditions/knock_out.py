"""Knock single experts out of a running model, text by text, and see what each text's loss becomes.

An expert matters to a text only where its tokens choose it, so that the other texts are not run:
their loss cannot change. Experts of one layer share a forward pass, one for each row of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from capture.model.forward import next_in_prompt, pad_batch, plan_batches
from capture.model.inputs import input_device, plain_forward
from capture.model.sites import text_config
from capture.store.records import Place
from capture.swap.losses import SequenceLosses
from capture.swap.measure import BATCH_TOKENS, summed, token_losses
from capture.swap.routers import site_key, swap
from capture.swap.rules import OWN_ROUTER, Choice, NativeRule, RouterInputs, Routing
from explorer.comparison.conditions.condition import Sequence_, Subject
from explorer.errors import ConditionError
from explorer.routers.live_rule import Convention, completed, joined
from explorer.routers.native import host_best
from explorer.routers.scores import slots, weigh

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Way = Literal["rerouted", "removed"]
WAYS: tuple[Way, ...] = get_args(Way)
LOGITS = 2**26  # numbers of logits whose gradient is held at a time


def routed_without(inputs: RouterInputs, gone: torch.Tensor) -> Routing:
    """Return the model's own rule among the experts that are left.

    Parameters
    ----------
    inputs : RouterInputs
        With logits.
    gone : Tensor [E] or [T, E], bool
        Experts that must not be chosen.
    """
    inputs = replace(inputs, logits=logits_without(inputs.tensor("logits"), gone, inputs))
    bias = inputs.selection_bias
    if bias is not None:
        inputs = replace(inputs, selection_bias=bias.to(gone.device).masked_fill(gone, -torch.inf))
    scores, ids = host_best(inputs)
    # an expert that is gone could still tie with others whose scores have run down to 0
    out = gone.expand(len(ids), -1).gather(-1, ids.clamp_min(0))
    ids = ids.where(~out, -1)
    return slots(scores, ids, weigh(scores, ids, inputs))


def logits_without(logits: torch.Tensor, gone: torch.Tensor, inputs: RouterInputs) -> torch.Tensor:
    """Return the model's logits [T, E], of which experts that are gone score 0."""
    if inputs.score_function != "probabilities":
        return logits.masked_fill(gone, -torch.inf)
    left = logits.masked_fill(gone, 0.0)
    # with the sum that they had; where nothing is gone, they are what they were
    return left * (
        logits.sum(dim=-1, keepdim=True) / left.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    )


class KnockOut:
    """A rule for one site that takes one expert out of each sequence of a batch.

    Tokens that did not choose the expert keep their routing to the last bit.

    Parameters
    ----------
    way : {"rerouted", "removed"}
        ``rerouted``: the token chooses again among the other experts, by the model's own rule, so
        that the expert's weight goes to them. ``removed``: its output is left out, and the weights
        of the token's other experts stay as they are.
    convention : Convention
        How the model weighs its experts.

    Attributes
    ----------
    experts : Tensor [B], int64
        Taken out of each row of the batch that runs next.
    """

    reads = OWN_ROUTER

    def __init__(self, way: Way, convention: Convention) -> None:
        self.way, self.convention = way, convention
        self.experts = torch.zeros(0, dtype=torch.int64)

    def route(self, inputs: RouterInputs, /) -> Choice:
        """Route the tokens of one forward pass."""
        own = inputs.native
        assert own is not None  # the rule reads it
        gone = self.experts.to(own.expert_ids.device)[inputs.tensor("sequences")]  # [T]
        hit = own.expert_ids == gone[:, None]
        ids, weights = own.expert_ids, own.weights
        if self.way == "removed":
            # the expert still runs: leaving a slot empty would cost more than that
            return Choice(ids, weights.masked_fill(hit, 0.0))
        rows = hit.any(dim=-1).nonzero().flatten()
        if not len(rows):
            return Choice(ids, weights)
        again = routed_without(
            completed(inputs, self.convention).take(rows),
            nn.functional.one_hot(gone[rows], inputs.n_experts).bool(),
        )
        missing = (0, ids.shape[-1] - again.expert_ids.shape[-1])
        return Choice(
            ids.index_copy(0, rows, nn.functional.pad(again.expert_ids, missing, value=-1)),
            weights.index_copy(0, rows, nn.functional.pad(again.weights, missing).to(weights)),
        )


class Whole(NamedTuple):
    """The unchanged model on ``N`` texts.

    Attributes
    ----------
    losses : SequenceLosses
    hits : dict of (layer, site) to array [N, E], int64
        Tokens of each text that chose the expert.
    conventions : dict of (layer, site) to Convention
        How the model weighs its experts, where its scores are known.
    """

    losses: SequenceLosses
    hits: dict[Place, Ints]
    conventions: dict[Place, Convention]


Told = Callable[[int], None]  # how many sequences of a pass are done; may raise to stop


def whole_model(subject: Subject, texts: Sequence[Sequence_], told: Told = lambda _: None) -> Whole:
    """Run texts through the unchanged model and count which experts each of them uses."""
    hits = {site_key(s): np.zeros((len(texts), s.info.n_experts), np.int64) for s in subject.sites}
    first: dict[Place, RouterInputs] = {}
    numbers = np.zeros(0, np.int64)

    def before(batch: Ints) -> None:
        nonlocal numbers
        numbers = batch
        told(len(batch))

    def keep(inputs: RouterInputs, choice: Choice) -> None:
        place = inputs.place
        first.setdefault(place, inputs)
        rows = numbers[inputs.tensor("sequences").cpu().numpy()]
        ids = choice.expert_ids.cpu().numpy()
        for slot in ids.T:
            used = slot >= 0
            np.add.at(hits[place], (rows[used], slot[used]), 1)

    losses = token_losses(
        subject.model,
        texts,
        swapped=lambda: swap(subject.model, subject.sites, NativeRule(), on_choice=keep),
        before_batch=before,
    )
    known = {place: joined([inputs]) for place, inputs in first.items()}
    conventions = {p: Convention(k.renormalize, k.scaling) for p, k in known.items()}
    return Whole(summed(losses), hits, conventions)


def knocked_out(
    subject: Subject,
    texts: Sequence[Sequence_],
    whole: Whole,
    place: Place,
    way: Way,
    told: Told = lambda _: None,
    *,
    experts: Sequence[int] | None = None,
) -> Floats:
    """Return by how much each text's loss changes without each expert of a site.

    Parameters
    ----------
    subject : Subject
    texts : sequence of array [S]
        Those of ``whole``.
    whole : Whole
    place : (layer, site)
    way : {"rerouted", "removed"}
    told : callable, optional
        Told before each forward pass how many pairs of text and expert it holds.
    experts : sequence of int, optional
        Only these are taken out, in turn; the change without any other one is left at 0.

    Returns
    -------
    array [N, E], nats
        Summed over the text's tokens; 0 where no token chose the expert.

    Raises
    ------
    ConditionError
        If the site's router cannot choose again without an expert.
    """
    _check(subject, place, way)
    pairs = np.argwhere(whole.hits[place] > 0)
    if experts is not None:
        pairs = pairs[np.isin(pairs[:, 1], np.asarray(experts))]
    change = np.zeros(whole.hits[place].shape)
    if not len(pairs):
        return change
    rule = KnockOut(way, whole.conventions[place])

    def before(batch: Ints) -> None:
        rule.experts = torch.from_numpy(pairs[batch, 1])
        told(len(batch))

    losses = token_losses(
        subject.model,
        [texts[n] for n in pairs[:, 0]],
        swapped=lambda: swap(
            subject.model, subject.sites, {place: rule}, only=[place], checked=False
        ),
        before_batch=before,
    )
    change[tuple(pairs.T)] = summed(losses).sums - whole.losses.sums[pairs[:, 0]]
    return change


def _check(subject: Subject, place: Place, way: Way) -> None:
    (site,) = [one for one in subject.sites if site_key(one) == place]
    if way == "removed":
        return
    if site.info.score_function == "other" or site.info.n_experts <= site.info.top_k:
        why = (
            f"takes all of its {site.info.n_experts} experts"
            if site.info.score_function != "other"
            else "has scores of a kind that is not known"
        )
        raise ConditionError(
            f"{site.info.module} {why}, so its tokens cannot choose again without one of them. "
            "Knock experts out by removing them only."
        )


@dataclass
class _Scaled:
    """The model's own routing with a factor of 1 on every weight, whose gradient is asked for."""

    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    reads = OWN_ROUTER

    def route(self, inputs: RouterInputs, /) -> Choice:
        own = inputs.native
        assert own is not None  # the rule reads it
        factor = torch.ones_like(own.weights, requires_grad=True)
        self.seen.append((factor, own.expert_ids, inputs.tensor("sequences")))
        return Choice(own.expert_ids, own.weights * factor)


class Screened(NamedTuple):
    """What one gradient says of removing each expert, without removing any.

    Attributes
    ----------
    first_order : dict of (layer, site) to array [N, E], nats
        Minus the sum of ``g = weight * d loss / d weight`` over the tokens that chose the expert:
        the change in a text's loss along a straight line. Where a model is trained, gains and
        losses of tokens cancel.
    fisher : dict of (layer, site) to array [N, E], nats
        Half the sum of ``g^2``: the change along a parabola whose curvature is estimated by
        squared gradients.
    """

    first_order: dict[Place, Floats]
    fisher: dict[Place, Floats]


def screened(subject: Subject, texts: Sequence[Sequence_], told: Told = lambda _: None) -> Screened:
    """Estimate what removing each expert does: one forward and one backward pass for all of them.

    References
    ----------
    Molchanov et al. 2017, arXiv:1611.06440, eq. 7 (first order, there without its sign); Theis et
    al. 2018, arXiv:1801.05787, eq. 7 (Fisher).
    """
    model: Any = subject.model
    vocabulary = int(getattr(text_config(model), "vocab_size", 1))
    budget = max(1, min(BATCH_TOKENS, LOGITS // vocabulary))
    pad = getattr(text_config(model), "pad_token_id", None) or 0
    found = Screened(
        *(
            {site_key(s): np.zeros((len(texts), s.info.n_experts)) for s in subject.sites}
            for _ in range(2)
        )
    )
    rules = {place: _Scaled([]) for place in found.fisher}
    device = input_device(model)
    with (
        plain_forward(model),
        torch.enable_grad(),
        swap(model, subject.sites, rules, checked=False),
    ):
        for numbers in plan_batches([len(one) for one in texts], budget):
            told(len(numbers))
            batch = pad_batch(numbers, texts, side="right", pad_id=int(pad))
            ids = torch.from_numpy(batch.input_ids).to(device)
            mask = torch.from_numpy(batch.mask).to(device) if batch.is_padded else None
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            rows = torch.from_numpy(batch.rows[next_in_prompt(batch)]).to(logits.device)
            targets = ids.flatten().to(logits.device)[rows + 1]
            scored = logits.flatten(0, -2)[rows].float()
            loss = nn.functional.cross_entropy(scored, targets, reduction="sum")
            seen = [rule.seen.pop() for rule in rules.values()]
            gradients = torch.autograd.grad(loss, [one[0] for one in seen])
            for place, (_, experts, sequences), gradient in zip(
                rules, seen, gradients, strict=True
            ):
                of = np.broadcast_to(numbers[sequences.cpu().numpy()][:, None], experts.shape)
                used = (experts >= 0).cpu().numpy()
                at = (of[used], experts.cpu().numpy()[used])
                values = gradient.double().cpu().numpy()[used]
                np.add.at(found.first_order[place], at, -values)
                np.add.at(found.fisher[place], at, values**2 / 2)
    return found


def worth(subject: Subject, texts: Sequence[Sequence_], by: str) -> dict[Place, Floats]:
    """Return what each expert is worth [E]: the rise in loss without it, nats a token.

    Parameters
    ----------
    by : {"rerouted", "removed", "fisher"}
        How an expert is taken out, or ``fisher`` for the estimate of :func:`screened`.
    """
    if by not in (*WAYS, "fisher"):
        raise ConditionError(f"by should be one of {', '.join(WAYS)} and fisher, got {by!r}.")
    tokens = np.array([len(one) - 1 for one in texts])
    if by == "fisher":
        changes = screened(subject, texts).fisher
    else:
        whole, way = whole_model(subject, texts), cast(Way, by)
        changes = {p: knocked_out(subject, texts, whole, p, way) for p in whole.hits}
    return {place: change.sum(axis=0) / tokens.sum() for place, change in changes.items()}
