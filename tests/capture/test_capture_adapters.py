"""Recorded ids and weights, put into an independent reimplementation, rebuild what experts did."""

import json

import pytest
import tiny_models
import torch
from checks import assert_close
from torch.nn.functional import linear, sigmoid, silu

import capture
from capture.errors import SiteError
from capture.model.hooks import tap
from capture.model.selftest import attach
from capture.store import RunReader

# fp32 sums of at most 48 products in another order
ATOL, RTOL = 2e-5, 1e-5
TOKENS = 14

# score function, layers, shared experts, has a selection bias, groups, margin known
EXPECTED = {
    "mixtral": ("softmax", [0, 1, 2], 0, False, None, True),
    "olmoe": ("softmax", [0, 1, 2], 0, False, None, True),
    "qwen2_moe": ("softmax", [0, 2], 1, False, None, True),
    "qwen3_moe": ("softmax", [1, 2], 0, False, None, True),
    "qwen3_next": ("softmax", [0, 1, 2], 1, False, None, True),
    "deepseek_v2": ("softmax", [1, 2], 1, False, (4, 2), True),
    "deepseek_v3": ("sigmoid", [1, 2], 1, True, (4, 2), True),
    "gpt_oss": ("softmax", [0, 1, 2], 0, False, None, True),
    "granitemoe": ("softmax", [0, 1, 2], 0, False, None, True),
    "glm4_moe": ("sigmoid", [1, 2], 1, True, (4, 2), True),
    # sparsemixer: each slot has a softmax of its own, over logits near the best one only
    "phimoe": ("other", [0, 1, 2], 0, False, None, True),
    "minimax_m2": ("sigmoid", [0, 1, 2], 0, True, None, True),
    "flex_olmo": ("softmax", [0, 1, 2], 0, False, None, True),
}

