"""On a CUDA device: the same results as on the CPU, moves, and files from one to the other."""

import copy

import pytest
import torch
from cases import loader_of, make_inputs, make_labels, make_model

from ella import ELLA, LastLayer, ModelChangedError, NeuralEF, Nystrom, Training
from ella.baselines import TemperatureScaling
from ella.linearize import Linearized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:calibrate. "),
    # The first product of the process may run in a thread of autograd's.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]

SHORT = Training(steps=30, batch_size=32)
METHODS = {
    "neural": NeuralEF(rank=3, num_inputs=64, width=16, num_directions=16, teacher=SHORT),
    "nystrom": Nystrom(4, 20),
    "last layer": LastLayer(),
}
NAMES = ("mlp", "conv", "attention", "padded")


def on(device, x):
    return {k: v.to(device) for k, v in x.items()} if isinstance(x, dict) else x.to(device)


def fitted(name, method, device):
    model, x, y = make_model(name).to(device), make_inputs(name, 40), make_labels(40)
    ella = ELLA(model, eigenfunctions=METHODS[method], progress=False)
    return ella.fit(loader_of(x, y)).calibrate(loader_of(make_inputs(name, 30, 5), y[:30]))


@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_cpu(name):
    model, x = make_model(name), make_inputs(name, 7)
    expected = Linearized(model).jacobian(x)
    found = Linearized(copy.deepcopy(model).cuda()).jacobian(on("cuda", x))
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["nystrom", "last layer"])
def test_probabilities_are_those_of_the_cpu(name, method):
    x = make_inputs(name, 7, 9)
    expected = fitted(name, method, "cpu").predict_proba(x)
    found = fitted(name, method, "cuda")
    torch.testing.assert_close(
        found.predict_proba(on("cuda", x)).cpu(), expected, atol=1e-5, rtol=0
    )
    loader = [(part, torch.zeros(len(expected))) for part in (x,)]  # batches are moved
    torch.testing.assert_close(found.predict_proba(loader).cpu(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_result(method):
    x = on("cuda", make_inputs("conv", 7, 9))
    first, second = (fitted("conv", method, "cuda").predict_proba(x) for _ in range(2))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_files_go_from_one_device_to_the_other(method, tmp_path):
    x = make_inputs("conv", 7, 9)
    there = fitted("conv", method, "cuda")
    there.save(tmp_path / "file")
    model = copy.deepcopy(there.model).cpu()
    here = ELLA.load(tmp_path / "file", model, progress=False)
    expected = there.predict_proba(on("cuda", x)).cpu()
    torch.testing.assert_close(here.predict_proba(x), expected, atol=1e-5, rtol=0)


def test_a_model_that_moved_is_refused_until_it_is_back():
    x = make_inputs("conv", 7, 9)
    ella = fitted("conv", "nystrom", "cpu")
    expected = ella.predict_proba(x)
    ella.model.cuda()
    with pytest.raises(ModelChangedError, match="moved from cpu to cuda"):
        ella.predict_proba(on("cuda", x))
    ella.model.cpu()
    torch.testing.assert_close(ella.predict_proba(x), expected)


def test_threads_predict_on_the_device():
    from concurrent.futures import ThreadPoolExecutor

    ella = fitted("conv", "neural", "cuda")
    batches = [on("cuda", make_inputs("conv", 9, i)) for i in range(8)]
    expected = [ella.predict_proba(x) for x in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            found = list(pool.map(ella.predict_proba, batches))
            for one, two in zip(found, expected, strict=True):
                torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


def test_temperature_scaling_on_the_device():
    model, x, y = make_model("conv").cuda(), make_inputs("conv", 40), make_labels(40)
    method = TemperatureScaling(model, progress=False).fit(loader_of(x, y))
    method.calibrate(loader_of(x, y))
    assert method.predict_proba(on("cuda", x)).device.type == "cuda"
