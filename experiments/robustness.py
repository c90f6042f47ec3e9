"""Which inputs are out of distribution, and what remains of calibration when images are corrupted?

    python experiments/robustness.py ood --root $ELLA_DATA
    python experiments/robustness.py shift --root $ELLA_DATA

Two measures of the study in `_suite.py`; `calibration.py --suite cifar10` runs all at once.
"""

from dataclasses import dataclass

from _families import MethodSettings, families
from _settings import option, parsed
from _suite import MEASURES, run_suite


@dataclass(frozen=True)
class Settings(MethodSettings):
    """What the script can be asked for, beside the study's sizes.

    Attributes:
        measure: "ood", detection by each score, or "shift", corrupted images.
    """

    measure: str = option("ood", "what to measure", choices=("ood", "shift"), positional=True)


def main(argv: list[str] | None = None) -> None:
    """Run and write a file for each network."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    run_suite(settings, families(settings), {settings.measure: MEASURES[settings.measure]})


if __name__ == "__main__":
    main()
