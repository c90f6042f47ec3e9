"""Public model classes with random weights: each goes all the way, or ella says why not.

`experiments/models.py` holds what must be true of each; `experiments/models.md` the table of all.
"""

import re

import pytest
import torch

from ella import ELLA

METHODS = ("NeuralEF", "Nystrom", "LastLayer")
TEXT = "ForSequenceClassification"
QUICK = {
    "torch": (
        *("perceptron", "LSTM", "GRU", "LSTM, packed", "torch.compile", "DataParallel"),
        *("bfloat16", "float16"),
    ),
    "torchvision": ("squeezenet1_1",),
    "timm": ("vit_tiny_patch16_224", "xcit_nano_12_p8_224", "mobilevitv2_050"),
    "transformers": (
        *(f"{name}{TEXT}" for name in ("Bert", "DistilBert", "Albert", "DebertaV2", "Longformer")),
        *(f"{name}{TEXT}" for name in ("Funnel", "XLNet", "FNet", "GPT2", "Llama", "T5", "Bart")),
        *(f"{name}{TEXT}" for name in ("Bloom", "MobileBert", "BigBird", "Wav2Vec2")),
        *(f"{name}ForImageClassification" for name in ("ViT", "Swin", "ConvNext", "Segformer")),
    ),
}
"""A few of every family; `-m slow` takes the rest."""
REFUSED = {"LastLayer": r"LastLayer (needs a model whose outputs|has k = )"}
"""What a method may say; NeuralEF and Nystrom take every model."""


def check(load, library, names, methods=METHODS, *, without=()):
    pytest.importorskip(library, reason="needs the extra `models`")
    models, zoo = load("models"), load("_zoo")
    found = {entry.name: entry for entry in zoo.LIBRARIES[library]()}
    chosen = [name for name in found if name not in without] if names is None else names
    assert chosen
    for name in chosen:
        for method in methods:
            row = models.outcome(found[name], method)
            if row["outcome"] == "refused":
                assert method in REFUSED, row
                assert re.search(REFUSED[method], row["message"]), row
            else:
                assert row["outcome"] == "runs", (name, row)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("library", "name"), [(library, name) for library in QUICK for name in QUICK[library]]
)
def test_a_public_model_goes_all_the_way(load, library, name, method):
    check(load, library, [name], [method])


@pytest.mark.slow
@pytest.mark.parametrize("library", QUICK)
def test_all_others_go_all_the_way(load, library):
    check(load, library, None, without=QUICK[library])


def test_there_are_enough_of_them(load):
    pytest.importorskip("timm", reason="needs the extra `models`")
    pytest.importorskip("transformers", reason="needs the extra `models`")
    zoo = load("_zoo")
    entries = [entry for make in zoo.LIBRARIES.values() for entry in make()]
    assert len({(entry.library, entry.name) for entry in entries}) == len(entries) > 100
    assert len({entry.family for entry in entries}) > 40


def test_a_foreign_error_is_no_refusal(load):
    models = load("models")

    def own():
        ELLA(torch.nn.Linear(2, 2), progress=False).fit([(torch.zeros(2, 3), torch.zeros(2))])

    with pytest.raises(RuntimeError) as caught:
        own()
    assert not models.is_own(caught.value)
    with pytest.raises(TypeError) as caught:
        ELLA(3)
    assert models.is_own(caught.value)
