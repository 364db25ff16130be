"""Record a model on prompts of your own.

PYTHONPATH=. python .github/examples/record.py runs/example.duckdb
"""

import sys

import capture

PROMPTS = [
    {"text": "The quick brown fox jumps over the lazy dog.", "domain": "english"},
    {"text": "It was the best of times, it was the worst of times.", "domain": "english"},
    {"text": "def add(a, b):\n    return a + b\n", "domain": "python"},
    {"text": "for name in sorted(names):\n    print(name)\n", "domain": "python"},
]


def main(out: str) -> None:
    """Record the demo model; a folder, a Hugging Face id or a loaded model does as well."""
    path = capture.record("demo", PROMPTS, out, level="scores", generate=4, progress=False)
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
