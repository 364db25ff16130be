"""Blocks of code for transformers 4: a gate beside a list of modules, recorded or refused."""

import duckdb
import numpy as np
import pytest
import tiny_models
import torch
from torch import nn
from torch.nn.functional import linear

import capture
from capture.errors import SiteError
from capture.matrix import tiny
from capture.matrix.compare import EXACT, REFUSED, check_model
from capture.matrix.found import architecture
from capture.model.hooks import tap
from capture.model.selftest import attach
from explorer import open_run
from explorer.findings.halves import read_halves
from explorer.maps.data import expert_facts
from explorer.pages.experts.data import loads_by_domain
from explorer.queries.load import expert_load, routing, window_loads
from explorer.queries.overview import noted
from explorer.queries.routed import left_out

pytestmark = pytest.mark.slow

WIDTH, N_EXPERTS, TOP_K = 32, 8, 3


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Mixtral4(nn.Module):
    """MixtralSparseMoeBlock of 4.x: the gate gives logits, each expert is called once at most."""

    normed, scale = True, 1.0

    def __init__(self):
        super().__init__()
        self.top_k, self.num_experts = TOP_K, N_EXPERTS
        self.gate = nn.Linear(WIDTH, N_EXPERTS, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(N_EXPERTS))

    def rule(self, logits):
        weights, ids = logits.softmax(-1, dtype=torch.float).topk(self.top_k, dim=-1)
        return (weights / weights.sum(-1, keepdim=True) if self.normed else weights), ids

    def mix(self, x, weights, ids):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            top_x, slot = torch.where(ids == number)
            if len(top_x):
                out.index_add_(0, top_x, expert(x[top_x]) * weights[top_x, slot, None] * self.scale)
        return out

    def forward(self, hidden):
        x = hidden.view(-1, WIDTH)
        return self.mix(x, *self.rule(self.gate(x))).view(hidden.shape)


class Qwen2(Mixtral4):
    """Not renormalised, beside an expert that all tokens share."""

    normed = False

    def __init__(self):
        super().__init__()
        self.shared_expert, self.shared_expert_gate = Mlp(), nn.Linear(WIDTH, 1, bias=False)

    def forward(self, hidden):
        return super().forward(hidden) + self.shared_expert_gate(hidden).sigmoid() * (
            self.shared_expert(hidden)
        )


class Scaled(Mixtral4):
    scale = 2.5


class DeepseekGate(nn.Module):
    """MoEGate of remote code: ids and weights by groups' bias, and no scores."""

    def __init__(self):
        super().__init__()
        self.top_k = TOP_K
        self.weight = nn.Parameter(torch.randn(N_EXPERTS, WIDTH))
        self.e_score_correction_bias = nn.Parameter(torch.randn(N_EXPERTS))

    def forward(self, hidden):
        scores = linear(hidden.view(-1, WIDTH), self.weight).sigmoid()
        ids = (scores + self.e_score_correction_bias).topk(self.top_k, sorted=False).indices
        weights = scores.gather(1, ids)
        return ids, weights / weights.sum(-1, keepdim=True) * 2.5, None


class Deepseek(Mixtral4):
    def __init__(self):
        super().__init__()
        self.gate = DeepseekGate()

    def forward(self, hidden):
        ids, weights, _ = self.gate(hidden)
        return self.mix(hidden.view(-1, WIDTH), weights, ids).view(hidden.shape)


class DenseGate(nn.Linear):
    """Weights [T, E] of all experts, 0 for those that are not chosen."""

    def forward(self, x):
        weights, ids = super().forward(x).softmax(-1).topk(TOP_K)
        return torch.zeros(len(x), N_EXPERTS).scatter(1, ids, weights)


class Dense(Mixtral4):
    def __init__(self):
        super().__init__()
        self.gate = DenseGate(WIDTH, N_EXPERTS)

    def rule(self, weights):
        return weights.topk(self.top_k)


