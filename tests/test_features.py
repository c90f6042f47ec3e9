"""Units and bounds of what eigenfunction methods leave: quick, and by their formulas."""

import math

import pytest
import torch
from cases import loader_of, make_inputs, make_labels, make_model
from reference import dense_jacobian

from ella import ELLA, LastLayer, NeuralEF, Nystrom, Training
from ella.batches import as_batches
from ella.eigenfunctions.residuals import DiagonalResidual
from ella.eigenfunctions.sample import TOP_EIGENVALUE
from ella.linearize import Linearized
from ella.spectral import RBF, Moments, NystromBasis, rayleigh_ritz

X, Y = make_inputs("mlp", 40), make_labels(40)
MODEL = make_model("mlp")
KERNEL = (lambda j: j @ j.mT)(dense_jacobian(MODEL, X)[1])
LONG = Training(steps=300, batch_size=32)


@pytest.fixture(scope="module")
def learned():
    method = NeuralEF(8, num_inputs=40, augment=None, width=32, num_directions=24, teacher=LONG)
    linearized = Linearized(MODEL)
    batches = as_batches(loader_of(X, Y), linearized.network)
    sample = method.sample(linearized, batches, seed=0, progress=False)
    return sample, method.learn(sample, seed=0, progress=False)


def test_the_sample_is_the_kernel_in_units_of_its_largest_eigenvalue(learned):
    sample, _ = learned
    inside = sample.kernel_features / sample.scale
    assert (torch.linalg.eigvalsh(KERNEL - inside @ inside.mT) > -1e-9).all()
    torch.testing.assert_close(sample.diagonal / sample.scale**2, KERNEL.diagonal(dim1=1, dim2=2))
    second = torch.einsum("ncr,ncs->rs", sample.kernel_features, sample.kernel_features) / 40
    assert torch.linalg.eigvalsh(second)[-1].item() == pytest.approx(TOP_EIGENVALUE)
    target = sample.teacher(3).flatten(0, 1)
    leading = torch.linalg.eigvalsh(second).flip(0)[:3]
    torch.testing.assert_close(target.T @ target / 40, torch.diag(leading), rtol=1e-6, atol=1e-8)


def test_learned_features_are_eigenpairs_in_the_units_of_the_kernel(learned):
    """Second moments of φ are the eigenvalues, and their sum nearly the kernel's trace."""
    _, features = learned
    phi = features(X).factor
    second = torch.einsum("nck,ncl->kl", phi, phi) / len(X)
    torch.testing.assert_close(
        second, torch.diag(features.basis.eigenvalues), rtol=1e-4, atol=1e-4 * second.max().item()
    )
    trace = KERNEL.diagonal(dim1=1, dim2=2).sum(1).mean().item()
    assert 0.6 * trace < second.trace().item() < 1.001 * trace


def test_learned_residuals_complete_the_diagonal(learned):
    _, features = learned
    prior = features(X)
    found = prior.variance().log()
    expected = KERNEL.diagonal(dim1=1, dim2=2).log()
    assert (found - expected).abs().mean() < 0.15


def regression(diagonal, phi):
    g = torch.Generator().manual_seed(0)
    reads = torch.randn(len(phi), 3, generator=g, dtype=torch.float64)
    return reads, DiagonalResidual.fitted(
        reads, phi, diagonal, Training(steps=5), 8, generator=g, progress=False
    )


def test_the_diagonal_residual_is_bounded_before_and_after_rescaling():
    """By e times the largest in training, wherever the network goes."""
    g = torch.Generator().manual_seed(1)
    phi = torch.randn(30, 2, 4, generator=g, dtype=torch.float64)
    inside = phi.square().sum(-1)
    outside = 0.1 + torch.rand(30, 2, generator=g, dtype=torch.float64)
    reads, residual = regression(inside + outside, phi)
    most = math.e * outside.max().item()
    huge = torch.full((1, 2), 1e6, dtype=torch.float64)
    torch.testing.assert_close(residual.variances(huge), torch.full_like(huge, most))
    before = residual(reads)
    assert (before > 0).all()
    residual.rescale(0.01)
    torch.testing.assert_close(residual(reads), 0.01 * before, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        residual.variances(huge), torch.full_like(huge, 0.01 * most), rtol=1e-6, atol=0
    )
    assert residual.location.item() == pytest.approx(
        outside.log().mean().item() + math.log(0.01), rel=1e-5
    )


