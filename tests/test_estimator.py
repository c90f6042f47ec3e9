"""The promises of `ELLA` to its user: nothing is changed, all is repeatable, errors are said."""

import math
from dataclasses import replace

import pytest
import torch
from cases import CLASSES, loader_of, make_case, make_inputs, make_labels, make_model
from safetensors.torch import save_file
from torch import nn

from ella import (
    ELLA,
    LastLayer,
    NestedLoRA,
    NeuralEF,
    NeuralEFObjective,
    NotFittedError,
    Nystrom,
    Perturb,
    Training,
)
from ella.linearize import Linearized
from ella.saving import State

pytestmark = pytest.mark.filterwarnings("ignore:calibrate. ")

SHORT = Training(steps=30, batch_size=32)
N = 24


def neural(**changes):
    small = {"rank": 3, "num_inputs": 64, "width": 16, "num_directions": 16}
    small |= {"teacher": SHORT, "training": None}
    return NeuralEF(**{**small, **changes})


METHODS = {
    "neural": neural(),
    "nystrom": Nystrom(rank=4, subsample=20),
    "last layer": LastLayer(),
}
NAMES = ("mlp", "conv", "attention", "tuple", "mapping", "padded", "frozen")


class Setting:
    """A model, training data, validation data and test inputs."""

    def __init__(self, name="mlp", likelihood="classification"):
        case = make_case(name, N)
        self.model, self.likelihood = case.model, likelihood
        self.y, self.val_y = case.y, make_labels(15, seed=8)
        self.x, self.val_x = case.x, make_inputs(name, 15, seed=9)
        self.test_x = make_inputs(name, 7, seed=10)
        if likelihood == "regression":
            generator = torch.Generator().manual_seed(4)
            self.y = torch.randn(N, CLASSES, generator=generator, dtype=torch.float64)
            self.val_y = torch.randn(15, CLASSES, generator=generator, dtype=torch.float64)
        self.loader = loader_of(self.x, self.y)
        self.val_loader = loader_of(self.val_x, self.val_y, 4)

    def make(self, method="nystrom", **options):
        eigenfunctions = METHODS[method] if isinstance(method, str) else method
        defaults = {"likelihood": self.likelihood, "progress": False}
        return ELLA(self.model, eigenfunctions=eigenfunctions, **{**defaults, **options})

    def fit(self, method="nystrom", **options):
        return self.make(method, **options).fit(self.loader)


def assert_equal(one, two):
    """Two Gaussians, to the last digit."""
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.factor, two.factor)
    assert (one.residual is None) == (two.residual is None)
    assert one.residual is None or torch.equal(one.residual, two.residual)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def setting():
    return Setting()


# (i) Nothing is changed


def snapshot(model):
    modules = list(model.modules())
    return {
        "modes": [m.training for m in modules],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in model.parameters()],
        "identity": [id(p) for p in model.parameters()],
        "hooks": [
            len(h)
            for m in modules
            for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        ],
        "names": [sorted(vars(m)) for m in modules],
        "rng": torch.get_rng_state().tolist(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "state": {k: (v.dtype, v.tolist()) for k, v in model.state_dict().items()},
    }


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_the_model_and_the_generator_are_untouched(name, method, tmp_path):
    setting = Setting(name)
    list(setting.model.modules())[-1].eval()
    before = snapshot(setting.model)
    ella = setting.fit(method)
    assert snapshot(setting.model) == before, "fit"
    ella.calibrate(setting.val_loader)
    assert snapshot(setting.model) == before, "calibrate"
    ella.predict(setting.test_x)
    ella.predict_proba(setting.test_x)
    ella.logits(setting.test_x)
    ella.sample_logits(setting.test_x, 3)
    ella.uncertainty(setting.test_x)
    ella.log_marginal_likelihood()
    ella.partial_fit(setting.val_loader)
    assert snapshot(setting.model) == before, "predict"
    ella.save(tmp_path / "ella.safetensors")
    ELLA.load(tmp_path / "ella.safetensors", setting.model).predict_proba(setting.test_x)
    assert snapshot(setting.model) == before, "save and load"


class Failing:
    """A loader that fails on its `last`-th batch, counted over all passes."""

    def __init__(self, loader, last):
        self.loader, self.left = loader, last

    def __iter__(self):
        for batch in self.loader:
            self.left -= 1
            if self.left < 0:
                raise OSError("disk on fire")
            yield batch


