"""Does variance that grows away from the data mend what the kernel does not see?

    python experiments/distance.py --root $ELLA_DATA --archs resnet20 resnet32

The published CIFAR-10 networks, protocol B: tuned on 2,000 test images, tested on the others, over
`--seeds` draws of them. ELLA (NeuralEF, diagonal residual) is fitted once for each network, with
activation distances; with and without the term it has the same eigenfunctions. "temperature
scaling + D" has the same term, at the same scale, beside no posterior, and a τ of its own.
"perturbed" is tuned on copies of the images, too, each changed in a way that is none of the tested
corruptions. Scores
of out-of-distribution inputs are entropies; "energy" is that of the mean logits. Writes
distance.json after each network, and goes on where it was stopped.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from _corruptions import CORRUPTIONS
from _images import Data
from _models import checkpoint_path, load_model
from _perturb import perturbed
from _report import earlier_rows, pipes, save_results
from _settings import Common, option, parsed, recorded
from _suite import NUM_VAL
from torch import Tensor, nn

from ella import ELLA, Distance, Evaluated, NeuralEF, Predictor, Training
from ella.baselines import TemperatureScaling
from ella.metrics import (
    area_under_risk_coverage,
    auroc,
    expected_calibration_error,
    negative_log_likelihood,
)
from ella.report import forward_ratio

SCALES = torch.logspace(-0.7, 0.7, 57).tolist()
"""Candidates of τ for temperature scaling with the term."""
SCORES = ("entropy", "logit_variance", "energy", "corrected_energy", "distance")
Tune = Callable[[Evaluated, Tensor, Tensor], Evaluated]


@dataclass(frozen=True)
class Settings(Common):
    """What the script can be asked for.

    Attributes:
        archs: Networks.
        seeds: Draws of the images to tune on.
        first_seed: The first of them.
        num_inputs: See `NeuralEF`.
        num_directions: See `NeuralEF`.
        fit_on: Training images for G and for distances.
        num_test: Test images.
        num_cropped: Of protocol A, which is not run here.
        num_ood: Of each source.
        num_shift: Of each corruption and severity.
        threads: CPU threads.
    """

    archs: tuple[str, ...] = option(("resnet20",), "networks")
    seeds: int = option(3, "draws of the images to tune on")
    first_seed: int = option(10, "the first of them")
    num_inputs: int = option(3000, "images NeuralEF learns on")
    num_directions: int = option(256, "see NeuralEF")
    fit_on: int = option(10_000, "training images for G and distances")
    num_test: int = option(10_000, "test images")
    num_cropped: int = option(0, "not used")
    num_ood: int = option(2000, "of each source")
    num_shift: int = option(500, "images a corruption")
    threads: int = option(1, "CPU threads")


def plain(method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
    """The search that all methods have in common; with the term if the method has it."""
    method.calibrate([(rows, labels)])
    return method


def with_perturbed(method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
    """The same, perturbed copies of the images beside them: the second half of what it knows."""
    copies = rows + len(method) // 2
    method.calibrate([(rows, labels)], shifted=[(copies, labels)])
    return method


def without_posterior(method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
    """The term at the scale that the rule gives it, no posterior, and the best τ beside it."""
    method.calibrate([(rows, labels)])
    chosen = method.hyperparameters
    assert chosen is not None
    scores = {}
    for scale in SCALES:
        method.hyperparameters = replace(chosen, temperature=0.0, logit_temperature=scale)
        scores[scale] = negative_log_likelihood(method.predict_proba([rows]), labels)
    best = min(scores, key=lambda scale: scores[scale])
    method.hyperparameters = replace(chosen, temperature=0.0, logit_temperature=best)
    return method


def fitted_methods(
    model: nn.Module, data: Data, settings: Settings
) -> dict[str, tuple[Predictor, Tune]]:
    """By name, a fitted method and how it is tuned."""
    loader = data.fitting(settings.fit_on).loader()
    method = NeuralEF(num_inputs=settings.num_inputs, num_directions=settings.num_directions)
    if settings.smoke:
        short = Training(steps=30, batch_size=32)
        method = replace(method, rank=4, num_directions=16, width=16, teacher=short)
    with_term = ELLA(model, eigenfunctions=method, distance=Distance(), progress=False)
    with_term.fit(loader)
    without = copy.copy(with_term)
    without.distance = None
    scaling = TemperatureScaling(model, progress=False).fit(loader)
    return {
        "temperature scaling": (scaling, plain),
        "temperature scaling + D": (with_term, without_posterior),
        "ELLA": (without, plain),
        "ELLA + D": (with_term, plain),
        "ELLA + D, perturbed": (with_term, with_perturbed),
    }


def rows_of(
    arch: str, model: nn.Module, data: Data, settings: Settings
) -> Iterator[dict[str, Any]]:
    """All measures of one network, a row for each method and seed."""
    methods = fitted_methods(model, data, settings)
    labels, batch = data.test.y, data.test.x[:256]
    mean_, std = (torch.tensor(v).view(3, 1, 1) for v in (data.task.mean, data.task.std))
    changed = (perturbed((data.test.x * std + mean_).clamp(0, 1)) - mean_) / std
    for name, (fitted, tune) in methods.items():
        both = torch.cat([data.test.x, changed])
        test = fitted.evaluated(both.split(250))
        outside = {k: fitted.evaluated(images.loader()) for k, images in data.ood.items()}
        shifted = {
            f"{kind} {severity}": (fitted.evaluated(images.loader()), images.y)
            for kind in CORRUPTIONS
            for severity in range(1, 6)
            for images in [data.corrupted(kind, severity)]
        }
        with torch.no_grad():
            ratio = forward_ratio(
                lambda fitted=fitted: fitted.predict_proba(batch, n_samples=64),
                lambda: model(batch),
                repeats=5,
            )
        for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            count = min(NUM_VAL, len(labels) // 4)
            tuned = tune(test.copied(), order[:count], labels[order[:count]])
            yield {
                "arch": arch,
                "method": name,
                "seed": seed,
                "predict_ratio": ratio,
                "state_bytes": fitted.state_bytes,
                **within(tuned, order[count:], labels),
                **detection(tuned, order[count:], outside),
                **under_shift(tuned, order[count:], shifted),
                **vars(tuned.hyperparameters),
            }


def within(tuned: Evaluated, rows: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores on test images."""
    probs = tuned.predict_proba([rows])
    y = labels[rows]
    deficit = 1 - probs.amax(1)
    return {
        "nll": negative_log_likelihood(probs, y),
        "ece": expected_calibration_error(probs, y),
        "aurc": area_under_risk_coverage(deficit, probs.argmax(1) != y),
        "aurc max_logit_p_norm": area_under_risk_coverage(
            tuned.uncertainty([rows]).max_logit_p_norm, probs.argmax(1) != y
        ),
    }


