"""What of the model's attention a capture keeps: the form for it."""

from typing import Any

import streamlit as st

from capture.recorder.config import (
    DEFAULT_ATTENTION_BINS,
    DEFAULT_ATTENTION_PROMPTS,
    DEFAULT_ATTENTION_TOP_KEYS,
)

DEFAULTS: dict[str, Any] = {
    "attention_prompts": DEFAULT_ATTENTION_PROMPTS,
    "attention_layers": None,
    "attention_heads": None,
    "attention_every": 1,
    "attention_bins": DEFAULT_ATTENTION_BINS,
    "attention_top_keys": DEFAULT_ATTENTION_TOP_KEYS,
}
_BINS = (16, 32, 64, 128)
_MAX_KEYS = 16


def attention_options() -> tuple[dict[str, Any], str]:
    """Draw the options of level attention.

    Returns
    -------
    options : dict
        Fields of ``worker.CaptureRequest``.
    problem : str
        What is wrong with them, "" where nothing is.
    """
    options = dict(DEFAULTS)
    first, second, third = st.columns(3)
    options["attention_prompts"] = int(
        first.number_input(
            "Prompts with attention",
            min_value=1,
            value=DEFAULT_ATTENTION_PROMPTS,
            help="Maps grow with prompts, layers and heads, so they are kept for some prompts: "
            "equal shares of every domain, at least one of each.",
            key="attention prompts",
        )
    )
    options["attention_every"] = int(
        second.number_input(
            "Use every n-th block",
            min_value=1,
            value=1,
            help="Queries come in blocks of 64 tokens; 1 uses all of them, 8 is eight times "
            "quicker. Prompts of up to 64 tokens are not affected.",
            key="attention every",
        )
    )
    options["attention_top_keys"] = int(
        third.number_input(
            "Heaviest keys",
            min_value=0,
            max_value=_MAX_KEYS,
            value=DEFAULT_ATTENTION_TOP_KEYS,
            help="For each token and head, the keys that it attends to most, exactly. 0 = none.",
            key="attention keys",
        )
    )
    layers = first.text_input("Layers", placeholder="all, or 0, 5, 11", key="attention layers")
    heads = second.text_input("Heads", placeholder="all, or 0, 1", key="attention heads")
    options["attention_bins"] = int(
        third.selectbox(
            "Bins of a map",
            _BINS,
            index=_BINS.index(DEFAULT_ATTENTION_BINS),
            help="A map has at most so many blocks of tokens to a side; a prompt of no more "
            "tokens has an exact map.",
            key="attention bins",
        )
    )
    problem = ""
    for name, label, text in (
        ("attention_layers", "layers", layers),
        ("attention_heads", "heads", heads),
    ):
        options[name] = _numbers(text)
        if options[name] == []:
            problem = f"Write {label} as whole numbers with commas, such as 0, 5, or leave it out."
    return options, problem


def _numbers(text: str) -> list[int] | None:
    """Return the numbers of a list, None for an empty one, and [] for what is none."""
    parts = [part.strip() for part in text.replace(",", " ").split()]
    if not parts or parts == ["all"]:
        return None
    if all(part.isascii() and part.isdecimal() and len(part) < 5 for part in parts):
        return sorted({int(part) for part in parts})
    return []
