"""Does variance that grows away from the data mend what the kernel does not see?

    python experiments/distance.py --root $ELLA_DATA --out experiments/results/distance

The published CIFAR-10 networks, protocol B of `_suite.py`, whose result files it writes. ELLA
(NeuralEF, diagonal residual) is fitted once for each network, with activation distances; with and
without the term it has the same eigenfunctions. "temperature scaling + D" has the same term, at
the same scale, beside no posterior, and a τ of its own. "perturbed" is tuned on copies of the
images, too, each changed in a way that is none of the tested corruptions.
"""

import copy
from dataclasses import dataclass, replace

import torch
from _families import QUIET, neural_ef, scaling
from _images import Data, Images
from _models import RESNET_DEPTHS
from _sets import set_rows
from _settings import option, parsed
from _store import SampledOnce
from _suite import MEASURES as SUITE_MEASURES
from _suite import Family, Network, StudySettings, Tune, run_suite, tune
from torch import Tensor

from ella import ELLA, Distance, Evaluated, Predictor
from ella.metrics import negative_log_likelihood

MEASURES = {**SUITE_MEASURES, "sets": set_rows}
SCALES = torch.logspace(-0.7, 0.7, 57).tolist()
"""Candidates of τ for temperature scaling with the term."""


@dataclass(frozen=True)
class Settings(StudySettings):
    """What the script can be asked for: the study's sizes, smaller.

    Attributes:
        threads: CPU threads.
    """

    archs: tuple[str, ...] = option(tuple(f"resnet{d}" for d in RESNET_DEPTHS), "networks")
    seeds: int = option(3, "draws of the images to tune on")
    first_seed: int = option(10, "the first of them")
    fit_on: int = option(10_000, "training images for G and distances")
    num_inputs: int = option(3000, "images NeuralEF learns on")
    num_cropped: int = option(0, "to tune on, protocol A; 0: none")
    num_ood: int = option(2000, "of each source; 0: none")
    num_shift: int = option(500, "images a corruption; 0: none")
    threads: int = option(1, "CPU threads")


class Once:
    """A tuning whose results are kept, for other tunings that begin with it.

    Args:
        tuning: The tuning.
    """

    def __init__(self, tuning: Tune) -> None:
        self.tuning = tuning
        self._kept: dict[tuple[int, ...], Evaluated] = {}

    def __call__(self, method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
        """A copy of what the tuning made of the method on these rows."""
        key = (id(method.evaluation), *rows.tolist())
        if key not in self._kept:
            self._kept[key] = self.tuning(method, rows, labels)
        return method.copied(self._kept[key])


def with_perturbed(method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
    """The search, perturbed copies of the images beside them: the second half of what it knows."""
    copies = rows + len(method) // 2
    method.calibrate([(rows, labels)], shifted=[(copies, labels)])
    return method


def without_term(method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
    """The search of a method that has no distance."""
    plain = copy.copy(method.method)
    plain.distance = None
    return tune(Evaluated(plain, method.evaluation), rows, labels)


def with_norms(method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
    """The search that leaves the norms of the logits as they are."""
    plain = copy.copy(method.method)
    plain.distance = Distance(exponents=(0.0,))
    return tune(Evaluated(plain, method.evaluation), rows, labels)


def without_posterior(method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
    """Of a method that was tuned: its term, no posterior, and the best τ beside it."""
    chosen, tuning = method.hyperparameters, method.tuning
    assert chosen is not None
    assert tuning is not None
    method.tuning = replace(tuning, posterior=None)  # or scores of the weights would be its own
    scores = {}
    for scale in SCALES:
        method.hyperparameters = replace(chosen, temperature=0.0, logit_temperature=scale)
        scores[scale] = negative_log_likelihood(method.predict_proba([rows]), labels)
    best = min(scores, key=lambda scale: scores[scale])
    method.hyperparameters = replace(chosen, temperature=0.0, logit_temperature=best)
    return method


def families(settings: Settings) -> list[Family]:
    """With and without the term, and with and without a posterior."""

    def ella(network: Network) -> Predictor:
        found = SampledOnce(neural_ef(settings), network.stores[0])
        return ELLA(network.model, eigenfunctions=found, distance=Distance(), **QUIET)

    with_term = Once(tune)
    tunings = {
        "temperature scaling + D": lambda *given: without_posterior(with_term(*given), *given[1:]),
        "ELLA": without_term,
        "ELLA + D": with_term,
        "ELLA + D, perturbed": with_perturbed,
        "ELLA + D, norms kept": with_norms,
    }

    def shown(data: Data) -> list[Images]:
        return [data.test, data.perturbed]

    count = settings.fit_on
    return [  # the dear one first: the other reads what is kept of its passes
        Family(ella, tunings, count, shown=shown),
        Family(scaling, {"temperature scaling": tune}, count),
    ]


def main(argv: list[str] | None = None) -> None:
    """Run what is missing."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(settings.threads)
    run_suite(settings, families(settings), MEASURES)


if __name__ == "__main__":
    main()
