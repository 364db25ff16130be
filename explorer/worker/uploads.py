"""Prompts that somebody uploads, read in a process of their own that may take so much memory.

A few kilobytes may stand for gigabytes. The readers stop before they expand that much; what gets
past them ends this process and not the app.
"""

import json
import resource
import subprocess
import sys

from capture.errors import PromptError
from capture.prompts import Prompt, PromptList, read_prompts_bytes
from explorer.worker.client import ROOT

MOST = 256 * 10**6  # bytes of text; the app holds the prompts and hands them on
MEMORY = 4 * 2**30  # bytes of addresses; what the libraries map is a part of them
SECONDS = 60.0


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


def answer(name: str, data: bytes, **options: str | None) -> str:
    """Return the prompts of a file, or why there are none, as JSON."""
    try:
        prompts = read_prompts_bytes(name, data, most=MOST, **options)
    except PromptError as error:
        return json.dumps({"error": str(error)})
    return json.dumps({"prompts": prompts, "notes": prompts.notes})


def limit_memory() -> None:
    """Let this process take so much memory and no more."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))


def main() -> None:
    """Read the file that comes through standard input, and answer."""
    limit_memory()
    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    sys.stdout.write(answer(sys.argv[1], sys.stdin.buffer.read(), **options))


if __name__ == "__main__":
    main()
