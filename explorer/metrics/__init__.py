"""Numbers about routing, from plain numpy arrays.

load        how evenly a layer's experts share the work, and what perfectly uniform routing of the
            same number of tokens would give (the sampling floor)
capacity    what is dropped when every expert takes only so many tokens of a batch
confidence  how sure a router is of one token

``nan`` means undefined (no load, a single expert, nothing recorded), never zero.
"""
