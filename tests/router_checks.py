"""What every router must satisfy. One function per rule; the docstring is the rule.

Run the suite on a router of your own from a test file of your own:

    import pytest
    from router_checks import CHECKS
    from my_router import MyRouter

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_router(check):
        check(MyRouter)

A check takes anything that makes the router when called without arguments, or with those of its
identity setting. What a router learns is learned once per host and kept for all checks.
"""

import copy
import dataclasses
import functools
import math
import pickle
from typing import NamedTuple

import pytest
import torch
from causality_probe import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    depends,
    toy_layers,
    toy_session,
    toy_targets,
    toy_tokens,
)
from torch.utils.flop_counter import FlopCounterMode

from explorer.errors import RouterError
from explorer.router_cards import MODEL_K
from explorer.routers import (
    FAMILIES,
    AcrossLayers,
    PartMask,
    Router,
    RouterInputs,
    Routing,
    TrainedRouter,
    fit_layers,
)
from explorer.routers.contract import dense
from explorer.routers.learning.training import CurveRow, TrainingCancelled
from explorer.routers.native import TopKRouter

HOSTS = {
    "softmax": {"score_function": "softmax"},
    "sigmoid": {"score_function": "sigmoid", "biased": True},
    "probabilities": {"score_function": "probabilities"},
}
# what a model chooses and weighs by, in every way that a rule could forget
KINDS = {
    "softmax": {},
    "softmax, raw": {"renormalize": False, "scaling": 0.7},
    "softmax, three experts": {"top_k": 3},
    "softmax of the chosen": {"score_function": "softmax_topk"},
    "softmax, bias": {"biased": True, "grouped": False},  # as Ernie 4.5
    "softmax, groups": {"grouped": True, "renormalize": False, "scaling": 16.0},  # DeepSeek-V2
    "sigmoid": {"score_function": "sigmoid"},
    "sigmoid, bias": {"score_function": "sigmoid", "biased": True, "grouped": False},
    "sigmoid, bias, groups": {"score_function": "sigmoid", "biased": True},  # DeepSeek-V3
    "sigmoid, bias, groups, raw": {
        **{"score_function": "sigmoid", "biased": True, "renormalize": False, "top_k": 3},
    },
    "sigmoid of the chosen, one": {  # Llama 4
        **{"score_function": "sigmoid_topk", "renormalize": False, "top_k": 1},
    },
    "probabilities": {"score_function": "probabilities"},
    "probabilities, raw": {"score_function": "probabilities", "renormalize": False},
}
PLACE = (1, 0)
FIT_SEED, HELD_OUT_SEED = 11, 12
FIELDS = {field.name for field in dataclasses.fields(RouterInputs)}
TENSORS = (
    *("hidden", "logits", "native", "token_ids", "positions", "starts", "gate_weight"),
    *("previous_state", "previous", "attention", "received"),
)


def inputs_of(host, seed, n_sequences=4, length=24):
    return toy_layers(toy_tokens(n_sequences, length, seed), **HOSTS[host])


@functools.cache
def layers_of(kind, seed):
    """Return the layers of a kind of model; checks leave them as they are."""
    return toy_layers(toy_tokens(4, 24, seed), **KINDS[kind])


@functools.cache
def held_out(host):
    """Return what no router was fitted on; checks leave it as it is."""
    return inputs_of(host, HELD_OUT_SEED)[PLACE]


@functools.cache
def session():
    """Return the toy model that routers learn on; what they explore, they explore once."""
    return toy_session()


def fit_here(router, layers):
    """Fit a router to the one layer that is looked at, or to all where it needs them.

    One that learns on a model's loss is trained on a toy model of the same sizes.
    """
    if isinstance(router, TrainedRouter):
        return copy.deepcopy(router).train(session())
    targets = toy_targets(router, layers)
    if isinstance(router, AcrossLayers):
        return fit_layers(router, layers, targets)[PLACE]
    return copy.deepcopy(router).fit(layers[PLACE], targets[PLACE])


@functools.cache
def trained(make):
    """Return the router after its training, which no host has a part in."""
    return make().train(session())


@functools.cache
def all_fitted(make):
    """Return the routers of all layers of the softmax host."""
    router, layers = make(), inputs_of("softmax", FIT_SEED)
    if isinstance(router, TrainedRouter):
        return dict.fromkeys(layers, trained(make))
    return fit_layers(router, layers, toy_targets(router, layers))


@functools.cache
def fitted(make, host):
    """Return the router, fitted on the fit split; fitted once per router and host."""
    if host == "softmax":
        return all_fitted(make)[PLACE]
    router = make()
    if isinstance(router, TrainedRouter):
        return trained(make)
    return fit_here(router, inputs_of(host, FIT_SEED))