class Squared(Mixtral4):
    """A rule that nobody knows."""

    def rule(self, logits):
        weights, ids = super().rule(logits)
        return weights.square(), ids


class Everywhere(Mixtral4):
    """Every expert is called with every token, so that calls say nothing."""

    def mix(self, x, weights, ids):
        dense = torch.zeros(len(x), N_EXPERTS).scatter(1, ids, weights)
        return sum(e(x) * dense[:, n, None] for n, e in enumerate(self.experts))


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.constant, self.wg = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, 2, bias=False)

    def forward(self, x):
        shares = self.wg(x).softmax(-1)
        return shares[:, :1] * x + shares[:, 1:] * self.constant


class PlusPlus(Mixtral4):
    """Experts of MoE++: some compute nothing, in any place among the others."""

    def __init__(self):
        super().__init__()
        self.experts[2], self.experts[6], self.experts[7] = nn.Identity(), Zero(), Constant()


def with_blocks(kind):
    """Return a Mixtral whose blocks are of one kind."""
    model = tiny_models.build("mixtral")
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = kind()
    for parameter in model.model.layers.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, 0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (Mixtral4, "softmax"),
        (Qwen2, "softmax"),
        (Scaled, "softmax"),
        (Deepseek, "other"),
        (Dense, "other"),
    ],
)
def test_they_are_recorded_exactly(kind, rule):
    verdict = check_model(with_blocks(kind), ("own", kind.__name__), saved=False)
    assert (verdict.outcome, verdict.reason) == (EXACT, "")
    assert (verdict.rules, verdict.n_sites) == ((rule,), 3)


@pytest.mark.parametrize("kind", [Squared, Everywhere])
def test_what_no_rule_explains_is_refused_by_name(kind):
    verdict = check_model(with_blocks(kind), ("own", kind.__name__), saved=False)
    assert verdict.outcome == REFUSED
    assert f"model.layers.0.mlp ({kind.__name__}) routes to experts" in verdict.reason
    assert "its experts are a list of modules" in verdict.reason


def test_what_experts_without_weights_do_is_told_apart(tmp_path):
    """In the run, and by the figures of load, which count the routed ones alone."""
    out = capture.record(
        with_blocks(PlusPlus), [list(range(3, 40))], tmp_path / "r.duckdb", progress=False
    )
    kinds = ["routed"] * N_EXPERTS
    kinds[2], kinds[6], kinds[7] = "identity", "zero", "constant"
    with open_run(out) as run:
        assert [list(site.expert_kinds) for site in run.sites] == [kinds] * 3
        assert run.query("SELECT DISTINCT dropped FROM sites")["dropped"].tolist() == [0]
        rows = run.query("SELECT * FROM expert_load WHERE layer = 0 ORDER BY expert_id")
        assert rows["kind"].tolist() == kinds
        load = expert_load(run, layer=0)
        assert load["expert_id"].tolist() == [0, 1, 3, 4, 5]
        routed = rows[rows["kind"] == "routed"]["assignments"]
        assert load["assignments"].tolist() == routed.tolist()
        assert 0 < routed.sum() < rows["assignments"].sum() == 37 * TOP_K
        assert load["share"].sum() == pytest.approx(1)
        assert load["ratio"].tolist() == pytest.approx((5 * load["share"]).tolist())
        # numbers among the routed: expert 3 is the third
        chosen = routing(run, 0).expert_ids
        counts = np.bincount(chosen[chosen >= 0], minlength=5)
        assert counts.tolist() == routed.tolist()
        loads = window_loads(run, "domains").loads
        assert loads[0, 0].tolist() == routed.tolist() and loads.shape == (1, 3, 5)
        # who is dead, who has a fair share, whose domains are compared: of the routed alone
        facts = expert_facts(run).to_pandas().set_index(["layer", "expert_id"]).loc[0]
        assert facts["kind"].tolist() == kinds
        assert facts["ratio"].dropna().to_dict() == pytest.approx(
            dict(zip(load["expert_id"], load["ratio"], strict=True))
        )
        assert {*loads_by_domain(run)["expert_id"]} <= {0, 1, 3, 4, 5}
        assert read_halves(run)[0].sites[0].routed.tolist() == [0, 1, 3, 4, 5]
        assert left_out(run) == (
            "Load counts routed experts only; of 24 in all layers, 3 mix in a constant, 3 pass a "
            "token on as it is, 3 give nothing."
        )


