"""Models inside adapters, offloaded, without a cache, of other kinds: recorded exactly or refused.

Where a model is recorded, its ids and weights are what its experts were told.
"""

import types
import warnings

import accelerate
import duckdb
import pytest
import tiny_models
import torch
import transformers
from torch import nn

import capture
import capture.model.inputs
from capture.errors import ModelError, SiteError, SwapError
from capture.model.load import load_model
from capture.model.selftest import attach
from capture.model.sites import find_sites
from capture.swap.routers import swap
from capture.swap.rules import Choice

pytestmark = pytest.mark.slow

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import peft

PROMPTS = [[5, 6, 7, 9], [8, 9]]


def wrapped(model, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in an old way
        return peft.get_peft_model(model, config).eval()


def told(model, experts, prompts=PROMPTS):
    """Return what each experts module is told of each prompt alone: {token: {expert: weight}}."""
    found = []
    for module in experts:
        seen = []
        handle = module.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append((args[1].tolist(), args[2].tolist()))
        )
        with torch.inference_mode():
            for prompt in prompts:
                model(input_ids=torch.tensor([prompt]))
        handle.remove()
        rows = [row for ids, weights in seen for row in zip(ids, weights, strict=True)]
        found.append([dict(zip(*row, strict=True)) for row in rows])
    return found


def recorded(model, out, prompts=PROMPTS, **options):
    """Return the sites of a new run, and what it holds in the form of :func:`told`."""
    capture.record(model, prompts, out, progress=False, **options)
    with duckdb.connect(str(out), read_only=True) as run:
        sites = run.execute("select module, n_experts from sites order by layer").fetchall()
        rows = run.execute(
            "select layer, token_id, list(expert_id), list(weight) from assignments "
            "group by all order by layer, token_id"
        ).fetchall()
    found = [[dict(zip(ids, weights, strict=True)) for at, _, ids, weights in rows if at == layer]
             for layer in sorted({row[0] for row in rows})]  # fmt: skip
    return sites, found