@functools.cache
def decided(make, host):
    return fitted(make, host).route(held_out(host))


class Again(NamedTuple):
    """A router made and fitted a second time, and what became of it.

    Attributes
    ----------
    router : Router
    decision : Decision
        With another global seed than at the fit.
    layers, original : dict of (layer, site) to RouterInputs
        What it was fitted on, after the fit and before.
    shares : list of float
        Of a training, as it was told to the caller.
    """

    router: Router
    decision: object
    layers: dict
    original: dict
    shares: list


@functools.cache
def again(make):
    layers, shares = inputs_of("softmax", FIT_SEED), []
    original, router = copy.deepcopy(layers), make()
    torch.manual_seed(1)
    if isinstance(router, TrainedRouter):
        # explores for itself, too
        own = dataclasses.replace(toy_session(), progress=lambda share, what: shares.append(share))
        router = copy.deepcopy(router).train(own)
    else:
        router = fit_here(router, layers)
    torch.manual_seed(2)
    return Again(router, router.route(held_out("softmax")), layers, original, shares)


def equal(first, second):
    return torch.equal(dense(first), dense(second))


def check_a_card_describes_it(make):
    """The card is complete, and every need is a field of RouterInputs."""
    info = make().info
    assert info.name and info.title and info.formula
    assert info.family in FAMILIES
    assert 1 <= info.summary.count(". ") + info.summary.endswith(".") <= 2
    assert info.needs <= FIELDS
    assert info.fits in (None, "statistics", "distilled", "trained")


def check_it_says_how_it_differs_from_its_paper(make):
    """A rule with a paper declares ``differs``: a sentence, or "" for as published."""
    info = make().info
    assert bool(info.paper) == (info.differs is not None)
    assert not info.differs or (info.differs[0].isupper() and info.differs.endswith("."))


def check_shapes_and_types(make):
    """A routing is float32 [T, E] and [T, K] with int64 ids; a mask is float32 [T, P]."""
    for host in HOSTS:
        inputs, decision = held_out(host), decided(make, host)
        n_tokens = inputs.n_tokens
        if isinstance(decision, PartMask):
            assert decision.part in ("head", "layer", "expert")
            assert decision.gate.dtype == torch.float32
            assert decision.gate.ndim == 2 and len(decision.gate) == n_tokens
            continue
        assert isinstance(decision, Routing)
        assert decision.scores.shape == (n_tokens, inputs.n_experts)
        assert decision.expert_ids.shape == decision.weights.shape
        assert decision.expert_ids.ndim == 2 and len(decision.expert_ids) == n_tokens
        assert decision.scores.dtype == decision.weights.dtype == torch.float32
        assert decision.expert_ids.dtype == torch.int64
        if decision.state is not None:
            assert decision.state.dtype == torch.float32 and len(decision.state) == n_tokens


def check_experts_are_distinct_and_in_range(make):
    """A token visits an expert once, empty slots come last, and K is that of the widest token."""
    for host in HOSTS:
        decision = decided(make, host)
        if isinstance(decision, PartMask):
            continue
        n_experts = decision.scores.shape[-1]
        widest = 0
        for row in decision.expert_ids.tolist():
            visited = [expert for expert in row if expert != -1]
            assert row[: len(visited)] == visited, "an empty slot before a filled one"
            assert len(set(visited)) == len(visited)
            assert all(0 <= expert < n_experts for expert in visited)
            widest = max(widest, len(visited))
        assert decision.expert_ids.shape[1] == max(1, widest)


def check_weights_are_finite_and_not_negative(make):
    """Weights are finite, >= 0, heaviest first, and exactly 0 in empty slots."""
    for host in HOSTS:
        decision = decided(make, host)
        if isinstance(decision, PartMask):
            continue
        assert bool(decision.scores.isfinite().all())
        assert bool(decision.weights.isfinite().all())
        assert bool((decision.weights >= 0).all())
        assert bool((decision.weights[decision.expert_ids == -1] == 0).all())
        assert bool((decision.weights.diff(dim=-1) <= 0).all())


def unnormalised(inputs, scaling=0.7):
    """Return the inputs as of a model that does not divide its weights by their sum."""
    inputs = dataclasses.replace(inputs, renormalize=False, scaling=scaling)
    return dataclasses.replace(inputs, native=TopKRouter().route(inputs))


def off_by(routing, inputs):
    """Return how far weights, or their sums, lie above or below (< 0) the host's convention."""
    if inputs.renormalize:
        used = (routing.expert_ids >= 0).any(dim=-1)
        return (routing.weights.sum(dim=-1) - inputs.scaling)[used]
    scores = routing.scores.gather(-1, routing.expert_ids.clamp_min(0)) * inputs.scaling
    return (routing.weights - scores)[routing.expert_ids >= 0]


