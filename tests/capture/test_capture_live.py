"""Paired losses, latency in turns, and what a rule's choices depend on."""

import math

import numpy as np
import pytest
import tiny_models
import torch
from test_capture_swap import Counting, Emptied, Nothing, Top

from capture.errors import SwapError
from capture.model.selftest import attach
from capture.swap.dependence import Dependence, dependence
from capture.swap.losses import SequenceLosses, loss_change
from capture.swap.measure import Kept, latency, sequence_losses
from capture.swap.playback import recorded
from capture.swap.routers import swap
from capture.swap.rules import Choice, NativeRule

LENGTHS = (9, 4, 7, 2, 9)


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 64, (n,), generator=generator).numpy() for n in LENGTHS]


def alone(model, ids):
    """The definition: one sequence, all logits, cross entropy in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0].double()
    targets = torch.tensor(ids)[1:]
    return float(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))


@pytest.mark.parametrize("batch_tokens", [1, 20, 1000])
def test_losses_are_each_sequences_own(batch_tokens):
    model = tiny_models.build("olmoe")
    sites = attach(model)
    losses = sequence_losses(model, sequences(), batch_tokens=batch_tokens)
    assert losses.tokens.tolist() == [n - 1 for n in LENGTHS]
    np.testing.assert_allclose(losses.sums, [alone(model, s) for s in sequences()], atol=1e-4)
    with swap(model, sites, Emptied()):
        expected = [alone(model, s) for s in sequences()]
    swapped = sequence_losses(
        model,
        sequences(),
        swapped=lambda: swap(model, sites, Emptied()),
        batch_tokens=batch_tokens,
    )
    np.testing.assert_allclose(swapped.sums, expected, atol=1e-4)
    assert abs(swapped.mean - losses.mean) > 1e-3


def test_only_the_sequences_are_counted():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    kept = Kept(lambda: swap(model, sites, Top(2)))
    sequence_losses(model, sequences(), swapped=kept)
    (swapped,) = kept.values
    assert {c.tokens for c in swapped.counts.values()} == {sum(LENGTHS)}
    assert swapped.experts_per_token == 2


def test_own_and_replayed_routing_of_two_precisions():
    """The 2x2: routing recorded in one precision, forced in the other, with the loss of each."""
    models = {d: tiny_models.build("olmoe", dtype=d) for d in (torch.float32, torch.bfloat16)}
    losses, tapes = {}, {}
    for dtype, model in models.items():
        kept = Kept(lambda model=model: recorded(attach(model)))
        losses[dtype, dtype] = sequence_losses(model, sequences(), swapped=kept)
        tapes[dtype] = kept.values[-1]
    for dtype, model in models.items():
        for other, tape in tapes.items():
            forced = sequence_losses(
                model,
                sequences(),
                swapped=lambda model=model, tape=tape: swap(model, attach(model), tape),
            )
            if other == dtype:
                assert np.array_equal(forced.sums, losses[dtype, dtype].sums)
            losses[dtype, other] = forced
    low = torch.bfloat16
    change = loss_change(losses[torch.float32, torch.float32], losses[low, low])
    assert 0 < abs(change.change) < 0.1
    assert not np.array_equal(losses[low, torch.float32].sums, losses[low, low].sums)


def test_the_change_and_its_error_on_paper():
    """Differences 0.1 and 0.3 at equal length: mean 0.2, standard deviation 0.1414, SE 0.1."""
    native = SequenceLosses(np.array([10.0, 20.0]), np.array([10, 10]))
    swapped = SequenceLosses(np.array([11.0, 23.0]), np.array([10, 10]))
    change = loss_change(native, swapped)
    assert change.change == pytest.approx(0.2)
    assert change.standard_error == pytest.approx(0.1)
    assert change.perplexity_ratio == pytest.approx(math.exp(0.2))
    assert change.differences == pytest.approx([0.1, 0.3])


def test_longer_sequences_count_by_their_tokens():
    """The same cost a token everywhere is known without error, whatever the lengths."""
    tokens = np.array([3, 11, 40])
    native = SequenceLosses(np.array([5.0, 30.0, 90.0]), tokens)
    swapped = SequenceLosses(native.sums + 0.25 * tokens, tokens)
    change = loss_change(native, swapped)
    assert change.change == pytest.approx(0.25)
    assert change.standard_error == pytest.approx(0, abs=1e-12)
    uneven = native._replace(sums=native.sums + np.array([3.0, 0.0, 0.0]))
    assert loss_change(native, uneven).change == pytest.approx(3 / 54)


def test_the_standard_error_is_the_spread_between_samples():
    """Against the truth: draw many samples of sequences and look at how the change varies."""
    generator = np.random.default_rng(0)
    n, changes, errors = 40, [], []
    for _ in range(2000):
        tokens = generator.integers(5, 60, n)
        cost = 0.1 + 0.3 * generator.standard_normal(n) / np.sqrt(tokens) + tokens / 500
        native = SequenceLosses(np.zeros(n), tokens)
        change = loss_change(native, SequenceLosses(cost * tokens, tokens))
        changes.append(change.change)
        errors.append(change.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(changes), rel=0.08)


def test_one_sequence_has_no_error_and_other_sequences_no_pair():
    one = SequenceLosses(np.array([3.0]), np.array([4]))
    assert math.isnan(loss_change(one, one).standard_error)
    with pytest.raises(SwapError, match="same sequences"):
        loss_change(one, SequenceLosses(np.array([3.0]), np.array([5])))
    with pytest.raises(SwapError, match="at least two tokens"):
        sequence_losses(tiny_models.build("olmoe"), [np.array([3])])


def test_latency_is_taken_in_turns():
    """With a clock of our own: native passes take 2 and 4, swapped ones 3 and 6 in turns."""
    model = tiny_models.build("olmoe")
    sites = attach(model)
    times, now, passes = [2.0, 3.0, 4.0, 6.0], [0.0], [0]

    def clock():
        running = passes[0] % 2
        if running:
            now[0] += times[(passes[0] // 2) % 4] / 1e3
        passes[0] += 1
        return now[0]

    entered = []

    def swapped():
        entered.append(1)
        return swap(model, sites, NativeRule(), checked=False)

    ids = tiny_models.tokens()
    result = latency(model, ids, swapped, repeats=20, warm_up=2, clock=clock)
    assert result.ratio == pytest.approx(1.5)
    assert (result.low, result.high) == pytest.approx((1.5, 1.5))
    assert (result.native_ms, result.swapped_ms) == pytest.approx((3.0, 4.5))
    assert (len(entered), result.repeats) == (22, 20)
    with pytest.raises(SwapError, match="At least 20"):
        latency(model, ids, swapped, repeats=5)


class Ranked:
    """Expert choice: each expert takes the tokens that want it most, wherever they stand."""

    def route(self, inputs):
        scores = inputs.logits.softmax(-1)
        taken = scores.topk(max(1, len(scores) // 4), dim=0).indices
        chosen = torch.zeros_like(scores).scatter(0, taken, 1.0).bool()
        ids = torch.arange(scores.shape[1]).expand_as(scores).masked_fill(~chosen, -1)
        return Choice(ids, scores.masked_fill(~chosen, 0.0))


class MeanOfSequence:
    """Routes every token by its sequence's mean: looks ahead, but not at other sequences."""

    def route(self, inputs):
        n = int(inputs.sequences.max()) + 1
        member = torch.nn.functional.one_hot(inputs.sequences, n).float()
        mean = (member.T @ inputs.logits) / member.sum(0)[:, None]
        weights, ids = mean[inputs.sequences].softmax(-1).topk(2)
        return Choice(ids, weights)


