"""Coactivation against plain Python, a case on paper, and its invariants."""

import re
import sys
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import coactivation
from kernels.dispatch import BACKENDS, KernelError

CPU_BACKENDS = [name for name in BACKENDS if name != "triton"]


def counted(ids, next_ids, n_experts, n_next, valid=None):
    """The definition in plain Python, over one site's lists of lists."""
    pairs = torch.zeros(n_experts, n_experts, dtype=torch.int64)
    transitions = torch.zeros(n_experts, n_next, dtype=torch.int64)
    for token, (here, there) in enumerate(zip(ids, next_ids, strict=True)):
        if valid is not None and not valid[token]:
            continue
        here, there = {e for e in here if e >= 0}, {e for e in there if e >= 0}
        for a, b in product(here, here):
            pairs[a, b] += 1
        for a, b in product(here, there):
            transitions[a, b] += 1
    return pairs, transitions


@pytest.mark.slow
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_three_tokens_on_paper(backend):
    """Tokens {0, 1}, {1}, {1, 2}; next to experts 0, 0 and 1 of two."""
    ids = torch.tensor([[0, 1], [1, -1], [2, 1]])
    following = torch.tensor([[0], [0], [1]])
    out = coactivation(ids, following, n_experts=3, n_next_experts=2, backend=backend)
    assert out.pairs.tolist() == [[1, 1, 0], [1, 3, 1], [0, 1, 1]]
    assert out.transitions.tolist() == [[1, 0], [2, 1], [0, 1]]
    assert out.pairs.dtype == out.transitions.dtype == torch.int64


@pytest.mark.slow
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_ids_equal_plain_python(backend, data):
    """Empty slots anywhere, experts named twice, invalid tokens, other widths at the next site."""
    sites, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 7))
    n_experts, n_next = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))

    def table(experts):
        width = data.draw(st.integers(1, 4))
        row = st.lists(st.integers(-1, experts - 1), min_size=width, max_size=width)
        rows = st.lists(row, min_size=tokens, max_size=tokens)
        return data.draw(st.lists(rows, min_size=sites, max_size=sites)), width

    (ids, width), (following, next_width) = table(n_experts), table(n_next)
    valid = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    dtype = data.draw(st.sampled_from([torch.int16, torch.int32, torch.int64]))

    out = coactivation(
        torch.tensor(ids, dtype=dtype).reshape(sites, tokens, width),
        torch.tensor(following, dtype=dtype).reshape(sites, tokens, next_width),
        n_experts=n_experts,
        n_next_experts=n_next,
        valid=torch.tensor(valid, dtype=torch.bool),
        backend=backend,
    )

    for site in range(sites):
        pairs, transitions = counted(ids[site], following[site], n_experts, n_next, valid)
        assert torch.equal(out.pairs[site], pairs)
        assert torch.equal(out.transitions[site], transitions)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "empty", "n_experts"), [(torch.uint8, 255, 255), (torch.uint16, 65535, 300)]
)
def test_packed_ids_equal_wide_ones(backend, dtype, empty, n_experts):
    """The highest expert of uint8 is 254: 255 is the empty slot."""
    wide = torch.randint(-1, n_experts, (2, 50, 3), generator=torch.Generator().manual_seed(0))
    wide[0, 0] = torch.tensor([n_experts - 1, -1, 0])
    packed = wide.where(wide >= 0, empty).to(dtype)
    expected = coactivation(wide, wide.flip(0), n_experts=n_experts, backend=backend)
    actual = coactivation(packed, packed.flip(0), n_experts=n_experts, backend=backend)
    assert torch.equal(actual.pairs, expected.pairs)
    assert torch.equal(actual.transitions, expected.transitions)
    assert actual.pairs[0, n_experts - 1, 0] >= 1


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_diagonal_is_the_load_and_rows_share_the_slots(backend):
    ids = torch.rand(3, 200, 12, generator=torch.Generator().manual_seed(1)).topk(4).indices
    following = ids.roll(1, 0)
    out = coactivation(ids, following, n_experts=12, backend=backend)
    load = torch.stack([site.flatten().bincount(minlength=12) for site in ids])
    assert torch.equal(out.pairs.diagonal(dim1=-2, dim2=-1), load)
    assert torch.equal(out.pairs, out.pairs.mT)
    assert torch.equal(out.pairs.sum(-1), load * 4)
    assert torch.equal(out.transitions.sum(-1), load * 4)
    assert torch.equal(out.transitions.sum(-2), load.roll(1, 0) * 4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_leading_axes_strides_and_no_tokens(backend):
    ids = torch.randint(0, 5, (2, 3, 6, 4), generator=torch.Generator().manual_seed(2))
    out = coactivation(ids[..., ::2], n_experts=5, backend=backend)
    assert out.transitions is None
    one = coactivation(ids[1, 2, :, ::2].contiguous(), n_experts=5, backend=backend)
    assert out.pairs.shape == (2, 3, 5, 5) and torch.equal(out.pairs[1, 2], one.pairs)
    none = coactivation(ids[:, :, :0], ids[:, :, :0], n_experts=5, backend=backend)
    assert none.pairs.shape == none.transitions.shape == (2, 3, 5, 5)
    assert not none.pairs.any() and not none.transitions.any()


def test_reference_counts_past_a_chunk(monkeypatch):
    """What the reference adds up in pieces is what one piece gives."""
    ids = torch.randint(0, 6, (1, 23, 2), generator=torch.Generator().manual_seed(3))
    whole = coactivation(ids, ids.flip(1), n_experts=6, backend="torch")
    monkeypatch.setattr(sys.modules["kernels.ops.coactivation"], "CHUNK", 5)
    pieces = coactivation(ids, ids.flip(1), n_experts=6, backend="torch")
    assert torch.equal(whole.pairs, pieces.pairs)
    assert torch.equal(whole.transitions, pieces.transitions)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("wrong", "dtype"), [(7, torch.int64), (-2, torch.int32)])
