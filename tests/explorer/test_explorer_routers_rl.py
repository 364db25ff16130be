"""Reinforcement learning held to ground truth: enumeration, value iteration, and real counters."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from causality_probe import toy_layers, toy_session, toy_tokens
from checks import assert_close

from capture.swap.measure import token_losses
from capture.swap.routers import swap
from explorer.errors import RouterError
from explorer.routers import ROUTERS
from explorer.routers.learning.actions import make_actions, state_of, statistics_of
from explorer.routers.learning.exploration import (
    Acting,
    TextPasses,
    action_costs,
    drawn_action,
    exploration_weights,
    explore,
)
from explorer.routers.learning.objectives import (
    EpisodeStep,
    LayerQ,
    Log,
    StateNet,
    ips_reward,
    learn_from_log,
    log_policy,
    policy_entropy,
    q_target,
    score_function_loss,
)
from explorer.routers.live_rule import LiveRule

pytestmark = pytest.mark.slow

RL = ("policy_gradient", "q_learning", "reinforce", "q_multistep")
OFFLINE = RL[:2]


@functools.cache
def session():
    return toy_session(n_sequences=8, length=20)


def expected_reward(log_probs, rewards):
    """Return the mean reward under a policy whose actions' rewards [..., A] are all known."""
    return (log_probs.exp() * rewards).sum(dim=-1).mean()


def places(actions):
    return {(site.info.layer, site.info.site): actions for site in session().sites}


# a bandit of one layer and three actions, everything known


LOGITS = torch.tensor([0.4, -0.3, 0.1])
REWARDS = torch.tensor([0.2, 1.0, -0.5])
ALL = torch.ones(3, dtype=torch.bool)


def enumerated_gradient(logits, rewards):
    """d/dz_a of sum_a pi(a) R(a) = pi(a) (R(a) - sum_b pi(b) R(b)), on paper."""
    pi = torch.softmax(logits, -1)
    return pi * (rewards - (pi * rewards).sum())


def test_the_enumerated_gradient_is_autograds():
    logits = LOGITS.clone().requires_grad_()
    expected_reward(log_policy(logits, ALL), REWARDS).backward()
    assert_close("gradient", logits.grad, enumerated_gradient(LOGITS, REWARDS), atol=1e-6)


def of_each(function, samples):
    """Return what a function of logits and one sample gives for each of them."""
    return torch.func.vmap(function, in_dims=(None, *(0 for _ in samples)))(LOGITS, *samples)


def assert_unbiased(samples, truth):
    error = samples.std(dim=0) / len(samples) ** 0.5
    assert bool((error > 0).all())
    assert bool(((samples.mean(dim=0) - truth).abs() < 3 * error).all()), (samples.mean(0), truth)


def test_the_mean_sampled_gradient_is_the_enumerated_one():
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    pi = torch.softmax(LOGITS, -1)
    taken = torch.multinomial(pi, n, replacement=True, generator=generator)
    noise = torch.randn(n, generator=generator) * 0.3
    rewards = REWARDS[taken] + noise

    def minus_score(logits, action, reward):
        # a baseline that is no function of the action must not move the mean
        logs = log_policy(logits, ALL).unsqueeze(0)
        return -score_function_loss(logs, action.unsqueeze(0), (reward - 0.7).unsqueeze(0))

    truth = enumerated_gradient(LOGITS, REWARDS)
    assert_unbiased(of_each(torch.func.grad(minus_score), (taken, rewards)), truth)


