"""The demo model's shape, its start, and an experts implementation that is fast on a CPU."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from capture.demo.tokenizer import BOS, CONTEXT, EOS, VOCABULARY

INITIALIZER_RANGE = 0.04
PAD = 0
SORTED_EXPERTS = "sorted"


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
        Router inputs.
    expert_ids : Tensor [T, K], int64
        Chosen experts.
    weights : Tensor [T, K]
        Combine weights.

    Returns
    -------
    Tensor [T, H]
        Weighted sum of the experts' outputs.
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
