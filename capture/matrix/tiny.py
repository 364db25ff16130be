"""Tiny random models, one per architecture, whose routing is made non-trivial.

``build(config_of("mixtral"))`` gives a model in evaluation mode with random routers, selection
biases and experts. Sizes are the same for all, see ``SMALL``; an architecture that nobody knows yet
is built with those of its fields that have a name in there.
"""

from typing import Any

import torch
from torch import nn

from capture.matrix.found import Architecture

N_EXPERTS, TOP_K = 8, 3
VOCABULARY = 64
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": N_EXPERTS,
    "num_local_experts": N_EXPERTS,
    "n_routed_experts": N_EXPERTS,
    "moe_num_experts": N_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "moe_hidden_size": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 16,
    "router_aux_loss_coef": 0.0,
    "sliding_window": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # encoder-decoders
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    # of models that also see and hear: tokens that no text holds
    **dict.fromkeys(("image_token_id", "image_token_index"), VOCABULARY),
    **dict.fromkeys(("video_token_id", "audio_token_id"), VOCABULARY + 1),
}
# towers that see or hear: a forward pass over text does not run them
TOWER: dict[str, Any] = {
    "depth": 1,
    "num_hidden_layers": 1,
    "encoder_layers": 1,
    "hidden_size": 16,
    "d_model": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "output_dim": 32,
    "projection_hidden_dim": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "downsample_hidden_size": 8,
    "image_size": 28,
    "patch_size": 14,
    "head_dim": 8,
    "embed_dim": 16,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "vision_output_dim": 32,
}
TOWERS = ("vision", "audio", "code2wav", "code_predictor")

_MLA = {"num_key_value_heads": 4}
_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_MROPE = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 1, 1]}
# what makes the rule of a known family non-trivial, or its sizes agree
KNOWN: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {4: 2}},
    "aria_text": {"moe_num_shared_experts": 1},
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": {**_MLA, "layer_group_size": 2},
    "beam": {**_SPARSE, "routed_scaling_factor": 1.7},
    "cohere2_moe": {"expert_selection_fn": "sigmoid", "norm_topk_prob": True},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 16,
            "moe_num_experts": N_EXPERTS,
            "moe_top_k": TOP_K,
        },
    },
    "deepseek_ocr2_text": {**_MLA, **_SPARSE},
    "deepseek_v2": {
        **_MLA,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.7,
    },
    "deepseek_v3": {**_MLA, "routed_scaling_factor": 2.5},
    "deepseek_v32": _MLA,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 8,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note_text": {
        **_MLA,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense"],
        "adapter_in_dim": 16,
        "adapter_out_dim": 32,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 16, "adapter_out_dim": 32},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 8],
        "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]},
    },
    "flex_olmo": {"norm_topk_prob": False},
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "glm4_moe": {"routed_scaling_factor": 1.5},
    "glm4_moe_lite": _MLA,
    "glm4v_moe_text": {
        "rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
    },
    "glm5_next_text": {
        **_MLA,
        **_SPARSE,
        **_MIXED,
        "qk_rope_head_dim": 0,
        "head_dim": 0,
    },
    "glm_moe_dsa": _MLA,
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hy_v4_vl_text": {"rope_parameters": _MROPE},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_MLA, **_MIXED},
    "laguna": {"moe_routed_scaling_factor": 1.7},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {**_MLA, "zero_expert_num": 2, "num_layers": 2},
    "minimax_m3_vl_text": {"routed_scaling_factor": 1.7},
    "mistral4": _MLA,
    "mistral_large4_text": _MLA,
    "nllb-moe": {
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 2,
        "moe_eval_capacity_token_fraction": 0.2,  # tokens are dropped
    },
    "muse_spark": {"projector_hidden_size": 16},
    "muse_spark_audio": {
        "num_hidden_layers": 4,
        "hidden_sizes": [8, 8, 8, 8],
        "depths": [1, 1, 1, 1],
    },
    "olmoe": {"norm_topk_prob": False},
    "phimoe": {"num_experts_per_tok": 2, "router_jitter_noise": 0.2},
    "qwen2_moe": {"norm_topk_prob": False, "mlp_only_layers": [1]},
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": [0]},
    "qwen3_5_moe_text": _MIXED,
    "qwen3_next": _MIXED,
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCABULARY + 2},
    "qwen3_omni_moe_text": {"rope_parameters": _MROPE},
    "qwen3_vl_moe_text": {"rope_parameters": _MROPE},
    "qwen4_exp_text": {
        **_MIXED,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "step3p5": {**_SPARSE, "moe_router_scaling_factor": 1.7},
    "switch_transformers": {
        "decoder_start_token_id": 0,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 2,
    },
    "unlimited_ocr_text": _MLA,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


def config_of(kind: Any, **changes: Any) -> Any:
    """Return a small configuration of one class, parts of it included.

    Parameters
    ----------
    kind : type
        Of a configuration.
    **changes : Any
        Fields of its language part to set otherwise.
    """
    return _small(kind, SMALL, changes)


def _small(kind: Any, sizes: dict[str, Any], changes: dict[str, Any]) -> Any:
    fields = kind.__dataclass_fields__
    values = {name: value for name, value in sizes.items() if name in fields}
    parts = [name for name in getattr(kind, "sub_configs", None) or {} if name in fields]
    whole = kind() if parts else None
    text = next((name for name in ("text_config", "thinker_config") if name in parts), None)
    for name in parts:
        part = getattr(whole, name)
        if hasattr(part, "__dataclass_fields__"):
            is_tower = any(word in name for word in TOWERS)
            values[name] = _small(
                type(part), TOWER if is_tower else SMALL, changes if name == text else {}
            )
    values |= KNOWN.get(kind.model_type, {})
    return kind(**values | ({} if text else changes))


def build(model_class: Any, config: Any, *, seed: int = 0) -> nn.Module:
    """Return a random model in evaluation mode."""
    torch.manual_seed(seed)
    model: nn.Module = model_class(config)
    return randomise(model, seed=seed).eval()


def size(model_class: Any, config: Any) -> int:
    """Return how many parameters a model would have, without making them."""
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(config).parameters())


def tiny(found: Architecture, **changes: Any) -> nn.Module:
    """Return a random model of one architecture."""
    return build(found.model_class, config_of(found.config_class, **changes))


@torch.no_grad()
def randomise(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Give routers, selection biases and experts values that make every rule matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        last = name.rsplit(".", 1)[-1]
        if last == "tid2eid":
            rows = torch.rand(len(tensor), N_EXPERTS, generator=generator).argsort(dim=-1)
            tensor.copy_(rows[:, : tensor.shape[1]])
        if not tensor.is_floating_point():
            continue
        if last in BIASES:
            tensor.normal_(0, 0.5, generator=generator)
        elif last == "per_expert_scale":
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif any(part in ("gate", "router") for part in name.split(".")) and tensor.ndim == 2:
            tensor.normal_(0, 0.3, generator=generator)
        elif ".experts." in f".{name}" or tensor.ndim == 3:
            tensor.normal_(0, 0.2, generator=generator)
    return model
