"""A model as capture sees it: loaded, its routers found and listened to, one batch run through it.

Owns everything that knows transformers: loading, tokens, the forward pass, adapters for each kind
of MoE block, the self-test, and operations. Knows the store's records; imports nothing of
``recorder`` or ``swap``.
"""
