"""How long does one example take? A forward pass, and the stages of a prediction, in turn.

    python experiments/latency.py --out experiments/results

Networks with random weights and random inputs, as time does not depend on them, on one thread.
Each call is timed in blocks that take turns with those of the other calls; the fastest block of
each counts, as whatever else the machine does only makes blocks slower. What should hold is that a
prediction takes at most three forward passes and .2 ms. Stages are differences: `features` reads
activations and evaluates the eigenfunctions, `gaussian` conditions them, `predict_proba` averages
64 draws.
"""

import itertools
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from _report import pipes, save_results
from _settings import Common, option, parsed, recorded
from torch import Tensor, nn
from torchvision.models import resnet18

from ella import ELLA, NeuralEF, Training

ALLOWED_PASSES, ALLOWED_MS = 3, 0.2
STAGES = ("forward", "features", "gaussian", "predict_proba")


@dataclass(frozen=True)
class Settings(Common):
    """What the script can be asked for.

    Attributes:
        blocks: Blocks of each call.
        calls: Calls in a block, for the smallest networks.
    """

    blocks: int = option(15, "blocks of each call")
    calls: int = option(200, "calls in a block, of the smallest networks")


def convolutional() -> nn.Module:
    """Two convolutions on pictures of 8 x 8 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def perceptron(width: int, depth: int) -> nn.Module:
    """Hidden layers of one width, from 64 numbers to ten classes."""
    layers: list[nn.Module] = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron, 32 units": (lambda: perceptron(32, 1), (64,)),
    "perceptron, 2 × 256 units": (lambda: perceptron(256, 2), (64,)),
    "two convolutions": (convolutional, (1, 8, 8)),
    "ResNet-18, 64 pixels": (lambda: resnet18(num_classes=10), (3, 64, 64)),
    "ResNet-18, 224 pixels": (lambda: resnet18(num_classes=10), (3, 224, 224)),
}


def fitted(model: nn.Module, shape: tuple[int, ...]) -> ELLA:
    """Everything by default, but for how much is learnt."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, *shape, generator=generator)
    y = torch.randint(10, (64,), generator=generator)
    method = NeuralEF(num_inputs=64, num_directions=96, teacher=Training(steps=30))
    ella = ELLA(model, eigenfunctions=method, temperature=0.5, progress=False)
    return ella.fit([(x[:32], y[:32]), (x[32:], y[32:])])


def fastest(calls: Mapping[str, Callable[[], Any]], blocks: int, count: int) -> dict[str, float]:
    """Milliseconds of each call in its fastest block."""
    found = {name: float("inf") for name in calls}
    for _ in range(blocks + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(count):
                call()
            found[name] = min(found[name], 1e3 * (time.perf_counter() - start) / count)
    return found


def row_of(name: str, settings: Settings) -> dict[str, Any]:
    """One network."""
    make, shape = NETWORKS[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = make().eval()
        ella = fitted(model, shape)
    one = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def forward() -> Tensor:
        return model(one)

    calls = {
        "forward": forward,
        "features": lambda: ella.features(one),
        "gaussian": lambda: ella.gaussian(one),
        "predict_proba": lambda: ella.predict_proba(one, n_samples=64),
    }
    pilot = fastest({"forward": forward}, 1, 3)["forward"]
    count = max(2, min(settings.calls, int(settings.calls * 0.05 / pilot)))
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": name,
        "parameters": parameters,
        "milliseconds": fastest(calls, settings.blocks, count),
    }


def latency_table(results: Mapping[str, Any]) -> str:
    """A line for each network: the times, the limit, and the stages as differences."""
    titles = ["network", "weights", "forward ms", "predict_proba ms", "3 × forward + .2"]
    titles += ["activations, eigenfunctions", "posterior", "averaging"]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    for row in results["rows"]:
        times = [row["milliseconds"][stage] for stage in STAGES]
        limit = ALLOWED_PASSES * times[0] + ALLOWED_MS
        found = f"{times[-1]:.3f}" if times[-1] <= limit else f"**{times[-1]:.3f}**"
        stages = [f"{b - a:.3f}" for a, b in itertools.pairwise(times)]
        about = [row["model"], f"{row['parameters']:,}", f"{times[0]:.3f}"]
        lines.append([*about, found, f"{limit:.3f}", *stages])
    return pipes(lines)


def main(argv: list[str] | None = None) -> None:
    """See the module."""
    settings = parsed(Settings, __doc__ or "", argv)
    torch.set_num_threads(1)
    names = list(NETWORKS)[:2] if settings.smoke else list(NETWORKS)
    rows = []
    for name in names:
        rows.append(row_of(name, settings))
        print(rows[-1], flush=True)
    without = ("root", "out", "smoke")
    save_results(settings.out / "latency.json", recorded(settings, *without), rows)
    print(latency_table({"rows": rows}))


if __name__ == "__main__":
    main()
