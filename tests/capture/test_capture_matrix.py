"""The matrix of architectures: that it finds them, that it can say no, and what it says of each."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from capture.__main__ import main
from capture.errors import CaptureCancelled, ConfigError
from capture.matrix import compare, tiny
from capture.matrix.compare import (
    CHECKS,
    EXACT,
    REFUSED,
    UNTESTED,
    WRONG,
    Verdict,
    check,
    check_model,
)
from capture.matrix.found import Architecture, architecture, architectures
from capture.matrix.table import check_all, line, markdown, summary
from capture.matrix.truth import banks, measure
from capture.model.adapters.base import Channel
from capture.model.adapters.standard import StandardAdapter

pytestmark = pytest.mark.slow

PAPER = Path(__file__).parents[2] / "capture" / "README.md"
# every kind of block, of rule and of refusal
SPREAD = (
    *("mixtral", "deepseek_v3", "gpt_oss", "gemma4_text", "jetmoe", "llama4", "zaya"),
    *("longcat_flash", "dbrx", "qwen3_omni_moe", "switch_transformers", "doge"),
)
FOUND = {one.model_type for one in architectures()}


@pytest.fixture(scope="module")
def paper():
    """What the paper says of each model type: (result, rule or reason)."""
    table = PAPER.read_text(encoding="utf-8").split("\n## Architectures\n")[1].split("\n## ")[0]
    said = {}
    for result, why, names in re.findall(r"^\| (\w+) \| (.*) \| (`.*) \|$", table, re.MULTILINE):
        said |= dict.fromkeys(re.findall(r"`([\w-]+)`", names), (result, why))
    return said


def as_said(verdict):
    (row,) = re.findall(r"^\| (\w+) \| (.*) \| `", markdown([verdict]), re.MULTILINE)
    return row


def test_architectures_are_found_and_not_listed():
    assert len(FOUND) > 75
    assert {"mixtral", "llama4", "qwen3_omni_moe", "switch_transformers", "dbrx"} <= FOUND
    assert FOUND.isdisjoint({"llama", "bamba", "gemma3", "glm4v_moe_vision", "vitpose_backbone"})
    assert architecture("aria").class_name == "AriaForConditionalGeneration"
    assert architecture("aria_text").class_name == "AriaTextForCausalLM"


def test_the_table_says_something_of_every_architecture(paper):
    assert set(paper) == FOUND
    assert {result for result, _ in paper.values()} == {EXACT, REFUSED}


@pytest.mark.parametrize("name", SPREAD)
def test_the_spread_is_as_the_paper_says(name, paper):
    verdict = next(check_all([name]))
    assert as_said(verdict) == paper[name], line(verdict)


@pytest.mark.matrix
@pytest.mark.parametrize("name", sorted(FOUND - set(SPREAD)))
def test_all_others_are_as_the_paper_says(name, paper):
    verdict = next(check_all([name]))
    assert as_said(verdict) == paper[name], line(verdict)


def changed(monkeypatch, change):
    """Let the standard adapter hear ids and weights that ``change`` made."""
    put = Channel.put_choice

    def bent(self, ids, weights):
        put(self, *change(ids, weights))

    monkeypatch.setattr(Channel, "put_choice", bent)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ids, weights: ((ids + 1) % 8, weights), r"token 0 went to experts|physical ids"),
        (lambda ids, weights: (ids.flip(0), weights), r"one prompt|went to experts|each prompt"),
        (lambda ids, weights: (ids, weights * 1.02), r"under recorded weights differ"),
        (lambda ids, weights: (ids, weights.flip(-1)), r"under recorded weights differ"),
    ],
    ids=["other experts", "other tokens", "other weights", "other slots"],
)
def test_a_wrong_choice_is_seen(monkeypatch, change, said):
    changed(monkeypatch, change)
    verdict = check(architecture("mixtral"))
    assert verdict.outcome in (WRONG, REFUSED) and re.search(said, verdict.reason), verdict


def test_wrong_scores_are_seen(monkeypatch):
    put = Channel.put_scores
    monkeypatch.setattr(
        Channel, "put_scores", lambda self, scores, hidden: put(self, scores * 2, hidden)
    )
    verdict = check(architecture("mixtral"))
    assert verdict.outcome == WRONG and "its scores are what no module" in verdict.reason


def test_another_map_is_seen(tmp_path):
    """A run of one model beside the attention of another, whose queries are twice as large."""
    model, texts = tiny.tiny(architecture("mixtral")), compare.prompts()
    path = compare.record(
        model, texts, tmp_path / "r.duckdb", level="attention", sample_tokens=0, progress=False
    )
    assert compare._same_attention(path, model, texts)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(compare.Wrong, match=r"layers.1.self_attn, prompt 0, head \d: its map"):
        compare._same_attention(path, model, texts)


def test_a_block_without_a_site_is_seen(monkeypatch):
    found = compare._read

    def one_less(path):
        run = found(path)
        run.sites.pop(1)
        return run

    monkeypatch.setattr(compare, "_read", one_less)
    verdict = check(architecture("mixtral"))
    assert verdict.outcome == WRONG
    assert "model.layers.1.mlp.experts ran, and no site records them" in verdict.reason


def test_other_words_than_the_model_writes_are_seen(monkeypatch):
    from capture.recorder.loop import Recording

    decode = Recording._decode
    monkeypatch.setattr(Recording, "_decode", lambda *args: -decode(*args))
    verdict = check(architecture("mixtral"))
    assert verdict.outcome == WRONG and "should end in" in verdict.reason


def test_a_crash_is_no_refusal(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(StandardAdapter, "listen", broken)
    verdict = check(architecture("mixtral"))
    assert (verdict.outcome, verdict.reason) == (WRONG, "ends with RuntimeError: a bug")


def test_an_interruption_is_no_refusal(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise CaptureCancelled("Interrupted.")

    monkeypatch.setattr(compare, "record", interrupted)
    assert main(["matrix", "mixtral", "doge"]) == 130
    assert capsys.readouterr().out == ""


def test_a_model_that_does_not_run_is_untested():
    model = tiny.tiny(architecture("mixtral"))
    model.model.layers[1].mlp.forward = lambda hidden: hidden.image_outputs
    verdict = check_model(model, ("mine", "Mine"))
    assert verdict.outcome == UNTESTED
    assert verdict.reason.startswith("the model itself does not run: AttributeError")


def test_what_cannot_be_built_is_untested():
    class Config:
        model_type = "own"
        __dataclass_fields__ = ()

        def __init__(self):
            raise ValueError("a new field is needed")

    class Unknown(Architecture):
        config_class = Config

    verdict = check(Unknown("own", "OwnForCausalLM"))
    assert verdict.outcome == UNTESTED and "a new field is needed" in verdict.reason


def test_the_truth_finds_who_worked_without_any_adapter():
    """By hand: a block of two experts, where the first gives 1 and the second 10 to each token."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, 4, 4) * torch.tensor([[[1.0]], [[10.0]]]))

        def forward(self, hidden, ids, weights):
            out = torch.zeros_like(hidden)
            for slot in range(ids.shape[1]):
                out += weights[:, slot, None] * self.scale[ids[:, slot], :, 0]
            return out

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

        def forward(self, input_ids, use_cache):
            hidden = torch.zeros(input_ids.numel(), 4)
            return self.experts(hidden, input_ids.T % 2, torch.tensor([[0.5], [0.25], [1.0]]))

    model = Model()
    assert [bank.name for bank in banks(model, 2)] == ["experts"]
    (place,) = measure(model, torch.tensor([[0, 1, 0]]), 2).places
    given, rest = place.gave()
    assert given[..., 0].tolist() == [[0.5, 0, 1], [0, 2.5, 0]]
    assert not rest.any()
    assert place.alone(1, torch.tensor([1.0, 2, 0]))[:, 0].tolist() == [10, 20, 0]


