"""Attention against cases on paper, Transformers' own weights, and its invariants."""

import importlib
import math
import re

import pytest
import torch
from attention_checks import assert_same, logsumexp
from checks import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import KernelError
from kernels.ops.attention import attention, bin_width, n_bins, used_queries

LN = math.log


def keys_and_query(logits):
    """One head of size 1 whose scores for the keys are the given logits, for every query."""
    key = torch.tensor(logits).view(1, 1, -1, 1)
    return torch.ones_like(key), key


def test_causal_attention_on_paper():
    """Logits ln 1, ln 1, ln 2: weights [1], [1/2, 1/2], [1/4, 1/4, 1/2]."""
    query, key = keys_and_query([0.0, 0.0, LN(2)])

    out = attention(query, key, scaling=1.0, bins=2, top_keys=2)

    assert out.queries.tolist() == [0, 1, 2]
    expected = {
        "entropy": [0.0, LN(2), 1.5 * LN(2)],
        "sink_mass": [1.0, 0.5, 0.25],
        "mean_distance": [0.0, 0.5, 0.75],  # 2/4 + 1/4
        "window_mass": [1.0, 1.0, 1.0],
        # bins {0, 1} and {2}: the first two queries have all in the first
        "map": [[1.0, 0.0], [0.5, 0.5]],
        "received": [2.5, 0.5],
    }
    for name, values in expected.items():
        assert_close(name, getattr(out, name)[0, 0], torch.tensor(values), atol=1e-6)
    assert out.top_ids[0, 0, 2, 0] == 2
    assert out.top_ids[0, 0, 0].tolist() == [0, -1]
    assert sorted(out.top_ids[0, 0, 1].tolist()) == [0, 1]
    assert_close("top_weights", out.top_weights[0, 0, 2], torch.tensor([0.5, 0.25]), atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_row_that_the_sink_takes_is_nan(backend):
    """Weights of e**-90 are below what float32 holds in full; one of e**-60 can be divided."""
    query, key = keys_and_query([-90.0, -60.0])

    out = attention(query, key, scaling=1.0, bins=2, sinks=torch.zeros(1), backend=backend)

    assert out.map[0, 0, 0].isnan().all()
    assert_close("map", out.map[0, 0, 1], torch.tensor([0.0, 1.0]), atol=1e-6)


def test_every_key_is_seen_without_causal():
    query, key = keys_and_query([0.0, 0.0, LN(2)])

    out = attention(query, key, scaling=1.0, causal=False)

    assert_close("entropy", out.entropy[0, 0], torch.full((3,), 1.5 * LN(2)), atol=1e-6)
    # keys after the query count with a negative distance: 0/4 - 1/4 - 2 * 2/4
    assert_close("distance", out.mean_distance[0, 0], torch.tensor([-1.25, -0.25, 0.75]), atol=1e-6)
    assert_close("window", out.window_mass[0, 0], torch.tensor([0.25, 0.5, 1.0]), atol=1e-6)


def test_a_sink_takes_weight_and_adds_no_entropy_of_its_own():
    """One key at ln 1 and a sink at ln 3: the key keeps 1/4, entropy 1/4 ln 4."""
    query, key = keys_and_query([0.0])
    out = attention(query, key, scaling=1.0, sinks=torch.tensor([LN(3)]), top_keys=1)
    assert out.sink_mass.item() == pytest.approx(0.25)
    assert out.entropy.item() == pytest.approx(0.25 * LN(4))
    assert out.received.item() == pytest.approx(0.25)
    assert out.map.item() == 1.0  # rows of the map are divided by their sum
    assert out.top_weights.item() == pytest.approx(0.25)


def test_softcap_bends_scores_before_the_softmax():
    """Scores 0 and atanh(1/2) * 2 under a cap of 2 become 0 and 1."""
    query, key = keys_and_query([0.0, 2 * math.atanh(0.5)])
    out = attention(query, key, scaling=1.0, softcap=2.0)
    weight = 1 / (1 + math.e)
    assert out.sink_mass[0, 0, 1].item() == pytest.approx(weight)
    entropy = -weight * LN(weight) - (1 - weight) * LN(1 - weight)
    assert out.entropy[0, 0, 1].item() == pytest.approx(entropy)


def test_scaling_and_shared_key_heads():
    """Two query heads read one key head; the second head's query is twice the first's."""
    key = torch.tensor([0.0, LN(2)]).view(1, 1, 2, 1)
    query = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 2, 1)
    out = attention(query, key, scaling=0.5)
    # key 1 weighs sqrt 2, and 2, against 1
    expected = torch.tensor([1 / (1 + 2**0.5), 1 / 3])
    assert_close("sink_mass", out.sink_mass[0, :, 1], expected, atol=1e-6)


