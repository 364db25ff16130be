"""Compare runs: the same model twice, or two models on the same text."""
