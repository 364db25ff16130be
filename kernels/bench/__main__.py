"""The command line of the benchmarks: ``python -m kernels.bench --help``."""

import argparse
import json
import sys

import torch

import kernels
from kernels.bench import cases, results
from kernels.bench.cases import BenchError


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; returns 1 where a backend disagrees with its reference."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("ops", nargs="*", help="ops to time; all when none is named")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where present")
    parser.add_argument("--all", action="store_true", help="more shapes of every op")
    parser.add_argument("--repeats", type=int, help="default: 50 on cuda, 7 on cpu")
    parser.add_argument("--threads", type=int, help="threads of the CPU to use")
    parser.add_argument("--no-write", action="store_true", help="print, but keep the files")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="time nothing; compile every Triton kernel for every target, no GPU needed",
    )
    parser.add_argument(
        "--compile-for", metavar="TARGET", help="the same for one target, a JSON object a kernel"
    )
    parser.add_argument(
        "--readme", action="store_true", help="only write the files' tables into the README"
    )
    options = parser.parse_args(arguments)
    wrong = sorted(set(options.ops) - set(kernels.__all__))
    if wrong:
        parser.error(f"no such op: {', '.join(wrong)}. Choose from {', '.join(kernels.__all__)}.")
    if options.readme:
        results.update_readme()
        return 0
    compiles = options.compile or options.compile_for
    return _compile(options) if compiles else _time(options)


def _compile(options: argparse.Namespace) -> int:
    from kernels.bench import compile as matrix  # a CPU-only install has no triton

    if options.compile_for:
        for row in matrix.measure_target(options.compile_for):
            print(json.dumps(vars(row)), flush=True)
        return 0
    rows = matrix.measure_all()
    for row in rows:
        print(*vars(row).values(), sep="  ")
    if not options.no_write:
        results.write_compiled(rows)
        print(f"Wrote {results.COMPILED}.")
    return 0


def _time(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here. Pass --device cpu.", file=sys.stderr)
        return 2
    repeats = options.repeats or (50 if device.type == "cuda" else 7)
    refused = 0
    for op in options.ops or kernels.__all__:
        for size in cases.sizes(device, more=options.all):
            for problem in cases.problems(op, size, device):
                try:
                    rows = results.measure(problem, device, repeats)
                except BenchError as error:
                    refused += 1
                    print(error, file=sys.stderr, flush=True)
                    continue
                print(results.markdown(rows), end="\n\n", flush=True)
                if not options.no_write:
                    results.write(results.merge(results.read(), rows), results.RESULTS)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
