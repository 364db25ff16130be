"""Recorded attention is the model's own: against the weights that its eager function shows."""

import functools

import numpy as np
import pytest
import tiny_models
import torch
from test_capture_session import record, table, unequal

from capture.errors import ConfigError, SiteError
from capture.model.load import load_model
from capture.model.selftest import attach
from capture.model.sites import find_sites
from capture.recorder.attention.layers import attach_attention
from capture.recorder.attention.summary import (
    AttentionOptions,
    AttentionTaps,
    PromptRow,
    listen,
)
from capture.recorder.estimate import choose_attended
from capture.store import RunReader

pytestmark = pytest.mark.slow

# the run file rounds shares of a map to 4e-6; sums of float32 do the rest
EXACT = 1e-5
RECENT = 16  # written down again: what the README says

# sinks and a window; sinks pull only when they are not near 0
TINY = {
    "mixtral": {"sliding_window": None},
    "mixtral-window": {"sliding_window": 9},
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 8},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "minimax": {},
    "deepseek_v3": {},
    "phimoe": {"sliding_window": 7},
}
EAGER_ONLY = {"gpt_oss"}


@functools.cache
def model_of(name, implementation):
    kind = name.split("-")[0]
    model = tiny_models.build(kind, attn_implementation=implementation, **TINY[name])
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith("sinks"):
                tensor.normal_(1.0, 1.0, generator=torch.Generator().manual_seed(1))
    return model


@functools.cache
def demo(implementation):
    model = load_model("demo").model
    model.set_attn_implementation(implementation)
    return model


def eager_weights(model, prompt):
    """Return {layer: weights [H, T, T]} of one prompt alone, as the model itself shows them."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            shown = model(
                input_ids=torch.tensor([prompt]), output_attentions=True, use_cache=False
            ).attentions
    finally:
        model.set_attn_implementation(before)
    # layers without attention show nothing; recorded ones are found by their shape
    return [None if w is None else w[0].double().numpy() for w in shown]


def expected(weights, bins):
    """Summarise weights [H, T, T] in plain numpy, one head and one query at a time."""
    n_heads, length, _ = weights.shape
    width = 1
    while -(-length // width) > bins:
        width *= 2
    n = -(-length // width)
    out = {name: np.zeros(n_heads) for name in ("entropy", "sink_mass", "mean_distance", "recent")}
    maps, received = np.zeros((n_heads, n, n)), np.zeros((n_heads, n))
    for head in range(n_heads):
        for query in range(length):
            row = weights[head, query]
            seen = row[row > 0]
            distance = query - np.arange(length)
            out["entropy"][head] -= (seen * np.log(seen)).sum() / length
            out["sink_mass"][head] += row[0] / length
            out["mean_distance"][head] += (row * distance).sum() / length
            out["recent"][head] += row[(distance >= 0) & (distance < RECENT)].sum() / length
            np.add.at(maps[head, query // width], np.arange(length) // width, row)
            np.add.at(received[head], np.arange(length) // width, row)
    return out, maps / maps.sum(axis=-1, keepdims=True), received


def check_run(path, model, prompts, *, bins=64, layers=None, heads=None):
    """Compare everything that a run says about attention with the eager weights."""
    with RunReader.open(path) as run:
        check_answers(lambda sql: run.query(sql).to_pydict(), model, prompts, bins, layers, heads)


def check_answers(ask, model, prompts, bins, layers, heads):
    """Compare what an open run answers, each table asked for once and parted here."""
    kept = ask("SELECT * FROM attention_prompts ORDER BY prompt_id")
    sites = ask("SELECT * FROM attention_layers WHERE kind = 'attention' ORDER BY layer")
    all_stats, all_maps, all_received = (
        parted(ask(f"SELECT * FROM {name} ORDER BY head"), "prompt_id", "layer")
        for name in ("attention_stats", "attention_maps", "attention_received")
    )
    keys = parted(ask("SELECT * FROM attention_top_keys"), "token_id", "layer")
    chosen = [layer for layer in sites["layer"] if layers is None or layer in layers]
    first = np.concatenate([[0], np.cumsum([len(p) for p in prompts])])
    assert kept["prompt_id"] and chosen
    for prompt_id, tokens in zip(kept["prompt_id"], kept["tokens"], strict=True):
        prompt = prompts[prompt_id]
        assert tokens == len(prompt)
        shown = eager_weights(model, prompt)
        if len(shown) > len(sites["layer"]):  # a model that shows its other layers as well
            shown = [shown[layer] for layer in sites["layer"]]
        for layer, weights in zip(sites["layer"], shown, strict=True):
            if layer not in chosen:
                assert (prompt_id, layer) not in all_stats
                continue
            stats, found = all_stats[prompt_id, layer], all_maps[prompt_id, layer]
            assert stats["head"] == list(range(len(weights)) if heads is None else heads)
            weights = weights[stats["head"]]
            want, maps, received = expected(weights, bins)
            assert set(stats["queries"]) == {len(prompt)}
            for name, column in zip(
                want, ("entropy", "sink_mass", "mean_distance", "window_mass"), strict=True
            ):
                np.testing.assert_allclose(stats[column], want[name], atol=EXACT, rtol=EXACT)
            got = np.array(found["map"]).reshape(-1, found["bins"][0], found["bins"][0])
            np.testing.assert_allclose(got, maps, atol=EXACT)
            np.testing.assert_allclose(got.sum(axis=-1), 1, atol=1e-6)
            got = all_received[prompt_id, layer]["received"]
            np.testing.assert_allclose(got, received, atol=EXACT * len(prompt))
            for query in range(len(prompt)):
                rows = keys[first[prompt_id] + query, layer]
                check_keys(rows, weights[:, query], stats["head"], first[prompt_id])


def parted(rows, *by):
    """Part the rows of a table {column: values} by what they say in some columns."""
    found = {}
    for at, place in enumerate(zip(*(rows[name] for name in by), strict=True)):
        found.setdefault(place, []).append(at)
    return {
        place: {name: [column[at] for at in places] for name, column in rows.items()}
        for place, places in found.items()
    }


def check_keys(rows, weights, heads, first):
    """Compare one token's heaviest keys of weights [H, T]; equal weights may come in any order."""
    query = rows["token_id"][0] - first
    assert len(rows["rank"]) == len(heads) * min(4, query + 1)
    for head, rank, key, weight in zip(
        *(rows[c] for c in ("head", "rank", "key_token_id", "weight")), strict=True
    ):
        row = weights[heads.index(head)]
        assert abs(row[key - first] - weight) < 1e-3
        assert abs(np.sort(row)[::-1][rank] - weight) < 1e-3


