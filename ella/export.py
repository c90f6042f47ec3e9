"""`PredictiveModule`: a fitted estimator as one plain module, for stacks that know no ella."""

import copy
import math

import torch
from torch import Tensor, nn

from ella.activations import FeatureTaps, Tap, all_read, first_tensor
from ella.distance import ActivationDistance, Stages, combined
from ella.eigenfunctions.neural_features import NeuralFeatures
from ella.fitted import Fit
from ella.hyperparameters import Hyperparameters
from ella.inputs import MASK_KEY, input_tensors
from ella.likelihoods import Discrete
from ella.links import MonteCarlo
from ella.network import Network, called
from ella.outputs import as_rows
from ella.posterior import DISTANCE_POWER
from ella.predictive import LogitGaussian, standard_normals
from ella.wrappers import clean

UNROLLED = 16
"""Up to so many outputs a Cholesky factorisation is written out: ONNX has none."""


Prediction = tuple[Tensor, Tensor, Tensor]
"""Probabilities (n, c), mutual information (n,), mean marginal variance of the logits (n,).

A plain tuple: `torch.export.save` refuses outputs of a class of ours."""


class PredictiveModule(nn.Module):
    """x ↦ (probabilities, mutual information, logit variance), in one forward pass.

    It holds a copy of the model, and as buffers everything that prediction needs, and calls
    nothing that `torch.export` (with any number of examples), `torch.compile(fullgraph=True)` and
    `torch.onnx` could not follow. x is a tensor, or a tuple or dictionary of tensors.

    The results are those of `predict_proba` and `uncertainty` with as many draws, but for
    rounding. With more than 16 outputs and as many eigenfunctions, with more than 128 classes, of
    all of which it draws the logits, or with a residual of blocks and fewer eigenfunctions than
    outputs, draws are others, so that they agree up to the error of the average. Not to be called
    by several threads at once: export it, or give each a copy.

    Args:
        fit: A fit with `NeuralEF`.
        network: The model.
        chosen: What predicts.
        epistemic: What scores of the weights' uncertainty are read from.
        likelihood: Gives response and entropy.
        link: Draws.

    Raises:
        ValueError: If the fit or the likelihood cannot be exported.
    """

    def __init__(
        self,
        fit: Fit,
        network: Network,
        chosen: Hyperparameters,
        epistemic: Hyperparameters,
        likelihood: Discrete,
        link: MonteCarlo,
    ) -> None:
        super().__init__()
        features = fit.eigenfunctions
        if not isinstance(features, NeuralFeatures):
            raise ValueError(
                f"predictive_module needs an ELLA that was fitted with NeuralEF, whose "
                f"predictions are one forward pass; got {type(features).__name__}."
            )
        self.reads = _Reading(network, features.taps, fit)
        self.network = copy.deepcopy(features.basis.network)
        self.residual = copy.deepcopy(features.residual)
        self.reads_inputs = features.made.reads == "inputs"
        self.likelihood = likelihood
        c = features.made.shape[0]
        self.epistemic = _Posterior(fit, features, epistemic, likelihood, link, c)
        same = chosen == epistemic
        self.chosen = None if same else _Posterior(fit, features, chosen, likelihood, link, c)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> Prediction:
        """See the class."""
        logits, activations, distance = self.reads(x)
        psi = self.network(x if self.reads_inputs else activations)
        residual = None
        if self.residual is not None:
            residual = self.residual.variances(self.residual.network(activations))
        mean, deviations, variance = self.epistemic(logits, psi, residual, distance)
        each = self.epistemic.responses(mean, deviations)
        probabilities = known = each.mean(0).T
        if self.chosen is not None:
            mean, deviations, _ = self.chosen(logits, psi, residual, distance)
            probabilities = self.chosen.responses(mean, deviations).mean(0).T
        entropy = self.likelihood.entropy
        information = entropy(known) - entropy(each, 1).mean(0)
        return probabilities.contiguous(), information.clamp_min(0), variance.mean(-1)