def test_a_window_hides_far_keys_but_the_sink_stays_the_first_key():
    query, key = keys_and_query([0.0] * 4)
    out = attention(query, key, scaling=1.0, window=2)
    assert_close("entropy", out.entropy[0, 0], torch.tensor([0, LN(2), LN(2), LN(2)]), atol=1e-6)
    assert_close("sink_mass", out.sink_mass[0, 0], torch.tensor([1, 0.5, 0, 0]), atol=1e-6)


def test_recent_means_sixteen_keys_the_query_included():
    query, key = keys_and_query([0.0] * 20)
    out = attention(query, key, scaling=1.0)
    expected = torch.tensor([1.0] * 16 + [16 / 17, 16 / 18, 16 / 19, 16 / 20])
    assert_close("window_mass", out.window_mass[0, 0], expected, atol=1e-6)


@pytest.mark.slow
def test_padding_sees_nothing_and_is_not_seen():
    query, key = keys_and_query([5.0, 0.0, 0.0, 9.0])
    valid = torch.tensor([[False, True, True, False]])

    out = attention(query, key, scaling=1.0, valid=valid, top_keys=4, bins=4)

    assert_close("entropy", out.entropy[0, 0], torch.tensor([0, 0, LN(2), 0]), atol=1e-6)
    assert_close("sink_mass", out.sink_mass[0, 0], torch.tensor([0, 1, 0.5, 0]), atol=1e-6)
    assert_close("received", out.received[0, 0], torch.tensor([0, 1.5, 0.5, 0]), atol=1e-6)
    assert out.map[0, 0, [0, 3]].isnan().all()
    assert_close("map", out.map[0, 0, 2], torch.tensor([0, 0.5, 0.5, 0]), atol=1e-6)
    assert out.top_ids[0, 0, 0].tolist() == [-1] * 4
    assert out.top_ids[0, 0, 1].tolist() == [1, -1, -1, -1]


def test_packed_sequences_do_not_see_each_other():
    query, key = keys_and_query([0.0] * 5)
    valid = torch.tensor([[1, 1, 0, 2, 2]])
    out = attention(query, key, scaling=1.0, valid=valid, bins=8)
    assert_close("sink_mass", out.sink_mass[0, 0], torch.tensor([1, 0.5, 0, 1, 0.5]), atol=1e-6)
    assert_close("distance", out.mean_distance[0, 0], torch.tensor([0, 0.5, 0, 0, 0.5]), atol=1e-6)
    assert_close("received", out.received[0, 0], torch.tensor([1.5, 0.5, 0, 1.5, 0.5]), atol=1e-6)


def test_queries_stand_at_the_last_positions():
    """Two queries after three cached keys equal the last two of five."""
    query, key = keys_and_query([0.0, LN(3), 0.0, LN(2), 0.0])
    whole = attention(query, key, scaling=1.0, bins=8)
    chunk = attention(query[:, :, :2], key, scaling=1.0, bins=8)
    for name in ("entropy", "sink_mass", "mean_distance", "window_mass"):
        last = getattr(whole, name)[:, :, 3:]
        assert_close(name, getattr(chunk, name), last, atol=1e-6)
    assert chunk.map[0, 0, :3].isnan().all()
    assert_close("map", chunk.map[0, 0, 3:], whole.map[0, 0, 3:], atol=1e-6)


