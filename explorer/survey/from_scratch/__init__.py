"""Tiny language models trained from scratch, each with another router in place.

``python -m explorer.survey.from_scratch`` trains them and compares the order of their losses with
the order in the papers that the routers come from. The rules are those of
:mod:`explorer.routers`: what is swapped into a finished model elsewhere decides here while the
model learns.

arms    which router each model has, what papers found, and whether models come in that order
model   a transformer whose experts a rule chooses
train   texts, training, held-out loss
ensemble  one model for each cluster of texts, mixed by nearness (c-BTM)
"""
