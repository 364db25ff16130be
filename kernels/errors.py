"""Errors raised by the kernels.

KernelError
"""


class KernelError(ValueError):
    """An op was called with a shape, dtype, option or backend it does not support."""
