"""What two sides of one text differ by: seeded faults in a small stack of routers."""

import numpy as np
import pytest

from explorer.metrics.parting import VERDICTS, parting

pytestmark = pytest.mark.slow

CASES, RIGHT = 40, 38  # 95%
WIDTH = 24


def make_stack(random, layers, experts):
    """Draw routers [L, D, E] and what experts add to a token [L, E, D]."""
    return random.normal(size=(layers, WIDTH, experts)), random.normal(
        size=(layers, experts, WIDTH)
    ) / 2


def route(stack, hidden, top_k, noise=0.0, random=None):
    """Route tokens; experts change what later layers see. Noise is relative, as of a precision."""
    ids, margins = [], []
    for router, experts in zip(*stack, strict=True):
        scores = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True) @ router
        if noise:
            scores = scores * (1 + noise * random.normal(size=scores.shape))
        order = np.argsort(-scores, -1)
        best = np.take_along_axis(scores, order, -1)
        margins.append(best[:, top_k - 1] - best[:, top_k])
        weights = np.exp(best[:, :top_k])
        weights /= weights.sum(-1, keepdims=True)
        hidden = hidden + (experts[order[:, :top_k]] * weights[..., None]).sum(1)
        if noise:
            hidden = hidden * (1 + noise * random.normal(size=hidden.shape))
        ids.append(order[:, :top_k])
    return np.stack(ids, 1), np.stack(margins, 1)


def changed_layer(random, stack, layer):
    """Return the stack with another router in one layer: noisy, its experts mixed up, or pruned."""
    routers, old = stack[0].copy(), stack[0][layer]
    kinds = (
        lambda: old + random.normal(size=old.shape) * random.uniform(0.3, 1.0),
        lambda: old[:, random.permutation(old.shape[1])],
        lambda: old * (random.random(old.shape) > 0.3),
    )
    routers[layer] = kinds[random.integers(3)]()
    return routers, stack[1]


def shifted(random, ids, texts, shift):
    """Move rows within each text, from its start or from somewhere on."""
    moved = ids.copy()
    for text in np.unique(texts):
        at = np.flatnonzero(texts == text)
        for token in at[random.integers(0, len(at) // 2) * random.integers(2) :]:
            inside = at[0] <= token + shift <= at[-1]
            moved[token] = ids[token + shift] if inside else -1
    return moved


def padded(random, ids, texts, experts):
    """Put fillers at one end of each text: counted up, one row, or the same experts everywhere."""
    filled, head, kind = ids.copy(), random.integers(2), random.integers(3)
    for text in np.unique(texts):
        at = np.flatnonzero(texts == text)
        many = int(random.integers(2, len(at) // 2))
        rows = at[:many] if head else at[-many:]
        counted = np.arange(many * ids[0].size).reshape(many, *ids.shape[1:]) % experts
        filled[rows] = (counted, np.arange(ids.shape[2]), ids[rows[0]])[kind]
    return filled


def make_case(seed, fault):
    """Return both sides, their texts, experts, margins, and the layer or shift that is right."""
    random = np.random.default_rng([seed, list(VERDICTS).index(fault)])
    texts = np.repeat(np.arange(5), random.integers(16, 40, 5))
    layers, experts = int(random.integers(4, 13)), int(random.choice([8, 16, 32, 64]))
    top_k = int(random.choice([1, 2, 4, 8] if experts > 8 else [1, 2, 4]))
    stack = make_stack(random, layers, experts)
    hidden = random.normal(size=(len(texts), WIDTH))
    first, margins = route(stack, hidden, top_k)
    noises = [2**-5, 2**-7, 2**-9] if fault == "near-ties" else [0, 2**-9]
    other, right = stack, None
    if fault == "one layer":
        right = int(random.integers(layers))
        other = changed_layer(random, stack, right)
    elif fault == "no pattern":
        other = make_stack(random, layers, experts)
    noise = 0.0 if fault == "same" else float(random.choice(noises))
    second = route(other, hidden, top_k, noise, random)[0]
    if fault == "shifted rows":
        right = int(random.choice([-3, -2, -1, 1, 2, 3]))
        second = shifted(random, second, texts, right)
    elif fault == "padding":
        second = padded(random, second, texts, experts)
    elif fault == "one layer" and random.random() < 0.3:  # replayed: later layers are not touched
        second[:, np.arange(layers) != right] = first[:, np.arange(layers) != right]
    elif fault == "near-ties" and (np.sort(first) == np.sort(second)).all():
        return make_case(seed + 1_000, fault)  # nothing was near enough
    return first, second[..., ::-1], texts, experts, margins, right


@pytest.mark.parametrize("with_margins", [True, False])
@pytest.mark.parametrize("fault", VERDICTS)
def test_seeded_faults_are_named(fault, with_margins):
    named = 0
    for seed in range(CASES):
        first, second, texts, experts, margins, right = make_case(seed, fault)
        margins = margins if with_margins else None
        found = parting(first, second, texts, n_experts=experts, margins=margins)
        named += found.verdict == fault and right in (None, found.layer, found.shift)
    assert named >= RIGHT


def test_the_first_difference_and_its_margin():
    first = np.array([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[4, 1], [2, 0]]])
    second = first.copy()
    second[1, 1], second[2] = [5, 2], [[-1, -1], [0, 2]]
    margins = np.array([[0.9, 0.8], [0.7, 0.1], [0.6, 0.5]])
    found = parting(first, second, [0, 0, 1], n_experts=6, margins=margins)
    assert (found.first, found.margin, found.compared) == ((1, 1), 0.1, 5)
    assert found.mismatched == pytest.approx(1 / 5)
    assert found.by_layer.tolist() == pytest.approx([0, 1 / 3])
    assert (found.one_swapped, found.margin_rank) == (1, 0)
