"""Train tiny models with different routers and compare their order with the published one.

python -m explorer.survey.from_scratch --out runs/from_scratch
python -m explorer.survey.from_scratch --arms dense,top_1,hash --seeds 0,1 --steps 100 --out FOLDER
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from capture.paths import path_argument
from explorer.errors import ExplorerError, RouterError
from explorer.survey.from_scratch.arms import ARMS, CLAIMS, arms_table, claims_table
from explorer.survey.from_scratch.train import Setting, load_corpus, seeds_of, trained

SETTING = Setting()
ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, print both tables, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m explorer.survey.from_scratch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--arms", metavar="A,B", help=f"default: all of {', '.join(ARMS)}")
    add("--seeds", default="0,1,2", metavar="0,1", help="default: 0,1,2")
    add("--steps", type=int, default=SETTING.steps, help=f"default: {SETTING.steps}")
    add(
        "--out",
        type=path_argument,
        required=True,
        metavar="FOLDER",
        help="keeps each model's figures",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # models this small are slower on several
    try:
        results = run(options)
    except ExplorerError as error:
        print(error, file=sys.stderr)
        return ERROR
    print(_text(arms_table(results)))
    claims = claims_table(results, CLAIMS)
    if len(claims):
        print(f"\n{_text(claims)}")
    return 0


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures of all models, seed by seed, training those that are not in the folder."""
    names = options.arms.split(",") if options.arms else list(ARMS)
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise RouterError(f"Expected --arms among {', '.join(ARMS)}, got {options.arms}.")
    setting = Setting(steps=options.steps)
    corpus = load_corpus(setting.shape.vocabulary)
    results = []
    for seed in seeds_of(options.seeds):
        for name in names:
            found = trained(name, setting, corpus, seed, options.out)
            print(f"{name}, seed {seed}: loss {found['loss']:.4f}", file=sys.stderr)
            results.append(found)
    return results


def _text(table: Any) -> str:
    text: str = table.to_string(index=False, na_rep="–", float_format=lambda value: f"{value:.4f}")
    return text


if __name__ == "__main__":
    sys.exit(main())
