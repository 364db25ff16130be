"""Prompts that somebody uploads, read in a process of their own that may take so much memory.

A few kilobytes may stand for gigabytes. The readers stop before they expand that much; what gets
past them ends this process and not the app.
"""

import json
import resource
import subprocess
import sys

from capture.errors import PromptError
from capture.prompts import Prompt, read_prompts_bytes
from explorer.worker.client import ROOT

MOST = 256 * 10**6  # bytes of text; the app holds the prompts and hands them on
MEMORY = 4 * 2**30  # bytes of addresses; what the libraries map is a part of them
SECONDS = 60.0


def read_upload(name: str, data: bytes) -> list[Prompt]:
    """Read an uploaded file of prompts.

    Raises
    ------
    PromptError
        As ``capture.prompts.read_prompts_bytes``, or if it takes too much memory or time.
    """
    command = [sys.executable, "-m", "explorer.worker.uploads", name]
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
    return [
        Prompt(text, None if ids is None else tuple(ids), domain, source)
        for text, ids, domain, source in found["prompts"]
    ]


def answer(name: str, data: bytes) -> str:
    """Return the prompts of a file, or why there are none, as JSON."""
    try:
        return json.dumps({"prompts": read_prompts_bytes(name, data, most=MOST)})
    except PromptError as error:
        return json.dumps({"error": str(error)})


def limit_memory() -> None:
    """Let this process take so much memory and no more."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))


def main() -> None:
    """Read the file that comes through standard input, and answer."""
    limit_memory()
    sys.stdout.write(answer(sys.argv[1], sys.stdin.buffer.read()))


if __name__ == "__main__":
    main()
