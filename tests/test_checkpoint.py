"""A fit that is interrupted at any moment goes on to the result it would have had."""

import random
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from ella import ELLA, Distance, LastLayer, NeuralEF, Nystrom, Training
from ella.checkpoint import Checkpoint
from ella.saving import State
from ella.summing import KEPT_EVERY

CLASSES = 3
NEURAL = NeuralEF(
    rank=4, num_inputs=600, num_directions=12, width=8, teacher=Training(steps=30, batch_size=32)
)
METHODS = {"neural": NEURAL, "nystrom": Nystrom(4, 40), "last layer": LastLayer()}
QUIET = {"progress": False}


def data(n=600, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def loader(x, y, size=8):
    return list(zip(x.split(size), y.split(size), strict=True))


def model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def estimator(method=NEURAL, **options):
    options = {"distance": Distance(), **QUIET, **options}
    return ELLA(model(), eigenfunctions=method, **options)


def assert_same(found, expected):
    x, _ = data(9, seed=5)
    assert torch.equal(found.curvature, expected.curvature)
    assert torch.equal(found.predict_proba(x), expected.predict_proba(x))
    assert found.hyperparameters == expected.hyperparameters
    stages = expected._fit.features.stages(x)
    assert torch.equal(found._fit.distance(stages), expected._fit.distance(stages))


class Crash(Exception):
    pass


class Crashing(list):
    """A loader that fails at its `left`-th batch, counted over all passes."""

    def __init__(self, batches, left):
        super().__init__(batches)
        self.left = left

    def __iter__(self):
        for batch in super().__iter__():
            self.left -= 1
            if self.left < 0:
                raise Crash
            yield batch


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_it_goes_on_to_the_same_result(method, tmp_path):
    batches = loader(*data())
    expected = estimator(method).fit(batches)
    crashes, rng = 0, random.Random(0)
    while crashes < 50:
        ella, left = estimator(method), rng.randrange(5, 220) if crashes else 70
        try:
            ella.fit(Crashing(batches, left), checkpoint=tmp_path)
            break
        except Crash:
            crashes += 1
            assert ella._fit is None
    assert 0 < crashes < 50
    assert_same(ella, expected)
    assert_same(estimator(method).fit(batches, checkpoint=tmp_path), expected)


@pytest.mark.parametrize("seed", range(3))
def test_interrupted_while_it_writes(seed, tmp_path, monkeypatch):
    """Whatever was being written when the process ended is not there, or whole."""
    batches = loader(*data())
    expected = estimator().fit(batches)
    rng, keep = random.Random(seed), Checkpoint.keep

    def sometimes(self, name, state):
        if self.folder is not None and rng.random() < 0.5:
            (self.folder / ".partial").write_bytes(b"half")
            raise KeyboardInterrupt
        keep(self, name, state)

    monkeypatch.setattr(Checkpoint, "keep", sometimes)
    for _ in range(60):
        try:
            ella = estimator().fit(batches, checkpoint=tmp_path)
            break
        except KeyboardInterrupt:
            continue
    assert_same(ella, expected)


def test_finished_parts_are_not_computed_again(tmp_path, monkeypatch):
    batches = loader(*data())
    estimator().fit(batches, checkpoint=tmp_path)
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"eigenfunctions", "sums"}  # no parts of the sample are left
    monkeypatch.setattr(NeuralEF, "fit", None)
    calls = []

    class Counting(nn.Sequential):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    twin = Counting(*model())
    assert sum(calls) == 0
    ella = ELLA(twin, eigenfunctions=NEURAL, distance=Distance(), **QUIET)
    with pytest.raises(ValueError, match="another model"):
        ella.fit(batches, checkpoint=tmp_path)
    ella = estimator().fit(batches, checkpoint=tmp_path)
    assert ella._fit.sums.num_examples == 600


CHANGES = {
    "data": lambda: (estimator(), loader(*data(seed=1))),
    "labels": lambda: (estimator(), loader(data()[0], 2 - data()[1])),
    "method": lambda: (estimator(Nystrom(4, 40)), loader(*data())),
    "rank": lambda: (estimator(NeuralEF(rank=5, num_inputs=600)), loader(*data())),
    "seed": lambda: (estimator(seed=1), loader(*data())),
    "distance": lambda: (estimator(distance=None), loader(*data())),
    "model": lambda: (
        ELLA(model(1), eigenfunctions=NEURAL, distance=Distance(), **QUIET),
        loader(*data()),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parts_of_something_else_are_refused(change, tmp_path):
    with pytest.raises(Crash):
        estimator().fit(Crashing(loader(*data()), 120), checkpoint=tmp_path)
    assert list(tmp_path.iterdir())
    ella, batches = CHANGES[change]()
    with pytest.raises(ValueError, match=r"`checkpoint` .* other data, another model or other"):
        ella.fit(batches, checkpoint=tmp_path)


def test_batches_in_another_order_are_refused(tmp_path):
    batches = loader(*data())
    with pytest.raises(Crash):  # in the last pass
        estimator().fit(Crashing(batches, 4 + 75 + 3 * KEPT_EVERY), checkpoint=tmp_path)
    assert (tmp_path / "sums.ella").exists()
    other = [batches[0], *batches[:0:-1]]
    with pytest.raises(ValueError, match="not those that the checkpoint has summed"):
        estimator().fit(other, checkpoint=tmp_path)


def test_fewer_batches_than_were_summed_are_refused(tmp_path):
    batches = loader(*data())
    with pytest.raises(Crash):
        estimator().fit(Crashing(batches, 4 + 75 + 3 * KEPT_EVERY), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="not those that the checkpoint has summed"):
        estimator().fit(batches[:30], checkpoint=tmp_path)


def test_a_number_is_no_folder():
    with pytest.raises(TypeError, match="`checkpoint` must be a path; got int"):
        estimator().fit(loader(*data()), checkpoint=3)


def test_a_damaged_part_is_an_error(tmp_path):
    Checkpoint(tmp_path, "a").keep("part", State({"x": torch.ones(3)}))
    path = tmp_path / "part.ella"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint(tmp_path, "a")


def test_parts_come_back():
    empty = Checkpoint()
    empty.keep("part", State({}))
    assert empty.kept("part") is None
    empty.drop("part")


SCRIPT = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from test_checkpoint import data, estimator, loader
    ella = estimator().fit(loader(*data()), checkpoint={folder!r})
    torch.save((ella.curvature, ella.predict_proba(data(9, seed=5)[0])), {out!r})
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    expected = estimator().fit(loader(*data()))
    rng, kills = random.Random(0), 0
    for attempt in range(20):
        folder, out = tmp_path / "parts", tmp_path / f"out{attempt}"
        tests = str(__import__("pathlib").Path(__file__).parent)
        text = textwrap.dedent(SCRIPT).format(tests=tests, folder=str(folder), out=str(out))
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", text])
        try:
            process.wait(timeout=rng.uniform(1, 4))
            shutil.rmtree(folder)  # it was faster: start again
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", text], check=True)
    curvature, probs = torch.load(out)
    assert kills
    assert torch.equal(curvature, expected.curvature)
    assert torch.equal(probs, expected.predict_proba(data(9, seed=5)[0]))
