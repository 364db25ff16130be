"""Recording inside somebody's own loop: every call of a model is followed, whoever makes it."""
