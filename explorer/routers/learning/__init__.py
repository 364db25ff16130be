"""How routers learn: by imitation, on the model's own loss, and by exploration with rewards."""
