"""The most memory that a piece of work had at a time, for the benchmarks."""

import gc
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def start_peak(device: "torch.device") -> int:
    """Forget the peak so far and return what is in use now, bytes.

    On a CPU that is the process's resident memory as Linux counts it, on CUDA what PyTorch has
    allocated on the device.
    """
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    CLEAR.write_text("5", encoding="ascii")
    return _status("VmRSS")


def stop_peak(device: "torch.device") -> int:
    """Return the most that was in use since :func:`start_peak`, bytes."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"This measurement needs {name} in {STATUS}, as Linux has it.")