def test_inverse_propensity_is_unbiased_in_value_and_gradient():
    generator = torch.Generator().manual_seed(1)
    n = 40_000
    behaviour = torch.tensor([0.1, 0.3, 0.6])
    taken = torch.multinomial(behaviour, n, replacement=True, generator=generator)
    rewards = REWARDS[taken] + torch.randn(n, generator=generator) * 0.3

    def value(logits, action, propensity, reward):
        logs = log_policy(logits, ALL).unsqueeze(0)
        return ips_reward(logs, *(each.view(1, 1) for each in (action, propensity, reward)))

    samples = (taken, behaviour[taken], rewards)
    gradients = of_each(torch.func.grad(value), samples)
    assert_unbiased(gradients, enumerated_gradient(LOGITS, REWARDS))
    values = of_each(value, samples)
    truth = float((torch.softmax(LOGITS, -1) * REWARDS).sum())
    assert_unbiased(values.unsqueeze(-1), torch.tensor([truth]))
    # over passes and tokens at once, as routers call it
    at_once = ips_reward(
        log_policy(LOGITS, ALL).expand(n // 2, -1),
        taken.view(2, -1),
        behaviour[taken].view(2, -1),
        rewards.view(2, -1),
    )
    assert float(at_once) == pytest.approx(float(values.mean()), abs=1e-5)


def bandit_log(n=3000, seed=0):
    """Tokens of two kinds: for one a second expert is worth 0.3 nats, for the other 0.01."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(2, (n,), generator=generator).float()
    # the kind shows in the gate's statistics, which are a state's last four numbers
    states = torch.cat([torch.randn(n, 7, generator=generator), kind.unsqueeze(-1)], dim=-1)
    change = torch.tensor([[2.0, 0.01, 0.0], [2.0, 0.4, 0.0]])[kind.long()]
    passes = 4
    actions = torch.randint(3, (passes, n), generator=generator)
    noise = torch.randn(passes, n, generator=generator) * 0.2
    changes = change.expand(passes, -1, -1).gather(-1, actions.unsqueeze(-1)).squeeze(-1) + noise
    allowed = torch.ones(n, 3, dtype=torch.bool)
    return Log(states, allowed, actions, torch.full(actions.shape, 1 / 3), changes), kind


def learned(name, **options):
    """Return a router that learned the bandit, its log, and the kinds of its tokens."""
    log, kind = bandit_log()
    router = ROUTERS[name](steps=200, **options)
    router.actions_ = {(0, 0): make_actions("count", 2, most=None, least=0)}
    router.costs_ = {(0, 0): torch.arange(3.0)}
    network = StateNet(log.states, 3, 16)
    router._learn((0, 0), network, log, log.states, lambda step: None)
    router.networks_ = {(0, 0): network}
    return router, log, kind


def learned_counts(name, price):
    router, log, kind = learned(name, price=price)
    taken = router._preference((0, 0), router.networks_[0, 0](log.states)).argmax(-1)
    return taken[kind == 0].float().mean(), taken[kind == 1].float().mean()


@pytest.mark.parametrize("name", OFFLINE)
def test_prices_span_from_all_experts_to_none(name):
    dear = learned_counts(name, 100.0)
    assert dear == (0.0, 0.0)
    fair = learned_counts(name, 0.15)
    assert fair[0] < 1.1 and fair[1] > 1.9, fair
    free = learned_counts(name, 0.0)
    assert free[1] > 1.95 and free[0] > 0.98, free


# q-learning on a table


def test_multistep_q_learning_converges_to_value_iteration():
    """Three layers, three states, two actions, deterministic; every number is known."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(3, 3, 2, generator=generator).round(decimals=2)  # [layer, state, action]
    leads_to = torch.randint(3, (3, 3, 2), generator=generator)
    allowed = torch.ones(3, 3, 2, dtype=torch.bool)
    allowed[1, 0, 1] = False  # a forbidden action, whose reward would be the best
    rewards[1, 0, 1] = 5.0
    truth = torch.zeros(3, 3, 2)
    for layer in (2, 1, 0):
        later = torch.zeros(3)
        if layer < 2:
            later = truth[layer + 1].masked_fill(~allowed[layer + 1], -torch.inf).amax(-1)
        truth[layer] = rewards[layer] + (later[leads_to[layer]] if layer < 2 else 0.0)
    tables = [torch.nn.Linear(3, 2, bias=False) for _ in range(3)]
    learner = LayerQ(tables, learning_rate=0.02)
    one_hot = torch.eye(3)
    for step in range(900):
        state = torch.randint(3, (64,), generator=generator)
        steps = []
        for layer in range(3):
            may = allowed[layer][state]
            action = torch.multinomial(may.float(), 1, generator=generator).squeeze(-1)
            steps.append(EpisodeStep(one_hot[state], may, action, rewards[layer][state, action]))
            state = leads_to[layer][state, action]
        learner.update(steps)
        if step % 10 == 0:
            learner.sync()
    reached = torch.ones(3, dtype=torch.bool)
    for layer, table in enumerate(tables):
        learned = table.weight.detach().T
        taken = reached.unsqueeze(-1) & allowed[layer]
        here = taken.nonzero(as_tuple=True)
        assert_close(f"layer {layer}", learned[here], truth[layer][here], atol=1e-3)
        reached = torch.zeros(3, dtype=torch.bool).index_fill(0, leads_to[layer][taken], True)


def test_targets_take_the_best_allowed_action():
    later, may = torch.tensor([[1.0, 9.0], [3.0, 2.0]]), torch.tensor([[1, 0], [1, 1]]).bool()
    assert q_target(torch.tensor([0.5, -1.0]), later, may).tolist() == [1.5, 2.0]
    assert q_target(torch.tensor([0.5]), None, None).tolist() == [0.5]


# actions and states


def test_actions_are_counts_subsets_or_all_and_none():
    counts = make_actions("count", 2, most=3, least=0)
    assert counts.used.int().tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert counts.native == 2
    subsets = make_actions("subset", 2, most=None, least=1)
    assert sorted(map(tuple, subsets.used.int().tolist())) == [(0, 1), (1, 0), (1, 1)]
    assert subsets.used[subsets.native].tolist() == [True, True]
    skip = make_actions("skip", 2, most=None, least=0)
    assert skip.used.int().tolist() == [[0, 0], [1, 1]] and skip.n_experts.tolist() == [0, 2]
    for options in ({"most": 1, "least": 0}, {"most": None, "least": 3}):
        with pytest.raises(RouterError, match="own choice"):
            make_actions("count", 2, **options)
    with pytest.raises(RouterError, match="subsets"):
        make_actions("subset", 9, most=None, least=0)


def test_an_action_runs_exactly_its_experts_with_the_models_weights():
    inputs = toy_layers(toy_tokens(2, 12, 3))[1, 0]
    actions = make_actions("subset", 2, most=None, least=0)
    scores = inputs.logits.softmax(-1)
    best = actions.best(scores, inputs)
    for number, used in enumerate(actions.used.tolist()):
        taken = torch.full((24,), number)
        routing = actions.routing(scores, best, taken, inputs)
        for token in range(24):
            wanted = {int(best[token, slot]) for slot, on in enumerate(used) if on}
            assert {e for e in routing.expert_ids[token].tolist() if e >= 0} == wanted
        total = routing.weights.sum(-1)
        assert_close("weights", total, torch.full((24,), float(any(used))), atol=1e-6)


def test_actions_without_their_experts_are_not_allowed_and_never_taken():
    actions = make_actions("count", 2, most=None, least=0)
    best = torch.tensor([[3, 1], [2, -1], [-1, -1]])
    allowed = actions.allowed(best)
    assert allowed.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    logs = log_policy(torch.tensor([0.0, 1.0, 50.0]).expand(3, -1), allowed)
    assert logs.exp()[1, 2] == 0 and logs.exp()[2].tolist() == [1, 0, 0]
    assert bool(policy_entropy(logs).isfinite().all()) and float(policy_entropy(logs)[2]) == 0
    weights = exploration_weights(actions)
    assert weights.tolist() == pytest.approx([1 / 11, 8 / 11, 2 / 11])
    drawn, propensity = drawn_action(
        weights, allowed.repeat_interleave(4000, 0), torch.rand(12_000).sort().values
    )
    for row in range(3):
        here = drawn[row * 4000 : (row + 1) * 4000]
        assert bool(allowed[row][here].all())
    assert propensity[-4000:].unique().tolist() == [1.0]


def test_drawn_actions_have_their_propensities():
    allowed = torch.tensor([[True, True, True]]).expand(40_000, -1)
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.1, 0.3, 0.6])
    taken, propensity = drawn_action(weights, allowed, uniform)
    for action, weight in enumerate(weights.tolist()):
        assert float((taken == action).float().mean()) == pytest.approx(weight, abs=0.01)
        assert propensity[taken == action].unique().tolist() == pytest.approx([weight])