def check_told(model, out, experts):
    """Assert that a run of ``model`` holds what its experts are told; return its sites."""
    expected = told(model, experts)
    sites, found = recorded(model, out)
    assert [len(rows) for rows in found] == [len(rows) for rows in expected]
    for rows, right in zip(found, expected, strict=True):
        for row, answer in zip(rows, right, strict=True):
            assert row == pytest.approx(answer, rel=1e-2)  # stored as float16
    return sites


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]},
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "gate.weight"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["experts"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_adapters_on_parts_of_a_block(options, tmp_path):
    model = wrapped(tiny_models.build("mixtral"), **options)
    blocks = [layer.mlp for layer in model.base_model.model.model.layers]
    sites = check_told(model, tmp_path / "run.duckdb", [block.experts for block in blocks])
    assert [count for _, count in sites] == [8] * 3


def test_a_block_with_a_trained_copy_is_one_site(tmp_path):
    model = wrapped(
        tiny_models.build("mixtral"), target_modules=["q_proj"], modules_to_save=["mlp"]
    )
    copies = [layer.mlp.modules_to_save["default"] for layer in model.base_model.model.model.layers]
    with torch.no_grad():
        for copy in copies:
            copy.gate.weight.normal_(0, 0.5)
    sites = check_told(model, tmp_path / "run.duckdb", [copy.experts for copy in copies])
    assert [name.rsplit(".mlp", 1)[1] for name, _ in sites] == [".modules_to_save.default"] * 3
    with model.disable_adapter():
        assert [s.info.module.rsplit(".", 1)[1] for s in attach(model)] == ["original_module"] * 3


def test_a_selection_bias_inside_an_adapter_is_found():
    model = wrapped(
        tiny_models.build("deepseek_v3"), target_modules=[], target_parameters=["gate.weight"]
    )
    plain = attach(tiny_models.build("deepseek_v3"))
    for site, bare in zip(attach(model), plain, strict=True):
        assert torch.equal(site.selection_bias, bare.selection_bias)
        assert (site.n_groups, site.top_groups) == (bare.n_groups, bare.top_groups)
        assert site.margin_known
        assert site.info[2:] != bare.info[2:]  # under another name
        assert site.info._replace(module="") == bare.info._replace(module="")


def test_a_rule_takes_the_place_of_an_adapted_router():
    model = wrapped(
        tiny_models.build("mixtral"), target_modules=[], target_parameters=["gate.weight"]
    )

    class Native:
        def route(self, inputs):
            assert inputs.gate_weight is None  # the matrix inside is not what scores
            return Choice(*inputs.native)

    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        with swap(model, None, Native()):
            assert torch.equal(model(input_ids=ids).logits, expected)


def test_padded_generation_inside_an_adapter_is_that_of_the_model(tmp_path):
    """An adapter's forward takes anything, which hides that the model takes positions."""

    def tokens(model, name):
        capture.record(model, PROMPTS, tmp_path / name, generate=3, progress=False)
        with duckdb.connect(str(tmp_path / name), read_only=True) as run:
            return run.execute("select prompt_id, position, token, loss from tokens").fetchall()

    def plain():
        return tiny_models.build("mixtral", eos_token_id=None)

    model = wrapped(plain(), target_modules=["q_proj"])
    with model.disable_adapter():
        assert tokens(model, "wrapped.duckdb") == tokens(plain(), "plain.duckdb")


def test_llama4_experts_inside_an_adapter_are_recorded_but_not_swapped():
    model = wrapped(
        tiny_models.build("llama4_text"), target_modules=[],
        target_parameters=["experts.down_proj"],
    )  # fmt: skip
    sites = attach(model)
    with pytest.raises(SwapError, match="Merge the adapter"), swap(model, sites, object()):
        pass


class ListBlock(nn.Module):
    """A block of transformers 4, as code that comes with models has it."""

    def __init__(self, gate="gate", experts="experts"):
        super().__init__()
        self.names = gate, experts
        self.top_k, self.num_experts = 2, 8
        setattr(self, gate, nn.Linear(32, 8, bias=False))
        setattr(self, experts, nn.ModuleList([nn.Linear(32, 32) for _ in range(8)]))

    def forward(self, hidden):
        gate, experts = (getattr(self, name) for name in self.names)
        weights, ids = gate(hidden).softmax(-1).topk(2, -1)
        every = torch.stack([expert(hidden) for expert in experts], -2)
        chosen = every.gather(-2, ids[..., None].expand(*ids.shape, 32))
        return (chosen * weights[..., None]).sum(-2)


class TensorBlock(nn.Module):
    """The same with stacked weights and a matrix [D, E]."""

    def __init__(self):
        super().__init__()
        self.wg = nn.Parameter(torch.randn(32, 8))
        self.w1 = nn.Parameter(torch.randn(8, 32, 32))

    def forward(self, hidden):
        gates = (hidden @ self.wg).softmax(-1)
        return torch.einsum("bsd,edf,bse->bsf", hidden, self.w1, gates)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (ListBlock(), r"mlp \(ListBlock\) routes.*its experts are a list of modules"),
        (ListBlock("wg", "ffn_list"), r"ffn_list holds 8 parts of one shape beside .*wg\.weight"),
        (ListBlock("score", "local_experts"), r"local_experts holds 8 parts of one shape"),
        (TensorBlock(), r"w1 holds 8 parts of one shape beside .*wg"),
    ],
    ids=lambda value: getattr(value, "names", value if isinstance(value, str) else "tensors"),
)
def test_an_unknown_block_beside_known_ones_is_refused(block, message, tmp_path):
    model = tiny_models.build("mixtral")
    model.model.layers[1].mlp = block.eval()
    with pytest.raises(SiteError, match=message):
        capture.record(model, PROMPTS, tmp_path / "run.duckdb", progress=False)
    assert not list(tmp_path.iterdir())


def flipped(tensor):
    return tensor.flip(1)


def transposed(tensor):
    return tensor.transpose(0, 1).contiguous()


