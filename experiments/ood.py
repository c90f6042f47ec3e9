"""Which inputs are out of distribution, and which score tells?

    python experiments/ood.py --root $ELLA_DATA

One measure of the study in `_suite.py`; `calibration.py --suite cifar10` runs all of them at once.
"""

import argparse
from pathlib import Path

import torch
from _suite import add_options, run_suite


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder of the data (default: $ELLA_DATA)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="run the methods whose name contains one of these, a|b|c")
    parser.add_argument("--slow", action="store_true", help="add what takes hours without a GPU")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: no real result")
    parser.add_argument("--out", type=Path, default=Path("results"))
    add_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run and write `ood-suite.json`."""
    run_suite(arguments(argv), ["ood"])


if __name__ == "__main__":
    main()
