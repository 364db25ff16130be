"""Compare routers: by replay on what a run file holds, and live in the model.

compare       ``explorer.compare``; settings of rules chosen before
session       one comparison: what is asked for, what is there, what is missing, where it goes
text_split    the fit split and the report split
replay        route recorded router inputs again and report agreement, balance and compute
fit           fit routers on what the model does on the fit split
live          run the model with a router in place, and watch what it chooses
live_results  what that came to, as rows of the tables
cost          operations, bytes and energy
matched_controls  random controls at the same compute
causality     whether a router looks ahead or at other sequences
oracle        the last layer's experts chosen by the loss: a bound
verdicts      two routers paired text by text, and what that can show; imports no torch
results_file  the tables, reading and writing them; imports no torch
conditions    the same texts with other weights, fewer experts, students of the gate
bench         how long replay and live rules take

Importing this package imports nothing; most of its modules import torch.
"""