def test_what_is_wholly_inside_leaves_a_floor():
    phi = torch.ones(20, 2, 1, dtype=torch.float64)
    reads, residual = regression(torch.ones(20, 2, dtype=torch.float64), phi)
    torch.testing.assert_close(
        residual(reads), torch.full((20, 2), 1e-3, dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_nystrom_functions_have_unit_norm_and_make_the_kernel():
    """On the landmarks; elsewhere they are the classical extension."""
    g = torch.Generator().manual_seed(0)
    z, x = (torch.randn(n, 2, generator=g, dtype=torch.float64) for n in (9, 4))
    kernel = RBF(1.3)
    basis = NystromBasis.of(kernel, z, 9)
    psi = basis(z)[:, 0]
    torch.testing.assert_close(psi.T @ psi / 9, torch.eye(9).double(), rtol=0, atol=1e-7)
    phi = basis.features(z)[:, 0]
    torch.testing.assert_close(phi @ phi.T, kernel(z, z))
    values = torch.linalg.eigvalsh(kernel(z, z)).flip(0) / 9
    torch.testing.assert_close(basis.eigenvalues, values)
    expected = kernel(x, z) @ torch.linalg.solve(kernel(z, z), kernel(z, x))
    found = basis.features(x)[:, 0]
    torch.testing.assert_close(found @ found.T, expected, rtol=1e-5, atol=1e-7)


def test_ritz_of_a_known_operator():
    g = torch.Generator().manual_seed(0)
    psi = torch.randn(50, 2, 3, generator=g, dtype=torch.float64)
    flat = psi.flatten(0, 1)
    values, axes = torch.tensor([5.0, 2.0, 0.5]).double(), torch.linalg.qr(flat)[0] * 50**0.5
    operator = axes @ torch.diag(values) @ axes.T / 50
    found, mixing = rayleigh_ritz(Moments.of(psi, (operator @ flat).view_as(psi)))
    torch.testing.assert_close(found, values)
    whole = flat @ mixing
    torch.testing.assert_close(whole.T @ whole / 50, torch.eye(3).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("residual", ["diag", "exact", "none"])
def test_products_and_last_layers_complete_the_kernel(residual):
    for method in (LastLayer(residual), Nystrom(4, 30, residual=residual)):
        ella = ELLA(MODEL, eigenfunctions=method, progress=False).fit(loader_of(X, Y))
        prior = ella.features(X)
        inside = prior.factor @ prior.factor.mT
        assert (torch.linalg.eigvalsh(KERNEL - inside) > -1e-9).all()
        if residual == "exact":
            torch.testing.assert_close(prior.covariance(), KERNEL)
        elif residual == "diag":
            torch.testing.assert_close(prior.variance(), KERNEL.diagonal(dim1=1, dim2=2))
        else:
            assert prior.residual is None


def test_last_layers_are_the_kernel_of_their_weights_and_biases():
    """Those of the last layer come last."""
    ella = ELLA(MODEL, eigenfunctions=LastLayer("none"), progress=False).fit(loader_of(X, Y))
    *_, weight, bias = MODEL.parameters()
    jacobian = dense_jacobian(MODEL, X)[1][..., -weight.numel() - bias.numel() :]
    phi = ella.features(X).factor
    torch.testing.assert_close(phi @ phi.mT, jacobian @ jacobian.mT)


def test_products_of_all_outputs_are_the_kernel_on_their_inputs():
    x, y = X[:3], Y[:3]
    rows = dense_jacobian(MODEL, x)[1]
    method = Nystrom(rows.shape[:2].numel(), 3, outputs="all", residual="none")
    ella = ELLA(MODEL, eigenfunctions=method, progress=False).fit(loader_of(x, y))
    phi = ella.features(x).factor.flatten(0, 1)
    torch.testing.assert_close(phi @ phi.mT, rows.flatten(0, 1) @ rows.flatten(0, 1).mT)


def test_seeds_decide_of_samples_and_of_learning():
    method = NeuralEF(4, num_inputs=20, width=8, num_directions=12, teacher=Training(steps=3))
    linearized = Linearized(MODEL)
    batches = as_batches(loader_of(X, Y), linearized.network)
    one, again, other = (
        method.sample(linearized, batches, seed=seed, progress=False) for seed in (1, 1, 2)
    )
    assert torch.equal(one.kernel_features, again.kernel_features)
    assert not torch.equal(one.kernel_features, other.kernel_features)
    first, same, second = (
        method.learn(one, seed=seed, progress=False)(X).factor for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.allclose(first @ first.mT, second @ second.mT)
