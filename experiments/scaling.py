"""How do time and memory grow with n, p, c and k?

    python experiments/scaling.py --out experiments/results

Convolutional networks with random weights on random pictures. One quantity grows at a time, the
others staying as they are, and exponents are fitted to the three largest values: the slope of the
logs of processor time (other work on the machine does not change it) of `fit` and of predicting
64 inputs, of the peak memory of `fit`, and of the size of what prediction needs. Each size is
measured in a process of its own, as memory that is freed stays with a process. The peak is
compared with what `ella.plan` said before the pass over the inputs.
"""

import multiprocessing
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from _report import PeakMemory, load_results, pipes, save_results
from _settings import Common, option, parsed, recorded
from torch import nn

from ella import ELLA, NeuralEF, Training

BASE = {"n": 256, "width": 64, "c": 10, "k": 16}
RANGES = {
    "n": (512, 1024, 2048, 4096),
    "width": (32, 128, 256, 512),
    "c": (2, 10, 100, 300, 1000),
    "k": (8, 16, 32, 64),
}
NAMES = {"n": "inputs n", "width": "weights p", "c": "outputs c", "k": "eigenfunctions k"}


@dataclass(frozen=True)
class Settings(Common):
    """What the script can be asked for.

    Attributes:
        steps: Of learning, which does not depend on n or p.
    """

    steps: int = option(100, "steps of learning")


def network(width: int, classes: int) -> nn.Module:
    """Three convolutions and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)),
    ).eval()


def measured(sizes: Mapping[str, int], steps: int) -> dict[str, Any]:
    """Fit and predict once at some sizes."""
    torch.manual_seed(0)
    model = network(sizes["width"], sizes["c"])
    x, y = torch.randn(sizes["n"], 3, 16, 16), torch.randint(sizes["c"], (sizes["n"],))
    loader = [(x[i : i + 64], y[i : i + 64]) for i in range(0, sizes["n"], 64)]
    teacher = Training(steps=steps, batch_size=64)
    method = NeuralEF(
        sizes["k"],
        num_inputs=sizes["n"],
        num_directions=96,
        sketch="kronecker",
        teacher=teacher,
    )
    ella = ELLA(model, eigenfunctions=method, progress=False)
    with PeakMemory("cpu") as memory:
        start = time.process_time()
        ella.fit(loader)
        fit = time.process_time() - start
    ella.predict_proba(x[:64])
    start = time.process_time()
    for _ in range(5):
        ella.predict_proba(x[:64])
    predict = (time.process_time() - start) / 5
    plan = ella.plan
    assert plan is not None
    return {
        **sizes,
        "p": plan.num_weights,
        "sketch": plan.sketch,
        "fit_seconds": fit,
        "predict_seconds": predict,
        "peak_bytes": memory.bytes,
        "planned_bytes": plan.memory_bytes,
        "state_bytes": ella.state_bytes,
    }


def slope(x: list[float], y: list[float]) -> float:
    """Of logs, by least squares."""
    logs = torch.tensor([x, y], dtype=torch.float64).log()
    centred = logs - logs.mean(1, keepdim=True)
    return ((centred[0] * centred[1]).sum() / centred[0].square().sum()).item()


def scaling_table(results: Mapping[str, Any]) -> str:
    """A line for each quantity: range, exponents, and memory against the plan."""
    titles = ["quantity", "from", "to", "fit time", "prediction time", "fit memory", "state"]
    lines = [[*titles, "peak / planned"], ["---"] + ["---:"] * 7]
    for name, title in NAMES.items():
        rows = [row for row in results["rows"] if row["varied"] == name]
        x = [row["p" if name == "width" else name] for row in rows]
        largest = range(max(0, len(rows) - 3), len(rows))
        keys = ("fit_seconds", "predict_seconds", "peak_bytes", "state_bytes")
        slopes = [
            f"{slope([x[i] for i in largest], [rows[i][key] for i in largest]):.2f}"
            for key in keys
        ]
        ratios = [row["peak_bytes"] / row["planned_bytes"] for row in rows]
        span = f"{min(ratios):.2f}–{max(ratios):.2f}"
        lines.append([title, f"{min(x):,}", f"{max(x):,}", *slopes, span])
    return pipes(lines)


def main(argv: list[str] | None = None) -> None:
    """See the module."""
    settings = parsed(Settings, __doc__ or "", argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = settings.out / "scaling.json"
    rows: list[dict[str, Any]] = load_results(path)["rows"] if path.exists() else []
    for name, values in RANGES.items():
        for value in values[:2] if settings.smoke else values:
            if any(row["varied"] == name and row[name] == value for row in rows):
                continue
            with multiprocessing.get_context("fork").Pool(1) as alone:
                found = alone.apply(measured, ({**BASE, name: value}, settings.steps))
            rows.append({"varied": name, **found})
            print(rows[-1], flush=True)
            save_results(path, recorded(settings), rows)


if __name__ == "__main__":
    main()
