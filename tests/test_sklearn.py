"""`ELLAClassifier`: the same numbers as ELLA on tensors, and scikit-learn's own rules."""

import copy
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from own_likelihoods import Ordinal
from torch import nn

from ella import (
    ELLA,
    Categorical,
    LastLayer,
    ModelChangedError,
    NeuralEF,
    Nystrom,
    Training,
)

pytest.importorskip("sklearn", minversion="1.6")

from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from ella.sklearn import ELLAClassifier, held_out

pytestmark = pytest.mark.filterwarnings("ignore:calibrate:UserWarning")

QUICK = partial(NeuralEF, num_inputs=64, width=16, depth=1, teacher=Training(steps=20))


def trained(X, y, outputs=None, dtype=torch.float64):
    """What a user passes as `module`: a small network trained on what it is given."""
    x, y = torch.tensor(X, dtype=dtype), torch.tensor(y)
    outputs = int(y.max()) + 1 if outputs is None else outputs
    module = nn.Sequential(nn.Linear(x.shape[1], 8), nn.Tanh(), nn.Linear(8, outputs)).to(dtype)
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(50):
        optimizer.zero_grad()
        logits = module(x)
        if outputs == 1:
            loss = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], y.to(dtype))
        else:
            loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
    return module


def data(classes=3, n=90, seed=0):
    """Overlapping blobs whose first column is unlike in all rows."""
    X, y = make_blobs(n, centers=classes, n_features=4, cluster_std=4.0, random_state=seed)
    return X, y


def batches(X, y, size=256, dtype=torch.float64):
    x, y = torch.tensor(X, dtype=dtype), torch.tensor(y)
    return list(zip(x.split(size), y.split(size), strict=True))


def rows(X):
    """Examples that can be looked up."""
    return {tuple(row) for row in np.asarray(X).tolist()}


class Recorded:
    """A callable `module` that remembers what it was given."""

    def __init__(self):
        self.given = []

    def __call__(self, X, y):
        self.given.append((X.copy(), y.copy()))
        return trained(X, y)

    def __deepcopy__(self, memo):  # `clone` copies parameters; there is one record
        return self


# The same as ELLA


