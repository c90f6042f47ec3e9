"""Sketches of Jacobian rows, against rows made whole in float64."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ella import ELLA, NeuralEF, Training
from ella.eigenfunctions.directions import sketch_of
from ella.inputs import Rows, take
from ella.kronecker import KroneckerSketch
from ella.linearize import Linearized
from ella.network import Network
from ella.sketches import CountSketch


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """Convolutions (plain, strided, in groups), both norms, in-place ReLU and addition."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.group_norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        branch = self.group_norm(self.point(self.depthwise(x)))
        branch += x
        return self.head(F.relu(branch).mean((2, 3)))


class Sequence(nn.Module):
    """Tokens first, an embedding with padding, tied weights and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 12, padding_idx=0)
        self.start = nn.Parameter(torch.randn(12))
        self.norm = nn.LayerNorm(12)
        self.inner = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4, bias=False)

    def forward(self, ids):
        x = (self.embedding(ids) + self.start).transpose(0, 1)
        x = x + torch.tanh(self.inner(self.norm(x)))
        x = x + torch.tanh(self.inner(x))  # the same weights once more
        return self.head(x.mean(0))


class Own(nn.Linear):
    """Says it is linear, and is not."""

    def forward(self, x):
        return F.linear(x, self.weight * self.weight.norm(), self.bias)


def perceptron():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


class Multiplied(nn.Module):
    """Inputs times matrices, in each way that there is for it, at several positions and at one."""

    def __init__(self):
        super().__init__()
        sizes = {"one": (6, 30), "two": (30, 40), "three": (40, 20), "four": (20, 5)}
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(torch.randn(size) / size[0] ** 0.5))
        self.bias = nn.Parameter(torch.randn(30))

    def forward(self, x):
        hidden = torch.addmm(self.bias, x.flatten(0, 1), self.one).tanh()
        hidden = torch.mm(hidden, self.two).tanh().view(*x.shape[:2], -1)
        return (hidden @ self.three).tanh().mean(1).matmul(self.four)


CASES = {
    "perceptron": (perceptron, lambda: normal(4, 6)),
    "matrices": (Multiplied, lambda: normal(4, 3, 6)),
    "convolutions": (Residual, lambda: normal(4, 3, 8, 8)),
    "one axis": (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)),
        lambda: normal(4, 2, 8),
    ),
    "tokens": (Sequence, lambda: torch.randint(0, 30, (4, 7))),
}


@pytest.fixture(params=CASES, name="case")
def _case(request):
    torch.manual_seed(0)
    make, inputs = CASES[request.param]
    model, x = make().eval().double(), inputs()
    return model, x.double() if x.is_floating_point() else x


def exact(model, x):
    """Every row by its own backward pass, (n, c, p)."""
    weights = list(model.parameters())
    rows = []
    for i in range(len(x)):
        outputs = model(x[i : i + 1])[0]
        each = [torch.autograd.grad(f, weights, retain_graph=True) for f in outputs]
        rows.append(torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each]))
    return torch.stack(rows)


def test_sides_longer_than_layers_lose_nothing(case, monkeypatch):
    model, x = case
    monkeypatch.setattr("ella.kronecker.KRONECKER_SIZE", 2**24)
    sketch, rows = KroneckerSketch(Linearized(model), x, 0), exact(model, x)
    sketches, norms = sketch.rows(x)
    torch.testing.assert_close(sketches @ sketches.mT, rows @ rows.mT)
    flat, whole = sketches.flatten(0, 1), rows.flatten(0, 1)
    torch.testing.assert_close(flat @ flat.T, whole @ whole.T)
    torch.testing.assert_close(norms, rows.square().sum(-1))
    torch.testing.assert_close(sketch.blocks(x)[1], rows @ rows.mT)


def test_chosen_rows_are_those_of_all(case):
    model, x = case
    sketch = KroneckerSketch(Linearized(model), x, 0)
    outputs = torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1]])
    index = torch.arange(4).unsqueeze(1)
    for found, every in zip(sketch.rows(x, outputs), sketch.rows(x), strict=True):
        torch.testing.assert_close(found, every[index, outputs])


def test_inner_products_are_right_on_average(case, monkeypatch):
    monkeypatch.setattr("ella.kronecker.KRONECKER_SIZE", 2**7)
    model, x = case
    rows = exact(model, x).flatten(0, 1)
    kernel, found = rows @ rows.T, []
    for seed in range(100):
        sketches, norms = KroneckerSketch(Linearized(model), x, seed).rows(x)
        flat = sketches.flatten(0, 1)
        gram = flat @ flat.T
        gram.diagonal().copy_(norms.flatten())
        found.append(gram)
    mean, spread = torch.stack(found).mean(0), torch.stack(found).std(0)
    error = 4.5 * spread / 100**0.5 + 1e-9 * kernel.abs().max()
    assert ((mean - kernel).abs() <= error).all()


def test_the_seed_decides(case):
    model, x = case
    one, same, other = (KroneckerSketch(Linearized(model), x, s).rows(x)[0] for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert one.shape == other.shape


def test_each_alone_where_examples_cannot_share_a_pass():
    torch.manual_seed(0)
    tokens, images = Sequence().double().eval(), Residual().double().eval()
    assert not KroneckerSketch(Linearized(tokens), torch.randint(0, 30, (4, 7)), 0).together
    assert KroneckerSketch(Linearized(images), normal(4, 3, 8, 8).double(), 0).together


class RelativePositions(nn.Module):
    """Looks up a row for each pair of positions, whatever the batch; they say little."""

    def __init__(self, share):
        super().__init__()
        self.hidden, self.head, self.share = nn.Linear(6, 20), nn.Linear(20, 3), share
        self.table = nn.Embedding(11, 4)

    def forward(self, x):
        apart = torch.arange(6) - torch.arange(6).unsqueeze(1)
        bias = self.table(apart + 5).mean((0, 1))
        return self.head(self.hidden(x).tanh()) * (1 + self.share * x[:, :1] * bias.sum())


def test_products_with_matrices_are_traced():
    torch.manual_seed(0)
    model, x = Multiplied().double(), normal(4, 3, 6).double()
    assert (
        KroneckerSketch(Linearized(model), x, 0)._traced == dict(model.named_parameters()).keys()
    )


def test_models_without_biases():
    """Nothing is left that is not sketched."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20, bias=False), nn.Tanh(), nn.Linear(20, 3, bias=False))
    sketch, x = KroneckerSketch(Linearized(model), normal(4, 6), 0), normal(4, 6)
    rows = exact(model, x)
    torch.testing.assert_close(sketch.rows(x)[1], rows.square().sum(-1), rtol=1e-4, atol=0)


