"""Do several processes give what one gives? Under torchrun, with Fabric, with Accelerate.

    torchrun --standalone --nproc-per-node 2 experiments/distributed.py plain
    torchrun --standalone --nproc-per-node 2 experiments/distributed.py fabric
    torchrun --standalone --nproc-per-node 2 experiments/distributed.py accelerate

A small classifier of scikit-learn's digits is trained in every process alike, then ELLA is fitted
and calibrated with each process's part of the data (gloo on CPUs, nccl on GPUs), and once more by
each process alone with all of them, in float64. The first process prints both, and by how much
they differ. Augmentation is off, as each process augments with draws of its own; examples come in
the order that one process would see them in, rank after rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from _settings import Common, option, parsed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ella import ELLA, Distance, NeuralEF, Training
from ella.report import timed

LAUNCHERS = ("plain", "fabric", "accelerate")


@dataclass(frozen=True)
class Settings(Common):
    """What the script can be asked for.

    Attributes:
        launcher: What shares out the data.
        num_train: Digits to fit to.
        num_val: Digits to calibrate on.
    """

    launcher: str = option(None, "what shares out the data", choices=LAUNCHERS, positional=True)
    num_train: int = option(1001, "digits to fit to")
    num_val: int = option(395, "digits to calibrate on")


def digits(settings: Settings) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """To fit to, to calibrate on, and inputs to predict."""
    found = load_digits()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(found.data / 16)[order], torch.tensor(found.target)[order]
    n, m = settings.num_train, settings.num_train + settings.num_val
    return TensorDataset(x[:n], y[:n]), TensorDataset(x[n:m], y[n:m]), x[m:]


def classifier(data: TensorDataset) -> nn.Module:
    """Trained for a moment, the same in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, y = data.tensors
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def shared(
    settings: Settings, model: nn.Module, *data: TensorDataset
) -> tuple[nn.Module, list[Any]]:
    """The model and loaders of this process's parts, as each launcher makes them."""
    loaders = [DataLoader(each, batch_size=64) for each in data]
    if settings.launcher == "fabric":
        from lightning.fabric import Fabric

        fabric = Fabric(devices=int(dist.get_world_size()), strategy="ddp", accelerator="auto")
        fabric.launch()
        return fabric.setup(model), [fabric.setup_dataloaders(loader) for loader in loaders]
    if settings.launcher == "accelerate":
        from accelerate import Accelerator, DataLoaderConfiguration

        # Else the last batches repeat examples, and nothing says which.
        uneven = DataLoaderConfiguration(even_batches=False)
        cpu = not torch.cuda.is_available()
        accelerator = Accelerator(cpu=cpu, dataloader_config=uneven)
        prepared = accelerator.prepare(model, *loaders)
        return prepared[0], list(prepared[1:])
    samplers = [DistributedSampler(each, shuffle=False) for each in data]
    pairs = zip(data, samplers, strict=True)
    return model, [DataLoader(each, batch_size=64, sampler=s) for each, s in pairs]


def gathered(loader: Any) -> list[Any]:  # noqa: ANN401 - of any launcher
    """All batches, in the order of the processes: what one process is given to compare."""
    own = [tuple(part.cpu() for part in batch) for batch in loader]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return [batch for batches in every for batch in batches]


def fitted(model: nn.Module, train: Any, val: Any, group: Any = None) -> ELLA:  # noqa: ANN401
    """Everything that takes labelled data."""
    method = NeuralEF(
        rank=16, num_inputs=10_000, num_directions=64, augment=None, teacher=Training(steps=300)
    )
    options: dict[str, Any] = {"distance": Distance(), "progress": False, "process_group": group}
    return ELLA(model, eigenfunctions=method, **options).fit(train).calibrate(val)


def main(argv: list[str] | None = None) -> None:
    """See the module."""
    settings = parsed(Settings, __doc__ or "", argv)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    alone = [dist.new_group([each]) for each in range(dist.get_world_size())][rank]
    train, val, x = digits(settings)
    plain = classifier(train)
    model, loaders = shared(settings, plain, train, val)
    together, seconds = timed(lambda: fitted(model, *loaders))
    everything = [gathered(loader) for loader in loaders]
    pairs = zip(everything, (train, val), strict=True)
    if settings.launcher != "accelerate":  # what a sampler repeats is in the gathered batches
        everything = [without_repeats(b, data) for b, data in pairs]
    one, alone_seconds = timed(lambda: fitted(plain, *everything, alone))
    device = together.network.device
    apart = (together.predict_proba(x.to(device)).cpu() - one.predict_proba(x)).abs().max().item()
    if rank == 0:
        count = together.tuning.num_examples if together.tuning else 0
        print(f"{settings.launcher}, {dist.get_world_size()} processes, calibrated on {count}")
        print(f"  together {seconds:.1f} s, alone {alone_seconds:.1f} s")
        print(f"  {together.hyperparameters}\n  {one.hyperparameters}")
        print(f"  largest difference of a probability: {apart:.1e}")
    dist.destroy_process_group()


def without_repeats(batches: list[Any], data: TensorDataset) -> list[Any]:
    """Leave out the examples that a sampler repeats, which come last in their shard."""
    size = dist.get_world_size()
    each = -(-len(data) // size)
    kept, place = [], 0
    for x, y in batches:
        rank, first = divmod(place, each)
        own = len(range(rank, len(data), size))
        kept.append((x[: max(0, own - first)], y[: max(0, own - first)]))
        place += len(y)
    return [(x, y) for x, y in kept if len(y)]


if __name__ == "__main__":
    main()