@pytest.mark.parametrize("method", [LastLayer(), Nystrom(rank=5), QUICK(rank=4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trained_module_gives_what_ella_gives(method, dtype):
    (X, y), (X_val, y_val) = data(), data(seed=1)
    X_val, y_val = X_val[y_val > 0], y_val[y_val > 0]  # not all classes are there
    module = trained(X, y, dtype=dtype)
    given = ELLAClassifier(
        module, eigenfunctions=method, validation=(X_val, y_val), random_state=3, batch_size=32
    ).fit(X, y)
    direct = ELLA(module, eigenfunctions=method, seed=3, progress=False)
    direct.fit(batches(X, y, 32, dtype)).calibrate(batches(X_val, y_val, 32, dtype))
    x = torch.tensor(X_val, dtype=dtype)
    loader = list(x.split(32))
    probs = direct.predict_proba(loader)
    assert given.ella_.model is module
    assert (given.predict_proba(X_val) == probs.numpy()).all()
    assert given.predict_proba(X_val).dtype == probs.numpy().dtype  # sums are checked by dtype
    assert (given.predict(X_val) == probs.argmax(1).numpy()).all()
    for name in ("entropy", "mutual_information", "logit_variance", "energy"):
        ours = getattr(given.uncertainty(X_val), name)
        assert torch.equal(ours, getattr(direct.uncertainty(loader), name))
    assert given.score(X_val, y_val) == (probs.argmax(1).numpy() == y_val).mean()


def test_one_logit_is_that_of_the_second_class():
    X, y = data(2)
    module = trained(X, y, outputs=1)
    given = ELLAClassifier(module, eigenfunctions=LastLayer()).fit(X, np.array(["no", "yes"])[y])
    direct = ELLA(module, likelihood="binary", eigenfunctions=LastLayer(), progress=False)
    p = direct.fit(batches(X, y)).predict_proba(torch.tensor(X)).numpy()
    assert (given.predict_proba(X) == np.hstack([1 - p, p])).all()
    assert (given.predict(X) == np.where(p[:, 0] > 0.5, "yes", "no")).all()
    assert given.score(X, np.array(["no", "yes"])[y]) > 0.5


def test_the_share_calibrates_and_the_rest_trains():
    X, y = data()
    record = Recorded()
    given = ELLAClassifier(record, eigenfunctions=LastLayer(), validation=0.3, random_state=5).fit(
        X, y
    )
    held = held_out(y, 0.3, 5)
    ((X_seen, y_seen),) = record.given
    assert rows(X_seen) == rows(X[~held])
    assert (y_seen == y[~held]).all()
    direct = ELLA(given.ella_.model, eigenfunctions=LastLayer(), seed=5, progress=False)
    direct.fit(batches(X[~held], y[~held])).calibrate(batches(X[held], y[held]))
    assert direct.hyperparameters == given.ella_.hyperparameters
    assert direct.tuning == given.ella_.tuning
    assert direct.tuning.num_examples == 27
    assert (given.predict_proba(X) == direct.predict_proba(torch.tensor(X)).numpy()).all()


def test_auto_calibrates_only_what_cannot_have_seen_the_share():
    X, y = data()
    apart = ELLAClassifier(trained, eigenfunctions=LastLayer()).fit(X, y)
    assert apart.ella_.tuning.num_examples == 18
    for module, validation in ((trained(X, y), "auto"), (trained, None)):
        plain = ELLAClassifier(module, eigenfunctions=LastLayer(), validation=validation)
        assert plain.fit(X, y).ella_.tuning is None


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_share_is_even_over_classes_and_leaves_none_out(classes, share, seed):
    rng = np.random.RandomState(seed)
    y = np.concatenate([np.arange(classes), rng.randint(classes, size=150) ** 2 % classes])
    mask = held_out(y, share, seed)
    counts = np.bincount(y, minlength=classes)
    taken = np.bincount(y[mask], minlength=classes)
    assert mask.sum() == min(round(share * len(y)), len(y) - classes)
    assert (taken < counts).all()
    # One of each class is not among those that may be taken.
    assert (abs(taken - share * counts) < 2 + share * classes).all()
    assert (mask == held_out(y, share, seed)).all()
    assert (mask != held_out(y, share, seed + 1)).any()


def test_the_default_rank_is_what_the_jacobian_spans(monkeypatch, tmp_path):
    monkeypatch.setattr("ella.sklearn.NeuralEF", QUICK)
    X, y = data()
    module = nn.Linear(4, 3).double()  # its Jacobian spans (4 + 1)·3 directions
    given = ELLAClassifier(module).fit(X, y)
    assert given.ella_.eigenfunctions == QUICK(rank=15)
    direct = ELLA(module, eigenfunctions=QUICK(rank=15), progress=False).fit(batches(X, y))
    probs = direct.predict_proba(torch.tensor(X)).numpy()
    assert (given.predict_proba(X) == probs).all()
    given.ella_.save(tmp_path / "ella.safetensors")
    loaded = ELLA.load(tmp_path / "ella.safetensors", module)
    assert (loaded.predict_proba(torch.tensor(X)).numpy() == probs).all()
    with pytest.raises(ValueError, match="`rank` is 16"):  # what is given is not changed
        ELLAClassifier(module, eigenfunctions=QUICK(rank=16)).fit(X, y)


def test_the_default_rank_is_at_most_that_of_ella(monkeypatch):
    monkeypatch.setattr("ella.sklearn.NeuralEF", partial(QUICK, num_inputs=200))
    X, y = data()
    given = ELLAClassifier(nn.Linear(40, 3).double()).fit(np.tile(X, 10) + np.eye(90, 40), y)
    assert given.ella_.eigenfunctions.rank == NeuralEF().rank


def test_any_discrete_likelihood_gives_columns():
    X, y = data(4)
    module = nn.Linear(4, 1).double()
    given = ELLAClassifier(module, likelihood=Ordinal(), eigenfunctions=LastLayer()).fit(X, y)
    direct = ELLA(module, likelihood=Ordinal(), eigenfunctions=LastLayer(), progress=False)
    probs = direct.fit(batches(X, y)).predict_proba(torch.tensor(X)).numpy()
    assert (given.predict_proba(X) == probs).all()


# Arrays of all kinds


@pytest.mark.parametrize(
    "names", [["a", "b", "c"], [-5, 0, 9], [0.0, 1.0, 2.0], np.array(["x", "yy", "z"], object)]
)
def test_labels_of_any_kind_change_nothing_but_the_labels(names):
    X, y = data()
    names = np.asarray(names)
    plain = ELLAClassifier(trained, eigenfunctions=LastLayer()).fit(X, y)
    named = ELLAClassifier(trained, eigenfunctions=LastLayer()).fit(X, names[y])
    assert (named.classes_ == names).all()
    assert (named.predict_proba(X) == plain.predict_proba(X)).all()
    assert (named.predict(X) == names[plain.predict(X)]).all()


def test_boolean_labels():
    X, y = data(2)
    given = ELLAClassifier(trained, eigenfunctions=LastLayer()).fit(X, y == 1)
    assert given.predict(X).dtype == bool
    assert given.predict_proba(X).shape == (90, 2)


@pytest.mark.parametrize("kind", ["int8", "float16", "float32", "list", "reversed", "readonly"])
def test_arrays_of_any_kind(kind):
    X, y = data()
    X = np.round(X)
    module = trained(X, y)
    fitted = ELLAClassifier(module, eigenfunctions=LastLayer()).fit(X, y)
    same = {"list": X.tolist(), "reversed": X[::-1].copy()[::-1]}.get(kind)
    if kind == "readonly":
        same = X.copy()
        same.flags.writeable = False
    same = X.astype(kind) if same is None else same
    again = ELLAClassifier(module, eigenfunctions=LastLayer()).fit(same, y)
    assert (again.predict_proba(same) == fitted.predict_proba(X)).all()


def test_dtypes_that_numpy_lacks():
    X, y = data()
    module = trained(X, y).bfloat16()
    given = ELLAClassifier(module, eigenfunctions=LastLayer()).fit(X, y)
    direct = ELLA(module, eigenfunctions=LastLayer(), progress=False)
    probs = direct.fit(batches(X, y, dtype=torch.bfloat16)).predict_proba(
        torch.tensor(X).bfloat16()
    )
    assert (given.predict_proba(X) == probs.float().numpy()).all()


def test_frames_keep_their_names():
    frames = pytest.importorskip("pandas")
    X, y = data()
    frame = frames.DataFrame(X, columns=["a", "b", "c", "d"])
    given = ELLAClassifier(trained, eigenfunctions=LastLayer()).fit(frame, frames.Series(y))
    plain = ELLAClassifier(trained, eigenfunctions=LastLayer()).fit(X, y)
    assert list(given.feature_names_in_) == ["a", "b", "c", "d"]
    assert (given.predict_proba(frame) == plain.predict_proba(X)).all()
    with pytest.raises(ValueError, match="feature names"):
        given.predict(frame[["b", "a", "c", "d"]])


def test_images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 5, 5, generator=generator)
    y = torch.arange(40) % 2
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 2))
    given = ELLAClassifier(module, eigenfunctions=Nystrom(rank=5)).fit(x.numpy(), y.numpy())
    direct = ELLA(module, eigenfunctions=Nystrom(rank=5), progress=False).fit([(x, y)])
    assert (given.predict_proba(x.numpy()) == direct.predict_proba(x).numpy()).all()
    assert given.n_features_in_ == 1


