"""Baselines against laplace-torch itself, and the promises every method makes."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from cases import train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ella import NotFittedError
from ella.baselines import (
    MAP,
    KroneckerLaplace,
    LastLayerKronecker,
    LastLayerLaplace,
    NystromLaplace,
    TemperatureScaling,
)
from ella.links import MonteCarlo
from ella.metrics import negative_log_likelihood

PRECISIONS = (0.05, 1.0, 30.0)
CLASSES = 3


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4, CLASSES),
    )


def make_data(shape, n, seed):
    """Inputs whose first number decides the class, with a fifth of the labels random."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    y = torch.bucketize(x.flatten(1).mean(1) * x[0].numel() ** 0.5, torch.tensor([-0.5, 0.5]))
    noisy = torch.rand(n, generator=generator) < 0.2
    return x, torch.where(noisy, torch.randint(CLASSES, (n,), generator=generator), y)


def make_case(factory, shape, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = factory().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 2)
        if not bias:
            model[-1] = nn.Linear(model[-1].in_features, CLASSES, bias=False).double()
        x, y = make_data(shape, 60, seed=1)
        train(model, x, y, steps=60, rate=0.03)
    return model, DataLoader(TensorDataset(x, y), batch_size=23)  # the last batch is smaller


@pytest.fixture(params=["mlp", "conv"])
def case(request):
    factory, shape = {"mlp": (mlp, (4,)), "conv": (conv, (1, 5, 5))}[request.param]
    return *make_case(factory, shape), shape


def methods(model):
    quiet = {"progress": False}
    return [
        MAP(model, **quiet),
        TemperatureScaling(model, **quiet),
        LastLayerLaplace(model, structure="full", **quiet),
        LastLayerLaplace(model, structure="kron", **quiet),
        KroneckerLaplace(model, **quiet),
        NystromLaplace(model, rank=5, subsample=20, **quiet),
    ]


def at_precision(method, precision):
    method.hyperparameters = replace(method.hyperparameters, prior_precision=precision)
    return method


def laplace_of(model, loader, **settings):
    """laplace-torch, fitted the plain way on a copy."""
    from laplace import Laplace

    laplace = Laplace(copy.deepcopy(model), "classification", **settings)
    laplace.fit(loader)
    return laplace


def jacobians_of(laplace, x):
    backend = laplace.backend
    compute = backend.last_layer_jacobians if backend.last_layer else backend.jacobians
    return compute(x)[0]


def assert_same_covariances(method, laplace, x, tolerance=1e-8):
    jacobians = jacobians_of(laplace, x)
    for precision in PRECISIONS:
        laplace.prior_precision = precision
        if hasattr(laplace, "_refresh_posterior"):
            laplace._refresh_posterior()
        expected = laplace.functional_variance(jacobians)
        mean, covariance = at_precision(method, precision).logits(x)
        scale = expected.abs().max()
        torch.testing.assert_close(covariance / scale, expected / scale, rtol=0, atol=tolerance)
        torch.testing.assert_close(mean, laplace.model.eval()(x).detach())


@pytest.mark.parametrize("structure", ["full", "kron"])
@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_equals_laplace_torch(structure, bias):
    from laplace.curvature import BackPackGGN

    model, loader = make_case(conv, (1, 5, 5), bias=bias)
    method = LastLayerLaplace(model, structure=structure, progress=False).fit(loader)
    laplace = laplace_of(
        model,
        loader,
        subset_of_weights="last_layer",
        hessian_structure=structure,
        backend=BackPackGGN,
    )
    assert_same_covariances(method, laplace, make_data((1, 5, 5), 7, seed=2)[0])


def test_last_layer_in_chunks(monkeypatch):
    model, loader = make_case(mlp, (4,))
    method = LastLayerLaplace(model, structure="full", progress=False).fit(loader)
    x, _ = make_data((4,), 7, seed=2)
    whole = method.logits(x)
    monkeypatch.setattr("ella.baselines.last_layer.CHUNK_BYTES", 1)
    torch.testing.assert_close(method.logits(x), whole)


def test_kronecker_equals_laplace_torch(case):
    from laplace.curvature import CurvlinopsGGN

    model, loader, shape = case
    # A budget of two Jacobians, so that several chunks are joined.
    p = sum(parameter.numel() for parameter in model.parameters())
    budget = 2 * 2 * CLASSES * p * 8
    method = KroneckerLaplace(model, progress=False, memory_budget=budget).fit(loader)
    x, _ = make_data(shape, 7, seed=2)
    assert len(list(method._linearized.jacobian_chunks(x))) == 4
    frozen = copy.deepcopy(model)
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    laplace = laplace_of(
        frozen, loader, subset_of_weights="all", hessian_structure="kron", backend=CurvlinopsGGN
    )
    assert_same_covariances(method, laplace, x)