def check_weights_are_on_the_scale_that_it_declares(make):
    """Weights sum as the host's do, or are as the card's ``weighing`` says.

    Looked at on models that renormalise their weights, with a factor of 1 and of 2.5, and on some
    that do not. What declares ``at_most`` or ``own`` without cause is told to declare ``host``.
    """
    low = high = 0.0
    for host in HOSTS:
        router, inputs = fitted(make, host), held_out(host)
        for each in (inputs, unnormalised(inputs)):
            routing = router.route(each)
            if isinstance(routing, PartMask):
                return
            off = torch.cat([off_by(routing, each), torch.zeros(1)])  # no token may have an expert
            low, high = min(low, float(off.min())), max(high, float(off.max()))
    found = "own" if high > 1e-4 else "at_most" if low < -1e-4 else "host"
    # a scale of its own may happen to lie below the host's
    right = {"host": ("host",), "at_most": ("at_most", "own"), "own": ("own",)}[found]
    assert router.info.weighing in right, (
        f"declared {router.info.weighing=}, but weights lie up to {-low:.3g} below and {high:.3g} "
        f"above the host's convention: that is {found!r}. Weigh experts with "
        "explorer.routers.scores.weigh, or declare it; see RouterInfo.weighing."
    )


def check_gates_lie_between_0_and_1(make):
    """A gate is a share of a part, from not executed to all of it."""
    for host in HOSTS:
        decision = decided(make, host)
        if isinstance(decision, PartMask):
            assert bool(((decision.gate >= 0) & (decision.gate <= 1)).all())


def check_the_number_of_experts_is_as_declared(make):
    """Without ``variable_k`` every token visits the same number of experts."""
    for host in HOSTS:
        decision = decided(make, host)
        if isinstance(decision, Routing) and not make().info.variable_k:
            assert bool((decision.expert_ids >= 0).all())


def check_the_same_seed_gives_the_same_decision(make):
    """Two routers made and fitted alike decide alike, whatever the global seed is."""
    assert equal(again(make).decision, decided(make, "softmax"))


def check_no_token_and_one_token(make):
    """A batch may hold no token, or a single one."""
    for host in HOSTS:
        inputs = held_out(host)
        for count in (0, 1):
            decision = fitted(make, host).route(inputs.take(torch.arange(count)))
            assert len(dense(decision)) == count
            if isinstance(decision, Routing):
                assert decision.expert_ids.shape[1] >= 1


def check_routing_changes_nothing(make):
    """``route`` changes neither the router nor its inputs, and so learns from no held-out token."""
    for host in HOSTS:
        router, inputs = copy.deepcopy(fitted(make, host)), held_out(host)
        original, before = copy.deepcopy(inputs), pickle.dumps(router)
        first = router.route(inputs)
        assert pickle.dumps(router) == before
        assert equal(router.route(inputs), first)
        assert_same_inputs(inputs, original)


def check_fit_copies_what_it_keeps(make):
    """``fit`` leaves its inputs alone, and changing them afterwards changes no decision."""
    router, before, layers, original, _ = again(make)
    for place, inputs in layers.items():
        assert_same_inputs(inputs, original[place])
    changed = copy.deepcopy((router, layers))  # what they share stays shared
    for inputs in changed[1].values():
        for name in ("hidden", "logits", "token_ids", "attention", "gate_weight"):
            getattr(inputs, name).zero_()
    assert equal(changed[0].route(held_out("softmax")), before)


def check_what_it_depends_on_is_declared(make):
    """Changing later tokens or other sequences, or ending early, shows what the card admits."""
    verdict, info = depends(all_fitted(make)), make().info
    assert verdict.causal == info.causal, f"declared {info.causal=}, found {verdict}"
    assert verdict.batch_dependent == info.batch_dependent, (
        f"declared {info.batch_dependent=}, found {verdict}"
    )


def check_needs_are_honest(make):
    """Without a need comes an error that names it; with all needs and nothing else, it routes."""
    router, inputs = fitted(make, "softmax"), held_out("softmax")
    for need in router.info.needs:
        with pytest.raises(RouterError, match=need):
            router.route(dataclasses.replace(inputs, **{need: None}))
    unneeded = {name: None for name in TENSORS if name not in router.info.needs}
    if not router.info.needs & set(TENSORS):
        unneeded.pop("token_ids")  # something has to say how many tokens there are
    assert equal(
        router.route(dataclasses.replace(inputs, **unneeded)), decided(make, "softmax")
    ) or isinstance(router, AcrossLayers)


