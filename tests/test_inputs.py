"""Every form of data that people bring: the result of tensors, or a sentence that helps."""

import collections
import warnings
from collections import UserDict

import numpy as np
import pytest
import torch
from cases import loader_of, make_case, make_inputs, part_of
from kinds import CLASSES, LENGTH, Named, mlp
from torch import nn

from ella import ELLA, Bernoulli, NeuralEF, Nystrom, Perturb, PerturbTokens, Training
from ella.baselines import MAP, TemperatureScaling
from ella.batches import Batches, split_batch
from ella.inputs import as_inputs, as_tensor, concatenate, num_examples, take
from ella.targets import as_labels

pytestmark = pytest.mark.filterwarnings("ignore:calibrate. ")

N = 24
X, Y = torch.randn(N, 4, generator=torch.Generator().manual_seed(0)), torch.arange(N) % CLASSES
NEURAL = NeuralEF(
    rank=3, num_inputs=48, width=8, num_directions=12, teacher=Training(steps=20, batch_size=16)
)
QUIET = {"progress": False}
Pair = collections.namedtuple("Pair", ["image", "target"])
Unnamed = collections.namedtuple("Unnamed", ["a", "b"])


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp()


def fitted(model, loader, **options):
    return ELLA(model, eigenfunctions=NEURAL, **QUIET, **options).fit(loader)


def in_batches(function, size=7):
    return [function(X[i : i + size], Y[i : i + size]) for i in range(0, N, size)]


class Array:
    """Of some library: all it has is `__array__`."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.x, dtype)


class Capsule:
    """Of some library: all it has is `__dlpack__`."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


