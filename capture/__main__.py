"""Command line: record a run, close a killed one, bring an old one up to date."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from capture.errors import CaptureCancelled, CaptureError
from capture.interrupts import Terminated
from capture.recorder.config import (
    DEFAULT_ATTENTION_BINS,
    DEFAULT_ATTENTION_PROMPTS,
    DEFAULT_ATTENTION_TOP_KEYS,
    DEFAULT_SAMPLE_TOKENS,
)
from capture.store.records import DTYPES

ERROR = 2
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
  python -m capture recover runs/olmoe.duckdb.partial
      close the file of a capture that was killed; everything committed is kept
  python -m capture migrate runs/old.duckdb runs/new.duckdb
      write a run of an older version as a new file

prompts: .txt (one a line, or blocks between blank lines), .csv, .jsonl, .parquet,
a folder of them, or one of the names demo, demo-fit, demo-heldout
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"recover": _recover, "migrate": _migrate}
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
    options = _capture_parser().parse_args(arguments)
    out = _default_out(options.model) if options.out is None else options.out
    from capture.recorder.session import record

    path = record(
        options.model,
        options.prompts,
        out,
        level=options.level,
        sample_tokens=options.sample_tokens,
        generate=options.generate,
        batch_tokens=options.batch_tokens,
        max_length=options.max_length,
        dtype=options.dtype,
        device=options.device,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
        compile=options.compile,
        seed=options.seed,
        attention_prompts=options.attention_prompts,
        attention_layers=options.attention_layers,
        attention_heads=options.attention_heads,
        attention_every=options.attention_every,
        attention_bins=options.attention_bins,
        attention_top_keys=options.attention_top_keys,
        progress=not options.quiet,
    )
    print(path)
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
        default="demo",
        metavar="FILE",
        help="a file, a folder or a name (default: demo)",
    )
    add(
        "--out",
        metavar="RUN",
        help="the run file, never overwritten (default: runs/MODEL-TIME.duckdb)",
    )
    add(
        "--level",
        default="ids",
        metavar="LEVEL",
        help="stats: sums per expert; ids: also expert ids, weights and statistics of every "
        "token; scores: also every expert's score; attention: also where the heads look, for some "
        "prompts (default: ids)",
    )
    add("--generate", type=int, default=0, metavar="N", help="tokens to decode after each prompt")
    add(
        "--sample-tokens",
        type=int,
        default=DEFAULT_SAMPLE_TOKENS,
        metavar="N",
        help="tokens whose scores and router inputs are kept at any level, for clusters and "
        f"replay; 0 = none (default: {DEFAULT_SAMPLE_TOKENS})",
    )
    add("--batch-tokens", type=int, metavar="N", help="tokens of a forward pass, padding included")
    add("--max-length", type=int, metavar="N", help="cut prompts to N tokens")
    add(
        "--dtype",
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)} (default: float32 on CPU, as stored on CUDA)",
    )
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, or auto (default: CUDA if any)")
    add("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    add("--trust-remote-code", action="store_true", help="run Python code that the model brings")
    add("--allow-pickle", action="store_true", help="load weights that are not safetensors")
    add("--compile", action="store_true", help="run the model through torch.compile")
    add("--seed", type=int, default=0, metavar="N", help="of the sampled tokens (default: 0)")
    _add_attention(parser)
    add("--quiet", action="store_true", help="print only the path of the run")
    return parser


def _add_attention(parser: argparse.ArgumentParser) -> None:
    """Add the options of level attention."""
    add = parser.add_argument_group("level attention").add_argument
    add(
        "--attention-prompts",
        type=int,
        default=DEFAULT_ATTENTION_PROMPTS,
        metavar="N",
        help="prompts whose attention is kept, equal shares for every domain and at least one for "
        f"each (default: {DEFAULT_ATTENTION_PROMPTS})",
    )
    add("--attention-layers", type=int, nargs="+", metavar="L", help="these layers only")
    add("--attention-heads", type=int, nargs="+", metavar="H", help="these heads only")
    add(
        "--attention-every",
        type=int,
        default=1,
        metavar="N",
        help="use every N-th block of 64 queries (default: 1)",
    )
    add(
        "--attention-bins",
        type=int,
        default=DEFAULT_ATTENTION_BINS,
        metavar="N",
        help=f"bins to a side of a map, at most (default: {DEFAULT_ATTENTION_BINS})",
    )
    add(
        "--attention-top-keys",
        type=int,
        default=DEFAULT_ATTENTION_TOP_KEYS,
        metavar="N",
        help="heaviest keys kept of each of a prompt's first 512 queries; 0 = none "
        f"(default: {DEFAULT_ATTENTION_TOP_KEYS})",
    )


def _recover(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m capture recover",
        description="Close NAME.partial of a killed capture as NAME, marked incomplete.",
    )
    parser.add_argument("partial", metavar="NAME.partial")
    options = parser.parse_args(arguments[1:])
    from capture.store import recover

    print(recover(options.partial))
    return 0


def _migrate(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m capture migrate",
        description="Write a run of an older schema version as a new file; the old one stays.",
    )
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    options = parser.parse_args(arguments[1:])
    from capture.store import migrate

    print(migrate(options.old, options.new))
    return 0


def _default_out(model: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-.") or "model"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.duckdb"


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