def test_the_state_is_hidden_and_four_statistics_of_the_gate():
    inputs = toy_layers(toy_tokens(2, 12, 3))[1, 0]
    scores = inputs.logits.softmax(-1)
    p1, p2 = scores.topk(2).values.unbind(-1)
    entropy = torch.distributions.Categorical(scores).entropy()
    expected = torch.stack([p1, p2, p1 - p2, entropy], -1)
    assert_close("statistics", statistics_of(scores), expected, atol=1e-5)
    full = state_of(inputs, scores, "full")
    assert torch.equal(full[:, :16], inputs.hidden) and full.shape == (24, 20)
    gate_only = ROUTERS["q_learning"](state="gate", steps=3).train(session())
    gate_only.route(dataclasses.replace(inputs, hidden=None))
    with pytest.raises(RouterError, match="hidden"):
        ROUTERS["q_learning"](steps=3).train(session()).route(
            dataclasses.replace(inputs, hidden=None)
        )


# exploration in a model


def test_one_layer_acts_and_the_log_says_what_it_did():
    actions = places(make_actions("count", 2, most=None, least=0))
    logs = explore(session(), actions, n_tokens=10_000, passes=3, seed=0)
    tokens = sum(len(each) - 1 for each in session().sequences)
    for log in logs.values():
        assert log.states.shape == (tokens, 20) and log.actions.shape == (3, tokens)
        assert set(log.actions.unique().tolist()) <= {0, 1, 2}
        assert bool((log.propensity > 0).all())
    # in the last layer, other tokens' actions cannot reach a token: its own changes nothing at 2
    last = logs[max(logs)]
    own = last.change[last.actions == 2]
    assert_close("native action", own, torch.zeros_like(own), atol=1e-5)
    assert float(last.change[last.actions == 0].abs().max()) > 1e-4


