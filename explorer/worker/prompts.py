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
    command = [sys.executable, "-m", "explorer.worker.prompts", name]
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, cwd=ROOT, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise PromptError(
            f"{name} could not be read within {SECONDS:g} s. Divide it into several files."
        ) from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:  # the process was ended
        raise PromptError(
            f"{name} takes more memory to read than an upload may. Divide it into several files, "
            "or record it with: python -m capture MODEL --prompts FILE"
        ) from None
    if "error" in answer:
        raise PromptError(answer["error"])
    return [
        Prompt(text, None if ids is None else tuple(ids), domain, source)
        for text, ids, domain, source in answer["prompts"]
    ]


def main() -> None:
    """Read the file that comes through standard input, and answer in JSON."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    try:
        prompts = read_prompts_bytes(sys.argv[1], sys.stdin.buffer.read(), most=MOST)
        answer = json.dumps({"prompts": prompts})
    except PromptError as error:
        answer = json.dumps({"error": str(error)})
    sys.stdout.write(answer)


if __name__ == "__main__":
    main()