@pytest.mark.parametrize(
    ("n_keys", "bins", "width"), [(0, 64, 1), (64, 64, 1), (65, 64, 2), (200, 64, 4), (5, 1, 8)]
)
def test_bins_are_the_smallest_power_of_two_that_fits(n_keys, bins, width):
    assert bin_width(n_keys, bins) == width
    assert n_bins(n_keys, bins) == math.ceil(n_keys / width)


def test_every_uses_whole_blocks_counted_from_the_first_position():
    assert used_queries(300, 300, 1).tolist() == list(range(300))
    assert used_queries(300, 300, 2).tolist() == [*range(64), *range(128, 192), *range(256, 300)]
    assert used_queries(300, 300, 9).tolist() == list(range(64))
    # 100 queries at positions 200 to 299, of which the block from 256 on is used
    assert used_queries(100, 300, 2).tolist() == list(range(56, 100))
    assert used_queries(50, 250, 2).tolist() == []


def test_sampled_queries_have_the_values_they_have_without_sampling():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 200, 8), torch.randn(1, 1, 200, 8)
    whole = attention(query, key, scaling=0.4)
    sampled = attention(query, key, scaling=0.4, every=2)
    assert_close("entropy", sampled.entropy, whole.entropy[:, :, sampled.queries], atol=1e-6)
    rows = sorted({int(q) // 4 for q in sampled.queries})  # 200 positions in bins of 4
    assert_close("map", sampled.map[:, :, rows], whole.map[:, :, rows], atol=1e-6)
    others = [row for row in range(50) if row not in rows]
    assert sampled.map[:, :, others].isnan().all()


TEXT = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
MOE = {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize(
    ("package", "family", "settings"),
    [
        ("mixtral", "Mixtral", {**MOE, "sliding_window": 5}),
        ("gpt_oss", "GptOss", {**MOE, "sliding_window": 4}),  # sinks; windows in every other layer
        ("gemma2", "Gemma2", {**TEXT, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5}),
    ],
)
def test_weights_are_those_that_transformers_shows(package, family, settings, side, monkeypatch):
    """Eager attention's weights, summarised the long way, equal the op on its queries and keys."""
    import transformers

    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    calls = []

    def keep(layer, query, key, *args, eager=module.eager_attention_forward, **options):
        output, weights = eager(layer, query, key, *args, **options)
        calls.append((layer, query, key, options, weights))
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", keep)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, value in model.named_parameters():
        # scores far from zero, so that caps, sinks and windows matter
        torch.nn.init.normal_(value, std=1.0 if "q_proj" in name or "sinks" in name else 0.3)
    n_tokens, padding = 12, {"left": slice(0, 3), "right": slice(9, 12), "none": slice(0, 0)}[side]
    mask = torch.ones(2, n_tokens, dtype=torch.long)
    mask[1, padding] = 0
    with torch.no_grad():
        model(torch.randint(32, (2, n_tokens)), attention_mask=mask)

    assert len(calls) == 2
    for layer, query, key, options, weights in calls:
        out = attention(
            query,
            key,
            scaling=options["scaling"],
            window=options.get("sliding_window"),
            softcap=options.get("softcap"),
            sinks=getattr(layer, "sinks", None),
            valid=mask.bool(),
            bins=n_tokens,
            top_keys=1,
        )
        real = mask.bool().unsqueeze(1)
        weights = weights.masked_fill(~real.unsqueeze(-1), 0.0)  # [B, H, T, S]
        place = torch.arange(n_tokens)
        distance = place.unsqueeze(1) - place
        first = mask.argmax(dim=-1).view(-1, 1, 1, 1).expand(*weights.shape[:3], 1)
        expected = {
            "entropy": torch.special.entr(weights).sum(-1),
            "sink_mass": weights.gather(-1, first).squeeze(-1),
            "mean_distance": (weights * distance).sum(-1),
            "window_mass": weights.sum(-1),  # 12 tokens are all recent
            "received": weights.sum(-2),
        }
        for name, value in expected.items():
            assert_close(f"{package} {name}", getattr(out, name), value, atol=2e-6, rtol=2e-6)
        rows = weights / weights.sum(-1, keepdim=True)
        seen = real.expand(rows.shape[:3])
        assert_close("map", out.map[seen], rows[seen], atol=2e-6)
        assert out.map[~seen].isnan().all()
        assert_close("top", out.top_weights[..., 0], weights.amax(-1), atol=2e-6)


TENSORS = (torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8))


@pytest.mark.parametrize(
    ("query", "key", "options", "message"),
    [
        (torch.zeros(4, 5, 8), TENSORS[1], {}, "takes queries [batch, heads, tokens, size]"),
        (TENSORS[0], torch.zeros(1, 2, 6, 8), {}, "must agree in batch and in size"),
        (TENSORS[0], torch.zeros(2, 2, 6, 4), {}, "must agree in batch and in size"),
        (TENSORS[0], torch.zeros(2, 3, 6, 8), {}, "4 query heads cannot share 3 key heads"),
        (TENSORS[0], TENSORS[1][:, :, :4], {}, "at least as many keys, got 4"),
        (TENSORS[0].half(), TENSORS[1], {}, "got torch.float16 and torch.float32"),
        (*TENSORS, {"lse": torch.zeros(2, 4, 6)}, "lse must have shape [2, 4, 5]"),
        (*TENSORS, {"lse": torch.zeros(2, 4, 5).int()}, "lse must hold floating point"),
        (*TENSORS, {"sinks": torch.zeros(2)}, "sinks must have shape [4], got [2]"),
        (*TENSORS, {"valid": torch.ones(2, 5).bool()}, "valid must have shape [2, 6]"),
        (*TENSORS, {"valid": torch.ones(2, 6)}, "valid must be bool"),
        (*TENSORS, {"sinks": torch.zeros(4, device="meta")}, "Move it: sinks.to(query.device)"),
        (*TENSORS, {"window": 0}, "window must be at least 1 key, got 0"),
        (*TENSORS, {"softcap": 0.0}, "softcap must be greater than 0"),
        (*TENSORS, {"bins": 0}, "bins must be at least 1, got 0"),
        (*TENSORS, {"every": 0}, "every must be at least 1, got 0"),
        (*TENSORS, {"top_keys": -1}, "top_keys must be at least 0, got -1"),
        (*TENSORS, {"backend": "triton"}, "backend='triton'"),
    ],
)
def test_what_the_op_cannot_do_is_said(query, key, options, message):
    with pytest.raises(KernelError, match=re.escape(message)):
        attention(query, key, scaling=1.0, **options)


@st.composite
def calls(draw):
    """Inputs and options of any shape, with peaked and flat scores."""
    n_queries = draw(st.integers(0, 150))
    n_keys = n_queries + draw(st.sampled_from([0, 0, 1, 70]))
    batch, key_heads, group = draw(st.tuples(*[st.integers(1, 2)] * 3))
    size = draw(st.sampled_from([1, 8, 20]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    spread = draw(st.sampled_from([0.0, 1.0, 30.0]))
    query = random(batch, key_heads * group, n_queries, size)
    key = random(batch, key_heads, n_keys, size) * spread
    sequences = torch.randint(0, 3, (batch, n_keys), generator=generator)
    options = {
        "scaling": draw(st.sampled_from([size**-0.5, -0.3])),
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, 90)),
        "softcap": draw(st.none() | st.sampled_from([0.5, 30.0])),
        "sinks": random(key_heads * group) * 3 if draw(st.booleans()) else None,
        "valid": draw(st.sampled_from([None, sequences > 0, sequences, sequences.sort().values])),
        "bins": draw(st.sampled_from([1, 5, 64])),
        "every": draw(st.integers(1, 3)),
        "top_keys": draw(st.sampled_from([0, 1, 4, 200])),
    }
    return query, key, options


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(call=calls(), with_lse=st.booleans())
def test_numba_does_what_the_definition_says(call, with_lse):
    query, key, options = call
    expected = attention(query, key, **options, backend="torch")
    if with_lse:
        options["lse"] = logsumexp(query, key, **options)
    # scores reach 1000; float32 then holds them, and what is subtracted, to 3e-5 only
    slack = 40.0 if (key.abs() > 8).any() else 1.0
    assert_same(attention(query, key, **options, backend="numba"), expected, slack)
