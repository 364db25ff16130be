"""One capture by several processes: which prompts are whose, and what a part of them is called.

Nobody coordinates. Every process reads all prompts, takes its share, and commits it under a name
made from what is in it, so that whoever comes second, or comes again, finds what is there already.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from capture.errors import ConfigError, StoreError, quoted
from capture.paths import RUN_SUFFIX
from capture.prompts import Prompt
from capture.recorder.config import CaptureConfig
from capture.store.files import SUFFIX, connect, give_name, log_of
from capture.store.merge import PartNote, merge, merged_from, note_of

SLURM = "slurm"
FOLDER_SUFFIX = ".parts"
_SHARD = re.compile(r"(\d+)/(\d+)")
# what decides how it is computed and not what is recorded
_HOW = ("device", "batch_tokens", "compile", "trust_remote_code", "allow_pickle")


class Shard(NamedTuple):
    """One process among ``size`` that record one capture; ``rank`` counts from 0."""

    rank: int
    size: int


class RunPart(NamedTuple):
    """One part of a capture: where it lies once it is whole, and which prompts it holds."""

    path: Path
    note: PartNote

    @contextmanager
    def attempt(self) -> Iterator[Path]:
        """Yield a name to record under; the whole file then gets the name of the part.

        Attempts that were cut short, by a kill or by a signal, are removed once the part is there.
        """
        stem = self.path.stem
        path = self.path.with_name(f"{stem}.attempt-{secrets.token_hex(4)}{RUN_SUFFIX}")
        yield path
        # where it is there, another process has recorded the same, which is as good
        with suppress(FileExistsError):
            give_name(path, self.path)
        for left in self.path.parent.glob(f"{stem}.attempt-*"):
            if left.suffix in (RUN_SUFFIX, SUFFIX):
                _forget(left)


def _forget(attempt: Path) -> None:
    """Remove an attempt, unless a process still writes it."""
    try:
        connect(attempt, read_only=True).close()
    except StoreError as error:
        if "being written" in str(error):
            return
    for path in (attempt, log_of(attempt)):
        path.unlink(missing_ok=True)


def shard_of(asked: str | None, out: Path) -> Shard | None:
    """Return which share of the prompts this process records, None for all of them.

    Parameters
    ----------
    asked : str or None
        ``"2/8"``, or ``"slurm"`` for the place in a job array; None asks torchrun's variables. A
        process that has its rank in the name of its run (``run-rank1.duckdb``) records a run of
        its own.

    Raises
    ------
    ConfigError
        If it is neither, or there is no such job array.
    """
    if asked is None:
        size, rank = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK"))
        if not (size.isdigit() and rank.isdigit()) or int(size) < 2:
            return None
        if re.search(rf"rank[-_]?0*{int(rank)}(?!\d)", out.name):
            return None
        return Shard(int(rank), int(size))
    if asked == SLURM:
        names = ("ID", "MIN", "MAX", "STEP")
        given = [os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names]
        if not all(value.isdigit() for value in given[:3]):
            raise ConfigError(
                "shard='slurm' is for a task of a Slurm job array, and SLURM_ARRAY_TASK_ID, _MIN "
                "and _MAX are not set. Start it with sbatch --array=0-7, or say --shard 0/8."
            )
        task, least, most, step = (int(value or 1) for value in given)
        step = max(step, 1)
        return Shard((task - least) // step, (most - least) // step + 1)
    found = _SHARD.fullmatch(asked)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(
            f"shard must be 'slurm' or one of 0/4, 1/4, 2/4, 3/4 for four processes, got "
            f"{quoted(asked)}. Count from 0."
        )
    return Shard(int(found[1]), int(found[2]))


def plan_parts(
    model: str, prompts: Sequence[Prompt], config: CaptureConfig, out: Path, size: int
) -> list[RunPart]:
    """Return all parts of a capture by so many processes, in their order.

    Every name has a digest of the part's prompts, of all prompts, and of what is recorded of them
    by which model.
    """
    options = replace(config, shard=None, parts=None).to_json()
    said = {name: value for name, value in options.items() if name not in _HOW}
    of = min(config.parts or size, len(prompts))
    digests = [_digest(list(prompt)) for prompt in prompts]
    whole = _digest([model, said, of, digests])
    folder = out.with_name(out.stem + FOLDER_SUFFIX)
    parts = []
    for index in range(of):
        own = _digest([whole, digests[index::of]])[:16]
        path = folder / f"part-{index}-of-{of}-{own}{RUN_SUFFIX}"
        parts.append(RunPart(path, PartNote(whole, index, of, len(prompts))))
    return parts


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


def is_whole(part: RunPart) -> bool:
    """Whether the part is there, complete, and what its name says."""
    found = note_of(part.path)
    if found is None and part.path.exists():
        raise StoreError(
            f"{part.path} is not the whole part that its name says. Move it away, and record again."
        )
    return found == part.note


def put_together(parts: Sequence[RunPart], out: Path) -> Path | None:
    """Merge the parts once they are all there; None while one is missing.

    Raises
    ------
    StoreError
        As :func:`capture.store.merge.merge`.
    """
    capture = parts[0].note.capture
    if merged_from(out) == capture:
        return out
    if not all(map(is_whole, parts)):
        return None
    try:
        return merge([part.path for part in parts], out)
    except StoreError:
        if merged_from(out) == capture:  # the last two came to their ends together
            return out
        raise
