"""Choosing the backend of an op, without silent fallback."""

from collections.abc import Sequence

from kernels.errors import KernelError


def resolve_backend(requested: str, available: Sequence[str]) -> str:
    """Turn a request into the backend that will run, or refuse it with the reason.

    Parameters
    ----------
    requested : str
        ``"auto"`` or the name of a backend.
    available : sequence of str
        The backends that can run these inputs here, best first.

    Raises
    ------
    KernelError
        If the backend asked for by name is not among them.
    """
    if requested == "auto":
        return available[0]
    if requested not in available:
        raise KernelError(
            f"backend={requested!r} cannot run here. Available for these inputs: "
            f"{', '.join(available)}. Pass one of them, or backend='auto'."
        )
    return requested
