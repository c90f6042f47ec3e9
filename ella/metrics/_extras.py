"""Packages of the `metrics` extra, imported by the metric that needs them."""

import importlib
from types import ModuleType


def imported(name: str) -> ModuleType:
    """A module of an optional package.

    Args:
        name: With dots, such as "netcal.metrics".

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'This metric needs {name.split(".")[0]}: pip install "ella-laplace[metrics]".'
        ) from error