def detection(
    tuned: Evaluated, rows: Tensor, outside: Mapping[str, Evaluated]
) -> dict[str, float]:
    """AUROC of each source by entropy, logit variance and energy."""
    inside = tuned.uncertainty([rows])
    found = {}
    for source, images in outside.items():
        other = images.copied(tuned).uncertainty([torch.arange(len(images))])
        for score in SCORES:
            pair = getattr(inside, score), getattr(other, score)
            if pair[0] is not None:
                found[f"{score} {source}"] = auroc(*pair)
    return found


def under_shift(
    tuned: Evaluated, rows: Tensor, shifted: Mapping[str, tuple[Evaluated, Tensor]]
) -> dict[str, float]:
    """NLL and ECE of each corruption and severity, on images that it was not tuned on."""
    found = {}
    for name, (images, labels) in shifted.items():
        some = rows[rows < len(images)]
        probs = images.copied(tuned).predict_proba([some])
        found[f"nll {name}"] = negative_log_likelihood(probs, labels[some])
        found[f"ece {name}"] = expected_calibration_error(probs, labels[some])
    return found


# The table


def mean(rows: list[Mapping[str, Any]], keys: list[str]) -> float:
    """Over rows and keys."""
    return sum(row[key] for row in rows for key in keys) / (len(rows) * len(keys))


