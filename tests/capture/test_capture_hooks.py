"""Taps see every forward pass once, change nothing, and are always removed."""

import functools

import pytest
import tiny_models
import torch
from checks import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from capture.errors import SiteError
from capture.model.hooks import tap
from capture.model.selftest import attach
from capture.model.sites import find_sites


@pytest.fixture(params=["mixtral", "deepseek_v3"])
def model(request):
    return tiny_models.build(request.param)


@pytest.fixture
def mixtral():
    return tiny_models.build("mixtral")


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def run(model, ids, **options):
    return model(input_ids=ids, **options)


def test_logits_are_bit_equal(model):
    ids = tiny_models.tokens()
    before = run(model, ids).logits
    with tap(attach(model), hidden_rows=lambda: torch.arange(3)) as taps:
        during = run(model, ids).logits
        taps.take()
    assert torch.equal(before, during)
    assert torch.equal(before, run(model, ids).logits)


def test_hooks_are_removed_after_success_and_after_an_error(model):
    sites = find_sites(model)
    before = n_hooks(model)
    with tap(sites):
        assert n_hooks(model) == before + 2 * len(sites)
    assert n_hooks(model) == before
    with pytest.raises(RuntimeError, match="stop"), tap(sites):
        raise RuntimeError("stop")
    assert n_hooks(model) == before


def test_hooks_are_removed_when_the_model_fails(mixtral):
    def fail(*_):
        raise RuntimeError("broken layer")

    sites = find_sites(mixtral)
    handle = mixtral.model.layers[1].mlp.register_forward_pre_hook(fail)
    before = n_hooks(mixtral)
    with pytest.raises(RuntimeError, match="broken layer"), tap(sites):
        run(mixtral, tiny_models.tokens())
    handle.remove()
    assert n_hooks(mixtral) == before - 1
    with tap(sites) as taps:
        run(mixtral, tiny_models.tokens())
        assert len(taps.take()) == len(sites)


def test_a_site_that_did_not_run_is_named(mixtral):
    expected = r"model\.layers\.0\.mlp should run once in a forward"
    with tap(find_sites(mixtral)) as taps, pytest.raises(SiteError, match=expected):
        taps.take()


def test_a_site_hidden_by_a_fused_forward_is_named(mixtral):
    block = mixtral.model.layers[1].mlp
    block.forward = lambda hidden: hidden
    with pytest.raises(SiteError, match=r"model\.layers\.1\.mlp should run once"):
        attach(mixtral)


def test_two_forward_passes_without_a_take_are_refused(mixtral):
    with tap(find_sites(mixtral)) as taps:
        run(mixtral, tiny_models.tokens())
        run(mixtral, tiny_models.tokens())
        with pytest.raises(SiteError, match=r"model\.layers\.0\.mlp.*router ran 2.*take\(\)"):
            taps.take()
        run(mixtral, tiny_models.tokens())
        assert len(taps.take()) == 3


def test_discard_forgets_a_forward_pass(mixtral):
    with tap(find_sites(mixtral)) as taps:
        run(mixtral, tiny_models.tokens())
        taps.discard()
        run(mixtral, tiny_models.tokens(1, 5))
        assert taps.take()[0].expert_ids.shape == (5, 3)


def test_training_mode_is_refused(mixtral):
    sites = find_sites(mixtral)
    mixtral.train()
    expected = r"model\.layers\.0\.mlp is in training mode.*eval\(\)"
    with pytest.raises(SiteError, match=expected), tap(sites):
        pass
    mixtral.eval()
    with tap(sites) as taps:
        run(mixtral, tiny_models.tokens())
        mixtral.train()
        with pytest.raises(SiteError, match="training mode"):
            taps.take()


def test_one_model_is_tapped_once_at_a_time(mixtral):
    sites = find_sites(mixtral)
    with tap(sites), pytest.raises(SiteError, match="tapped already"), tap(find_sites(mixtral)):
        pass
    with tap(sites) as taps:
        run(mixtral, tiny_models.tokens())
        taps.take()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(mixtral, mode):
    ids = tiny_models.tokens()
    with tap(find_sites(mixtral), hidden_rows=lambda: torch.tensor([1])) as taps:
        with mode():
            mixtral(input_ids=ids)
        seen = taps.take()
    assert not any(t.requires_grad for s in seen for t in s)
    assert all(s.expert_ids.shape == (14, 3) for s in seen)


def test_decoding_with_a_cache_sees_one_row_a_sequence(model):
    """Prefill and three single steps see what one pass over the whole sequence sees."""
    ids = tiny_models.tokens(2, 8)
    sites = attach(model)
    with tap(sites) as taps:
        run(model, ids, use_cache=False)
        whole = taps.take()
        out = run(model, ids[:, :5], use_cache=True)
        parts = [taps.take()]
        for step in range(5, 8):
            out = run(model, ids[:, step : step + 1], cache=out.cache)
            parts.append(taps.take())
    for site in range(len(sites)):
        assert [p[site].expert_ids.shape[0] for p in parts] == [10, 2, 2, 2]
        weights = torch.cat([p[site].weights.view(2, -1, 3) for p in parts], dim=1)
        chosen = torch.cat([p[site].expert_ids.view(2, -1, 3) for p in parts], dim=1)
        assert torch.equal(chosen, whole[site].expert_ids.view(2, 8, 3))
        # the attention kernel sums in another order for a single query
        assert_close("weights", weights, whole[site].weights.view(2, 8, 3), atol=1e-5)


