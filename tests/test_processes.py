"""Several processes with a part of the data each do what one does with all of them (gloo)."""

import os
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ella import ELLA, LastLayer, NeuralEF, Nystrom, Training
from ella.baselines import TemperatureScaling
from ella.batches import Batches
from ella.processes import Processes

CLASSES = 3
NEURAL = NeuralEF(
    rank=4, num_inputs=90, num_directions=12, width=8, augment=None, teacher=Training(steps=40)
)
METHODS = {
    "neural": NEURAL,
    "nystrom": Nystrom(4, 90),
    "nystrom, all": Nystrom(4, 90, outputs="all", residual="exact"),
    "last layer": LastLayer(),
}
QUIET = {"progress": False}
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")


def data(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def loader(x, y, size=9):
    return list(zip(x.split(size), y.split(size), strict=True)) if len(x) else []


def story(method, shards, likelihood="classification"):
    """All that takes labelled data, on shards of them; what came out."""
    train, val, more = shards
    if likelihood == "regression":
        train, val, more = ((x, x[:, :CLASSES] + 0.3 * x[:, 1:]) for x, _ in shards)
    ella = ELLA(model(), likelihood=likelihood, eigenfunctions=method, **QUIET)
    ella.fit(loader(*train))
    fitted = ella.hyperparameters
    ella.partial_fit(loader(*more)).forget(loader(*more)).partial_fit(loader(*more))
    ella.decay(0.5).calibrate(loader(*val))
    mean, covariance = ella.logits(data(7, seed=9)[0])
    scaled = TemperatureScaling(model(), likelihood=likelihood, **QUIET)
    scaled.fit(loader(*train)).calibrate(loader(*val))
    return {
        "curvature": ella.curvature,
        "mean": mean,
        "covariance": covariance,
        "chosen": torch.tensor(list(vars(ella.hyperparameters).values()), dtype=torch.float64),
        "fitted": torch.tensor(list(vars(fitted).values()), dtype=torch.float64),
        "scaled": torch.tensor(list(vars(scaled.hyperparameters).values()), dtype=torch.float64),
        "examples": torch.tensor([ella._fit.sums.num_examples, ella.tuning.num_examples]),
    }


def whole():
    return data(40), data(30, seed=1), data(12, seed=2)


def shards_of(rank, cuts):
    parts = zip(whole(), cuts, strict=True)
    return [tuple(t[:cut] if rank == 0 else t[cut:] for t in pair) for pair, cut in parts]


def in_processes(work, folder, *args, size=2, timeout=120):
    """What each of several processes returns, or the error that it ends with."""
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_start, args=(work, rank, size, str(folder), timeout, *args))
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout)
    alive = [worker.is_alive() for worker in workers]
    for worker in workers:
        worker.kill()
    assert not any(alive), "a process hangs"
    paths = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path) if path.exists() else None for path in paths]


def _start(work, rank, size, folder, timeout, *args):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout // 4),
    )
    try:
        found = work(rank, *args)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def told_on_shards(rank, name, cuts, likelihood):
    return story(METHODS[name], shards_of(rank, cuts), likelihood)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "cuts", "likelihood"),
    [
        ("neural", (23, 11, 5), "classification"),
        ("neural", (40, 0, 12), "classification"),  # the second has no training data, ...
        ("nystrom", (0, 30, 0), "regression"),
        ("nystrom, all", (17, 4, 12), "classification"),
        ("last layer", (9, 29, 1), "regression"),
    ],
)
def test_two_processes_do_what_one_does(name, cuts, likelihood, tmp_path):
    expected = story(METHODS[name], whole(), likelihood)
    for found in in_processes(told_on_shards, tmp_path, name, cuts, likelihood):
        assert isinstance(found, dict), found
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10, msg=key)


