"""Modes of torch that end where they should, whatever happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

AnyMode = TypeVar("AnyMode", bound=TorchFunctionMode)


@contextmanager
def within(mode: AnyMode) -> Iterator[AnyMode]:
    """`with mode`, of which nothing is left even if Ctrl-C comes as `with` enters or leaves.

    There Python has a line or two in which an exception passes `__exit__` by, and the mode would
    see every later call to torch: those of the user.
    """
    try:
        with mode:
            yield mode
    finally:
        while mode in _get_current_function_mode_stack():
            mode.__exit__(None, None, None)
