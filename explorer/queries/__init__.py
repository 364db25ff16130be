"""The SELECTs that several pages share: one function per question, a DataFrame as the answer.

``where`` has the conditions that all of them take, ``overview`` what is in a run and its prompts,
``load`` how much work every expert got, and ``experts`` the tokens of one expert. What only one
page asks stands in that page's ``data``.

``domain=None`` and ``phase=None`` mean all; ``domain=""`` means prompts without a domain. Missing
values stay missing (None, NaN or NA) and are never 0; a count of nothing is 0. ``overview`` and
``load`` (save ``routing``) read totals only, so their time does not grow with the number of (token,
layer) rows, unless they are asked of a part; a run of schema 2 has no totals for ``gate_means``.
"""
