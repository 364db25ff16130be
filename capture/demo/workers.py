"""Several single-thread processes that train one model and share gradients."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

# big buffers stay with the process for a while, which saves page faults; without an end to
# that, memory grows until the machine swaps (demo_model.md, 2a)
_JEMALLOC = "dirty_decay_ms:10000,muzzy_decay_ms:10000,oversize_threshold:0,thp:always"


def rank_and_world() -> tuple[int, int]:
    """Return this process's number and the number of processes."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_number(value: float) -> float:
    """Return the first process's value in every process."""
    if not dist.is_initialized():
        return value
    cell = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(cell, 0)
    return float(cell)


@contextlib.contextmanager
def join_workers(folder: Path, *, single_thread: bool) -> Iterator[None]:
    """Join the group of processes that `launch` started, if there is one.

    Parameters
    ----------
    folder : Path
        Where the processes find each other.
    single_thread : bool
        Keep torch to one thread a process, which a busy machine needs.
    """
    rank, world = rank_and_world()
    folder.mkdir(parents=True, exist_ok=True)
    if single_thread:
        torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if world > 1:
        address = f"file://{(folder / 'rendezvous').resolve()}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    try:
        yield
        if world > 1:
            dist.barrier()
    finally:
        if world > 1:
            dist.destroy_process_group()


def _environment(rank: int, world: int) -> dict[str, str]:
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
    }
    for path in Path("/usr/lib").glob("*/libjemalloc.so.2"):
        environment |= {"LD_PRELOAD": str(path), "MALLOC_CONF": _JEMALLOC}
    return environment


def launch(arguments: list[str], *, folder: Path, processes: int) -> None:
    """Start the workers and wait for them; if one fails, the others end too.

    Parameters
    ----------
    arguments : list of str
        Command line of ``capture.demo.train``.
    folder : Path
        Where the processes find each other.
    processes : int
        How many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    command = [sys.executable, "-m", "capture.demo.train", *arguments, "--worker"]
    workers = [
        subprocess.Popen(command, env=_environment(rank, processes)) for rank in range(processes)
    ]
    try:
        for worker in workers:
            if worker.wait():
                raise RuntimeError(
                    f"Expected every training process to end well, one ended with"
                    f" {worker.returncode}. Its message is above; go on with --resume."
                )
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
