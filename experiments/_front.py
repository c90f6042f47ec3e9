"""The few rows of the CIFAR-10 study that the main README opens with."""

import statistics

from _report import pipes
from _study import ENSEMBLE, Study

ARCH = "resnet56"
"""The deepest of the four, and so the fairest beside the ensemble."""
ROWS = {
    "plain model": (ARCH, "MAP"),
    "temperature scaling": (ARCH, "temperature scaling"),
    "last layer": (ARCH, "last-layer Laplace, Kronecker"),
    "**ELLA**": (ARCH, "ELLA, NeuralEF"),
    "ensemble of four": (ENSEMBLE, "MAP"),
}
SOURCES = {"near": ("CIFAR-100", "TinyImageNet"), "far": ("FashionMNIST", "MNIST")}
HEAD = (
    *("method", "NLL", "ECE", "AURC", "OOD AUROC, near", "OOD AUROC, far"),
    *("fit, CPU minutes", "prediction, forward passes"),
)


def front(study: Study) -> str:
    """NLL, ECE, AURC, AUROC of the entropy near and far, and the cost, held-out (protocol B)."""
    lines = [list(HEAD), ["---", *["---:"] * (len(HEAD) - 1)]]
    for title, (arch, method) in ROWS.items():
        where = {"arch": arch, "method": method}

        def mean(key: str, where: dict[str, str] = where) -> float:
            return _known(study.mean("calibration", key, protocol="B", **where))

        auroc = {
            kind: statistics.fmean(
                _known(study.mean("ood", "auroc", source=source, score="entropy", **where))
                for source in sources
            )
            for kind, sources in SOURCES.items()
        }
        cells = [title, f"{mean('nll'):.3f}", f"{mean('ece'):.4f}", f"{mean('aurc'):.4f}"]
        cells += [f"{auroc['near']:.3f}", f"{auroc['far']:.3f}"]
        trained = "three more trainings"
        cells.append(trained if arch == ENSEMBLE else f"{mean('fit_seconds') / 60:.1f}")
        cells.append(f"{mean('predict_ratio'):.2f}")
        lines.append(cells)
    return pipes(lines)


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("The study lacks a method of this table. Run it first.")
    return value
