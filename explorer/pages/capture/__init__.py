"""Capture: from prompts to a run that can be looked at."""
