"""Command line: record or import a run, close a killed one, migrate, test architectures."""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capture.errors import CaptureCancelled, CaptureError, ConfigError, PromptError
from capture.interrupts import Terminated
from capture.paths import RUN_SUFFIX, given_path, path_argument, suggested_name
from capture.recorder.config import CaptureConfig, described
from capture.recorder.record import record
from capture.store import merge, migrate, partition, recover
from capture.store.partition import TOKENS
from capture.traces import import_routing
from capture.traces.formats import NAMES

ERROR = 2
DIFFERS = 1  # an architecture is recorded otherwise than its experts ran
INTERRUPTED, TERMINATED = 130, 143  # 128 + SIGINT or SIGTERM, as shells expect

EXAMPLES = """\
examples:
  python -m capture demo
      the embedded model on its own prompts, into runs/demo-<time>.duckdb
  python -m capture demo --prompts mine.txt --out runs/mine.duckdb --generate 32
      your own prompts, one a line, and 32 decoded tokens after each
  python -m capture allenai/OLMoE-1B-7B-0125 --prompts questions.csv --out runs/olmoe.duckdb
      a model of the Hugging Face hub; the file has a column text and perhaps domain
  python -m capture demo --level attention --attention-prompts 20
      also pooled attention maps, head statistics and heaviest keys of 20 prompts
  python -m capture import responses.jsonl --out runs/served.duckdb
      routing that vLLM, SGLang, Megatron or another program recorded
  python -m capture MODEL --engine vllm --prompts mine.txt
      inside vLLM, in its environment: ids and weights of its own forward passes
  python -m capture MODEL --engine ray --prompts FOLDER --engine-options '{"actors": 8}'
      by 8 processes of a Ray cluster; what a dead one left is recorded again
  torchrun --nproc-per-node 8 -m capture MODEL --prompts big.jsonl --out runs/big.duckdb
      eight processes, a share of the prompts each; --shard I/N does the same on many machines
  python -m capture merge runs/big.parts --out runs/big.duckdb
      their parts as one run, where the last process did not do it
  python -m capture recover runs/olmoe.duckdb.partial
      close the file of a capture that was killed; everything committed is kept
  python -m capture partition runs/big.duckdb --out runs/big-parts.duckdb
      the same run with its rows in partitioned Parquet, for more than one file should hold
  python -m capture migrate runs/old.duckdb runs/new.duckdb
      write a run of an older version as a new file
  python -m capture matrix mixtral gpt_oss
      what capture says of tiny models of these architectures, against what the experts did

prompts: .txt (one a line, or blocks between blank lines), .csv, .tsv, .jsonl, .ndjson, .json,
.parquet, each maybe with .gz, .xz or .zst; a folder of them, a pattern such as 'data/*.jsonl',
- for standard input, or one of the names demo, demo-fit, demo-heldout. Records hold text, ids,
messages, conversations (ShareGPT), prompt and completion, or instruction (Alpaca)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        **{"import": _import, "merge": _merge, "recover": _recover, "migrate": _migrate},
        **{"partition": _partition, "matrix": _matrix},
    }
    run = commands.get(given[0], _capture) if given else _capture
    try:
        return run(given)
    except CaptureCancelled as error:
        _complain(str(error))
        return TERMINATED if isinstance(error.__cause__, Terminated) else INTERRUPTED
    except CaptureError as error:
        _complain(f"error: {error}")
        for note in getattr(error, "__notes__", ()):
            _complain(note)
        return ERROR
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        _complain("Terminated." if terminated else "Interrupted.")
        for note in getattr(error, "__notes__", ()):
            _complain(note)
        return TERMINATED if terminated else INTERRUPTED


def _capture(arguments: Sequence[str]) -> int:
    options = vars(_capture_parser().parse_args(arguments))
    model, prompts, out = (options.pop(name) for name in ("model", "prompts", "out"))
    progress = not options.pop("quiet")
    if len(prompts := prompts or ["demo"]) == 1:
        (prompts,) = prompts
    else:
        prompts = [given_path(name, "the prompts", PromptError) for name in prompts]
    out = _default_out(model) if out is None else out
    engine, more = options.pop("engine"), options.pop("engine_options")
    if engine:
        # torch takes seconds, and vLLM is in an environment of its own
        inside = importlib.import_module(f"capture.engines.{engine}")
        print(inside.record(model, prompts, out, progress=progress, engine=more, **options))
    elif more is not None:
        raise ConfigError("--engine-options are for an engine. Give --engine vllm or ray as well.")
    else:
        print(record(model, prompts, out, progress=progress, **options))
    return 0


def _capture_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m capture",
        description="Record the routing of a mixture-of-experts model as a run file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="demo, a Hugging Face id, or a local folder")
    add(
        "--prompts",
        action="append",
        metavar="FILE",
        help="a file, a folder, a pattern in quotes, - for standard input, or a name "
        "(default: demo); again for several files",
    )
    add(
        "--out",
        metavar="RUN",
        help="the run file, never overwritten (default: runs/MODEL-TIME.duckdb)",
    )
    _add_options(parser)
    group = parser.add_argument_group("engines")
    group.add_argument(
        "--engine",
        choices=("vllm", "ray"),
        help="record inside vLLM, or with actors of a Ray cluster; either is installed "
        "(capture/engines/requirements-ENGINE.txt)",
    )
    group.add_argument(
        "--engine-options",
        type=_mapping,
        metavar="JSON",
        help="arguments of vllm.LLM, such as '{\"max_model_len\": 4096}'; of Ray, actors, prompts "
        "(of a slice), num_gpus, num_cpus, address and partition",
    )
    add("--quiet", action="store_true", help="print only the path of the run")
    return parser


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"a JSON object was expected, got {text!r}")
    return found


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a capture as they are described; those of a level in a group."""
    group = parser.add_argument_group("level attention")
    known = sorted(described(CaptureConfig), key=lambda one: one.name.startswith("attention_"))
    for name, kind, default, option in known:
        how: dict[str, Any] = {"default": default, "help": option.help}
        if kind is bool:
            how |= {"action": "store_true"}
        else:
            how |= {"metavar": option.metavar}
            how |= {"type": int} if "int" in str(kind) else {}
            how |= {"nargs": "+"} if kind == Sequence[int] | None else {}
        place = group if name.startswith("attention_") else parser
        place.add_argument(f"--{name.replace('_', '-')}", **how)


