"""Tiny random language models, one per architecture, whose routing is made non-trivial.

``build("mixtral")`` gives a model in evaluation mode with random routers, selection biases and
experts; ``config_of`` gives its configuration. Sizes are the same for all: see ``SMALL``.
"""

import copy
import importlib

import torch

SMALL = {
    "vocab_size": 64,
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
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_k": 3,
    "top_k_experts": 3,
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
}

# the thirteen that the run file must be right for, with what makes each one's rule non-trivial
REQUIRED = {
    "mixtral": {},
    "olmoe": {"norm_topk_prob": False},
    "qwen2_moe": {"norm_topk_prob": False, "mlp_only_layers": [1]},
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": [0]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.7,
    },
    "deepseek_v3": {"num_key_value_heads": 4, "routed_scaling_factor": 2.5},
    "gpt_oss": {},
    "granitemoe": {},
    "glm4_moe": {"routed_scaling_factor": 1.5},
    "phimoe": {"num_experts_per_tok": 2, "router_jitter_noise": 0.2},
    "minimax_m2": {},
    "flex_olmo": {"norm_topk_prob": False},
}

MLA = {"num_key_value_heads": 4}
# the rest of the inventory; a "module:Class" under "class" is a text model without a causal head
OTHERS = {
    "afmoe": {},
    "aria_text": {"moe_num_shared_experts": 1, "moe_topk": 3},
    "axk1": MLA,
    "axk2": MLA,
    "bailing_hybrid": {},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
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
            "moe_num_experts": 8,
            "moe_top_k": 3,
        },
    },
    "deepseek_ocr2": {
        **MLA,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "class": "deepseek_ocr2:DeepseekOcr2TextModel",
    },
    "deepseek_v32": MLA,
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8},
    "diffusion_gemma": {"class": "diffusion_gemma:DiffusionGemmaEncoderTextModel"},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {},
    "dots3_note_text": MLA,
    "ernie4_5_moe": {},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 8],
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]},
        "class": "ernie4_5_vl_moe:Ernie4_5_VLMoeTextModel",
    },
    "exaone_moe": {},
    "flint": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "glm4_moe_lite": MLA,
    "glm4v_moe": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "default",
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        },
        "class": "glm4v_moe:Glm4vMoeTextModel",
    },
    "glm5_next": {
        **MLA,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "class": "glm5_next:Glm5NextTextModel",
    },
    "glm_moe_dsa": MLA,
    "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {"moe_topk": 3},
    "hy_v3": {},
    "hy_v4": {},
    "inkling_text": {},
    "inkling2_text": {},
    "jamba": {},
    "jetmoe": {},
    "kimi_linear": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {},
    "longcat_flash": {**MLA, "zero_expert_num": 2, "moe_topk": 3, "num_layers": 2},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m3_vl_text": {},
    "mistral4": {**MLA, "class": "mistral4:Mistral4ForCausalLM"},
    "mistral_large4": {**MLA, "class": "mistral_large4:MistralLarge4TextModel"},
    "muse_spark": {"class": "muse_spark:MuseSparkTextModel"},
    "nemotron_h": {},
    "openai_privacy_filter": {"class": "openai_privacy_filter:OpenAIPrivacyFilterModel"},
    "qwen3_5_moe_text": {},
    "qwen3_omni_moe": {"class": "qwen3_omni_moe:Qwen3OmniMoeThinkerTextModel"},
    "qwen3_vl_moe": {"class": "qwen3_vl_moe:Qwen3VLMoeTextModel"},
    "qwen4_exp_text": {},
    "solar_open": {},
    "step3p7": {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "class": "step3p7:Step3p7TextModel",
    },
    "unlimited_ocr": {**MLA, "class": "unlimited_ocr:UnlimitedOcrTextModel"},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def class_of(model_type):
    """Return the model class of one architecture."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = OTHERS.get(model_type, {}).get("class")
    if path is None:
        return AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[model_type]]
    package, name = path.split(":")
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    return getattr(module, name)


def config_of(model_type, **changes):
    """Return a small configuration of one architecture."""
    kind = class_of(model_type).config_class
    fields = kind.__dataclass_fields__
    small = {k: v for k, v in SMALL.items() if k in fields}
    own = {k: v for k, v in {**REQUIRED, **OTHERS}[model_type].items() if k != "class"}
    return kind(**{**small, **own, **changes})


_BUILT: dict[str, torch.nn.Module] = {}


def build(model_type, *, seed=0, dtype=torch.float32, **changes):
    """Return a random model of one architecture in evaluation mode, which nobody else has.

    A model is made once a process and copied; torch's generator starts at `seed` afterwards.
    """
    key = repr((model_type, seed, dtype, sorted(changes.items())))
    if key not in _BUILT:
        torch.manual_seed(seed)
        model = class_of(model_type)(config_of(model_type, **changes))
        _BUILT[key] = randomise(model, seed=seed).to(dtype).eval()
    torch.manual_seed(seed)
    return copy.deepcopy(_BUILT[key])


@torch.no_grad()
def randomise(model, *, seed=0):
    """Give routers, selection biases and experts values that make every rule matter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        last = name.rsplit(".", 1)[-1]
        if last == "tid2eid":
            rows = torch.rand(len(tensor), 8, generator=generator).argsort(dim=-1)
            tensor.copy_(rows[:, : tensor.shape[1]])
        if not tensor.is_floating_point():
            continue
        if last in ("e_score_correction_bias", "expert_bias", "balancing_biases"):
            tensor.normal_(0, 0.5, generator=generator)
        elif last == "per_expert_scale":
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif any(part in ("gate", "router") for part in name.split(".")) and tensor.ndim == 2:
            tensor.normal_(0, 0.3, generator=generator)
        elif ".experts." in f".{name}" or tensor.ndim == 3:
            tensor.normal_(0, 0.2, generator=generator)
    return model


def tokens(rows=2, length=7, *, vocab=64, seed=0):
    """Return token ids [rows, length], all different, without special ids."""
    order = torch.randperm(vocab - 3, generator=torch.Generator().manual_seed(seed)) + 3
    return order[: rows * length].reshape(rows, length)