@pytest.mark.parametrize("last", [0, 2, 7])
def test_a_failing_loader_changes_nothing(setting, method, last):
    ella = setting.fit(method)
    expected = ella.predict_proba(setting.test_x)
    before = snapshot(setting.model)
    for use in (ella.fit, ella.partial_fit, ella.calibrate):
        with pytest.raises(OSError, match="disk on fire"):
            use(Failing(setting.loader[: 2 if use != ella.fit else None] * 5, last))
    assert snapshot(setting.model) == before
    assert torch.equal(ella.predict_proba(setting.test_x), expected)


class FailingModel(nn.Module):
    """Works until it is told to fail."""

    def __init__(self):
        super().__init__()
        self.net, self.calls_left = make_model("mlp"), math.inf

    def forward(self, x):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise RuntimeError("on purpose")
        return self.net(x)


@pytest.mark.parametrize("calls", [0, 1, 3, 6])
def test_a_failing_model_is_put_back(method, calls):
    model, setting = FailingModel(), Setting()
    before = snapshot(model)
    model.calls_left = calls
    with pytest.raises(RuntimeError, match="on purpose"):
        ELLA(model, eigenfunctions=METHODS[method], progress=False).fit(setting.loader)
    after = snapshot(model)
    assert after == before


# Repeatable


def test_the_seed_decides(setting, method):
    torch.manual_seed(1)
    first = setting.fit(method)
    probs = first.predict_proba(setting.test_x)
    torch.manual_seed(2)
    assert torch.equal(first.predict_proba(setting.test_x), probs)
    assert torch.equal(setting.fit(method).predict_proba(setting.test_x), probs)
    assert torch.equal(first.fit(setting.loader).predict_proba(setting.test_x), probs)
    assert not torch.equal(setting.fit(method, seed=1).predict_proba(setting.test_x), probs)


def test_fitting_again_starts_again(setting, method):
    ella = setting.fit(method).calibrate(setting.val_loader)
    assert ella.tuning is not None
    ella.partial_fit(setting.val_loader).fit(setting.loader)
    fresh = setting.fit(method)
    assert ella.tuning is None
    assert ella.hyperparameters == fresh.hyperparameters
    assert torch.equal(ella.curvature, fresh.curvature)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("link", ["mc", "probit", "bridge"])
