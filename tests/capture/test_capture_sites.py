"""Sites are found by structure, described rightly, self-tested, or refused by name."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from torch import nn

from capture.errors import SiteError
from capture.model.forward import probe_tokens
from capture.model.hooks import tap
from capture.model.scoring import explains_choice, score_function_of
from capture.model.selftest import attach, self_test
from capture.model.sites import find_sites, layer_of

N_EXPERTS, TOP_K, WIDTH = 6, 2, 16


class Chooser(nn.Module):
    """A router of no known class."""

    def __init__(self):
        super().__init__()
        self.top_k = TOP_K
        self.lin = nn.Linear(WIDTH, N_EXPERTS, bias=False)

    def forward(self, x):
        logits = self.lin(x)
        top = logits.softmax(-1).topk(self.top_k)
        return logits, top.values, top.indices


class Workers(nn.Module):
    """Experts of no known class."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(N_EXPERTS, WIDTH, WIDTH) * 0.1)

    def forward(self, x, chosen, shares):
        return (torch.einsum("td,tkde->tke", x, self.w[chosen]) * shares[..., None]).sum(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = Chooser(), Workers()

    def forward(self, x):
        flat = x.flatten(0, 1)
        _, shares, chosen = self.router(flat)
        return x + self.experts(flat, chosen, shares).view(x.shape)


class Model(nn.Module):
    """A language model of no known class with one MoE layer between two dense ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, WIDTH)])
        self.eval()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.fixture
def model():
    return Model()


def replace_choice(model, change):
    """Let the router of a model return something else: change(logits, weights, ids)."""
    router = model.layers[1].router
    old = router.forward
    router.forward = lambda x: change(*old(x))


def test_classes_do_not_matter(model):
    (site,) = attach(model)
    assert site.info[:7] == (1, 0, "layers.1", N_EXPERTS, TOP_K, 0, "softmax")
    assert site.margin_known
    assert site.router is model.layers[1].router
    assert site.experts is model.layers[1].experts


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.11.mlp", 11),
        ("transformer.blocks.3.ffn", 3),
        ("base_model.model.model.layers.7.block_sparse_moe", 7),
        ("model.language_model.layers.2.mlp.text_moe", 2),
        ("transformer.h.4.moe", 4),
        ("backbone.5.moe.2.mlp", 5),
        ("moe", 0),
    ],
)
def test_layer_of(module, layer):
    assert layer_of(module) == layer


def test_a_dense_model_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=32,
    )  # fmt: skip
    with pytest.raises(SiteError, match="LlamaForCausalLM has no MoE layers"):
        find_sites(LlamaForCausalLM(config))


def test_an_encoder_is_refused():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=32,
    )  # fmt: skip
    with pytest.raises(SiteError, match="BertModel has no MoE layers"):
        find_sites(BertModel(config))


def test_encoder_decoders_are_refused():
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        d_model=16, d_kv=8, d_ff=16, num_layers=2, num_sparse_encoder_layers=1,
        num_decoder_layers=2, num_sparse_decoder_layers=1, num_heads=2, num_experts=4,
        vocab_size=32,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config)
    with pytest.raises(SiteError, match=r"SwitchTransformers\w+ is an encoder-decoder"):
        find_sites(model)


def test_nllb_is_refused():
    from transformers import NllbMoeConfig, NllbMoeModel

    config = NllbMoeConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_experts=4,
        encoder_sparse_step=2, decoder_sparse_step=2, vocab_size=32,
    )  # fmt: skip
    with pytest.raises(SiteError, match="NllbMoeModel is an encoder-decoder"):
        find_sites(NllbMoeModel(config))


def test_a_list_of_experts_is_refused_by_name(model):
    model.layers[1].experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(N_EXPERTS))
    with pytest.raises(SiteError, match=r"layers\.1 \(Block\) routes to experts, but no place"):
        find_sites(model)


def test_one_unknown_block_refuses_the_whole_model(model):
    model.layers.append(nn.ModuleDict({"router": nn.Linear(WIDTH, 4), "work": nn.Identity()}))
    with pytest.raises(SiteError, match=r"layers\.3 \(ModuleDict\)"):
        find_sites(model)


def test_stacks_that_text_does_not_run_are_left_out(model):
    model.visual = nn.ModuleList([Block()])
    assert [s.info.module for s in attach(model)] == ["layers.1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, w, i: (z, w, i.new_zeros(i.shape)), "distinct ids in a token"),
        (lambda z, w, i: (z, -w, i), "finite weights >= 0, got -"),
        (lambda z, w, i: (z, w * torch.nan, i), "finite weights >= 0, got nan"),
        (lambda z, w, i: (z, w, i - 1 - 2 * (i == 0)), "ids from 0 to 5, got -3"),
        (lambda z, w, i: (z, w, i - (i == 0).long()), "weight 0 in an empty slot"),
        (lambda z, w, i: (z, w[:, :1], i[:, :1]), r"shape \[rows, 2\].*\[64, 1\]"),
        (lambda z, w, i: (z[:, :5], w, i), None),
        (lambda z, w, i: (z * torch.nan, w, i), "finite router scores"),
    ],
)
def test_the_self_test_refuses_by_name(model, change, message):
    replace_choice(model, change)
    if message is None:
        # no tensor of the router looks like scores: they are not known, the rest is right
        (site,) = attach(model)
        assert (site.info.score_function, site.margin_known) == ("other", False)
        return
    with pytest.raises(SiteError, match=rf"layers\.1: .*{message}"):
        attach(model)


def test_weights_spread_over_all_experts_are_no_scores(model):
    """They sum to 1 like probabilities; entropy and margin of them would be invented."""
    replace_choice(model, lambda z, w, i: (torch.zeros_like(z).scatter(1, i, w / w.sum()), w, i))
    (site,) = attach(model)
    assert (site.info.score_function, site.margin_known) == ("other", False)
    with tap([site]) as taps, torch.no_grad():
        model(probe_tokens(model))
        (seen,) = taps.take()
    assert seen.scores is None
    assert seen.expert_ids.shape == (64, TOP_K)


def test_physical_ids_are_refused(model):
    """As a server tells experts that it has placed: the router scores them under other numbers."""
    physical = torch.tensor([2, 0, 1, 3, 5, 4])
    replace_choice(model, lambda z, w, i: (z, w, physical[i]))
    with pytest.raises(SiteError, match=r"layers\.1: .*\(5 of 6 moved\): physical ids"):
        attach(model)


def test_ids_out_of_range_are_refused(model):
    replace_choice(model, lambda z, w, i: (z, w, i + (i == 5) * 3))
    model.layers[1].experts.forward = lambda x, i, w: x
    with pytest.raises(SiteError, match=r"layers\.1: .*ids from 0 to 5, got 0 to 8"):
        attach(model)


def test_a_choice_that_scores_do_not_explain_has_no_margin(model):
    replace_choice(model, lambda z, w, i: (z, z.softmax(-1).gather(1, (i + 1) % 6), (i + 1) % 6))
    (site,) = attach(model)
    assert (site.info.score_function, site.margin_known) == ("softmax", False)


def test_groups_and_biases_that_are_switched_off_are_not_reported():
    greedy = tiny_models.build("deepseek_v2", topk_method="greedy")
    assert all(s.margin_known and s.n_groups is None for s in attach(greedy))
    unbiased = tiny_models.build("lfm2_moe", use_expert_bias=False)
    assert all(s.margin_known and s.selection_bias is None for s in attach(unbiased))


def test_a_bias_stays_when_groups_are_switched_off():
    model = tiny_models.build("minimax_m2")
    grouped = [replace(s, n_groups=4, top_groups=2) for s in find_sites(model)]
    for site in self_test(model, grouped):
        assert site.margin_known and site.n_groups is None and site.selection_bias is not None


def test_an_empty_hash_table_is_refused():
    """DeepSeek-V4's first layers look experts up; an unfilled table names expert 0 three times."""
    model = tiny_models.build("deepseek_v4")
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            table.zero_()
    with pytest.raises(SiteError, match=r"layers\.0\.mlp: .*distinct ids in a token"):
        attach(model)


def test_the_self_test_leaves_random_generators_alone(model):
    before = torch.get_rng_state()
    attach(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_probe_tokens_avoid_special_ids():
    model = tiny_models.build("mixtral", max_position_embeddings=8)
    ids = probe_tokens(model)
    assert ids.shape == (4, 8)
    assert not set(ids.flatten().tolist()) & {0, 1, 2}
    assert torch.equal(ids, probe_tokens(model))


def choose(values, k=3, dtype=torch.float32):
    top = values.topk(k)
    return top.indices, top.values.to(dtype)


LOGITS = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)) * 2
NORMED = LOGITS.sigmoid() / LOGITS.sigmoid().sum(-1, keepdim=True)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("scores", "values", "scale", "label"),
    [
        (LOGITS, LOGITS.softmax(-1), 1.0, "softmax"),
        (LOGITS, LOGITS.softmax(-1), 2.5, "softmax"),
        (LOGITS, LOGITS.sigmoid(), 1.0, "sigmoid"),
        (LOGITS, NORMED, 16.0, "sigmoid"),
        (LOGITS, LOGITS.sigmoid().sqrt(), 1.0, "other"),
        (LOGITS.softmax(-1), LOGITS.softmax(-1), 1.0, "probabilities"),
    ],
)
def test_score_function_is_measured(scores, values, scale, label, half):
    ids, weights = choose(values * scale, dtype=torch.bfloat16 if half else torch.float32)
    assert score_function_of(scores, ids, weights.float(), half=half) == label


