"""Attention's Triton kernels in the interpreter, against the definition (see conftest.py)."""

import importlib

import pytest
import torch
from attention_checks import assert_same, call, logsumexp
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ops.attention import attention

launch = importlib.import_module("kernels.ops.attention._triton")


def check(query, key, options, slack=1.0):
    """Compare with the definition, with the denominators given and not."""
    expected = attention(query, key, **options, backend="torch")
    lse = logsumexp(query, key, **options)
    for extra in ({}, {"lse": lse}):
        actual = attention(query, key, **options, **extra, backend="triton")
        assert_same(actual, expected, slack)
    return expected


HOLES = torch.tensor([[0, 2, 2, 0, 1, 2, 1, 1, 0, 3] * 7])
CASES = {
    "one token": (dict(n_queries=1), {}),
    "no tokens": (dict(n_queries=0), {}),
    "no queries, cached keys": (dict(n_queries=0, n_keys=9), {}),
    "one block": (dict(n_queries=64), {}),
    "prime": (dict(n_queries=101), {}),
    "heads share keys": (dict(n_queries=20, heads=4, key_heads=2, batch=2), {}),
    "size 20": (dict(n_queries=40, size=20), {}),
    "size 130": (dict(n_queries=40, size=130), {}),
    "window 1": (dict(n_queries=40), {"window": 1}),
    "window": (dict(n_queries=150), {"window": 40}),
    "window and sequences": (dict(n_queries=70), {"window": 5, "valid": HOLES}),
    "both sides": (dict(n_queries=70), {"causal": False}),
    "window to both sides": (dict(n_queries=150), {"causal": False, "window": 20}),
    "cached keys": (dict(n_queries=30, n_keys=145), {}),
    "cached keys, sampled": (dict(n_queries=140, n_keys=270), {"every": 2}),
    "soft cap": (dict(n_queries=40, spread=3.0), {"softcap": 1.5}),
    "sinks": (dict(n_queries=40, heads=2), {"sinks": torch.tensor([-2.0, 5.0])}),
    "sink takes all": (dict(n_queries=20), {"sinks": torch.tensor([500.0])}),
    "padding left": (dict(n_queries=40), {"valid": torch.arange(40)[None] >= 30}),
    "padding right": (dict(n_queries=70), {"valid": torch.arange(70)[None] < 3}),
    "all padded": (dict(n_queries=20), {"valid": torch.zeros(1, 20, dtype=torch.bool)}),
    "one real token": (dict(n_queries=20), {"valid": torch.arange(20)[None] == 7}),
    "packed": (dict(n_queries=150), {"valid": torch.arange(150)[None] // 40 + 1}),
    "packed with holes": (dict(n_queries=70), {"valid": HOLES}),
    "packed, both sides": (dict(n_queries=70), {"valid": HOLES, "causal": False}),
    "packed and sinks": (
        dict(n_queries=70, heads=2), {"valid": HOLES.int(), "sinks": torch.ones(2)}
    ),
    "one bin": (dict(n_queries=130), {"bins": 1}),
    "wide bins": (dict(n_queries=290), {"bins": 2}),
    "bins of a block": (dict(n_queries=290), {"bins": 4}),
    "narrow bins": (dict(n_queries=150), {"bins": 64}),
    "every second block": (dict(n_queries=210), {"every": 2}),
    "one block used": (dict(n_queries=70), {"every": 9}),
    "no block used": (dict(n_queries=5, n_keys=70), {"every": 2}),
    "top keys": (dict(n_queries=40, heads=2), {"top_keys": 3}),
    "more top keys than keys": (dict(n_queries=5), {"top_keys": 9}),
    "top keys, sampled": (
        dict(n_queries=140), {"top_keys": 2, "every": 2, "window": 30, "softcap": 2.0}
    ),
    "top keys, packed": (
        dict(n_queries=70, heads=2, key_heads=1), {"top_keys": 2, "valid": HOLES}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_triton_does_what_the_definition_says(name):
    shape, options = CASES[name]
    check(*call(**shape, **options))


def test_weights_that_underflow():
    """Scores 300 apart: one key has all the weight, the others none at all."""
    query, key, options = call(n_queries=20, size=1, top_keys=3)
    query, key = torch.ones_like(query), torch.arange(20.0).view(1, 1, 20, 1) * -300
    expected = check(query, key, options)
    assert expected.entropy.max() == 0 and expected.sink_mass.min() == 1


def test_padding_may_hold_anything():
    query, key, options = call(n_queries=40, valid=torch.arange(40)[None] < 30, top_keys=1)
    expected = attention(query, key, **options, backend="torch")
    query[:, :, 30:] = torch.nan
    key[:, :, 30:] = torch.nan
    assert_same(attention(query, key, **options, backend="triton"), expected)


def test_half_precision_inputs_and_strided_heads():
    query, key, options = call(n_queries=30, heads=2, size=16)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)  # heads after the split
    expected = attention(query.half(), key.half(), **options, backend="torch")
    assert_same(attention(query.half(), key.half(), **options, backend="triton"), expected)
    turned = key.transpose(2, 3).contiguous().transpose(2, 3)
    assert_same(attention(query.half(), turned.half(), **options, backend="triton"), expected)


@settings(max_examples=25, deadline=None)
@given(
    n_queries=st.integers(1, 140),
    cached=st.sampled_from([0, 0, 3, 70]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 150),
    softcap=st.none() | st.just(3.0),
    sinks=st.booleans(),
    sequences=st.sampled_from([None, 1, 3]),
    bins=st.sampled_from([1, 3, 64]),
    every=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_any_options(n_queries, cached, sinks, sequences, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    n_keys = n_queries + cached
    valid = sequences and torch.randint(0, sequences + 1, (1, n_keys), generator=generator)
    sinks = torch.randn(1, generator=generator) if sinks else None
    check(*call(n_queries, n_keys=n_keys, seed=seed, valid=valid, sinks=sinks, **options))


@pytest.mark.parametrize(("version", "kibibytes"), [((8, 0), 163), ((9, 0), 227), ((10, 0), 227)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_fit_into_shared_memory(version, kibibytes, itemsize):
    for size in (16, 64, 80, 128, 192, 256):
        for every in (1, 4):
            blocks = launch.config(size, itemsize, every, 128, version)
            rows = blocks["BLOCK_M"] + blocks["BLOCK_N"] * blocks["num_stages"]
            assert rows * blocks["BLOCK_D"] * itemsize <= kibibytes * 1024
            assert blocks["BLOCK_D"] >= size
