"""Baselines with a Gaussian likelihood, against laplace-torch, dense algebra and closed forms."""

import copy
import math
from dataclasses import replace

import pytest
import reference
import torch
from cases import train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ella import ELLA, LastLayer
from ella.baselines import (
    MAP,
    KroneckerLaplace,
    LastLayerLaplace,
    NystromLaplace,
    TemperatureScaling,
)

PRECISIONS = (0.05, 1.0, 30.0)
NOISE_VARIANCE = 0.3
OUTPUTS = 2
QUIET = {"likelihood": "regression", "progress": False}


def make_data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, OUTPUTS, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], 1) + 0.4 * noise


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, OUTPUTS)).double()
    x, y = make_data(60, seed=1)
    train(model, x, y, steps=60, rate=0.03, loss=nn.functional.mse_loss)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def loader():
    return DataLoader(TensorDataset(*make_data(60, seed=1)), batch_size=23)


def posteriors(model, **settings):
    settings = {**QUIET, **settings}
    return [
        LastLayerLaplace(model, structure="full", **settings),
        LastLayerLaplace(model, structure="kron", **settings),
        KroneckerLaplace(model, **settings),
        NystromLaplace(model, rank=5, subsample=20, seed=3, **settings),
    ]


def covariance_at(method, precision, x):
    method.hyperparameters = replace(method.hyperparameters, prior_precision=precision)
    return method.logits(x)[1]


SETTINGS = [
    {"subset_of_weights": "last_layer", "hessian_structure": "full", "backend": "BackPackGGN"},
    {"subset_of_weights": "last_layer", "hessian_structure": "kron", "backend": "BackPackGGN"},
    {"subset_of_weights": "all", "hessian_structure": "kron", "backend": "CurvlinopsGGN"},
    {
        "subset_of_weights": "all",
        "hessian_structure": "gp",
        "functional_approximation": "nystrom",
        "subsample_size": 20,
        "n_eigenvalues": 5,
        "seed": 3,
        "backend": "CurvlinopsGGN",
    },
]


@pytest.mark.parametrize("index", range(4))
def test_same_covariances_as_laplace_torch(model, loader, index):
    from laplace import Laplace, curvature

    method = posteriors(model, noise_variance=NOISE_VARIANCE)[index].fit(loader)
    settings = dict(SETTINGS[index])
    backend = getattr(curvature, settings.pop("backend"))
    laplace = Laplace(
        copy.deepcopy(model),
        "regression",
        sigma_noise=NOISE_VARIANCE**0.5,
        backend=backend,
        **settings,
    )
    laplace.fit(loader)
    x, _ = make_data(7, seed=2)
    compute = laplace.backend.jacobians
    if laplace.backend.last_layer:
        compute = laplace.backend.last_layer_jacobians
    jacobians = compute(x)[0]
    for precision in PRECISIONS:
        laplace.prior_precision = precision
        if hasattr(laplace, "_refresh_posterior"):
            laplace._refresh_posterior()
        expected = laplace.functional_variance(jacobians)
        torch.testing.assert_close(covariance_at(method, precision, x), expected)


def last_layer_lla(model, x_train, x, precision):
    """Dense linearized Laplace over the weights of the last layer alone."""
    frozen = copy.deepcopy(model)
    frozen[0].requires_grad_(False)
    outputs, jacobian = reference.dense_jacobian(frozen, x_train)
    ggn = reference.dense_ggn(jacobian, reference.gaussian_hessian(outputs, NOISE_VARIANCE))
    return reference.lla_covariance(reference.dense_jacobian(frozen, x)[1], ggn, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_full_last_layer_is_dense_linearized_laplace(model, loader, precision):
    x, _ = make_data(7, seed=2)
    expected = last_layer_lla(model, make_data(60, seed=1)[0], x, precision)
    full = LastLayerLaplace(model, structure="full", noise_variance=NOISE_VARIANCE, **QUIET)
    ours = ELLA(
        model,
        eigenfunctions=LastLayer(),
        residual="none",
        noise_variance=NOISE_VARIANCE,
        **QUIET,
    )
    for method in (full, ours):
        found = covariance_at(method.fit(loader), precision, x)
        torch.testing.assert_close(found, expected)


def test_default_noise_variance_is_the_mean_square_of_the_training_residuals(model, loader):
    x, y = make_data(60, seed=1)
    expected = (model(x) - y).square().mean().item()
    methods = [MAP(model, **QUIET), TemperatureScaling(model, **QUIET), *posteriors(model)]
    for method in methods:
        found = method.fit(loader).hyperparameters.noise_variance
        assert found == pytest.approx(expected)
        torch.testing.assert_close(method.predict(x), model(x).detach())


def gaussian_nll(method, x, y):
    mean, covariance = method.logits(x)
    variance = covariance.diagonal(dim1=1, dim2=2) + method.hyperparameters.noise_variance
    return (0.5 * ((y - mean).square() / variance + (2 * math.pi * variance).log())).sum(1).mean()


@pytest.mark.filterwarnings("ignore:calibrate. ")
def test_calibrate_chooses_the_noise_and_is_never_worse(model, loader):
    x, y = make_data(80, seed=4)
    validation = [(x[:50], y[:50]), (x[50:], y[50:])]
    plain = MAP(model, **QUIET).fit(loader).calibrate(validation)
    scaled = TemperatureScaling(model, **QUIET).fit(loader).calibrate(validation)
    # Without a posterior the best σ² has a closed form.
    best = (model(x) - y).square().mean().item()
    assert scaled.hyperparameters.noise_variance == pytest.approx(best, rel=0.05)
    assert gaussian_nll(scaled, x, y) < gaussian_nll(plain, x, y)
    for method in posteriors(model):
        method.fit(loader).calibrate(validation)
        assert gaussian_nll(method, x, y) <= gaussian_nll(scaled, x, y) + 1e-6


def test_single_precision_and_one_column(loader):
    model = make_model()
    head = nn.Sequential(model, nn.Linear(OUTPUTS, 1).double())
    head[1].weight.data.fill_(1.0)
    x, y = make_data(60, seed=1)
    wide = posteriors(head, noise_variance=NOISE_VARIANCE)
    narrow = posteriors(copy.deepcopy(head).float(), noise_variance=NOISE_VARIANCE)
    for double, single in zip(wide, narrow, strict=True):
        double.fit([(x, y.sum(1))])
        single.fit([(x.float(), y.sum(1))])  # targets keep a dtype and shape of their own
        expected, found = (
            m.logits(x[:5].to(d))[1] for m, d in ((double, torch.float64), (single, torch.float32))
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_bad_arguments(model, loader):
    data = list(loader)
    with pytest.raises(ValueError, match="`noise_variance` is for"):
        LastLayerLaplace(model, noise_variance=0.1)
    with pytest.raises(ValueError, match="`noise_variance` must"):
        MAP(model, noise_variance=0.0, **QUIET)
    for make in (MAP, TemperatureScaling, LastLayerLaplace, KroneckerLaplace):
        for settings in ({}, {"noise_variance": 0.1}):
            method = make(model, **settings, **QUIET)
            with pytest.raises(TypeError, match="floating point"):
                method.fit([(x, y.long()) for x, y in data])
            with pytest.raises(ValueError, match="shape"):
                method.fit([(x, y[:, :1]) for x, y in data])
    with pytest.raises(TypeError, match="used once"):
        LastLayerLaplace(model, **QUIET).fit(iter(data))
