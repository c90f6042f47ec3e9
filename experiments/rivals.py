"""Does something that costs nothing do as well as a posterior, or as its distance term?

    pip install ".[rivals]"
    python experiments/rivals.py --root $ELLA_DATA --out experiments/results/distance

Beside `distance.py`, on the same images, draws and networks: detectors of inputs of no class from
`pytorch-ood` and confidences made of logits (`_detectors.py`), and probabilities by more numbers
than a temperature (`_recalibrated.py`). Writes rivals-NETWORK.json, a row for each and seed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from _corruptions import CORRUPTIONS
from _detectors import Known, Read, Score, best_detecting, best_ranking, detectors
from _images import Data, Images
from _recalibrated import RECALIBRATIONS
from _report import earlier_rows, save_results
from _settings import parsed
from _suite import Network, compared, drawn, kept_settings, seeds
from distance import Settings
from torch import Tensor

from ella import entropy
from ella.metrics import (
    area_under_risk_coverage,
    auroc,
    expected_calibration_error,
    negative_log_likelihood,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What a network makes of all images.

    Attributes:
        known: Training images, and the last layer.
        test: Test images.
        labels: Their classes.
        perturbed: Copies of them.
        outside: Images of no class, by source.
        shifted: Corrupted test images, the first ones of them, by kind and severity.
    """

    known: Known
    test: Read
    labels: Tensor
    perturbed: Read
    outside: Mapping[str, Read]
    shifted: Mapping[str, Read]

    @classmethod
    @torch.no_grad()
    def by(cls, network: Network, data: Data, fit_on: int) -> "Seen":
        """One pass over all images, or what is kept of it."""

        def read(images: Images) -> Read:
            features = [network.body.penultimate(x) for x, _ in images.loader()]
            return Read.joined(Read(z, network.body.fc(z)) for z in features)

        training = data.fitting(fit_on)
        kinds = [(kind, severity) for kind in CORRUPTIONS for severity in range(1, 6)]
        return cls(
            Known(read(training), training.y, network.body.fc),
            read(data.test),
            data.test.y,
            read(data.perturbed),
            {source: read(images) for source, images in data.ood.items()},
            {f"{kind} {s}": read(data.corrupted(kind, s)) for kind, s in kinds},
        )

    @property
    def wrong(self) -> Tensor:
        """Which test images are classified wrong."""
        return self.test.logits.argmax(1) != self.labels


def detector_rows(seen: Seen, settings: Settings) -> Iterator[Row]:
    """AUROC of each source and AURC, of each detector and seed."""
    for name, scores in detectors(seen.known).items():
        test, changed = scored(scores, seen.test), scored(scores, seen.perturbed)
        outside = {source: scored(scores, read) for source, read in seen.outside.items()}
        for seed in seeds(settings):
            val, rest = drawn(len(seen.labels), seed)
            inside = {setting: values[val] for setting, values in test.items()}
            copies = {setting: values[val] for setting, values in changed.items()}
            at, ranked = best_detecting(inside, copies), best_ranking(inside, seen.wrong[val])
            yield {
                **{"method": name, "seed": seed, "detecting at": at, "ranking at": ranked},
                "aurc": area_under_risk_coverage(test[ranked][rest], seen.wrong[rest]),
                **{
                    f"auroc {source}": auroc(test[at][rest], values[at])
                    for source, values in outside.items()
                },
            }


@torch.no_grad()
def scored(scores: Mapping[str, Score], read: Read) -> dict[str, Tensor]:
    """By setting."""
    return {setting: score(read) for setting, score in scores.items()}


def recalibrated_rows(seen: Seen, settings: Settings) -> Iterator[Row]:
    """Everything that probabilities are judged by, of each recalibration and seed."""
    for name, fit in RECALIBRATIONS.items():
        for seed in seeds(settings):
            val, rest = drawn(len(seen.labels), seed)
            probs_of = fit(seen.test.logits[val], seen.labels[val])
            probs, labels = probs_of(seen.test.logits[rest]), seen.labels[rest]
            row: Row = {
                **{"method": name, "seed": seed},
                **judged(probs, labels),
                "aurc": area_under_risk_coverage(1 - probs.amax(1), probs.argmax(1) != labels),
            }
            for source, read in seen.outside.items():
                row[f"auroc {source}"] = auroc(entropy(probs), entropy(probs_of(read.logits)))
            for shift, read in seen.shifted.items():
                some = rest[rest < len(read.logits)]
                found = judged(probs_of(read.logits[some]), seen.labels[some])
                row |= {f"{key} {shift}": value for key, value in found.items()}
            yield row


def judged(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """NLL and ECE."""
    return {
        "nll": negative_log_likelihood(probs, labels),
        "ece": expected_calibration_error(probs, labels),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the networks that are missing, writing a file for each."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(settings.threads)
    kept, data = kept_settings(settings), Data(settings)
    for name in settings.archs:
        path = settings.out / f"rivals-{name}.json"
        if earlier_rows(path, kept, compared(kept)):
            continue
        network = Network.published(name, data.root, settings.kept_in, settings.device)
        seen = Seen.by(network, data, settings.fit_on)
        rows = [*detector_rows(seen, settings), *recalibrated_rows(seen, settings)]
        save_results(path, kept, [{"arch": name, **row} for row in rows])


if __name__ == "__main__":
    main()
