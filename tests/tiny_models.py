"""Tiny random language models, one per architecture, whose routing is made non-trivial.

``build("mixtral")`` gives a model in evaluation mode with random routers, selection biases and
experts; ``config_of`` gives its configuration. They are those of ``python -m capture matrix``, but
for the text parts of models that also see: those stand here without the rest.
"""

import copy
import importlib

import torch

from capture.matrix import tiny
from capture.matrix.found import architecture, architectures
from capture.matrix.tiny import SMALL, randomise

__all__ = ["REQUIRED", "SMALL", "build", "class_of", "config_of", "randomise", "tokens"]

# the thirteen that the run file must be right for
REQUIRED = (
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3"),
    *("gpt_oss", "granitemoe", "glm4_moe", "phimoe", "minimax_m2", "flex_olmo"),
)
# text models without a head, of architectures that are loaded with eyes or to classify
TEXT = {
    "deepseek_ocr2": "DeepseekOcr2TextModel",
    "diffusion_gemma": "DiffusionGemmaEncoderTextModel",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeTextModel",
    "glm4v_moe": "Glm4vMoeTextModel",
    "glm5_next": "Glm5NextTextModel",
    "hy_v4_vl": "HYV4VLTextModel",
    "mistral_large4": "MistralLarge4TextModel",
    "muse_spark": "MuseSparkTextModel",
    "openai_privacy_filter": "OpenAIPrivacyFilterModel",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerTextModel",
    "qwen3_vl_moe": "Qwen3VLMoeTextModel",
    "step3p7": "Step3p7TextModel",
    "unlimited_ocr": "UnlimitedOcrTextModel",
}
# the whole of these is the same model with other parts beside it, or no decoder alone
_WHOLE = {
    *("aria", "dots3_note", "gemma4", "inkling2", "inkling2_loop", "inkling_mm_model", "llama4"),
    "minimax_m3_vl",
    *("qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen4_exp", "nllb-moe", "switch_transformers"),
}


def __getattr__(name):
    if name != "OTHERS":  # looked up when asked for: it takes seconds
        raise AttributeError(name)
    return tuple(sorted({one.model_type for one in architectures()} - set(REQUIRED) - _WHOLE))


def class_of(model_type):
    """Return the model class of one architecture."""
    if model_type not in TEXT:
        return architecture(model_type).model_class
    module = f"transformers.models.{model_type}.modeling_{model_type}"
    return getattr(importlib.import_module(module), TEXT[model_type])


def config_of(model_type, **changes):
    """Return a small configuration of one architecture."""
    return tiny.config_of(class_of(model_type).config_class, **changes)


_BUILT: dict[str, torch.nn.Module] = {}


def build(model_type, *, seed=0, dtype=torch.float32, **changes):
    """Return a random model of one architecture in evaluation mode, which nobody else has.

    A model is made once a process and copied; torch's generator starts at `seed` afterwards.
    """
    key = repr((model_type, seed, dtype, sorted(changes.items())))
    if key not in _BUILT:
        model = tiny.build(class_of(model_type), config_of(model_type, **changes), seed=seed)
        _BUILT[key] = model.to(dtype)
    torch.manual_seed(seed)
    return copy.deepcopy(_BUILT[key])


def tokens(rows=2, length=7, *, vocab=64, seed=0):
    """Return token ids [rows, length], all different, without special ids."""
    order = torch.randperm(vocab - 3, generator=torch.Generator().manual_seed(seed)) + 3
    return order[: rows * length].reshape(rows, length)