@pytest.mark.parametrize("order", [transposed, flipped])
@pytest.mark.parametrize("layer", [0, 2])
def test_rows_in_another_order_are_refused(order, layer):
    model = tiny_models.build("mixtral")
    block = model.model.layers[layer].mlp
    plain = block.forward
    block.forward = lambda hidden: order(plain(order(hidden)))
    with pytest.raises(SiteError, match=rf"layers\.{layer}\.mlp: the rows of a padded batch"):
        attach(model)


def test_rows_without_padding_are_refused():
    model = tiny_models.build("mixtral")
    masks = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    block = model.model.layers[0].mlp
    plain = block.forward

    def unpadded(hidden):
        real = masks[-1].bool()
        out = torch.zeros_like(hidden)
        out[real] = plain(hidden[real][None])[0]
        return out

    block.forward = unpadded
    with pytest.raises(SiteError, match=r"ids of shape \[64, 3\] with padding, got \[5\d, 3\]"):
        attach(model)


def test_experts_told_of_rows_in_another_order_than_the_router_are_refused():
    model = tiny_models.build("mixtral")
    experts = model.model.layers[1].mlp.experts
    plain = experts.forward

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = experts

        def forward(self, hidden, ids, weights):
            order = ids[:, 0].sort(stable=True).indices
            out = torch.empty_like(hidden)
            out[order] = plain(hidden[order], ids[order], weights[order])
            return out

    attach(model)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def shuffle(_, args):
        mixed = order[order < len(args[1])]
        return args[0], args[1][mixed], args[2][mixed]

    experts.register_forward_pre_hook(shuffle)
    with pytest.raises(SiteError, match=r"layers\.1\.mlp: the rows of a padded batch"):
        attach(model)


def test_an_encoder_that_sees_later_tokens_is_still_tested():
    assert len(attach(tiny_models.build("openai_privacy_filter"))) == 3


@pytest.mark.parametrize("kind", ["disk", "cpu"])
def test_offloaded_models_are_recorded(kind, tmp_path):
    expected = recorded(tiny_models.build("mixtral"), tmp_path / "plain.duckdb", generate=2)
    model = tiny_models.build("mixtral")
    if kind == "disk":
        accelerate.disk_offload(model, tmp_path / "weights", execution_device="cpu")
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    assert model.get_input_embeddings().weight.is_meta
    assert recorded(model, tmp_path / "run.duckdb", generate=2) == expected


