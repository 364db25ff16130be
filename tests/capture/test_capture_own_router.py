"""A model's own router runs only as far as a rule in its place reads it."""

import pytest
import torch

from capture.model.flops import counted_flops
from capture.model.hooks import tap
from capture.model.selftest import attach
from capture.swap.routers import swap
from capture.swap.rules import Choice, NativeRule
from tests import tiny_models

# routers that return ids, logits only, and logits behind a bias and groups
FAMILIES = ["olmoe", "mixtral", "deepseek_v3", "gpt_oss", "dbrx", "qwen3_next"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Blind:
    """The first experts for every token: reads nothing of the model's router."""

    reads = frozenset()

    def route(self, inputs):
        assert inputs.logits is None
        assert inputs.native is None
        ids = torch.arange(inputs.top_k).expand(len(inputs.hidden), -1)
        return Choice(ids, torch.full(ids.shape, 0.5))


class ByLogits:
    """Choose by the model's logits, which is all that it reads."""

    reads = frozenset({"logits"})

    def route(self, inputs):
        weights, ids = inputs.logits.softmax(-1).topk(1)
        return Choice(ids, weights)


class Everything:
    """The same, by a rule that does not say what it reads."""

    def __init__(self, rule):
        self.rule = rule
        self.seen = 0

    def route(self, inputs):
        self.seen += inputs.native is not None
        return ByLogits().route(inputs)


def run(model):
    return model(input_ids=tiny_models.tokens(), use_cache=False).logits


def operations(model, sites, rule):
    """Return the operations of the first site's router in one pass, and its outputs."""
    name = next(n for n, m in model.named_modules() if m is sites[0].router)
    with swap(model, sites, rule), counted_flops(model) as counted:
        logits = run(model)
    return counted.of(name), logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_router_that_is_not_read_does_not_run(family):
    model = tiny_models.build(family)
    sites = attach(model)
    whole, _ = operations(model, sites, NativeRule())
    assert whole > 0
    assert operations(model, sites, Blind())[0] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_computed_once_and_are_the_models_own_to_the_last_bit(family):
    model = tiny_models.build(family)
    sites = attach(model)
    rule = Everything(None)
    whole, expected = operations(model, sites, rule)
    assert rule.seen == len(sites)
    counted, logits = operations(model, sites, ByLogits())
    assert counted == whole
    assert torch.equal(logits, expected)


def test_the_rest_of_the_router_is_left_out():
    """Softmax, sorting and weighing are replaced as well, not only the product."""
    model = tiny_models.build("olmoe")
    sites = attach(model)
    calls = []
    for site in sites:
        stock = site.router.forward
        site.router.forward = lambda *args, stock=stock: calls.append(1) or stock(*args)
    with swap(model, sites, ByLogits()):
        calls.clear()  # what is tried out when a swap opens
        run(model)
        assert not calls
    with swap(model, sites, NativeRule()):
        calls.clear()
        run(model)
        assert len(calls) == len(sites)


def test_who_listens_hears_the_model_and_not_what_stands_in():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    with tap(sites) as taps:
        run(model)
        own = taps.take()[0]
    with swap(model, sites, Blind(), only=[0]), tap(sites) as taps, pytest.raises(AssertionError):
        run(model)  # the rule is told more than it reads, as the router ran for the tap
    with tap(sites) as taps, swap(model, sites, ByLogits(), only=[0]):
        run(model)
        assert torch.equal(taps.take()[0].scores, own.scores)


def test_an_observer_is_told_everything():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    told = []
    with swap(model, sites, ByLogits(), on_choice=lambda inputs, _: told.append(inputs)):
        run(model)
    assert all(inputs.native is not None and inputs.logits is not None for inputs in told)


def test_what_stands_in_is_new_where_a_block_wrote_into_it():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    experts = sites[0].experts.forward
    expected = operations(model, sites, Blind())[1]
    block = sites[0].parent
    stock = type(block).forward

    def forward(hidden):
        logits, weights, _ = block.gate(hidden.view(-1, hidden.shape[-1]))
        assert not logits.any()
        logits.add_(7)
        weights.add_(7)
        return stock(block, hidden)

    block.forward = forward
    with swap(model, sites, Blind()):
        for _ in range(2):
            assert torch.equal(run(model), expected)
    assert sites[0].experts.forward == experts


def test_counts_are_the_same_whenever_they_are_read():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    read = []
    for often in (False, True):
        with swap(model, sites, ByLogits()) as swapped:
            for _ in range(3):
                run(model)
                if often:
                    assert swapped.counts[0, 0].load.sum() > 0
        count = swapped.counts[0, 0]
        read.append((count.load, count.rows, count.calls, count.passes, count.tokens))
    for first, then in zip(*read, strict=True):
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(then))
    assert int(read[0][0].sum()) == read[0][4]