def test_a_small_part_that_no_batch_divides_is_noticed():
    """36 pairs are of 3 examples, 12 each, as far as shapes tell; of 10 they are not."""
    for share in (1.0, 1e-3):
        torch.manual_seed(0)
        model, x = RelativePositions(share), normal(10, 6)
        sketch, rows = KroneckerSketch(Linearized(model), x, 0), exact(model, x)
        assert not sketch.together
        norms = rows.square().sum(-1)
        torch.testing.assert_close(sketch.rows(x)[1], norms, rtol=1e-3, atol=0)


def test_what_cannot_be_traced_is_exact():
    """A layer that does something else with its weight is noticed, and left to autograd."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), Own(20, 4)).double()
    x = normal(4, 6).double()
    sketch, rows = KroneckerSketch(Linearized(model), x, 0), exact(model, x)
    assert sketch._traced == {"0.weight", "0.bias"}
    torch.testing.assert_close(sketch.rows(x)[1], rows.square().sum(-1))


def test_models_without_layers_are_refused_or_sketched_whole():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(300, 300))

        def forward(self, x):
            return torch.einsum("ni,io->no", x, self.weight)[:, :3]

    linearized, x = Linearized(Bare()), normal(4, 300)
    assert isinstance(sketch_of(linearized, x, "auto", 0), CountSketch)
    with pytest.raises(ValueError, match=r'sketch="kronecker" cannot be had.*most weights'):
        sketch_of(linearized, x, "kronecker", 0)


def test_positions_are_rows():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).double()
    linearized = Linearized(Network(dense))
    x = normal(2, 3, 4, 4).double()
    rows = take(Rows.all_of(x, 16), torch.tensor([0, 5, 17, 30]))
    sketch = KroneckerSketch(linearized, rows, 0)
    whole = linearized.jacobian(rows)
    norms = whole.square().sum(-1)
    torch.testing.assert_close(sketch.rows(rows)[1], norms, rtol=0.5, atol=0)
    count = CountSketch.of(linearized, 0)
    torch.testing.assert_close(count.rows(rows)[1], norms)


def test_the_user_s_weights_and_gradients_are_not_touched(case):
    model, x = case
    before = {name: p.clone() for name, p in model.named_parameters()}
    KroneckerSketch(Linearized(model), x, 0).rows(x)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_the_choice_is_checked():
    with pytest.raises(ValueError, match=r"`sketch` must be one of 'auto', 'count', 'kronecker'"):
        NeuralEF(sketch="fft")


@pytest.mark.parametrize("sketch", ["count", "kronecker"])
def test_the_plan_says_what_fit_does(sketch):
    torch.manual_seed(0)
    method = NeuralEF(rank=3, num_inputs=8, num_directions=6, width=8, sketch=sketch)
    method = replace(method, teacher=Training(steps=5, batch_size=4))
    ella = ELLA(Residual().eval(), eigenfunctions=method, progress=False)
    ella.fit([(normal(8, 3, 8, 8), torch.arange(8) % 5)])
    plan = ella.plan
    assert (plan.num_inputs, plan.rows_each, plan.num_outputs) == (8, 5, 5)
    assert plan.num_weights == sum(p.numel() for p in ella.network.model.parameters())
    assert plan.seconds > 0
    assert plan.memory_bytes >= 4 * (8 * 5 * 7 + 6 * plan.sketch_size + 8 * 25)
    assert f"({sketch}, " in str(plan)
    assert "8 inputs, 5 of 5 rows each" in str(plan)


def test_a_way_that_is_clearly_slower_is_left(monkeypatch, caplog):
    """Whatever is chosen gives the same rows."""
    x = normal(2, 6).double()
    for plain, expected in ((0.5, "one by one"), (0.9, "vmapped")):
        model, seconds = perceptron().double(), iter([1.0, plain])
        linearized = Linearized(model)
        monkeypatch.setattr("ella.routes.Routes._seconds", lambda *_, s=seconds: next(s))
        assert linearized.rows_route(x) == "vmapped"
        with caplog.at_level("INFO", logger="ella"):
            linearized.time_rows(x)
        assert linearized.rows_route(x) == expected
        torch.testing.assert_close(linearized.jacobian(x), exact(model, x))
    assert len([r for r in caplog.records if "0.5 s against 1 s" in r.message]) == 1


def test_small_models_are_not_timed(monkeypatch):
    calls = []
    monkeypatch.setattr("ella.routes.Routes._seconds", lambda *_: calls.append(1) or 0.01)
    linearized = Linearized(perceptron())
    linearized.time_rows(normal(2, 6))
    assert (len(calls), linearized.rows_route(normal(2, 6))) == (1, "vmapped")
