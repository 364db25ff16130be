"""Another rule in a router's place, parts of a model gated, and recorded routing played back.

Imports ``model`` and the attention of ``recorder``; the explorer's comparisons stand on it.
"""
