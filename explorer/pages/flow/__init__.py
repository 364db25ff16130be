"""Flow: which experts follow each other from layer to layer, and which serve the same token."""
