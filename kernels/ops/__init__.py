"""One folder an op: the checked function, its plain definition in torch, and its fast backends."""
