"""One contract for all predictors and all likelihoods, and for many threads at once."""

import threading
import warnings

import pytest
import torch
from own_likelihoods import Ordinal, Poisson
from torch import nn

from ella import (
    ELLA,
    Bernoulli,
    Categorical,
    Discrete,
    LastLayer,
    ModelChangedError,
    NeuralEF,
    Normal,
    Nystrom,
    Training,
)
from ella.baselines import (
    MAP,
    KroneckerLaplace,
    LastLayerLaplace,
    NystromLaplace,
    TemperatureScaling,
)

pytestmark = pytest.mark.filterwarnings("ignore:calibrate. ")


@pytest.fixture(autouse=True)
def _needs_its_extra(request):
    if "kind" in request.fixturenames and "laplace" in request.getfixturevalue("kind"):
        pytest.importorskip("laplace", reason="needs the extra `baselines`")


N, D = 40, 4
QUIET = {"progress": False}
SHORT = Training(steps=20, batch_size=16)
NEURAL = NeuralEF(rank=3, num_inputs=48, width=8, num_directions=12, teacher=SHORT)
PREDICTORS = {
    "neural": lambda model, **o: ELLA(model, eigenfunctions=NEURAL, **o),
    "nystrom": lambda model, **o: ELLA(model, eigenfunctions=Nystrom(3, 20), **o),
    "last layer": lambda model, **o: ELLA(model, eigenfunctions=LastLayer(), **o),
    "map": MAP,
    "temperature": TemperatureScaling,
    "laplace last layer": LastLayerLaplace,
    "laplace kronecker": KroneckerLaplace,
    "laplace nystrom": lambda model, **o: NystromLaplace(model, rank=3, subsample=20, **o),
}
LIKELIHOODS = {
    "categorical": (Categorical(), 3),
    "weighted": (Categorical(class_weights=(1.0, 2.0, 3.0), ignore_index=-100), 3),
    "bernoulli": (Bernoulli(), 3),
    "binary": (Bernoulli(), 1),
    "normal": (Normal(), 2),
    "poisson": (Poisson(), 2),
    "ordinal": (Ordinal(), 1),
}
LAPLACE_TORCH = ("categorical", "normal")


class Net(nn.Module):
    """Dropout, BatchNorm, a hook of the user's own, and modes that differ."""

    def __init__(self, c):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(6, c)

    def forward(self, x):
        self.last = self.body(x)
        return self.head(self.last)


def make_model(c):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(c).double()
    model.body[1].running_mean.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(1))
    model.body[1].eval()
    model.body[2].register_forward_hook(lambda module, args, output: output * 1.0)
    return model


def inputs(n, seed):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(name, n, c, seed):
    generator = torch.Generator().manual_seed(seed)
    if name == "normal":
        return torch.randn(n, c, generator=generator, dtype=torch.float64)
    if name == "binary":
        return torch.randint(2, (n,), generator=generator)
    if name in ("bernoulli", "poisson"):
        return torch.randint(2 if name == "bernoulli" else 4, (n, c), generator=generator)
    return torch.randint(4 if name == "ordinal" else c, (n,), generator=generator)


def batches(name, n, c, seed):
    x, y = inputs(n, seed), targets(name, n, c, seed + 1)
    return [(x[i : i + 16], y[i : i + 16]) for i in range(0, n, 16)]


def snapshot(model):
    """Everything that a call could disturb, of the model and of the process."""
    return {
        "objects": [
            (id(m), m.training, {k: id(v) for k, v in vars(m).items()}) for m in model.modules()
        ],
        "hooks": [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()],
        "tensors": [
            (id(t), t._version, t.requires_grad, t.grad, t.tolist())
            for t in (*model.parameters(), *model.buffers())
        ],
        "rng": torch.get_rng_state().tolist(),
        "flags": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
        ),
    }


def scores_of(method, x):
    return {k: v for k, v in vars(method.uncertainty(x)).items() if v is not None}


def pairs():
    for kind in PREDICTORS:
        for name in LIKELIHOODS:
            if not kind.startswith("laplace") or name in LAPLACE_TORCH:
                yield kind, name