def test_batches_are_no_larger_than_asked_and_change_nothing():
    X, y = data()
    sizes = []
    module = trained(X, y)
    module[0].register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    large = ELLAClassifier(module, eigenfunctions=LastLayer("none")).fit(X, y)
    small = ELLAClassifier(module, eigenfunctions=LastLayer("none"), batch_size=7).fit(X, y)
    sizes.clear()
    probs = small.predict_proba(X)
    assert max(sizes) == 7
    assert sum(sizes) == 90
    np.testing.assert_allclose(probs, large.predict_proba(X), rtol=1e-9)


# The rules of scikit-learn


@pytest.mark.parametrize("method", [LastLayer(), QUICK(rank=2), None])
@pytest.mark.filterwarnings("ignore")  # it tries much that warns
def test_check_estimator(method, monkeypatch):
    if method is None:
        monkeypatch.setattr("ella.sklearn.NeuralEF", QUICK)  # the default, in less time
    done = check_estimator(ELLAClassifier(trained, eigenfunctions=method), on_skip=None)
    others = {each["check_name"] for each in done if each["status"] != "passed"}
    assert others <= {"check_array_api_input"}  # arrays of other libraries; skipped for all
    assert len(done) > 40


def test_cross_validation_trains_without_the_fold():
    X, y = data()
    record, folds = Recorded(), StratifiedKFold(3)
    made = ELLAClassifier(record, eigenfunctions=LastLayer(), random_state=2)
    probs = cross_val_predict(made, X, y, cv=folds, method="predict_proba")
    assert probs.shape == (90, 3)
    np.testing.assert_allclose(probs.sum(1), 1)
    assert len(record.given) == 3
    for (seen, _), (rest, fold) in zip(record.given, folds.split(X, y), strict=True):
        assert rows(seen) <= rows(X[rest])
        assert not rows(seen) & rows(X[fold])
        apart = ELLAClassifier(trained, eigenfunctions=LastLayer(), random_state=2)
        assert (apart.fit(X[rest], y[rest]).predict_proba(X[fold]) == probs[fold]).all()


