"""The matrix of architectures: what capture says of each, against a truth that it cannot bend.

``python -m capture matrix`` looks through the installed transformers for architectures with routed
experts, builds a tiny random model of each, records it as people do, and compares the run file with
what the model's own modules computed. Nothing here uses an adapter.
"""