def test_logged_changes_are_what_a_swap_of_that_layer_does():
    """All take action 1 in layer 1: the loss must be that of a swap to top-1 there."""
    actions = places(make_actions("count", 2, most=None, least=0))
    rule = Acting(actions, lambda place, states, allowed: torch.ones(len(states), dtype=torch.long))
    rule.only = [(1, 0)]
    runs = TextPasses(session(), n_tokens=None)
    with runs.open(rule):
        found = [runs.losses(numbers) for numbers in runs.batches]
    expected = token_losses(
        session().model,
        session().sequences,
        swapped=lambda: swap(
            session().model, session().sites, LiveRule(ROUTERS["top_k"](k=1)), only=[1]
        ),
    )
    in_order = [torch.from_numpy(np.concatenate([expected[i] for i in b])) for b in runs.batches]
    assert_close("loss", torch.cat(found), torch.cat(in_order), atol=1e-5)


@pytest.mark.parametrize("kind", ["count", "subset", "skip"])
def test_executed_experts_are_the_actions(kind):
    router = ROUTERS["policy_gradient"](actions=kind, price=1e-4, steps=20).train(session())
    chosen = {}
    model, sites = session().model, session().sites

    def note(inputs, choice):
        chosen[inputs.layer] = (choice.expert_ids >= 0).sum()

    ids = torch.from_numpy(np.stack(session().sequences))
    with torch.no_grad(), swap(model, sites, LiveRule(router), on_choice=note) as swapped:
        model(input_ids=ids, use_cache=False)
    for (layer, _), count in swapped.counts.items():
        assert int(count.rows.sum()) == int(chosen[layer])
    least = ROUTERS["q_learning"](price=100.0, steps=5).train(session())
    with torch.no_grad(), swap(model, sites, LiveRule(least)) as swapped:
        model(input_ids=ids, use_cache=False)
    assert swapped.experts_per_token == 1


