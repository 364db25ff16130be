"""Overview: what this run is, its key figures, and the load of every expert."""
