"""The private view of a model: it equals the model, and the user's objects never notice."""

import copy
import functools
import pickle
import threading

import pytest
import torch
from cases import CLASSES, NAMES, make_case, make_inputs, make_model
from reference import call
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ella.network import DifferentiableAttention, Network, unwrapped
from ella.views import shared_copy


def normal(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class PlainList(nn.Module):
    """Keeps modules, a parameter and a tensor where `nn.Module` does not look for them."""

    def __init__(self):
        super().__init__()
        self.hidden = [nn.Linear(4, 5).double(), torch.tanh]
        self.settings = {"shift": nn.Parameter(normal(5)), "scale": (normal(5),)}
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        h = self.hidden[1](self.hidden[0](x)) * self.settings["scale"][0]
        return self.head(h + self.settings["shift"])


class Remembering(nn.Module):
    """Keeps activations on itself between two of its steps."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        self.kept = self.first(x)
        return self.second(self.kept.tanh())


class Stored(nn.Module):
    """Holds a tensor with a graph, a bound method and a partial of itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(CLASSES, 4))
        self.doubled = self.weight * 2
        self.bound = self.linear
        self.partial = functools.partial(torch.add, self.doubled)

    def linear(self, x):
        return x @ (self.weight + self.partial(0)).T

    def forward(self, x):
        return self.bound(x)


