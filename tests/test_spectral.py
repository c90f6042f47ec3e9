"""The spectral core on finite spaces, where every eigenfunction is known (float64)."""

import itertools
import math

import pytest
import torch
from torch import nn

from ella.spectral import (
    RBF,
    Eigenbasis,
    FeatureKernel,
    Graph,
    Moments,
    NestedLoRA,
    NeuralEFObjective,
    Polynomial,
    Regression,
    ResidualMLP,
    Samples,
    SideBySide,
    SpectralLoss,
    TraceObjective,
    Training,
    Views,
    WholeGraph,
    feature_ritz,
    leading_eigenpairs,
    least_squares,
    numerical_eigenpairs,
    rayleigh_ritz,
    train,
)
from ella.spectral.train import _warm_cosine as warm_cosine

N, C, R, K = 9, 2, 7, 4
OBJECTIVES = [NestedLoRA(), NestedLoRA(nested=False), NeuralEFObjective(), TraceObjective()]


def assert_near(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class FiniteSpace:
    """N points, C outputs, κ(x, x') = S(x)S(x')ᵀ: T is the matrix SSᵀ/N on vectors (N·C)."""

    def __init__(self, n=N, seed=0):
        self.n = n
        self.s = normal(n, C, R, seed=seed) * torch.linspace(3, 0.5, R, dtype=torch.float64)
        flat = self.s.flatten(0, 1)
        values, vectors = torch.linalg.eigh(flat @ flat.T / n)
        self.values = values.flip(0)[:R]
        # E‖ψ‖² = (1/N)·Σ ψ² = 1
        self.functions = (vectors.flip(1)[:, :R] * n**0.5).reshape(n, C, R)

    def apply(self, psi):
        return FeatureKernel().apply(self.s, self.s, psi)


@pytest.fixture
def space():
    return FiniteSpace()


# (g) Objectives


def mixed(space, objective, scale=1.0):
    """Exact minimisers on the objective's scale."""
    psi = space.functions[..., :K]
    if isinstance(objective, NestedLoRA):
        return psi * space.values[:K].sqrt()
    return psi * scale


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_gradient_vanishes_at_the_eigenfunctions(space, objective, scale):
    psi = mixed(space, objective, scale)
    gradient = objective.gradient(psi, space.apply(psi), psi)
    torch.testing.assert_close(gradient, torch.zeros_like(psi), rtol=0, atol=1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_gradient_does_not_vanish_elsewhere(space, objective):
    psi = normal(N, C, K, seed=3)
    gradient = objective.gradient(psi, space.apply(psi), psi)
    assert (gradient.flatten(0, 1).norm(dim=0) > 1e-2).all()


def test_only_nesting_cares_about_rotations(space):
    rotation = torch.linalg.qr(normal(K, K))[0]
    psi = mixed(space, NestedLoRA()) @ rotation
    norms = {
        nested: NestedLoRA(nested).gradient(psi, space.apply(psi), psi).norm().item()
        for nested in (True, False)
    }
    assert norms[False] < 1e-10
    assert norms[True] > 1e-2


def derivative(function, at):
    """Central differences, entry by entry."""
    out, step = torch.zeros_like(at), 1e-5
    for index in itertools.product(*map(range, at.shape)):
        up, down = at.clone(), at.clone()
        up[index] += step
        down[index] -= step
        out[index] = (function(up) - function(down)) / (2 * step)
    return out


@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=repr)
def test_gradient_is_the_derivative_of_the_loss(space, objective):
    psi = normal(N, C, 3, seed=1)

    def loss(psi):
        return objective.loss(psi, space.apply(psi), psi)

    assert_near(objective.gradient(psi, space.apply(psi), psi), derivative(loss, psi), 1e-6)


def test_neuralef_gradient_is_the_derivative_with_earlier_columns_fixed(space):
    objective, psi = NeuralEFObjective(), normal(N, C, 3, seed=1)
    gradient = objective.gradient(psi, space.apply(psi), psi)
    for j in range(3):

        def loss(column, j=j):
            both = torch.cat([psi[..., :j], column], dim=-1)
            return objective.loss(both, space.apply(both), both)

        assert_near(gradient[..., j : j + 1], derivative(loss, psi[..., j : j + 1]), 1e-6)


@pytest.mark.parametrize("nested", [True, False])
def test_nested_lora_half_batches_are_unbiased(nested):
    """The mean over every pair of independent half-batches of two, by enumeration."""
    n = 4
    space, objective = FiniteSpace(n), NestedLoRA(nested)
    psi = normal(n, C, 3, seed=4)
    full = objective.gradient(psi, space.apply(psi), psi)
    total, count = torch.zeros_like(psi), 0
    halves = [torch.tensor(half) for half in itertools.product(range(n), repeat=2)]
    for one, other in itertools.product(halves, halves):
        tpsi = FeatureKernel().apply(space.s[one], space.s[other], psi[other])
        total.index_add_(0, one, objective.gradient(psi[one], tpsi, psi[other]))
        count += 1
    assert_near(total / count, full, 1e-12)


def test_nested_lora_loss_is_the_distance_to_the_operator():
    """With v = 1 the loss is ‖T − ψψᵀ‖² − ‖T‖² in the Hilbert-Schmidt norm."""
    space, psi = FiniteSpace(), normal(N, C, 3)
    t = space.s.flatten(0, 1) @ space.s.flatten(0, 1).T / N
    low_rank = psi.flatten(0, 1) @ psi.flatten(0, 1).T / N
    expected = (t - low_rank).square().sum() - t.square().sum()
    assert NestedLoRA(nested=False).loss(psi, space.apply(psi), psi) == pytest.approx(
        expected.item(), rel=1e-10
    )


def test_trace_objective_is_its_formula_and_its_gradient(space):
    raw = normal(N, C, K, seed=5).requires_grad_()
    flat, t = raw.flatten(0, 1), space.s.flatten(0, 1) @ space.s.flatten(0, 1).T / N
    value = -torch.linalg.solve(flat.T @ flat, flat.T @ t @ flat).trace()
    objective, psi = TraceObjective(), raw.detach()
    assert objective.loss(psi, space.apply(psi), psi) == pytest.approx(value.item(), rel=1e-5)
    (expected,) = torch.autograd.grad(value, raw)
    found = objective.gradient(psi, space.apply(psi), psi)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_neuralef_does_not_see_the_scale_of_a_function(space):
    objective, psi, other = NeuralEFObjective(), normal(N, C, K), normal(N, C, K, seed=1)
    tpsi, factors = space.apply(other), torch.tensor([5.0, 0.1, 2.0, 1.0]).double()
    scaled = [each * factors for each in (psi, tpsi, other)]
    assert objective.loss(*scaled) == pytest.approx(objective.loss(psi, tpsi, other), rel=1e-12)
    gradient = objective.gradient(psi, tpsi, other)
    assert_near(objective.gradient(*scaled) * factors, gradient)


def test_neuralef_normalises_over_the_whole_batch(space):
    """On two halves the gradient is that through an explicit division by the batch's norms."""
    objective, raw = NeuralEFObjective(), normal(8, C, K, seed=9).requires_grad_()
    problem = Samples(FeatureKernel(), space.s, space.s, generator=torch.Generator())
    psi = raw / (raw.square().sum((0, 1)) / 8).sqrt()
    fixed, total = psi.detach(), torch.zeros_like(psi)
    for rows, sources in problem.pairs(8):
        tpsi = FeatureKernel().apply(space.s[:8][rows], space.s[:8][sources], fixed[sources])
        r = torch.einsum("nci,ncj->ij", fixed[rows], tpsi) / 4
        for j in range(K):
            part = tpsi[..., j] - sum(
                (r[i, j] / r[i, i] if r[i, i] > 0 else 0) * tpsi[..., i] for i in range(j)
            )
            total[rows, :, j] = -2 * part / 4 / 2
    psi.backward(total)
    found = torch.zeros_like(total)
    for rows, sources in problem.pairs(8):
        tpsi = FeatureKernel().apply(space.s[:8][rows], space.s[:8][sources], raw[sources])
        half = objective.gradient(raw[rows], tpsi, raw[sources]) / 2
        found[rows] = half.detach()
    assert_near(found, raw.grad)


# (h) Rayleigh-Ritz


def test_ritz_recovers_the_eigenfunctions_from_any_mix(space):
    mix = normal(K, K, seed=6)
    psi = space.functions[..., :K] @ mix
    values, mixing = rayleigh_ritz(Moments.of(psi, space.apply(psi)))
    assert_near(values, space.values[:K], 1e-8)
    found = psi @ mixing
    signs = torch.einsum("nck,nck->k", found, space.functions[..., :K]).sign()
    assert_near(found * signs, space.functions[..., :K], 1e-8)


def test_ritz_is_orthonormal_and_diagonal_in_any_span(space):
    psi = normal(N, C, K, seed=7)
    values, mixing = rayleigh_ritz(Moments.of(psi, space.apply(psi)))
    found = psi @ mixing
    flat, tflat = found.flatten(0, 1), space.apply(found).flatten(0, 1)
    assert_near(flat.T @ flat / N, torch.eye(K, dtype=torch.float64))
    assert_near(flat.T @ tflat / N, torch.diag(values))
    assert (values <= space.values[:K] + 1e-12).all()  # never above the true ones


def test_ritz_from_features_is_ritz_with_the_whole_operator(space):
    psi = normal(N, C, K, seed=7)
    for found, expected in zip(
        feature_ritz(psi, space.s), rayleigh_ritz(Moments.of(psi, space.apply(psi))), strict=True
    ):
        assert_near(found.abs(), expected.abs())
    assert feature_ritz(psi.float(), space.s.float())[1].dtype == torch.float64


def test_features_of_a_basis_make_the_kernel():
    network, x = nn.Linear(3, K, bias=False).double(), normal(N, C, 3)
    mixing, eigenvalues = normal(K, 3), torch.tensor([2.0, 0.5, -1.0]).double()
    basis = Eigenbasis(network, mixing, eigenvalues)
    slow = basis(x) * torch.tensor([2**0.5, 0.5**0.5, 0.0], dtype=torch.float64)
    assert_near(basis.features(x), slow)
    assert_near(basis.scaled(network(x)).detach(), slow)
    single = basis.to(torch.zeros(1))
    assert single.mixing.dtype == single.eigenvalues.dtype == torch.float32
    assert_near(single.features(x), slow, 1e-6)


def test_ritz_drops_directions_that_add_nothing(space):
    psi = space.functions[..., [0, 1, 0, 2]]
    values, mixing = rayleigh_ritz(Moments.of(psi, space.apply(psi)))
    assert mixing.shape == (4, 3)
    assert_near(values, space.values[:3], 1e-8)


def test_moments_add_up(space):
    psi = normal(N, C, K)
    tpsi = space.apply(psi)
    whole = Moments.of(psi, tpsi)
    parts = Moments.of(psi[:2], tpsi[:2]) + Moments.of(psi[2:], tpsi[2:])
    assert_near(parts.second, whole.second)
    assert_near(parts.kernel, whole.kernel)
    assert parts.num_examples == whole.num_examples == N
    assert Moments.of(psi.float(), tpsi.float()).second.dtype == torch.float64


# Operators


@pytest.mark.parametrize("kernel", [RBF(0.7), Polynomial(3, 1.5)], ids=repr)
def test_kernels_equal_the_dense_sum(kernel):
    x, sources, values = normal(6, 2), normal(5, 2, seed=1), normal(5, C, K, seed=2)

    def k(a, b):
        if isinstance(kernel, RBF):
            return math.exp(-(a - b).square().sum().item() / (2 * 0.7**2))
        return ((a @ b).item() + 1.5) ** 3

    expected = torch.stack(
        [sum(k(a, b) * v for b, v in zip(sources, values, strict=True)) / 5 for a in x]
    )
    assert_near(kernel.apply(x, sources, values), expected)


def test_feature_kernel_equals_the_dense_sum(space):
    sources, values = normal(5, C, R, seed=1), normal(5, C, K, seed=2)
    dense = torch.einsum("ncr,mdr->ncmd", space.s, sources)
    expected = torch.einsum("ncmd,mdk->nck", dense, values) / 5
    assert_near(FeatureKernel().apply(space.s, sources, values), expected)


@pytest.mark.parametrize(
    ("kernel", "x"),
    [
        (RBF(0.7), normal(6, 2)),
        (Polynomial(3, 1.5), normal(6, 2)),
        (FeatureKernel(), normal(6, C, R)),
    ],
    ids=repr,
)
def test_operators_are_linear_self_adjoint_and_positive(kernel, x):
    u, v = normal(6, C, 1, seed=1), normal(6, C, 1, seed=2)
    tu, tv = kernel.apply(x, x, u), kernel.apply(x, x, v)
    assert_near((u * tv).sum(), (tu * v).sum())
    assert_near(kernel.apply(x, x, 2 * u - v), 2 * tu - tv)
    identity = torch.eye(6 * C, dtype=torch.float64).reshape(6, C, 6 * C)
    matrix = kernel.apply(x, x, identity).flatten(0, 1)
    assert torch.linalg.eigvalsh((matrix + matrix.T) / 2).min() >= -1e-10


def test_rbf_has_the_same_derivatives_forward_and_backward():
    x, y = normal(4, 2), normal(5, 2, seed=1)

    def value(shift):
        return RBF(0.8)(x + shift, torch.cat([x, y]))  # at distance 0 as well

    zero = torch.zeros(2, dtype=torch.float64)
    forward = torch.func.jacfwd(value)(zero)
    assert_near(forward, torch.func.jacrev(value)(zero))
    step = 1e-6 * torch.tensor([1.0, 0], dtype=torch.float64)
    assert_near(forward[..., 0], (value(step) - value(-step)) / 2e-6, tolerance=1e-7)


def test_polynomial_has_the_stated_rank():
    x = normal(40, 2)
    gram = Polynomial(3, 1.5)(x, x)
    assert len(numerical_eigenpairs(gram)[0]) == math.comb(2 + 3, 3)


# Gram matrices


def test_leading_eigenpairs():
    root = normal(8, 5)
    gram = root @ root.T
    values, vectors = leading_eigenpairs(gram, 3)
    assert_near(gram @ vectors, vectors * values)
    assert_near(values, torch.linalg.svdvals(root)[:3].square())
    everything, axes = numerical_eigenpairs(gram)
    assert len(everything) == 5
    assert_near(axes * everything @ axes.T, gram)


def test_more_eigenpairs_than_the_matrix_carries():
    root = normal(8, 5)
    with pytest.raises(ValueError, match=r"`rank` is 6, but the 8 sampled rows span only 5"):
        leading_eigenpairs(root @ root.T, 6)


# Losses


def problems(name):
    x, generator = normal(40, 2), torch.Generator().manual_seed(2)
    if name == "samples":
        return Samples(RBF(), x, x, generator=generator)
    if name == "views":
        return Views(
            x,
            lambda z, g: z + torch.randn(z.shape, generator=g, dtype=z.dtype),
            generator=generator,
        )
    return WholeGraph(Graph(torch.randint(40, (2, 90), generator=generator), 40), x.float())


@pytest.mark.parametrize("name", ["samples", "views", "graph"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_gradient_of_a_spectral_loss_is_the_objectives(name, objective):
    """Row by row through the Jacobian of the network."""
    problem = problems(name)
    loss, network = SpectralLoss(problem, objective), make_network(k=3, width=5).eval()
    batch = loss.batch(10, torch.Generator().manual_seed(3))
    network.to(problem.held_out() if name == "views" else getattr(problem, "inputs", normal(1)))
    psi, tpsi = problem.evaluate(network, batch)
    fixed, total = psi.detach(), torch.zeros_like(psi)
    pairs = problem.pairs(len(psi))
    for rows, sources in pairs:
        total[rows] = objective.gradient(fixed[rows], tpsi[rows], fixed[sources]) / len(pairs)
    weight = network.linear.weight
    expected = sum(
        torch.autograd.grad(each, weight, retain_graph=True)[0] * factor
        for each, factor in zip(psi.flatten(), total.flatten(), strict=True)
    )
    (found,) = torch.autograd.grad(loss(network, batch), weight)
    torch.testing.assert_close(found, expected)
    held, theld = problem.evaluate(network, problem.held_out())
    values = [objective.loss(held[a], theld[a], held[b]) for a, b in problem.pairs(len(held))]
    assert loss.held_out(network) == pytest.approx(sum(values) / len(values))


def test_regression_is_the_plain_mean():
    x, y, generator = normal(30, 2), normal(30, 1, 3, seed=1), torch.Generator().manual_seed(4)
    loss, network = Regression(x, y, generator=generator), make_network(k=3).double()
    batch = loss.batch(7, generator)
    for rows, found in ((batch, loss(network, batch).item()), (loss.held, loss.held_out(network))):
        errors = [(network(x[i : i + 1])[0] - y[i]).square().sum().item() for i in rows.tolist()]
        assert found == pytest.approx(sum(errors) / len(rows))


def test_regression_gives_the_criterion_all_targets_of_the_same_examples():
    x, y, z = torch.arange(20.0), torch.arange(20) * 2, torch.arange(20) * 3

    def criterion(outputs, first, second):
        assert torch.equal(first, outputs * 2)
        assert torch.equal(second, outputs * 3)
        return outputs.sum()

    loss = Regression(x, y, z, generator=torch.Generator(), criterion=criterion, holdout=0.25)
    assert loss.held_out(nn.Identity()) == x[loss.held].sum()
    assert loss(nn.Identity(), torch.tensor([3, 1])) == 4
    with pytest.raises(ValueError, match="a row for each of the 20 inputs; got 20, 19"):
        Regression(x, y, z[1:], generator=torch.Generator())


def test_held_out_examples_are_never_in_a_batch(generator):
    x = torch.arange(40.0)
    losses = [
        Regression(x, x, generator=generator, holdout=0.25),
        SpectralLoss(Samples(RBF(), x, x, generator=generator, holdout=0.25), NestedLoRA()),
    ]
    for loss in losses:
        drawn = set(loss.batch(2000, generator).tolist())
        held = loss.held if isinstance(loss, Regression) else loss.problem.held
        assert len(held) == 10
        assert drawn == set(range(40)) - set(held.tolist())


def test_least_squares():
    outputs, targets = normal(3, 2), normal(3, 2, seed=1)
    assert_near(least_squares(outputs, targets), ((outputs - targets) ** 2).sum(1).mean())


# Training


def make_network(k=4, dropout=0.0, width=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ResidualMLP(2, (1, k), width=width, dropout=dropout, generator=generator)


class Scaled(RBF):
    """Ten times the RBF kernel: the scale at which the library trains (`TOP_EIGENVALUE`)."""

    def __call__(self, x, y):
        return 10 * super().__call__(x, y)


@pytest.mark.parametrize("objective", [NestedLoRA(), NeuralEFObjective()], ids=repr)
def test_training_reaches_the_eigenvalues_of_the_gram_matrix(objective, generator):
    # Points on a rectangle: no two of the leading eigenvalues are equal.
    x = (3 * torch.rand(512, 2, generator=generator) - 1.5) * torch.tensor([1.0, 0.7])
    kernel, network = Scaled(), make_network()
    settings = Training(
        steps=2000, batch_size=256, learning_rate=1e-2, weight_decay=0, patience=20
    )
    problem = Samples(kernel, x, x, generator=generator, holdout=0.2)
    loss = SpectralLoss(problem, objective)
    train(network, loss, settings, generator=generator, progress=False)
    with torch.no_grad():
        psi = network(x)
    values, _ = rayleigh_ritz(Moments.of(psi, kernel.apply(x, x, psi)))
    wide = x.double()
    expected = leading_eigenpairs(kernel(wide, wide), 4)[0] / len(x)
    torch.testing.assert_close(values, expected, rtol=0.05, atol=0)


def short_run(generator, seed=0, **settings):
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    network = make_network(k=2, dropout=0.1, width=8)
    chosen = Training(**{"steps": 20, "batch_size": 16, **settings})
    generator = torch.Generator().manual_seed(seed)
    loss = SpectralLoss(Samples(RBF(), x, x, generator=generator), NestedLoRA())
    history = train(network, loss, chosen, generator=generator, progress=False)
    return network, loss, history


def test_training_is_deterministic_and_leaves_the_global_generator_alone(generator):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, _, history = short_run(generator)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(321)  # the global state must not matter either
    second, _, again = short_run(generator)
    other, _, _ = short_run(generator, seed=1)
    assert history == again
    state, twin = first.state_dict(), second.state_dict()
    assert all(torch.equal(state[name], twin[name]) for name in state)
    assert not torch.equal(state["linear.weight"], other.state_dict()["linear.weight"])


def test_training_keeps_the_best_weights(generator):
    # A rate so high that the objective goes up and down.
    network, loss, history = short_run(generator, learning_rate=0.5, steps=40)
    assert min(history) < history[-1]
    assert loss.held_out(network) == pytest.approx(min(history))
    assert not network.training


def test_training_stops_without_progress(generator):
    history = short_run(generator, learning_rate=0.5, steps=400, checks=200, patience=3)[2]
    assert len(history) < 200
    assert all(value >= min(history[:-3]) for value in history[-3:])


def test_training_that_diverges_says_so(generator):
    with pytest.raises(ValueError, match=r"never finite. Lower `learning_rate`"):
        short_run(generator, learning_rate=1e30)


class Steep:
    """A loss whose gradient in its one weight is 50, and whose held-out value is the weight."""

    def __init__(self):
        self.weights = []

    def batch(self, size, generator):
        return None

    def __call__(self, network, batch):
        self.weights.append(network.weight.item())
        return 50 * network.weight.sum()

    def held_out(self, network):
        return network.weight.item()


def steps_of(generator, **settings):
    """How far each step of AdamW went, over the learning rate: with one gradient, the schedule."""
    loss, network = Steep(), nn.Linear(1, 1, bias=False)
    chosen = Training(**{"learning_rate": 1e-3, "weight_decay": 0, "checks": 1, **settings})
    train(network, loss, chosen, generator=generator, progress=False)
    return -torch.tensor([*loss.weights, network.weight.item()]).double().diff() / 1e-3


def test_the_schedule_rises_for_a_share_of_the_steps_and_falls_to_zero(generator):
    found = steps_of(generator, steps=20, warmup=0.3)
    rise = [(i + 1) / 6 for i in range(6)]
    fall = [0.5 * (1 + math.cos(math.pi * i / 14)) for i in range(14)]
    torch.testing.assert_close(found, torch.tensor([*rise, *fall]).double(), rtol=0, atol=1e-3)


def test_by_default_the_schedule_is_that_of_version_0_1(generator):
    for steps in (1, 19, 20, 60, 100, 1500, 99_999, 2_000_000):
        warm = max(1, steps // 20)
        assert warm_cosine(warm - 1, steps, Training().warmup) == 1
        assert warm == 1 or warm_cosine(warm - 2, steps, Training().warmup) < 1
        assert steps == warm or warm_cosine(warm, steps, Training().warmup) == 1


def test_gradients_are_shortened_to_the_clip(generator):
    # AdamW's ε is small against 50 and large against 1e-9.
    whole, short = (steps_of(generator, steps=4, clip=clip) for clip in (1e3, 1e-9))
    assert whole.max() == pytest.approx(1, abs=1e-3)
    assert short.max() == pytest.approx(1e-9 / (1e-9 + 1e-8), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "value"), [("warmup", -0.1), ("warmup", 1.0), ("clip", 0.0), ("clip", math.nan)]
)
def test_settings_of_the_training_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number"):
        Training(**{name: value})


class Unknown:
    """A loss of one weight whose value nobody can tell."""

    def batch(self, size, generator):
        return None

    def __call__(self, network, batch):
        return network.weight.sum()

    def held_out(self, network):
        return math.nan


def test_a_loss_that_was_never_finite_is_refused(generator):
    with pytest.raises(ValueError, match="held-out loss was never finite"):
        train(nn.Linear(1, 1), Unknown(), Training(steps=3), generator=generator, progress=False)


def test_regression_learns_a_linear_map(generator):
    x = torch.randn(200, 3, generator=generator)
    y = x @ torch.randn(3, 2, generator=generator)
    network, loss = nn.Linear(3, 2), Regression(x, y, generator=generator)
    chosen = Training(steps=300, batch_size=32, learning_rate=0.05, weight_decay=0)
    history = train(network, loss, chosen, generator=generator, progress=False)
    assert min(history) < 1e-4
    torch.testing.assert_close(network(x), y, rtol=0, atol=0.05)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_networks_side_by_side_give_what_each_gives(depth, generator):
    x = 3 + 2 * torch.randn(50, 6, generator=generator, dtype=torch.float64)
    settings = (((4, 3), 16, None), ((4,), 7, None), ((2, 1), 30, 5), ((5, 2), 8, 3))
    networks = [
        ResidualMLP(6, shape, width=width, depth=depth, bottleneck=bottleneck, generator=generator)
        for shape, width, bottleneck in settings
    ]
    networks = [network.double().eval() for network in networks]
    for scale, network in enumerate(networks):
        network.standardize(x * (scale + 1))
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    for n in (1, 50):
        together = SideBySide(networks)(x[:n])
        for found, network in zip(together, networks, strict=True):
            torch.testing.assert_close(found, network(x[:n]))


def test_only_networks_that_are_alike_go_side_by_side():
    class Other(ResidualMLP):
        pass

    one = ResidualMLP(3, (2,), width=4)
    assert SideBySide.fitting([one, ResidualMLP(3, (5, 2), width=9)])
    others = [ResidualMLP(2, (2,)), ResidualMLP(3, (2,), depth=1), Other(3, (2,)), nn.ReLU()]
    assert not any(SideBySide.fitting([one, other]) for other in others)
    assert SideBySide.fitting([ResidualMLP(3, (2,), depth=0)]) is None


@pytest.mark.parametrize("n", [1, 2, 3])
def test_training_needs_two_halves(n, generator):
    x = torch.zeros(n, 2)
    with pytest.raises(ValueError, match=f"at least 4 examples; got {n}"):
        Samples(RBF(), x, x, generator=generator)
    with pytest.raises(ValueError, match=f"at least 4 examples; got {n}"):
        Regression(x, x, generator=generator)
    with pytest.raises(ValueError, match=f"at least 4 examples; got {n}"):
        Views(x, lambda z, _: z, generator=generator)


def test_network_standardizes_and_rebuilds():
    network = make_network(k=3, dropout=0.2)
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)) * 5 + 2
    x[:, 1] = 7.0
    network.standardize(x)
    assert network.scale[1] == 1
    twin = ResidualMLP(**network.settings())
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin.eval()(x), network.eval()(x))
    assert network(x).shape == (30, 1, 3)
    linear = ResidualMLP(2, (1, 3), depth=0)
    assert sum(p.numel() for p in linear.parameters()) == 3 * (2 + 1)
    middle = linear((x[:15] + x[15:]) / 2)
    torch.testing.assert_close(middle, (linear(x[:15]) + linear(x[15:])) / 2)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("bottleneck", [None, 5])
@pytest.mark.parametrize("shape", [(7, 3), (7,)])
def test_some_rows_are_those_of_all(depth, bottleneck, shape, generator):
    options = {"width": 8, "depth": depth, "bottleneck": bottleneck, "dropout": 0.0}
    network = ResidualMLP(4, shape, **options, generator=generator).double()
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    rows = torch.randint(7, (20, 3), generator=generator)
    rows[0] = 2  # the same thrice
    seen = torch.full((20, 3, *shape[1:]), torch.nan, dtype=torch.float64)
    gradients = []
    for found in (network.at_rows(x, rows), network(x)):
        network.zero_grad()
        if found.shape[1] == 7:
            every = found
            found = torch.stack([every[i][rows[i]] for i in range(20)])
        else:
            seen = found
        torch.testing.assert_close(seen, found)
        found.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    torch.testing.assert_close(*gradients)
    one = network.at_rows(x[:1], rows[:1])
    torch.testing.assert_close(one, seen[:1])


def test_a_bottleneck_comes_back_and_makes_many_outputs_cheap():
    wide, narrow = ResidualMLP(3, (50, 8)), ResidualMLP(3, (50, 8), bottleneck=16)
    assert sum(p.numel() for p in wide.parameters()) - 2 * 257 * 400 == 256 * 261
    sizes = sum(p.numel() for p in narrow.parameters())
    assert sizes == 256 * 261 + 2 * 257 * 16 + 17 * 400
    twin = ResidualMLP.restore(narrow.settings(), narrow.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(twin.eval()(x), narrow.eval()(x))
    # Files that were written before there were any.
    settings = {name: value for name, value in wide.settings().items() if name != "bottleneck"}
    assert ResidualMLP.restore(settings, wide.state_dict()).bottleneck is None


def test_many_outputs_do_not_make_the_linear_map_most_of_the_network():
    sizes = {}
    for width, depth in ((8, 1), (8, 0)):
        network = ResidualMLP(100, (50, 4), width=width, depth=depth)
        assert network(torch.zeros(3, 100)).shape == (3, 50, 4)
        sizes[depth] = sum(p.numel() for p in network.parameters())
    assert sizes[0] == 101 * 200  # linear means linear
    assert sizes[1] < sizes[0] / 2