def test_the_sigmoid_of_one_expert_is_told_from_a_softmax():
    """With one expert a token only a factor per site may be fitted."""
    ids, weights = choose(LOGITS.sigmoid(), k=1)
    assert score_function_of(LOGITS, ids, weights, half=False) == "sigmoid"
    assert score_function_of(LOGITS, ids, torch.ones_like(weights), half=False) == "other"


def test_explains_choice_uses_bias_and_groups():
    bias = torch.linspace(-1, 1, 8)
    ids = (LOGITS.sigmoid() + bias).topk(3).indices
    none = (None, None)
    assert explains_choice(LOGITS, ids, "sigmoid", selection_bias=bias, groups=none)
    assert not explains_choice(LOGITS, ids, "sigmoid", selection_bias=None, groups=none)
    assert not explains_choice(LOGITS, ids, "other", selection_bias=bias, groups=none)
    plain = LOGITS.topk(3).indices
    assert explains_choice(LOGITS, plain, "other", selection_bias=None, groups=none)


def test_rounding_excuses_a_few_tokens_only():
    """Two experts score nearly alike; in 16 bits a router may take either, but not at random."""
    scores = torch.zeros(64, 4).index_fill(1, torch.tensor([0]), 1e-3)
    options = {"selection_bias": None, "groups": (None, None)}
    for swapped, half, explained in [(2, True, True), (2, False, False), (32, True, False)]:
        ids = torch.zeros(64, 1, dtype=torch.long)
        ids[:swapped] = 1
        assert explains_choice(scores, ids, "sigmoid", **options, half=half) == explained


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("mixtral", "softmax"),
        ("cohere2_moe", "sigmoid"),
        ("deepseek_v3", "sigmoid"),
        ("minimax_m2", "sigmoid"),
    ],
)
def test_the_share_of_one_expert_is_told_by_its_choice_or_its_code(name, function):
    """Renormalised top-1 weights are all one, whatever the function; a bias tells by the choice."""
    sites = attach(tiny_models.build(name, num_experts_per_tok=1))
    assert {(s.info.score_function, s.margin_known) for s in sites} == {(function, True)}
