"""Record what a loop of your own does with a model, and what routing does while it trains.

PYTHONPATH=. python .github/examples/own_loop.py runs/own.duckdb
"""

import sys

import torch

import capture
from capture.model.load import load_model

TEXTS = ["The quick brown fox jumps over the lazy dog.", "def add(a, b):"]


def main(out: str) -> None:
    """Read two texts, go one on by hand, generate after both, and train on them for a step."""
    demo = load_model("demo")
    model, tokenizer = demo.model, demo.tokenizer
    model.generation_config.eos_token_id = None
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    with capture.recording(model, out, tokenizer=tokenizer):
        with torch.no_grad():
            read = model(**tokenizer(TEXTS[0], return_tensors="pt"))
            token = read.logits[:, -1:].argmax(dim=-1)
            model(input_ids=token, cache=read.cache)
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        model.train()
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
    print(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