def test_a_mask_that_the_experts_heed_is_recorded(monkeypatch):
    """NLLB's experts as they were in transformers 4; as they are now they read it as ids."""

    def heed(self, hidden, mask, probs):
        out = torch.zeros_like(hidden)
        for number in range(self.num_experts):
            rows = probs[:, number].nonzero().flatten()
            if len(rows):
                worked = self[f"expert_{number}"](hidden[rows]) * probs[rows, number, None]
                out[rows] += worked * (1 - self.moe_token_dropout)
        return out

    model = tiny.tiny(architecture("nllb-moe"))
    monkeypatch.setattr(type(model.model.encoder.layers[0].ffn.experts), "forward", heed)
    verdict = check_model(model, ("nllb-moe", "heeding"))
    assert (verdict.outcome, verdict.reason, verdict.n_sites) == (EXACT, "", 3)


def test_a_mask_that_is_taken_for_ids_is_recorded_as_it_is_taken(tmp_path):
    """NLLB's experts as they are: 0 and 1 do all, and drop what a batch leaves no room for."""
    model = tiny.tiny(architecture("nllb-moe"))
    path = capture.record(
        model, [[5, 6, 7, 8, 9], [10, 11, 12]], tmp_path / "r.duckdb", progress=False
    )
    with open_run(path) as run:
        assert {*run.query("SELECT expert_id FROM assignments").expert_id} == {0, 1}
        assert run.query("SELECT sum(dropped) AS n FROM sites").n[0] > 0
        assert "take it for ids: experts 0 and 1" in run.notes["routers"]
        assert run.notes["batches"].endswith("every prompt was read by itself.")
        told = ("routers", "batches", "two_sides")
        assert noted(run) == " ".join(run.notes[name] for name in told)
        assert run.query("SELECT count(*) AS n FROM batches").n[0] >= 2
    for block in model.modules():
        vars(block).update({"second_expert_policy": "random"})
    with pytest.raises(SiteError, match=r"or on chance\. Such a model cannot be recorded token by"):
        attach(model, two_sides=True, alone=True)


def test_the_model_computes_what_it_computes_without(tmp_path):
    model = with_blocks(Qwen2)
    ids = tiny_models.tokens()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        state = torch.random.get_rng_state()
        attach(model)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_gate_that_puts_out_something_else_later_is_refused():
    model = with_blocks(Deepseek)
    sites = attach(model)
    gate = model.model.layers[1].mlp.gate
    old = gate.forward
    gate.forward = lambda hidden: (old(hidden)[0].float(), *old(hidden)[1:])
    with tap(sites) as taps, torch.no_grad():
        model(input_ids=tiny_models.tokens())
        with pytest.raises(SiteError, match=r"layers\.1\.mlp cannot be tapped: its gate did not"):
            taps.take()


def test_equal_rows_are_routed_equally(tmp_path):
    """Two prompts that begin alike have equal rows, which calls cannot tell apart."""
    model = with_blocks(Mixtral4)
    out = tmp_path / "run.duckdb"
    capture.record(model, [[5, 6, 7], [5, 6, 8]], out, progress=False)
    with duckdb.connect(str(out), read_only=True) as run:
        rows = run.execute(
            "select position, list((layer, expert_id, weight) order by layer, slot) from "
            "assignments join tokens using (token_id) group by prompt_id, position "
            "order by position, prompt_id"
        ).fetchall()
    assert rows[0] == rows[1] and rows[2] == rows[3] and rows[4] != rows[5]
    assert {len(found) for _, found in rows} == {9}
