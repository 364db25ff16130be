"""Fused routing statistics: one checked public op, one plain PyTorch reference, one fast backend.

The package must stay light and must not define a version: transformers probes for a Hugging Face
package of the same name (README, "Decisions").
"""