# score function, top_k, routed experts, shared experts, margin known
OTHERS = {
    "afmoe": ("sigmoid", 3, 8, 1, True),
    "aria_text": ("softmax", 3, 8, 1, True),
    "axk1": ("sigmoid", 3, 8, 1, True),
    "axk2": ("sigmoid", 3, 8, 1, True),
    "bailing_hybrid": ("sigmoid", 3, 8, 1, True),
    "beam": ("sigmoid", 3, 8, 0, True),
    "cohere2_moe": ("sigmoid", 3, 8, 1, True),
    "dbrx": ("softmax", 3, 8, 0, True),
    "deepseek_ocr2": ("softmax", 3, 8, 1, True),
    "deepseek_v32": ("sigmoid", 3, 8, 1, True),
    # sqrt(softplus), and the first layers look experts up in a table of tokens
    "deepseek_v4": ("other", 3, 8, 1, (False, True, True)),
    "diffusion_gemma": ("probabilities", 3, 8, 0, True),
    "dots1": ("sigmoid", 3, 8, 1, True),
    "dots3_note_text": ("sigmoid", 3, 8, 1, True),
    "ernie4_5_moe": ("softmax", 3, 8, 2, True),
    "ernie4_5_vl_moe": ("softmax", 3, 8, 2, True),
    "exaone_moe": ("sigmoid", 3, 8, 1, True),
    "flint": ("sigmoid", 3, 8, 1, True),
    "gemma4_text": ("probabilities", 3, 8, 0, True),
    "glm4_moe_lite": ("sigmoid", 3, 8, 1, True),
    "glm4v_moe": ("sigmoid", 3, 8, 1, True),
    "glm5_next": ("sigmoid", 3, 8, 1, True),
    "glm_moe_dsa": ("sigmoid", 3, 8, 1, True),
    "granitemoe_swa": ("softmax", 3, 8, 1, True),
    "granitemoehybrid": ("softmax", 3, 8, 1, True),
    "granitemoeshared": ("softmax", 3, 8, 1, True),
    "hunyuan_v1_moe": ("softmax", 3, 8, 1, True),
    "hy_v3": ("sigmoid", 3, 8, 1, True),
    "hy_v4": ("sigmoid", 3, 8, 1, True),
    "hy_v4_vl": ("sigmoid", 3, 8, 1, True),
    "inkling2_text": ("sigmoid", 3, 8, 0, True),
    # each token's weights share their sum with the shared experts: a factor per token
    "inkling_text": ("sigmoid", 3, 8, 1, True),
    "jamba": ("softmax", 3, 8, 0, True),
    "kimi_linear": ("sigmoid", 3, 8, 1, True),
    # adds its bias to logits, not to scores
    "kolibri1": ("sigmoid_topk", 3, 8, 1, True),
    "laguna": ("sigmoid", 3, 8, 1, True),
    "lara_mini": ("softmax", 3, 8, 1, True),
    "lfm2_moe": ("sigmoid", 3, 8, 0, True),
    # eight experts and two that pass the token through
    "longcat_flash": ("softmax", 3, 10, 0, True),
    "mellum": ("softmax", 3, 8, 0, True),
    "mimo_v2_flash": ("sigmoid", 3, 8, 0, True),
    "minimax": ("softmax", 3, 8, 0, True),
    "minimax_m3_vl_text": ("sigmoid", 3, 8, 1, True),
    # groups without a bias that still count by their two best scores
    "mistral4": ("softmax", 3, 8, 1, True),
    "mistral_large4": ("softmax", 3, 8, 1, True),
    "muse_spark": ("sigmoid", 3, 8, 0, True),
    "nemotron_h": ("sigmoid", 3, 8, 1, True),
    "openai_privacy_filter": ("softmax", 3, 8, 0, True),
    "qwen3_5_moe_text": ("softmax", 3, 8, 1, True),
    "qwen3_omni_moe": ("softmax", 3, 8, 0, True),
    "qwen3_vl_moe": ("softmax", 3, 8, 0, True),
    "qwen4_exp_text": ("softmax", 3, 8, 1, True),
    "solar_open": ("sigmoid", 3, 8, 1, True),
    "step3p7": ("sigmoid", 3, 8, 1, True),
    "unlimited_ocr": ("softmax", 3, 8, 1, True),
    # eight experts and the class "skip"
    "zaya": ("softmax", 1, 9, 0, True),
}
OWN_TESTS = {"doge", "inkling2_loop_text", "jetmoe", "llama4_text"}


