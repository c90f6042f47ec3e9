"""Independent normals over the logarithms of hyperparameters, and how points are searched."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

REACH = math.log(30.0)
"""How far T and the scale may move from 1 (from σ²), in the log."""

Logs = tuple[float, ...]
Function = Callable[[Logs], float]
Lattice = list[tuple[Logs, float]]
"""Points, and the logarithm of what each weighs."""


@dataclass(frozen=True)
class Hyperprior:
    """Independent normals over logarithms, and what n examples make of them.

    Attributes:
        origin: Means.
        spreads: Standard deviations.
        num_examples: n.
    """

    origin: Logs
    spreads: Logs
    num_examples: int

    def penalty(self, logs: Logs) -> float:
        """Negative log density at a point, an example, without the constant."""
        terms = zip(logs, self.origin, self.spreads, strict=True)
        squares = sum(((log - at) / spread) ** 2 for log, at, spread in terms)
        return squares / (2 * self.num_examples)

    @property
    def log_normaliser(self) -> float:
        """The constant."""
        return sum(math.log(spread * math.sqrt(2 * math.pi)) for spread in self.spreads)

    def widths(self, nll: Function, mode: Logs) -> Logs:
        """Standard deviations of the posterior along each axis, from second differences."""

        def value(logs: Logs) -> float:
            return self.num_examples * (nll(logs) + self.penalty(logs))

        centre, widths = value(mode), list(self.spreads)
        for axis, spread in enumerate(self.spreads):
            for _ in range(2):  # the second time at the scale that the first has found
                step = widths[axis]
                ends = (_moved(mode, axis, sign * step) for sign in (-1, 1))
                curvature = (sum(map(value, ends)) - 2 * centre) / step**2
                widths[axis] = min(spread, max(curvature, spread**-2) ** -0.5)
        return tuple(widths)

    def lattice(self, nll: Function, mode: Logs, widths: Logs) -> "Lattice":
        """Points out to two widths from the mode, and log (likelihood × hyperprior × cell)."""
        log_cell = sum(map(math.log, widths))
        points = []
        for steps in product((-2, -1, 0, 1, 2), repeat=len(mode)):
            moved = zip(mode, steps, widths, strict=True)
            logs = tuple(at + step * width for at, step, width in moved)
            value = nll(logs) + self.penalty(logs)
            points.append((logs, log_cell - self.num_examples * value))
        return points


def _moved(logs: Logs, axis: int, step: float) -> Logs:
    return (*logs[:axis], logs[axis] + step, *logs[axis + 1 :])


def log_sum(lattice: Lattice) -> float:
    """Log of the sum of the weights."""
    highest = max(weight for _, weight in lattice)
    return highest + math.log(sum(math.exp(weight - highest) for _, weight in lattice))


def means(lattice: Lattice) -> Logs:
    """Means of the coordinates under the weights."""
    total = log_sum(lattice)
    columns = zip(*(logs for logs, _ in lattice), strict=True)
    shares = [math.exp(weight - total) for _, weight in lattice]
    return tuple(
        sum(share * value for share, value in zip(shares, column, strict=True))
        for column in columns
    )


def compass(
    function: Function,
    start: Logs,
    origin: Logs,
    step: float = 1.0,
) -> Logs:
    """The least point found by compass search: all 3^d − 1 directions, else half the step.

    It stays within `REACH` of `origin` along each axis.
    """
    known: dict[tuple[float, ...], float] = {}

    def at(point: tuple[float, ...]) -> float:
        # A step shares up to five of its nine points with the step before.
        key = tuple(round(p, 9) for p in point)
        if key not in known:
            known[key] = function(point)
        return known[key]

    point, value = start, at(start)
    while step > 0.05:
        neighbours = [(at(p), p) for p in _neighbours(point, origin, step)]
        best_value, best_point = min(neighbours)
        if best_value < value - 1e-7:
            point, value = best_point, best_value
        else:
            step /= 2
    return point


def _neighbours(point: Logs, origin: Logs, step: float) -> Iterator[Logs]:
    # Diagonals too: more variance and a sharper mean trade off along a narrow valley.
    for signs in product((-1, 0, 1), repeat=len(point)):
        moved = (p + sign * step for p, sign in zip(point, signs, strict=True))
        # When a small validation set is classified without error, the score has no minimum: stop
        # where no useful temperature lies.
        yield tuple(
            min(max(m, at - REACH), at + REACH) for m, at in zip(moved, origin, strict=True)
        )
