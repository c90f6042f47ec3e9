"""Are conformal sets smaller, or fairer to hard images, if the probabilities are an average?

    pip install ".[rivals]"
    python experiments/conformal.py --root $ELLA_DATA --out experiments/results/distance

One measure of `distance.py`, which runs all at once: sets by `_sets.py` from the probabilities of
the same methods, networks and draws. Any method's `predict_proba` is all that sets need.
"""

import torch
from _settings import parsed
from _suite import run_suite
from distance import MEASURES, Settings, families


def main(argv: list[str] | None = None) -> None:
    """Run and write a file for each network."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(settings.threads)
    run_suite(settings, families(settings), {"sets": MEASURES["sets"]})


if __name__ == "__main__":
    main()
