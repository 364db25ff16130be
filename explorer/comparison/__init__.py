"""Compare routers: by replay on what a run file holds, without the model.

replay      route recorded router inputs again and report agreement, balance and compute

Importing this package imports nothing; its modules import torch.
"""
