"""Measurements of capture, each against a named baseline in the same run.

``python -m capture.bench store`` prints how fast routing rows reach a run file and what one row
takes on disk. ``overhead`` prints how much longer a model takes while it is recorded, ``levels``
the same for every level, ``own-loop`` that of somebody's own loop, ``import`` how fast traces of
other programs come in, ``attention-memory`` how much memory recorded attention takes.
``arithmetic`` measures nothing: it works out a capture that is too large to try. A further
measurement is one more entry of ``COMMANDS``.
"""

import argparse
from collections.abc import Callable, Sequence

from capture.bench.arithmetic import arithmetic, arithmetic_options
from capture.bench.import_rate import import_options, import_rate
from capture.bench.overhead import (
    attention_memory,
    attention_memory_options,
    levels,
    levels_options,
    overhead,
    overhead_options,
)
from capture.bench.own_loop import own_loop, own_loop_options
from capture.bench.store import store, store_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m capture.bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="MEASUREMENT")
    for name, (describe, run) in COMMANDS.items():
        command = commands.add_parser(name, help=(run.__doc__ or "").splitlines()[0])
        describe(command)
        command.set_defaults(run=run)
    options = parser.parse_args(arguments)
    run_chosen: Callable[[argparse.Namespace], None] = options.run
    run_chosen(options)
    return 0


COMMANDS: dict[
    str,
    tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]],
] = {
    "store": (store_options, store),
    "overhead": (overhead_options, overhead),
    "levels": (levels_options, levels),
    "own-loop": (own_loop_options, own_loop),
    "import": (import_options, import_rate),
    "attention-memory": (attention_memory_options, attention_memory),
    "arithmetic": (arithmetic_options, arithmetic),
}


if __name__ == "__main__":
    raise SystemExit(main())
