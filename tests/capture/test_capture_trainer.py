"""The callback of transformers' trainer: runs every N steps, and figures of the batches."""

import json
import logging

import pytest
import tiny_models
import torch
import transformers
from own_loop import assert_recorded, padded, texts
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

import capture
from capture.errors import ConfigError
from explorer import open_run
from explorer.pages.trends.data import in_order, trend_table

pytestmark = pytest.mark.slow

ROWS = [[5, 6, 7, 9, 11], [8, 9], [20, 21, 22, 23], [30, 31, 32], [40, 41], [50, 51, 52, 53, 54]]
PROMPTS = [{"ids": [7, 8, 9]}, {"ids": [10, 11]}]


class Keeps(transformers.TrainerCallback):
    """A logger, as TensorBoard's is."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def batch_of(rows):
    ids, mask = padded(rows)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trained(tmp_path, callbacks=(), *, model=None, keeps=None, **options):
    """Train three steps of two rows; the model."""
    own = (model or tiny_models.build("olmoe", num_hidden_layers=2)).train()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=3, per_device_train_batch_size=2,
        logging_steps=1, report_to="none", save_strategy="no", seed=1, use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=own, args=arguments, train_dataset=ROWS, data_collator=batch_of,
        callbacks=[*([keeps] if keeps else []), *callbacks],
    )  # fmt: skip
    trainer.train()
    return own


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def test_training_is_the_same_and_its_runs_are_there(tmp_path):
    plain = trained(tmp_path)
    out, keeps = tmp_path / "runs", Keeps()
    callback = capture.TrainerCallback(out, every=2, prompts=PROMPTS)
    watched = trained(tmp_path, [callback], keeps=keeps)
    assert callback.error is None
    assert all(map(torch.equal, weights(plain), weights(watched)))
    names = sorted(path.name for path in out.iterdir())
    steps = [f"step_{n:06d}.duckdb" for n in (0, 2, 3)]
    assert names == ["statistics.jsonl", *steps]
    assert_recorded(watched.eval(), out / steps[2], [([7, 8, 9], 3), ([10, 11], 2)])
    first = texts(out / steps[0])
    assert [text.tokens for text in first] == [[7, 8, 9], [10, 11]]
    runs = [open_run(out / name) for name in steps]
    table = trend_table(in_order([(run.path.stem, run) for run in runs]))
    assert sorted(set(table["step"])) == [0, 2, 3]
    # a logger that stands before the callback gets the figures too
    logged = [one for one in keeps.logs if "loss" in one]
    assert len(logged) == 3
    lines = [json.loads(line) for line in (out / names[0]).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for one, line in zip(logged, lines, strict=True):
        for name in ("dead_experts", "z_loss", "aux_loss", "aux_loss_with_padding"):
            assert one[f"routing/{name}"] == pytest.approx(line[name])


def figures_by_hand(model, batches):
    """Return the figures of one step, from plain hooks on the routers."""
    logits = {0: [], 1: []}
    chosen = {0: [], 1: []}
    handles = [
        layer.mlp.gate.register_forward_hook(
            lambda _m, _a, out, n=n: logits[n].append(out[0]) or chosen[n].append(out[2])
        )
        for n, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    real = [batch["attention_mask"].flatten().bool() for batch in batches]
    figures = {"z_loss": 0.0, "dead_experts": 0, "max_violation": 0.0, "gate_entropy": 0.0}
    loads = []
    for n in range(2):
        kept = torch.cat([one[mask] for one, mask in zip(logits[n], real, strict=True)])
        ids = torch.cat([one[mask] for one, mask in zip(chosen[n], real, strict=True)])
        load = ids.flatten().bincount(minlength=8)
        loads.append(load.tolist())
        probs = kept.softmax(-1)
        figures["z_loss"] += kept.logsumexp(-1).square().mean().item() / 2
        figures["gate_entropy"] += -(probs * probs.log()).sum(-1).mean().item() / 2
        figures["dead_experts"] += int((load == 0).sum())
        figures["max_violation"] += (load.max() / load.sum() * 8 - 1).item() / 2
    return figures, loads, [torch.cat(logits[n]) for n in range(2)]


def test_figures_are_of_the_real_tokens_of_a_step(tmp_path):
    own = tiny_models.build("olmoe", num_hidden_layers=2)
    batches = [batch_of(ROWS[:2]), batch_of(ROWS[2:4])]
    expected, loads, scores = figures_by_hand(own, batches)
    out = tmp_path / "runs"
    callback = capture.TrainerCallback(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformers.Trainer, "_get_train_sampler",
            lambda self, *a: torch.utils.data.SequentialSampler(ROWS),
        )  # fmt: skip
        trained(tmp_path, [callback], model=own, gradient_accumulation_steps=2, learning_rate=0.0)
    line = json.loads((out / "statistics.jsonl").read_text().splitlines()[0])
    assert callback.error is None and line["step"] == 1
    assert [router["load"] for router in line["routers"]] == loads
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=1e-4), name
    with_padding = load_balancing_loss_func(tuple(scores), 8, 3)
    assert line["aux_loss_with_padding"] == pytest.approx(float(with_padding), rel=1e-4)
    # batches of 5 and 4 columns: rows that are real, in both layers
    real = torch.cat([b["attention_mask"].flatten().bool() for b in batches])
    without = load_balancing_loss_func(tuple(s[real] for s in scores), 8, 3)
    assert line["aux_loss"] == pytest.approx(float(without), rel=1e-4)
    assert line["aux_loss"] != pytest.approx(line["aux_loss_with_padding"], rel=1e-3)


def test_what_fails_does_not_stop_the_training(tmp_path, caplog):
    plain = trained(tmp_path)
    own = tiny_models.build("olmoe", num_hidden_layers=2)

    class Breaks(transformers.TrainerCallback):
        """Lets a router run twice, which nobody can follow."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                gate = own.model.layers[0].mlp.gate
                own.model.layers[0].mlp.register_forward_pre_hook(
                    lambda _, args: (gate(args[0].flatten(0, 1)), None)[1]
                )

    callback = capture.TrainerCallback(tmp_path / "runs")
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, [callback, Breaks()], model=own)
    assert "router ran 2" in str(callback.error)
    assert sum("no longer watched" in record.message for record in caplog.records) == 1
    assert all(map(torch.equal, weights(plain), weights(own)))
    assert len((tmp_path / "runs" / "statistics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("options", [{"every": 2}, {"prompts": PROMPTS}, {"every": -1}])
def test_prompts_and_steps_belong_together(tmp_path, options):
    with pytest.raises(ConfigError):
        capture.TrainerCallback(tmp_path, **options)
