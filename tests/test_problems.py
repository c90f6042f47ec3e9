"""Operators where they meet data: graphs, views, populations, differential operators."""

import math

import pytest
import torch
from torch import nn

from ella.spectral import (
    RBF,
    FeatureKernel,
    Graph,
    Jet,
    LinearHead,
    NestedLoRA,
    ParallelMLP,
    Population,
    Samples,
    Schrodinger,
    SpectralLoss,
    Training,
    Views,
    WholeGraph,
    learn_eigenbasis,
    ritz_basis,
    ritz_head,
    train,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def largest_angle(left, right):
    """Degrees between two subspaces given by orthonormal columns."""
    smallest = torch.linalg.svdvals(left.T @ right).min().clamp(-1, 1)
    return math.degrees(math.acos(smallest.item()))


# The forward Laplacian


def smooth(x):
    return torch.stack([x[:, 0] ** 2 * x[:, 1].sin(), (x.square().sum(1) + 1).sqrt()], 1)


def by_autograd(function, x):
    """Gradient and Laplacian from dense Hessians, a point at a time."""
    gradients, laplacians = [], []
    for point in x:
        jac, lap = [], []
        for j in range(function(x[:1]).flatten().numel()):

            def scalar(p, j=j):
                return function(p[None]).flatten()[j]

            jac.append(torch.autograd.functional.jacobian(scalar, point))
            lap.append(torch.autograd.functional.hessian(scalar, point).trace())
        gradients.append(torch.stack(jac, 1))
        laplacians.append(torch.stack(lap))
    return torch.stack(gradients, 1), torch.stack(laplacians)


def test_jet_of_a_function_is_its_dense_derivatives():
    x = torch.randn(4, 3, generator=seeded(), dtype=torch.float64)
    jet = Jet.of(smooth, x)
    gradient, laplacian = by_autograd(smooth, x)
    torch.testing.assert_close(jet.value, smooth(x))
    torch.testing.assert_close(jet.gradient, gradient)
    torch.testing.assert_close(jet.laplacian, laplacian)


@pytest.mark.parametrize("activation", [torch.sin, nn.functional.silu, torch.tanh])
@pytest.mark.parametrize("dressed", [False, True])
def test_jet_of_a_network_is_its_dense_derivatives(activation, dressed):
    extra = {}
    if dressed:
        extra = {"features": smooth, "envelope": lambda x: (-0.3 * x.square().sum(1)).exp()}
    network = ParallelMLP(3, 2, width=5, activation=activation, generator=seeded(), **extra)
    network.double()
    x = torch.randn(4, 3, generator=seeded(1), dtype=torch.float64)
    jet = network.jet(x)
    gradient, laplacian = by_autograd(network, x)
    torch.testing.assert_close(jet.value, network(x))
    torch.testing.assert_close(jet.gradient.flatten(2), gradient)
    torch.testing.assert_close(jet.laplacian.flatten(1), laplacian)


def test_parallel_networks_are_separate():
    network = ParallelMLP(2, 3, generator=seeded())
    x = torch.randn(5, 2, generator=seeded())
    network(x)[..., 1].sum().backward()
    used = [(weight.grad.flatten(1) != 0).any(1).tolist() for weight in network.weights]
    assert used == [[False, True, False]] * 3


# Graphs

EDGES = torch.tensor([[0, 1, 1, 3, 2, 2], [1, 0, 2, 1, 2, 4]])  # one repetition, one loop
DENSE = torch.zeros(6, 6)  # node 5 has no edge
for i, j in ((0, 1), (1, 2), (1, 3), (2, 4)):
    DENSE[i, j] = DENSE[j, i] = 1


def normalised(adjacency):
    root = adjacency.sum(1).clamp_min(1e-12).rsqrt() * (adjacency.sum(1) > 0)
    return root[:, None] * adjacency * root


def test_graph_is_the_normalised_adjacency():
    graph = Graph(EDGES, 6)
    torch.testing.assert_close(graph.matrix.to_dense(), normalised(DENSE))
    weighted = Graph(EDGES, 6, torch.tensor([1.0, 2, 3, 1, 9, 1]))
    dense = DENSE.clone()
    dense[0, 1] = dense[1, 0] = 2
    dense[1, 2] = dense[2, 1] = 3
    torch.testing.assert_close(weighted.matrix.to_dense(), normalised(dense))


def test_graph_integral_over_all_nodes_is_the_matrix_product():
    graph, psi, nodes = Graph(EDGES, 6), torch.randn(6, 1, 2, generator=seeded()), torch.arange(6)
    expected = (normalised(DENSE) @ psi[:, 0]).unsqueeze(1)
    torch.testing.assert_close(graph.apply(nodes, nodes, psi), expected)
    some = torch.tensor([4, 1])
    torch.testing.assert_close(graph.apply(some, nodes, psi), expected[some])
    # Over blocks of sources that divide the nodes, the mean of the estimates is the integral.
    blocks = [graph.apply(some, part, psi[part]) for part in nodes.split(3)]
    torch.testing.assert_close(sum(blocks) / 2, expected[some])
    whole = WholeGraph(graph, psi.flatten(1))
    network = nn.Unflatten(1, (1, 2))
    torch.testing.assert_close(whole.evaluate(network, whole.batch(0, seeded()))[1], expected)


def test_bad_graphs_are_refused():
    with pytest.raises(ValueError, match=r"`edges` must hold node indices in \[0, 3\)"):
        Graph(EDGES, 3)
    with pytest.raises(ValueError, match="`weights` must be at least 0"):
        Graph(EDGES, 6, -torch.ones(6))
    with pytest.raises(ValueError, match="a row for each of the 6 nodes; got 5"):
        WholeGraph(Graph(EDGES, 6), torch.zeros(5, 1))


# Views


class Table(nn.Module):
    """One free value for every state and function."""

    def __init__(self, num_states, k):
        super().__init__()
        self.values = nn.Parameter(0.3 * torch.randn(num_states, 1, k, generator=seeded()))

    def forward(self, states):
        return self.values[states]


def test_views_reach_the_eigenfunctions_of_a_finite_augmentation_graph():
    num_examples, num_states, k = 60, 24, 3  # a gap follows the third eigenvalue
    # Examples in three clusters, with views mostly within their own.
    logits = torch.randn(num_examples, num_states, generator=seeded()) * 1.5
    cluster = torch.arange(num_examples) % 3
    logits += 3.0 * (cluster[:, None] == torch.arange(num_states) % 3)
    given = logits.double().softmax(1)  # p(view | example)
    joint = given.T @ given / num_examples
    root = joint.sum(1).sqrt()
    values, vectors = torch.linalg.eigh(joint / (root[:, None] * root))
    exact = vectors.flip(1)[:, :k]

    def augment(examples, generator):
        return torch.multinomial(given[examples], 1, generator=generator).squeeze(1)

    problem = Views(torch.arange(num_examples), augment, generator=seeded(), holdout=0.05)
    # All examples take part in the law that is tested.
    problem.pool = torch.arange(num_examples)
    network = Table(num_states, k)
    training = Training(
        steps=1500, batch_size=1024, learning_rate=2e-2, weight_decay=0, patience=99
    )
    basis = learn_eigenbasis(network, problem, training, generator=seeded(), progress=False)
    learned = basis(torch.arange(num_states))[:, 0].double() * root[:, None]
    assert largest_angle(torch.linalg.qr(learned).Q, exact) < 5
    torch.testing.assert_close(basis.eigenvalues, values.flip(0)[:k], atol=0.02, rtol=0)
    assert basis.eigenvalues[0] == pytest.approx(1, abs=0.01)  # the constant


@pytest.mark.parametrize("size", [8, 10, 14])
def test_views_of_one_example_are_never_each_others_source(size):
    problem = Views(torch.arange(30.0), lambda x, _: x, generator=seeded())
    batch = problem.batch(size, seeded(1))
    psi, tpsi = problem.evaluate(lambda x: x[:, None, None], batch)
    assert torch.equal(psi, tpsi)  # views that change nothing: Tψ = ψ, row for row
    for pair in problem.pairs(len(psi)):
        half = psi[pair.rows].flatten()
        assert torch.equal(*half.view(2, -1))  # both views of the same examples


# Populations


def test_a_population_integrates_either_half_over_the_other():
    problem = Population(RBF(), lambda n, g: torch.randn(n, 2, generator=g), generator=seeded())
    x = problem.batch(6, seeded(1))
    network = ParallelMLP(2, 2, generator=seeded())
    psi, tpsi = problem.evaluate(network, x)
    kernel = RBF()(x, x)
    torch.testing.assert_close(tpsi[:3, 0], kernel[:3, 3:] @ psi[3:, 0] / 3)
    torch.testing.assert_close(tpsi[3:, 0], kernel[3:, :3] @ psi[:3, 0] / 3)
    assert psi.requires_grad
    assert not tpsi.requires_grad
    assert not torch.equal(x, problem.batch(6, seeded(2)))


def test_the_basis_is_orthonormal_and_ordered():
    problem = Population(RBF(), lambda n, g: torch.randn(n, 1, generator=g), generator=seeded())
    network = ParallelMLP(1, 3, generator=seeded())
    basis = ritz_basis(network, problem, seeded(1), num_batches=8)
    values = basis(torch.randn(20000, 1, generator=seeded(2)))[:, 0]
    torch.testing.assert_close(values.T @ values / 20000, torch.eye(3), atol=0.1, rtol=0)
    assert (basis.eigenvalues.diff() < 0).all()
    x = torch.zeros(1, 1)
    torch.testing.assert_close(basis.features(x), basis(x) * basis.eigenvalues.sqrt().float())
    with pytest.raises(ValueError, match="`num_batches` must be at least 1"):
        ritz_basis(network, problem, seeded(), num_batches=0)


# Differential operators


class Known(nn.Module):
    """Eigenfunctions of the oscillator: Hermite functions of degrees 0 and 1 in each axis."""

    def forward(self, x):
        bell = (-x.square().sum(1) / 2).exp()
        return torch.stack([bell, x[:, 0] * bell, x[:, 0] * x[:, 1] * bell], 1).unsqueeze(1)

    def jet(self, x):
        return Jet.of(self, x)


def oscillator(dim, **options):
    law = torch.distributions.Normal(0.0, 1.2)
    return Schrodinger(
        potential=lambda x: x.square().sum(1),
        draw=lambda n, g: 1.2 * torch.randn(n, dim, generator=g),
        density=lambda x: law.log_prob(x).sum(1).exp(),
        generator=seeded(),
        **options,
    )


def test_bound_states_are_eigenfunctions_at_every_point():
    problem = oscillator(2, shift=10.0, scale=3.0)
    psi, tpsi = problem.evaluate(Known(), problem.batch(50, seeded(1)))
    energies = torch.tensor([2.0, 4, 6])
    torch.testing.assert_close(tpsi, 3 * (10 - energies) * psi, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(problem.energies(3 * (10 - energies)), energies)


def test_a_network_without_derivatives_is_refused():
    problem = oscillator(2, shift=10.0)
    with pytest.raises(TypeError, match="a method `jet`, such as ParallelMLP; Linear has none"):
        problem.evaluate(nn.Linear(2, 3), problem.held_out())


def test_importance_weights_make_batch_means_integrals():
    problem = oscillator(2, shift=10.0)
    psi, _ = problem.evaluate(Known(), problem.batch(200_000, seeded(1)))
    squared_norm = psi[:, 0, 0].square().mean().item()
    assert squared_norm == pytest.approx(math.pi, rel=0.02)  # ∫ exp(-|x|²) dx


def test_training_finds_the_energies_of_the_oscillator():
    problem = oscillator(1, shift=8.0, scale=4.0)
    network = ParallelMLP(
        1,
        3,
        activation=nn.functional.silu,
        envelope=lambda x: (-0.3 * x.square().sum(1)).exp(),
        generator=seeded(),
    )
    training = Training(steps=600, batch_size=512, learning_rate=1e-2, weight_decay=0)
    basis = learn_eigenbasis(
        network, problem, training, objective=NestedLoRA(), generator=seeded(1), progress=False
    )
    energies = problem.energies(basis.eigenvalues)
    torch.testing.assert_close(energies.float(), torch.tensor([1.0, 3, 5]), rtol=0.03, atol=0)


def test_edges_of_weight_zero_are_no_edges():
    edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
    graph = Graph(edges, 4, torch.tensor([1.0, 0.5, 0.0]))
    expected = Graph(edges[:, :2], 4, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(graph.matrix.to_dense(), expected.matrix.to_dense())


# A closed-form start


def test_a_linear_head_is_a_combination_of_all_hidden_units():
    body, weight = ParallelMLP(2, 3, width=4, generator=seeded()), torch.randn(12, 5)
    x = torch.randn(6, 2, generator=seeded())
    network = LinearHead(body, weight)
    slow = torch.zeros(6, 5)
    for j in range(3):
        one = [w[j] for w in body.weights[:2]], [b[j, :, 0] for b in body.biases[:2]]
        hidden = x
        for w, b in zip(*one, strict=True):
            hidden = torch.sin(hidden @ w.T + b)
        slow += hidden @ weight[4 * j : 4 * j + 4]
    torch.testing.assert_close(network(x), slow.unsqueeze(1))
    own = body.hidden(x).view(6, 3, 4) * body.weights[-1][:, 0]
    torch.testing.assert_close(body(x)[:, 0], own.sum(2) + body.biases[-1].view(3))
    network(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in [*body.weights[:2], *body.biases[:2]])


def test_the_closed_form_start_is_exact_where_the_units_span_the_eigenfunctions():
    # A kernel made of the units themselves, on a space of 40 points: rank 3.
    body = ParallelMLP(2, 2, width=6, generator=seeded()).double()
    x = torch.randn(40, 2, generator=seeded(), dtype=torch.float64)
    factor = torch.randn(12, 3, generator=seeded(1), dtype=torch.float64)
    rows = (body.hidden(x) @ factor).detach().unsqueeze(1)
    network = ritz_head(body, FeatureKernel(), x, 3, kernel_inputs=rows, tolerance=1e-14)
    gram = rows[:, 0] @ rows[:, 0].T
    psi = network(x)[:, 0].detach()
    torch.testing.assert_close(psi @ psi.T, gram, rtol=1e-6, atol=1e-6)
    second = psi.T @ psi / 40
    values = torch.linalg.eigvalsh(gram / 40).flip(0)[:3]
    torch.testing.assert_close(second, values.diag(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="span only"):
        ritz_head(body, FeatureKernel(), x, 13, kernel_inputs=rows)


def test_training_from_the_closed_form_start_is_better_than_the_start():
    x = torch.randn(512, 1, generator=seeded())
    kernel = RBF()
    # Too few units for the fifth function; training moves them.
    body = ParallelMLP(1, 2, width=4, generator=seeded())
    network = ritz_head(body, kernel, x, 4)
    problem = Samples(kernel, x, x, generator=seeded())
    loss = SpectralLoss(problem, NestedLoRA())
    before = loss.held_out(network)
    training = Training(steps=300, batch_size=256, learning_rate=1e-3, weight_decay=0)
    train(network, loss, training, generator=seeded(), progress=False)
    assert loss.held_out(network) < before
