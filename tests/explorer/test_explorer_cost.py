"""What a rule costs: weights that a decoding step reads, and the proxy of energy."""

import numpy as np
import pytest
import tiny_models
import torch

from capture.model.flops import LayerFlops, ModelFlops, model_flops
from capture.model.selftest import attach
from explorer.comparison import cost
from explorer.comparison.cost import DECODED, Usage, cost_of, memory_reads

KEY = (0, 0)
NOTHING = Usage(keys=0, experts={}, load={})


@pytest.mark.parametrize(("decoded", "read"), [(1, 8.0), (4, 26.5), (16, 56.4), (32, 63.1)])
def test_activated_is_not_streamed(monkeypatch, decoded, read):
    """64 experts, top-8, routed evenly: design page routers.md 5."""
    monkeypatch.setattr(cost, "DECODED", decoded)
    # one expert is one weight, so two operations
    layer = LayerFlops(0, 0.0, 0.0, None, {KEY: 0.0}, {KEY: 2.0}, 0.0, 0.0)
    used = Usage(keys=0, experts={KEY: 8.0}, load={KEY: np.full(64, 8 / 64)})
    moved = cost_of(ModelFlops((layer,), 0.0), used, itemsize=4).moved
    assert round(moved * decoded / 4, 1) == read


def test_a_decoding_step_reads_all_but_idle_experts_and_the_input_embedding():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    generator = np.random.default_rng(0)
    load = {
        (s.info.layer, s.info.site): (generator.random(s.info.n_experts) < 0.5).astype(np.float64)
        for s in sites
    }
    used = Usage(keys=0, experts={key: float(ran.sum()) for key, ran in load.items()}, load=load)
    moved = cost_of(model_flops(model, sites), used, itemsize=4).moved
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    expert = 3 * 32 * 48  # gate, up and down
    idle = sum(int((ran == 0).sum()) for ran in load.values())
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    assert moved * DECODED == 4 * (matrices - embedding.numel() - idle * expert)


def test_energy_counts_a_read_as_many_operations():
    """Horowitz 2014: 0.9 and 3.7 pJ an operation of 32 bit, 640 pJ a word from memory."""
    one_weight = ModelFlops((), 2.0)
    assert cost_of(one_weight, NOTHING, itemsize=4).energy == pytest.approx(4.6 + 640 / DECODED)
    halves = cost_of(one_weight, NOTHING, itemsize=2).energy
    assert halves == pytest.approx(1.5 + 320 / DECODED)


def test_what_choices_ask_of_memory():
    """Two texts whose rows lie mixed; a cache of 2 of 8 experts, text after text."""
    ids = np.array([[1, 0], [4, 5], [0, 1], [5, 4], [2, -1], [4, 6], [0, 1], [4, 7]])
    texts = [1, 2, 1, 2, 1, 2, 1, 2]
    found = memory_reads(ids, texts, 8)
    # 0 1 | 0 1 | 2 | 0 1 || 4 5 | 4 5 | 4 6 | 4 7: least recently used goes
    # hits: 0 and 1 again, until 2 evicts 0; 4 and 5 again, and 4 twice more
    assert found["hit_rate"] == pytest.approx((2 + 4) / 15)
    assert found["draft_experts"] == pytest.approx((3 + 4) / 2)
    assert found["max_violation"] == pytest.approx(4 / (15 / 8) - 1)
    assert np.isnan(memory_reads(ids[:3], texts[:3], 8)["draft_experts"])
