"""The Triton kernels of coactivation, interpreted, against the reference: counts are exact."""

import pytest
import torch

from kernels.ops.coactivation import _triton as kernel
from kernels.ops.coactivation import coactivation, coactivation_reference


def check(ids, following, n_experts, n_next, valid=None):
    options = {"n_experts": n_experts, "n_next_experts": n_next, "valid": valid}
    actual = coactivation(ids, following, **options, backend="triton")
    expected = coactivation_reference(ids, following, **options)
    assert torch.equal(actual.pairs, expected.pairs)
    assert torch.equal(actual.transitions, expected.transitions)
    assert actual.pairs.any() == bool(len(ids[0]) and (valid is None or valid.any()))


@pytest.mark.parametrize(
    ("n_experts", "k", "n_next", "next_k", "n_tokens"),
    [
        (1, 1, 1, 1, 5),  # one expert
        (8, 8, 33, 1, 70),  # k = E; one more than a word
        (61, 6, 8, 2, 64),  # a prime
        (129, 8, 130, 3, 300),  # two blocks each way, several packing programs
        (512, 10, 40, 2, 65),
        (16, 2, 300, 4, 40),  # few experts before many
    ],
)
def test_shapes(n_experts, k, n_next, next_k, n_tokens):
    generator = torch.Generator().manual_seed(n_experts)
    ids = torch.rand(2, n_tokens, n_experts, generator=generator).topk(k).indices
    following = torch.rand(2, n_tokens, n_next, generator=generator).topk(next_k).indices
    ids[0, :, -1] = n_experts - 1  # named twice by some tokens
    following[1, ::3, 0] = -1
    valid = torch.rand(n_tokens, generator=generator) > 0.3
    check(ids, following, n_experts, n_next, valid)
    check(ids.int(), following.int(), n_experts, n_next)


@pytest.mark.parametrize(("dtype", "empty", "n_experts"), [
    (torch.uint8, 255, 255), (torch.uint16, 65535, 65), (torch.int16, -1, 40)
])  # fmt: skip
def test_id_types(dtype, empty, n_experts):
    ids = torch.randint(-1, n_experts, (2, 66, 5), generator=torch.Generator().manual_seed(0))
    ids = ids.where(ids >= 0, empty).to(dtype)
    check(ids, ids.flip(0).contiguous(), n_experts, n_experts)


def test_all_tokens_padded_and_none():
    ids = torch.randint(0, 9, (1, 5, 2), generator=torch.Generator().manual_seed(0))
    check(ids, ids, 9, 9, torch.zeros(5, dtype=torch.bool))
    check(ids[:, :0], ids[:, :0], 9, 9)


def test_tokens_split_over_programs(monkeypatch):
    """A split that ends within a block counts no token twice."""
    monkeypatch.setattr(kernel, "TOKENS_PER_PROGRAM", 48)
    monkeypatch.setattr(kernel, "GRAM_BLOCK_T", 32)
    ids = torch.rand(2, 150, 20, generator=torch.Generator().manual_seed(0)).topk(3).indices
    check(ids, ids.flip(0), 20, 20)