class OwnLength(Top):
    """One expert in texts of odd length: other tokens change nothing, fewer do."""

    def route(self, inputs):
        ids, weights = super().route(inputs)
        odd = inputs.sequences.bincount()[inputs.sequences] % 2 == 1
        few = odd[:, None] & (torch.arange(self.top_k) > 0)
        return Choice(ids.masked_fill(few, -1), weights.masked_fill(few, 0.0))


class FirstOfBatch:
    """Routes every token by the first token of the batch's last row: no token after it matters."""

    def route(self, inputs):
        first = inputs.starts.nonzero().flatten()[-1]
        weights, ids = inputs.logits[first].softmax(-1).topk(2)
        return Choice(ids.expand(len(inputs.hidden), 2), weights.expand(len(inputs.hidden), 2))


class Noisy:
    def route(self, inputs):
        noise = torch.rand(inputs.logits.shape)
        weights, ids = (inputs.logits + 3 * noise).softmax(-1).topk(2)
        return Choice(ids, weights)


class AfterAnother(Top):
    """One expert for texts that come after another one, so that the first text tells nothing."""

    def route(self, inputs):
        ids, weights = super().route(inputs)
        few = (inputs.sequences > 0)[:, None] & (torch.arange(self.top_k) > 0)
        return Choice(ids.masked_fill(few, -1), weights.masked_fill(few, 0.0))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (AfterAnother(2), Dependence(False, True, True)),
        (NativeRule(), Dependence(False, False, True)),
        (Emptied(), Dependence(False, False, True)),
        (Nothing(), Dependence(False, False, True)),
        (Counting(), Dependence(False, False, True)),
        (Ranked(), Dependence(True, True, True)),
        (MeanOfSequence(), Dependence(True, False, True)),
        (OwnLength(2), Dependence(True, False, True)),
        (FirstOfBatch(), Dependence(False, True, True)),
        (Noisy(), Dependence(True, True, False)),
    ],
)
def test_what_a_rule_depends_on_is_found_on_the_model(rule, expected):
    model = tiny_models.build("olmoe")
    assert dependence(model, attach(model), rule) == expected
