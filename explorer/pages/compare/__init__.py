"""Compare: other routers in the model's place, what they cost and what they save."""
