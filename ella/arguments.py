"""What settings may be: checked where they come in, and made plain Python values.

Numbers of NumPy become Python's, so that files can hold them. True and False are no numbers.
"""

import math
import os
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

MOST = 2**31 - 1
"""The largest number of anything that is counted."""

Check = Callable[[str, object], Any]
"""`(name, value)` ↦ the value, or an error that names it, what was expected and what came."""


def whole(least: int = 1, most: int = MOST) -> Check:
    """A check for whole numbers in least..most; raises `ValueError`."""

    def check(name: str, value: object) -> int:
        if isinstance(value, Integral) and not isinstance(value, bool):
            found = int(value)
            if least <= found <= most:
                return found
        high = f" and at most {most}" if most < MOST else ""
        raise ValueError(
            f"`{name}` must be a whole number of at least {least}{high}; got {value!r}."
        )

    return check


def real(least: float = 0.0, most: float = math.inf, *, without_least: bool = False) -> Check:
    """A check for finite numbers in [least, most], or above `least`; raises `ValueError`."""

    def check(name: str, value: object) -> float:
        if isinstance(value, Real) and not isinstance(value, bool):
            found = _as_float(value)
            above = found > least if without_least else found >= least
            if above and found <= most and found < math.inf:
                return found
        low = f"above {least:g}" if without_least else f"of at least {least:g}"
        high = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"`{name}` must be a finite number {low}{high}; got {value!r}.")

    return check


def _as_float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def optional(check: Check) -> Check:
    """The same, with None let through."""
    return lambda name, value: None if value is None else check(name, value)


def one_of(*choices: str) -> Check:
    """A check for names; raises `ValueError`."""

    def check(name: str, value: object) -> object:
        if not isinstance(value, str) or value not in choices:
            expected = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"`{name}` must be one of {expected}; got {value!r}.")
        return value

    return check


def having(kind: str, *methods: str) -> Check:
    """A check for objects, not classes, with some methods; raises `TypeError`.

    Args:
        kind: What the message calls them.
        *methods: None for what can be called itself.
    """

    def check(name: str, value: object) -> object:
        has = all(hasattr(value, method) for method in methods) if methods else callable(value)
        if not has or (methods and isinstance(value, type)):
            made = f" Make an object of it: {value.__name__}()." if isinstance(value, type) else ""
            raise TypeError(f"`{name}` must be {kind}; got {value!r}.{made}")
        return value

    return check


def instance(kind: type) -> Check:
    """A check for objects of a class; raises `TypeError`."""

    def check(name: str, value: object) -> object:
        if not isinstance(value, kind):
            raise TypeError(f"`{name}` must be a {kind.__name__}; got {value!r}.")
        return value

    return check


def settle(settings: object, **checks: Check) -> None:
    """Check fields of a frozen dataclass, which then hold the plain values."""
    for name, check in checks.items():
        object.__setattr__(settings, name, check(name, getattr(settings, name)))


COUNT = whole()
POSITIVE = real(without_least=True)
NOT_NEGATIVE = real()
SHARE = real(0, 1)
SEED = whole(0, 2**63 - 1)
BYTES = whole(1, 2**63 - 1)
FUNCTION = having("a function")


def check_path(name: str, value: object) -> None:
    """Raise an error unless it can be a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"`{name}` must be a path; got {type(value).__name__}.")
    if "\0" in str(value):
        raise ValueError(f"`{name}` must be a path, without null characters; got {value!r}.")