def test_probabilities_do_not_depend_on_the_batches(name, link):
    setting = Setting(name)
    ella = setting.fit()
    whole = ella.predict_proba(setting.test_x, link=link)
    assert whole.shape == (7, CLASSES)
    torch.testing.assert_close(whole.sum(-1), torch.ones(7, dtype=torch.float64))
    labels = torch.zeros(7, dtype=torch.long)
    split = ella.predict_proba(loader_of(setting.test_x, labels, 3), link=link)
    torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-10)
    assert torch.equal(ella.predict(setting.test_x), ella.predict_proba(setting.test_x).argmax(-1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", METHODS)
def test_every_model_goes_all_the_way(name, kind, tmp_path):
    setting = Setting(name)
    method = METHODS[kind]
    if name in ("mapping", "padded") and kind == "neural":
        method = neural(augment=Perturb())  # token ids stay token ids
    ella = setting.fit(method).calibrate(setting.val_loader)
    probs = ella.predict_proba(setting.test_x)
    assert torch.isfinite(probs).all()
    scores = ella.uncertainty(setting.test_x)
    assert scores.entropy.shape == (7,)
    assert ella.state_bytes > 0
    ella.save(tmp_path / "ella.safetensors")
    again = ELLA.load(tmp_path / "ella.safetensors", setting.model, progress=False)
    assert torch.equal(again.predict_proba(setting.test_x), probs)


def test_unlabelled_loaders_and_mapping_batches():
    setting = Setting("mapping")
    ella = setting.make().fit([{**x, "labels": y} for x, y in setting.loader])
    expected = setting.fit().predict_proba(setting.test_x)
    assert torch.equal(ella.predict_proba([setting.test_x]), expected)
    plain = Setting("mlp")
    ella = plain.fit()
    expected = ella.predict_proba(plain.test_x)
    torch.testing.assert_close(ella.predict_proba([plain.test_x[:3], plain.test_x[3:]]), expected)


def test_sequences_of_several_lengths():
    """Products take each batch as it is; a network that learns from all of them cannot."""
    setting = Setting("padded")
    loader = [
        ({k: t[:, : 5 - i] for k, t in x.items()}, y) for i, (x, y) in enumerate(setting.loader)
    ]
    assert len({x["input_ids"].shape[1] for x, _ in loader}) > 1
    probs = setting.make().fit(loader).predict_proba(setting.test_x)
    assert torch.isfinite(probs).all()
    for method in (neural(num_inputs=N), neural(num_inputs=3 * N)):
        ella = setting.make(method).fit(loader)
        x = {key: tensor[:4] for key, tensor in setting.test_x.items()}
        longest = int(x["attention_mask"].sum(1).max())
        short = {key: tensor[:, :longest] for key, tensor in x.items()}
        assert_equal(ella.features(x), ella.features(short))


def test_draws_are_functions(setting):
    ella = setting.fit()
    draws = ella.sample_logits(setting.test_x, 20_000)
    mean, covariance = ella.logits(setting.test_x)
    torch.testing.assert_close(draws.mean(0), mean)
    variance = covariance.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(draws.var(0), variance, rtol=0.05, atol=0)


def test_hyperparameters_in_use_shape_the_gaussian(setting):
    mean, covariance = setting.fit(prior_precision=2.0).logits(setting.test_x)
    warm = setting.fit(prior_precision=2.0, temperature=3.0, logit_temperature=1.5)
    warm_mean, warm_covariance = warm.logits(setting.test_x)
    torch.testing.assert_close(warm_mean, mean / 1.5)
    torch.testing.assert_close(warm_covariance, covariance * 3 / 1.5**2)


def test_single_precision_stays_single():
    setting = Setting("conv")
    setting.model.float()
    loader = [(x.float(), y) for x, y in setting.loader]
    for method in METHODS.values():
        ella = setting.make(method).fit(loader)
        assert ella.curvature.dtype == torch.float64
        assert ella.predict_proba(setting.test_x.float()).dtype == torch.float32


# Calibration


# Regression


def test_regression_all_the_way(method):
    setting = Setting("mlp", "regression")
    ella = setting.fit(method)
    mean, covariance = ella.logits(setting.test_x)
    assert torch.equal(ella.predict(setting.test_x), mean)
    torch.testing.assert_close(mean, setting.model.eval()(setting.test_x).detach())
    assert torch.linalg.eigvalsh(covariance).min() > -1e-10
    ella.calibrate(setting.val_loader)
    mean, covariance = ella.logits(setting.val_x)
    variance = covariance.diagonal(dim1=1, dim2=2) + ella.hyperparameters.noise_variance
    normal = torch.distributions.Normal(mean, variance.sqrt())
    nll = -normal.log_prob(setting.val_y).sum(-1).mean().item()
    assert nll == pytest.approx(ella.tuning.nll, rel=1e-6)
    with pytest.raises(ValueError, match='predict_proba needs likelihood="classification"'):
        ella.predict_proba(setting.test_x)


# Files


def test_a_file_holds_everything(setting, method, tmp_path):
    path = tmp_path / "ella.safetensors"
    ella = setting.fit(method, temperature=1.3).calibrate(setting.val_loader)
    ella.save(path)
    again = ELLA.load(path, setting.model, progress=False)
    assert again.hyperparameters == ella.hyperparameters
    assert torch.equal(again.curvature, ella.curvature)
    assert again.log_marginal_likelihood() == ella.log_marginal_likelihood()
    for one, two in zip(again.logits(setting.test_x), ella.logits(setting.test_x), strict=True):
        assert torch.equal(one, two)
    more = [other.partial_fit(setting.val_loader).curvature for other in (ella, again)]
    assert torch.equal(*more)


def test_a_file_for_another_model(setting, tmp_path):
    setting.fit().save(tmp_path / "ella.safetensors")
    for other in (make_model("mlp", seed=5), make_model("conv")):
        with pytest.raises(ValueError, match="was saved for another model"):
            ELLA.load(tmp_path / "ella.safetensors", other)


def test_a_file_that_is_not_ours(setting, tmp_path):
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"not a safetensors file at all" * 10)
    with pytest.raises(ValueError, match="garbage"):
        ELLA.load(garbage, setting.model)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    with pytest.raises(ValueError, match="no file that this version of ella can read"):
        ELLA.load(foreign, setting.model)


# NeuralEF


class Affine(nn.Module):
    """From vectors to (n, c, k); first weights from the global generator, as torch's are."""

    def __init__(self, num_inputs, shape, generator):
        super().__init__()
        self.given, self.seen = (num_inputs, shape), 0
        self.net = nn.Sequential(nn.Linear(num_inputs, shape[0] * shape[1]))

    def standardize(self, features):
        self.seen = len(features)

    def forward(self, x):
        return self.net(x).unflatten(1, self.given[1])


@pytest.mark.parametrize("reads", ["activations", "inputs"])
def test_a_network_of_the_users_own(setting, reads, tmp_path):
    state = torch.get_rng_state()
    ella = setting.fit(neural(network=Affine, reads=reads))
    assert torch.equal(torch.get_rng_state(), state)
    network = ella._fitted().eigenfunctions.basis.network
    # Activations of the model (4, 6, CLASSES wide) are more numbers than the inputs.
    num_inputs = (
        4 if reads == "inputs" else ella._fitted().eigenfunctions.taps(setting.x)[1].shape[1]
    )
    assert network.given == (num_inputs, (CLASSES, 3))
    assert (num_inputs == 4) == (reads == "inputs")
    assert network.seen == 64
    probs = ella.predict_proba(setting.test_x)
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.initial_seed()) + 1)  # its state must not matter
        twin = setting.fit(neural(network=Affine, reads=reads))
    assert torch.equal(twin.predict_proba(setting.test_x), probs)
    ella.save(tmp_path / "ella.safetensors")
    with pytest.raises(ValueError, match=r"custom network \(Affine\).*`eigenfunctions="):
        ELLA.load(tmp_path / "ella.safetensors", setting.model)
    again = ELLA.load(
        tmp_path / "ella.safetensors",
        setting.model,
        eigenfunctions=neural(network=Affine),
        progress=False,
    )
    assert torch.equal(again.predict_proba(setting.test_x), probs)


