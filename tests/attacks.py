"""Attacks on the library, one line a case: a function of a `World`, and what has to come of it.

What has to come is `RIGHT` (finite numbers), `PROBS` (rows of probabilities), `SAME` (the
probabilities of an untouched object, to 1e-6), or a regular expression for our own error, which
names the argument, what came, or what to do.
"""

import contextlib
import copy
import functools
import json
import os
import pickle
import re
import signal
import tempfile
import threading
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from cases import loader_of, make_inputs, make_labels, make_model
from safetensors.torch import save_file
from torch import nn

from ella import (
    ELLA,
    Categorical,
    Distance,
    Hyperparameters,
    LastLayer,
    Linearized,
    MonteCarlo,
    NeuralEF,
    Normal,
    Nystrom,
    Perturb,
    PerturbTokens,
    Predictor,
    Training,
    saving,
)

RIGHT, PROBS, SAME = "right", "probabilities", "the same probabilities"
OUTCOMES = (RIGHT, PROBS, SAME)
NAN, INF = float("nan"), float("inf")
SHORT = Training(steps=8, batch_size=16)
METHODS = {
    "neural": NeuralEF(rank=3, num_inputs=48, width=8, num_directions=12, teacher=SHORT),
    "nystrom": Nystrom(4, 20),
    "last layer": LastLayer(),
}


@functools.cache
def fitted(method):
    world = World()
    return world.make(eigenfunctions=METHODS[method]).fit(world.train)


@functools.cache
def file_of(method):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ella.safetensors")
        fitted(method).save(path)
        return path.read_bytes()


