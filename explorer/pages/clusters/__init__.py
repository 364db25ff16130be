"""Clusters: a map of tokens, prompts or experts; the maps are made by ``explorer.maps``."""