def _import(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m capture import",
        description="Write routing that another program recorded as a run file.",
    )
    add = parser.add_argument
    add("source", nargs="+", type=path_argument, metavar="SOURCE", help="files, or a folder")
    add("--out", required=True, metavar="RUN", help="the run file, never overwritten")
    add("--format", metavar="NAME", help="by default found out; one of " + ", ".join(NAMES))
    add("--experts", type=int, metavar="N", help="routed experts of a layer, where it is not said")
    add("--top-k", type=int, metavar="K", help="experts of a token, where it is not said")
    add("--keep-warm-up", action="store_true", help="keep equal rows at the head")
    add("--tokenizer", metavar="FOLDER", help="of the model, for texts where the trace has ids")
    options = parser.parse_args(arguments[1:])
    made = import_routing(
        options.source,
        options.out,
        format=options.format,
        n_experts=options.experts,
        top_k=options.top_k,
        keep_warm_up=options.keep_warm_up,
        tokenizer=options.tokenizer,
    )
    print(made)
    return 0


def _recover(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m capture recover",
        description="Close NAME.partial of a killed capture as NAME, marked incomplete.",
    )
    parser.add_argument("partial", metavar="NAME.partial")
    options = parser.parse_args(arguments[1:])
    print(recover(options.partial))
    return 0


def _merge(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m capture merge",
        description="Write the parts of a capture by several processes as one run; they stay.",
    )
    parser.add_argument("part", nargs="+", metavar="PART", help="part files, or their folder")
    parser.add_argument("--out", required=True, metavar="RUN", help="never overwritten")
    options = parser.parse_args(arguments[1:])
    print(merge(options.part, options.out))
    return 0


def _partition(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m capture partition",
        description="Write a run with its rows in partitioned Parquet beside it, in NEW's name.",
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--out", required=True, metavar="NEW", help="never overwritten")
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help="of a part (default: %(default)s)"
    )
    options = parser.parse_args(arguments[1:])
    print(partition(options.run, options.out, tokens=options.tokens))
    return 0


def _migrate(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m capture migrate",
        description="Write a run of an older schema version as a new file; the old one stays.",
    )
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    options = parser.parse_args(arguments[1:])
    print(migrate(options.old, options.new))
    return 0


def _matrix(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m capture matrix",
        description="Build a tiny random model of every architecture with routed experts that the "
        "installed transformers has, record it, and compare the run with what its experts did.",
        epilog="exit code: 0, or 1 where one is recorded wrongly",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print the table of the paper")
    options = parser.parse_args(arguments[1:])
    table = importlib.import_module("capture.matrix.table")  # torch takes seconds
    started, verdicts = time.monotonic(), []
    for verdict in table.check_all(options.names):
        verdicts.append(verdict)
        print(table.line(verdict), file=sys.stderr if options.markdown else sys.stdout, flush=True)
    if options.markdown:
        print(table.markdown(verdicts), end="")
    _complain(table.summary(verdicts, time.monotonic() - started))
    return DIFFERS if any(verdict.is_wrong for verdict in verdicts) else 0


def _default_out(model: str) -> Path:
    name = suggested_name(Path(model).name, most=44, otherwise="model")
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}{RUN_SUFFIX}"


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