def check_an_unfitted_router_says_so(make):
    """Routing before ``fit`` or ``train`` is an error, where there is something to learn."""
    router = make()
    if router.info.fits is not None:
        how = "train" if router.info.fits == "trained" else "fit"
        with pytest.raises(RouterError, match=rf"Call {how}\("):
            router.route(held_out("softmax"))


def check_what_learns_on_a_models_loss_is_trained(make):
    """``fits`` is "trained" exactly where there is ``train``; ``fit`` then says to call it.

    Training leaves the model as it was, keeps its curves, and ends when the caller cancels.
    """
    router = make()
    assert isinstance(router, TrainedRouter) == (router.info.fits == "trained")
    if not isinstance(router, TrainedRouter):
        return
    with pytest.raises(RouterError, match="train"):
        router.fit(held_out("softmax"))
    curves, shares = trained(make).curves_, again(make).shares
    as_made = toy_session().model.state_dict()
    assert all(torch.equal(as_made[n], w) for n, w in session().model.state_dict().items())
    assert all(w.requires_grad and w.grad is None for w in session().model.parameters())
    assert shares and all(0 <= share <= 1 for share in shares)
    assert curves and all(set(row) == set(CurveRow.__annotations__) for row in curves)
    for name in ("reward", "policy_entropy", "gate_rate"):
        assert all(math.isfinite(row[name]) for row in curves)
    with pytest.raises(TrainingCancelled):
        make().train(dataclasses.replace(session(), cancelled=lambda: True))


def check_it_pickles(make):
    """A fitted router can be written to disk and decides as before."""
    for host in HOSTS:
        read = pickle.loads(pickle.dumps(fitted(make, host)))
        assert equal(read.route(held_out(host)), decided(make, host))


def counted(make):
    """Return the operations of matrix products a token that ran: the rule's, and the gate's."""
    router, inputs = fitted(make, "softmax"), held_out("softmax")
    with FlopCounterMode(display=False) as counter:
        router.route(inputs)
    own = counter.get_total_flops() / inputs.n_tokens
    # what starts from the model's decision or logits needs its gate
    return own + (2 * HIDDEN * EXPERTS if router.info.needs & {"logits", "native"} else 0)


def check_its_own_cost_is_counted(make):
    """FLOPs are finite, and no less than the matrix products that run."""
    router = fitted(make, "softmax")
    cost = router.flops(EXPERTS, HIDDEN, TOP_K)
    assert cost < float("inf")
    assert cost >= counted(make)
    if router.info.needs & {"hidden", "logits"}:
        assert cost > 0


def identity_for(info, top_k):
    """Return the arguments that make a rule repeat a model with ``top_k``, None = none do."""
    assert info.identity is not None, (
        f"Router {info.name!r} does not say with which arguments it repeats the model's own "
        "decision. Declare RouterInfo.identity: a mapping, or why there is none."
    )
    if isinstance(info.identity, str):
        return None
    return {name: top_k if value == MODEL_K else value for name, value in info.identity.items()}


def check_its_identity_setting_repeats_the_model(make):
    """With the arguments that it declares, it does what the model does, on models of all kinds.

    Ids and weights are the model's own; of a rule about parts, every gate is 1. A router that no
    arguments make so says why, and one that says nothing has forgotten to.
    """
    info = make().info
    if identity_for(info, TOP_K) is None:
        assert len(info.identity.split()) > 2 and info.identity.endswith("."), info.identity
        return
    once = None
    for kind in KINDS:
        layers = layers_of(kind, FIT_SEED)
        options = identity_for(info, layers[PLACE].top_k)
        router = make(**options)
        if not isinstance(router, TrainedRouter):
            router = fit_here(router, layers)
        elif layers[PLACE].top_k == TOP_K:  # as the model that it learns on, for all kinds
            router = once = once or router.train(session())
        else:
            continue
        inputs = layers_of(kind, HELD_OUT_SEED)[PLACE]
        decision = router.route(inputs)
        setting = f"{info.name}({options}) on a model of kind {kind!r}"
        if isinstance(decision, PartMask):
            assert bool((decision.gate == 1).all()), f"{setting} skips parts"
            continue
        own = inputs.native
        assert torch.equal(decision.expert_ids, own.expert_ids), f"{setting} takes other experts"
        off = float((decision.weights - own.weights).abs().max())
        assert off <= 1e-6 * inputs.scaling, f"{setting} weighs them otherwise, by up to {off:.3g}"


def assert_same_inputs(inputs, original):
    for name in TENSORS:
        now, then = getattr(inputs, name), getattr(original, name)
        if isinstance(now, Routing):
            assert equal(now, then), name
        elif now is not None:
            assert torch.equal(now, then), name


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]