@pytest.mark.parametrize("shape", [(3, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("phase", ["teacher", "training"])
def test_a_network_of_the_wrong_shape(setting, shape, phase):
    phases = {"teacher": None, "training": None, phase: SHORT}

    def wrong(num_inputs, _, generator):
        return Affine(num_inputs, shape, generator)

    with pytest.raises(ValueError, match=r"`network` must return \(n, c, k\) = \(n, 3, 3\)"):
        setting.fit(neural(network=wrong, **phases))


def test_a_built_in_network_on_the_inputs(setting, tmp_path):
    ella = setting.fit(neural(reads="inputs"))
    fitted = ella._fitted().eigenfunctions
    assert fitted.basis.network.num_inputs == 4
    inputs = setting.test_x
    assert torch.equal(fitted(inputs).factor, fitted.basis.features(inputs))
    ella.save(tmp_path / "ella.safetensors")
    again = ELLA.load(tmp_path / "ella.safetensors", setting.model, progress=False)
    assert torch.equal(again.predict_proba(inputs), ella.predict_proba(inputs))


@pytest.mark.parametrize(
    ("name", "message"), [("conv", "reads vectors; got inputs of shape"), ("tuple", "one tensor")]
)
def test_inputs_that_a_network_cannot_read(name, message):
    with pytest.raises(ValueError, match=message):
        Setting(name).fit(neural(reads="inputs"))


@pytest.mark.parametrize("reads", ["activations", "inputs"])
def test_files_of_before_eigenvalues_were_kept_apart(setting, reads, tmp_path):
    """They hold A√μ, and of a network only whether it reads the inputs."""
    method = neural() if reads == "activations" else neural(network=Affine, reads=reads)
    fitted = setting.fit(method)._fitted().eigenfunctions
    tensors, settings = dict(fitted.state().tensors), dict(fitted.state().settings)
    tensors["mixing"] = tensors["mixing"] * tensors.pop("eigenvalues").sqrt()
    settings["reads_inputs"] = settings.pop("made")["reads"] == "inputs"
    options = {"trainable": (), "memory_budget": 2**20}

    def known(num_inputs, shape, generator):
        return Affine(4, (CLASSES, 3), generator)

    state = State(tensors, settings)
    restored = neural(network=known).restore(fitted.taps.network, state, **options)
    one, two = restored(setting.test_x), fitted(setting.test_x)
    torch.testing.assert_close(one.factor, two.factor)
    torch.testing.assert_close(one.residual, two.residual)


def test_neural_features_hold_eigenpairs_of_the_kernel(setting):
    """ψA is orthonormal on the sample, and diagonalises the NTK in its own units."""
    method = neural(num_directions=64, augment=None, residual="none")
    linearized = Linearized(setting.model)
    sample = method.sample(linearized, setting.loader, seed=0, progress=False)
    basis = method.learn(sample, seed=0, progress=False).basis
    psi = basis(sample.activations).flatten(0, 1)
    s = sample.kernel_features.flatten(0, 1) / sample.scale
    n = len(sample.activations)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(psi.T @ psi / n, eye)
    torch.testing.assert_close(psi.T @ s @ (s.T @ psi) / n**2, basis.eigenvalues.diag())


@pytest.mark.parametrize("objective", [NestedLoRA(), NeuralEFObjective()], ids=repr)
@pytest.mark.parametrize("residual", ["diag", "factor", "none"])
def test_neural_eigenfunctions_stay_within_the_kernel(setting, objective, residual):
    method = neural(objective=objective, teacher=None, training=SHORT, augment=None)
    ella = setting.fit(method, residual=residual)
    prior = ella.features(setting.test_x)
    logits, phi, outside = prior.mean, prior.factor, prior.residual
    assert phi.shape == (7, CLASSES, 3)
    assert torch.equal(logits, ella.linearized(setting.test_x))
    if residual == "none":
        assert outside is None
    elif residual == "factor":
        assert torch.linalg.eigvalsh(outside).min() > -1e-12
    else:
        assert (outside > 0).all()


def test_one_sample_serves_several_ranks_and_residuals(setting):
    method = neural()
    linearized = Linearized(setting.model)
    sample = method.sample(linearized, setting.loader, seed=0, progress=False)
    for residual in ("diag", "factor"):
        method = neural(residual=residual)
        fitted = method.fit(linearized, setting.loader, seed=0, progress=False)
        learned = method.learn(sample, seed=0, progress=False)
        assert_equal(fitted(setting.test_x), learned(setting.test_x))
    fitted = neural(rank=2, residual="none").learn(sample, seed=0, progress=False)
    assert fitted(setting.test_x).factor.shape == (7, CLASSES, 2)
    with pytest.raises(ValueError, match="`rank` is 40, but the sampled rows"):
        neural(rank=40, residual="none").learn(sample, seed=0, progress=False)


def test_the_sample_holds_the_kernel(setting):
    """S spans the sampled rows: all of them make SSᵀ = κ, and fewer less."""
    linearized = Linearized(setting.model)
    method = neural(num_directions=64, augment=None)
    sample = method.sample(linearized, setting.loader, seed=0, progress=False)
    exact = linearized.kernel_blocks(sample.inputs.parts[0]) * sample.scale**2
    torch.testing.assert_close(sample.blocks, exact)
    torch.testing.assert_close(sample.diagonal, exact.diagonal(dim1=1, dim2=2))
    inside = sample.kernel_features @ sample.kernel_features.mT
    assert torch.linalg.eigvalsh(exact - inside).min() > -1e-6 * exact.abs().max()
    phi = sample.teacher(3).flatten(0, 1)
    torch.testing.assert_close(
        phi.T @ phi, torch.diag((phi.T @ phi).diagonal()), atol=1e-8, rtol=0
    )


def test_a_learned_factor_approaches_the_blocks():
    """With enough of everything, φφᵀ + LLᵀ is nearer to κ(x, x) than with a diagonal."""
    setting = Setting()
    method = neural(
        rank=3, num_directions=24, num_inputs=400, width=64, teacher=Training(steps=600)
    )
    exact = Linearized(setting.model).kernel_blocks(setting.x)
    errors = {}
    for residual in ("diag", "factor"):
        prior = setting.fit(method, residual=residual).features(setting.x)
        phi, outside = prior.factor, prior.residual
        found = phi @ phi.mT + (outside if outside.ndim == 3 else torch.diag_embed(outside))
        distance = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        errors[residual] = distance.mean().item()
    assert errors["factor"] < 0.25
    assert errors["factor"] < 0.8 * errors["diag"]


def test_a_learned_factor_is_bounded(setting):
    """Far from everything that was seen, the trace stays below e times the largest one seen."""
    ella = setting.fit("neural", residual="factor")
    residual = ella._fitted().eigenfunctions.residual
    wild = 1e3 * torch.randn(50, residual.network.num_inputs, dtype=torch.float64)
    traces = residual(wild).diagonal(dim1=1, dim2=2).sum(-1)
    bound = (residual.highest + 1).exp()
    assert traces.max() <= bound * (1 + 1e-9)
    assert traces.max() > 0.99 * bound


def test_a_learned_factor_is_saved(setting, tmp_path):
    ella = setting.fit("neural", residual="factor")
    ella.save(tmp_path / "ella.safetensors")
    loaded = ELLA.load(tmp_path / "ella.safetensors", setting.model, progress=False)
    assert_equal(ella.features(setting.test_x), loaded.features(setting.test_x))


@pytest.mark.parametrize("method", ["nystrom", "last layer"])
def test_a_factor_is_for_networks_only(setting, method):
    with pytest.raises(ValueError, match=r'residual="factor" is learned.*residual="exact"'):
        setting.fit(method, residual="factor")


def test_neural_features_approach_the_kernel():
    """With enough of everything, φφᵀ + R has the diagonal of κ (mean within 25 %)."""
    setting = Setting()
    method = neural(
        rank=12, num_directions=24, num_inputs=400, width=64, teacher=Training(steps=600)
    )
    ella = setting.fit(method)
    prior = ella.features(setting.x)
    phi, outside = prior.factor, prior.residual
    diagonal = ella.linearized.kernel_diagonal(setting.x)
    total = phi.square().sum(-1) + outside
    error = (total / diagonal).log().abs().mean()
    assert error < 0.25
    share = phi.square().sum() / diagonal.sum()
    assert 0.7 < share < 1.05


def test_neural_state_does_not_grow_with_the_weights(setting):
    sizes = []
    for width in (6, 60):
        model = nn.Sequential(
            nn.Linear(4, width), nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, CLASSES)
        ).double()
        method = neural(network=Affine, reads="inputs")
        ella = ELLA(model, eigenfunctions=method, residual="none", progress=False)
        sizes.append(ella.fit(setting.loader).state_bytes)
    assert sizes[0] == sizes[1]


# Perturb


@pytest.mark.parametrize("shape", [(4,), (5, 3), (1, 6, 6), (3, 4, 5)])
def test_perturb_keeps_shapes_and_follows_its_generator(shape):
    x = torch.randn(9, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept, rng = x.clone(), torch.get_rng_state()

    def perturbed(seed):
        return Perturb()(x, torch.Generator().manual_seed(seed))

    once = perturbed(1)
    assert once.shape == x.shape
    assert once.dtype == x.dtype
    assert torch.isfinite(once).all()
    assert torch.equal(perturbed(1), once)
    assert not torch.equal(perturbed(2), once)
    assert not torch.equal(once, x)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), rng)


def test_perturb_leaves_what_is_not_real_alone(generator):
    ids, mask, values = torch.arange(12).view(4, 3), torch.ones(4, 3).bool(), torch.randn(4, 3)
    out = Perturb()({"ids": ids, "mask": mask, "values": values}, generator)
    assert torch.equal(out["ids"], ids)
    assert torch.equal(out["mask"], mask)
    assert not torch.equal(out["values"], values)
    first, second = Perturb()((ids, values), generator)
    assert torch.equal(first, ids)
    assert not torch.equal(second, values)


def test_perturb_of_nothing_is_nothing(generator):
    x = torch.randn(6, 1, 5, 5, generator=generator, dtype=torch.float64)
    assert torch.equal(Perturb(mix=0, noise=0)(x[:, 0, 0], generator), x[:, 0, 0])


def test_perturb_blurs_a_fifth_of_the_images(generator):
    """A blur keeps constants, and makes an image smoother."""
    method = Perturb(crop=1, mix=0, noise=0)
    x = torch.randn(500, 3, 12, 12, generator=generator, dtype=torch.float64)
    still = method._blur(x, generator)
    changed = (still - x).abs().flatten(1).amax(1) > 1e-3
    assert 0.1 < changed.double().mean() < 0.25
    assert (still[changed].std((2, 3)) <= x[changed].std((2, 3)) + 1e-12).all()
    torch.testing.assert_close(method._blur(torch.ones_like(x), generator), torch.ones_like(x))


# Bad input


def spoiled(x, value=float("nan")):
    x = x.clone()
    x[2, 1] = value
    return x


SETTING = Setting()
X, Y = SETTING.x, SETTING.y
BAD_LOADERS = {
    "empty": ([], ValueError, "The loader is empty"),
    "bare tensors": ([X[:5]], TypeError, r"The loader must yield \(x, y"),
    "a tensor": (X, TypeError, "`loader` must be an iterable of batches"),
    "not iterable": (3, TypeError, "`loader` must be an iterable of batches"),
    "no labels": ([{"x": X}], TypeError, "must hold its labels under one of"),
    "no examples": ([(X[:0], Y[:0])], ValueError, "`x` is empty"),
    "lengths": ([(X, Y[:3])], ValueError, "24 inputs but 3 labels"),
    "label type": ([(X, "labels")], TypeError, "Labels must be a tensor, an array or a list"),
    "no labels at all": ([(X, None)], TypeError, "Labels must be a tensor.* got None"),
    "three elements": ([(X, Y, Y)], TypeError, r"3 elements .*cannot be told. Pass `split=`"),
    "an iterator": (iter([(X, Y)]), TypeError, "is an iterator .* can be used once only"),
    "too large": ([(X, Y + 2)], ValueError, r"must lie in 0..2, as the model has 3 outputs"),
    "negative": ([(X, Y - 1)], ValueError, r"must lie in 0..2"),
    "late": ([(X, Y), (X, Y + 2)], ValueError, r"^Batch 1: .*must lie in 0..2"),
    "float labels": ([(X, Y.double())], TypeError, "Class labels must be integers"),
    "one-hot labels": ([(X, torch.eye(3)[Y].long())], ValueError, r"must have shape \(n,\)"),
    "NaN": ([(spoiled(X), Y)], ValueError, "`x` holds NaN or infinite"),
    "late infinity": (
        [(X, Y), (spoiled(X, math.inf), Y)],
        ValueError,
        "^Batch 1: `x` holds NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", BAD_LOADERS)
def test_bad_loaders(case):
    loader, error, message = BAD_LOADERS[case]
    ella = SETTING.fit().calibrate(SETTING.val_loader)
    expected, tuning = ella.predict_proba(SETTING.test_x), ella.tuning
    for use in (ella.fit, ella.partial_fit, ella.calibrate):
        with pytest.raises(error, match=message):
            use(loader)
        assert torch.equal(ella.predict_proba(SETTING.test_x), expected)
        assert ella.tuning is tuning
    unfitted = SETTING.make()
    with pytest.raises(error, match=message):
        unfitted.fit(loader)
    assert unfitted.hyperparameters is None


def test_an_iterator_is_used_up(setting):
    ella = setting.make()
    with pytest.raises(TypeError, match=r"is an iterator .*can be used once only"):
        ella.fit(iter(setting.loader))


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.zeros(N, 2), ValueError, r"must have shape \(n, 3\), as the model has 3 outputs"),
        (Y, TypeError, "Regression targets must be floating point"),
        (spoiled(torch.zeros(N, 3)), ValueError, "targets hold NaN"),
    ],
    ids=["width", "integers", "NaN"],
)
def test_bad_targets(targets, error, message):
    ella = Setting("mlp", "regression").fit()
    for use in (ella.fit, ella.partial_fit, ella.calibrate):
        with pytest.raises(error, match=message):
            use([(X, targets)])


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (spoiled(X), ValueError, "`x` holds NaN"),
        (X.to("meta"), ValueError, "`x` is on meta, but the model is on cpu"),
        (X[:0], ValueError, "`x` is empty"),
        ([], ValueError, "The loader is empty"),
        (3, TypeError, "`x` must be one batch"),
    ],
    ids=["NaN", "device", "no examples", "no batches", "number"],
)
def test_bad_inputs(setting, x, error, message):
    ella = setting.fit()
    for use in (ella.predict_proba, ella.predict, ella.logits, ella.uncertainty):
        with pytest.raises(error, match=message):
            use(x)


