import gzip
import json
import os
import struct
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ella.report import forward_ratio

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
KINDS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "gaussian_blur",
    "defocus_blur",
    "brightness",
    "contrast",
    "fog",
    "pixelate",
    "jpeg",
)


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return import_module("_data")


@pytest.fixture
def corruptions(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return import_module("_corruptions")


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return import_module("_models")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return import_module("_report")


@pytest.fixture
def real_root() -> Path:
    root = os.environ.get("ELLA_DATA")
    if not root:
        pytest.skip("needs real data: set ELLA_DATA to the data folder")
    return Path(root)


def images(n: int = 6, channels: int = 3, size: int = 32) -> Tensor:
    """Smooth random images in [0.2, 0.8], which no corruption clips at once."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 5, 5, generator=generator)
    return 0.2 + 0.6 * F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)


def pictures(dataset: TensorDataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in dataset.tensors[0].clone()}


# --- digits -------------------------------------------------------------------------------------


def test_digits_splits_are_disjoint_and_complete(data):
    task = data.load_task("digits", None, seed=0)
    assert [len(part) for part in (task.train, task.val, task.test)] == [80, 400, 963]
    raw = data._denormalize(task.train.tensors[0], task.mean, task.std)
    assert raw.min() >= -1e-6
    assert raw.max() <= 1 + 1e-6
    splits = [pictures(part) for part in (task.train, task.val, task.test)]
    distinct = pictures(
        TensorDataset(torch.cat([p.tensors[0] for p in (task.train, task.val, task.test)]))
    )
    # All 1,443 images of the classes 0-7 differ, so no image is in two splits.
    assert len(distinct) == 80 + 400 + 963
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]


def test_digits_hold_out_classes_8_and_9(data):
    task = data.load_task("digits", None, seed=0)
    assert task.num_classes == 8
    assert task.input_shape == (1, 8, 8)
    assert set(task.train.tensors[1].tolist()) == set(range(8))
    assert task.test.tensors[1].max() == 7
    assert {name: x.shape for name, x in task.ood.items()} == {"digits 8-9": (354, 1, 8, 8)}


@pytest.mark.parametrize("sizes", [{}, {"num_train": 97, "num_val": 61, "num_test": 200}])
def test_digits_splits_are_stratified(data, sizes):
    task = data.load_task("digits", None, seed=3, **sizes)
    whole = torch.cat([part.tensors[1] for part in (task.train, task.val, task.test)])
    share = whole.bincount(minlength=8) / len(whole)
    for part in (task.train, task.val, task.test):
        counts = part.tensors[1].bincount(minlength=8)
        assert (counts - share * len(part)).abs().max() <= 2


def test_digits_depend_on_the_seed_alone(data):
    first, again, other = (data.load_task("digits", None, seed) for seed in (0, 0, 1))
    for a, b in zip(first.test.tensors, again.test.tensors, strict=True):
        assert torch.equal(a, b)
    assert pictures(first.train) != pictures(other.train)


def test_digits_are_normalized_by_training_statistics(data):
    task = data.load_task("digits", None, seed=0)
    x = task.train.tensors[0]
    assert x.dtype == torch.float32
    assert abs(x.mean().item()) < 1e-5
    assert abs(x.std(correction=0).item() - 1) < 1e-5
    assert abs(task.test.tensors[0].mean().item()) > 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "svhn"}, "`dataset` must be one of"),
        ({"num_train": 0}, "`num_train` must be at least 1"),
        ({"num_train": 2000}, "there are 1443"),
    ],
)
def test_load_task_refuses(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load_task(**arguments)


# --- normalization and corruption ---------------------------------------------------------------


def test_normalize_matches_the_formula_for_bytes_and_floats(data):
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.4914) / 0.2023, (0.2 - 0.4822) / 0.1994, (1 - 0.4465) / 0.2010]
    for given in (x, x.float() / 255):
        found = data.normalize(given, data.CIFAR_MEAN, data.CIFAR_STD).flatten()
        assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


def test_normalized_images_are_refused(corruptions):
    with pytest.raises(ValueError, match="Corrupt before normalizing"):
        corruptions.corrupt(images() - 0.5, "contrast", 1)


def test_every_corruption_is_tested(corruptions):
    assert set(corruptions.CORRUPTIONS) == set(corruptions._CORRUPT) == set(KINDS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_corruption_grows_with_severity(corruptions, kind, channels):
    x = images(channels=channels)
    corrupted = [corruptions.corrupt(x, kind, severity, seed=1) for severity in range(1, 6)]
    distances = [(y - x).square().mean().item() for y in corrupted]
    assert distances[0] > 0
    if kind == "pixelate":  # where its cells fall matters more than small changes of their size
        assert distances[4] > distances[0]
    else:
        assert distances == sorted(distances)
    assert len(set(distances)) == 5
    assert all(y.shape == x.shape and y.min() >= 0 and y.max() <= 1 for y in corrupted)


@pytest.mark.parametrize("kind", KINDS)
def test_corruption_depends_on_the_seed_alone(corruptions, kind):
    x = images()
    before = x.clone()
    same = [corruptions.corrupt(x, kind, 3, seed=5) for _ in range(2)]
    assert torch.equal(*same)
    assert torch.equal(x, before)
    if kind.endswith("noise"):
        assert not torch.equal(same[0], corruptions.corrupt(x, kind, 3, seed=6))


def test_gaussian_noise_and_blur_have_the_stated_strength(corruptions):
    flat = torch.full((20, 3, 32, 32), 0.5)
    assert corruptions.corrupt(flat, "gaussian_noise", 5).std().item() == pytest.approx(
        0.10, rel=0.02
    )
    point = torch.zeros(1, 1, 31, 31)
    point[..., 15, 15] = 1
    spread = corruptions.corrupt(point, "gaussian_blur", 5)[0, 0]
    offsets = torch.arange(31) - 15.0
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    assert (spread.sum(0) * offsets**2).sum().item() == pytest.approx(1.0, rel=0.01)
    # Borders are extended, so a constant image stays as it is.
    assert torch.allclose(corruptions.corrupt(flat, "gaussian_blur", 5), flat, atol=1e-6)


def test_brightness_keeps_hue_and_saturation(corruptions):
    color = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1)
    raised = corruptions.corrupt(color, "brightness", 4).flatten()
    assert torch.allclose(raised, torch.tensor([0.2, 0.4, 0.6]) * 0.8 / 0.6)


@pytest.mark.parametrize(("kind", "severity"), [("snow", 1), ("contrast", 0), ("contrast", 6)])
def test_unknown_corruptions_are_refused(corruptions, kind, severity):
    with pytest.raises(ValueError, match="must be"):
        corruptions.corrupt(images(), kind, severity)


def test_corrupted_test_set_is_the_corrupted_images_normalized(data, corruptions):
    x, labels = images(), torch.arange(6)
    whole = TensorDataset(data.normalize(x, data.CIFAR_MEAN, data.CIFAR_STD), labels)
    task = data.load_task("digits", None, seed=0)
    task = replace(task, test=whole, mean=data.CIFAR_MEAN, std=data.CIFAR_STD)
    found, found_labels = task.corrupted_test("contrast", 5).tensors
    expected = data.normalize(
        corruptions.corrupt(x, "contrast", 5), data.CIFAR_MEAN, data.CIFAR_STD
    )
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(found_labels, labels)


def test_defocus_is_a_disk_with_a_soft_edge(corruptions):
    point = torch.zeros(1, 1, 31, 31)
    point[..., 15, 15] = 1
    spread = corruptions.corrupt(point, "defocus_blur", 5)[0, 0]
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    # Radius 1.5 holds 9 of the grid's points; a bell of .1 leaves the edge sharp.
    assert torch.allclose(spread[14:17, 14:17], torch.full((3, 3), 1 / 9), atol=1e-4)


def test_fog_is_brighter_and_flatter_and_differs_by_image(corruptions):
    x = images()
    foggy = corruptions.corrupt(x, "fog", 5)
    assert (foggy.mean((1, 2, 3)) > 0.8 * x.mean((1, 2, 3))).all()
    clouds = corruptions._plasma(2, 32, 1.75, torch.Generator().manual_seed(0))
    assert clouds.amin((1, 2)).eq(0).all()
    assert clouds.amax((1, 2)).eq(1).all()
    assert not torch.equal(*clouds)
    # Neighbours, across the border too, are far nearer than strangers: clouds, not noise.
    step = (clouds - clouds.roll(1, 2)).square().mean()
    assert step < 0.2 * (clouds - clouds.roll(16, 2)).square().mean()


def test_pixelate_at_full_size_and_jpeg_of_a_flat_image_change_nothing(corruptions):
    x = (images() * 255).round() / 255
    generator = torch.Generator()
    assert torch.allclose(corruptions._pixelate(x, 1.0, generator), x, atol=1e-6)
    flat = torch.full((2, 3, 32, 32), 102 / 255)
    assert torch.allclose(corruptions.corrupt(flat, "jpeg", 5), flat, atol=2 / 255)


# --- files --------------------------------------------------------------------------------------


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + values.tobytes())


def write_idx_folder(folder: Path, num_train: int, num_test: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for part, n in (("train", num_train), ("t10k", num_test)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(folder / "raw" / f"{part}-images-idx3-ubyte.gz", pixels)
        labels = (np.arange(n) % 10).astype(np.uint8)
        write_idx(folder / "raw" / f"{part}-labels-idx1-ubyte.gz", labels)


def write_mosaic(path: Path, tiles: np.ndarray) -> None:
    """Paste (n, 32, 32, 3) tiles one by one, 100 a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = Image.new("RGB", (3200, 32 * (len(tiles) // 100)))
    for i, tile in enumerate(tiles):
        canvas.paste(Image.fromarray(tile), (32 * (i % 100), 32 * (i // 100)))
    canvas.save(path, lossless=True)


def write_cifar(root: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    labels = {f"{name}_labels": rng.integers(0, 10, 100, dtype=np.uint8) for name in names}
    tiles = {name: rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8) for name in names}
    for name in names:
        write_mosaic(root / "cifar10" / f"{name}.webp", tiles[name])
    np.savez(root / "cifar10" / "labels.npz", **labels)
    for name in ("cifar100_5000", "tinyimagenet_val_5000_32x32"):
        write_mosaic(root / "ood" / f"{name}.webp", tiles["test_batch"])
    return labels | tiles


def test_idx_round_trip(data, tmp_path):
    values = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "some.gz", values)
    assert torch.equal(data.load_idx(tmp_path / "some.gz"), torch.from_numpy(values))


def test_other_files_are_not_taken_for_idx(data, tmp_path):
    with gzip.open(tmp_path / "some.gz", "wb") as file:
        file.write(b"not an idx file")
    with pytest.raises(ValueError, match="not an idx file"):
        data.load_idx(tmp_path / "some.gz")


def test_mosaic_round_trip(data, tmp_path):
    tiles = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    write_mosaic(tmp_path / "tiles.webp", tiles)
    found = data.load_mosaic(tmp_path / "tiles.webp")
    assert torch.equal(found, torch.from_numpy(tiles).permute(0, 3, 1, 2))


def test_pictures_of_another_size_are_not_taken_for_mosaics(data, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "small.webp")
    with pytest.raises(ValueError, match="3200 pixels wide"):
        data.load_mosaic(tmp_path / "small.webp")


@pytest.mark.parametrize(
    ("name", "folder", "other"),
    [("fashionmnist", "FashionMNIST", "MNIST"), ("mnist", "MNIST", "FashionMNIST")],
)
def test_idx_task(data, tmp_path, name, folder, other):
    write_idx_folder(tmp_path / folder, 40, 30, seed=0)
    write_idx_folder(tmp_path / other, 20, 10, seed=1)
    task = data.load_task(name, tmp_path, 0, num_train=25, num_val=10)
    assert [len(part) for part in (task.train, task.val, task.test)] == [25, 10, 20]
    assert {source: x.shape for source, x in task.ood.items()} == {other: (10, 1, 28, 28)}
    assert abs(task.train.tensors[0].mean().item()) < 1e-5
    assert not pictures(task.val) & pictures(task.test)


def test_cifar_task_from_mosaics(data, tmp_path):
    stored = write_cifar(tmp_path)
    task = data.load_task("cifar10", tmp_path, 0, num_val=20)
    assert [len(part) for part in (task.train, task.val, task.test)] == [500, 20, 80]
    assert set(task.ood) == {"CIFAR-100", "TinyImageNet"}
    x, y = task.train.tensors
    expected = torch.from_numpy(stored["data_batch_2"]).permute(0, 3, 1, 2)
    assert torch.equal(x[100:200], data.normalize(expected, data.CIFAR_MEAN, data.CIFAR_STD))
    assert y[100:200].tolist() == stored["data_batch_2_labels"].tolist()
    fewer = data.load_task("cifar10", tmp_path, 0, num_val=20, num_train=50)
    assert len(fewer.train) == 50
    assert torch.equal(fewer.test.tensors[0], task.test.tensors[0])


class FakeCIFAR:
    def __init__(self, root: str, *, train: bool, download: bool) -> None:
        assert download
        n = 30 if train else 20
        self.data = np.random.default_rng(train).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(n)]


def test_cifar_task_from_torchvision_without_mosaics(data, tmp_path, monkeypatch):
    monkeypatch.setattr(data.tv, "CIFAR10", FakeCIFAR)
    monkeypatch.setattr(data.tv, "CIFAR100", FakeCIFAR)
    task = data.load_task("cifar10", tmp_path, 0, num_val=5)
    assert [len(part) for part in (task.train, task.val, task.test)] == [30, 5, 15]
    assert set(task.ood) == {"CIFAR-100"}
    expected = torch.from_numpy(FakeCIFAR("", train=True, download=True).data).permute(0, 3, 1, 2)
    assert torch.equal(
        task.train.tensors[0], data.normalize(expected, data.CIFAR_MEAN, data.CIFAR_STD)
    )


def refuse(*_args: object, **_kwargs: object) -> None:
    raise OSError("no network")


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
@pytest.mark.parametrize("given", ["nothing", "absent", "empty"])
def test_missing_data_names_the_remedy(data, tmp_path, monkeypatch, name, given):
    monkeypatch.delenv("ELLA_DATA", raising=False)
    monkeypatch.setattr(data.tv, "CIFAR10", type("CIFAR10", (), {"__init__": refuse}))
    root = {"nothing": None, "absent": tmp_path / "absent", "empty": tmp_path}[given]
    with pytest.raises(FileNotFoundError, match=r"--root .*ELLA_DATA"):
        data.load_task(name, root, 0)


def test_root_comes_from_the_environment(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ELLA_DATA", str(tmp_path))
    assert data.data_root(None) == tmp_path
    assert data.data_root(EXPERIMENTS) == EXPERIMENTS


# --- models -------------------------------------------------------------------------------------


def test_digits_map_overfits(data, models):
    task = data.load_task("digits", None, seed=0, num_train=100)
    model = models.train_classifier(models.DigitsNet(), task.train, seed=0)
    assert not model.training
    x, y = task.train.tensors
    assert (models.batched_logits(model, x).argmax(-1) == y).all()
    x, y = task.test.tensors
    logits = models.batched_logits(model, x)
    accuracy = (logits.argmax(-1) == y).double().mean()
    assert accuracy > 0.9
    # Over-confident: surer than it is right, and better after a temperature above 1.
    assert logits.softmax(-1).max(-1).values.mean() > accuracy
    assert F.cross_entropy(logits / 1.5, y) < F.cross_entropy(logits, y)


def test_training_depends_on_the_seed_alone(data, models):
    task = data.load_task("digits", None, seed=0, num_train=40)

    def fit(seed: int) -> Tensor:
        torch.rand(1)  # moves the global generator between fits
        model = models.train_classifier(models.DigitsNet(), task.train, seed, epochs=2)
        return models.batched_logits(model, task.val.tensors[0])

    threads = torch.get_num_threads()
    assert torch.equal(fit(0), fit(0))
    assert not torch.equal(fit(0), fit(1))
    assert torch.get_num_threads() == threads


def test_digits_net_is_small(models):
    assert sum(p.numel() for p in models.DigitsNet().parameters()) == 5112
    assert models.FashionNet()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_resnet_has_the_stated_depth(models, depth):
    model = models.resnet(depth).eval()
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    shortcuts = [m for m in layers if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(layers) - len(shortcuts) == depth
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_load_model_restores_a_saved_network(models, tmp_path):
    model = models.resnet(20).eval()
    torch.save(model.state_dict(), tmp_path / "some.pt")
    loaded = models.load_model("resnet20", tmp_path / "some.pt")
    x = images(2)
    assert not loaded.training
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        models.load_model("resnet32", tmp_path / "some.pt")


def test_unknown_models_are_refused(models, tmp_path):
    with pytest.raises(ValueError, match="`depth` must be one of"):
        models.resnet(18)
    with pytest.raises(ValueError, match="`arch` must be one of"):
        models.load_model("resnet18", tmp_path)
    with pytest.raises(FileNotFoundError, match="checkpoint_path"):
        models.load_model("resnet20", tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError, match="ELLA_DATA"):
        models.checkpoint_path("resnet20", tmp_path)


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_checkpoints_fit_our_architecture(models, real_root, depth):
    path = models.checkpoint_path(f"resnet{depth}", real_root)
    models.load_model(f"resnet{depth}", path)


def test_real_idx_task(data, real_root):
    task = data.load_task("fashionmnist", real_root, 0, num_train=100)
    assert [len(part) for part in (task.train, task.val, task.test)] == [100, 2000, 8000]
    assert set(task.ood) == {"MNIST"}


@pytest.mark.slow
def test_published_checkpoint_reaches_its_accuracy(data, models, real_root):
    task = data.load_task("cifar10", real_root, 0, num_train=100)
    model = models.load_model("resnet20", models.checkpoint_path("resnet20", real_root))
    x, y = (torch.cat(pair) for pair in zip(task.val.tensors, task.test.tensors, strict=True))
    logits = models.batched_logits(model, x)
    assert (logits.argmax(-1) == y).double().mean().item() == pytest.approx(0.926, abs=0.001)
    assert F.cross_entropy(logits, y).item() == pytest.approx(0.281, abs=0.001)


# --- reports ------------------------------------------------------------------------------------

ROWS = [
    {"method": "MAP", "seed": 0, "accuracy": 0.90, "nll": 0.30, "auroc": 0.86, "state_bytes": 0},
    {"method": "MAP", "seed": 1, "accuracy": 0.92, "nll": 0.34, "auroc": 0.88, "state_bytes": 0},
    {
        "method": "ELLA",
        "seed": 0,
        "accuracy": 0.91,
        "nll": 0.21,
        "auroc": 0.87,
        "state_bytes": 1500,
    },
    {
        "method": "ELLA",
        "seed": 1,
        "accuracy": 0.91,
        "nll": 0.23,
        "auroc": 0.87,
        "state_bytes": 1500,
    },
    {"method": "odd", "seed": 0, "accuracy": 0.91, "nll": float("nan"), "auroc": None},
]


def test_summarize_is_mean_and_sample_deviation(report):
    summary = report.summarize(ROWS)
    assert list(summary) == ["MAP", "ELLA", "odd"]
    assert summary["MAP"]["nll"].mean == pytest.approx(0.32)
    assert summary["MAP"]["nll"].std == pytest.approx(0.04 / 2**0.5)
    assert summary["MAP"]["nll"].count == 2
    assert summary["odd"]["accuracy"] == report.Summary(0.91, None, 1)
    assert "nll" not in summary["odd"]
    assert "auroc" not in summary["odd"]
    assert "seed" not in summary["MAP"]


def test_markdown_table(report):
    assert report.markdown_table(ROWS) == "\n".join(
        [
            "| method | accuracy | NLL | OOD AUROC | state bytes |",
            "| --- | ---: | ---: | ---: | ---: |",
            "| MAP | 0.910 ± 0.014 | 0.3200 ± 0.0283 | **0.870** ± 0.014 | 0 |",
            "| ELLA | 0.910 ± 0.000 | **0.2200** ± 0.0141 | **0.870** ± 0.000 | 1,500 |",
            "| odd | 0.910 | – | – | – |",
        ]
    )


def test_a_single_method_is_not_the_best(report):
    assert "**" not in report.markdown_table(ROWS[:2])


def test_results_round_trip(report, tmp_path):
    path = tmp_path / "new" / "some.json"
    report.save_results(path, {"root": Path("/data"), "seeds": (0, 1)}, ROWS)
    found = report.load_results(path)
    assert found["settings"] == {"root": "/data", "seeds": [0, 1]}
    assert found["rows"][:4] == ROWS[:4]
    assert found["rows"][4]["nll"] is None
    assert "NaN" not in path.read_text()


def test_environment_is_json(report):
    found = json.loads(json.dumps(report.environment()))
    assert found["torch"] == torch.__version__
    assert {"python", "platform", "cpus", "threads", "gpu", "git_commit", "git_dirty"} <= set(
        found
    )


@pytest.fixture
def clock(report, monkeypatch):
    """A clock that moves only when told to."""
    now = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])

    def taking(*durations: float):
        remaining = iter(durations)

        def work() -> str:
            now[0] += next(remaining)
            return "done"

        return work

    return taking


def test_timed_returns_the_result(report, clock):
    assert report.timed(clock(3.0)) == ("done", 3.0)


def test_seconds_skips_the_warm_up_and_takes_the_median(report, clock):
    assert report.seconds(clock(100, 1, 9, 2), "cpu", repeats=3) == 2


def test_forward_ratio_pairs_the_calls(report, clock):
    # The machine gets ten times slower half-way; each pair still has the ratio 2.
    method, plain = clock(99, 2, 2, 20, 20), clock(1, 1, 1, 10, 10)
    assert forward_ratio(method, plain, repeats=4) == pytest.approx(2)


def test_plot_uncertainty_writes_a_picture_and_leaves_matplotlib_alone(report, tmp_path):
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    settings = dict(mpl.rcParams)
    low, high = torch.rand(50), 1 + torch.rand(70)
    path = tmp_path / "new" / "plot.png"
    report.plot_uncertainty({"MAP": low, "ELLA": low}, {"MAP": high, "ELLA": high}, path)
    with Image.open(path) as picture:
        assert picture.width > picture.height
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == settings


def test_plot_uncertainty_takes_constant_scores(report, tmp_path):
    report.plot_uncertainty({"a": torch.ones(3)}, {"a": torch.ones(3)}, tmp_path / "flat.png")


def test_plot_uncertainty_refuses_other_methods(report, tmp_path):
    with pytest.raises(ValueError, match="same methods"):
        report.plot_uncertainty({"a": torch.ones(3)}, {"b": torch.ones(3)}, tmp_path / "x.png")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_peak_memory_is_what_was_held_and_given_back(report):
    with report.PeakMemory("cpu") as memory:
        block = torch.ones(2**25)  # 128 MiB
        time.sleep(0.1)
        del block
    assert 0.9 * 2**27 < memory.bytes < 2 * 2**27