def test_an_id_that_names_no_expert_is_refused(backend, wrong, dtype):
    ids = torch.zeros(2, 4, 3, dtype=dtype)
    ids[1, 2, 1] = wrong
    message = re.escape(f"holds {wrong} at [site, token, slot] = [1, 2, 1], but there are 7")
    with pytest.raises(KernelError, match="^expert_ids " + message):
        coactivation(ids, n_experts=7, backend=backend)
    with pytest.raises(KernelError, match="^next_expert_ids " + message):
        coactivation(torch.zeros_like(ids), ids, n_experts=7, backend=backend)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), {}, r"\[tokens, slots\].*got \[3\]"),
        (torch.zeros(3, 2), {}, r"integers, got torch.float32"),
        (torch.zeros(3, 0, dtype=torch.int64), {}, r"no slots"),
        (torch.zeros(3, 2, dtype=torch.uint8), {"n_experts": 256}, r"1 to 255 experts, got 256"),
        (torch.zeros(3, 2, dtype=torch.int64), {"n_experts": 0}, r"got 0"),
        (torch.zeros(3, 2, dtype=torch.int64), {"valid": torch.ones(2).bool()}, r"shape \[3\]"),
        (torch.zeros(3, 2, dtype=torch.int64), {"valid": torch.ones(3)}, r"got torch.float32"),
        (torch.zeros(3, 2, dtype=torch.int64), {"backend": "triton"}, r"needs CUDA tensors"),
        (
            torch.zeros(3, 2, dtype=torch.int64),
            {"backend": "sdpa"},
            r"is not one of this op's backends",
        ),
    ],
)
def test_errors_say_what_came(ids, options, message):
    with pytest.raises(KernelError, match=message):
        coactivation(ids, **{"n_experts": 4, **options})


def test_next_ids_must_hold_the_same_tokens():
    ids = torch.zeros(2, 3, 2, dtype=torch.int64)
    with pytest.raises(KernelError, match=r"tokens of expert_ids, \[2, 3\], got \[2, 4\]"):
        coactivation(ids, torch.zeros(2, 4, 2, dtype=torch.int64), n_experts=4)