def test_before_fit(setting, tmp_path):
    ella = setting.make()
    uses = [
        lambda: ella.predict_proba(X),
        lambda: ella.predict(X),
        lambda: ella.logits(X),
        lambda: ella.sample_logits(X, 2),
        lambda: ella.uncertainty(X),
        lambda: ella.features(X),
        lambda: ella.calibrate(setting.loader),
        lambda: ella.partial_fit(setting.loader),
        lambda: ella.log_marginal_likelihood(),
        lambda: ella.save(tmp_path / "nothing"),
        lambda: ella.curvature,
        lambda: ella.state_bytes,
    ]
    for use in uses:
        with pytest.raises(NotFittedError, match=r"Call ELLA.fit\(train_loader\) first"):
            use()
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("method", [Nystrom(rank=30, subsample=20), neural(rank=30)], ids=repr)
def test_more_eigenfunctions_than_the_data_carry(setting, method):
    with pytest.raises(ValueError, match=r"`rank` is 30, but the .* span only"):
        setting.fit(method)


def test_exact_residual_of_networks(setting):
    with pytest.raises(ValueError, match=r'NeuralEF learns the residual.*use residual="diag"'):
        setting.fit("neural", residual="exact")


def test_last_layer_of_a_model_without_one(setting):
    model = nn.Sequential(setting.model, nn.Tanh())
    with pytest.raises(ValueError, match=r"outputs come straight from an nn.Linear"):
        ELLA(model, eigenfunctions=LastLayer(), progress=False).fit(setting.loader)