def test_in_a_pipeline_the_module_sees_what_the_steps_before_make():
    X, y = data()
    record = Recorded()
    steps = make_pipeline(StandardScaler(), ELLAClassifier(record, eigenfunctions=LastLayer()))
    probs = steps.fit(X, y).predict_proba(X)
    scaled = StandardScaler().fit_transform(X)
    assert rows(record.given[0][0]) <= rows(scaled)
    alone = ELLAClassifier(trained, eigenfunctions=LastLayer()).fit(scaled, y)
    assert (alone.predict_proba(scaled) == probs).all()


def test_grid_search_over_the_rank():
    X, y = data()
    grid = {"eigenfunctions": [QUICK(rank=2), QUICK(rank=5)], "validation": [0.2, None]}
    single = partial(trained, dtype=torch.float32)
    search = GridSearchCV(ELLAClassifier(single), grid, scoring="neg_log_loss", cv=2).fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.ella_.eigenfunctions == search.best_params_["eigenfunctions"]


def test_what_is_pickled_predicts_the_same():
    X, y = data()
    for module in (trained, trained(X, y)):
        fitted = ELLAClassifier(module, eigenfunctions=QUICK(rank=3)).fit(X, y)
        again = pickle.loads(pickle.dumps(fitted))
        assert (again.predict_proba(X) == fitted.predict_proba(X)).all()
        assert (clone(fitted).fit(X, y).predict_proba(X) == fitted.predict_proba(X)).all()


def test_parameters_are_kept_as_given():
    module, method, likelihood = nn.Linear(4, 3), Nystrom(), Categorical()
    made = ELLAClassifier(module, eigenfunctions=method, likelihood=likelihood, batch_size=-1)
    assert made.module is module
    assert made.eigenfunctions is method
    assert made.likelihood is likelihood
    copied = clone(made)
    assert copied.module is not module
    assert torch.equal(copied.module.weight, module.weight)
    assert copied.set_params(validation=0.5).get_params()["validation"] == 0.5


