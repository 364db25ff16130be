"""Inputs on which every fast backend of the gate must agree with the reference."""

import itertools
from typing import Any, NamedTuple

import torch
from checks import assert_close

from kernels.ops.gate import gate, gate_batch

EXACT = ("expert_ids", "load")
TOLERANCE = {  # absolute; relative to the largest value for the sums
    "weights": 1e-6,
    "entropy": 3e-6,
    "margin": 3e-6,
    "logsumexp": 3e-6,
    "topk_mass": 2e-6,
    "importance": 1e-5,
    "weight_sum": 1e-5,
}
HALF_STEP = 2.0**-10  # two neighbouring float16, relative


class Case(NamedTuple):
    """Arguments of ``gate`` (a tensor as logits) or ``gate_batch`` (a list)."""

    logits: Any
    options: dict[str, Any]


def random_logits(n_tokens, n_experts, *, dtype=torch.float32, seed=0, scale=2.0):
    """Normal logits, all different in float32 and full of ties in the halves."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n_tokens, n_experts, generator=generator) * scale).to(dtype)


def choices(n_tokens, n_experts, top_k, *, seed=0, dtype=torch.float32, ids=torch.int64, empty=0.2):
    """Random distinct experts in no order, some slots empty, and weights with ties."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n_tokens, n_experts, generator=generator).argsort(-1)[:, :top_k]
    weights = torch.randint(1, 5, (n_tokens, top_k), generator=generator).float() / 7
    weights = torch.where(weights > 0.4, weights, weights * torch.rand(1, generator=generator))
    gone = torch.rand(n_tokens, top_k, generator=generator) < empty
    return order.masked_fill(gone, -1).to(ids), weights.to(dtype)


def check(case, backend):
    """Compare a backend with the reference, field by field."""
    run = gate_batch if isinstance(case.logits, list) or case.logits is None else gate
    actual = run(case.logits, **case.options, backend=backend)
    expected = run(case.logits, **case.options, backend="torch")
    packed = case.options.get("packed", False)
    for name in actual._fields:
        got, wanted = getattr(actual, name), getattr(expected, name)
        assert (got is None) == (wanted is None), name
        if got is None:
            continue
        assert got.dtype == wanted.dtype, f"{name}: {got.dtype} instead of {wanted.dtype}"
        assert got.shape == wanted.shape, f"{name}: {got.shape} instead of {wanted.shape}"
        if name in EXACT:
            assert torch.equal(got.long(), wanted.long()), f"{name}\n{got}\n{wanted}"
            continue
        if packed and name == "weights":
            # observed weights are the same numbers; selected ones may round to the next code
            step = int("expert_ids" not in case.options)
            gaps = (got.int() - wanted.int()).abs()
            assert bool((gaps <= step).all()), f"weights\n{got}\n{wanted}"
            continue
        got, wanted = got.float(), wanted.float()
        endless = wanted.isinf()
        assert torch.equal(got.isinf(), endless), f"{name} is infinite elsewhere"
        assert torch.equal(got[endless], wanted[endless]), f"{name} has other signs"
        got, wanted = got.masked_fill(endless, 0.0), wanted.masked_fill(endless, 0.0)
        summed = name in ("importance", "weight_sum")
        scale = max(1.0, float(wanted.abs().max())) if summed and wanted.numel() else 1.0
        half = packed and not summed
        assert_close(
            name, got, wanted, atol=TOLERANCE[name] * scale, rtol=HALF_STEP if half else 1e-6
        )  # fmt: skip


SHAPES = [  # tokens, experts, slots
    (37, 8, 2),
    (5, 7, 1),  # a prime number of experts, one slot
    (9, 13, 13),  # everyone is chosen
    (26, 64, 8),  # programs of eight tokens, the last not full
    (2, 40, 6),
    (2, 512, 8),
    (0, 8, 2),
]
RULES = ("softmax", "sigmoid", "softmax_topk", "probabilities")


def select_cases():
    """Yield cases of choosing: every rule, type and shape at least once."""
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16])
    flags = itertools.cycle([(False, True), (True, False), (True, True)])
    for (n_tokens, n_experts, top_k), rule in itertools.product(SHAPES, RULES):
        logits = random_logits(n_tokens, n_experts, dtype=next(dtypes))
        if rule == "probabilities":
            logits = logits.float().softmax(-1).to(logits.dtype)
        packed, renormalize = next(flags)
        options = {"top_k": top_k, "score_function": rule, "packed": packed}
        yield Case(logits, options | {"renormalize": renormalize})


