"""A column of the table, and who is compared with whom."""

from dataclasses import dataclass

from ella.arguments import one_of
from ella.report.bootstrap import Interval


@dataclass(frozen=True)
class Metric:
    """A column of the table.

    Attributes:
        key: Its name in `Row.metrics` and in JSON.
        title: Its heading.
        lower: Whether less is better; None where neither is.
        digits: After the decimal point.
    """

    key: str
    title: str
    lower: bool | None
    digits: int = 4

    def better(self, difference: Interval) -> int:
        """1 if a paired difference says that the method is better, −1 if worse, 0 if neither."""
        if self.lower is None:
            return 0
        return -difference.side if self.lower else difference.side

    def written(self, value: float, sign: bool = False) -> str:
        """A value in as many digits as it has."""
        return f"{value:{'+' if sign else ''}.{self.digits}f}".replace("-", "−")


@dataclass(frozen=True)
class Pair:
    """Who is judged and by whom.

    Attributes:
        names: Of all methods.
        judged: Place of the one.
        other: Place of the other.
    """

    names: list[str]
    judged: int
    other: int

    @classmethod
    def of(
        cls, names: list[str], method: str | None, against: str | None, opponents: tuple[str, ...]
    ) -> "Pair":
        """By names; see `evaluate`.

        Args:
            names: Of all methods.
            method: Who is judged; None takes the last.
            against: By whom; None takes the first of `opponents` that is there, else the first.
            opponents: What a method of this kind has to beat, the strongest first.
        """
        judged = names[-1] if method is None else method
        there = [each for each in opponents if each in names and each != judged]
        other = [*there, names[0]][0] if against is None else against
        one_of(*names)("method", judged)
        one_of(*names)("against", other)
        if judged == other:
            raise ValueError(f"`method` and `against` are both {judged!r}: nothing to compare.")
        return cls(names, names.index(judged), names.index(other))

    @property
    def own(self) -> list[int]:
        """Places of the two: the judged and the other."""
        return [self.judged, self.other]
