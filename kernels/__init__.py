"""Fused routing statistics: one checked public op, one plain PyTorch reference, one fast backend.

The package must not define a version and must not import transformers: transformers probes for a
Hugging Face package of the same name, finds ours, and imports it (README, "Decisions").
"""

from kernels.gate import gate

__all__ = ["gate"]
