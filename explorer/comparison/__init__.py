"""Compare routers: by replay on what a run file holds, and live in the model.

api         ``explorer.compare``
session     one comparison: what is there, what is missing, where it goes
plan        which routers, with which seeds, in which modes
names       routers by name, with arguments; routers of a user's own file
replay      route recorded router inputs again and report agreement, balance and compute
replay_rows  what that came to: by layer, by domain, token by token
texts       the fit split and the report split
fitting     fit routers on what the model does on the fit split
importance  how much heads, blocks and layers add, which rules about parts are fitted on
lab         run the model with a router in place
measure     what it chose meanwhile, and how that agrees with the model
cost        operations, bytes and energy
controls    random controls at the same compute
paired      two routers of one comparison, text by text; imports no torch
reach       what the numbers can and cannot show, in words
pick        settings of rules, chosen on a part of the fit split
oracle      the last layer's experts chosen by the loss: a bound
badges      whether a router looks ahead or at other sequences
rows        from measurements to table rows
tables      the tables of a comparison file
file        reading and writing it; imports no torch
keys        names for content, by which results are found again
progress    how far a comparison is

Importing this package imports nothing; most of its modules import torch.
"""