def group_cases():
    """Yield cases with groups and biases, as DeepSeek-V2 and V3 have them."""
    for number, (rule, bias) in enumerate(itertools.product(RULES, (None, 0.3))):
        for shape, (n_tokens, n_experts, n_groups, top_groups, top_k) in enumerate(
            ((19, 32, 8, 3, 4), (10, 21, 3, 2, 5), (6, 6, 6, 4, 2), (3, 256, 8, 4, 8))
        ):
            logits = random_logits(n_tokens, n_experts, seed=n_experts)
            if rule == "probabilities":
                logits = logits.softmax(-1)
            values = None if bias is None else random_logits(1, n_experts, seed=7)[0] * bias
            options = {
                "top_k": top_k,
                "score_function": rule,
                "selection_bias": values,
                "n_groups": n_groups,
                "top_groups": top_groups,
            }
            yield Case(logits, options)
            # every shape with every rule, and with and without a bias
            if (number + number // 2 + shape) % 2:
                continue
            ids, weights = choices(n_tokens, n_experts, top_k, seed=3)
            yield Case(logits, options | {"expert_ids": ids, "weights": weights})
    logits, values = random_logits(33, 16), random_logits(1, 16, seed=5)[0]
    for rule in RULES[:3]:
        yield Case(logits, {"top_k": 4, "score_function": rule, "selection_bias": values})


def observe_cases():
    """Yield cases of observing: types, rows, padding, segments and packing together."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    combinations = itertools.product(SHAPES, RULES)
    for number, ((n_tokens, n_experts, top_k), rule) in enumerate(combinations):
        dtype = dtypes[number % 3]
        sites = 1 + number % 3
        n_rows = n_tokens + 5
        ids_dtype = (torch.int64, torch.int32)[number % 2]
        logits, ids, weights = [], [], []
        for site in range(sites):
            values = random_logits(n_rows, n_experts, dtype=dtype, seed=site)
            logits.append(
                values.float().softmax(-1).to(dtype) if rule == "probabilities" else values
            )
            chosen = choices(
                n_rows, n_experts, top_k, seed=site, dtype=dtypes[(number // 3) % 3], ids=ids_dtype
            )
            ids.append(chosen[0])
            weights.append(chosen[1])
        generator = torch.Generator().manual_seed(number)
        options = {
            "expert_ids": ids,
            "weights": weights,
            "rows": torch.randperm(n_rows, generator=generator)[:n_tokens],
            "n_experts": n_experts,
            "top_k": top_k,
            "score_function": rule,
            "packed": number % 4 < 2,
            "importance": number % 5 != 4,
        }
        if number % 2:
            options["valid"] = torch.rand(n_tokens, generator=generator) < 0.7
        if number % 3 == 1:
            options["segments"] = torch.randint(-1, 4, (n_tokens,), generator=generator)
            options["n_segments"] = 3
        yield Case(None if number % 7 == 6 else logits, options)


def edge_cases():
    """Yield single cases that were wrong once, or easily are."""
    softmax = {"score_function": "softmax"}
    yield Case(random_logits(2, 512), {"top_k": 20, **softmax})  # more slots than a thread sorts
    yield Case(torch.zeros(3, 16), {"top_k": 5, **softmax})  # nothing but ties
    ties = torch.tensor([[1.0, 3, 3, 1, 3, 0, 3, 3]]).repeat(3, 2)
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(ties.to(dtype), {"top_k": 4, **softmax})
    barred = random_logits(6, 16).masked_fill(random_logits(6, 16, seed=1) > 1, -torch.inf)
    barred[0, 1:] = -torch.inf
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rule in RULES[:3]:
            for top_k in (2, 16):
                yield Case(barred.to(dtype), {"top_k": top_k, "score_function": rule})
        ids, weights = choices(6, 16, 4, dtype=dtype)
        yield Case(barred.to(dtype), {"top_k": 4, **softmax, "expert_ids": ids, "weights": weights})
    far = torch.tensor([[0.0, -200, -300, 5e4, 3e4, -6e4, 1, 2]]).repeat(2, 1)  # underflow
    for rule in RULES[:3]:
        yield Case(far, {"top_k": 3, "score_function": rule})
        yield Case(far.half(), {"top_k": 8, "score_function": rule})
    padding = random_logits(9, 8, dtype=torch.bfloat16)
    padding[4:] = torch.nan
    for valid in (torch.arange(9) < 4, torch.zeros(9, dtype=torch.bool)):
        yield Case(padding, {"top_k": 2, **softmax, "valid": valid, "packed": True})
        ids, weights = choices(9, 8, 2)
        weights[4:] = torch.nan
        yield Case(
            padding, {"top_k": 2, **softmax, "valid": valid, "expert_ids": ids, "weights": weights}
        )
    ids, weights = choices(11, 300, 3, ids=torch.int32)
    weights[:, 0] = torch.tensor([0, 2**-55, 2**-60, 511.6, 600, -1, 1e-30, 3e-17, 1, 0.1, -0.0])
    weights[:, 1] = 1 + torch.arange(11) * 2.0**-11  # every other one is halfway between two codes
    ids[:, :2] = torch.tensor([299, 298])  # never empty
    options = {"top_k": 3, "expert_ids": ids, "weights": weights, "packed": True, **softmax}
    yield Case(random_logits(11, 300), options)
    outside = torch.tensor([[8, 2], [-5, 1], [2**33, 0]])
    options = {"top_k": 2, "expert_ids": outside, "weights": torch.rand(3, 2), **softmax}
    yield Case(random_logits(3, 8), options)


def every_case():
    """Yield all cases there are."""
    for cases in (select_cases, group_cases, observe_cases, edge_cases):
        yield from cases()
