"""Load balance: whether the experts of a layer share the work, limits, and serving."""
