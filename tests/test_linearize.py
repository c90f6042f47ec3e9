"""Jacobian products against a dense Jacobian made entry by entry (float64, tolerance 1e-10)."""

import pytest
import torch
from cases import CLASSES, NAMES, make_case, make_inputs, make_model
from reference import dense_jacobian
from torch import nn

from ella.linearize import Linearized

BUDGETS = {"default": {}, "tiny": {"memory_budget": 1}, "some": {"memory_budget": 20_000}}


def assert_near(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def normal(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=NAMES)
def case(request):
    return make_case(request.param)


@pytest.fixture(params=BUDGETS)
def linearized(request, case):
    return Linearized(case.model, **BUDGETS[request.param])


def test_products_equal_the_dense_jacobian(case, linearized):
    logits, jacobian = dense_jacobian(case.model, case.x)
    n, c, p = jacobian.shape
    v, u = normal(4, p), normal(n, c, 4)
    assert linearized.num_parameters == p
    assert linearized.num_outputs(case.x) == c
    assert_near(linearized(case.x), logits)
    assert_near(linearized.jacobian(case.x), jacobian)
    assert_near(linearized.jvp(case.x, v), jacobian @ v.T)
    assert_near(linearized.vjp(case.x, u), torch.einsum("ncp,nck->kp", jacobian, u))
    outputs = torch.arange(n) % c
    assert_near(linearized.row_gradients(case.x, outputs), jacobian[torch.arange(n), outputs])
    assert_near(linearized.kernel_blocks(case.x), jacobian @ jacobian.mT)
    assert_near(linearized.kernel_diagonal(case.x), jacobian.square().sum(-1))


def test_chunks_cover_the_examples_in_order(case, linearized):
    parts = list(linearized.jacobian_chunks(case.x))
    assert torch.cat([torch.arange(7)[part] for part, _ in parts]).tolist() == list(range(7))
    assert_near(torch.cat([j for _, j in parts]), dense_jacobian(case.model, case.x)[1])


def test_a_tiny_budget_takes_one_example_at_a_time():
    case = make_case("mlp")
    parts = list(Linearized(case.model, memory_budget=1).jacobian_chunks(case.x))
    assert [len(j) for _, j in parts] == [1] * 7


def test_jvp_and_vjp_are_adjoint(case, linearized):
    v, u = normal(1, linearized.num_parameters), normal(7, CLASSES, 1)
    left = (linearized.jvp(case.x, v) * u).sum()
    right = (linearized.vjp(case.x, u) * v).sum()
    assert_near(left, right)


def test_flat_parameters_are_the_trainable_ones_in_order(case, linearized):
    flat = [p.detach().reshape(-1) for p in case.model.parameters() if p.requires_grad]
    assert torch.equal(linearized.flat_parameters(), torch.cat(flat))


def test_frozen_parameters_are_constants():
    case = make_case("frozen")
    linearized = Linearized(case.model)
    assert list(linearized.parameters()) == ["3.weight", "3.bias"]
    assert linearized.num_parameters == 6 * CLASSES + CLASSES


def test_new_weights_are_seen():
    case = make_case("mlp")
    linearized = Linearized(case.model)
    linearized(case.x)
    with torch.no_grad():
        case.model[0].weight.mul_(0.5)
    assert_near(linearized.jacobian(case.x), dense_jacobian(case.model, case.x)[1])


# What surrounds the model


def snapshot(model):
    return {
        "state": {name: t.clone() for name, t in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in model.parameters()],
        "hooks": sum(len(m._forward_hooks) for m in model.modules()),
    }


def assert_untouched(model, before):
    after = snapshot(model)
    state, old = after.pop("state"), before.pop("state")
    assert after == before
    assert list(state) == list(old)
    assert all(torch.equal(state[name], old[name]) for name in old)


def use_everything(linearized, x):
    linearized(x)
    linearized.jvp(x, normal(2, linearized.num_parameters))
    linearized.vjp(x, normal(7, CLASSES, 2))
    linearized.jacobian(x)


class TwoNames(nn.Module):
    """One module under two names, and one weight in two modules."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6))
        self.again = self.body[0]
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.body[3].weight
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(self.tied(self.again(self.body(x)).tanh()).tanh())


def test_shared_modules_and_weights_are_differentiated_and_left_alone():
    model = TwoNames().double().eval()
    x = normal(5, 6)
    weights, before = list(model.parameters()), snapshot(model)
    linearized = Linearized(model)
    logits, jacobian = dense_jacobian(model, x)
    v = normal(3, linearized.num_parameters)
    assert_near(linearized(x), logits)
    assert_near(linearized.jacobian(x), jacobian)
    assert_near(linearized.jvp(x, v), torch.einsum("ncp,kp->nck", jacobian, v))
    use_everything(linearized, x)
    assert_untouched(model, before)
    assert all(p is q for p, q in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_untouched(name):
    case = make_case(name)
    modules = list(case.model.modules())
    modules[-1].eval()  # flags that differ from one module to the next
    before, rng = snapshot(case.model), torch.get_rng_state()
    torch.backends.mha.set_fastpath_enabled(True)
    use_everything(Linearized(case.model), case.x)
    assert_untouched(case.model, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()


class Fragile(nn.Module):
    def __init__(self, allowed):
        super().__init__()
        self.net, self.allowed, self.calls = nn.Linear(4, CLASSES), allowed, 0

    def forward(self, x):
        self.calls += 1
        if self.calls > self.allowed:
            raise RuntimeError("on purpose")
        return self.net(x)


@pytest.mark.parametrize("allowed", range(6))
def test_the_model_is_put_back_after_an_exception(allowed):
    model = Fragile(allowed).double()
    model.net.eval()
    before = snapshot(model)
    torch.backends.mha.set_fastpath_enabled(True)
    with pytest.raises(RuntimeError, match="on purpose"):
        use_everything(Linearized(model), make_inputs("mlp", 7))
    assert_untouched(model, before)
    assert torch.backends.mha.get_fastpath_enabled()


class Counting(nn.Module):
    """Changes a buffer in place at every call, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, CLASSES)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.net(x)