class Forgetful(transformers.MixtralForCausalLM):
    """A model that keeps no cache."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **_):
        return super().forward(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )


class Blank(transformers.MixtralForCausalLM):
    """A model that hands back a cache without anything in it."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **_):
        out = super().forward(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        out.cache = transformers.DynamicCache()
        return out


@pytest.mark.parametrize("kind", [Forgetful, Blank])
def test_models_without_a_cache_generate_what_others_do(kind, tmp_path):
    def build(model_class):
        torch.manual_seed(0)
        config = tiny_models.config_of("mixtral", eos_token_id=None)
        return tiny_models.randomise(model_class(config)).eval()

    def run_of(model, name):
        capture.record(model, PROMPTS, tmp_path / name, generate=4, progress=False)
        with duckdb.connect(str(tmp_path / name), read_only=True) as run:
            tokens = run.execute(
                "select prompt_id, position, phase, token from tokens order by all"
            ).fetchall()
            routes = run.execute(
                "select token_id, layer, slot, expert_id from assignments order by all"
            ).fetchall()
        return tokens, routes

    assert run_of(build(kind), "a.duckdb") == run_of(
        build(transformers.MixtralForCausalLM), "b.duckdb"
    )


class Unmasked(transformers.MixtralForCausalLM):
    """A model that keeps no cache and looks at no mask."""

    def forward(self, input_ids=None, **_):
        return super().forward(input_ids, use_cache=False)


def test_a_model_that_heeds_no_padding_decodes_prompts_of_one_length_together(tmp_path):
    torch.manual_seed(0)
    config = tiny_models.config_of("mixtral", eos_token_id=None)
    model = tiny_models.randomise(Unmasked(config)).eval()
    prompts = [[5, 6, 7, 9, 12], [8, 9], [10, 11, 13, 14, 15], [20, 21, 22]]
    out = tmp_path / "run.duckdb"
    capture.record(model, prompts, out, generate=3, progress=False)
    right = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(3):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        right.append(ids)
    with duckdb.connect(str(out), read_only=True) as run:
        rows = run.execute(
            "select list(token order by position) from tokens group by prompt_id order by prompt_id"
        ).fetchall()
        notes = run.execute("select notes from run").fetchone()[0]
    assert [ids for (ids,) in rows] == right
    assert "does not heed padding" in notes


class Forgetful(transformers.MixtralForCausalLM):
    """Heeds the mask while it reads, and not while it writes."""

    def forward(self, input_ids=None, attention_mask=None, **arguments):
        mask = attention_mask if input_ids.shape[1] > 1 else None
        return super().forward(input_ids=input_ids, attention_mask=mask, **arguments)


def test_a_cache_that_depends_on_padding_decodes_prompts_of_one_length_together(tmp_path):
    model = tiny_models.build("mixtral", eos_token_id=None)
    model.__class__ = Forgetful
    prompts = [[5, 6, 7, 9, 12], [8, 9]]
    runs = {}
    for name, given in (("both", prompts), ("one", prompts[1:])):
        out = tmp_path / f"{name}.duckdb"
        capture.record(model, given, out, generate=3, progress=False)
        with duckdb.connect(str(out), read_only=True) as run:
            runs[name] = run.execute(
                "select position, layer, slot, expert_id from assignments join tokens using "
                "(token_id) where prompt_id = (select max(prompt_id) from prompts) order by all"
            ).fetchall()
            notes = run.execute("select notes from run").fetchone()[0]
        assert ("does not heed padding" in notes) == (name == "both")
    assert runs["both"] == runs["one"]


@pytest.mark.parametrize(("name", "differs"), [("minimax", True), ("mixtral", False)])
def test_a_cache_that_computes_otherwise_is_noted(name, differs, tmp_path):
    model = tiny_models.build(name)
    out = tmp_path / "run.duckdb"
    capture.record(model, [[5, 6, 7, 9, 12]], out, generate=2, progress=False)
    with duckdb.connect(str(out), read_only=True) as run:
        notes = run.execute("select notes from run").fetchone()[0]
    assert ("computes otherwise than when it reads" in notes) == differs


class Older(transformers.MixtralForCausalLM):
    """Names its cache as transformers did before 5.24."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **rest
    ):
        assert "cache" not in rest
        output = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            cache=past_key_values, **rest,
        )  # fmt: skip
        return types.SimpleNamespace(logits=output.logits, past_key_values=output.cache)


def test_a_cache_under_its_old_name_is_used(tmp_path):
    found = {}
    for kind in (transformers.MixtralForCausalLM, Older):
        model = tiny_models.build("mixtral", eos_token_id=None)
        model.__class__ = kind
        out = tmp_path / f"{kind.__name__}.duckdb"
        capture.record(model, PROMPTS, out, generate=3, progress=False)
        with duckdb.connect(str(out), read_only=True) as run:
            found[kind] = run.execute("select token_id, token from tokens order by 1").fetchall()
            (steps,) = run.execute(
                "select sum(tokens) from batches where phase = 'generated'"
            ).fetchone()
        assert steps == 3 * len(PROMPTS)
    assert found[Older] == found[transformers.MixtralForCausalLM]


class Restless(transformers.MixtralForCausalLM):
    """Decodes rightly in `generate` only, where it is told the token's place by its own means."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs) | {"place": True}

    def forward(self, input_ids=None, attention_mask=None, place=False, **arguments):
        if not place and input_ids.shape[1] == 1:
            input_ids = input_ids * 0 + 1
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **arguments)