def distance_table(results: Mapping[str, Any]) -> str:
    """A line for each network and method."""
    rows = results["rows"]
    sources = [key.removeprefix("entropy ") for key in rows[0] if key.startswith("entropy ")]
    titles = ["network", "method", "NLL", "ECE", "AURC · 10³", "of p-norm"]
    titles += ["AUROC, mean", *sources, "of variance", "of D", "of energy", "corrected energy"]
    titles += ["NLL, shift", "ECE, shift"]
    titles += ["corruptions of 11 below t. s. in NLL", "in ECE", "predict × forward"]
    lines = [titles, ["---"] * 2 + ["---:"] * (len(titles) - 2)]
    for arch in dict.fromkeys(row["arch"] for row in rows):
        own = [row for row in rows if row["arch"] == arch]
        by_method = {
            name: [row for row in own if row["method"] == name]
            for name in dict.fromkeys(row["method"] for row in own)
        }
        scaling = by_method["temperature scaling"]
        for name, found in by_method.items():
            lines.append(_line(arch, name, found, scaling, sources))
    settings = results["settings"]
    seeds = f"{settings['first_seed']} to {settings['first_seed'] + settings['seeds'] - 1}"
    about = f"Seeds {seeds}; {settings['num_inputs']:,} images to learn on, "
    about += f"{settings['fit_on']:,} for G and distances; {settings['num_ood']:,} of each "
    about += f"source, {settings['num_shift']} a corruption and severity."
    return f"{pipes(lines)}\n\n{about}"


def _line(
    arch: str,
    name: str,
    found: list[Mapping[str, Any]],
    scaling: list[Mapping[str, Any]],
    sources: list[str],
) -> list[str]:
    def shift(measure: str) -> list[list[str]]:
        return [[f"{measure} {kind} {s}" for s in range(1, 6)] for kind in CORRUPTIONS]

    def below(measure: str) -> str:
        if found is scaling:
            return "–"
        better = (mean(found, keys) < mean(scaling, keys) for keys in shift(measure))
        return str(sum(better))

    def auroc_of(score: str) -> str:
        keys = [f"{score} {source}" for source in sources]
        value = mean(found, keys) if keys[0] in found[0] else 0.5
        return "–" if value == 0.5 else f"{value:.4f}"

    return [
        *(arch, name, f"{mean(found, ['nll']):.4f}", f"{mean(found, ['ece']):.4f}"),
        *(f"{1e3 * mean(found, [key]):.2f}" for key in ("aurc", "aurc max_logit_p_norm")),
        auroc_of("entropy"),
        *(f"{mean(found, [f'entropy {source}']):.3f}" for source in sources),
        *map(auroc_of, ("logit_variance", "distance", "energy", "corrected_energy")),
        *(f"{mean(found, [*chain(*shift(measure))]):.4f}" for measure in ("nll", "ece")),
        *(below("nll"), below("ece"), f"{mean(found, ['predict_ratio']):.3f}"),
    ]


def main(argv: list[str] | None = None) -> None:
    """Run the networks that are missing, writing after each."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(settings.threads)
    path: Path = settings.out / "distance.json"
    kept = recorded(settings, "root", "out", "threads")
    rows = earlier_rows(path, kept, [name for name in kept if name != "archs"])
    data = Data(settings)
    for arch in settings.archs:
        if arch in {row["arch"] for row in rows}:
            continue
        model = load_model(arch, checkpoint_path(arch, data.root))
        rows += list(rows_of(arch, model, data, settings))
        save_results(path, kept, rows)
        print(distance_table({"rows": rows, "settings": kept}), flush=True)


if __name__ == "__main__":
    main()