def test_kronecker_covers_plain_layers_only():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
            self.norm = nn.LayerNorm(4)
            self.fixed = nn.Linear(4, 4)
            self.fixed.bias.requires_grad_(False)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            x = x.unsqueeze(1)
            return self.head(self.fixed(self.norm(self.attention(x, x, x)[0])).squeeze(1))

    model, loader = make_case(Odd, (4,))
    method = KroneckerLaplace(model, progress=False).fit(loader)
    assert [block.name for block in method._blocks] == ["head.weight", "head.bias"]
    # With one layer covered it is last-layer Laplace with Kronecker factors.
    last = LastLayerLaplace(model, structure="kron", progress=False).fit(loader)
    x, _ = make_data((4,), 5, seed=2)
    torch.testing.assert_close(method.logits(x), last.logits(x))


def test_kronecker_calibrates_with_exact_covariances():
    model, loader = make_case(mlp, (4,))
    method = KroneckerLaplace(model, progress=False).fit(loader)
    x, y = make_data((4,), 30, seed=3)
    evaluation, _ = method._evaluate_loader(
        method._batches([(x[:11], y[:11]), (x[11:], y[11:])]), MonteCarlo()
    )
    grid = method._precisions(evaluation, evaluation.prior_variance())
    for precision in grid:
        cached = evaluation.gaussian(precision).covariance()
        torch.testing.assert_close(cached, at_precision(method, precision).logits(x)[1])
    with pytest.raises(ValueError, match="Not evaluated"):
        evaluation.gaussian(grid[0] * 1.3)


def test_nystrom_equals_laplace_torch(case):
    from laplace.curvature import CurvlinopsGGN

    model, loader, shape = case
    method = NystromLaplace(model, rank=5, subsample=20, seed=3, progress=False).fit(loader)
    laplace = laplace_of(
        model,
        loader,
        subset_of_weights="all",
        hessian_structure="gp",
        functional_approximation="nystrom",
        subsample_size=20,
        n_eigenvalues=5,
        seed=3,
        backend=CurvlinopsGGN,
    )
    assert_same_covariances(method, laplace, make_data(shape, 7, seed=2)[0])


def test_map_and_temperature_scaling():
    model, loader = make_case(mlp, (4,))
    x, y = make_data((4,), 200, seed=3)
    logits = model(x).detach()
    assert MAP(model).fit(loader).calibrate(None).predict_proba(x).sub(
        logits.softmax(-1)
    ).abs().max() == pytest.approx(0, abs=1e-12)
    method = TemperatureScaling(model, progress=False).fit(loader)
    torch.testing.assert_close(method.predict_proba(x), logits.softmax(-1))
    scale = method.calibrate([(x, y)]).hyperparameters.logit_temperature
    probs = method.predict_proba(x)
    torch.testing.assert_close(probs, (logits / scale).softmax(-1))
    grid = [nn.functional.cross_entropy(logits / t, y) for t in torch.linspace(0.3, 5, 400)]
    # The hyperprior has its say: less than a nat over 200 examples.
    assert negative_log_likelihood(probs, y) <= min(grid) + 1 / 200
    assert scale > 1.1  # the labels are noisy: an over-confident model


def test_map_works_without_trainable_parameters():
    model, loader = make_case(mlp, (4,))
    model.requires_grad_(False)
    x, _ = make_data((4,), 5, seed=3)
    torch.testing.assert_close(MAP(model).fit(loader).predict_proba(x), model(x).softmax(-1))


