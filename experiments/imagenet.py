"""A thousand classes: EfficientNet-Lite0 on TinyImageNet, enlarged to 128 pixels.

    pip install 'ella-laplace[spectral]'
    python experiments/imagenet.py --root $ELLA_DATA --num-inputs 1000

The published network (ImageNet, 1,000 classes) meets images that it was not trained for: the 5,000
of TinyImageNet's validation set, 32 pixels wide and enlarged, with labels among the 1,000. One
half of them is what methods are fitted to and tuned on, as there are no training images; the other
half is for the final numbers. "predict × forward" is the time of a prediction to that of a forward
pass, on images of 224 pixels. Writes imagenet.json after each method, and goes on where it was
stopped. `--smoke` takes a small network with random weights and as many classes.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SPECTRAL = Path(__file__).resolve().parent / "spectral"
if str(SPECTRAL) not in sys.path:  # where the network is
    sys.path.append(str(SPECTRAL))

from _data import tiny_imagenet  # noqa: E402
from _report import earlier_rows, pipes, save_results  # noqa: E402
from _settings import OnDevice, option, parsed, recorded  # noqa: E402

from ella import ELLA, NeuralEF, Predictor, Training  # noqa: E402
from ella.baselines import MAP, LastLayerKronecker, TemperatureScaling  # noqa: E402
from ella.metrics import (  # noqa: E402
    area_under_risk_coverage,
    expected_calibration_error,
    negative_log_likelihood,
)
from ella.report import forward_ratio, timed  # noqa: E402

CLASSES = 1000
AT_ONCE = 100
"""Images a batch."""
SMOKE = 100
"""Images of a smoke test."""
Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Settings(OnDevice):
    """What the script can be asked for.

    Attributes:
        seeds: Draws of the halves.
        first_seed: The first of them.
        num_images: Images of both halves.
        num_inputs: See `NeuralEF`.
        steps: Training steps of its teacher.
        fit_on: Images of the first half for G.
        pixels: Width of the images.
        timed_pixels: Width of the images of which the cost is measured.
        n_samples: Draws.
        checkpoint: Folder for what NeuralEF has finished; None keeps nothing.
        threads: CPU threads.
    """

    seeds: int = option(1, "draws of the halves")
    first_seed: int = option(0, "the first of them")
    num_images: int = option(5000, "images of both halves")
    num_inputs: int = option(1000, "images NeuralEF learns on")
    steps: int = option(1500, "training steps of its teacher")
    fit_on: int = option(2500, "images of the first half for G")
    pixels: int = option(128, "width of the images")
    timed_pixels: int = option(224, "width of the images of which the cost is measured")
    n_samples: int = option(64, "draws")
    checkpoint: str | None = option(None, "folder for what NeuralEF has finished")
    threads: int = option(1, "CPU threads")


def enlarged(images: Tensor, pixels: int) -> Tensor:
    """Images (n, 3, h, w) of bytes at another width, bicubic, in 0..255."""
    wide = F.interpolate(images.float(), size=pixels, mode="bicubic", align_corners=False)
    return wide.clamp(0, 255)


def model_and_images(settings: Settings) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, and images of bytes with their classes; made up in a smoke test."""
    if settings.smoke:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        small = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 1000),
        )
        images = torch.randint(256, (SMOKE, 3, 32, 32), generator=generator).byte()
        return small.eval(), images, torch.randint(CLASSES, (SMOKE,), generator=generator)
    from _efficientnet import pretrained

    images, labels = tiny_imagenet(settings.root)
    return pretrained().requires_grad_(True), images, labels


