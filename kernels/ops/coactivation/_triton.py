"""Triton implementation of coactivation: bitmaps of the ids, then their Gram on tensor cores."""

import torch
import triton
import triton.language as tl

from kernels.ops.coactivation import EMPTY_CODES, CoactivationOutput

PACK_BLOCK_T = 128
PACK_WARPS = 4
GRAM_BLOCK_T = 64
GRAM_WARPS = 8
MAX_BLOCK_E = 128
# float32 sums of 0 and 1 are exact up to 2**24; a program stays far below
TOKENS_PER_PROGRAM = 2**14


@triton.jit
def _pack_kernel(
    ids_ptr, valid_ptr, words_ptr,
    n_tokens, n_words,
    EMPTY: tl.constexpr, SLOTS: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # word w of a token: bit b says whether it chose expert 32 w + b; tokens are contiguous
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    site = tl.program_id(1).to(tl.int64)
    is_token = tokens < n_tokens
    counted = is_token
    if MASKED:
        counted = counted & (tl.load(valid_ptr + tokens, mask=is_token, other=0) != 0)
    word = tl.arange(0, BLOCK_W)
    bits = tl.zeros([BLOCK_W, BLOCK_T], tl.uint32)
    rows = ids_ptr + site * n_tokens * SLOTS + tokens.to(tl.int64) * SLOTS
    for slot in tl.static_range(SLOTS):
        # an empty slot is past the last expert in every type, or -1, which int64 keeps in 32 bits
        expert = tl.load(rows + slot, mask=counted, other=EMPTY).to(tl.int32)
        mine = (expert >> 5)[None, :] == word[:, None]
        bit = tl.full([BLOCK_T], 1, tl.uint32) << (expert & 31).to(tl.uint32)
        bits = bits | tl.where(mine, bit[None, :], 0)
    out = words_ptr + site * n_words * n_tokens + word[:, None].to(tl.int64) * n_tokens
    tl.store(out + tokens[None, :], bits, mask=(word < n_words)[:, None] & is_token[None, :])


@triton.jit
def _multi_hot(
    words_ptr, first_word, tokens, is_token, n_words, n_tokens,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Return 1 where a token chose an expert of this block, [BLOCK_E, BLOCK_T] float16."""
    word = first_word + tl.arange(0, BLOCK_E // 32)
    bits = tl.load(
        words_ptr + word[:, None].to(tl.int64) * n_tokens + tokens[None, :],
        mask=(word < n_words)[:, None] & is_token[None, :],
        other=0,
    )
    lane = tl.arange(0, 32).to(tl.uint32)
    apart = (bits[:, None, :] >> lane[None, :, None]) & 1
    # float16 holds 0 and 1 exactly, and the interpreter's bfloat16 is wrong
    return tl.reshape(apart, [BLOCK_E, BLOCK_T]).to(tl.float16)


@triton.jit
def _gram_kernel(
    words_ptr, next_words_ptr, out_ptr,
    n_tokens, n_experts, n_next, n_words, n_next_words, n_columns, tokens_per_program,
    SYMMETRIC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) // n_columns, tl.program_id(0) % n_columns
    if SYMMETRIC and row > column:
        return  # the mirror image of a tile that is counted, see _gram
    site = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * tokens_per_program
    last = tl.minimum(first + tokens_per_program, n_tokens)
    words_ptr += site * n_words * n_tokens
    next_words_ptr += site * n_next_words * n_tokens
    counts = tl.zeros([BLOCK_E, BLOCK_E], tl.float32)
    for start in range(first, last, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        chosen = _multi_hot(
            words_ptr, row * (BLOCK_E // 32), tokens, tokens < last, n_words, n_tokens,
            BLOCK_E, BLOCK_T,
        )  # fmt: skip
        following = _multi_hot(
            next_words_ptr, column * (BLOCK_E // 32), tokens, tokens < last, n_next_words,
            n_tokens, BLOCK_E, BLOCK_T,
        )  # fmt: skip
        counts = tl.dot(chosen, tl.trans(following), counts)
    expert = row * BLOCK_E + tl.arange(0, BLOCK_E)
    other = column * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = (expert < n_experts)[:, None] & (other < n_next)[None, :]
    out_ptr += site * n_experts * n_next
    # sums of integers do not depend on which program comes first
    added = counts.to(tl.int32).to(tl.int64)
    at = out_ptr + expert[:, None] * n_next + other[None, :]
    tl.atomic_add(at, added, mask=inside & (added != 0))


def _pack(ids: torch.Tensor, n_experts: int, valid: torch.Tensor | None) -> torch.Tensor:
    """Return which experts each token chose as bits, [S, ceil(E / 32), T] uint32 in int32."""
    n_sites, n_tokens, slots = ids.shape
    n_words = triton.cdiv(n_experts, 32)
    words = torch.empty((n_sites, n_words, n_tokens), dtype=torch.int32, device=ids.device)
    _pack_kernel[(triton.cdiv(n_tokens, PACK_BLOCK_T), n_sites)](
        ids, ids if valid is None else valid, words.view(torch.uint32),
        n_tokens, n_words,
        EMPTY=EMPTY_CODES.get(ids.dtype, -1), SLOTS=slots, MASKED=valid is not None,
        BLOCK_T=PACK_BLOCK_T, BLOCK_W=triton.next_power_of_2(n_words), num_warps=PACK_WARPS,
    )  # fmt: skip
    return words


def _gram(
    words: torch.Tensor, n_experts: int, next_words: torch.Tensor, n_next: int, *, symmetric: bool
) -> torch.Tensor:
    """Count the pairs of two bitmaps in one launch for all sites, [S, E, E2] int64."""
    n_sites, n_words, n_tokens = words.shape
    out = torch.zeros((n_sites, n_experts, n_next), dtype=torch.int64, device=words.device)
    block = min(MAX_BLOCK_E, max(32, triton.next_power_of_2(max(n_experts, n_next))))
    rows, columns = triton.cdiv(n_experts, block), triton.cdiv(n_next, block)
    _gram_kernel[(rows * columns, triton.cdiv(n_tokens, TOKENS_PER_PROGRAM), n_sites)](
        words.view(torch.uint32), next_words.view(torch.uint32), out,
        n_tokens, n_experts, n_next, n_words, next_words.shape[1], columns, TOKENS_PER_PROGRAM,
        SYMMETRIC=symmetric, BLOCK_T=GRAM_BLOCK_T, BLOCK_E=block, num_warps=GRAM_WARPS,
    )  # fmt: skip
    if symmetric and rows > 1:
        upper = out.triu()
        return upper + upper.triu(1).mT
    return out


def coactivation_triton(
    expert_ids: torch.Tensor,
    next_expert_ids: torch.Tensor | None = None,
    *,
    n_experts: int,
    n_next_experts: int,
    valid: torch.Tensor | None = None,
) -> CoactivationOutput:
    """Launch the kernels; ids are contiguous [S, T, K] and were checked by the op."""
    n_sites, n_tokens, _ = expert_ids.shape
    if not (n_sites and n_tokens):
        new = expert_ids.new_zeros
        pairs = new((n_sites, n_experts, n_experts), dtype=torch.int64)
        transitions = new((n_sites, n_experts, n_next_experts), dtype=torch.int64)
        return CoactivationOutput(pairs, None if next_expert_ids is None else transitions)
    words = _pack(expert_ids, n_experts, valid)
    pairs = _gram(words, n_experts, words, n_experts, symmetric=True)
    if next_expert_ids is None:
        return CoactivationOutput(pairs, None)
    # a token that is not counted has no bits here, so its bits there meet nothing
    next_words = _pack(next_expert_ids, n_next_experts, None)
    transitions = _gram(words, n_experts, next_words, n_next_experts, symmetric=False)
    return CoactivationOutput(pairs, transitions)
