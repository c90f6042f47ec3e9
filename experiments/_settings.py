"""What a script can be asked for: a frozen dataclass, of which the command line is made."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

S = TypeVar("S")


def option(
    default: Any = None,  # noqa: ANN401
    help: str = "",
    *,
    parse: Callable[[str], Any] | None = None,
    choices: Sequence[str] | None = None,
    positional: bool = False,
) -> Any:  # noqa: ANN401 - a field of the type that it is declared with
    """A setting.

    Args:
        default: Its value; a tuple takes several.
        help: What it is.
        parse: From text; None takes the type of the default.
        choices: Values that are allowed.
        positional: Whether it is given without its name.
    """
    about = {"help": help, "parse": parse, "choices": choices, "positional": positional}
    return field(default=default, metadata=about)


def parsed(kind: type[S], description: str, argv: list[str] | None = None) -> S:
    """The settings that a command line asks for."""
    parser = argparse.ArgumentParser(description=description)
    for each in fields(kind):  # type: ignore[arg-type]
        about = dict(each.metadata)
        if about["positional"]:
            parser.add_argument(each.name, choices=about["choices"], help=about["help"])
            continue
        name = f"--{each.name.replace('_', '-')}"
        if isinstance(each.default, bool):
            parser.add_argument(name, action="store_true", help=about["help"])
            continue
        several = isinstance(each.default, tuple)
        example = each.default[0] if several else each.default
        parser.add_argument(
            name,
            type=about["parse"] or (str if example is None else type(example)),
            nargs="+" if several else None,
            default=each.default,
            choices=about["choices"],
            help=about["help"],
        )
    found = vars(parser.parse_args(argv))
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})


def recorded(settings: Any, *without: str) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    """Settings as a result file keeps them.

    Args:
        settings: Of any kind.
        without: Names of what a result does not depend on, such as folders of one machine.
    """
    values = {each.name: getattr(settings, each.name) for each in fields(settings)}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {name: value for name, value in plain.items() if name not in without}


@dataclass(frozen=True)
class Common:
    """What most scripts have.

    Attributes:
        root: Folder of the data; None takes $ELLA_DATA.
        smoke: Whether to run for seconds, without a real result.
        out: Folder of the results.
    """

    root: str | None = option(None, "folder of the data (default: $ELLA_DATA)")
    smoke: bool = option(False, "seconds, for tests: no real result")
    out: Path = option(Path("results"), "folder of the results")


@dataclass(frozen=True)
class OnDevice(Common):
    """What scripts that can use a GPU have.

    Attributes:
        device: Where to run.
    """

    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to run")
