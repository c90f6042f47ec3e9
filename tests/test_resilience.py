"""A fitted object predicts the same wherever it goes, and files stay readable."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import loader_of, make_inputs, make_labels, make_model
from safetensors.torch import load_file

from ella import ELLA, Distance, LastLayer, ModelChangedError, NeuralEF, Nystrom, Training

pytestmark = pytest.mark.filterwarnings("ignore:calibrate. ")

HERE = Path(__file__).parent
X, Y, TEST = make_inputs("conv", 30), make_labels(30), make_inputs("conv", 6, 9)
SHORT = Training(steps=20, batch_size=16)
METHODS = {
    "neural": NeuralEF(rank=3, num_inputs=48, width=8, num_directions=12, teacher=SHORT),
    "nystrom": Nystrom(3, 20, residual="exact"),
    "last layer": LastLayer(),
}


def fitted(method, dtype=torch.float64):
    model = make_model("conv").to(dtype)
    ella = ELLA(model, eigenfunctions=METHODS[method], distance=Distance(), progress=False)
    ella.fit(loader_of(X, Y))
    return ella.calibrate(loader_of(make_inputs("conv", 30, 5), make_labels(30, 6)))


@pytest.fixture(scope="module", params=METHODS)
def ella(request):
    return fitted(request.param)


def close(one, two):
    torch.testing.assert_close(one.double(), two.double(), atol=1e-6, rtol=0)


def through_a_file(ella, tmp_path):
    ella.save(tmp_path / "file")
    return ELLA.load(tmp_path / "file", copy.deepcopy(ella.model), progress=False)


LEGS = {
    "file": through_a_file,
    "deepcopy": lambda ella, tmp_path: copy.deepcopy(ella),
    "pickle": lambda ella, tmp_path: pickle.loads(pickle.dumps(ella)),
    "evaluated": lambda ella, tmp_path: ella.evaluated([TEST]),
}


@pytest.mark.parametrize("leg", LEGS)
def test_probabilities_and_scores_stay(leg, ella, tmp_path):
    twin = LEGS[leg](ella, tmp_path)
    x = torch.arange(len(TEST)) if leg == "evaluated" else TEST
    close(twin.predict_proba(x), ella.predict_proba(TEST))
    close(twin.sample_logits(x, 5), ella.sample_logits(TEST, 5))
    one, two = twin.uncertainty(x), ella.uncertainty(TEST)
    for name, value in vars(two).items():
        close(getattr(one, name), value)


def test_all_legs_one_after_the_other(ella, tmp_path):
    twin = ella
    for leg in ("file", "deepcopy", "pickle", "file"):
        twin = LEGS[leg](twin, tmp_path)
    close(twin.predict_proba(TEST), ella.predict_proba(TEST))
    assert twin.tuning == ella.tuning
    assert twin.hyperparameters == ella.hyperparameters
    assert torch.equal(twin.curvature, ella.curvature)


@pytest.mark.parametrize("method", METHODS)
def test_another_dtype_is_refused_and_the_old_one_is_taken_back(method):
    ella = fitted(method, torch.float32)
    expected = ella.predict_proba(TEST)
    ella.model.double()
    with pytest.raises(ModelChangedError):
        ella.predict_proba(TEST)
    ella.model.float()
    assert torch.equal(ella.predict_proba(TEST), expected)


def test_another_number_of_threads(ella):
    expected = ella.predict_proba(TEST)
    torch.set_num_threads(2)
    try:
        close(ella.predict_proba(TEST), expected)
    finally:
        torch.set_num_threads(1)


ELSEWHERE = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(2)
with open(sys.argv[2], "rb") as file:
    ella, x = pickle.load(file)
found = ella.predict_proba(x)
with open(sys.argv[2], "wb") as file:
    pickle.dump(found, file)
"""


def test_another_process(tmp_path):
    ella, path = fitted("neural"), tmp_path / "both"
    path.write_bytes(pickle.dumps((ella, TEST)))
    subprocess.run([sys.executable, "-c", ELSEWHERE, HERE, path], check=True, cwd=HERE.parent)
    close(pickle.loads(path.read_bytes()), ella.predict_proba(TEST))


@pytest.mark.parametrize("method", METHODS)
def test_files_of_format_2_predict_what_they_did(method):
    """Kept in the repository; made by `save` when format 2 was the newest."""
    name = f"format2-{method.replace(' ', '')}.safetensors"
    ella = ELLA.load(HERE / "files" / name, make_model("conv"), progress=False)
    assert ella.distance == Distance()
    assert ella.tuning is not None
    expected = load_file(HERE / "files" / "format2-expected.safetensors")
    close(ella.predict_proba(TEST), expected[method])
