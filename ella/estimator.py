"""`ELLA`: the stages in order, from a trained model to calibrated predictions."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ella.activations import FeatureTaps
from ella.arguments import BYTES, COUNT, POSITIVE, having, instance, optional, real
from ella.batches import Batches, Loader, Split
from ella.checkpoint import Checkpoint
from ella.choosing import stage_ends
from ella.distance import Distance, Stages
from ella.eigenfunctions import EigenfunctionMethod, Eigenfunctions, NeuralEF
from ella.eigenfunctions.neural_features import NeuralFeatures
from ella.eigenfunctions.plan import Plan
from ella.export import PredictiveModule
from ella.fitted import Features, Fit, Sums
from ella.hints import hint
from ella.inputs import Inputs
from ella.likelihoods import Discrete, Likelihood
from ella.linearize import DEFAULT_MEMORY_BUDGET, Linearized
from ella.links import MonteCarlo
from ella.outputs import Output
from ella.posterior import LaplaceEvaluation
from ella.predictive import LogitGaussian
from ella.seen import MANY, Seen
from ella.stored import Stored
from ella.summing import Summing

if TYPE_CHECKING:
    from typing_extensions import Self


METHOD = having("a method such as NeuralEF()", "fit")
SUSPICIOUS = 0.05
"""Share of validation examples that may be training examples, too, before a hint is given."""


class ELLA(Stored):
    r"""Accelerated linearized Laplace for any trained classifier or regressor.

    The posterior over the logits is N(f(x)/τ, S(x)/τ²) with

    .. math:: S = T [φ (G + δI)^{-1} φ^\top + R/δ], \qquad G = \sum_i φ(x_i)^\top Λ_i φ(x_i),

    φ(x) ∈ R^{c×k} being the leading eigenfunctions of the neural tangent kernel and R the prior
    variance outside their span. Without R ("none") the covariance under-reports that of the dense
    linearized Laplace approximation; with "exact" it is J(δI + VGVᵀ)⁻¹Jᵀ, never above the prior.

    Args:
        model: Trained `nn.Module` with outputs (n, c). It is not changed, and its weights are not
            copied. If they change after `fit`, predictions are refused (`ModelChangedError`).
        likelihood: "classification", "multilabel" or "binary", "regression", or a `Likelihood`.
        eigenfunctions: `NeuralEF`, `Nystrom` or `LastLayer`.
        prior_precision: δ. None lets `fit` choose it from the training data (`fit`).
        temperature: T, multiplies the posterior covariance.
        logit_temperature: τ, divides the logits.
        distance: A `Distance`, for variance that grows away from the training data; `calibrate`
            sets its scale. None leaves it out.
        noise_variance: Shorthand for `likelihood=Normal(noise_variance)`.
        residual: Shorthand for the `residual` of `eigenfunctions`.
        output: Where the logits are in what the model returns: a name, an index or a function;
            None is the obvious guess (`find_logits`).
        split: `batch` ↦ `(x, y)`, for loaders whose batches are unusual; None is `split_batch`.
        seed: Seed of everything random; the same seed gives the same result.
        progress: Whether to show progress bars.
        positions: Of outputs for every position, the most rows of one example that `fit` and
            `calibrate` look at.
        memory_budget: Bytes that one Jacobian product may take (`Linearized`).
        process_group: Of `torch.distributed`, whose processes each have a part of the data; None
            takes all processes if `init_process_group` was called. All of them have to call what
            takes a loader of labelled data; each predicts for itself, and one of them saves.

    Raises:
        TypeError: If `model` is not an `nn.Module`.
        ValueError: If an argument is out of range.

    Reference: Accelerated Linearized Laplace Approximation for Bayesian Deep Learning
    (Deng et al., 2022), https://arxiv.org/abs/2210.12642
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        likelihood: str | Likelihood = "classification",
        eigenfunctions: EigenfunctionMethod | None = None,
        prior_precision: float | None = None,
        temperature: float = 1.0,
        logit_temperature: float = 1.0,
        distance: Distance | None = None,
        noise_variance: float | None = None,
        residual: str | None = None,
        output: Output = None,
        split: Split | None = None,
        positions: int = 64,
        seed: int = 0,
        progress: bool = True,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        process_group: object = None,
    ) -> None:
        super().__init__(
            model,
            likelihood=likelihood,
            noise_variance=noise_variance,
            output=output,
            split=split,
            seed=seed,
            progress=progress,
        )
        method = METHOD("eigenfunctions", NeuralEF() if eigenfunctions is None else eigenfunctions)
        method = method if residual is None else replace(method, residual=residual)
        self.eigenfunctions: EigenfunctionMethod = method
        self.prior_precision = optional(POSITIVE)("prior_precision", prior_precision)
        self.temperature: float = POSITIVE("temperature", temperature)
        self.logit_temperature: float = POSITIVE("logit_temperature", logit_temperature)
        self.distance: Distance | None = optional(instance(Distance))("distance", distance)
        self.memory_budget = BYTES("memory_budget", memory_budget)
        self.process_group = process_group
        self.positions = COUNT("positions", positions)
        self._fit: Fit | None = None
        self._seen = Seen.of_unknown()

    @property
    def linearized(self) -> Linearized:
        """The model and its Jacobian, in the weights that were fitted or require a gradient.

        Raises:
            ValueError: If no parameter requires a gradient.
        """
        trainable = None if self._fit is None else self._fit.trainable
        return Linearized(self.network, memory_budget=self.memory_budget, trainable=trainable)

    @torch.inference_mode(False)
    def fit(
        self, train_loader: Loader, *, checkpoint: str | os.PathLike[str] | None = None
    ) -> "Self":
        """Learn the eigenfunctions, then sum G over the training data. Starts again each time.

        A loader that shuffles or augments is fine: both passes take whatever it yields.

        With `prior_precision=None`, δ is set so that the prior standard deviation of a logit is 1
        on the training data: the prior then says that a logit may well be off by one, whatever
        the scale of the network. Marginal likelihood is *not* used, as it is known to pick
        precisions that ruin the predictive; `log_marginal_likelihood` is there for those who want
        it. Prefer `calibrate` wherever held-out labels exist.

        Args:
            train_loader: Yields (x, y, ...) or mappings; x a tensor, tuple or mapping. It is
                iterated over more than once.
            checkpoint: A folder for what is finished. The same call again goes on from there, to
                the same result; batches have to come in the same order. It can be removed after.

        Raises:
            TypeError: If the loader, a batch or the labels have the wrong form.
            ValueError: If a value is bad, no parameter requires a gradient, the data carry fewer
                than k directions, or the checkpoint is of other data, another model or settings.
        """
        linearized = Linearized(self.network, memory_budget=self.memory_budget)
        with self._labelled_batches(train_loader).named() as batches:
            self._check_first_batch(batches)
            kept = self._checkpoint(checkpoint, linearized, batches)
            found = self._eigenfunctions(linearized, batches, kept)
            features = Features(found, self._stages(batches))
        seen = Seen()
        sums = self._sums(features, train_loader, seen, kept)
        self._hint_about_labels(seen)
        fit = Fit.of(features, sums, linearized.trainable)
        precision = self.prior_precision
        if precision is None:
            precision = fit.sums.unit_precision()
        start = self._started(precision, self.likelihood.initial_scale(fit.sums.statistics))
        if self.likelihood.scale == "logit_temperature":
            start = replace(start, logit_temperature=self.logit_temperature)
        chosen = replace(start, temperature=self.temperature)
        self._set_fitted(chosen, _fit=fit, _seen=seen)
        return self

    def partial_fit(self, loader: Loader) -> "Self":
        """Add more data to G; eigenfunctions and hyperparameters stay.

        Raises:
            NotFittedError: Before `fit`.
            ModelChangedError: If the weights changed since.
        """
        fit = self._fitted()
        seen = self._seen.copy()
        sums = fit.all_sums + self._sums(fit.features, loader, seen)
        self._set(_fit=fit.with_sums(sums), _seen=seen)
        return self

    def forget(self, loader: Loader) -> "Self":
        """Take data out of G again, as if they had never been in; the inverse of `partial_fit`.

        Eigenfunctions, which are a basis and not a posterior, and hyperparameters stay. The data
        have to be as they were when they came in: what a loader augments anew is not the same.

        Raises:
            NotFittedError: Before `fit`.
            ModelChangedError: If the weights changed since.
            ValueError: If they were not all in. That is seen example by example as long as all
                data that came in were remembered (4,096 examples, not in files); else only if G
                without them is no sum over data.
        """
        fit, seen = self._fitted(), self._seen.copy()
        gone = Seen()
        removed = self._sums(fit.features, loader, gone)
        seen.remove(gone)
        self._set(_fit=fit.with_sums(fit.all_sums - removed), _seen=seen)
        return self

    def decay(self, factor: float) -> "Self":
        """Let old data count less, before new ones come in by `partial_fit`: G becomes factor·G.

        With the same factor before each of many updates, data t updates old count factorᵗ. They
        cannot be forgotten exactly any more: `forget` takes out an example as it counted at first.

        Args:
            factor: Above 0, at most 1.

        Raises:
            NotFittedError: Before `fit`.
            ModelChangedError: If the weights changed since.
            ValueError: If the factor is out of range.
        """
        factor = real(0, 1, without_least=True)("factor", factor)
        fit = self._fitted()
        self._set(_fit=fit.with_sums(fit.all_sums.scaled(factor)), _seen=Seen.of_unknown())
        return self

    def predictive_module(self, n_samples: int | None = None) -> PredictiveModule:
        """Predictions as one plain `nn.Module`: for `torch.export`, `torch.compile` and ONNX.

        It is a copy: later changes of the model or of this object do not reach it.

        Args:
            n_samples: Draws; None takes those of `calibrate`, or 128.

        Returns:
            x ↦ (probabilities (n, c), mutual information (n,), logit variance (n,)).

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If this was not fitted with `NeuralEF`, has no probabilities, or was tuned
                with another link than "mc".
        """
        chosen, fit = self._require_fitted(), self._fitted()
        link = self._chosen_link(None, n_samples)
        if not isinstance(self.likelihood, Discrete) or not isinstance(link, MonteCarlo):
            raise ValueError(
                f"predictive_module exports averages of probabilities over draws; the likelihood "
                f"is {self.likelihood!r} and the link {link!r}."
            )
        epistemic = self._epistemic()
        return PredictiveModule(fit, self.network, chosen, epistemic, self.likelihood, link)

    def log_marginal_likelihood(self, prior_precision: float | None = None) -> float:
        """Laplace's estimate of log p(training data) at δ (default: the one in use), T = τ = 1.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If δ is not above 0.
        """
        fit, chosen = self._fitted(), self._require_fitted()
        if prior_precision is None:
            prior_precision = chosen.prior_precision
        prior_precision = POSITIVE("prior_precision", prior_precision)
        noise = chosen.noise_variance
        squared_norm = self.linearized.flat_parameters().double().square().sum().item()
        return fit.posterior.log_marginal_likelihood(
            self.likelihood.log_likelihood(fit.sums.statistics, noise),
            squared_norm,
            prior_precision,
            self.likelihood.dispersion(noise),
        )

    def features(self, x: Inputs) -> LogitGaussian:
        """The method's narrow waist: the prior at δ = 1, with f(x) as mean, φ(x) as factor and R.

        Raises:
            NotFittedError: Before `fit`.
        """
        eigenfunctions = self._fitted().eigenfunctions
        pieces = self._pieces(self._admitted(x))
        return LogitGaussian.joined([eigenfunctions(piece) for piece in pieces])

    @property
    def plan(self) -> Plan | None:
        """How `fit` went about `NeuralEF`, and what it expected to take; None from a file."""
        found = self._fitted().eigenfunctions
        return found.plan if isinstance(found, NeuralFeatures) else None

    @property
    def curvature(self) -> Tensor:
        """G at the noise variance in use, shape (k, k), float64."""
        noise = self._require_fitted().noise_variance
        return self._fitted().sums.curvature / self.likelihood.dispersion(noise)

    @property
    def state_bytes(self) -> int:
        """Bytes that prediction needs beyond the model: eigenfunctions, posterior, distances."""
        fit = self._fitted()
        tensors = [fit.posterior.eigenvalues, fit.posterior.eigenvectors]
        tensors += fit.eigenfunctions.state().tensors.values()
        own = 0 if fit.distance is None else fit.distance.sums.numbers
        wide = self.network.wide.itemsize
        return sum(t.numel() * t.element_size() for t in tensors) + own * wide

    def _evaluate(self, x: Inputs) -> LaplaceEvaluation:
        # Whoever asks has looked whether it still holds.
        return (self._fit or self._fitted()).evaluate(x)

    def _stages(self, batches: Batches) -> Stages | None:
        """Where distances are taken of activations; the same in all processes."""
        if self.distance is None:
            return None
        first = batches.first()
        taps = None if first is None else stage_ends(self.network, first[0])
        read = FeatureTaps(self.network, batches.processes.agreed(taps))
        found = Stages(read, self.distance.ridge)
        if not found.taps.taps:
            raise ValueError(
                "`distance` needs activations that follow the batch, example by example, and the "
                "model has none. Use distance=None."
            )
        return found

    def _sums(
        self,
        features: Features,
        loader: Loader,
        seen: Seen,
        checkpoint: Checkpoint | None = None,
    ) -> Sums:
        """Over all data; a sample of positions stands for all of them."""
        view = self._sampled_rows()
        kept = Checkpoint() if checkpoint is None else checkpoint
        summing = Summing(features, self.likelihood, self._piece_size, kept)
        with self._batches(loader, view).named() as batches:
            pairs = self._progress_over(batches.labelled(), "curvature")
            sums = summing.over(pairs, seen)
            processes = batches.processes
        if sums is None and processes.size == 1:
            raise ValueError("No data: expected at least one example.")
        if sums is not None and view.share != 1:
            sums = sums.scaled(1 / view.share)
        seen.complete = seen.complete and processes.size == 1
        return Sums.over(processes, sums, features.stages, self._device)

    def _eigenfunctions(
        self, linearized: Linearized, batches: Batches, checkpoint: Checkpoint
    ) -> Eigenfunctions:
        """Fitted, or as they were fitted before."""
        state = checkpoint.kept_by_all("eigenfunctions", batches.processes, self._device)
        if state is not None:
            return self.eigenfunctions.restore(
                self.network,
                state,
                trainable=linearized.trainable,
                memory_budget=self.memory_budget,
            )
        batches.checkpoint = checkpoint
        found = self.eigenfunctions.fit(
            linearized, batches, seed=self.seed, progress=self.progress
        )
        if checkpoint.folder is not None:
            checkpoint.keep("eigenfunctions", found.state())
            checkpoint.drop("sample")
        return found

    def _hint_about_labels(self, seen: Seen) -> None:
        if isinstance(self.likelihood, Discrete) and seen.one_label is not MANY:
            hint(
                f"All labels of the training data are {seen.one_label}: the curvature says "
                f"nothing of the other classes. Was the loader sorted by class and cut?"
            )

    def _look_at_validation(self, x: Inputs, *, first: bool) -> None:
        if first and self._seen.share(x) > SUSPICIOUS:
            hint(
                "calibrate was given training data: there the classifier is over-confident, and "
                "the search learns that nothing is wrong. Pass data that it was not trained on."
            )
