"""From device to host without waiting, and from there to a writer thread, in bounded memory."""

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

T = TypeVar("T")

ALIGNMENT = 16  # bytes; numpy views of any dtype start at such an address
SLOTS = 3  # one being filled, one being read, one between
FIRST_SLOT_BYTES = 32 * 2**20
WAIT_SECONDS = 0.2
NUMPY_TYPES: dict[torch.dtype, Any] = {
    torch.bool: np.bool_,
    torch.uint8: np.uint8,
    torch.uint16: np.uint16,
    torch.float16: np.float16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


class Segment(NamedTuple):
    """Where one tensor lies in a packed block."""

    number: int
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size without the padding behind it."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class _TensorPlace:
    """Stands for a tensor of a record while it is on its way."""

    number: int


class Slot:
    """A block of page-locked memory that is used again and again."""

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None

    def reserve(self, n_bytes: int) -> torch.Tensor:
        """Return the first ``n_bytes`` of the block, made larger when they do not fit."""
        if self.memory is None or len(self.memory) < n_bytes:
            size = max(FIRST_SLOT_BYTES, n_bytes + n_bytes // 4)
            self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self.memory[:n_bytes]


class Parcel(Generic[T]):
    """A record whose tensors are on their way to the host.

    :meth:`open` waits for them and may be called once.
    """

    def __init__(
        self,
        record: Any,
        here: Mapping[int, torch.Tensor],
        copies: list[tuple[Slot, torch.Tensor, list[Segment], torch.cuda.Event]],
        free: "queue.Queue[Slot]",
    ) -> None:
        self._record = record
        self._here = here
        self._copies = copies
        self._free = free

    def open(self) -> T:
        """Return the record with numpy arrays that nobody else will write to."""
        arrays: dict[int, npt.NDArray[Any]] = {
            n: tensor.numpy() for n, tensor in self._here.items()
        }
        for slot, block, segments, event in self._copies:
            event.synchronize()
            # the slot is filled again at once, and the writer keeps arrays until it commits
            bytes_ = block.numpy().copy()
            self._free.put(slot)
            for segment in segments:
                part = bytes_[segment.start : segment.start + segment.n_bytes]
                array = part.view(NUMPY_TYPES[segment.dtype]).reshape(segment.shape)
                arrays[segment.number] = array
        self._copies = []
        record: T = replaced(self._record, _TensorPlace, lambda place: arrays[place.number])
        return record


def replaced(record: Any, kind: type[T], change: Callable[[T], Any]) -> Any:
    """Return a record with everything of one kind in it changed.

    Looks into tuples, lists, dictionaries, named tuples and dataclasses.
    """
    if isinstance(record, kind):
        return change(record)
    if isinstance(record, tuple | list):
        values = [replaced(value, kind, change) for value in record]
        return type(record)(*values) if hasattr(record, "_fields") else type(record)(values)
    if isinstance(record, dict):
        return {name: replaced(value, kind, change) for name, value in record.items()}
    if is_dataclass(record) and not isinstance(record, type):
        values_of = {f.name: getattr(record, f.name) for f in fields(record)}
        return replace(record, **replaced(values_of, kind, change))
    return record


class Staging:
    """Sends what a forward pass gave to the host.

    On a CPU tensors are handed over as they are. On CUDA they are packed into one block per device
    and copied once, on a stream of their own, into page-locked memory; the model's stream never
    waits. There are ``SLOTS`` blocks, so a slow writer stops the sender instead of filling memory.
    """

    def __init__(self) -> None:
        self._free: queue.Queue[Slot] = queue.Queue()
        self._made = 0
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def send(self, record: Any, *, stop: threading.Event) -> Parcel[Any]:
        """Start the copy and return at once, or when a block is free.

        Parameters
        ----------
        record : object
            Anything with tensors in it, see :func:`replaced`; their storage must not be written to
            afterwards.
        stop : Event
            Set when nobody will free a block any more.
        """
        tensors: list[torch.Tensor] = []

        def place(tensor: torch.Tensor) -> _TensorPlace:
            tensors.append(tensor)
            return _TensorPlace(len(tensors) - 1)

        record = replaced(record, torch.Tensor, place)
        here: dict[int, torch.Tensor] = {}
        by_device: dict[torch.device, dict[int, torch.Tensor]] = {}
        for number, tensor in enumerate(tensors):
            if tensor.device.type == "cuda":
                by_device.setdefault(tensor.device, {})[number] = tensor
            else:
                here[number] = tensor
        copies = []
        for device, group in by_device.items():
            packed, segments = pack(group)
            slot = self._slot(stop, len(by_device))
            block = slot.reserve(len(packed))
            stream = self._stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                block.copy_(packed, non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
            packed.record_stream(stream)
            copies.append((slot, block, segments, event))
        return Parcel(record, here, copies, self._free)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]

    def _slot(self, stop: threading.Event, n_devices: int) -> Slot:
        if self._made < SLOTS * n_devices:
            self._made += 1
            return Slot()
        while True:
            try:
                return self._free.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                if stop.is_set():
                    return Slot()


def pack(tensors: Mapping[int, torch.Tensor]) -> tuple[torch.Tensor, list[Segment]]:
    """Lay tensors of one device out in one block of bytes, each at an aligned place."""
    parts: list[torch.Tensor] = []
    segments: list[Segment] = []
    start = 0
    padding: torch.Tensor | None = None
    for number, tensor in tensors.items():
        segment = Segment(number, start, tensor.dtype, tuple(tensor.shape))
        segments.append(segment)
        parts.append(tensor.contiguous().view(-1).view(torch.uint8))
        gap = -segment.n_bytes % ALIGNMENT
        if gap:
            padding = parts[-1].new_zeros(ALIGNMENT) if padding is None else padding
            parts.append(padding[:gap])
        start += segment.n_bytes + gap
    return torch.cat(parts), segments


class WriterThread(Generic[T]):
    """Runs ``consume`` on every item, in order, in a thread of its own.

    Parameters
    ----------
    consume : callable
        What it raises is raised again in the caller's thread, by the next :meth:`put` or by
        :meth:`close`; later items are thrown away.
    idle : callable, optional
        Called on that thread, at most every ``WAIT_SECONDS``, while no item comes; it may raise
        as ``consume`` may.
    capacity : int, items
        :meth:`put` waits when so many are waiting.
    """

    def __init__(
        self,
        consume: Callable[[T], None],
        *,
        idle: Callable[[], None] | None = None,
        capacity: int = SLOTS,
    ) -> None:
        self.failed = threading.Event()
        self._consume = consume
        self._idle = idle
        self._items: queue.Queue[T | None] = queue.Queue(capacity)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="run-writer", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Hand one item over; raises what an earlier one raised."""
        while True:
            self._raise()
            try:
                self._items.put(item, timeout=WAIT_SECONDS)
                return
            except queue.Full:
                continue

    def close(self) -> None:
        """Wait until every item is consumed; raises what one raised."""
        if self._thread.is_alive():
            self._items.put(None)
            self._thread.join()
        self._raise()

    def _run(self) -> None:
        while True:
            try:
                item = self._items.get(timeout=None if self._idle is None else WAIT_SECONDS)
            except queue.Empty:
                self._guard(self._idle)
                continue
            if item is None:
                return
            self._guard(partial(self._consume, item))

    def _guard(self, action: Callable[[], None] | None) -> None:
        """Do it unless something failed before, and keep what it raises."""
        if self._error is None and action is not None:
            try:
                action()
            except BaseException as error:
                self._error = error
                self.failed.set()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