@pytest.mark.parametrize(("kind", "name"), pairs())
def test_every_predictor_with_every_likelihood(kind, name, tmp_path):
    likelihood, c = LIKELIHOODS[name]
    model, x = make_model(c), inputs(5, seed=9)
    train, val = batches(name, N, c, seed=2), batches(name, 20, c, seed=4)
    before = snapshot(model)
    method = PREDICTORS[kind](model, likelihood=likelihood, **QUIET)
    method.fit(train)
    assert snapshot(model) == before, "fit"
    started = method.hyperparameters
    for link in ("mc", "probit", "bridge"):
        if (
            link == "bridge"
            and not isinstance(likelihood, (Categorical, Normal))
            and kind != "map"
        ):
            with pytest.raises(ValueError, match="LaplaceBridge is no link for"):
                method.calibrate(val, link=link)
            continue
        method.calibrate(val, link=link, n_samples=16)
        assert snapshot(model) == before, f"calibrate with {link}"
        said = method.predict(x)
        assert len(said) == 5
        if isinstance(likelihood, Discrete):
            probs = method.predict_proba(x)
            assert torch.equal(said, likelihood.decide(probs))
            assert ((probs >= 0) & (probs <= 1)).all()
            if not isinstance(likelihood, Bernoulli):
                torch.testing.assert_close(probs.sum(-1), torch.ones(5, dtype=torch.float64))
        scores = scores_of(method, x)
        assert all(v.shape == (5,) and torch.isfinite(v).all() for v in scores.values())
        gaussian = method.gaussian(x)
        torch.testing.assert_close(gaussian.covariance(), method.logits(x)[1])
        assert snapshot(model) == before, f"predict with {link}"
    if kind in ("neural", "nystrom", "last layer"):
        path = tmp_path / "file.safetensors"
        method.save(path)
        own = {} if name not in ("poisson", "ordinal") else {"likelihood": likelihood}
        again = ELLA.load(path, model, **own, **QUIET)
        assert again.hyperparameters == method.hyperparameters
        assert (again.tuning, again.link) == (method.tuning, method.link)
        assert torch.equal(again.predict(x), method.predict(x))
        for one, two in zip(scores_of(again, x).values(), scores.values(), strict=True):
            assert torch.equal(one, two)
        assert snapshot(model) == before, "save and load"
    method.fit(train)
    assert method.hyperparameters == started
    assert method.tuning is None
    assert method.link is None
    assert snapshot(model) == before, "fit again"


@pytest.mark.parametrize("kind", [k for k in PREDICTORS if k.startswith("laplace")])
def test_what_laplace_torch_lacks_is_refused(kind):
    with pytest.raises(ValueError, match="laplace-torch has no likelihood like Bernoulli"):
        PREDICTORS[kind](make_model(1), likelihood="binary")


@pytest.mark.parametrize("kind", PREDICTORS)
@pytest.mark.parametrize("change", ["in place", "load_state_dict", "data", "head"])
def test_a_model_that_changed_is_refused(kind, change, tmp_path):
    model = make_model(3)
    loader = batches("categorical", N, 3, seed=2)
    method = PREDICTORS[kind](model, **QUIET).fit(loader)
    old = {name: t.clone() for name, t in model.state_dict().items()}
    expected = method.predict_proba(inputs(5, seed=9))
    if change == "in place":
        with torch.no_grad():
            model.head.weight.add_(0.1)
    elif change == "data":
        model.head.weight.data.mul_(1.1)
    elif change == "head":
        model.head = nn.Linear(6, 3).double()
    else:
        model.load_state_dict({name: t + 1 for name, t in old.items()})
    uses = {
        "predict": lambda: method.predict(inputs(5, seed=9)),
        "gaussian": lambda: method.gaussian(inputs(5, seed=9)),
        "uncertainty": lambda: method.uncertainty(inputs(5, seed=9)),
        "evaluated": lambda: method.evaluated(loader),
        "calibrate": lambda: method.calibrate(loader),
    }
    if isinstance(method, ELLA):
        uses["save"] = lambda: method.save(tmp_path / "never")
        uses["partial_fit"] = lambda: method.partial_fit(loader)
        uses["features"] = lambda: method.features(inputs(5, seed=9))
    for use in uses.values():
        with pytest.raises(ModelChangedError, match=f"changed after {type(method).__name__}.fit"):
            use()
    assert not (tmp_path / "never").exists()
    if change in ("in place", "load_state_dict"):
        model.load_state_dict(old)
        assert torch.equal(method.predict_proba(inputs(5, seed=9)), expected)
    method.fit(loader).predict_proba(inputs(5, seed=9))


@pytest.mark.parametrize("kind", PREDICTORS)
def test_threads_predict_beside_a_training_step(kind):
    """8 threads, 320 calls, and gradients taken of the same model meanwhile: nothing differs."""
    model = make_model(3)
    method = PREDICTORS[kind](model, **QUIET).fit(batches("categorical", N, 3, seed=2))
    batch = [inputs(6, seed=20 + i) for i in range(8)]
    expected = [(method.predict_proba(x), scores_of(method, x)["entropy"]) for x in batch]
    x, y = inputs(16, seed=50), targets("categorical", 16, 3, seed=51)
    model.body[3].eval()  # dropout would make gradients differ by itself
    gradients = gradients_of(model, x, y)
    wrong, done = [], threading.Event()

    def predict(i):
        for _ in range(40):
            try:
                found = method.predict_proba(batch[i]), method.uncertainty(batch[i]).entropy
                if not all(map(torch.equal, found, expected[i])):
                    wrong.append((i, "numbers"))
            except Exception as error:  # every error counts
                wrong.append((i, error))

    def train():
        while not done.is_set():
            found = gradients_of(model, x, y)
            if not (model.head.training and all(map(torch.equal, found, gradients))):
                wrong.append(("training step", found))

    with warnings.catch_warnings():  # `warnings.catch_warnings` of others is not thread-safe
        warnings.simplefilter("ignore")
        trainer = threading.Thread(target=train)
        threads = [threading.Thread(target=predict, args=(i,)) for i in range(8)]
        trainer.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        trainer.join()
    assert wrong == []


def gradients_of(model, x, y):
    loss = nn.functional.cross_entropy(model(x), y)
    return torch.autograd.grad(loss, list(model.parameters()))