IMPLEMENTATIONS = [
    (name, implementation)
    for name in TINY
    for implementation in ("sdpa", "eager")
    if name not in EAGER_ONLY or implementation == "eager"
]


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_attention_equals_the_eager_weights(tmp_path, name, implementation):
    model, prompts = model_of(name, implementation), unequal(5, longest=31)
    path = record(model, prompts, tmp_path / "a.duckdb", level="attention", attention_bins=8)
    check_run(path, model, prompts, bins=8)


def test_attention_of_the_demo_model(tmp_path):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 6000, length).tolist() for length in (150, 40, 3)]
    path = record(demo("sdpa"), prompts, tmp_path / "a.duckdb", level="attention")
    check_run(path, demo("sdpa"), prompts)


def test_flash_functions_get_a_rule_instead_of_a_mask(tmp_path, monkeypatch):
    """The flash kernels need a GPU; this one computes the same and is called the same way."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks = []

    def flash(module, query, key, value, mask, scaling, sliding_window=None, **_):
        masks.append(None if mask is None else mask.ndim)
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
        place = torch.arange(query.shape[2])
        distance = place[:, None] - place
        seen = (distance >= 0) & (distance < (sliding_window or len(place)))
        if mask is not None:
            seen = seen & mask[:, None, None].bool()
        scores = (query @ key.mT * scaling).masked_fill(~seen, torch.finfo(query.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    model, prompts = tiny_models.build("mixtral", sliding_window=9), unequal(4, longest=31)
    model.config._attn_implementation = "flash_attention_2"
    path = record(model, prompts, tmp_path / "a.duckdb", level="attention")
    assert 2 in masks
    assert model.config._attn_implementation == "flash_attention_2"
    model.config._attn_implementation = "sdpa"
    check_run(path, model, prompts)


def test_attention_while_decoding_is_that_of_the_prompt(tmp_path):
    model, prompts = model_of("mixtral", "sdpa"), unequal(4, longest=21)
    path = record(model, prompts, tmp_path / "a.duckdb", level="attention", generate=3)
    check_run(path, model, prompts)
    phase = "SELECT DISTINCT phase FROM attention_top_keys JOIN tokens USING (token_id)"
    assert table(path, phase) == {"phase": ["prompt"]}


def test_layers_heads_and_prompts_can_be_limited(tmp_path):
    model, prompts = model_of("mixtral", "sdpa"), unequal(9, longest=21)
    records = [
        {"ids": ids, "domain": "ab"[number % 2]} if number < 8 else {"ids": ids, "domain": "c"}
        for number, ids in enumerate(prompts)
    ]
    path = record(
        model,
        records,
        tmp_path / "a.duckdb",
        level="attention",
        attention_prompts=1,
        attention_layers=[2, 0],
        attention_heads=[3, 1],
    )
    check_run(path, model, prompts, layers=[0, 2], heads=[1, 3])
    domains = "SELECT domain, count(*) AS n FROM attention_prompts JOIN prompts USING (prompt_id)"
    assert table(path, f"{domains} GROUP BY ALL ORDER BY ALL") == {
        "domain": ["a", "b", "c"],
        "n": [1, 1, 1],
    }


def test_every_other_block_of_queries(tmp_path):
    prompts = [np.random.default_rng(0).integers(3, 60, 200).tolist()]
    model = tiny_models.build("mixtral", sliding_window=None, max_position_embeddings=256)
    path = record(model, prompts, tmp_path / "a.duckdb", level="attention", attention_every=2)
    stats = table(path, "SELECT DISTINCT queries FROM attention_stats")
    assert stats == {"queries": [128]}  # blocks 0..63 and 128..191
    maps = table(path, "SELECT bins, map FROM attention_maps")
    for bins, values in zip(maps["bins"], maps["map"], strict=True):
        rows = np.array(values, dtype=np.float64).reshape(bins, bins)  # NULL becomes nan
        used = (np.arange(bins) * 4 // 64) % 2 == 0
        assert np.isnan(rows[~used]).all()
        np.testing.assert_allclose(rows[used].sum(axis=-1), 1, atol=1e-6)
    weights = [w[:, np.r_[0:64, 128:192]] for w in eager_weights(model, prompts[0])]
    want = [-(w * np.log(np.where(w > 0, w, 1))).sum(-1).mean(-1) for w in weights]
    found = table(path, "SELECT entropy FROM attention_stats ORDER BY layer, head")["entropy"]
    np.testing.assert_allclose(found, np.concatenate(want), atol=EXACT)


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_the_model_computes_what_it_computes_without_capture(name, implementation):
    model = model_of(name, implementation)
    ids = tiny_models.tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    found = attach_attention(model, attach(model), longest=20)
    taps = AttentionTaps(found.sites, AttentionOptions(bins=8, every=1, top_keys=2))
    with torch.inference_mode():
        for given in (None, mask):
            plain = model(input_ids=ids, attention_mask=given, use_cache=False).logits
            with taps.open():
                taps.rows = [PromptRow(0, 0, 0, 20), PromptRow(1, 1, 0, 15)]
                heard = model(input_ids=ids, attention_mask=given, use_cache=False).logits
                summaries, doubts = taps.take()
            assert torch.equal(plain, heard)
            assert len(summaries) == len(found.sites) and not any(doubts)


def test_transformers_is_left_as_it_was():
    from transformers.modeling_utils import AttentionInterface

    plain = AttentionInterface.get_interface
    model = model_of("mixtral", "sdpa")
    modules = [m for n, m in model.named_modules() if n.endswith("self_attn")]
    with listen({modules[0]: print}):
        assert AttentionInterface.get_interface is not plain
        with listen({modules[1]: print}):
            pass
        assert AttentionInterface.get_interface is not plain
        with pytest.raises(SiteError, match="recorded already"), listen({modules[0]: print}):
            pass
    assert AttentionInterface.get_interface is plain
    with pytest.raises(ZeroDivisionError), listen({modules[0]: lambda call: 1 / 0}):
        model(input_ids=tiny_models.tokens(1, 5))
    assert AttentionInterface.get_interface is plain


def layers_of(name, implementation="eager", longest=100, **changes):
    model = tiny_models.build(name, attn_implementation=implementation, **changes)
    return attach_attention(model, find_sites(model), longest=longest).layers


def test_layers_without_a_map_say_what_they_are():
    layers = layers_of("nemotron_h")
    assert [(layer.kind, layer.heads) for layer in layers] == [
        ("NemotronHMamba2Mixer", None),
        ("NemotronHMoE", None),
        ("attention", 4),
        ("NemotronHMLP", None),
    ]
    assert [bool(layer.reason) for layer in layers] == [True, True, False, True]
    kinds = {
        "qwen3_next": ["Qwen3NextGatedDeltaNet", "attention", "Qwen3NextGatedDeltaNet"],
        "minimax": ["attention", "MiniMaxLightningAttention", "attention"],
        "granitemoehybrid": ["GraniteMoeHybridMambaLayer", "attention"] * 2,
        "lfm2_moe": ["Lfm2MoeShortConv", "attention"] * 2,
    }
    for name, wanted in kinds.items():
        assert [layer.kind for layer in layers_of(name)] == wanted[:3], name


REFUSED = [
    # a learned bias, keys that an indexer picks, compressed keys, keys after the token
    ("inkling_text", "adds a learned bias"),
    ("deepseek_v32", "indexer picks, at most 16; a prompt has 100 tokens"),
    ("deepseek_v4", "compressed keys"),
    ("openai_privacy_filter", "sees later ones"),
]


@pytest.mark.parametrize(("name", "reason"), REFUSED)
def test_attention_that_queries_and_keys_do_not_explain_is_refused(name, reason):
    layers = layers_of(name)
    refused = [layer for layer in layers if layer.kind != "attention"]
    assert refused and all(layer.heads is None and not layer.recorded for layer in refused)
    assert any(reason in layer.reason for layer in refused)


def test_an_indexer_that_picks_every_key_changes_nothing():
    assert {layer.kind for layer in layers_of("deepseek_v32", longest=16)} == {"attention"}


def test_a_layer_whose_output_is_something_else_is_refused():
    model = tiny_models.build("mixtral")
    attention = model.model.layers[1].self_attn
    attention.scaling *= 2  # told to its function, so still explained
    assert layers_kinds(model) == ["attention"] * 3
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def shifted(module, query, key, value, mask, **kwargs):
        out, weights = plain(module, query, key, value, mask, **kwargs)
        return (out + 0.1 if module is attention else out), weights

    ALL_ATTENTION_FUNCTIONS["sdpa"] = shifted
    try:
        found = attach_attention(model, find_sites(model), longest=9)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert [layer.kind for layer in found.layers] == ["attention", "MixtralAttention", "attention"]
    assert "do not explain its output" in found.layers[1].reason
    assert [site.layer for site in found.sites] == [0, 2]


def layers_kinds(model):
    found = attach_attention(model, find_sites(model), longest=9)
    return [layer.kind for layer in found.layers]


def test_a_mask_that_shows_only_in_long_prompts_is_refused(tmp_path, monkeypatch):
    # layers attend within chunks of more tokens than the test at the start has
    chunks = {"attention_chunk_size": 600, "no_rope_layers": [1] * 3}
    layers = layers_of("llama4_text", longest=700, max_position_embeddings=1024, **chunks)
    assert all("within chunks of 600 tokens" in layer.reason for layer in layers)
    # and where the configuration does not say so, while it is recorded
    monkeypatch.setattr("capture.recorder.attention.layers._limit", lambda *_: None)
    model = tiny_models.build("llama4_text", max_position_embeddings=1024, **chunks)
    prompts = [np.random.default_rng(0).integers(3, 60, 700).tolist()]
    with pytest.raises(SiteError, match="hides other keys"):
        record(model, prompts, tmp_path / "a.duckdb", level="attention")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_layers": [7]}, "names layer 7.*no such layer.*Choose among .0, 2."),
        ({"attention_layers": [1]}, "names layer 1.*does not weigh keys.*Choose among .0, 2."),
        ({"attention_heads": [4]}, "names head 4, but layers have up to 4 heads"),
    ],
)
def test_layers_and_heads_that_cannot_be_recorded_are_refused(tmp_path, options, message):
    model = model_of("minimax", "sdpa")
    with pytest.raises(ConfigError, match=message):
        record(model, unequal(3), tmp_path / "a.duckdb", level="attention", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_any_map_is_refused(tmp_path):
    model = tiny_models.build("qwen3_5_moe_text", layer_types=["linear_attention"] * 3)
    with pytest.raises(ConfigError, match=r"none of the 3 layers has it.*level 'scores'"):
        record(model, unequal(3), tmp_path / "a.duckdb", level="attention")


def test_prompts_are_chosen_by_domain_and_by_seed():
    domains = ["a"] * 20 + ["b"] * 2 + [None] * 10 + ["c"]
    lengths = [5] * 32 + [1]  # the only prompt of c has one token
    found = choose_attended(domains, lengths, 12, seed=3)
    assert found.record["strata"] == [
        {"domain": "a", "prompts": 20, "attended": 5},
        {"domain": "b", "prompts": 2, "attended": 2},
        {"domain": None, "prompts": 10, "attended": 4},
        {"domain": "c", "prompts": 1, "attended": 1},
    ]
    assert found.record["planned"] == int(found.is_attended.sum()) == 12
    again = choose_attended(domains, lengths, 12, seed=3)
    other = choose_attended(domains, lengths, 12, seed=4)
    assert (found.is_attended == again.is_attended).all()
    assert (found.is_attended != other.is_attended).any()
    # at least one of every domain, whatever was asked for; at most all
    assert choose_attended(domains, lengths, 1, seed=0).record["planned"] == 4
    assert choose_attended(domains, lengths, 99, seed=0).is_attended.all()
