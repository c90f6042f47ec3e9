"""ELLA against dense linearized Laplace (float64): equal, bounded or ordered as theory says."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from cases import loader_of, make_case, make_inputs
from reference import (
    dense_ggn,
    dense_jacobian,
    flat_weights,
    gaussian_hessian,
    lla_covariance,
    lla_evidence,
    smallest_eigenvalue,
    softmax_hessian,
)

from ella import ELLA, LastLayer, Nystrom
from ella.eigenfunctions import JacobianProjection
from ella.linearize import Linearized

MODELS = ("mlp", "conv", "attention", "tuple", "mapping", "frozen")
PRECISIONS = (1e-2, 1.0, 50.0)
NOISE = 0.3
N = 8


def assert_near(actual, expected, tolerance=1e-8):
    """Within `tolerance` of the largest entry."""
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)


class Dense:
    """Dense linearized Laplace of a small model."""

    def __init__(self, name, likelihood="classification"):
        self.name, self.likelihood = name, likelihood
        case = make_case(name, N)
        self.model, self.x, self.y = case.model, case.x, case.y
        logits, self.jacobian = dense_jacobian(self.model, self.x)
        self.p = self.jacobian.shape[-1]
        if likelihood == "classification":
            self.hessian = softmax_hessian(logits)
            self.log_likelihood = logits.log_softmax(-1)[torch.arange(N), self.y].sum().item()
        else:
            noise = torch.randn(
                logits.shape, generator=torch.Generator().manual_seed(9), dtype=logits.dtype
            )
            self.y = logits + NOISE**0.5 * noise
            self.hessian = gaussian_hessian(logits, NOISE)
            normal = torch.distributions.Normal(logits, NOISE**0.5)
            self.log_likelihood = normal.log_prob(self.y).sum().item()
        self.ggn = dense_ggn(self.jacobian, self.hessian)
        self.rank = int(torch.linalg.matrix_rank(self.jacobian.flatten(0, 1)))
        self.test_x = make_inputs(name, 6, seed=77)
        self.test_logits, self.test_jacobian = dense_jacobian(self.model, self.test_x)

    def covariance(self, precision, jacobian=None):
        jacobian = self.test_jacobian if jacobian is None else jacobian
        return lla_covariance(jacobian, self.ggn, precision)

    def fit(self, eigenfunctions=None, *, residual, batch_size=5):
        method = eigenfunctions or Nystrom(rank=self.rank, subsample=N, outputs="all")
        ella = ELLA(
            self.model,
            likelihood=self.likelihood,
            eigenfunctions=method,
            residual=residual,
            prior_precision=1.0,
            noise_variance=NOISE if self.likelihood == "regression" else None,
            progress=False,
        )
        return ella.fit(loader_of(self.x, self.y, batch_size))

    def fit_directions(self, directions, residual):
        return self.fit(GivenDirections(directions), residual=residual)

    def ggn_axes(self):
        """Eigenvectors of the GGN (p, p) as rows, leading first."""
        return torch.linalg.eigh(self.ggn)[1].flip(1).T


@dataclass(frozen=True)
class GivenDirections:
    """A method whose directions are what the test says."""

    directions: torch.Tensor
    residual: str = "diag"

    def fit(self, linearized, loader, *, seed, progress):
        return JacobianProjection(linearized, self.directions, self.residual)


def at(ella, precision):
    ella.hyperparameters = replace(ella.hyperparameters, prior_precision=precision)
    return ella


@pytest.fixture(params=["classification", "regression"])
def likelihood(request):
    return request.param


@pytest.fixture(params=MODELS)
def dense(request, likelihood):
    return Dense(request.param, likelihood)


# (b) Every direction that the data carry


def test_full_rank_equals_dense_laplace(dense):
    ella = dense.fit(residual="exact")
    for precision in PRECISIONS:
        mean, covariance = at(ella, precision).logits(dense.test_x)
        assert_near(mean, dense.test_logits, 1e-12)
        assert_near(covariance, dense.covariance(precision))
        # On the training inputs nothing lies outside the span.
        assert_near(ella.logits(dense.x)[1], dense.covariance(precision, dense.jacobian))


def test_full_rank_without_residual_equals_dense_laplace_on_training_inputs(dense):
    ella = dense.fit(residual="none")
    for precision in PRECISIONS:
        covariance = at(ella, precision).logits(dense.x)[1]
        assert_near(covariance, dense.covariance(precision, dense.jacobian))


def test_full_rank_evidence_equals_dense_laplace(dense):
    ella = dense.fit(residual="none")
    theta = flat_weights(dense.model)
    for precision in PRECISIONS:
        expected = lla_evidence(dense.log_likelihood, theta, dense.ggn, precision)
        assert ella.log_marginal_likelihood(precision) == pytest.approx(expected, rel=1e-8)
    assert ella.log_marginal_likelihood() == ella.log_marginal_likelihood(1.0)


def test_full_rank_variance_and_scores_follow_from_the_covariance(dense):
    diagonal = dense.covariance(1.0).diagonal(dim1=1, dim2=2)
    scores = dense.fit(residual="exact").uncertainty(dense.test_x)
    assert_near(scores.logit_variance, diagonal.mean(-1))
    # "diag" keeps the variances and drops the off-diagonal part of the residual alone.
    covariance = dense.fit(residual="diag").logits(dense.test_x)[1]
    assert_near(covariance.diagonal(dim1=1, dim2=2), diagonal)


def test_noise_variance_is_the_training_mean_square():
    dense = Dense("mlp", "regression")
    ella = ELLA(
        dense.model,
        likelihood="regression",
        eigenfunctions=Nystrom(rank=2, subsample=N),
        progress=False,
    ).fit(loader_of(dense.x, dense.y))
    error = dense.y - dense_jacobian(dense.model, dense.x)[0]
    assert ella.hyperparameters.noise_variance == pytest.approx(error.square().mean().item())


def test_default_prior_precision_gives_logits_a_standard_deviation_of_one():
    dense = Dense("mlp")
    for residual in ("diag", "exact"):
        ella = ELLA(
            dense.model,
            eigenfunctions=Nystrom(rank=2, subsample=N),
            residual=residual,
            progress=False,
        ).fit(loader_of(dense.x, dense.y))
        expected = dense.jacobian.square().sum(-1).mean().item()
        assert ella.hyperparameters.prior_precision == pytest.approx(expected)


# (c) Fewer directions


def test_truncation_without_residual_is_below_dense_and_grows(dense):
    nested = torch.linalg.svd(dense.jacobian.flatten(0, 1), full_matrices=False)[2]
    for precision in PRECISIONS:
        exact = dense.covariance(precision)
        previous = torch.zeros_like(exact)
        for k in (1, 2, 4, dense.rank):
            ella = at(dense.fit_directions(nested[:k], "none"), precision)
            covariance = ella.logits(dense.test_x)[1]
            tolerance = 1e-9 * exact.abs().max().item()
            assert smallest_eigenvalue(exact - covariance) >= -tolerance
            assert smallest_eigenvalue(covariance - previous) >= -tolerance
            previous = covariance


def test_truncation_with_exact_residual_keeps_the_prior_outside(dense):
    for k in (1, 3, dense.rank - 1):
        ella = dense.fit(Nystrom(rank=k, subsample=N, outputs="all"), residual="exact")
        v = ella._fit.eigenfunctions.directions
        torch.testing.assert_close(v @ v.T, torch.eye(k, dtype=v.dtype), rtol=0, atol=1e-8)
        g = v @ dense.ggn @ v.T
        assert_near(ella.curvature, g)
        for precision in PRECISIONS:
            expected = lla_covariance(dense.test_jacobian, v.T @ g @ v, precision)
            covariance = at(ella, precision).logits(dense.test_x)[1]
            assert_near(covariance, expected)
            prior = dense.test_jacobian @ dense.test_jacobian.mT / precision
            tolerance = 1e-9 * prior.abs().max().item()
            assert smallest_eigenvalue(prior - covariance) >= -tolerance


def test_truncation_to_ggn_eigenvectors_with_residual_bounds_dense_from_above(dense):
    axes = dense.ggn_axes()
    for precision in PRECISIONS:
        exact = dense.covariance(precision)
        previous = dense.test_jacobian @ dense.test_jacobian.mT / precision
        tolerance = 1e-9 * previous.abs().max().item()
        for k in (1, 4, dense.rank):
            ella = at(dense.fit_directions(axes[:k], "exact"), precision)
            covariance = ella.logits(dense.test_x)[1]
            assert smallest_eigenvalue(covariance - exact) >= -tolerance
            assert smallest_eigenvalue(previous - covariance) >= -tolerance  # more k, less doubt
            previous = covariance


def test_more_data_never_raises_the_variance():
    dense = Dense("mlp")
    ella = dense.fit(residual="exact")
    before = ella.logits(dense.test_x)[1]
    after = ella.partial_fit(loader_of(dense.x, dense.y)).logits(dense.test_x)[1]
    assert smallest_eigenvalue(before - after) >= -1e-12
    assert (before - after).abs().max() > 1e-3


def test_no_curvature_is_the_prior():
    dense = Dense("mlp")
    ella = dense.fit(residual="exact")
    zero = torch.zeros_like(ella.curvature)
    features = ella.features(dense.test_x)
    posterior = type(ella._fit.posterior).from_curvature(zero)
    prior = posterior.condition(features, 0.5).covariance()
    assert_near(prior, 2 * dense.test_jacobian @ dense.test_jacobian.mT)


def test_nystrom_directions_are_the_leading_ones():
    dense = Dense("mlp")
    ella = dense.fit(Nystrom(rank=4, subsample=N, outputs="all"), residual="none")
    v = ella._fit.eigenfunctions.directions
    leading = torch.linalg.svd(dense.jacobian.flatten(0, 1), full_matrices=False)[2][:4]
    assert_near(v.T @ v, leading.T @ leading)


def test_nystrom_random_outputs_lie_in_the_span_of_single_rows():
    dense = Dense("mlp")
    ella = dense.fit(Nystrom(rank=3, subsample=3), residual="none")
    v = ella._fit.eigenfunctions.directions
    rows = dense.jacobian[:3].flatten(0, 1)
    inside = v @ torch.linalg.pinv(rows) @ rows
    assert_near(inside, v)


# (d) laplace-torch's own ELLA


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_equals_laplace_torch_given_its_directions(name):
    laplace_torch = pytest.importorskip("laplace")
    dense = Dense(name)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(dense.x, dense.y), batch_size=5
    )
    with torch.random.fork_rng():
        laplace = laplace_torch.Laplace(
            copy.deepcopy(dense.model).eval(),
            "classification",
            subset_of_weights="all",
            hessian_structure="gp",
            functional_approximation="nystrom",
            subsample_size=N,
            n_eigenvalues=4,
            seed=0,
        )
        laplace.fit(loader)
    directions = laplace.dual_directions.detach().T.contiguous()
    ella = dense.fit_directions(directions, "none")
    assert_near(ella.curvature, laplace.feature_gram.detach().double(), 1e-6)
    for precision in PRECISIONS:
        laplace.prior_precision = precision
        if hasattr(laplace, "_refresh_posterior"):
            laplace._refresh_posterior()
        expected = laplace.functional_covariance(dense.test_jacobian)
        expected = expected.detach().double()
        if expected.ndim == 2:  # joint over the inputs: keep the blocks of each
            blocks = expected.reshape(6, 3, 6, 3)
            expected = blocks[torch.arange(6), :, torch.arange(6)]
        assert_near(at(ella, precision).logits(dense.test_x)[1], expected, 1e-6)


# (e) Sums


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_curvature_does_not_depend_on_the_batches(likelihood, batch_size):
    dense = Dense("mlp", likelihood)
    whole = dense.fit(residual="none", batch_size=N)
    split = dense.fit(whole_directions(whole), residual="none", batch_size=batch_size)
    assert_near(split.curvature, whole.curvature, 1e-12)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    shuffled = dense.fit(whole_directions(whole), residual="none")
    shuffled.fit(loader_of(dense.x[order], dense.y[order], 3))
    assert_near(shuffled.curvature, whole.curvature, 1e-12)
    assert shuffled.log_marginal_likelihood(2.0) == pytest.approx(
        whole.log_marginal_likelihood(2.0), rel=1e-10
    )


def whole_directions(ella):
    return GivenDirections(ella._fit.eigenfunctions.directions)


def test_partial_fit_adds_up(likelihood):
    dense = Dense("mlp", likelihood)
    whole = dense.fit(residual="diag")
    method = whole_directions(whole)
    first = dense.fit(method, residual="diag").fit(loader_of(dense.x[:3], dense.y[:3]))
    assert_near(first.curvature, dense_part(dense, first, slice(3)))
    both = first.partial_fit(loader_of(dense.x[3:], dense.y[3:]))
    assert_near(both.curvature, whole.curvature, 1e-12)
    assert both.log_marginal_likelihood() == pytest.approx(
        whole.log_marginal_likelihood(), rel=1e-10
    )
    assert_near(both.logits(dense.test_x)[1], whole.logits(dense.test_x)[1], 1e-10)


def dense_part(dense, ella, part):
    v = ella._fit.eigenfunctions.directions
    return v @ dense_ggn(dense.jacobian[part], dense.hessian[part]) @ v.T


# (f) Residuals


@pytest.mark.parametrize("method", [Nystrom(rank=3, subsample=N), LastLayer()], ids=repr)
@pytest.mark.parametrize("name", ["mlp", "conv", "mapping"])
@pytest.mark.parametrize("budget", [1, 2**30])
def test_residual_completes_the_kernel(name, method, budget):
    dense = Dense(name)
    kernel = dense.test_jacobian @ dense.test_jacobian.mT
    for residual in ("diag", "exact", "none"):
        ella = ELLA(
            dense.model,
            eigenfunctions=method,
            residual=residual,
            progress=False,
            memory_budget=2**30,
        ).fit(loader_of(dense.x, dense.y))
        ella._fit.eigenfunctions.linearized.memory_budget = budget
        prior = ella.features(dense.test_x)
        logits, phi, outside = prior.mean, prior.factor, prior.residual
        assert_near(logits, dense.test_logits, 1e-12)
        inside = phi @ phi.mT
        if residual == "none":
            assert outside is None
            assert smallest_eigenvalue(kernel - inside) >= -1e-9
        elif residual == "exact":
            assert_near(inside + outside, kernel, 1e-10)
        else:
            diagonal = inside.diagonal(dim1=1, dim2=2) + outside
            assert_near(diagonal, kernel.diagonal(dim1=1, dim2=2), 1e-10)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", ["mlp", "conv", "attention", "tuple", "mapping"])
def test_last_layer_equals_the_dense_last_layer_block(name, bias):
    dense = Dense(name)
    head = next(m for m in reversed(list(dense.model.modules())) if hasattr(m, "out_features"))
    if not bias:
        head.bias.requires_grad_(False)
    only = copy.deepcopy(dense.model).requires_grad_(False)
    twin = next(m for m in reversed(list(only.modules())) if hasattr(m, "out_features"))
    twin.weight.requires_grad_(True)
    twin.bias.requires_grad_(bias)
    logits, jacobian = dense_jacobian(only, dense.x)
    ggn = dense_ggn(jacobian, softmax_hessian(logits))
    _, test_jacobian = dense_jacobian(only, dense.test_x)
    ella = dense.fit(LastLayer(), residual="none")
    phi = ella.features(dense.test_x).factor
    assert_near(phi @ phi.mT, test_jacobian @ test_jacobian.mT, 1e-10)
    for precision in PRECISIONS:
        covariance = at(ella, precision).logits(dense.test_x)[1]
        assert_near(covariance, lla_covariance(test_jacobian, ggn, precision))


def test_projection_takes_either_route_to_the_same_features():
    dense = Dense("mlp")
    linearized = Linearized(dense.model)
    for k in (2, 5):  # products below c = 3, Jacobians above
        v = dense.ggn_axes()[:k]
        phi = JacobianProjection(linearized, v, "none")(dense.test_x).factor
        assert_near(phi, dense.test_jacobian @ v.T, 1e-12)