FORMS = {
    "numpy": lambda x, y: (x.numpy(), y.numpy()),
    "float64 numpy": lambda x, y: (x.double().numpy(), y.numpy()),
    "reversed numpy": lambda x, y: (x.flip(1).numpy()[:, ::-1], y.numpy()),
    "read-only numpy": lambda x, y: (np.frombuffer(x.numpy().tobytes(), "f4").reshape(-1, 4), y),
    "big-endian numpy": lambda x, y: (x.numpy().astype(">f4"), y.numpy().astype(">i2")),
    "__array__": lambda x, y: (Array(x), Array(y)),
    "__dlpack__": lambda x, y: (Capsule(x), Capsule(y)),
    "list": lambda x, y: [x, y],
    "list of labels": lambda x, y: (x, y.tolist()),
    "list of numbers": lambda x, y: (x, list(y.numpy())),
    "list of label tensors": lambda x, y: (x, list(y)),
    "named tuple": lambda x, y: Pair(x, y),
    "unnamed tuple": lambda x, y: Unnamed(x, y),
    "mapping of numpy": lambda x, y: {"input": x.numpy(), "label": y.numpy()},
    "UserDict": lambda x, y: UserDict({"input": x, "labels": y}),
    "uint8 labels": lambda x, y: (x, y.to(torch.uint8)),
    "int16 labels": lambda x, y: (x, y.to(torch.int16)),
    "uint16 labels": lambda x, y: (x, y.numpy().astype(np.uint16)),
    "uint32 labels": lambda x, y: (x, y.numpy().astype(np.uint32)),
    "float64 tensors": lambda x, y: (x.double(), y),
    "tuple of one": lambda x, y: ((x,), y),
    "list of one": lambda x, y: ([x], y),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_result_of_tensors(model, form):
    expected = fitted(model, in_batches(lambda x, y: (x, y)))
    ella = fitted(model, in_batches(FORMS[form]))
    assert torch.equal(ella.predict_proba(X), expected.predict_proba(X))


def test_frames_are_arrays(model):
    pandas = pytest.importorskip("pandas")
    expected = fitted(model, in_batches(lambda x, y: (x, y)))
    frame = pandas.DataFrame(X.numpy(), columns=list("abcd"))

    def batch(x, y):
        return pandas.DataFrame(x.numpy()), pandas.Series(y.numpy())

    ella = fitted(model, in_batches(batch))
    assert torch.equal(ella.predict_proba(frame), expected.predict_proba(X))
    assert ella.uncertainty(frame.astype("float64")).entropy.shape == (N,)
    with pytest.raises(TypeError, match=r"`x` must hold numbers.*DataFrame of dtype object"):
        ella.predict_proba(frame.assign(e="text"))


@pytest.mark.parametrize(
    "x",
    [X.numpy(), X.double().numpy(), Array(X), Capsule(X), (X,)],
    ids=lambda x: type(x).__name__,
)
def test_predictions_of_arrays(model, x):
    ella = fitted(model, in_batches(lambda x, y: (x, y)))
    assert torch.equal(ella.predict_proba(x), ella.predict_proba(X))
    assert torch.equal(ella.predict(x), ella.predict(X))


def test_batches_of_a_tokenizer():
    transformers = pytest.importorskip("transformers")
    case = make_case("padded", n=N)

    def batch(x, y):
        return transformers.BatchEncoding({**x, "labels": y})

    plain = [({**x, "labels": y}) for x, y in loader_of(case.x, case.y)]
    loader = [batch(x, y) for x, y in loader_of(case.x, case.y)]
    expected = fitted(case.model, plain)
    assert torch.equal(
        fitted(case.model, loader).predict_proba(transformers.BatchEncoding(case.x)),
        expected.predict_proba(case.x),
    )
    with pytest.raises(TypeError, match="forward takes no 'idx', which the inputs hold"):
        expected.predict_proba({**case.x, "idx": torch.arange(N)})


class Graphs(nn.Module):
    """Reads a batch object with `.x` and `.batch`."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, data):
        h = torch.tanh(self.first(data.x))
        n = int(data.batch.max()) + 1
        pooled = h.new_zeros(n, 6).index_add(0, data.batch, h)
        return self.head(pooled)


@pytest.mark.parametrize("method", [NEURAL, Nystrom(3, 12)], ids=["neural", "nystrom"])
def test_batches_that_are_one_object(method, tmp_path):
    data = pytest.importorskip("torch_geometric.data")
    generator = torch.Generator().manual_seed(0)
    graphs = [
        data.Data(x=torch.randn(int(k), 4, generator=generator), y=torch.tensor([i % CLASSES]))
        for i, k in enumerate(torch.randint(1, 6, (N,), generator=generator))
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Graphs()
    loader = [data.Batch.from_data_list(graphs[i : i + 7]) for i in range(0, N, 7)]
    ella = ELLA(model, eigenfunctions=method, **QUIET).fit(loader).calibrate(loader[1:])
    whole = data.Batch.from_data_list(graphs)
    probs = ella.predict_proba(whole)
    assert probs.shape == (N, CLASSES)
    torch.testing.assert_close(probs, ella.predict_proba(loader))
    alone = torch.cat([ella.predict_proba(data.Batch.from_data_list([g])) for g in graphs])
    torch.testing.assert_close(probs, alone)
    assert num_examples(take(whole, torch.tensor([3, 1]))) == 2
    assert num_examples(concatenate(loader)) == N
    ella.save(tmp_path / "ella")
    again = ELLA.load(tmp_path / "ella", model, progress=False)
    assert torch.equal(again.predict_proba(whole), probs)


# Telling inputs and labels apart


@pytest.mark.parametrize(
    "batch", [(X, X, X, Y), (X, torch.arange(N), Y), [X, Y, torch.ones(N)], (*Unnamed(X, Y), Y)]
)
def test_batches_that_cannot_be_told_apart(model, batch):
    with pytest.raises(TypeError, match=r"Batch 0: A batch has \d elements .*Pass `split=`"):
        fitted(model, [batch])


def test_split_tells_them_apart(model):
    expected = fitted(model, in_batches(lambda x, y: (x, y))).predict_proba(X)
    split = lambda batch: (batch[0], batch[2])  # noqa: E731
    loader = in_batches(lambda x, y: (x, torch.arange(len(x)), y))
    ella = fitted(model, loader, split=split)
    torch.testing.assert_close(ella.predict_proba(loader), expected)
    assert MAP(model, split=split, **QUIET).fit(loader).predict(loader).shape == (N,)
    deeper = in_batches(lambda x, y: {"data": {"x": x}, "meta": {"y": y}})
    split = lambda batch: (batch["data"]["x"], batch["meta"]["y"])  # noqa: E731
    found = fitted(model, deeper, split=split).predict_proba(deeper)
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match=r"`split` must return a tuple \(x, y\); got Tensor"):
        fitted(model, loader, split=lambda batch: batch[0])
    with pytest.raises(TypeError, match=r"`split` must be a function .*got int"):
        ELLA(model, split=3)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, a, b):
        return self.net(torch.cat([a, b], dim=1))


def test_named_tuples_with_labels_by_name(model):
    three = collections.namedtuple("three", ["a", "b", "label"])
    loader = in_batches(lambda x, y: three(x[:, :2], x[:, 2:], y))
    both = TwoInputs()
    both.net.load_state_dict(model.state_dict())
    ella = fitted(both, loader)
    torch.testing.assert_close(
        ella.gaussian((X[:, :2], X[:, 2:])).mean, model(X).detach(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("use", ["fit", "calibrate", "predict_proba"])
def test_iterators_are_refused_always(model, use):
    loader = in_batches(lambda x, y: (x, y))
    ella = fitted(model, loader)
    for iterator in (iter(loader), (batch for batch in loader), zip([X], [Y], strict=True)):
        with pytest.raises(TypeError, match=r"is an iterator .*used once only"):
            getattr(ella, use)(iterator)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ((X * float("nan"), Y), ValueError, "Batch 2: `x` holds NaN"),
        ((X, Y + 5), ValueError, "Batch 2: Class labels must lie in 0..2"),
        ((X, Y[:3]), ValueError, "Batch 2: A batch has 24 inputs but 3 labels"),
        ((X[:, :3], Y), RuntimeError, "shapes cannot be multiplied"),  # the model's own words
        ((X, Y.float()), TypeError, "Batch 2: Class labels must be integers"),
        ((X, "labels"), TypeError, "Batch 2: Labels must be a tensor"),
        (({"x": object()}, Y), TypeError, "Batch 2: `x` must hold at least one tensor"),
        ((["text"] * N, Y), TypeError, "Batch 2: `x` must be a tensor or an array"),
        ((X, ["a"] * N), TypeError, "Batch 2: `labels` must hold numbers"),
        (([[1.0], [1.0, 2.0]], Y), TypeError, "Batch 2: `x` must be a tensor or an array"),
        (3, TypeError, r"Batch 2: The loader must yield \(x, y\)"),
        ((X[:0], Y[:0]), ValueError, "Batch 2: `x` is empty"),
    ],
)
def test_errors_name_the_batch(model, bad, error, message):
    good = in_batches(lambda x, y: (x, y))[:2]
    ella = fitted(model, good)
    for use in (ella.fit, ella.partial_fit, ella.calibrate):
        with pytest.raises(error, match=message):
            use([*good, bad])


def test_lists_of_examples_are_stacked_and_arrays_checked():
    assert torch.equal(as_tensor([X[0], X[1]]), X[:2])
    assert as_tensor(np.arange(3, dtype=np.uint16)).dtype == torch.int64
    assert as_labels(np.array([True, False])).dtype == torch.bool
    array = np.zeros((2, 3), np.float32)
    found = as_inputs({"x": array, "scale": 0.5, "mode": "fast", "nothing": None})
    array[:] = 1  # the copy is not the caller's array
    assert found["x"].sum() == 0
    assert (found["scale"], found["mode"], found["nothing"]) == (0.5, "fast", None)
    assert split_batch(X, labels=False)[0] is X


def test_settings_among_the_inputs_are_passed_on():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, scale=1.0, flag=False):
            return self.net(x) * scale

    loader = in_batches(lambda x, y: {"x": x, "scale": 2.0, "flag": True, "y": y})
    ella = fitted(Scaled(), loader)
    assert ella.predict_proba({"x": X, "scale": 2.0}).shape == (N, CLASSES)


# Outputs


@pytest.mark.parametrize(
    ("form", "output"),
    [
        ("mapping", None),
        ("mapping", "logits"),
        ("mapping", lambda out: out["logits"]),
        ("tuple", None),
        ("tuple", 0),
        ("other", "prediction"),
    ],
)
def test_outputs_are_found_or_named(form, output, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Named(form)
    loader = in_batches(lambda x, y: (x, y))
    ella = fitted(model, loader, output=output).calibrate(in_batches(lambda x, y: (-x, y)))
    tau = ella.hyperparameters.logit_temperature
    expected = model.head(torch.tanh(model.body(X))).detach()
    torch.testing.assert_close(ella.gaussian(X).mean * tau, expected)
    ella.save(tmp_path / "ella")
    if callable(output):
        with pytest.raises(ValueError, match=r"custom output .*Pass `output=`"):
            ELLA.load(tmp_path / "ella", model)
    given = output if callable(output) else None
    again = ELLA.load(tmp_path / "ella", model, output=given, progress=False)
    assert torch.equal(again.predict_proba(X), ella.predict_proba(X))


@pytest.mark.parametrize(
    ("form", "output", "message"),
    [
        ("other", None, r"got dict of \(features, prediction\). Say which with `output=`"),
        ("mapping", "logit", r"`output` is 'logit', but the model returned dict of \(hidden, log"),
        ("tuple", 5, r"`output` is 5, but the model returned tuple of \(Tensor \(2, 3\), Tensor"),
        ("tuple", lambda out: None, "must return a tensor of outputs"),
        ("tuple", 1.5, "`output` must be a name, an index, a function"),
    ],
)
def test_outputs_that_are_not_there(form, output, message):
    with pytest.raises(TypeError, match=message):
        fitted(Named(form), in_batches(lambda x, y: (x, y)), output=output)


@pytest.mark.parametrize("axis", [True, False])
def test_one_logit_with_or_without_its_axis(axis):
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    model = net if axis else nn.Sequential(net, nn.Flatten(0))
    loader = in_batches(lambda x, y: (x, (y > 0).float()))
    ella = fitted(model, loader, likelihood="binary").calibrate(
        in_batches(lambda x, y: (-x, y > 0))
    )
    probs = ella.predict_proba(X)
    assert probs.shape == (N, 1)
    assert ((probs > 0) & (probs < 1)).all()
    assert isinstance(ella.likelihood, Bernoulli)


# Hints


def hints(model, loader, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ella = fitted(model, loader, **options)
    return ella, [str(w.message) for w in caught]


class Noisy(nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(nn.functional.dropout(x, 0.5))


def without_statistics():
    norm = nn.BatchNorm2d(6, track_running_stats=False)
    spread = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Upsample(2), norm, nn.Flatten())
    return nn.Sequential(nn.Linear(4, 6), spread, nn.Linear(24, CLASSES))


HINTS = {
    "softmax": (lambda: nn.Sequential(mlp(), nn.Softmax(1)), {}, "look like probabilities"),
    "sigmoid": (
        lambda: nn.Sequential(mlp(), nn.Sigmoid()),
        {"likelihood": "multilabel"},
        "look like probabilities",
    ),
    "dropout by hand": (Noisy, {}, "change from call to call"),
    "batch statistics": (without_statistics, {}, "depend on the rest of its batch"),
}


@pytest.mark.parametrize("case", HINTS)
def test_hints(case):
    make, options, message = HINTS[case]
    many = options.get("likelihood") == "multilabel"
    loader = in_batches(lambda x, y: (x, nn.functional.one_hot(y, CLASSES) if many else y))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, found = hints(make(), loader, **options)
    assert len([text for text in found if message in text]) == 1
    assert hints(mlp(), in_batches(lambda x, y: (x, y)))[1] == []


def test_a_model_that_takes_no_example_alone():
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.Linear(6, CLASSES))
    with pytest.raises(ValueError, match=r"takes a batch of 7, but not one example alone .*Batch"):
        fitted(model, in_batches(lambda x, y: (x, y)))


def test_a_hint_about_labels_and_about_validation_data(model):
    _, found = hints(model, in_batches(lambda x, y: (x, torch.ones_like(y))))
    assert found == [
        "All labels of the training data are 1: the curvature says nothing of the other classes. "
        "Was the loader sorted by class and cut?"
    ]
    loader = in_batches(lambda x, y: (x, y))
    ella = fitted(model, loader)
    with pytest.warns(UserWarning, match="calibrate was given training data"):
        ella.calibrate(loader)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "calibrate was given")
        ella.calibrate(in_batches(lambda x, y: (x + 1, y)))


# Augmentation


def test_masks_and_padding_stay(generator):
    lengths = torch.tensor([6, 3, 2, 5])
    real = torch.arange(6) < lengths[:, None]
    x = torch.randn(4, 6, 2, generator=generator)
    for mask in (real, real.long(), real.float()):
        found = Perturb()({"x": x, "attention_mask": mask}, generator)
        assert torch.equal(found["attention_mask"], mask)
        assert torch.equal(found["x"][~real], x[~real])
        assert not torch.equal(found["x"][real], x[real])
    found = Perturb()({"x": x, "src_key_padding_mask": ~real}, generator)
    assert torch.equal(found["x"][~real], x[~real])
    first, second = Perturb()((x, real.float()), generator)
    assert torch.equal(second, real.float())
    assert torch.equal(first[~real], x[~real])


def texts(n=40, length=12, seed=0):
    """Ids 1 and 2 begin and end each text, 0 is padding, the rest are words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 60, (n, length), generator=generator)
    lengths = torch.randint(5, length + 1, (n,), generator=generator)
    place = torch.arange(length)
    ids[:, 0] = 1
    ids[torch.arange(n), lengths - 1] = 2
    mask = (place < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": place % 2 * mask}


@pytest.mark.parametrize("left", [False, True])
def test_tokens_are_deleted_and_replaced_but_never_special_ones(left, generator):
    x = texts()
    x = {name: tensor.flip(1) for name, tensor in x.items()} if left else x
    found = PerturbTokens(delete=0.3, replace=0.3)(x, "input_ids", generator)
    ids, mask = found["input_ids"], found["attention_mask"].bool()
    before, old = x["input_ids"], x["attention_mask"].bool()
    assert (mask.sum(1) <= old.sum(1)).all()
    assert mask.sum() < 0.9 * old.sum()
    assert (ids[~mask] == 0).all()
    assert (ids[mask] != 0).all()
    for special in (1, 2):
        assert ((ids == special).sum(1) == 1).all()
    assert set(ids.unique().tolist()) <= set(before.unique().tolist())
    for row, keep in zip(ids, mask, strict=True):  # no gap, and the ends are where they were
        edges = keep.long().diff().ne(0).sum()
        assert edges <= 1
        text = row[keep]
        assert {int(text[0]), int(text[-1])} == {1, 2}
    assert not torch.equal(ids, before)
    same = PerturbTokens(delete=0, replace=0)(x, "input_ids", generator)
    assert torch.equal(same["input_ids"], before)


def test_what_moves_with_the_tokens(generator):
    x = texts()
    x["token_type_ids"] = x["input_ids"] + 100  # so that places can be compared
    x["position_ids"] = torch.arange(12).expand(40, 12)
    found = PerturbTokens(delete=0.3, replace=0)(x, "input_ids", generator)
    real = found["attention_mask"].bool()
    assert torch.equal(found["token_type_ids"][real], found["input_ids"][real] + 100)
    assert torch.equal(found["position_ids"], x["position_ids"])


def test_ids_without_a_mask_keep_their_padding_and_their_columns(generator):
    ids = texts()["input_ids"]
    ids[:, -2:] = 0
    found = Perturb()(ids, generator)
    assert torch.equal(found == 0, ids == 0)
    columns = torch.stack([torch.randint(10 * i, 10 * i + 5, (30,)) for i in range(1, 7)], 1)
    changed = Perturb()(columns, generator)
    assert not torch.equal(changed, columns)
    assert all(
        set(a.tolist()) <= set(b.tolist()) for a, b in zip(changed.T, columns.T, strict=True)
    )


def test_default_augmentation_reaches_texts():
    case = make_case("padded", n=40)
    seen = []

    class Spy:
        def __call__(self, x, generator):
            seen.append((x, Perturb()(x, generator)))
            return seen[-1][1]

    method = NeuralEF(
        rank=3, num_inputs=80, width=8, num_directions=12, augment=Spy(), teacher=Training(steps=5)
    )
    ELLA(case.model, eigenfunctions=method, **QUIET).fit(loader_of(case.x, case.y, 20))
    changed = [not torch.equal(a["input_ids"], b["input_ids"]) for a, b in seen]
    assert any(changed)


def test_ragged_batches_for_every_method():
    x = make_inputs("padded", N)
    case = make_case("padded", n=N)
    order = x["attention_mask"].sum(1).argsort()
    loader = []
    for index in order.split(6):
        part = part_of(x, index)
        longest = int(part["attention_mask"].sum(1).max())
        loader.append(({k: t[:, :longest] for k, t in part.items()}, case.y[index]))
    assert len({batch[0]["input_ids"].shape[1] for batch in loader}) > 1
    for method in (NEURAL, Nystrom(3, 12)):
        ella = ELLA(case.model, eigenfunctions=method, **QUIET).fit(loader)
        probs = ella.predict_proba(loader)
        torch.testing.assert_close(probs, ella.predict_proba(part_of(x, order)))
    scaled = TemperatureScaling(case.model, **QUIET).fit(loader).calibrate(loader)
    assert scaled.predict_proba(loader).shape == (N, CLASSES)


def test_going_through_batches_again_and_again():
    batches = Batches(in_batches(lambda x, y: (x, y)), torch.device("cpu"))
    first = [x for x, _ in batches.labelled()]
    assert len(first) == len(list(batches.inputs())) == 4
    assert LENGTH > 1
