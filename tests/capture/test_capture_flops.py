"""Operations and weights: on paper, as they run, and as published."""

import pytest
import tiny_models
import torch
from test_capture_swap import ALL, Emptied, Top, logits_of

from capture.errors import SwapError
from capture.model.flops import counted_flops, decoder_layers, model_flops
from capture.model.selftest import attach
from capture.model.sites import find_sites
from capture.swap.routers import swap
from capture.swap.rules import NativeRule

ROWS, LENGTH = 2, 7
TOKENS = ROWS * LENGTH

# layers that mix tokens by a recurrence, a convolution or an index, whose cost has no formula
NO_FORMULA = {
    "axk2", "bailing_hybrid", "deepseek_v32", "deepseek_v4", "dots3_note_text", "glm5_next",
    "glm_moe_dsa", "granitemoehybrid", "hy_v4", "hy_v4_vl", "inkling2_text", "inkling_text",
    "jamba", "jetmoe", "kimi_linear", "lara_mini", "lfm2_moe", "minimax", "mistral_large4",
    "nemotron_h", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text", "zaya",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", [n for n in ALL if n not in NO_FORMULA])
def test_counted_operations_are_those_on_paper(name):
    model = tiny_models.build(name)
    sites = attach(model)
    paper = model_flops(model, sites)
    for rule in (NativeRule(), Emptied()):
        with swap(model, sites, rule) as swapped, counted_flops(model) as counted:
            logits_of(model)
        # whole numbers, from an average a token
        assert counted.total == round(TOKENS * paper.per_token(LENGTH, swapped.experts))
        for site in sites:
            key = (site.info.layer, site.info.site)
            n_experts = swapped.counts[key].experts_per_token * TOKENS
            experts = next(n for n, m in model.named_modules() if m is site.experts)
            router = next(n for n, m in model.named_modules() if m is site.router)
            layer = paper.layers[key[0]]
            assert counted.of(experts) == pytest.approx(n_experts * layer.expert[key], abs=0.5)
            assert counted.of(router) == TOKENS * layer.router[key]


@pytest.mark.parametrize("name", sorted(NO_FORMULA))
def test_what_has_no_formula_is_refused_and_can_be_counted(name):
    model = tiny_models.build(name)
    sites = attach(model)
    experts = {(s.info.layer, s.info.site): float(s.info.top_k) for s in sites}
    with pytest.raises(SwapError, match=r"no formula here\. Count it"):
        model_flops(model, sites).per_token(LENGTH, experts)
    with counted_flops(model) as counted:
        logits_of(model)
    assert counted.total > 0


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_experts_implementation_counts_the_same(implementation):
    model = tiny_models.build("olmoe")
    model.set_experts_implementation(implementation)
    sites = attach(model)
    with swap(model, sites, Emptied()) as swapped, counted_flops(model) as counted:
        logits_of(model)
    paper = model_flops(model, sites).per_token(LENGTH, swapped.experts)
    assert counted.total == round(TOKENS * paper)


def test_the_formulas_on_paper():
    """OLMoE: 8 d^2 of projections, 4 d a key, 2 d E of gate, 6 d d_ff an expert, 2 d V of head."""
    model = tiny_models.build("olmoe", num_key_value_heads=4)
    paper = model_flops(model, find_sites(model))
    d, d_ff, n_experts, vocabulary = 32, 48, 8, 64
    for layer in paper.layers:
        key = (layer.layer, 0)
        assert (layer.attention, layer.attention_key) == (8 * d * d, 4 * d)
        assert (layer.router[key], layer.expert[key]) == (2 * d * n_experts, 6 * d * d_ff)
        assert (layer.shared, layer.dense) == (0, 0)
    assert paper.head == 2 * d * vocabulary
    one = paper.layers[0]
    experts = {(layer, 0): 2.5 for layer in range(3)}
    free = dict.fromkeys(experts, 0.0)
    assert paper.per_token(9, experts, router=free) == paper.head + 3 * (
        one.attention + 9 * one.attention_key + 2.5 * 6 * d * d_ff
    )