class World:
    """A model, its data, fitted objects, and a folder."""

    def __init__(self, folder=None):
        self.model = make_model("mlp")
        self.x, self.y = make_inputs("mlp", 24), make_labels(24)
        self.train = loader_of(self.x, self.y)
        self.val = loader_of(make_inputs("mlp", 15, 9), make_labels(15, 8))
        self.test = make_inputs("mlp", 7, 10)
        self.folder = folder
        self.path = None if folder is None else folder / "ella.safetensors"

    def make(self, model=None, **options):
        model = self.model if model is None else model
        options = {"eigenfunctions": METHODS["nystrom"], "progress": False, **options}
        return ELLA(model, **options)

    def fit(self, loader=None, **options):
        return self.make(**options).fit(self.train if loader is None else loader)

    def ella(self, method="nystrom"):
        """Fitted before; a copy, with a model of its own."""
        return copy.deepcopy(fitted(method))

    def probs(self, method="nystrom"):
        return fitted(method).predict_proba(self.test)

    def predict(self, x, method="nystrom"):
        return fitted(method).predict_proba(x)

    def features(self, x):
        """Probabilities after a fit to other inputs."""
        return self.fit(loader_of(x, self.y)).predict_proba(self.test)

    def labels(self, y, **options):
        """Probabilities after a fit to other labels."""
        return self.fit(loader_of(self.x, y), **options).predict_proba(self.test)

    def saved(self, method="nystrom"):
        self.path.write_bytes(file_of(method))
        return file_of(method)

    def load(self, model=None, **options):
        found = ELLA.load(self.path, model or fitted("nystrom").model, progress=False, **options)
        return found.predict_proba(self.test)

    def edited(self, edit, method="nystrom"):
        """Probabilities of a file whose settings were changed, with a checksum that fits."""
        self.saved(method)
        with saving.safe_open(self.path, framework="pt") as file:
            metadata = json.loads(file.metadata()["ella"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        edit(metadata["settings"], tensors)
        metadata["sha256"] = saving._digest(tensors)
        save_file(tensors, self.path, metadata={"ella": json.dumps(metadata)})
        return self.load()


# Arguments: each at its edges

EDGES = {
    "0": 0,
    "-1": -1,
    "NaN": NAN,
    "infinity": INF,
    "'3'": "3",
    "None": None,
    "2.5": 2.5,
    "True": True,
    "int64(3)": np.int64(3),
    "float32(0.5)": np.float32(0.5),
    "10**30": 10**30,
    "[3]": [3],
}
COUNT = "int64(3)"
POSITIVE = "2.5 int64(3) float32(0.5) 10**30"


def edges(where, name, fine, call, **refused):
    """Cases of one argument: those in `fine` have to be right, the others are refused by name."""
    cases = {}
    for edge, value in EDGES.items():
        outcome = RIGHT if edge in fine.split() else rf"`{name}` must|needs `{name}`"
        cases[f"{where}({name}={edge})"] = functools.partial(call, name, value), outcome
    return {
        **cases,
        **{
            f"{where}({name}={edge})": (functools.partial(call, name, EDGES[edge]), text)
            for edge, text in refused.items()
        },
    }


def constructed(kind, *given):
    def call(name, value, world):
        kind(*given, **{name: value})

    return call


def configured(name, value, world):
    """Constructed, fitted and asked: whatever is let in has to work."""
    return world.fit(**{name: value}).predict_proba(world.test)


def asked(method, *given):
    def call(name, value, world):
        return getattr(world.ella(), method)(*(getattr(world, g) for g in given), **{name: value})

    return call


NO_LOADER = {edge: "`loader` must" for edge in EDGES if edge not in ("None", "[3]")}
NO_BATCH = {"[3]": "Batch 0: The loader must yield x"}


def module(name, value, world):
    return world.ella("neural").predictive_module(**{name: value})(world.test)[0]


ARGUMENTS = {
    **edges("ELLA", "prior_precision", f"None {POSITIVE}", configured),
    **edges("ELLA", "temperature", POSITIVE, configured),
    **edges("ELLA", "logit_temperature", POSITIVE, configured),
    **edges("ELLA", "seed", "0 int64(3)", configured),
    **edges("ELLA", "positions", COUNT, configured),
    **edges("ELLA", "memory_budget", COUNT, constructed(ELLA, make_model("mlp"))),
    **edges("ELLA", "likelihood", "", configured),
    **edges("ELLA", "eigenfunctions", "None", constructed(ELLA, make_model("mlp"))),
    **edges("ELLA", "distance", "None", configured),
    **edges("ELLA", "residual", "None", configured),
    **edges("ELLA", "split", "None", configured),
    **edges("NeuralEF", "rank", COUNT, constructed(NeuralEF)),
    **edges("NeuralEF", "num_inputs", COUNT, constructed(NeuralEF)),
    **edges("NeuralEF", "num_directions", COUNT, constructed(NeuralEF)),
    **edges("NeuralEF", "width", COUNT, constructed(NeuralEF)),
    **edges("NeuralEF", "depth", f"0 {COUNT}", constructed(NeuralEF)),
    **edges("NeuralEF", "teacher", "", constructed(NeuralEF)),
    **edges("NeuralEF", "training", "None", constructed(NeuralEF)),
    **edges("NeuralEF", "objective", "", constructed(NeuralEF)),
    **edges("NeuralEF", "network", "None", constructed(NeuralEF)),
    **edges("NeuralEF", "augment", "None", constructed(NeuralEF)),
    **edges("NeuralEF", "reads", "", constructed(NeuralEF)),
    **edges("NeuralEF", "residual", "", constructed(NeuralEF)),
    **edges("Nystrom", "rank", COUNT, constructed(Nystrom)),
    **edges("Nystrom", "subsample", COUNT, constructed(Nystrom)),
    **edges("Nystrom", "outputs", "", constructed(Nystrom)),
    **edges("Nystrom", "residual", "", constructed(Nystrom)),
    **edges("LastLayer", "residual", "", constructed(LastLayer)),
    **edges("Training", "steps", COUNT, constructed(Training)),
    **edges("Training", "batch_size", COUNT, constructed(Training)),
    **edges("Training", "learning_rate", POSITIVE, constructed(Training)),
    **edges("Training", "weight_decay", f"0 {POSITIVE}", constructed(Training)),
    **edges("Training", "checks", COUNT, constructed(Training)),
    **edges("Training", "patience", COUNT, constructed(Training)),
    **edges("Perturb", "crop", "float32(0.5)", constructed(Perturb)),
    **edges("Perturb", "mix", "0 float32(0.5)", constructed(Perturb)),
    **edges("Perturb", "blur", f"0 {POSITIVE}", constructed(Perturb)),
    **edges("Perturb", "noise", f"0 {POSITIVE}", constructed(Perturb)),
    **edges("Perturb", "tokens", "None", constructed(Perturb)),
    **edges("PerturbTokens", "delete", "0 float32(0.5)", constructed(PerturbTokens)),
    **edges("PerturbTokens", "replace", "0 float32(0.5)", constructed(PerturbTokens)),
    **edges("PerturbTokens", "special", "[3]", constructed(PerturbTokens)),
    **edges("PerturbTokens", "padding", "None 0 int64(3) -1", constructed(PerturbTokens)),
    **edges("Distance", "share", POSITIVE, constructed(Distance)),
    **edges("Distance", "ridge", POSITIVE, constructed(Distance)),
    **edges("Categorical", "class_weights", "None [3]", constructed(Categorical)),
    **edges("Categorical", "ignore_index", "None 0 -1 int64(3)", constructed(Categorical)),
    **edges("Categorical", "label_smoothing", "0 float32(0.5)", constructed(Categorical)),
    **edges("Normal", "noise_variance", f"None {POSITIVE}", constructed(Normal)),
    **edges("MonteCarlo", "num_samples", COUNT, constructed(MonteCarlo)),
    **edges("MonteCarlo", "seed", "0 int64(3)", constructed(MonteCarlo)),
    **edges("Hyperparameters", "prior_precision", POSITIVE, constructed(Hyperparameters)),
    **edges("Hyperparameters", "temperature", f"0 {POSITIVE}", constructed(Hyperparameters, 1.0)),
    **edges("predict_proba", "n_samples", f"None {COUNT}", asked("predict_proba", "test")),
    **edges("predict_proba", "link", "None", asked("predict_proba", "test")),
    **edges("predict_proba", "x", "", asked("predict_proba"), **NO_BATCH),
    **edges("predict", "x", "", asked("predict"), **NO_BATCH),
    **edges("logits", "x", "", asked("logits"), **NO_BATCH),
    **edges("sample_logits", "n_samples", COUNT, asked("sample_logits", "test")),
    **edges("uncertainty", "n_samples", f"None {COUNT}", asked("uncertainty", "test")),
    **edges("calibrate", "n_samples", COUNT, asked("calibrate", "val")),
    **edges("calibrate", "link", "", asked("calibrate", "val")),
    **edges("calibrate", "shifted", "None [3]", asked("calibrate", "val"), **NO_LOADER),
    **edges("decay", "factor", "float32(0.5)", asked("decay")),
    **edges(
        "log_marginal_likelihood",
        "prior_precision",
        f"None {POSITIVE}",
        asked("log_marginal_likelihood"),
    ),
    **edges("predictive_module", "n_samples", f"None {COUNT}", module),
    **edges("fit", "checkpoint", "None '3'", asked("fit", "train")),
    **edges("save", "path", "'3'", asked("save")),
    **edges(
        "Linearized",
        "memory_budget",
        COUNT,
        lambda name, value, w: Linearized(w.model, memory_budget=value).jacobian(w.test),
    ),
}


# Data


def batches(*parts, labels=None):
    return [(x, make_labels(len(x)) if labels is None else labels) for x in parts]


def odd(form, x):
    """Tensors that torch warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form == "nested":
            return torch.nested.nested_tensor(list(x))
        if form == "quantized":
            return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
        return getattr(x, form)()


class Raising:
    """A loader that fails on some batch of some pass."""

    def __init__(self, loader, at):
        self.loader, self.left = loader, at

    def __iter__(self):
        for batch in self.loader:
            self.left -= 1
            if self.left < 0:
                raise OSError("disk on fire")
            yield batch


def expanded(x):
    """Examples that are all the same memory."""
    return x[:1].expand(len(x), -1)


def with_value(x, value):
    return x.clone().index_fill_(0, torch.tensor([3]), value)


def mixed(world):
    return [*world.train, (world.x[:2].reshape(2, 2, 2), world.y[:2])]


class OneHot(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        return make_inputs("mlp", 24)[i], make_labels(24)[i]


def workers(world, **options):
    loader = torch.utils.data.DataLoader(OneHot(), batch_size=5, **options)
    return world.fit(loader).predict_proba(world.test)


NO_NUMBERS = r"`x` holds NaN"
FEW = r"span only|fewer"
DATA = {
    "inputs of NaN": (lambda w: w.features(with_value(w.x, NAN)), rf"Batch 0: {NO_NUMBERS}"),
    "inputs of infinity": (lambda w: w.features(with_value(w.x, INF)), rf"Batch 0: {NO_NUMBERS}"),
    "inputs of -infinity": (lambda w: w.features(with_value(w.x, -INF)), NO_NUMBERS),
    "predict NaN": (lambda w: w.predict(w.test * NAN), NO_NUMBERS),
    "predict infinity": (lambda w: w.predict(w.test / 0), NO_NUMBERS),
    "predict a loader with NaN": (
        lambda w: w.predict([w.test, w.test * NAN]),
        "Batch 1: `x` holds",
    ),
    "predict 1e300": (lambda w: w.predict(w.test * 1e300), PROBS),
    "predict 1e-300": (lambda w: w.predict(w.test * 1e-300), PROBS),
    "predict zeros": (lambda w: w.predict(w.test * 0), PROBS),
    "train on 1e6": (lambda w: w.features(w.x * 1e6), PROBS),
    "train on 1e-6": (lambda w: w.features(w.x * 1e-6), PROBS),
    "train on 1e150": (lambda w: w.features(w.x * 1e150), PROBS),
    "train on 1e200": (lambda w: w.features(w.x * 1e200), PROBS),
    "train on zeros": (lambda w: w.features(w.x * 0), FEW),
    "train on one example many times": (lambda w: w.features(expanded(w.x).clone()), FEW),
    "train on memory shared by all": (lambda w: w.features(expanded(w.x)), FEW),
    "train on pairs": (lambda w: w.features(w.x[:12].repeat_interleave(2, 0)), PROBS),
    "train on one example": (
        lambda w: w.fit(batches(w.x[:1]), eigenfunctions=Nystrom(1, 9)).predict_proba(w.test),
        "All labels",
    ),
    "too few examples for the rank": (lambda w: w.fit(batches(w.x[:2])), "`rank` is 4"),
    "one example for networks": (
        lambda w: w.fit(batches(w.x[:1]), eigenfunctions=METHODS["neural"]),
        "All labels",
    ),
    "one example, last layer": (
        lambda w: w.fit(batches(w.x[:1]), eigenfunctions=LastLayer()).predict_proba(w.test),
        "All labels",
    ),
    "constant inputs for networks": (
        lambda w: w.fit(batches(expanded(w.x)), eigenfunctions=METHODS["neural"]).predict_proba(
            w.test
        ),
        PROBS,
    ),
    "predict one example": (lambda w: w.predict(w.test[:1]), PROBS),
    "predict nothing": (lambda w: w.predict(w.test[:0]), "`x` is empty"),
    "an empty batch in training": (
        lambda w: w.fit([*w.train, (w.x[:0], w.y[:0])]),
        "Batch 5: `x`",
    ),
    "an empty batch in prediction": (lambda w: w.predict([w.test, w.test[:0]]), "Batch 1: `x`"),
    "no batch": (lambda w: w.fit([]), "loader is empty"),
    "no batch to predict": (lambda w: w.predict([]), "loader is empty"),
    "no batch to calibrate": (lambda w: w.ella().calibrate([]), "loader is empty"),
    "no batch to add": (lambda w: w.ella().partial_fit([]), "loader is empty"),
    "a generator": (lambda w: w.fit(b for b in w.train), "`loader` is an iterator"),
    "a generator to predict": (lambda w: w.predict(b for b in w.train), "`loader` is an iterator"),
    "a tensor as a loader": (lambda w: w.fit(w.x), "`loader` must be an iterable"),
    "a pair as a loader": (lambda w: w.fit((w.x, w.y)), "Batch 0: "),
    "a string as a loader": (lambda w: w.fit("data"), "`loader` must be an iterable"),
    "a mapping as a loader": (lambda w: w.fit({"x": w.x}), "`loader` must be an iterable"),
    "None in a loader": (lambda w: w.fit([None]), "Batch 0: The loader must yield"),
    "inputs without labels": (lambda w: w.fit([w.x]), "Batch 0: The loader must yield"),
    "three parts": (lambda w: w.fit([(w.x, w.y, w.y)]), "which are inputs"),
    "fewer labels": (lambda w: w.fit([(w.x, w.y[:3])]), "24 inputs but 3 labels"),
    "tensors that disagree": (lambda w: w.fit([((w.x, w.x[:3]), w.y)]), "disagree"),
    "ragged rows": (lambda w: w.fit([([[1.0], [1.0, 2.0]], w.y[:2])]), "`x` must"),
    "other features later": (lambda w: w.fit(mixed(w)), "Batch 5: "),
    "other features to predict": (lambda w: w.predict(torch.randn(3, 5).double()), "`model`"),
    "too many axes": (lambda w: w.predict(w.test[:, None, None]), "`model`|labels"),
    "one axis": (lambda w: w.predict(w.test[0]), "`model`|`x`"),
    "no axis": (lambda w: w.predict(w.test[0, 0]), "first axis is the examples"),
    # dtypes and layouts
    "float32": (lambda w: w.predict(w.test.float()), PROBS),
    "float16": (lambda w: w.predict(w.test.half()), PROBS),
    "bfloat16": (lambda w: w.predict(w.test.bfloat16()), PROBS),
    "integers": (lambda w: w.predict(w.test.long()), "`model` failed on `x`"),
    "bytes": (lambda w: w.predict(w.test.to(torch.uint8)), "`model` failed on `x`"),
    "booleans": (lambda w: w.predict(w.test > 0), "`model` failed on `x`"),
    "complex numbers": (lambda w: w.predict(w.test + 1j), "`model` failed on `x`"),
    "complex NaN": (lambda w: w.predict(w.test * NAN + 1j), NO_NUMBERS),
    "sparse": (lambda w: w.predict(w.test.to_sparse()), "`x` must be a dense"),
    "compressed rows": (lambda w: w.predict(odd("to_sparse_csr", w.test)), "`x` must be a dense"),
    "sparse training data": (
        lambda w: w.fit([(w.x.to_sparse(), w.y)]),
        "Batch 0: `x` must be a dense",
    ),
    "nested": (lambda w: w.predict(odd("nested", w.test)), "`x` must be a dense"),
    "on no device": (lambda w: w.predict(w.test.to("meta")), "`x` is on meta"),
    "quantized": (lambda w: w.predict(odd("quantized", w.test)), "`x` must be a dense"),
    "strides": (lambda w: w.predict(w.test.T.contiguous().T), SAME),
    "part of a wider tensor": (lambda w: w.predict(torch.cat([w.test] * 2, 1)[:, :4]), SAME),
    "backwards": (lambda w: w.predict(w.test.flip(0)).flip(0), SAME),
    "conjugated": (lambda w: w.predict((w.test + 0j).conj().real), SAME),
    "requires a gradient": (lambda w: w.predict(w.test.clone().requires_grad_()), SAME),
    "with a graph": (lambda w: w.predict(w.test.clone().requires_grad_() * 1), SAME),
    "a parameter": (lambda w: w.predict(nn.Parameter(w.test)), SAME),
    "train on what requires a gradient": (
        lambda w: w.features(w.x.clone().requires_grad_() * 1),
        SAME,
    ),
    "NumPy": (lambda w: w.predict(w.test.numpy()), SAME),
    "NumPy, read-only": (lambda w: w.predict(np.broadcast_to(w.test.numpy(), (7, 4))), SAME),
    "NumPy, Fortran order": (lambda w: w.predict(np.asfortranarray(w.test.numpy())), SAME),
    "NumPy, other byte order": (lambda w: w.predict(w.test.numpy().astype(">f8")), SAME),
    "NumPy, backwards": (lambda w: w.predict(w.test.numpy()[::-1]).flip(0), SAME),
    "NumPy, long double": (lambda w: w.predict(w.test.numpy().astype(np.longdouble)), SAME),
    "NumPy, float16": (lambda w: w.predict(w.test.numpy().astype("f2")), PROBS),
    "NumPy, objects": (
        lambda w: w.predict(w.test.numpy().astype(object)),
        "`x` must hold numbers",
    ),
    "NumPy, text": (lambda w: w.predict(w.test.numpy().astype(str)), "`x` must hold numbers"),
    "NumPy, dates": (lambda w: w.predict(np.zeros((2, 4), "M8[s]")), "`x` must hold numbers"),
    "NumPy, records": (lambda w: w.predict(np.zeros(2, "f4,f4")), "`x` must hold numbers"),
    "NumPy, masked": (
        lambda w: w.predict(np.ma.masked_less(w.test.numpy(), 0)),
        "`x` holds masked",
    ),
    "NumPy, a scalar": (lambda w: w.predict(np.float64(3)), "`x` must"),
    "a list of rows": (lambda w: w.predict(w.test.tolist()), "Batch 0|`x` must"),
    "a mapping of strings": (lambda w: w.predict({"input": "text"}), "`x` must hold"),
    "an empty mapping": (lambda w: w.predict({}), "`x` must hold"),
    "an empty tuple": (lambda w: w.predict(()), "`x` must hold"),
    "a tuple of None": (lambda w: w.predict((None,)), "`x` must hold"),
    "arguments of other names": (lambda w: w.predict({"pixels": w.test}), "takes no 'pixels'"),
    "too many arguments": (lambda w: w.predict((w.test, w.test)), "`model` failed on `x`"),
    # labels
    "labels of floats": (lambda w: w.labels(w.y.double()), "Class labels must be integers"),
    "labels of booleans": (lambda w: w.labels(w.y > 0), "Class labels must be integers"),
    "labels of NaN": (lambda w: w.labels(w.y * NAN), "Class labels must be integers"),
    "complex labels": (lambda w: w.labels(w.y + 1j), "Class labels must be integers"),
    "labels of bytes": (lambda w: w.labels(w.y.to(torch.uint8)), SAME),
    "labels of int8": (lambda w: w.labels(w.y.to(torch.int8)), SAME),
    "labels of uint16": (lambda w: w.labels(w.y.numpy().astype(np.uint16)), SAME),
    "labels of uint64": (lambda w: w.labels(w.y.numpy().astype(np.uint64)), SAME),
    "labels in a list": (lambda w: w.fit([(w.x, w.y.tolist())]).predict_proba(w.test), SAME),
    "negative labels": (lambda w: w.labels(-w.y - 1), "Class labels must lie in 0..2"),
    "labels out of range": (lambda w: w.labels(w.y + 1), "Class labels must lie in 0..2"),
    "labels of 10**18": (lambda w: w.labels(w.y * 10**18), "Class labels must lie in 0..2"),
    "one-hot labels": (lambda w: w.labels(nn.functional.one_hot(w.y)), r"must have shape \(n,\)"),
    "a column of labels": (lambda w: w.labels(w.y[:, None]), r"must have shape \(n,\)"),
    "labels of text": (
        lambda w: w.labels(np.array(list("abc") * 8)),
        "`labels` must hold numbers",
    ),
    "no labels": (lambda w: w.fit([(w.x, None)]), "Labels must be"),
    "one label": (lambda w: w.fit([(w.x, 1)]), "Labels must be"),
    "one class": (lambda w: w.labels(w.y * 0), "All labels of the training data are 0"),
    "one class to calibrate": (lambda w: w.ella().calibrate([(w.test, w.y[:7] * 0)]), RIGHT),
    "one example to calibrate": (lambda w: w.ella().calibrate([(w.test[:1], w.y[:1])]), RIGHT),
    "the same to calibrate": (
        lambda w: w.ella().calibrate([(w.test[:1].expand(9, -1), w.y[:1].expand(9))]),
        RIGHT,
    ),
    "all labels ignored": (
        lambda w: w.fit(likelihood=Categorical(ignore_index=5)).calibrate(
            [(w.x * 2, w.y * 0 + 5)]
        ),
        "all are ignored",
    ),
    "targets of NaN": (
        lambda w: w.labels(torch.full((24, 3), NAN).double(), likelihood="regression"),
        "Regression targets hold NaN",
    ),
    "targets of integers": (
        lambda w: w.labels(w.y, likelihood="regression"),
        "Regression targets must be floating point",
    ),
    "targets of 1e200": (
        lambda w: w.fit(
            loader_of(w.x, torch.full((24, 3), 1e200, dtype=torch.float64)),
            likelihood="regression",
        ),
        "residuals of the training targets",
    ),
    "yes and no of 2": (
        lambda w: w.labels(torch.full((24, 3), 2), likelihood="binary"),
        "Binary targets must be 0 or 1",
    ),
    "yes and no of NaN": (
        lambda w: w.labels(torch.full((24, 3), NAN), likelihood="binary"),
        "Binary targets must be 0 or 1",
    ),
    # loaders
    "fails at once": (lambda w: w.fit(Raising(w.train, 0)), "disk on fire"),
    "fails later": (lambda w: w.fit(Raising(w.train, 7)), "disk on fire"),
    "fails in prediction": (lambda w: w.predict(Raising([w.test] * 3, 1)), "disk on fire"),
    "workers": (lambda w: workers(w, num_workers=1), SAME),
    "pinned": (lambda w: workers(w, pin_memory=False), SAME),
    "loaders that grow": (lambda w: w.fit(Growing(w.train)).predict_proba(w.test), PROBS),
}


class Growing:
    """One batch more each time."""

    def __init__(self, loader):
        self.loader, self.passes = loader, 3

    def __iter__(self):
        self.passes += 1
        return iter(self.loader[: self.passes])


# Models


def net(*layers):
    return nn.Sequential(*layers).double()


def small(*last, num_outputs=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, num_outputs), *last)


class Wrapped(nn.Module):
    """A model with something done to its outputs."""

    def __init__(self, change, model=None):
        super().__init__()
        self.net, self.change = model or make_model("mlp"), change

    def forward(self, x):
        return self.change(self.net(x))


def changed(model, change):
    with torch.no_grad():
        change(model)
    return model


def fit_of(model, **options):
    """Fitted to a model and asked."""

    def attack(world):
        ella = world.make(model() if callable(model) else model, **options)
        ella.fit(world.train)
        return ella.predict_proba(world.test)

    return attack


def later(change, use=lambda w, e: e.predict_proba(w.test), method="nystrom"):
    """Something is done to the model of a fitted object before it is used."""

    def attack(world):
        ella = world.ella(method)
        changed(ella.model, change)
        return use(world, ella)

    return attack


def hooked(hook):
    def change(model):
        model[0].register_forward_hook(hook)

    return change


def hook_after_fit(world):
    """Copies of the model are those of the time of the fit."""
    ella = world.fit()
    ella.predict_proba(world.test)
    hooked(lambda module, args, out: out * 2)(world.model)
    return ella.predict_proba(world.test)


def scaled(factor):
    return lambda model: model[3].weight.mul_(factor)


def raising(*args):
    raise RuntimeError("on purpose")


def frozen(model):
    return model.requires_grad_(False)


def unshared_statistics():
    return net(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3))


CHANGED = "weights or modules changed"
MODELS = {
    "no module": (fit_of(lambda: torch.tanh), "`model` must be a torch.nn.Module"),
    "None": (lambda w: ELLA(None), "`model` must be a torch.nn.Module"),
    "a class": (lambda w: w.make(nn.Linear), "`model` must be a torch.nn.Module"),
    "a string": (lambda w: w.make("resnet18"), "`model` must be a torch.nn.Module"),
    "a state": (lambda w: w.make(w.model.state_dict()), "`model` must be a torch.nn.Module"),
    "without parameters": (fit_of(lambda: nn.Identity()), "`model` has no trainable parameter"),
    "all frozen": (fit_of(lambda: frozen(make_model("mlp"))), "has no trainable parameter"),
    "weights of NaN": (
        fit_of(lambda: changed(small(), lambda m: m[0].weight.mul_(NAN))),
        "NaN or infinite logits",
    ),
    "one weight of NaN": (
        fit_of(lambda: changed(small(), lambda m: m[0].weight[0, 0].fill_(NAN))),
        "NaN or infinite logits",
    ),
    "weights of infinity": (
        fit_of(lambda: changed(small(), lambda m: m[2].bias.fill_(INF))),
        "NaN or infinite logits",
    ),
    "weights of zero": (
        fit_of(lambda: changed(small(), lambda m: [p.zero_() for p in m.parameters()])),
        "`rank` is 4",
    ),
    "logits of 1e20": (fit_of(lambda: changed(small(), lambda m: m[2].weight.mul_(1e20))), PROBS),
    "logits of 1e-20": (
        fit_of(lambda: changed(small(), lambda m: m[2].weight.mul_(1e-20))),
        PROBS,
    ),
    "logits of 1e150": (
        fit_of(lambda: changed(small(), lambda m: m[2].weight.mul_(1e150))),
        PROBS,
    ),
    "logits of 1e300": (
        fit_of(lambda: changed(small(), lambda m: m[2].weight.mul_(1e300))),
        "kernel is not finite",
    ),
    "constant logits": (fit_of(lambda: Wrapped(lambda f: f * 0)), "kernel|variance|span"),
    "random": (
        fit_of(lambda: Wrapped(lambda f: f + torch.rand_like(f))),
        "change from call to call",
    ),
    "dropout that stays on": (
        fit_of(lambda: Wrapped(lambda f: nn.functional.dropout(f, 0.5))),
        "change from call to call",
    ),
    "counts its calls": (fit_of(lambda: Counting()), "change from call to call"),
    "no running statistics": (fit_of(unshared_statistics), "track_running_stats"),
    "probabilities": (fit_of(lambda: small(nn.Softmax(-1))), "look like probabilities"),
    "log-probabilities": (fit_of(lambda: small(nn.LogSoftmax(-1))), PROBS),
    "probabilities of labels": (
        fit_of(lambda: small(nn.Sigmoid(), num_outputs=1), likelihood="binary"),
        "Binary targets|look like",
    ),
    "one output": (fit_of(lambda: small(num_outputs=1)), "one output|`binary`|0..0"),
    "no output": (fit_of(lambda: Wrapped(lambda f: f[:, :0])), "outputs"),
    "two outputs": (fit_of(lambda: small(num_outputs=2)), "Class labels must lie in 0..1"),
    "integers": (
        fit_of(lambda: Wrapped(lambda f: f.argmax(-1, keepdim=True))),
        "`model` must return logits",
    ),
    "complex numbers": (fit_of(lambda: Wrapped(lambda f: f + 1j)), "`model` must return logits"),
    "booleans": (fit_of(lambda: Wrapped(lambda f: f > 0)), "`model` must return logits"),
    "sparse outputs": (
        fit_of(lambda: Wrapped(lambda f: f.to_sparse())),
        "`model` must return logits",
    ),
    "a number": (fit_of(lambda: Wrapped(lambda f: 3.0)), "`model` must return a tensor"),
    "a list of lists": (
        fit_of(lambda: Wrapped(lambda f: f.tolist())),
        "`model` must return a tensor",
    ),
    "None as output": (fit_of(lambda: Wrapped(lambda f: None)), "`model` must return a tensor"),
    "NumPy as output": (
        fit_of(lambda: Wrapped(lambda f: f.detach().numpy())),
        "`model` must return a tensor",
    ),
    "one row": (fit_of(lambda: Wrapped(lambda f: f[:1])), "outputs of shape"),
    "mean of the batch": (fit_of(lambda: Wrapped(lambda f: f.mean(0))), "`model`"),
    "no axis of classes": (
        fit_of(lambda: Wrapped(lambda f: f.sum())),
        "`model` must return logits",
    ),
    "detached outputs": (
        fit_of(lambda: Wrapped(lambda f: f.detach())),
        "have no derivative",
    ),
    "outputs without a graph": (
        fit_of(lambda: Wrapped(lambda f: torch.tensor(f.tolist()))),
        "have no derivative",
    ),
    "raises": (fit_of(lambda: Wrapped(raising)), "`model` failed on `x`.*on purpose"),
    "stops": (fit_of(lambda: Wrapped(lambda f: next(iter([])))), "`model`|StopIteration"),
    "a lazy layer": (
        fit_of(lambda: nn.Sequential(nn.LazyLinear(3))),
        "lazy layer",
    ),
    "on no device": (fit_of(lambda: make_model("mlp").to("meta")), "on the meta device"),
    "half precision": (fit_of(lambda: make_model("mlp").half()), PROBS),
    "bfloat16": (fit_of(lambda: make_model("mlp").bfloat16()), PROBS),
    "float32": (fit_of(lambda: make_model("mlp").float()), PROBS),
    "two dtypes": (fit_of(lambda: TwoTypes()), PROBS),
    "complex weights": (fit_of(lambda: nn.Linear(4, 3, dtype=torch.complex128)), "`model`"),
    "hooks that raise": (later(hooked(raising)), "`model` failed on `x`.*on purpose"),
    "hooks that change": (hook_after_fit, SAME),
    "hooks that look": (later(hooked(lambda m, a, out: None)), SAME),
    "backward hooks": (
        fit_of(
            lambda: changed(small(), lambda m: m[0].register_full_backward_hook(lambda *a: None))
        ),
        PROBS,
    ),
    "a scripted model": (fit_of(lambda: script(make_model("mlp"))), "TorchScript"),
    "an attribute that is no data": (fit_of(lambda: Holding()), PROBS),
    "weights edited": (later(lambda m: m[3].weight.add_(1)), CHANGED),
    "one weight edited": (later(lambda m: m[3].weight[0, 0].add_(1e-3)), CHANGED),
    "edited through data": (later(lambda m: m[3].weight.data.mul_(2)), CHANGED),
    "new weights": (
        later(lambda m: m.load_state_dict(make_model("mlp", 1).state_dict())),
        CHANGED,
    ),
    "another head": (later(lambda m: m.__setitem__(3, nn.Linear(6, 3).double())), CHANGED),
    "a wider head": (later(lambda m: m.__setitem__(3, nn.Linear(6, 5).double())), CHANGED),
    "another activation": (later(lambda m: m.__setitem__(1, nn.ReLU())), CHANGED),
    "a layer less": (later(lambda m: m.__delitem__(3)), CHANGED),
    "a dtype moved": (later(lambda m: m.float()), CHANGED),
    "half precision moved": (later(lambda m: m.half()), CHANGED),
    "moved and back": (later(lambda m: m.half().double()), CHANGED),
    "train mode": (later(lambda m: m.train()), SAME),
    "frozen later": (later(frozen), SAME),
    "gradients": (later(lambda m: [setattr(p, "grad", p * 1) for p in m.parameters()]), SAME),
    "edited before save": (later(scaled(2), lambda w, e: e.save(w.path)), CHANGED),
    "edited before calibrate": (later(scaled(2), lambda w, e: e.calibrate(w.val)), CHANGED),
    "edited before partial_fit": (later(scaled(2), lambda w, e: e.partial_fit(w.val)), CHANGED),
    "edited before forget": (later(scaled(2), lambda w, e: e.forget(w.train[:1])), CHANGED),
    "edited before evaluated": (later(scaled(2), lambda w, e: e.evaluated(w.val)), CHANGED),
    "edited before export": (
        later(scaled(2), lambda w, e: e.predictive_module(), "neural"),
        CHANGED,
    ),
    "edited before fit": (
        later(scaled(2), lambda w, e: e.fit(w.train).predict_proba(w.test)),
        PROBS,
    ),
    "edited for networks": (later(scaled(2), method="neural"), CHANGED),
    "edited for the last layer": (later(scaled(2), method="last layer"), CHANGED),
    "an output that is not there": (
        fit_of(lambda: make_model("mlp"), output="logits"),
        "`output` is 'logits'",
    ),
    "an output of text": (
        fit_of(lambda: make_model("mlp"), output=lambda f: "text"),
        "`model` must return|`output`",
    ),
    "an output of nothing": (
        fit_of(lambda: make_model("mlp"), output=lambda f: None),
        "`model` must return|`output`",
    ),
    "an output that raises": (fit_of(lambda: make_model("mlp"), output=raising), "on purpose"),
    "an output that is no function": (
        fit_of(lambda: make_model("mlp"), output=2.5),
        "`output` must",
    ),
    "last layer of none": (
        fit_of(lambda: small(nn.Tanh()), eigenfunctions=LastLayer()),
        "LastLayer needs a model",
    ),
    "last layer frozen": (
        fit_of(
            lambda: changed(small(), lambda m: m[2].requires_grad_(False)),
            eigenfunctions=LastLayer(),
        ),
        "LastLayer needs a",
    ),
    "no activations": (
        fit_of(
            lambda: nn.Linear(4, 3).double(), eigenfunctions=METHODS["neural"], distance=Distance()
        ),
        PROBS,
    ),
    "a rank above that of the kernel": (
        fit_of(lambda: make_model("mlp"), eigenfunctions=Nystrom(52, 24, outputs="all")),
        "`rank` is 52",
    ),
}


class Counting(nn.Module):
    """Changes from call to call, by a number that is no buffer."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = make_model("mlp"), [0]

    def forward(self, x):
        self.calls[0] += 1
        return self.net(x) * self.calls[0]


class TwoTypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.first(x.double()).tanh().float())


class Holding(nn.Module):
    """Holds a lock and a generator."""

    def __init__(self):
        super().__init__()
        self.net, self.lock = make_model("mlp"), threading.Lock()
        self.items = (i for i in range(3))

    def forward(self, x):
        return self.net(x)


def script(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


# Files


def bytes_of(change, method="nystrom"):
    """The bytes of a file are changed before it is loaded."""

    def attack(world):
        world.path.write_bytes(change(world.saved(method)))
        return world.load()

    return attack


def edit(*keys, value, method="neural"):
    """One setting of a file is another, whose checksum fits."""

    def change(settings, tensors):
        inner = settings
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return lambda world: world.edited(change, method)


def swap(name, change, method="nystrom"):
    """One tensor of a file is another, whose checksum fits."""

    def changed(settings, tensors):
        tensors[name] = change(tensors[name]).contiguous()

    return lambda world: world.edited(changed, method)


def drop(name, method="nystrom"):
    return lambda world: world.edited(lambda settings, tensors: tensors.pop(name), method)


def extra(settings, tensors):
    tensors["more"], settings["more"] = torch.zeros(3), [1]


def header(change):
    """The JSON at the head of a file is changed, and its length with it."""

    def of(data):
        length = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + length].decode()).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return bytes_of(of)