def test_buffers_changed_in_place_are_copies():
    model = Counting().double()
    use_everything(Linearized(model), make_inputs("mlp", 7))
    assert model.calls == 0


def test_the_callers_grad_mode_does_not_matter():
    case = make_case("conv")
    linearized = Linearized(case.model)
    expected = linearized.jacobian(case.x)
    with torch.no_grad():
        assert torch.equal(Linearized(case.model).jacobian(case.x), expected)
    with torch.inference_mode():
        x = case.x.clone()
        assert x.is_inference()
        assert torch.equal(Linearized(case.model).jacobian(x), expected)
    use_everything(Linearized(case.model), x)  # an inference tensor outside inference mode
    assert torch.equal(linearized.jacobian(x), expected)


def test_inputs_are_untouched():
    class Inplace(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul(1))

    x = make_inputs("mlp", 7)
    kept = x.clone()
    use_everything(Linearized(Inplace(nn.ReLU(inplace=True), nn.Linear(4, CLASSES)).double()), x)
    assert torch.equal(x, kept)


# Errors


def test_something_else_than_a_module():
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module; got function"):
        Linearized(lambda x: x)


def test_no_trainable_parameter():
    with pytest.raises(ValueError, match="no trainable parameter"):
        Linearized(make_model("mlp").requires_grad_(False))


@pytest.mark.parametrize(
    "tail", [nn.Unflatten(1, (CLASSES, 1)), nn.Flatten(0, 1)], ids=["three axes", "one axis"]
)
def test_outputs_of_another_shape(tail):
    linearized = Linearized(nn.Sequential(make_model("mlp"), tail))
    with pytest.raises(ValueError, match=r"outputs of shape \(n, c\)"):
        linearized(make_inputs("mlp", 7))


def test_outputs_that_are_no_tensor():
    class Pair(nn.Linear):
        def forward(self, x):
            return {"a": super().forward(x), "b": x}

    with pytest.raises(TypeError, match=r"must return a tensor of outputs.*got dict of \(a, b\)"):
        Linearized(Pair(4, CLASSES).double())(make_inputs("mlp", 7))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad):
    model, x = make_model("mlp"), make_inputs("mlp", 7)
    spoiled = x.clone()
    spoiled[3, 1] = bad
    linearized = Linearized(model)
    products = {
        "call": linearized,
        "jvp": lambda x: linearized.jvp(x, normal(1, linearized.num_parameters)),
        "vjp": lambda x: linearized.vjp(x, normal(7, CLASSES, 1)),
        "jacobian": linearized.jacobian,
    }
    for product in products.values():
        with pytest.raises(ValueError, match="`x` holds NaN or infinite"):
            product(spoiled)
    with torch.no_grad():
        model[-1].bias[0] = bad
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        linearized(x)


def test_another_device():
    linearized = Linearized(make_model("mlp"))
    with pytest.raises(ValueError, match="`x` is on meta, but the model is on cpu"):
        linearized(make_inputs("mlp", 7).to("meta"))


@pytest.mark.parametrize("shape", [(2, 5), (5,), (1, 2, 51)])
def test_tangents_of_another_width(shape):
    linearized = Linearized(make_model("mlp"))
    assert linearized.num_parameters == 51
    with pytest.raises(ValueError, match=r"`tangents` must have shape \(k, p\) with p = 51"):
        linearized.jvp(make_inputs("mlp", 7), normal(*shape))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "must be a tensor, a tuple"),
        ((), TypeError, "at least one tensor"),
        (torch.tensor(1.0), TypeError, "first axis is the examples"),
        (torch.zeros(0, 4), ValueError, "`x` is empty"),
        ((torch.zeros(2, 3), torch.zeros(3, 2)), ValueError, "disagree on the number"),
    ],
    ids=["list", "nothing", "scalar", "empty", "ragged"],
)
def test_inputs_in_another_form(x, error, message):
    with pytest.raises(error, match=message):
        Linearized(make_model("mlp"))(x)