def test_what_heads_save_is_what_a_model_with_fewer_heads_saves():
    """Keys and values are those of one shared head, and stay."""
    totals = {}
    for heads in (3, 4):
        model = tiny_models.build(
            "qwen3_moe", num_attention_heads=heads, num_key_value_heads=1, head_dim=8
        )
        paper = model_flops(model, attach(model))
        with counted_flops(model) as counted:
            logits_of(model)
        totals[heads] = counted.total
    saved = sum(layer.attention_heads + layer.attention_key * LENGTH for layer in paper.layers) / 4
    assert totals[4] - totals[3] == TOKENS * saved


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("mixtral", 4 / 6),  # two key heads for four
        ("dbrx", 4 / 6),  # one matrix for queries, keys and values
        # the narrow matrices before queries, keys and values are common to all heads
        ("deepseek_v3", (64 * 16 + 32 * 32) / (64 * 16 + 32 * 32 + 40 * 32 + 64 * 16)),
    ],
)
def test_heads_share_of_attention(name, share):
    model = tiny_models.build(name)
    for layer in model_flops(model, find_sites(model)).layers:
        assert layer.attention_heads / layer.attention == pytest.approx(share)


def test_shared_and_dense_blocks_are_told_apart():
    model = tiny_models.build("deepseek_v3")
    first, second, _ = model_flops(model, find_sites(model)).layers
    assert (first.dense, first.shared, first.expert) == (6 * 32 * 48, 0, {})
    assert (second.dense, second.shared) == (0, 6 * 32 * 16)


def test_counting_leaves_no_hook_behind():
    model = tiny_models.build("olmoe")
    with pytest.raises(ZeroDivisionError), counted_flops(model):
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_models_without_a_list_of_layers_are_refused_by_name():
    with pytest.raises(SwapError, match=r"layers or .* was expected in Linear"):
        decoder_layers(torch.nn.Linear(2, 2))


def published(name):
    """The configurations of three published models, on the meta device."""
    import transformers

    config = {
        "Mixtral": dict(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=8,
            num_experts_per_tok=2,
        ),
        "Olmoe": dict(
            vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
            num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
        ),
        "DeepseekV3": dict(
            vocab_size=129280, hidden_size=7168, intermediate_size=18432,
            moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=128,
            num_key_value_heads=128, n_shared_experts=1, n_routed_experts=256, kv_lora_rank=512,
            q_lora_rank=1536, qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128, n_group=8,
            topk_group=4, num_experts_per_tok=8, first_k_dense_replace=3,
        ),
    }[name]  # fmt: skip
    with torch.device("meta"):
        kind = getattr(transformers, f"{name}Config")
        return getattr(transformers, f"{name}ForCausalLM")(kind(**config))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("Mixtral", 46.703, 12.880), ("Olmoe", 6.919, 1.282), ("DeepseekV3", 671.03, 37.55)],
)
def test_published_counts_of_weights(name, total, active):
    """Design page routers.md 8.2; papers: 47B/13B, 6.9B/1.3B, 671B/37B."""
    model = published(name)
    sites = find_sites(model)
    digits = 2 if name == "DeepseekV3" else 3
    # a weight is multiplied and added once a token; attention over no keys, and no look-up
    embedding = model.get_input_embeddings().weight.numel()
    flops = model_flops(model, sites)
    for expected, count in (
        (total, {(s.info.layer, s.info.site): float(s.info.n_experts) for s in sites}),
        (active, {(s.info.layer, s.info.site): float(s.info.top_k) for s in sites}),
    ):
        weights = flops.per_token(0, count) / 2 + embedding
        assert round(weights / 1e9, digits) == expected


def test_measured_distinct_experts_of_a_decode_step():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    seen = []
    with swap(model, sites, Top(2), on_choice=lambda i, c: seen.append(c)) as swapped:
        logits_of(model, tiny_models.tokens(5, 1))
    distinct = [len(set(c.expert_ids.flatten().tolist())) for c in seen]
    assert list(swapped.distinct_experts.values()) == distinct