def test_decoding_that_is_not_the_models_own_is_refused(tmp_path):
    model = tiny_models.build("mixtral")
    model.__class__ = Restless
    capture.record(model, [[5, 6, 7]], tmp_path / "read.duckdb", progress=False)
    with pytest.raises(SiteError, match=r"Restless token by token .* it gives neither"):
        capture.record(model, [[5, 6, 7]], tmp_path / "run.duckdb", generate=2, progress=False)
    assert not (tmp_path / "run.duckdb").exists()


def test_one_expert_is_recorded_without_an_invented_number(tmp_path):
    model = tiny_models.build("mixtral", num_local_experts=1, num_experts_per_tok=1)
    sites, found = recorded(model, tmp_path / "run.duckdb")
    assert [count for _, count in sites] == [1] * 3
    assert found == [[{0: 1.0}] * 6] * 3
    with duckdb.connect(str(tmp_path / "run.duckdb"), read_only=True) as run:
        gates = run.execute("select distinct entropy, topk_mass, margin from gates").fetchall()
    assert gates == [(0.0, 1.0, None)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("MixtralForTokenClassification", {}, "puts out 2 scores a token"),
        ("MixtralForTokenClassification", {"num_labels": 64}, "puts out 64 scores a token"),
        ("Qwen3MoeForSequenceClassification", {}, r"logits of shape \[1, 2\]"),
        ("MixtralForQuestionAnswering", {}, "puts out no logits"),
        ("MixtralModel", {}, "puts out no logits"),
        ("OpenAIPrivacyFilterForTokenClassification", {}, "scores a token"),
    ],
)
def test_models_that_predict_no_words_are_refused(name, options, message, tmp_path):
    kind = getattr(transformers, name)
    family = next(f for f in ("mixtral", "qwen3_moe", "openai_privacy_filter")
                  if kind.config_class is tiny_models.class_of(f).config_class)  # fmt: skip
    torch.manual_seed(0)
    model = kind(tiny_models.config_of(family, **options)).eval()
    with pytest.raises(ModelError, match=rf"A causal language model was expected.*{message}"):
        capture.record(model, [[5, 46, 57], [8, 60]], tmp_path / "run.duckdb", progress=False)
    assert not list(tmp_path.iterdir())


def omni():
    """Return a model that also hears, sees and talks."""
    kind = transformers.Qwen3OmniMoeForConditionalGeneration
    config = kind.config_class(enable_audio_output=False)
    thinker = config.thinker_config
    small = {
        "vocab_size": 96, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    tower = {
        "depth": 1, "encoder_layers": 1, "d_model": 32, "encoder_attention_heads": 4,
        "encoder_ffn_dim": 32, "hidden_size": 32, "num_heads": 4, "intermediate_size": 32,
        "out_hidden_size": 32, "output_dim": 32, "downsample_hidden_size": 8,
    }  # fmt: skip
    for part, sizes in (
        (thinker.text_config, small), (thinker.vision_config, tower), (thinker.audio_config, tower)
    ):  # fmt: skip
        for name, value in sizes.items():
            if hasattr(part, name):
                setattr(part, name, value)
    torch.manual_seed(0)
    model = kind(config).eval()
    thinker.vision_start_token_id = 93
    return model


def test_omni_is_recorded_through_its_thinker(tmp_path):
    model = omni()
    experts = [layer.mlp.experts for layer in model.thinker.model.language_model.layers]
    expected = told(model.thinker, experts)
    sites, found = recorded(model, tmp_path / "run.duckdb")
    assert [count for _, count in sites] == [8, 8]
    assert [[set(row) for row in rows] for rows in found] == [
        [set(row) for row in rows] for rows in expected
    ]
    model.save_pretrained(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", device="cpu").model
    assert type(loaded) is type(model.thinker)
    assert len(find_sites(loaded)) == 2


def test_a_model_without_an_embedding_of_tokens_is_refused():
    class Nothing(nn.Module):
        config = None

    with pytest.raises(ModelError, match="Nothing has no embedding of tokens"):
        capture.model.inputs.vocabulary(Nothing())
