"""What do fitting and predicting cost, in training passes and forward passes?

    python experiments/cost.py --root $ELLA_DATA --arch resnet20
    python experiments/cost.py --arch resnet18 --num-inputs 2000

The CIFAR-10 ResNets have their published weights; torchvision's ResNet-18 (c = 1000) has random
ones and random images, as time and memory do not depend on them. Predictions of 256 images with 64
draws are timed in turn with plain forward passes. Fitting is timed whole, eigenfunctions and G
over all training data, and set against plain passes (forward, backward, SGD) over them. Memory
is the most that the process held above what it held before. A method that is already in the result
file is not run again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from _data import data_root, load_task
from _models import checkpoint_path, load_model
from _report import COST_COLUMNS, PeakMemory, load_results, markdown_table, save_results
from _settings import OnDevice, option, parsed, recorded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from ella import ELLA, NeuralEF, Predictor, Training
from ella.baselines import LastLayerLaplace, NystromLaplace, TemperatureScaling
from ella.report import forward_ratio, timed

BATCH_SIZE = 128
PREDICTED = 256
DRAWS = 64
PASS = "one training pass"


@dataclass(frozen=True)
class Settings(OnDevice):
    """What the script can be asked for.

    Attributes:
        arch: The classifier.
        num_inputs: Inputs to learn from.
        num_directions: See `NeuralEF`.
        steps: Of training the networks.
        image_size: Of the random images.
        memory_budget: Bytes.
    """

    arch: str = option("resnet20", "resnet20 to 56, or resnet18")
    num_inputs: int = option(10_000, "inputs to learn from")
    num_directions: int = option(256, "see NeuralEF")
    steps: int = option(1500, "of training the networks")
    image_size: int = option(64, "of the random images")
    memory_budget: int = option(2**28, "bytes")


def problem(settings: Settings) -> tuple[nn.Module, TensorDataset]:
    """A classifier and its training data."""
    if settings.arch != "resnet18":
        path = checkpoint_path(settings.arch, data_root(settings.root))
        return load_model(settings.arch, path).to(settings.device), load_task(
            "cifar10", settings.root
        ).train
    generator = torch.Generator().manual_seed(0)
    shape = (settings.num_inputs, 3, settings.image_size, settings.image_size)
    images = torch.randn(shape, generator=generator)
    labels = torch.randint(1000, (len(images),), generator=generator)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = resnet18()
        # Statistics that fit the weights: with the initial ones activations grow layer by layer
        # until all Jacobians point one way.
        for _ in range(20):
            model(images[:BATCH_SIZE])
    return model.eval().to(settings.device), TensorDataset(images, labels)


def training_pass(
    model: nn.Module, data: TensorDataset, device: str, most: int = 5120
) -> tuple[float, float]:
    """Seconds of a pass over all the data, from one over `most` examples, and its GiB."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    images, labels = (tensor[:most].to(device) for tensor in data.tensors)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def run() -> None:
        for x, y in zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
            step(x, y)

    model.train()
    with PeakMemory(device) as memory:
        step(images[:BATCH_SIZE], labels[:BATCH_SIZE])
    seconds = timed(run, device)[1] * len(data) / len(images)
    optimizer.zero_grad()
    model.load_state_dict(weights)
    model.eval()
    return seconds, memory.bytes / 2**30


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        make: From a model to an unfitted method.
        examples: Fitted on so many only, where just the prediction is compared; None: on all.
    """

    make: Callable[[nn.Module], Predictor]
    examples: int | None = None


def methods(settings: Settings) -> dict[str, Method]:
    """By their names in the table."""
    teacher = Training(steps=settings.steps, weight_decay=0.3)
    neural = NeuralEF(
        64, num_inputs=settings.num_inputs, num_directions=settings.num_directions, teacher=teacher
    )

    few = replace(neural, num_inputs=min(settings.num_inputs, 1000), teacher=Training(steps=50))
    budget = settings.memory_budget

    def ella(method: NeuralEF, residual: str) -> Callable[[nn.Module], Predictor]:
        return lambda m: ELLA(m, eigenfunctions=method, residual=residual, memory_budget=budget)

    found = {
        "temperature scaling": Method(TemperatureScaling),
        "ELLA, NeuralEF k = 64": Method(ella(neural, "diag")),
    }
    if settings.arch == "resnet18":
        return found
    return found | {
        "ELLA, NeuralEF k = 64, factor": Method(ella(few, "factor"), 1000),
        "laplace-torch last-layer, full": Method(lambda m: LastLayerLaplace(m, structure="full")),
        # Its fit takes memory with its rows (128 of them: over 23 GB) and hours with its data; its
        # prediction neither.
        "laplace-torch ELLA, k = 20": Method(
            lambda m: NystromLaplace(m, rank=20, subsample=24), 48
        ),
    }


def row_of(
    name: str, method: Method, model: nn.Module, data: TensorDataset, settings: Settings
) -> dict[str, Any]:
    """Fit one method and time its prediction."""
    some = data if method.examples is None else TensorDataset(*data[: method.examples])
    loader = DataLoader(some, batch_size=BATCH_SIZE)
    with PeakMemory(settings.device) as memory:
        fitted, seconds = timed(lambda: method.make(model).fit(loader))
    row: dict[str, Any] = {"seed": 0, "method": name, "state_bytes": fitted.state_bytes}
    if method.examples is None:
        row |= {"fit_seconds": seconds, "fit_gib": memory.bytes / 2**30}
    images = data.tensors[0][:PREDICTED].to(settings.device)
    with torch.no_grad():
        row["predict_ratio"] = forward_ratio(
            lambda: fitted.predict_proba(images, n_samples=DRAWS),
            lambda: model(images),
            device=settings.device,
        )
    return row


def main(argv: list[str] | None = None) -> None:
    """Run what is not yet in the result file, and write it."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    path = settings.out / f"cost-{settings.arch}.json"
    rows: list[dict[str, Any]] = load_results(path)["rows"] if path.exists() else []
    done = {row["method"] for row in rows}
    model, data = problem(settings)
    if PASS not in done:
        seconds, gib = training_pass(model, data, settings.device)
        rows.append({"seed": 0, "method": PASS, "fit_seconds": seconds, "fit_gib": gib})
    one = next(row for row in rows if row["method"] == PASS)
    for name, method in methods(settings).items():
        if name in done:
            continue
        row = row_of(name, method, model, data, settings)
        if method.examples is None:
            row["fit_passes"] = row["fit_seconds"] / one["fit_seconds"]
            row["fit_memory_ratio"] = row["fit_gib"] / one["fit_gib"]
        rows.append(row)
        print(row, flush=True)
        save_results(path, recorded(settings), rows)
    print(markdown_table(rows, COST_COLUMNS))


if __name__ == "__main__":
    main()
