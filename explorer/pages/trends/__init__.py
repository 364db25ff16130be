"""Trends: how routing changed over the checkpoints of a training."""
