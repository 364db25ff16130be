"""Where a model's heads look while it runs, for chosen prompts and layers."""