class LoRA(nn.Module):
    """A frozen layer with a trainable low-rank correction."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, CLASSES).requires_grad_(False)
        self.a, self.b = nn.Parameter(normal(2, 4)), nn.Parameter(normal(CLASSES, 2))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.two(self.one(x).tanh()))


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.Linear(5, CLASSES))


def compiled():
    return torch.compile(nn.Sequential(nn.Linear(4, CLASSES)).double())


MODELS = {
    "plain list": PlainList,
    "remembering": Remembering,
    "stored": Stored,
    "lora": LoRA,
    "tied": Tied,
    "old weight norm": old_weight_norm,
    "weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, CLASSES)
    ),
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Linear(5, CLASSES)
    ),
    "compiled": compiled,
    "parallel": lambda: nn.DataParallel(nn.Linear(4, CLASSES)),
}


@pytest.fixture(params=MODELS)
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[request.param]().double()


def in_eval_mode(model, x):
    twin = unwrapped(model)
    training = twin.training
    try:
        return twin.eval()(x).detach()
    finally:
        twin.train(training)


def test_outputs_are_those_of_the_model_also_after_in_place_edits(model):
    network = Network(model)
    x = make_inputs("mlp", 5).to(network.device)  # `DataParallel` moves its module to a GPU
    assert network._lock is None
    torch.testing.assert_close(network(x), in_eval_mode(model, x))
    before = network(x)
    with torch.no_grad():
        next(p for p in unwrapped(model).parameters() if p.requires_grad).add_(0.5)
    torch.testing.assert_close(network(x), in_eval_mode(model, x))
    assert not torch.allclose(network(x), before)


def test_weights_are_shared_not_copied(model):
    twin = shared_copy(unwrapped(model))
    ours, theirs = list(twin.parameters()), list(unwrapped(model).parameters())
    assert all(one is other for one, other in zip(ours, theirs, strict=True))
    assert all(one is other for one, other in zip(twin.buffers(), model.buffers(), strict=True))
    assert not set(map(id, twin.modules())) & set(map(id, unwrapped(model).modules()))
    assert not any(module.training for module in twin.modules())


def attributes(model):
    return [
        (id(module), module.training, {k: id(v) for k, v in vars(module).items()})
        for module in model.modules()
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_users_modules_are_never_touched(name):
    """Not even for a moment: seen from inside the forward pass, where a hook could see them."""
    case = make_case(name)
    network = Network(case.model)
    before, seen = attributes(case.model), []

    def spy(module, args, output):
        seen.append(attributes(case.model) == before)

    last = [n for n, _ in case.model.named_modules()][-1]
    network(case.x, {last: spy})
    assert seen == [True]
    assert attributes(case.model) == before


def test_calls_that_read_do_not_see_each_other():
    model, x = make_model("mlp"), make_inputs("mlp", 5)
    network, first, second = Network(model), [], []
    network(x, {"0": lambda module, args, output: first.append(output)})
    network(x)
    network(x[:2], {"0": lambda module, args, output: second.append(output)})
    assert [len(t) for t in first] == [5]
    assert [len(t) for t in second] == [2]


def test_modules_that_remember_activations_keep_none_of_ours():
    model = Remembering().double()
    network = Network(model)
    for _ in range(2):
        network(make_inputs("mlp", 5))
        assert not hasattr(model, "kept")
        assert [hasattr(view.module, "kept") for view in network._free] == [False]


def test_threads_do_not_meet():
    model, failures = Remembering().double(), []
    network = Network(model)
    batches = [make_inputs("mlp", 50, seed=i) for i in range(8)]
    expected = [network(x) for x in batches]

    def work(i):
        for _ in range(40):
            if not torch.equal(network(batches[i]), expected[i]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Meanwhile:
    """While it is copied, the module that holds it gets a tensor with a graph."""

    def __init__(self, module):
        self.module = module

    def __deepcopy__(self, memo):
        self.module.history.append(self.module.weight * 2)
        return self


def test_a_model_that_gets_tensors_while_it_is_copied_is_copied():
    """As from a training step in another thread: they are shared, like all others."""
    model, x = nn.Linear(4, CLASSES).double(), make_inputs("mlp", 3)
    model.meanwhile, model.history = Meanwhile(model), []
    twin = shared_copy(model)
    assert twin.history[0] is model.history[0]
    network = Network(model)
    assert network._lock is None
    assert torch.equal(network(x), in_eval_mode(model, x))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.float(),
        lambda model: model[1].register_buffer("running_mean", torch.zeros(3).double() + 0.1),
        lambda model: model.__setitem__(5, nn.Linear(12, CLASSES).double()),
        lambda model: model.load_state_dict({k: v * 1 for k, v in model.state_dict().items()}),
    ],
    ids=["dtype", "buffer", "head", "load"],
)
def test_a_changed_model_is_noticed(change):
    model, x = make_model("conv"), make_inputs("conv", 4)
    network = Network(model)
    network(x)
    change(model)
    x = x.to(network.dtype)
    assert torch.equal(network(x), in_eval_mode(model, x))


def edited(model, edit):
    with torch.no_grad():
        edit(model)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m[0].weight.add_(1e-3),
        lambda m: m[0].weight.data.mul_(1.01),
        lambda m: m[1].running_mean.add_(1e-3),
        lambda m: m[1].add_module("extra", nn.Identity()),
        lambda m: m.__setitem__(2, nn.Tanh()),
        lambda m: m.register_buffer("late", torch.ones(2), persistent=False),
        lambda m: m.half(),
    ],
    ids=["weight", "data", "buffer", "module", "class", "non-persistent", "dtype"],
)
def test_the_fingerprint_covers_everything_that_predicts(edit):
    model = make_model("conv")
    network = Network(model)
    before = network.fingerprint()
    assert Network(copy.deepcopy(model)).fingerprint() == before
    edited(model, edit)
    assert network.fingerprint() != before
    assert Network(model).fingerprint() == network.fingerprint()


def test_edits_that_change_nothing_keep_the_fingerprint():
    model = make_model("conv")
    network = Network(model)
    before = network.fingerprint()
    edited(model, lambda m: m[0].weight.mul_(1.0))
    assert network.fingerprint() == before
    model.train()
    model.requires_grad_(False)
    assert network.fingerprint() == before


def test_a_single_entry_changed_through_data_is_noticed_before_it_is_kept():
    model = make_model("mlp")
    network = Network(model)
    before = network.fingerprint()
    index = model[0].weight.abs().argmin()
    model[0].weight.data.view(-1)[index] += 1.0
    assert network.refreshed_fingerprint() != before


class Counting(nn.Module):
    """Changes one buffer in eval mode, and reads another."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, CLASSES)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("shift", torch.ones(()))

    def forward(self, x):
        self.calls += 1
        return self.net(x) + self.calls + self.shift


