"""CPU implementation of coactivation: a token adds to the K x K pairs it has, nothing else."""

import numba
import numpy as np
import torch

from kernels.ops.coactivation import EMPTY_CODES, CoactivationOutput, wrong_id


@numba.njit(cache=True, nogil=True)
def _read(ids, site, token, empty, n_experts, row):
    """Fill ``row`` with a token's experts, each once; return how many, or -1 - slot if wrong."""
    filled = 0
    for slot in range(ids.shape[2]):
        expert = np.int64(ids[site, token, slot])
        if expert == empty:
            continue
        if expert < 0 or expert >= n_experts:
            return -1 - slot
        seen = False
        for other in range(filled):
            seen |= row[other] == expert
        if not seen:
            row[filled] = expert
            filled += 1
    return filled


@numba.njit(cache=True, nogil=True)
def _count(ids, empty, next_ids, next_empty, valid, masked, pairs, transitions):
    """Add every token; return (which ids, site, token, slot) of the first wrong id, else -1s."""
    n_sites, n_tokens, n_slots = ids.shape
    n_experts, n_next = transitions.shape[1:]
    here = np.empty(n_slots, np.int64)
    there = np.empty(next_ids.shape[2], np.int64)
    for site in range(n_sites):
        for token in range(n_tokens):
            if masked and not valid[token]:
                continue
            chosen = _read(ids, site, token, empty, n_experts, here)
            if chosen < 0:
                return 0, site, token, -1 - chosen
            for a in range(chosen):
                for b in range(a + 1):
                    pairs[site, here[a], here[b]] += 1
            if n_next == 0:
                continue
            following = _read(next_ids, site, token, next_empty, n_next, there)
            if following < 0:
                return 1, site, token, -1 - following
            for a in range(chosen):
                for b in range(following):
                    transitions[site, here[a], there[b]] += 1
        # a pair was counted in the order of its slots: add both orders, the diagonal once
        for a in range(n_experts):
            for b in range(a):
                both = pairs[site, a, b] + pairs[site, b, a]
                pairs[site, a, b] = both
                pairs[site, b, a] = both
    return -1, -1, -1, -1


def coactivation_numba(
    expert_ids: torch.Tensor,
    next_expert_ids: torch.Tensor | None = None,
    *,
    n_experts: int,
    n_next_experts: int,
    valid: torch.Tensor | None = None,
) -> CoactivationOutput:
    """Count on one core; ids are [S, T, K] and were checked by the op, but for their values."""
    n_sites = len(expert_ids)
    following = expert_ids if next_expert_ids is None else next_expert_ids
    n_next = 0 if next_expert_ids is None else n_next_experts
    pairs = np.zeros((n_sites, n_experts, n_experts), np.int64)
    transitions = np.zeros((n_sites, n_experts, n_next), np.int64)
    which, site, token, slot = _count(
        expert_ids.numpy(),
        EMPTY_CODES.get(expert_ids.dtype, -1),
        following.numpy(),
        EMPTY_CODES.get(following.dtype, -1),
        np.ones(0, np.bool_) if valid is None else valid.numpy(),
        valid is not None,
        pairs,
        transitions,
    )
    at = (site, token, slot)
    if which == 0:
        raise wrong_id("expert_ids", expert_ids, at, n_experts)
    if which == 1:
        raise wrong_id("next_expert_ids", following, at, n_next)
    return CoactivationOutput(
        torch.from_numpy(pairs),
        None if next_expert_ids is None else torch.from_numpy(transitions),
    )
