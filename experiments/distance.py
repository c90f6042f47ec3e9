"""Does variance that grows away from the data mend what the kernel does not see?

    python experiments/distance.py --root $ELLA_DATA --out experiments/results/distance

The published CIFAR-10 networks, protocol B of `_suite.py`, whose result files it writes. ELLA
(NeuralEF, diagonal residual) is fitted once for each network, with activation distances; with and
without the term it has the same eigenfunctions. "temperature scaling + D" has the same term, at
the same scale, beside no posterior, and a τ of its own. "perturbed" is tuned on copies of the
images, too, each changed in a way that is none of the tested corruptions.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from _corruptions import CORRUPTIONS
from _families import QUIET, neural_ef, scaling
from _models import RESNET_DEPTHS
from _report import pipes
from _settings import option, parsed
from _store import SampledOnce
from _study import SCALING, Study
from _suite import Family, Network, StudySettings, run_suite, tune
from torch import Tensor

from ella import ELLA, Distance, Evaluated, Predictor
from ella.metrics import negative_log_likelihood

P_NORM = "max_logit_p_norm"
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


def without_posterior(method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
    """The term at the scale that the rule gives it, no posterior, and the best τ beside it."""
    method.calibrate([(rows, labels)])
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

    tunings = {
        "temperature scaling + D": without_posterior,
        "ELLA": without_term,
        "ELLA + D": tune,
        "ELLA + D, perturbed": with_perturbed,
    }
    return [
        Family(scaling, {"temperature scaling": tune}, settings.fit_on),
        Family(ella, tunings, settings.fit_on, shown=lambda data: [data.test, data.perturbed]),
    ]


# The table


def distance_table(study: Study) -> str:
    """A line for each network and method."""
    sources = list(dict.fromkeys(row["source"] for row in study.rows("ood")))
    titles = ["network", "method", "NLL", "ECE", "AURC · 10³", "of p-norm"]
    titles += ["AUROC, mean", *sources, "of variance", "of D", "of energy", "corrected energy"]
    titles += ["NLL, shift", "ECE, shift"]
    titles += ["corruptions of 11 below t. s. in NLL", "in ECE", "predict × forward"]
    lines = [titles, ["---"] * 2 + ["---:"] * (len(titles) - 2)]
    lines += [
        [arch, method, *_line(study, sources, arch=arch, method=method)]
        for arch in study.networks()
        for method in study.methods()
        if study.mean("calibration", "nll", arch=arch, method=method) is not None
    ]
    settings = study.settings()
    seeds = f"{settings['first_seed']} to {settings['first_seed'] + settings['seeds'] - 1}"
    about = f"Seeds {seeds}; {settings['num_inputs']:,} images to learn on, "
    about += f"{settings['fit_on']:,} for G and distances; {settings['num_ood']:,} of each "
    about += f"source, {settings['num_shift']} a corruption and severity."
    return f"{pipes(lines)}\n\n{about}"


def _line(study: Study, sources: Sequence[str], **where: str) -> list[str]:
    def number(measure: str, key: str, form: str, **more: str) -> str:
        value = study.mean(measure, key, **where, **more)
        return "–" if value is None or value == 0.5 else form.format(value)

    return [
        *(number("calibration", key, "{:.4f}") for key in ("nll", "ece")),
        *(_thousandths(study, score, **where) for score in ("confidence_deficit", P_NORM)),
        number("ood", "auroc", "{:.4f}", score="entropy"),
        *(number("ood", "auroc", "{:.3f}", score="entropy", source=each) for each in sources),
        *(
            number("ood", "auroc", "{:.4f}", score=score)
            for score in ("logit_variance", "distance", "energy", "corrected_energy")
        ),
        *(number("shift", key, "{:.4f}") for key in ("nll", "ece")),
        *(_below(study, key, **where) for key in ("nll", "ece")),
        number("calibration", "predict_ratio", "{:.3f}"),
    ]


def _thousandths(study: Study, score: str, **where: str) -> str:
    value = study.mean("calibration", f"aurc {score}", **where)
    return "–" if value is None else f"{1e3 * value:.2f}"


def _below(study: Study, key: str, **where: str) -> str:
    """On how many corruptions, over all severities, it is below temperature scaling."""
    if where["method"] == SCALING:
        return "–"
    scaled = where | {"method": SCALING}
    pairs = [
        [study.mean("shift", key, corruption=kind, **each) or 0.0 for each in (where, scaled)]
        for kind in CORRUPTIONS
    ]
    return str(sum(own < other for own, other in pairs))


def main(argv: list[str] | None = None) -> None:
    """Run what is missing."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(settings.threads)
    run_suite(settings, families(settings))


TABLES: dict[str, Callable[[Study], str]] = {"methods": distance_table}


if __name__ == "__main__":
    main()