def test_a_session_explores_once_a_seed_for_all_prices_and_routers(monkeypatch):
    own, calls = toy_session(), []
    from explorer.routers import rl

    def counted(*args, **options):
        calls.append(1)
        return explore(*args, **options)

    monkeypatch.setattr(rl, "explore", counted)
    routers = [
        ROUTERS[name](price=price, seed=seed, steps=8).train(own)
        for name in OFFLINE
        for price, seed in ((0.0, 0), (0.02, 0), (0.01, 1))
    ]
    assert len(calls) == 2
    rows = [row for router in routers for row in router.curves_]
    assert {(row["router"], row["lambda"], row["seed"]) for row in rows} == {
        (name, *rest) for name in OFFLINE for rest in ((0.0, 0), (0.02, 0), (0.01, 1))
    }
    assert {row["layer"] for row in rows} == {0, 1, 2}


def test_costs_in_experts_flops_and_milliseconds_have_one_unit():
    actions = places(make_actions("count", 2, most=None, least=0))
    experts = action_costs(session(), actions, "experts")
    flops = action_costs(session(), actions, "flops")
    times = action_costs(session(), actions, "ms")
    for place in actions:
        assert experts[place].tolist() == [0, 1, 2]
        assert flops[place].tolist() == pytest.approx([0, 1, 2])  # layers are alike
        assert times[place][0] == 0 and bool((times[place].diff() >= 0).all())
    mean = sum(float(each[2]) for each in times.values()) / len(times)
    assert mean == pytest.approx(2.0, abs=1e-4)
    with pytest.raises(RouterError, match="flops"):
        action_costs(session(), actions, "joule")


def test_a_target_of_experts_sets_the_price():
    router, log, _ = learned("q_learning")
    for wanted in (1.3, 1.7):
        router.price_ = router._price_of(wanted, {(0, 0): log})
        values = router._preference((0, 0), router.networks_[0, 0](log.states))
        assert float(values.argmax(-1).double().mean()) == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize("name", RL[2:])
def test_online_learners_keep_curves_of_all_layers_and_nothing_else(name):
    router = ROUTERS[name](steps=15, price=0.5).train(session())
    whole = [row for row in router.curves_ if row["layer"] is None]
    assert [row["step"] for row in whole] == list(range(15))
    assert all(0 <= row["gate_rate"] <= 1 and row["policy_entropy"] >= 0 for row in whole)
    assert not {n for n in vars(router) if n.startswith("_")}
    again = ROUTERS[name](steps=15, price=0.5).train(toy_session(n_sequences=8, length=20))
    assert again.curves_ == router.curves_


def test_reinforce_learns_that_dear_experts_do_not_pay():
    router = ROUTERS["reinforce"](steps=120, price=2.0, least=0).train(session())
    whole = [row["gate_rate"] for row in router.curves_ if row["layer"] is None]
    assert whole[0] > 0.4 and whole[-1] < 0.2


def test_learning_from_a_log_says_when_it_fails():
    log, _ = bandit_log(200)
    with pytest.raises(RouterError, match="nan"):
        learn_from_log(
            StateNet(log.states, 3, 4),
            log,
            log.states,
            lambda out, batch: (out * torch.nan).sum(),
            log.change,
            steps=3,
            seed=0,
            watch=lambda step: None,
        )