def test_only_the_wanted_router_inputs_are_kept(mixtral):
    ids, rows = tiny_models.tokens(), torch.tensor([5, 2, 13])
    with tap(find_sites(mixtral), hidden_rows=lambda: torch.arange(14)) as taps:
        run(mixtral, ids)
        everything = taps.take()
    with tap(find_sites(mixtral), hidden_rows=lambda: rows) as taps:
        run(mixtral, ids)
        wanted = taps.take()
    for all_rows, some in zip(everything, wanted, strict=True):
        assert torch.equal(some.hidden, all_rows.hidden[rows])
    with tap(find_sites(mixtral), hidden_rows=lambda: None) as taps:
        run(mixtral, ids)
        assert all(s.hidden is None for s in taps.take())


def test_router_inputs_are_copied(mixtral):
    """A model that writes into the block's input afterwards does not change the record."""

    def overwrite(_, args, output):
        args[0].zero_()

    sites = find_sites(mixtral)[:1]
    handle = sites[0].parent.register_forward_hook(overwrite)
    with torch.no_grad(), tap(sites, hidden_rows=lambda: torch.arange(14)) as taps:
        sites[0].parent(torch.ones(2, 7, 32))
        assert torch.equal(taps.take()[0].hidden, torch.ones(14, 32))
    handle.remove()


def test_forward_replaced_on_the_instance(mixtral):
    """Device maps put a wrapper on each module's instance; hooks still see the call."""
    sites = find_sites(mixtral)
    ids = tiny_models.tokens()
    with tap(sites) as taps:
        run(mixtral, ids)
        expected = taps.take()
    for site in sites:
        for module in (site.router, site.experts):
            old = module.forward
            module.forward = functools.wraps(old)(lambda *a, old=old, **k: old(*a, **k))
    with tap(attach(mixtral)) as taps:
        run(mixtral, ids)
        actual = taps.take()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.expert_ids, b.expert_ids)
        assert torch.equal(a.weights, b.weights)


def test_weights_that_accelerate_moves_in_and_out(mixtral):
    """Offloading wraps every forward and swaps weights around it; the taps see the same."""
    from accelerate import cpu_offload

    ids = tiny_models.tokens()
    with tap(find_sites(mixtral)) as taps:
        run(mixtral, ids)
        expected = taps.take()
    cpu_offload(mixtral, execution_device=torch.device("cpu"))
    with tap(attach(mixtral)) as taps:
        run(mixtral, ids)
        actual = taps.take()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.expert_ids, b.expert_ids)
        assert torch.equal(a.weights, b.weights)


def test_ids_given_by_keyword_are_seen(mixtral):
    for layer in mixtral.model.layers:
        old = layer.mlp.experts.forward

        def renamed(hidden_states, top_k_index, top_k_weights, old=old):
            return old(hidden_states, top_k_index, top_k_weights)

        layer.mlp.experts.forward = renamed
        block = layer.mlp

        def by_keyword(hidden, block=block):
            flat = hidden.view(-1, hidden.shape[-1])
            _, weights, ids = block.gate(flat)
            out = block.experts(hidden_states=flat, top_k_weights=weights, top_k_index=ids)
            return out.view(hidden.shape)

        block.forward = by_keyword
    with tap(attach(mixtral)) as taps:
        run(mixtral, tiny_models.tokens())
        assert [s.expert_ids.shape for s in taps.take()] == [(14, 3)] * 3


class Calls(TorchDispatchMode):
    """Count the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name] = self.names.get(func._schema.name, 0) + 1
        return func(*args, **kwargs or {})


def test_nothing_waits_for_the_device(mixtral):
    """Hooks add views and row copies to a forward pass, and take() only sorts: no item() call."""
    ids, rows = tiny_models.tokens(), torch.tensor([0, 3])
    with Calls() as plain:
        run(mixtral, ids)
    with tap(find_sites(mixtral), hidden_rows=lambda: rows) as taps:
        with Calls() as tapped:
            run(mixtral, ids)
        with Calls() as taking:
            taps.take()
    added = {n: c - plain.names.get(n, 0) for n, c in tapped.names.items()}
    assert {n for n, c in added.items() if c} <= {
        "aten::detach",
        "aten::view",
        "aten::index_select",
    }
    waiting = {"aten::_local_scalar_dense", "aten::nonzero", "aten::_to_copy", "aten::item"}
    assert not waiting & set(taking.names)


def test_shapes_that_disagree_are_refused(mixtral):
    site = find_sites(mixtral)[1]
    router = site.router
    old = router.forward

    def one_row_less(hidden):
        logits, weights, ids = old(hidden)
        return logits[1:], weights, ids

    router.forward = one_row_less
    with pytest.raises(
        SiteError, match=r"layers\.1\.mlp: router scores of shape \[64, 8\].*\[63, 8"
    ):
        attach(mixtral)


def test_experts_that_are_not_told_ids_are_refused(mixtral):
    router = mixtral.model.layers[2].mlp.gate
    old = router.forward

    def mask(hidden):
        logits, weights, ids = old(hidden)
        return logits, weights, torch.zeros_like(logits).scatter(1, ids, 1).bool()

    router.forward = mask
    mixtral.model.layers[2].mlp.experts.forward = lambda x, ids, weights: x
    with pytest.raises(SiteError, match=r"layers\.2\.mlp cannot be tapped.*ids \[T, K\]"):
        attach(mixtral)