def batches(images: Tensor, labels: Tensor, settings: Settings) -> Pairs:
    """Enlarged, on the device."""
    pairs = zip(images.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
    where = settings.device
    return [(enlarged(x, settings.pixels).to(where), y.to(where)) for x, y in pairs]


def methods(model: nn.Module, settings: Settings, seed: int) -> dict[str, Predictor]:
    """By name, not fitted yet."""
    neural = NeuralEF(
        num_inputs=settings.num_inputs, teacher=Training(settings.steps, weight_decay=0.3)
    )
    if settings.smoke:
        short = Training(steps=20, batch_size=32)
        neural = NeuralEF(rank=8, num_inputs=60, num_directions=16, width=16, teacher=short)
    return {
        "MAP": MAP(model, progress=False),
        "temperature scaling": TemperatureScaling(model, progress=False),
        "last-layer Laplace, Kronecker": LastLayerKronecker(model, progress=False),
        "ELLA, NeuralEF": ELLA(model, eigenfunctions=neural, seed=seed, progress=False),
    }


def scores(method: Predictor, test: Pairs) -> dict[str, float]:
    """On images that nothing was chosen by."""
    probs = torch.cat([method.predict_proba(x) for x, _ in test]).cpu()
    labels = torch.cat([y for _, y in test]).cpu()
    first = probs.topk(5, dim=1).indices == labels.unsqueeze(1)
    wrong = ~first[:, 0]
    return {
        "nll": negative_log_likelihood(probs, labels),
        "ece": expected_calibration_error(probs, labels),
        "aurc": area_under_risk_coverage(1 - probs.amax(1), wrong),
        "accuracy": first[:, 0].double().mean().item(),
        "top five": first.any(1).double().mean().item(),
    }


def costs(method: Predictor, model: nn.Module, x: Tensor, device: str) -> dict[str, float]:
    """Time of a prediction to that of a forward pass, one image and 32 at a time."""
    found = {}
    with torch.no_grad():
        for size in (1, 32):
            pair = partial(method.predict_proba, x[:size]), partial(model, x[:size])
            found[f"predict_ratio {size}"] = forward_ratio(*pair, repeats=7, device=device)
    return found


def row_of(
    method: Predictor, model: nn.Module, halves: tuple[Pairs, Pairs], settings: Settings
) -> dict[str, Any]:
    """All measures of one method, but for its cost."""
    held, test = halves
    fit = partial(method.fit, held[: max(1, settings.fit_on // AT_ONCE)])
    if isinstance(method, ELLA) and settings.checkpoint is not None:
        fit = partial(fit, checkpoint=Path(settings.checkpoint) / str(method.seed))
    fit_seconds = timed(fit, settings.device)[1]
    tune = partial(method.calibrate, held, n_samples=settings.n_samples)
    tune_seconds = timed(tune, settings.device)[1]
    return {
        "fit_seconds": fit_seconds,
        "calibrate_seconds": tune_seconds,
        "state_bytes": method.state_bytes,
        **scores(method, test),
        **vars(method.hyperparameters),
    }


def imagenet_table(results: Mapping[str, Any]) -> str:
    """A line for each method, means over seeds."""
    titles = ["method", "NLL", "ECE", "AURC", "accuracy", "top five", "fit, s", "calibrate, s"]
    titles += ["state, MB", "predict × forward, 1", "32"]
    keys = ["nll", "ece", "aurc", "accuracy", "top five", "fit_seconds", "calibrate_seconds"]
    keys += ["state_bytes", "predict_ratio 1", "predict_ratio 32"]
    styles = [".3f", ".3f", ".3f", ".3f", ".3f", ".0f", ".0f", ".1f", ".2f", ".2f"]
    lines = [titles, ["---"] + ["---:"] * len(keys)]
    rows = results["rows"]
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        means = [sum(row[key] for row in own) / len(own) for key in keys]
        means[7] /= 1e6
        lines.append([name, *(format(v, s) for v, s in zip(means, styles, strict=True))])
    chosen = results["settings"]
    about = f"{chosen['seeds']} seed(s); half of {chosen['num_images']:,} images each; "
    about += f"{chosen['num_inputs']:,} images to learn on, {chosen['fit_on']:,} for G."
    return f"{pipes(lines)}\n\n{about}"


def main(argv: list[str] | None = None) -> None:
    """Run all methods, one after the other."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(settings.threads)
    target = settings.out / "imagenet.json"
    described = recorded(settings, "root", "out", "checkpoint", "threads")
    rows = earlier_rows(target, described, [name for name in described if name != "seeds"])
    model, images, labels = model_and_images(settings)
    model.to(settings.device)
    x = enlarged(images[:32], settings.timed_pixels).to(settings.device)
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        order = order[: settings.num_images]
        parts = order.chunk(2)
        held, test = (batches(images[part], labels[part], settings) for part in parts)
        for name, method in methods(model, settings, seed).items():
            if any(row["method"] == name and row["seed"] == seed for row in rows):
                continue
            row = row_of(method, model, (held, test), settings)
            cost = costs(method, model, x, settings.device)
            rows.append({"method": name, "seed": seed, **row, **cost})
            save_results(target, described, rows)
            print(rows[-1])
    print(imagenet_table({"settings": described, "rows": rows}))


if __name__ == "__main__":
    main()