def test_nystrom_says_when_rows_do_not_fit(setting):
    with pytest.raises(ValueError, match=r"over 16 times the memory budget. Lower `subsample`"):
        setting.fit(memory_budget=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "poisson"}, "`likelihood` must be one of .*got 'poisson'"),
        ({"residual": "full"}, "`residual` must be one of .*got 'full'"),
        ({"prior_precision": 0.0}, "`prior_precision` must be a finite number above 0"),
        ({"prior_precision": math.nan}, "`prior_precision` must be a finite number above 0"),
        ({"temperature": -1.0}, "`temperature` must be a finite number above 0"),
        ({"logit_temperature": math.inf}, "`logit_temperature` must be a finite number"),
        ({"noise_variance": "big"}, "`noise_variance` must be a finite number above 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings(setting, options, message):
    with pytest.raises(ValueError, match=message):
        setting.make(**options)


def test_bad_method_settings():
    with pytest.raises(ValueError, match="`outputs` must be one of"):
        Nystrom(outputs="some")
    with pytest.raises(ValueError, match="`rank` must be a whole number of at least 1; got 0"):
        Nystrom(rank=0)
    with pytest.raises(
        ValueError, match="`width` must be a whole number of at least 1 and at most 1048576; got 0"
    ):
        NeuralEF(width=0)
    with pytest.raises(ValueError, match="`reads` must be one of 'activations', 'inputs'"):
        NeuralEF(reads="weights")
    with pytest.raises(ValueError, match="needs `teacher` or `training`"):
        NeuralEF(teacher=None, training=None)


def test_bad_links(setting):
    ella = setting.fit()
    for use in (
        lambda **options: ella.predict_proba(setting.test_x, **options),
        lambda **options: ella.calibrate(setting.val_loader, **options),
    ):
        with pytest.raises(ValueError, match="`link` must be one of"):
            use(link="softmax")
        with pytest.raises(ValueError, match="`n_samples` must be a whole number of at least 1"):
            use(n_samples=0)
    assert ella.tuning is None


def test_settings_are_not_shared_between_objects(setting):
    assert replace(METHODS["neural"], rank=2).rank == 2
    first, second = setting.fit(), setting.make()
    assert first.hyperparameters is not None
    assert second.hyperparameters is None


# Evaluated once, tuned many times


def test_an_evaluated_method_is_the_method_on_row_numbers():
    case = make_case("mlp", n=40)
    loader = [(case.x, case.y)]
    ella = ELLA(case.model, eigenfunctions=Nystrom(4), progress=False).fit(loader)
    known = ella.evaluated(loader)
    rows = torch.tensor([3, 17, 5])
    assert len(known) == 40
    assert known.state_bytes == ella.state_bytes
    torch.testing.assert_close(known.predict_proba(rows), ella.predict_proba(case.x[rows]))
    before = ella.hyperparameters
    known.calibrate([(torch.arange(20), case.y[:20])])
    assert ella.hyperparameters == before
    ella.calibrate([(case.x[:20], case.y[:20])])
    assert known.hyperparameters == ella.hyperparameters
    torch.testing.assert_close(
        known.uncertainty(rows).entropy, ella.uncertainty(case.x[rows]).entropy
    )
    assert not hasattr(known, "fit")
    with pytest.raises(TypeError, match="row numbers of the evaluated data"):
        known.predict_proba(case.x)


def test_only_a_fitted_method_can_be_evaluated():
    case = make_case("mlp")
    with pytest.raises(NotFittedError):
        ELLA(case.model).evaluated([(case.x, case.y)])