class Watch:
    """Keep what modules take and give during one forward pass, keyed by module."""

    def __init__(self, *modules):
        self.taken, self.given = {}, {}
        self.handles = [m.register_forward_hook(self.keep) for m in modules]

    def keep(self, module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        self.taken[module], self.given[module] = args[0].clone() if args else None, output.clone()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def rows_taken(self, module):
        return self.taken[module].reshape(-1, self.taken[module].shape[-1])

    def rows_given(self, module):
        return self.given[module].reshape(-1, self.given[module].shape[-1])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def record(model, sites):
    """Run one forward pass and return what every site did, with all router inputs."""
    everything = torch.arange(TOKENS)
    with torch.no_grad(), tap(sites, hidden_rows=lambda: everything) as taps:
        model(input_ids=tiny_models.tokens(), use_cache=False)
        return taps.take()


def swiglu_expert(experts, expert, x):
    """One expert of the usual kind: down(silu(gate x) * up x)."""
    gate, up = linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return linear(silu(gate) * up, experts.down_proj[expert])


def gpt_oss_expert(experts, expert, x):
    """GPT-OSS: interleaved gate and up, transposed matrices, biases, clamped swiglu."""
    both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
    gate, up = both[..., 0::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
    return ((up + 1) * gate * sigmoid(1.702 * gate)) @ experts.down_proj[
        expert
    ] + experts.down_proj_bias[expert]


def combine(expert_output, x, ids, weights):
    """Sum each token's experts, one by one: the definition of a mixture."""
    rows = []
    for token in range(len(ids)):
        total = torch.zeros_like(x[token])
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            if expert >= 0:
                total = total + weight * expert_output(expert, x[token])
        rows.append(total)
    return torch.stack(rows)


def check_observation(site, seen):
    ids, weights = seen.expert_ids, seen.weights
    assert ids.dtype == torch.int64
    assert ids.shape == weights.shape == (TOKENS, site.info.top_k)
    assert seen.scores.shape == (TOKENS, site.info.n_experts)
    load = ids.flatten().bincount(minlength=site.info.n_experts)
    assert len(load) == site.info.n_experts
    assert int(load.sum()) == TOKENS * site.info.top_k


@pytest.fixture(scope="module", params=list(EXPECTED))
def required(request):
    model = tiny_models.build(request.param)
    sites = attach(model)
    with Watch(*(s.experts for s in sites)) as watch:
        return request.param, model, sites, record(model, sites), watch


def test_site_descriptions(required):
    name, model, sites, *_ = required
    function, layers, shared, biased, groups, margin = EXPECTED[name]
    assert [s.info.layer for s in sites] == layers
    for site in sites:
        info = site.info
        assert (info.site, info.n_experts, info.n_shared_experts) == (0, 8, shared)
        assert info.top_k == (2 if name == "phimoe" else 3)
        assert info.score_function == function
        assert model.get_submodule(info.module) is site.parent
        assert (site.selection_bias is not None) == biased
        assert ((site.n_groups, site.top_groups) if site.n_groups else None) == groups
        assert site.margin_known == margin


def test_recorded_choice_rebuilds_the_experts_output(required):
    name, _, sites, seen, watch = required
    expert = gpt_oss_expert if name == "gpt_oss" else swiglu_expert
    for site, observation in zip(sites, seen, strict=True):
        check_observation(site, observation)
        rebuilt = combine(
            lambda e, x, site=site: expert(site.experts, e, x),
            observation.hidden,
            observation.expert_ids,
            observation.weights,
        )
        assert float(rebuilt.abs().max()) > 0.01
        assert_close(
            f"{site.info.module} output", rebuilt, watch.rows_given(site.experts), atol=ATOL
        )


def test_scores_are_what_the_router_computes_from_its_input(required):
    _, _, sites, seen, _ = required
    for site, observation in zip(sites, seen, strict=True):
        logits = linear(observation.hidden, site.router.weight, getattr(site.router, "bias", None))
        assert_close("scores", observation.scores, logits, atol=1e-5)


def test_the_tiny_rules_are_not_trivial(required):
    """With a bias or groups, the largest scores are not the choice: logits alone mislead."""
    name, _, _, seen, _ = required
    *_, biased, groups, _ = EXPECTED[name]
    chosen = torch.cat([s.expert_ids.sort(-1).values for s in seen])
    naive = torch.cat([s.scores.topk(s.expert_ids.shape[1]).indices.sort(-1).values for s in seen])
    assert bool((chosen != naive).any()) == (biased or groups is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OTHERS))
def test_other_architectures(name):
    """The choice, fed back one expert at a time into the model's own experts, gives the output."""
    model = tiny_models.build(name)
    sites = attach(model)
    with Watch(*(s.experts for s in sites)) as watch:
        seen = record(model, sites)
    function, top_k, n_experts, shared, margin = OTHERS[name]
    margins = margin if isinstance(margin, tuple) else [margin] * len(sites)
    for site, observation, margin in zip(sites, seen, margins, strict=True):
        info = site.info
        assert (info.score_function, info.top_k) == (function, top_k)
        assert (info.n_experts, info.n_shared_experts) == (n_experts, shared)
        assert site.margin_known == margin
        check_observation(site, observation)
        given = watch.rows_given(site.experts)
        rebuilt = torch.zeros_like(given)
        computing = n_experts - (name == "zaya")
        for expert in range(computing):
            alone = run_alone(site.experts, watch.taken[site.experts], expert, computing)
            share = (observation.weights * (observation.expert_ids == expert)).sum(-1, keepdim=True)
            rebuilt += share * alone
        assert float(rebuilt.abs().max()) > 1e-3
        assert_close(f"{info.module} output", rebuilt, given, atol=ATOL, rtol=RTOL)


def run_alone(experts, x, expert, n_experts):
    """Run one expert on every token; a second slot of weight 0 keeps odd shapes away."""
    ids = torch.tensor([[expert, (expert + 1) % n_experts]]).expand(TOKENS, 2)
    output = experts(x, ids, torch.tensor([[1.0, 0.0]]).expand(TOKENS, 2))
    return output.reshape(TOKENS, -1)


def test_every_tiny_model_has_a_test():
    assert set(EXPECTED) == set(tiny_models.REQUIRED)
    assert set(OTHERS) | OWN_TESTS == set(tiny_models.OTHERS)


def test_zaya_names_skipped_tokens():
    model = tiny_models.build("zaya")
    for layer in model.model.layers:
        layer.mlp.gate.balancing_biases.copy_(torch.tensor([0.05] + [0.0] * 7 + [0.05]))
    sites = attach(model)
    with Watch(*(s.experts for s in sites)) as watch:
        seen = record(model, sites)
    assert any(bool((s.expert_ids == 0).any()) for s in seen), "expert 0 must occur by itself"
    skipped = [s.expert_ids == 8 for s in seen]
    assert 0 < sum(int(s.sum()) for s in skipped) < TOKENS * len(sites)
    for site, observation, skip in zip(sites, seen, skipped, strict=True):
        assert bool((observation.weights[skip] == 0).all())
        assert bool((observation.weights[~skip] > 0).all())
        best = observation.scores.softmax(-1) + site.router.balancing_biases
        assert torch.equal(observation.expert_ids[:, 0], best.argmax(-1))
        assert bool((watch.rows_given(site.experts)[skip[:, 0]] == 0).all())
        assert site.margin_known


def test_longcat_counts_tokens_that_pass_through():
    model = tiny_models.build("longcat_flash")
    seen = record(model, attach(model))
    assert max(int(s.expert_ids.max()) for s in seen) >= 8


def test_llama4_applies_weights_to_the_inputs():
    model = tiny_models.build("llama4_text")
    sites = attach(model)
    with Watch(*(s.parent for s in sites)) as watch:
        seen = record(model, sites)
    for site, observation in zip(sites, seen, strict=True):
        check_observation(site, observation)
        assert site.info.score_function == "sigmoid_topk"
        assert (site.info.n_experts, site.info.top_k, site.info.n_shared_experts) == (8, 3, 1)
        experts, x = site.experts, observation.hidden
        assert_close("scores", observation.scores, linear(x, site.router.weight), atol=1e-5)
        rebuilt = site.parent.shared_expert(x)
        for slot in range(site.info.top_k):
            chosen = observation.expert_ids[:, slot]
            scaled = x * observation.weights[:, slot, None]
            gate, up = torch.einsum("td,tdh->th", scaled, experts.gate_up_proj[chosen]).chunk(2, -1)
            rebuilt = rebuilt + torch.einsum(
                "th,thd->td", up * silu(gate), experts.down_proj[chosen]
            )
        assert_close("output", rebuilt, watch.rows_given(site.parent), atol=ATOL)


def test_jetmoe_has_an_mlp_and_an_attention_site_in_every_layer():
    model = tiny_models.build("jetmoe")
    sites = attach(model)
    places = [(s.info.layer, s.info.site) for s in sites]
    assert places == [(layer, site) for layer in range(3) for site in (0, 1)]
    assert [s.info.module.rsplit(".", 1)[1] for s in sites] == ["mlp", "experts"] * 3
    linears = [m for s in sites for m in (s.parent.input_linear, s.parent.output_linear)]
    blocks = {
        (n, site): module
        for n, layer in enumerate(model.model.layers)
        for site, module in ((0, layer.mlp), (1, layer.self_attention))
    }
    with Watch(*linears, *blocks.values()) as watch:
        seen = record(model, sites)
    for site, observation in zip(sites, seen, strict=True):
        check_observation(site, observation)
        assert (site.info.score_function, site.info.n_experts) == ("softmax", 8)
        # the experts get tokens sorted by expert: recognise each by its hidden state
        told = watch.taken[site.parent.input_linear]
        token = (told[:, None] == observation.hidden).all(-1).int().argmax(-1)
        assert torch.equal(observation.hidden[token], told)
        expert = observation.expert_ids.flatten().sort().values
        slot = observation.expert_ids[token] == expert[:, None]
        assert bool((slot.sum(-1) == 1).all())
        shares = (observation.weights[token] * slot).sum(-1, keepdim=True)
        summed = torch.zeros(TOKENS, 32).index_add(
            0, token, shares * watch.given[site.parent.output_linear]
        )
        block = blocks[(site.info.layer, site.info.site)]
        assert_close("output", summed + site.parent.bias, watch.rows_given(block), atol=ATOL)


def test_doge_is_refused_in_batches_and_where_its_sum_is_another():
    """Product keys: a token's experts depend on the others, so that one text at a time is read."""
    model = tiny_models.build("doge")
    with pytest.raises(SiteError, match=r"rows of a padded batch.*unless by capture\.record"):
        attach(model)
    sites = attach(model, alone=True)
    assert [(s.info.n_experts, s.info.score_function, s.alone) for s in sites] == [
        (16, "softmax", True)
    ] * 3
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()  # what is chosen is known, the sum as well
    assert len(attach(model, alone=True)) == 3
    model.model.layers[0].mlp.up_embed.register_forward_hook(lambda _, __, out: out.abs())
    with pytest.raises(SiteError, match=r"layers\.0\.mlp \(DogeCDMoE\).*by product keys"):
        attach(model, alone=True)


def test_layers_that_run_several_times_in_a_pass_are_refused():
    with pytest.raises(SiteError, match=r"layers\.1\.mlp .* ran 2 .*\(loops\)"):
        attach(tiny_models.build("inkling2_loop_text"))
    assert len(attach(tiny_models.build("inkling2_loop_text", loop_num_passes=1))) == 3


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_same_is_seen_under_every_experts_implementation(name):
    seen = {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model = tiny_models.build(name)
        model.set_experts_implementation(implementation)
        seen[implementation] = record(model, attach(model))
    for other in ("grouped_mm", "batched_mm"):
        for a, b in zip(seen["eager"], seen[other], strict=True):
            assert torch.equal(a.expert_ids, b.expert_ids)
            assert_close("weights", a.weights, b.weights, atol=ATOL)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_the_same_rule_is_measured_in_bfloat16(name):
    function, *_, margin = EXPECTED[name]
    for site in attach(tiny_models.build(name, dtype=torch.bfloat16)):
        assert (site.info.score_function, site.margin_known) == (function, margin)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("laguna", 1.7),
        ("beam", 1.7),
        ("minimax_m3_vl_text", 1.7),
        ("step3p7", 1.7),
        # the mean of shared and routed experts
        ("cohere2_moe", 0.5),
        # a part of the weights already
        ("deepseek_v3", 1.0),
        ("mixtral", 1.0),
        # a norm lies between, or nothing is summed
        ("gemma4_text", None),
        ("llama4_text", None),
    ],
)
def test_a_factor_after_the_sum_is_measured(name, factor):
    assert [site.factor for site in attach(tiny_models.build(name))].count(factor) >= 2


def test_a_factor_after_the_sum_is_stored(tmp_path):
    for name, factor in (("laguna", 1.7), ("deepseek_v3", None)):
        out = tmp_path / f"{name}.duckdb"
        capture.record(tiny_models.build(name), [[5, 6, 7]], out, progress=False)
        with RunReader.open(out) as run:
            told = run.info["notes"]
            told = json.loads(told) if isinstance(told, str) else told
        expected = [{"layer": layer, "site": 0, "factor": factor} for layer in (1, 2)]
        assert told.get("factor_after_sum") == (expected if factor else None)