def test_buffers_that_a_forward_pass_changes_are_private():
    model, x = Counting().double(), make_inputs("mlp", 3)
    network = Network(model)
    expected = model.net(x).detach() + 2
    for _ in range(3):
        torch.testing.assert_close(network(x), expected)
    assert model.calls == 0
    model.shift += 1  # the others are shared
    torch.testing.assert_close(network(x), expected + 1)


class Uncopyable(nn.Module):
    """Holds a lock, as a client of some service would."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, CLASSES))
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.net(x)


class CopiesWeights(nn.Linear):
    def __deepcopy__(self, memo):
        twin = CopiesWeights(self.in_features, self.out_features).double()
        twin.load_state_dict(self.state_dict())
        return twin


@pytest.mark.parametrize("make", [Uncopyable, lambda: CopiesWeights(4, CLASSES)])
def test_a_model_that_cannot_be_copied_is_used_under_a_lock_and_put_back(make):
    model, x = make().double(), make_inputs("mlp", 5)
    model.train()
    before = attributes(model)
    network, read = Network(model), []
    expected = in_eval_mode(model, x)
    assert torch.equal(network(x), expected)
    name = [n for n, _ in model.named_modules()][-1]
    assert torch.equal(network(x, {name: lambda *a: read.append(a)}), expected)
    assert len(read) == 1
    network(x)
    assert len(read) == 1
    assert attributes(model) == before
    errors = []

    def work():
        for _ in range(20):
            if not torch.equal(network(x), expected):
                errors.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    assert attributes(model) == before


@pytest.mark.parametrize("twice", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_networks_are_copied_with_their_model(twice):
    network, x = Network(make_model("conv")), make_inputs("conv", 3)
    twin = twice(network)
    assert torch.equal(twin(x), network(x))
    assert twin.fingerprint() == network.fingerprint()
    edited(network.model, lambda m: m[5].bias.add_(1))
    assert not torch.equal(twin(x), network(x))


@pytest.mark.parametrize("weights", [True, False])
def test_attention_by_formulas_is_attention(weights):
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    x, mask = normal(3, 5, 4), torch.arange(5) > torch.tensor([[4], [2], [3]])
    expected = attention(x, x, x, key_padding_mask=mask, need_weights=weights)
    with DifferentiableAttention():
        found = attention(x, x, x, key_padding_mask=mask, need_weights=weights)
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] is None) == (not weights)


MASK = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.6
MASK[:, :, 2] = False  # may attend to nothing
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool": {"attn_mask": MASK},
    "float": {"attn_mask": normal(2, 1, 5, 5, seed=1)},
    "infinite": {"attn_mask": torch.zeros(MASK.shape).double().masked_fill(~MASK, -torch.inf)},
    "groups": {"enable_gqa": True},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_attention_is_that_of_torch(options):
    """Also under names and orders of arguments, and with its gradient."""
    heads = 2 if "enable_gqa" in options else 4
    query = normal(2, 4, 5, 3).requires_grad_()
    key, value = normal(2, heads, 5, 3, seed=2), normal(2, heads, 5, 3, seed=3)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    with DifferentiableAttention():
        found = F.scaled_dot_product_attention(query, key=key, value=value, **options)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out.square().sum(), query)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_no_flag_of_the_process_is_ever_moved():
    flags = []

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model("attention")

        def forward(self, x):
            flags.append(
                (
                    torch.backends.mha.get_fastpath_enabled(),
                    torch.backends.cuda.flash_sdp_enabled(),
                )
            )
            return self.inner(x)

    from ella import Linearized

    x = make_inputs("attention", 3)
    linearized = Linearized(Watching().double())
    linearized(x)
    linearized.jvp(x, normal(2, linearized.num_parameters))
    linearized.jacobian(x)
    assert set(flags) == {(True, torch.backends.cuda.flash_sdp_enabled())}


def test_outputs_are_checked_against_the_batch():
    case = make_case("tuple")
    torch.testing.assert_close(Network(case.model)(case.x), call(case.model.eval(), case.x))
