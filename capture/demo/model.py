"""The demo model: its shape, its start, fast experts on a CPU, and snapshots of its training."""

import contextlib
import copy
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from capture import record
from capture.demo.streams import BOS, CONTEXT, EOS, VOCABULARY

INITIALIZER_RANGE = 0.04
PAD = 0
WARM_UP_STEPS = 100  # of the training's rate
SORTED_EXPERTS = "sorted"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
STAGES = "training.json"
RANDOM_SEED = 1


def make_config() -> OlmoeConfig:
    """Describe the shipped configuration: 6 layers of 16 experts, top-2."""
    return OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def stock_model(seed: int) -> OlmoeForCausalLM:
    """Make an untrained model the way transformers does from the config alone."""
    torch.manual_seed(seed)
    return OlmoeForCausalLM(make_config())


def random_model(seed: int) -> OlmoeForCausalLM:
    """Make the untrained model that training starts from: outputs scaled down with depth."""
    model = stock_model(seed)
    scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name or "o_proj" in name:
                parameter.mul_(scale)
    return model


def load_model(folder: Path) -> OlmoeForCausalLM:
    """Load saved weights in float32."""
    model: OlmoeForCausalLM = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def sorted_experts(
    experts: Any,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Run the experts on tokens sorted by expert: one matrix product each.

    The stock implementation indexes the stacked weight once an expert, so its backward pass
    builds a gradient of full size as often as there are experts.

    Parameters
    ----------
    experts : Module
        Holds ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I].
    hidden : Tensor [T, H]
    expert_ids : Tensor [T, K], int64
    weights : Tensor [T, K]
    """
    tokens, width = hidden.shape
    top_k = expert_ids.size(-1)
    chosen, order = torch.sort(expert_ids.reshape(-1), stable=True)
    counts = torch.bincount(chosen, minlength=experts.num_experts).tolist()
    inputs = torch.split(hidden.index_select(0, order // top_k), counts)
    outputs = []
    parts = zip(inputs, experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0), strict=True)
    for rows, gate_up, down in parts:
        if len(rows):
            gate, up = functional.linear(rows, gate_up).chunk(2, -1)
            outputs.append(functional.linear(functional.silu(gate) * up, down))
    summands = torch.cat(outputs)
    factors = weights.reshape(-1).index_select(0, order).to(summands.dtype)
    weighted = summands * factors.unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    slots = weighted.index_select(0, inverse).view(tokens, top_k, width)
    return slots.sum(1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(SORTED_EXPERTS, sorted_experts)


def use_experts(model: PreTrainedModel, device: torch.device) -> None:
    """Choose the experts implementation that is fastest on the device."""
    name = SORTED_EXPERTS if device.type == "cpu" else "grouped_mm"
    model.set_experts_implementation(name)


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Save config and weights in bfloat16, readable by everyone."""
    stored: PreTrainedModel = copy.deepcopy(model)
    torch.nn.Module.to(stored, torch.bfloat16)
    stored.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def snapshot_folder(work: Path, step: int, percent: int) -> Path:
    """Name the folder of a snapshot."""
    return work / "training" / "snapshots" / f"step_{step:05d}_{percent:03d}"


def list_snapshots(work: Path) -> list[Path]:
    """List the snapshots, earliest first."""
    return sorted((work / "training" / "snapshots").glob("step_*"))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put the tokenizer's files beside the weights."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)


def save_snapshot(model: PreTrainedModel, tokenizer: Path, folder: Path) -> None:
    """Save weights and tokenizer so that `from_pretrained` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder)
    copy_tokenizer(tokenizer, folder)


def read_stages(folder: Path) -> list[dict[str, Any]]:
    """Read how weights were trained, one entry a training run; empty where nothing is noted."""
    path = folder / STAGES
    stages: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return stages


def install(snapshot: Path, weights: Path) -> None:
    """Replace the shipped model by a snapshot."""
    weights.mkdir(parents=True, exist_ok=True)
    for path in snapshot.iterdir():
        shutil.copyfile(path, weights / path.name)


def record_snapshots(work: Path, folder: Path) -> list[Path]:
    """Record the demo prompts through a random-init model and through every snapshot.

    Returns the run files in ``folder``, in the order of the training; those that exist stay.
    """
    snapshots = list_snapshots(work)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        untrained = Path(scratch) / "random_init"
        save_snapshot(random_model(RANDOM_SEED), snapshots[-1], untrained)
        for snapshot in tqdm([untrained, *snapshots], desc="record", unit="run"):
            run = folder / f"{snapshot.name}.duckdb"
            if not run.exists():
                # a run keeps the model's name as given: the folder's, not this machine's path
                with contextlib.chdir(snapshot.parent):
                    record(snapshot.name, "demo", run, level="ids", sample_tokens=0)
            runs.append(run)
    return runs