def test_randomness_is_that_of_random_state():
    X, y = data()

    def probs(random_state):
        made = ELLAClassifier(trained, eigenfunctions=LastLayer(), random_state=random_state)
        return made.fit(X, y).predict_proba(X)

    before = torch.get_rng_state()
    first = probs(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert (probs(1) == first).all()
    assert (probs(np.random.RandomState(1)) == probs(np.random.RandomState(1))).all()
    assert (probs(1) != probs(2)).any()
    assert (probs(None) != probs(None)).any()


def test_the_module_is_left_as_it_is():
    X, y = data()
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    module[0].bias.requires_grad_(False)
    before = copy.deepcopy(module)
    given = ELLAClassifier(module, eigenfunctions=LastLayer(), validation=0.2).fit(X, y)
    given.predict_proba(X), given.uncertainty(X), clone(given).fit(X, y)
    for own, old in zip(module.modules(), before.modules(), strict=True):
        assert own.training == old.training
        assert vars(own).keys() == vars(old).keys()
    for own, old in zip(module.parameters(), before.parameters(), strict=True):
        assert torch.equal(own, old)
        assert own.requires_grad == old.requires_grad
        assert own.grad is None
    for own, old in zip(module.buffers(), before.buffers(), strict=True):
        assert torch.equal(own, old)
    with torch.no_grad():
        module[3].bias += 1
    with pytest.raises(ModelChangedError):
        given.predict(X)


# Errors


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"module": nn.Linear(4, 5)}, ValueError, r"`module`.*3 classes.*expected 3.*got 5"),
        ({"module": nn.Linear(4, 1)}, ValueError, r"`module`.*3 classes.*expected 3.*got 1"),
        ({"likelihood": "binary"}, ValueError, r"`module`.*3 classes.*expected 1.*got 3"),
        ({"likelihood": "regression"}, ValueError, "`likelihood` must give probabilities"),
        ({"likelihood": "softmax"}, ValueError, "`likelihood` must be one of"),
        ({"module": "resnet"}, TypeError, "`module` must be a trained.*got str"),
        ({"module": lambda X, y: None}, TypeError, r"`module\(X, y\)` must return.*NoneType"),
        ({"validation": 1.0}, ValueError, "`validation` must be a share.*got 1.0"),
        ({"validation": "some"}, ValueError, "`validation` must be a share.*got 'some'"),
        ({"validation": (np.zeros((2, 4)), [0, 7])}, ValueError, r"`validation`.*\[7\]"),
        ({"validation": (np.zeros((2, 3)), [0, 1])}, ValueError, "3 features.*expecting 4"),
        ({"validation": 0.001}, ValueError, "`validation`=0.001 of 90.*holds out none"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be an integer above 0; got 0"),
        ({"prior_precision": -1.0}, ValueError, "`prior_precision` must be"),
        ({"distance": 0.1}, TypeError, "`distance` must be a Distance"),
    ],
)
def test_errors_name_the_argument(settings, error, message):
    X, y = data()
    given = {"module": trained, "eigenfunctions": LastLayer(), "validation": None} | settings
    if settings.get("likelihood") in ("binary", "regression"):
        given["module"] = trained(X, y)
    with pytest.raises(error, match=message):
        ELLAClassifier(**given).fit(X, y)


def test_unfitted_and_one_class():
    X, y = data()
    with pytest.raises(NotFittedError):
        ELLAClassifier(trained).uncertainty(X)
    with pytest.raises(ValueError, match="at least 2 classes; got 1 class: 4"):
        ELLAClassifier(trained).fit(X, np.full_like(y, 4))


def test_without_scikit_learn_the_extra_is_named():
    script = "import sys; sys.modules['sklearn'] = None\nimport ella\nimport ella.sklearn"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert 'pip install "ella-laplace[sklearn]"' in done.stderr.splitlines()[-1]
