"""Prompts and traces that somebody uploads, read in a process that may take so much memory.

A few kilobytes may stand for gigabytes. The readers stop before they expand that much; what gets
past them ends this process and not the app.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capture.errors import CaptureError, PromptError, TraceError
from capture.prompts import Prompt, PromptList, read_prompts_bytes
from capture.traces.importing import import_routing, recognise
from explorer.worker.client import ROOT

MOST = 256 * 10**6  # bytes of text; the app holds the prompts and hands them on
MEMORY = 4 * 2**30  # bytes of addresses; what the libraries map is a part of them
SECONDS = 60.0
TRACE_MEMORY = 12 * 2**30  # torch maps gigabytes, DuckDB takes two
TRACE_SECONDS = 300.0
_TRACE = "--trace"


def read_upload(name: str, data: bytes, **options: str | None) -> PromptList:
    """Read an uploaded file of prompts.

    Parameters
    ----------
    name : str
    data : bytes
    **options
        As in ``capture.prompts.read_prompts``: ``text_column``, ``domain_column``, ``encoding``.

    Raises
    ------
    PromptError
        As ``capture.prompts.read_prompts_bytes``, or if it takes too much memory or time.
    """
    command = [sys.executable, "-m", "explorer.worker.uploads", name, json.dumps(options)]
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, cwd=ROOT, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise PromptError(
            f"{name} could not be read within {SECONDS:g} s. Divide it into several files."
        ) from None
    try:
        found = json.loads(done.stdout)
    except ValueError:  # the process was ended
        raise PromptError(
            f"{name} takes more memory to read than an upload may. Divide it into several files, "
            "or record it with: python -m capture MODEL --prompts FILE"
        ) from None
    if "error" in found:
        raise PromptError(found["error"])
    prompts = (
        Prompt(
            text,
            None if ids is None else tuple(ids),
            domain,
            source,
            None if messages is None else tuple(messages),
        )
        for text, ids, domain, source, messages in found["prompts"]
    )
    return PromptList(prompts, found["notes"])


def read_trace(paths: Sequence[Path], out: Path | None = None, **options: Any) -> dict[str, Any]:
    """Say what files of a trace hold, or import them.

    Parameters
    ----------
    paths : sequence of Path
    out : Path, optional
        The run to write; without it the files are only looked at.
    **options
        Of ``capture.import_routing``.

    Returns
    -------
    dict
        Of ``capture.traces.importing.Recognised``, or ``made`` = what was imported, in a line.

    Raises
    ------
    TraceError
        As ``capture.import_routing``, or if it takes too much memory or time.
    """
    asked = {"paths": list(map(str, paths)), "out": None if out is None else str(out), **options}
    command = [sys.executable, "-m", "explorer.worker.uploads", _TRACE, json.dumps(asked)]
    try:
        done = subprocess.run(
            command, capture_output=True, cwd=ROOT, timeout=TRACE_SECONDS, check=False
        )
        found: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):  # or the process was ended
        raise TraceError(
            "The trace takes more memory or time to read than an upload may. Import it with: "
            "python -m capture import SOURCE --out RUN"
        ) from None
    if "error" in found:
        raise TraceError(found["error"])
    return found


def answer_trace(paths: list[str], out: str | None, **options: Any) -> str:
    """Return what files of a trace hold or became, or why not, as JSON."""
    try:
        if out is None:
            options.pop("keep_warm_up", None)
            return json.dumps(recognise(paths, **options)._asdict())
        made = import_routing(paths, out, **options)
        return json.dumps({"made": str(made).removeprefix(f"{made.run}: ")})
    except CaptureError as error:
        said = str(error)
        for path in (*paths, *([out] if out else [])):
            said = said.replace(f"{Path(path).parent}/", "")
        return json.dumps({"error": said})


def answer(name: str, data: bytes, **options: str | None) -> str:
    """Return the prompts of a file, or why there are none, as JSON."""
    try:
        prompts = read_prompts_bytes(name, data, most=MOST, **options)
    except PromptError as error:
        return json.dumps({"error": str(error)})
    return json.dumps({"prompts": prompts, "notes": prompts.notes})


def limit_memory(most: int) -> None:
    """Let this process take so much memory and no more."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def main() -> None:
    """Read the file that comes through standard input, or the trace that is named, and answer."""
    if sys.argv[1] == _TRACE:
        limit_memory(TRACE_MEMORY)
        sys.stdout.write(answer_trace(**json.loads(sys.argv[2])))
        return
    limit_memory(MEMORY)
    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    sys.stdout.write(answer(sys.argv[1], sys.stdin.buffer.read(), **options))


if __name__ == "__main__":
    main()
