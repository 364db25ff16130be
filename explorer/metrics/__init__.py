"""Numbers about routing, from plain numpy arrays.

load            how evenly a layer's experts share the work, and what perfectly uniform routing of
                the same number of tokens would give (the sampling floor)
capacity        what is dropped when every expert takes only so many tokens of a batch
coactivation    which experts meet more often than their loads alone would bring about, in a layer,
                in the next one, at the next token
specialization  what an expert is for: domains and vocabulary, intervals by prompt, shuffled floors;
                what is over-represented in a part
attention       whether tokens that attend to each other share experts, against two chance levels,
                and what attention without any preference would show
agreement       how far two routers agree about the same tokens
alignment       two tokenizations of one text, and whether two models route stretches alike
placement       replicas of experts and their places on GPUs, judged on traffic that they were not
                made from, and what a decode batch reads
cache           what caches of experts would hit, which experts to pin, what prefetching loads

``nan`` means undefined (no load, a single expert, nothing recorded), never zero.
"""