@pytest.mark.filterwarnings("ignore:calibrate. ")
def test_calibrate_is_never_worse_than_map_or_temperature_scaling(case):
    model, loader, shape = case
    x, y = make_data(shape, 120, seed=4)
    validation = [(x[:50], y[:50]), (x[50:], y[50:])]
    scores = []
    for method in methods(model):
        method.fit(loader).calibrate(validation, link="probit")
        scores.append(negative_log_likelihood(method.predict_proba(x, link="probit"), y))
    plain, scaled, *rest = scores
    assert scaled < plain
    # Up to what the hyperprior is worth, less than a nat in all.
    assert max(rest) <= scaled + 1 / 120


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modules = [
        (m.training, sorted(vars(m)), len(m._forward_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    return state, flags, modules, torch.get_rng_state()


def assert_unchanged(model, before):
    state, flags, modules, rng = snapshot(model)
    assert all(torch.equal(value, before[0][name]) for name, value in state.items())
    assert (flags, modules) == (before[1], before[2])
    assert torch.equal(rng, before[3])


@pytest.mark.filterwarnings("ignore:calibrate. ")
def test_model_and_random_state_are_untouched():
    model, loader = make_case(conv, (1, 5, 5))
    x, y = make_data((1, 5, 5), 12, seed=4)
    data = list(loader)  # a DataLoader itself draws a seed from the global generator
    model.train()
    model[0].eval()  # mixed modes come back as they were
    before = snapshot(model)
    for method in methods(model):
        method.fit(data).calibrate([(x, y)])
        method.predict_proba(x)
        method.uncertainty(x)
        assert_unchanged(model, before)
        # The methods without a fit look at the first batch only.
        bad = [*data, (x * torch.nan, y)][0 if method.state_bytes else -1 :]
        with pytest.raises(ValueError, match="NaN"):
            method.fit(bad)
        assert_unchanged(model, before)


def broken(*args, **kwargs):
    raise RuntimeError("broken backend")


@pytest.mark.parametrize("index", [2, 3, 4, 5])
def test_failed_fit_leaves_the_method_usable(index, monkeypatch):
    model, loader = make_case(conv, (1, 5, 5))
    data = list(loader)
    x, y = make_data((1, 5, 5), 12, seed=4)
    method = methods(model)[index].fit(data)
    probs, before = method.predict_proba(x), snapshot(model)
    import laplace.baselaplace
    from laplace.curvature import BackPackGGN, CurvlinopsGGN

    with monkeypatch.context() as patch:
        for backend in (BackPackGGN, CurvlinopsGGN):
            patch.setattr(backend, "kron", broken)
            patch.setattr(backend, "full", broken)
        patch.setattr(laplace.baselaplace.ELLA, "_features", broken)
        with pytest.raises(RuntimeError, match="broken backend"):
            method.fit(data[:2])
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="Class labels"):
        method.calibrate([(x, y + 5)])
    torch.testing.assert_close(method.predict_proba(x), probs)


def test_exit_inside_laplace_torch_becomes_an_error(monkeypatch):
    model, loader = make_case(mlp, (4,))
    monkeypatch.setattr("laplace.utils.matrix.symeig", lambda matrix: sys.exit())
    with pytest.raises(RuntimeError, match="eigendecompose"):
        KroneckerLaplace(model, progress=False).fit(loader)


def test_not_fitted():
    x, y = make_data((4,), 5, seed=0)
    for method in methods(mlp().double()):
        with pytest.raises(NotFittedError, match=type(method).__name__):
            method.predict_proba(x)
        with pytest.raises(NotFittedError):
            method.calibrate([(x, y)])
        assert method.state_bytes == 0


def test_state_bytes_and_prior_precision():
    model, loader = make_case(mlp, (4,))
    d, c, p = 7, CLASSES, 51
    method = LastLayerLaplace(model, structure="full", prior_precision=3, progress=False)
    assert method.fit(loader).state_bytes == 8 * ((d * c) ** 2 + d * c)
    assert method.hyperparameters.prior_precision == 3
    nystrom = NystromLaplace(model, rank=5, subsample=20, progress=False).fit(loader)
    assert nystrom.state_bytes == 8 * (5 * p + 5)


def test_last_layer_takes_mappings():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, left, right):
            return self.net(torch.cat([left, right], 1))

    model, loader = make_case(mlp, (4,))
    pair = Pair().double()
    pair.net.load_state_dict(model.state_dict())
    batches = [{"left": x[:, :1], "right": x[:, 1:], "labels": y} for x, y in loader]
    x, _ = make_data((4,), 5, seed=3)
    got = LastLayerLaplace(pair, progress=False).fit(batches)
    expected = LastLayerLaplace(model, progress=False).fit(loader)
    torch.testing.assert_close(
        got.logits({"left": x[:, :1], "right": x[:, 1:]}), expected.logits(x)
    )
    with pytest.raises(TypeError, match="one tensor"):
        KroneckerLaplace(pair, progress=False).fit(batches)


def test_bad_arguments():
    model, loader = make_case(mlp, (4,))
    data = list(loader)
    with pytest.raises(ValueError, match="`structure`"):
        LastLayerLaplace(model, structure="diag")
    with pytest.raises(ValueError, match="`prior_precision`"):
        KroneckerLaplace(model, prior_precision=0)
    with pytest.raises(ValueError, match="`rank`"):
        NystromLaplace(model, rank=30, subsample=20)
    with pytest.raises(ValueError, match="`subsample` is 2000"):
        NystromLaplace(model, progress=False).fit(data)
    with pytest.raises(TypeError, match=r"is an iterator .*can be used once only"):
        KroneckerLaplace(model, progress=False).fit(iter(data))
    with pytest.raises(ValueError, match=r"nn\.Linear"):
        LastLayerLaplace(nn.Sequential(*model, nn.Tanh()), progress=False).fit(data)
    half = [(x.bfloat16(), y) for x, y in data]
    with pytest.raises(TypeError, match="float32 or float64"):
        KroneckerLaplace(copy.deepcopy(model).bfloat16(), progress=False).fit(half)
    for method in methods(model):
        with pytest.raises(ValueError, match=r"0\.\.2"):
            method.fit([(x, y + 1) for x, y in data])


def test_last_layer_works_in_bfloat16():
    model, loader = make_case(mlp, (4,))
    x, y = next(iter(loader))
    method = LastLayerLaplace(copy.deepcopy(model).bfloat16(), progress=False)
    probs = method.fit([(x.bfloat16(), y)]).predict_proba(x.bfloat16())
    reference = LastLayerLaplace(model, progress=False).fit([(x, y)]).predict_proba(x)
    torch.testing.assert_close(probs.double(), reference, rtol=0, atol=0.05)


@pytest.mark.parametrize("missing", ["laplace", "backpack"])
def test_missing_extra_is_named(monkeypatch, missing):
    model, loader = make_case(mlp, (4,))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "ella-laplace\[baselines\]"'):
        LastLayerLaplace(model).fit(loader)
    assert MAP(model).fit(loader).state_bytes == 0


def test_a_map_stays_a_map_when_it_is_evaluated_once():
    model, loader = make_case(mlp, (4,))
    x, y = make_data((4,), 200, seed=3)
    known = MAP(model, progress=False).fit(loader).evaluated([(x, y)])
    rows = torch.arange(200)
    before = known.predict_proba(rows)
    assert torch.equal(known.calibrate([(rows, y)]).predict_proba(rows), before)


# Many classes


def dense_last_layer(model, x, rows, precision):
    """S(x) from the Kronecker product itself."""
    body, last = model[:-1], model[-1]

    def inputs(of):
        h = body(of).detach().double()
        return torch.cat([h, torch.ones(len(h), 1, dtype=torch.float64)], 1)

    h, p = inputs(rows), model(rows).detach().double().softmax(-1)
    curvature = sum(torch.diag(each) - torch.outer(each, each) for each in p)
    product = torch.kron(curvature, h.T @ h / len(h))
    eye = torch.eye(last.out_features, dtype=torch.float64)
    jacobians = torch.stack([torch.kron(eye, each.unsqueeze(0)) for each in inputs(x)])
    inverse = torch.linalg.inv(product + precision * torch.eye(len(product)))
    return jacobians @ inverse @ jacobians.mT


@pytest.mark.parametrize("directions", [2, 7, 20])
def test_a_kronecker_last_layer_is_the_inverse_of_the_product(directions):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 7))
    x, y = torch.randn(30, 4), torch.randint(7, (30,))
    method = LastLayerKronecker(model, directions=directions, prior_precision=0.4, progress=False)
    method.fit([(x[:20], y[:20]), (x[20:], y[20:])])
    expected = dense_last_layer(model, x[:6], x, 0.4)
    found = method.gaussian(x[:6])
    torch.testing.assert_close(
        found.variance().double(), expected.diagonal(dim1=1, dim2=2), rtol=1e-4, atol=1e-5
    )
    assert found.factor.shape == (6, 7, min(directions, 7))
    if directions >= 7:
        torch.testing.assert_close(found.covariance().double(), expected, rtol=1e-4, atol=1e-5)
    prior = method.evaluated([x]).evaluation
    dense = dense_last_layer(model, x, x, 1e9).diagonal(dim1=1, dim2=2).mean() * 1e9
    assert prior.prior_variance() == pytest.approx(dense.item(), rel=1e-4)
    again = type(prior).joined([prior.rows(slice(4)), prior.rows(slice(4, None))])
    torch.testing.assert_close(again.gaussian(2.0).variance(), prior.gaussian(2.0).variance())
    assert method.state_bytes == 8 * (6 + 7) + 4 * (36 + 49)


def test_a_kronecker_last_layer_says_what_it_needs():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
    with pytest.raises(NotFittedError):
        LastLayerKronecker(model, progress=False).predict(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"straight from an nn.Linear"):
        LastLayerKronecker(model, progress=False).fit([(torch.randn(9, 4), torch.arange(9) % 3)])
    with pytest.raises(ValueError, match="`directions`"):
        LastLayerKronecker(model, directions=0)
