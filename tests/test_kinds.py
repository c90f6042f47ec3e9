"""Every kind of model and of data that people bring: it fits, it predicts, or it says why not."""

import pytest
import torch
from cases import loader_of, part_of
from kinds import CLASSES, KINDS, make, mlp
from reference import dense_jacobian
from torch import nn

from ella import ELLA, LastLayer, NeuralEF, Nystrom, Training
from ella.derivatives import Plain, is_out_of_memory
from ella.inputs import input_tensors
from ella.linearize import Linearized, _halving
from ella.wrappers import unwrapped

pytestmark = [
    pytest.mark.filterwarnings("ignore:calibrate. "),
    # torch says so of reentrant checkpoints without gradients, also outside of ella.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

N = 24
NEURAL = NeuralEF(
    rank=3, num_inputs=48, width=8, num_directions=12, teacher=Training(steps=20, batch_size=16)
)
METHODS = {"neural": NEURAL, "nystrom": Nystrom(3, 12), "last layer": LastLayer()}
QUIET = {"progress": False}


def labels(n=N, seed=5):
    return torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(seed))


def copied(x):
    return tuple(t.clone() for t in x) if isinstance(x, tuple) else x.clone()


def logits_of(model, x):
    with torch.no_grad():
        out = unwrapped(model).eval()(*x) if isinstance(x, tuple) else unwrapped(model).eval()(x)
    if isinstance(out, dict):
        return out["logits"]
    return out[0] if isinstance(out, tuple) else out


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


# Models


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_all_the_way(kind, method, tmp_path):
    model, x = make(kind)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    kept = copied(x)
    ella = ELLA(model, eigenfunctions=METHODS[method], **QUIET).fit(loader_of(x, labels(), 7))
    ella.calibrate(loader_of(make(kind, seed=3)[1], labels(seed=6), 9))
    probs = ella.predict_proba(x)
    assert_same(probs.sum(1), torch.ones(N, dtype=torch.float64))
    gaussian = ella.gaussian(x)
    tau = ella.hyperparameters.logit_temperature
    assert_same(gaussian.mean * tau, logits_of(make(kind)[0], copied(x)))
    assert (ella.features(x).variance() > 0).any()
    ella.save(tmp_path / "ella")
    again = ELLA.load(tmp_path / "ella", make(kind)[0], progress=False)
    assert torch.equal(again.predict_proba(x), probs)
    assert all(
        torch.equal(a, b) for a, b in zip(input_tensors(x), input_tensors(kept), strict=True)
    )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_an_example_do_not_depend_on_the_others(kind):
    if kind == "skipping":
        pytest.skip("the kind is that a pass depends on the batch")
    model, x = make(kind)
    ella = ELLA(model, eigenfunctions=NEURAL, **QUIET).fit(loader_of(x, labels(), 7))
    whole = ella.features(x)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    for index in (order, order[:3], order[5:6]):
        found = ella.features(part_of(x, index))
        for name in ("mean", "factor", "residual"):
            assert_same(getattr(found, name), getattr(whole, name)[index])


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_every_kind_equal_the_dense_jacobian(kind):
    model, x = make(kind, n=4)
    linearized = Linearized(model)
    plain = mlp().double() if "compiled" in kind else unwrapped(make(kind)[0])
    if "compiled" in kind:
        state = unwrapped(model).state_dict()
        plain.load_state_dict({key.replace("_orig_mod.", ""): t for key, t in state.items()})
    one = [copied(part_of(x, slice(i, i + 1))) for i in range(4)]
    expected = torch.cat([reference_jacobian(plain, each) for each in one])
    assert_same(linearized.jacobian(x), expected)
    v = torch.randn(2, linearized.num_parameters, dtype=torch.float64)
    assert_same(linearized.jvp(x, v), expected @ v.T)
    u = torch.randn(4, CLASSES, 2, dtype=torch.float64)
    assert_same(linearized.vjp(x, u), torch.einsum("ncp,nck->kp", expected, u))


def reference_jacobian(model, x):
    model = model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for c in range(CLASSES):
        model.zero_grad()
        out = model(*copied(x)) if isinstance(x, tuple) else model(copied(x))
        logits = (
            out["logits"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
        )
        logits[0, c].backward()
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                    for p in parameters
                ]
            )
        )
    return torch.stack(rows).unsqueeze(0).detach()


PLAIN = ("lstm", "gru", "packed", "checkpoints", "reentrant checkpoints", "old autograd function")


@pytest.mark.parametrize("kind", PLAIN)
def test_the_route_is_found_by_trying_and_logged(kind, caplog):
    model, x = make(kind, n=4)
    linearized = Linearized(model)
    with caplog.at_level("INFO", logger="ella"):
        linearized.jacobian(x)
        linearized.jacobian(x)
    assert isinstance(linearized._routes.chosen["rows"], Plain)
    assert len([r for r in caplog.records if "by autograd" in r.message]) == 1
    fast = Linearized(mlp().double())
    fast.jacobian(torch.zeros(2, 4, dtype=torch.float64))
    assert not isinstance(fast._routes.chosen["rows"], Plain)


class Detached(nn.Module):
    """Its gradient is another under `torch.func`, which nothing but a comparison tells."""

    def __init__(self):
        super().__init__()
        self.net, self.gate = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

    def forward(self, x):
        inside = torch._C._functorch.is_functorch_wrapped_tensor(self.net.weight)
        return self.net(x) + self.gate(x).mul(0.0 if inside else 1.0)


def test_a_route_that_gives_something_else_is_not_taken():
    model, x = Detached().double(), torch.randn(3, 4, dtype=torch.float64)
    linearized = Linearized(model)
    expected = dense_jacobian(model, x)[1]
    assert_same(linearized.jacobian(x), expected)
    v = torch.randn(2, linearized.num_parameters, dtype=torch.float64)
    assert_same(linearized.jvp(x, v), expected @ v.T)


class Hungry(nn.Module):
    """Runs out of memory for more than a few examples at a time."""

    def __init__(self, most, error=torch.OutOfMemoryError):
        super().__init__()
        self.net, self.most, self.error, self.calls = mlp(), most, error, []

    def forward(self, x):
        self.calls.append(len(x))
        if torch.is_grad_enabled() and len(x) > self.most:
            raise self.error("CUDA out of memory. Tried to allocate 20 GiB")
        return self.net(x)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_halves_the_chunk_and_is_no_refusal(error):
    x = torch.randn(16, 4, dtype=torch.float64)
    model = Hungry(5, error).double()
    linearized = Linearized(model)
    u = torch.randn(16, CLASSES, 2, dtype=torch.float64)
    expected = Linearized(model.net).vjp(x, u)
    assert_same(linearized.vjp(x, u), expected)
    assert not isinstance(linearized._routes.chosen["vjp"], Plain)
    with pytest.raises(MemoryError, match="not enough memory for the derivative of one example"):
        list(_halving(lambda part: model_error(error), 4, 4))
    with pytest.raises(error):
        Linearized(Hungry(0, error).double()).vjp(x, u)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(ValueError("out of memory"))


def model_error(error):
    raise error("out of memory")