def padded(rank):
    x, y = data(13)
    sampler = DistributedSampler(TensorDataset(x, y), num_replicas=2, rank=rank, seed=3)
    batches = DataLoader(TensorDataset(x, y), sampler=sampler, batch_size=3)
    ella = ELLA(model(), eigenfunctions=LastLayer(residual="none"), **QUIET).fit(batches)
    return {"curvature": ella.curvature, "examples": ella._fit.sums.num_examples}


def test_what_a_sampler_repeats_counts_once(tmp_path):
    expected = ELLA(model(), eigenfunctions=LastLayer(residual="none"), **QUIET)
    expected.fit(loader(*data(13)))
    for found in in_processes(padded, tmp_path):
        assert found["examples"] == 13
        torch.testing.assert_close(found["curvature"], expected.curvature)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_example_is_in_one_shard(rank, shuffle):
    x = torch.arange(10).double().unsqueeze(1)
    pairs = TensorDataset(x, torch.zeros(10, dtype=torch.long))
    seen = []
    for each in range(3):
        sampler = DistributedSampler(pairs, num_replicas=3, rank=each, shuffle=shuffle)
        batches = Batches(DataLoader(pairs, sampler=sampler, batch_size=2), x.device)
        seen.append([value for batch, _ in batches.labelled() for value in batch[:, 0].tolist()])
    assert sorted(value for shard in seen for value in shard) == list(range(10))
    assert len(seen[rank]) == (4 if rank == 0 else 3)


def alone(rank):
    groups = [dist.new_group([0]), dist.new_group([1])]
    x, y = data(40) if rank == 0 else data(25)
    ella = ELLA(model(), eigenfunctions=NEURAL, process_group=groups[rank], **QUIET)
    return ella.fit(loader(x, y)).curvature


def test_a_group_of_ones_own(tmp_path):
    for found, n in zip(in_processes(alone, tmp_path), (40, 25), strict=True):
        ella = ELLA(model(), eigenfunctions=NEURAL, **QUIET).fit(loader(*data(n)))
        torch.testing.assert_close(found, ella.curvature)


def bad_labels(rank):
    x, y = data(20)
    if rank == 1:
        y = y + 7
    return ELLA(model(), eigenfunctions=LastLayer(), **QUIET).fit(loader(x, y)).curvature


def killed(rank):
    class Deadly(list):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if rank == 1 and number == 1:
                    os._exit(9)
                yield batch

    return ELLA(model(), eigenfunctions=NEURAL, **QUIET).fit(Deadly(loader(*data(20)))).curvature


@pytest.mark.parametrize("work", [bad_labels, killed])
def test_no_process_hangs_when_another_ends(work, tmp_path):
    start = time.monotonic()
    first, second = in_processes(work, tmp_path)
    assert time.monotonic() - start < 60
    assert isinstance(first, str), first  # an error
    assert second is None or "must lie in 0..2" in second


def unshared(rank):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ELLA(model(), eigenfunctions=LastLayer(), **QUIET).fit(loader(*data(20)))
    return [str(each.message) for each in found]


def test_data_that_are_not_shared_out_get_a_hint(tmp_path):
    for found in in_processes(unshared, tmp_path):
        assert any("Some of 2 processes begin with the same batch" in text for text in found)


def nothing(rank):
    return ELLA(model(), eigenfunctions=NEURAL, **QUIET).fit([])


def test_no_data_at_all_is_an_error(tmp_path):
    for found in in_processes(nothing, tmp_path):
        assert "The loader is empty in every process" in found


def test_one_process_alone():
    processes = Processes()
    value = torch.ones(2)
    assert processes.sum(value) is value
    assert processes.each(3) == [3]
    assert processes.extent(5) == (0, 5)
    with pytest.raises(ValueError, match="empty in every process"):
        processes.joined(None, value.device)


def test_a_group_of_nobody():
    ella = ELLA(model(), eigenfunctions=NEURAL, process_group="gloo", **QUIET)
    with pytest.raises(ValueError, match="`process_group` is 'gloo', but torch"):
        ella.fit(loader(*data()))