def test_rules_of_tiny_models_are_not_trivial():
    """Groups, bias and scaling: the largest scores are not the choice, weights are no shares."""
    model = tiny.tiny(architecture("deepseek_v3"))
    gate = model.model.layers[1].mlp.gate
    assert gate.e_score_correction_bias.std() > 0.2
    assert (gate.num_group, gate.topk_group, gate.routed_scaling_factor) == (4, 2, 2.5)


def test_the_table_has_a_row_for_each_rule_and_each_reason():
    verdicts = [
        Verdict("b", "B", EXACT, "", ("softmax",), 3, CHECKS),
        Verdict("a", "A", EXACT, "", ("softmax",), 3, CHECKS),
        Verdict("c", "C", EXACT, "", ("other", "softmax"), 3, CHECKS[:-2]),
        Verdict("d", "D", REFUSED, "no|place"),
    ]
    assert markdown(verdicts).splitlines()[2:] == [
        "| exact | `softmax` | all | `a`, `b` |",
        "| exact | `other`, `softmax` | all but scores, attention | `c` |",
        r"| refused | no\|place | - | `d` |",
    ]
    assert summary(verdicts, 3.4) == "4 architectures: 3 exact, 1 refused, 0 untested. 3 s."
    assert line(verdicts[0]) == "exact    b: softmax; sites: 3; compared: all"


def test_the_command(capsys):
    assert main(["matrix", "mixtral", "openai_privacy_filter", "--markdown"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("| result |") and "| exact | `softmax` | all | `mixtral` |" in out
    assert "2 architectures: 1 exact, 1 refused, 0 untested." in err
    assert main(["matrix", "mixtrall"]) == 2
    assert "Did you mean: mixtral" in capsys.readouterr().err


def test_the_command_fails_where_a_run_is_wrong(monkeypatch, capsys):
    changed(monkeypatch, lambda ids, weights: (ids, weights * 1.02))
    assert main(["matrix", "mixtral"]) == 1
    assert capsys.readouterr().out.startswith("wrong    mixtral: model.layers.0.mlp, prompt 0:")


def test_own_models_can_be_checked():
    verdict = check_model(tiny.tiny(architecture("olmoe")), ("mine", "Mine"))
    assert verdict.outcome == EXACT


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="Did you mean: gpt_oss"):
        list(check_all(["gptoss"]))


@torch.no_grad()
def test_experts_by_product_keys_depend_on_the_batch():
    """Why Doge reads prompts by themselves: its first token changes with one in the middle."""
    model = tiny.tiny(architecture("doge"))
    block = model.model.layers[0].mlp
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    other = hidden.clone()
    other[0, 3] = hidden[0, 5]
    assert not torch.equal(block(hidden)[0][0, 0], block(other)[0][0, 0])