def overwritten(world):
    ella = world.ella()
    ella.save(world.path)
    again = ELLA.load(world.path, ella.model, progress=False)
    world.path.write_bytes(b"\0" * world.path.stat().st_size)
    return again.predict_proba(world.test)


def pickled(world):
    """A pickle that would run a command."""

    class Command:
        def __reduce__(self):
            return os.mkdir, ("attacked",)

    world.path.write_bytes(pickle.dumps(Command()))
    try:
        return world.load()
    finally:
        assert not os.path.exists("attacked")


OURS = r"ella\.safetensors' (is|was|cannot)"
GONE = "No such file|does not exist"
FILES = {
    "an empty file": (bytes_of(lambda b: b""), OURS),
    "one byte": (bytes_of(lambda b: b[:1]), OURS),
    "the header alone": (bytes_of(lambda b: b[: 8 + int.from_bytes(b[:8], "little")]), OURS),
    "half a file": (bytes_of(lambda b: b[: len(b) // 2]), OURS),
    "one byte less": (bytes_of(lambda b: b[:-1]), OURS),
    "one byte more": (bytes_of(lambda b: b + b"x"), OURS),
    "twice": (bytes_of(lambda b: b + b), OURS),
    "zeros": (bytes_of(lambda b: bytes(len(b))), OURS),
    "backwards": (bytes_of(lambda b: b[::-1]), OURS),
    "a bit flipped at the end": (bytes_of(lambda b: b[:-1] + bytes([b[-1] ^ 1])), OURS),
    "a header of terabytes": (bytes_of(lambda b: (2**45).to_bytes(8, "little") + b[8:]), OURS),
    "a header of nothing": (bytes_of(lambda b: bytes(8) + b[8:]), OURS),
    "a header that is no JSON": (header(lambda h: h[:-5]), OURS),
    "a header of nested lists": (header(lambda h: "[" * 10**5), OURS),
    "tensors of terabytes": (
        header(lambda h: h.replace("[4,51]", "[2000000000,51000]")),
        OURS,
    ),
    "tensors of another dtype": (header(lambda h: h.replace('"F64"', '"I64"')), OURS),
    "a name twice": (
        header(
            lambda h: (
                h[:-1].rstrip()
                + ',"sums.curvature":{"dtype":"F64","shape":[0],"data_offsets":[0,0]}}'
            )
        ),
        OURS,
    ),
    "text": (bytes_of(lambda b: b"hello" * 100), OURS),
    "a pickle": (pickled, OURS),
    "a zip": (lambda w: (torch.save({}, w.path), w.load()), OURS),
    "a file of another library": (
        lambda w: (save_file({"a": torch.ones(2)}, w.path), w.load()),
        OURS,
    ),
    "a file of weights": (
        lambda w: (save_file(dict(w.model.state_dict()), w.path), w.load()),
        OURS,
    ),
    "no file": (lambda w: w.load(), GONE),
    "a folder": (lambda w: (w.path.mkdir(), w.load()), "is a folder"),
    "a broken link": (lambda w: (w.path.symlink_to(w.folder / "gone"), w.load()), GONE),
    "another model": (
        lambda w: (w.saved(), w.load(make_model("mlp", 3))),
        "was saved for another model",
    ),
    "a model of another class": (
        lambda w: (w.saved(), w.load(make_model("conv"))),
        "was saved for another model",
    ),
    "a model that was moved": (
        lambda w: (w.saved(), w.load(w.ella().model.float())),
        "was saved for another model",
    ),
    "a model in train mode": (lambda w: (w.saved(), w.load(w.ella().model.train())), SAME),
    "no model": (lambda w: (w.saved(), ELLA.load(w.path, None)), "`model` must be"),
    "a class that is none": (
        lambda w: (w.saved(), w.load(likelihood="other")),
        "ella.safetensors",
    ),
    "a likelihood of other classes": (
        lambda w: (w.saved(), w.load(likelihood=Categorical((1.0, 2.0)))),
        PROBS,
    ),
    "another method": (lambda w: (w.saved(), w.load(eigenfunctions=LastLayer())), OURS),
    "overwritten while in use": (overwritten, SAME),
    "more than is needed": (lambda w: w.edited(extra), SAME),
    # settings, with a checksum that fits
    **{
        f"{'.'.join(keys)} of {value!r}": (edit(*keys, value=value), OURS)
        for keys, values in {
            ("hyperparameters", "prior_precision"): (
                0,
                -1,
                NAN,
                INF,
                "1",
                None,
                [1],
                True,
                10**400,
            ),
            ("hyperparameters", "temperature"): (-1, NAN, INF, "1", None),
            ("hyperparameters", "logit_temperature"): (0, -1, NAN, INF, "1", None),
            ("hyperparameters", "distance_scale"): (-1, NAN, "1", None),
            ("options", "seed"): (-1, 1.5, "1", None, 2**70),
            ("options", "memory_budget"): (0, -1, 1.5, "1", None, 2**70),
            ("options", "positions"): (0, -1, 1.5, "1", None, 2**70),
            ("options", "temperature"): (0, -1, NAN, "1", None),
            ("options", "prior_precision"): (0, -1, NAN, "1"),
            ("eigenfunctions", "rank"): (0, -1, 2.5, "3", None, 2**70),
            ("eigenfunctions", "width"): (0, -1, 2**40),
            ("eigenfunctions", "depth"): (-1, 10**9),
            ("eigenfunctions", "residual"): ("exact", "no", None, 3),
            ("eigenfunctions", "teacher"): ("long", 3, {"type": "Training", "steps": -1}),
            ("eigenfunctions", "objective"): (None, 3, {"type": "Training"}),
            ("eigenfunctions", "augment"): (3, {"type": "Perturb", "crop": 7}),
            ("fitted", "made"): (3, {}, {"reads": "files", "num_inputs": 3, "shape": [3, 3]}),
            ("fitted", "residual"): (3, {}, {"kind": "Popen", "network": {}}),
            ("fitted", "taps"): (
                3,
                [3],
                [{"module": "0", "side": "both", "channels_first": False}],
            ),
            ("sums", "num_examples"): (-1, 1.5, "1", None),
            ("sums", "prior_variance"): (NAN, "1", None, -1.0),
            ("likelihood",): (None, 3, {"type": "Normal", "noise_variance": -1}),
            ("link",): (3, {"type": "MonteCarlo", "num_samples": 10**15}),
            ("tuning",): (3, {"type": "Tuning"}),
            ("trainable",): (None, 3, [], ["nothing"], [3]),
            ("fingerprint",): (None, 3, ""),
            ("output",): (2.5, {"type": "custom", "name": "f"}),
            ("distance_term",): (3, {"type": "Distance", "share": -1}, {"type": "Distance"}),
        }.items()
        for value in values
    },
    "T of 0": (edit("hyperparameters", "temperature", value=0), PROBS),
    "a precision of 1e-300": (edit("hyperparameters", "prior_precision", value=1e-300), PROBS),
    "a precision of 1e300": (edit("hyperparameters", "prior_precision", value=1e300), PROBS),
    "T of 1e300": (edit("hyperparameters", "temperature", value=1e300), PROBS),
    "a logit temperature of 1e300": (
        edit("hyperparameters", "logit_temperature", value=1e300),
        PROBS,
    ),
    # tensors, with a checksum that fits
    "no directions": (drop("fitted.directions"), OURS),
    "directions of another shape": (swap("fitted.directions", lambda t: t[:, :9]), OURS),
    "directions in single precision": (swap("fitted.directions", lambda t: t.float()), OURS),
    "directions of NaN": (swap("fitted.directions", lambda t: t * NAN), OURS),
    "fewer directions": (swap("fitted.directions", lambda t: t[:2]), OURS),
    "curvature of integers": (swap("sums.curvature", lambda t: t.long()), OURS),
    "curvature that is not symmetric": (swap("sums.curvature", lambda t: t.triu()), OURS),
    "curvature below zero": (swap("sums.curvature", lambda t: -t), OURS),
    "curvature of terabytes": (swap("sums.curvature", lambda t: t.new_zeros(0, 10**7)), OURS),
    "no curvature": (swap("sums.curvature", lambda t: t[:0, :0]), OURS),
    "statistics of NaN": (swap("sums.statistics", lambda t: t * NAN), OURS),
    "no statistics": (swap("sums.statistics", lambda t: t[:0]), OURS),
    "more statistics": (swap("sums.statistics", lambda t: torch.cat([t, t])), PROBS),
    "eigenvalues below zero": (swap("fitted.eigenvalues", lambda t: -t, "neural"), OURS),
    "weights in half precision": (
        swap("fitted.network.linear.weight", lambda t: t.half(), "neural"),
        PROBS,
    ),
    "a scale of zero": (swap("fitted.network.scale", lambda t: t * 0, "neural"), OURS),
    "a mixing of complex numbers": (
        swap("fitted.mixing", lambda t: t.to(torch.complex64), "neural"),
        OURS,
    ),
    "bounds of NaN": (swap("fitted.residual.highest", lambda t: t * NAN, "neural"), OURS),
    "bounds of 1e300": (swap("fitted.residual.highest", lambda t: t * 0 + 1e300, "neural"), PROBS),
    "a layer elsewhere": (edit("fitted", "layer", value="0.1", method="last layer"), OURS),
    "another layer": (edit("fitted", "layer", value="0", method="last layer"), OURS),
    "a layer of text": (edit("fitted", "layer", value=3, method="last layer"), OURS),
    "a residual of text": (edit("fitted", "residual", value="all", method="last layer"), OURS),
}


# Disk


def killed(moment):
    """Saving stops in the middle: the old file is still there, and nothing beside it."""

    def attack(world):
        expected = world.saved()
        ella = world.ella()
        ella.calibrate(world.val)
        real = getattr(*moment)

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        setattr(*moment, stop)
        try:
            ella.save(world.path)
        except KeyboardInterrupt:
            pass
        finally:
            setattr(*moment, real)
        assert world.path.read_bytes() == expected
        assert [p.name for p in world.folder.iterdir()] == [world.path.name]
        return world.load()

    return attack


def limited(world):
    """A disk that is full: files may have so many bytes."""
    resource = __import__("resource")
    expected = world.saved("neural")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(expected) // 2, hard))
    try:
        world.ella("neural").save(world.path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
        assert world.path.read_bytes() == expected
        assert [p.name for p in world.folder.iterdir()] == [world.path.name]


def process_killed(world):
    """Killed by the system while it writes."""
    expected = world.saved()
    ella = world.ella()
    child = os.fork()
    if not child:
        saving.save_file = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        ella.save(world.path)
    os.waitpid(child, 0)
    assert world.path.read_bytes() == expected
    return world.load()


DISK = {
    "no folder": (lambda w: w.ella().save(w.folder / "gone" / "file"), GONE),
    "a folder in its place": (lambda w: w.ella().save(w.folder), "is a folder"),
    "a file for a folder": (
        lambda w: (w.saved(), w.ella().save(w.path / "file")),
        "Not a directory|Errno",
    ),
    "a name too long": (lambda w: w.ella().save(w.folder / ("x" * 300)), "too long"),
    "a name of zero": (lambda w: w.ella().save("a\0b"), "null"),
    "a path of bytes": (lambda w: w.ella().save(b"file"), "`path` must"),
    "an empty path": (lambda w: w.ella().save(""), "is a folder"),
    "a link to nowhere": (
        lambda w: (w.path.symlink_to(w.folder / "new"), w.ella().save(w.path), w.load())[-1],
        SAME,
    ),
    "a pipe": (lambda w: (os.mkfifo("pipe"), w.ella().save("pipe")), "is a folder or a device"),
    "full": (limited, "could not be written"),
    "stopped in writing": (killed((saving, "save_file")), SAME),
    "stopped in flushing": (killed((os, "fsync")), SAME),
    "killed in writing": (process_killed, SAME),
}


# Calls


def before_fit(name, *given):
    return lambda world: getattr(world.make(), name)(*(getattr(world, g) for g in given))


def in_threads(*uses):
    """Each in many threads at once; all of them end."""

    def attack(world):
        ella, errors = world.ella(), []

        def work(use):
            try:
                for _ in range(3):
                    use(world, ella)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(use,)) for use in uses * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            raise error
        return ella.predict_proba(world.test)

    return attack


def forked(world):
    """Probabilities from a child that got the object by a fork."""
    ella = world.ella()
    ella.predict_proba(world.test)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, pickle.dumps(ella.predict_proba(world.test)))
        os._exit(0)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as file:
        os.close(write)
        return pickle.loads(file.read())


def under(mode, *uses):
    def attack(world):
        ella = world.make()
        with mode():
            ella.fit(world.train)
            for use in uses:
                use(world, ella)
            return ella.predict_proba(world.test)

    return attack


def sequence(text):
    """Calls by their first letters, then probabilities."""
    calls = {
        "f": lambda w, e: e.fit(w.train),
        "c": lambda w, e: e.calibrate(w.val),
        "p": lambda w, e: e.partial_fit(w.val),
        "g": lambda w, e: e.forget(w.train[:1]),
        "d": lambda w, e: e.decay(0.5),
        "s": lambda w, e: e.save(w.path),
        "l": lambda w, e: vars(e).update(vars(ELLA.load(w.path, e.model, progress=False))),
        "u": lambda w, e: e.uncertainty(w.test),
        "m": lambda w, e: e.log_marginal_likelihood(),
        "e": lambda w, e: e.evaluated(w.val),
    }

    def attack(world):
        ella = world.make()
        for letter in text:
            calls[letter](world, ella)
        return ella.predict_proba(world.test)

    return attack


def predicts(world, ella):
    return ella.predict_proba(world.test)


NOT_FITTED = "is not fitted"
CALLS = {
    **{
        f"{name} before fit": (before_fit(name, *given), NOT_FITTED)
        for name, given in {
            "predict_proba": ["test"],
            "predict": ["test"],
            "logits": ["test"],
            "gaussian": ["test"],
            "features": ["test"],
            "uncertainty": ["test"],
            "evaluated": ["val"],
            "calibrate": ["val"],
            "partial_fit": ["val"],
            "forget": ["val"],
            "save": ["path"],
            "log_marginal_likelihood": [],
            "predictive_module": [],
        }.items()
    },
    "sample_logits before fit": (lambda w: w.make().sample_logits(w.test, 3), NOT_FITTED),
    "decay before fit": (lambda w: w.make().decay(0.5), NOT_FITTED),
    "curvature before fit": (lambda w: w.make().curvature, NOT_FITTED),
    "state_bytes before fit": (lambda w: w.make().state_bytes, NOT_FITTED),
    **{
        f"calls {text}": (sequence(text), SAME)
        for text in ("f", "ff", "fsl", "fu", "fme", "fslsl", "fcf", "fpf", "fgf")
    },
    **{
        f"calls {text}": (sequence(text), PROBS)
        for text in (
            *(
                "fc",
                "fp",
                "fg",
                "fd",
                "fcp",
                "fcc",
                "fpp",
                "fcslp",
                "fslc",
                "fslp",
                "fcpslc",
            ),
            *("fdp", "fgp", "fpg", "fcg", "fcd", "fslg", "fcpgdsluc", "fcslcslc"),
        )
    },
    "calibrate with what was added": (sequence("fpc"), PROBS),
    "forget what never came": (lambda w: w.ella().forget(w.val), "never"),
    "forget twice": (lambda w: w.ella().forget(w.train[:1]).forget(w.train[:1]), "never"),
    "forget all": (lambda w: w.ella().forget(w.train), "never all in|has to stay"),
    "fit with another number of classes": (
        lambda w: w.ella().partial_fit([(w.x, w.y + 3)]),
        "Class labels must lie",
    ),
    "predict in no_grad": (under(torch.no_grad), SAME),
    "fit in inference_mode": (under(torch.inference_mode), SAME),
    "calibrate in inference_mode": (
        under(torch.inference_mode, lambda w, e: e.calibrate(w.val)),
        PROBS,
    ),
    "calibrate and save in no_grad": (
        under(torch.no_grad, lambda w, e: e.calibrate(w.val).save(w.path)),
        PROBS,
    ),
    "deterministic algorithms": (
        under(deterministic := contextlib.contextmanager(lambda: _deterministic())),
        SAME,
    ),
    "another default dtype": (
        under(lambda: _default("dtype", torch.float32, torch.float64)),
        SAME,
    ),
    "saved tensor hooks": (
        under(lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)),
        SAME,
    ),
    "threads predict": (in_threads(predicts), SAME),
    "threads predict and score": (in_threads(predicts, lambda w, e: e.uncertainty(w.test)), SAME),
    "threads predict and save": (in_threads(predicts, lambda w, e: e.save(w.path)), SAME),
    "threads predict and fit": (in_threads(predicts, lambda w, e: e.fit(w.train)), SAME),
    "threads predict and calibrate": (
        in_threads(predicts, lambda w, e: e.calibrate(w.val)),
        PROBS,
    ),
    "a fork": (forked, SAME),
}


def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _default(name, old, new):
    torch.set_default_dtype(new)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


FAMILIES = {
    "files": FILES,
    "disk": DISK,
    "data": DATA,
    "models": MODELS,
    "calls": CALLS,
    "arguments": ARGUMENTS,
}

# Verdicts

HERE, PACKAGE = Path(__file__).parent, Path(saving.__file__).parent


def verdict(attack, outcome, world):
    """What came of an attack: "right", "our error", or what is bad about it."""
    try:
        found = attack(world)
    except Exception as error:
        return blame(error, outcome)
    if outcome not in OUTCOMES:
        return f"nothing was said; expected {outcome!r}"
    return wrong(found, outcome, world) or "right"


def blame(error, outcome):
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    said = f"{type(error).__name__} in {where.name}: {error}"
    if outcome in OUTCOMES or not re.search(outcome, str(error), re.DOTALL):
        return said
    # What the user's own parts raise is the user's, and what the system says of a path names it.
    ours = PACKAGE in where.parents or HERE in where.parents or type(error) in FROM_THE_SYSTEM
    return "our error" if ours else said


FROM_THE_SYSTEM = (FileNotFoundError, NotADirectoryError, OSError)


def wrong(found, outcome, world):
    """Why a result is not right, or None."""
    if isinstance(found, Predictor):
        found = found.predict_proba(world.test)
    if isinstance(found, tuple) and outcome is not RIGHT:
        found = found[-1]
    for tensor in found if isinstance(found, tuple) else (found,):
        if isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
            return "NaN or infinite numbers"
    if outcome is RIGHT:
        return None
    sums = found.double().sum(-1)
    if found.ndim != 2 or (found < 0).any() or (sums - 1).abs().max() > 1e-3:
        return f"no probabilities: {found}"
    if outcome is SAME:
        apart = (found - world.probs()).abs().max().item()
        return f"other probabilities, by {apart}" if apart > 1e-6 else None
    return None
