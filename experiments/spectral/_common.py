"""What the scripts of this folder share: command line, timing, result files, angles of spans."""

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

EXPERIMENTS = Path(__file__).resolve().parent.parent
if str(EXPERIMENTS) not in sys.path:  # where `_report` and `_data` are
    sys.path.append(str(EXPERIMENTS))

from _report import Row, earlier_rows, save_results  # noqa: E402
from _report import cpu_timed as cpu_timed  # noqa: E402 - for the scripts
from _report import new_figure as new_figure  # noqa: E402 - for the scripts
from _settings import Common, option, parsed, recorded  # noqa: E402

from ella.spectral import Kernel, Problem  # noqa: E402


@dataclass(frozen=True)
class SpectralSettings(Common):
    """What all scripts can be asked for.

    Attributes:
        seeds: How many; 1 in a smoke test.
        first_seed: The first of them.
        threads: CPU threads: these problems are too small for more than 1 to pay.
    """

    seeds: int = option(3, "how many")
    first_seed: int = option(0, "the first of them")
    threads: int = option(1, "CPU threads")


@dataclass(frozen=True)
class Headline:
    """One line of the table in README.md.

    Attributes:
        question: What the script asks.
        metric: What the three numbers are, with the unit.
        ours: Our figure, mean over seeds.
        peer: Name of the best other method.
        theirs: Its figure, mean over seeds.
        truth: The exact value: figures nearer to it are better. None for scores of which the best
            that can be had is not known: larger ones are better.
        goal: What had to be reached.
        reached: Whether it was; None if there is no goal.
        seconds: Of our method for one seed, fit and all.
    """

    question: str
    metric: str
    ours: float
    peer: str
    theirs: float
    truth: float | None
    goal: str
    reached: bool | None
    seconds: float


@dataclass(frozen=True)
class Scaled(Kernel):
    """A multiple of a kernel, for training: Adam's steps have a size of their own.

    Attributes:
        kernel: The kernel.
        factor: What it is multiplied by.
    """

    kernel: Kernel
    factor: float

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Shape (n, m)."""
        return self.factor * self.kernel(x, y)


@dataclass(frozen=True)
class Magnified:
    """A problem with a multiple of its operator: like `Scaled`, where there is no kernel to scale.

    With T too small, the first outputs of a network are larger than the functions that are sought.

    Attributes:
        problem: The problem.
        factor: What T is multiplied by.
    """

    problem: Problem
    factor: float

    def batch(self, size: int, generator: torch.Generator) -> Any:  # noqa: ANN401
        """See `Problem.batch`."""
        return self.problem.batch(size, generator)

    def held_out(self) -> Any:  # noqa: ANN401
        """See `Problem.held_out`."""
        return self.problem.held_out()

    def evaluate(self, network: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """See `Problem.evaluate`."""
        psi, tpsi = self.problem.evaluate(network, batch)
        return psi, self.factor * tpsi

    def pairs(self, n: int) -> list[Any]:
        """See `Problem.pairs`."""
        return self.problem.pairs(n)


class Ledger:
    """The rows of a result file, written after each unit: a run goes on where one stopped.

    More seeds, or methods that were left out, are added to what is there by running again.

    Args:
        name: Of the script and its files.
        settings: Its command line.

    Attributes:
        rows: All that is known so far.

    Raises:
        ValueError: If the file was made with other settings.
    """

    FREE = ("seeds", "first_seed", "threads", "root", "out", "methods", "headline")
    """Settings that rows of one file need not share."""

    def __init__(self, name: str, settings: SpectralSettings) -> None:
        self.path: Path = settings.out / f"{name}.json"
        self.settings: dict[str, Any] = {**recorded(settings), "headline": None}
        compared = [name for name in self.settings if name not in self.FREE]
        self.rows = earlier_rows(self.path, self.settings, compared)

    def __contains__(self, unit: tuple[int, str]) -> bool:
        """Whether there is a row of this seed whose method begins with this name."""
        seed, name = unit
        return any(row["seed"] == seed and row["method"].startswith(name) for row in self.rows)

    def add(self, *rows: dict[str, Any]) -> None:
        """Write and show the rows of a finished unit."""
        self.rows += rows
        save_results(self.path, self.settings, self.rows)
        for row in rows:
            print(
                {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True
            )


Asked = TypeVar("Asked", bound=SpectralSettings)


def asked(kind: type[Asked], description: str, argv: list[str] | None = None) -> Asked:
    """The settings of the command line; sets the CPU threads."""
    settings = parsed(kind, description, argv)
    torch.set_num_threads(settings.threads)
    return replace(settings, seeds=1) if settings.smoke else settings


def finish(
    name: str,
    settings: SpectralSettings,
    rows: Sequence[Row],
    headline: Headline,
    figure: Figure | None,
) -> None:
    """Write `name`.json and `name`.png into the folder; without a figure, the old one stays."""
    kept = {**recorded(settings), "headline": asdict(headline)}
    save_results(settings.out / f"{name}.json", kept, rows)
    if figure is not None:
        figure.savefig(settings.out / f"{name}.png", dpi=120)
    print(f"{name}: {headline.metric} {headline.ours:.4g}, {headline.peer} {headline.theirs:.4g}")


def needed(module: str) -> Any:  # noqa: ANN401
    """A module of a peer's package.

    Raises:
        ModuleNotFoundError: If it is missing; names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The peer needs {module.split('.')[0]}: pip install 'ella-laplace[spectral]'"
        ) from error


def largest_angle(left: Tensor, right: Tensor) -> float:
    """Largest principal angle, in degrees, between the spans of the columns of two matrices."""
    bases = [torch.linalg.qr(each.double()).Q for each in (left, right)]
    smallest = torch.linalg.svdvals(bases[0].T @ bases[1]).min().clamp(0, 1).item()
    return math.degrees(math.acos(smallest))


def mean_of(rows: Sequence[Row], method: str, key: str) -> float:
    """Mean of a metric over the rows of one method."""
    values: list[Any] = [row[key] for row in rows if row["method"] == method]
    return sum(values) / len(values)