class _Reading(nn.Module):
    """The model, with its activations and their distance read on the way."""

    def __init__(self, network: Network, taps: FeatureTaps, fit: Fit) -> None:
        super().__init__()
        self.model = copy.deepcopy(network.model).eval()
        self.output = network.output
        self.taps = list(taps.taps)
        self.stages: Stages | None = fit.features.stages
        self.distance = None if fit.distance is None else _Distance(fit.distance, network.wide)
        if self.stages is not None and not self.stages.among(self.taps):
            self.taps += [tap for tap in self.stages.taps.taps if tap not in self.taps]
        known = {} if self.stages is None else self.stages.signs(network.device)
        self.folded = list(known)
        for width, signs in known.items():
            self.register_buffer(f"signs_{width}", signs)
        self.width = len(taps.taps)
        self.store = _Store()
        modules = {clean(name): module for name, module in self.model.named_modules()}
        for i, tap in enumerate(self.taps):
            modules[clean(tap.module)].register_forward_hook(_Hook(self.store, i, tap))

    def forward(
        self, x: Tensor | tuple[Tensor, ...] | dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, activations as eigenfunctions read them, and D."""
        self.store.values.clear()
        self.store.mask = x.get(MASK_KEY) if isinstance(x, dict) else None
        self.store.count = input_tensors(x)[0].shape[0]
        logits = as_rows(called(self.model, x, self.output), x)
        if logits.ndim != 2:
            raise ValueError(
                f"A PredictiveModule is for outputs (n, c); the model gives {tuple(logits.shape)}."
            )
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        read = all_read(self.taps, self.store.values, logits)
        activations = torch.cat([*read[: self.width], logits], dim=1)
        if self.distance is None or self.stages is None:
            return logits, activations, None
        signs = {width: getattr(self, f"signs_{width}") for width in self.folded}
        stages = self.stages.split(torch.cat(read, dim=1), self.taps, signs)
        return logits, activations, self.distance(stages)


class _Store:
    """Where hooks put what they read; no attribute of a module, which must not change."""

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}
        self.mask: Tensor | None = None
        self.count: int | None = None


class _Hook:
    """Reads one tap. An object, so that a copy of the module has hooks of its own."""

    def __init__(self, store: _Store, index: int, tap: Tap) -> None:
        self.store, self.index, self.tap = store, index, tap

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        value = first_tensor(args if self.tap.side == "input" else output)
        if value is not None:
            pooled = self.tap.pool(value, self.store.mask, self.store.count)
            self.store.values[self.index] = pooled


class _Distance(nn.Module):
    """D(x) from the numbers of each stage."""

    def __init__(self, distance: ActivationDistance, dtype: torch.dtype) -> None:
        super().__init__()
        self.count = len(distance.roots)
        for i, (mean, root) in enumerate(distance.roots):
            # A file holds whole tensors: no views, which drag the rest of theirs along.
            self.register_buffer(f"mean_{i}", mean.to(dtype).clone())
            self.register_buffer(
                f"root_{i}", root.to(dtype).clone(memory_format=torch.contiguous_format)
            )

    def forward(self, stages: list[Tensor]) -> Tensor:
        """Shape (n,)."""
        names = [(f"mean_{i}", f"root_{i}") for i in range(self.count)]
        known = [(getattr(self, mean), getattr(self, root)) for mean, root in names]
        return combined(stages, known)


class _Posterior(nn.Module):
    """The Gaussian over logits at some hyperparameters, and draws from it."""

    mix: Tensor
    normals: Tensor

    def __init__(
        self,
        fit: Fit,
        features: NeuralFeatures,
        at: Hyperparameters,
        likelihood: Discrete,
        link: MonteCarlo,
        num_outputs: int,
    ) -> None:
        super().__init__()
        self.likelihood, self.num_outputs = likelihood, num_outputs
        self.logit_temperature, self.distance_scale = at.logit_temperature, at.distance_scale
        self.norm_exponent, self.typical_norm = at.norm_exponent, at.typical_norm
        self.residual_scale = at.temperature / at.logit_temperature**2 / at.prior_precision
        self.certain = at.temperature == 0 and at.distance_scale == 0
        mixing = features.basis.folded
        scale = math.sqrt(at.temperature) / at.logit_temperature
        whitened = fit.posterior.whitening(at.prior_precision).to(mixing.device)
        self.register_buffer("mix", (mixing.double() @ whitened * scale).to(mixing))
        rank, outside = self.mix.shape[1], features.residual is not None or at.distance_scale > 0
        few = num_outputs <= UNROLLED and (rank > num_outputs or (rank == num_outputs and outside))
        self.unrolled = few
        dim = num_outputs if few else rank + num_outputs * outside
        normals = standard_normals(link.num_samples, dim, link.seed)
        self.register_buffer("normals", normals.to(mixing))

    def forward(
        self, logits: Tensor, psi: Tensor, residual: Tensor | None, distance: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (n, c), deviations of draws (s, c, n), and marginal variances (n, c)."""
        scaled = None if residual is None else residual * self.residual_scale
        beside = None
        if distance is not None and self.distance_scale > 0:
            beside = self.distance_scale * distance**DISTANCE_POWER
        gaussian = LogitGaussian(logits, psi @ self.mix, scaled, beside)
        gaussian = gaussian.normalised(self.norm_exponent, self.typical_norm).settled()
        deviations = self._deviations(gaussian.factor, gaussian.residual)
        return gaussian.mean / self.logit_temperature, deviations, gaussian.variance()

    def responses(self, mean: Tensor, deviations: Tensor) -> Tensor:
        """The response at each draw, (s, c, n); at the mean alone where nothing is uncertain."""
        draws = mean.T.unsqueeze(0) if self.certain else mean.T + deviations
        return self.likelihood.response(draws, 1)

    def _deviations(self, factor: Tensor, outside: Tensor | None) -> Tensor:
        if self.unrolled:
            covariance = factor @ factor.mT
            if outside is not None:
                covariance = covariance + (
                    outside if outside.ndim == 3 else torch.diag_embed(outside)
                )
            return torch.einsum("sk,nck->scn", self.normals, cholesky(covariance))
        rank = factor.shape[-1]
        found = torch.einsum("sk,nck->scn", self.normals[:, :rank], factor)
        if outside is None:
            return found
        others = self.normals[:, rank:]
        if outside.ndim == 3:
            return found + torch.einsum("sd,ncd->scn", others, cholesky(outside))
        return found + others.unsqueeze(-1) * outside.clamp_min(0).sqrt().T


def cholesky(matrix: Tensor) -> Tensor:
    """The lower triangular root of matrices (n, c, c), column by column.

    A pivot that is rounding of 0 leaves its column 0: nothing is left to explain.
    """
    c = matrix.shape[-1]
    rounding = 4 * c * torch.finfo(matrix.dtype).eps
    columns: list[Tensor] = []
    for j in range(c):
        rest = matrix[:, j:, j]
        for known in columns:
            rest = rest - known[:, j:] * known[:, j : j + 1]
        pivot = rest[:, :1]
        left = pivot > rounding * matrix[:, j, j].unsqueeze(1)
        column = torch.where(left, rest / torch.where(left, pivot, 1).sqrt(), 0)
        columns.append(torch.nn.functional.pad(column, (j, 0)))
    return torch.stack(columns, dim=-1)
