"""`Lumped`: a Gaussian over many logits, at the most probable classes and groups of all others."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ella.lognormal import log_sum_moments
from ella.predictive import LogitGaussian, centred_norm, standard_normals_like

if TYPE_CHECKING:
    from typing_extensions import Self


class Lumped(LogitGaussian):
    r"""The Gaussian at m classes, and at :math:`\log \sum_j e^{f_j}` of g groups of the others.

    The groups are neighbours in the order of the logits. Softmax over these m + g numbers is that
    over all c, so that an average over draws costs m + g exponentials instead of c, and (m + g)·k
    numbers of the factor are kept instead of c·k. Of a group, with r the variances D + v in it,

    - the factor is :math:`\sum_j w_j F_j`, the first-order expansion, w being the softmax of its
      logits at τ = 1;
    - what is independent from class to class is a Gaussian with the mean and the variance of
      :math:`\log \sum_j e^{f_j + ε_j}` (`log_sum_moments`). With one class that is exact.

    Both are made where they are asked for, as they depend on T, τ, δ and v.

    Args:
        factor: Shape (n, m + g, k).
        outside: Shape (n,), or None.
        classes: The m classes, shape (n, m).
        others: The others in groups, shape (n, c − m).
        logits: f in this order, −∞ where the last group has no more, shape (n, m + g·w).
        noise: D in this order, or None for 0.
    """

    def __init__(
        self,
        factor: Tensor,
        outside: Tensor | None,
        *,
        classes: Tensor,
        others: Tensor,
        logits: Tensor,
        noise: Tensor | None,
    ) -> None:
        named = {"factor": factor, "outside": outside, "classes": classes, "others": others}
        for name, value in {**named, "logits": logits, "noise": noise}.items():
            object.__setattr__(self, name, value)

    classes: Tensor
    others: Tensor
    logits: Tensor
    noise: Tensor | None

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, but for the factor, shape (n, m + g) both; v is in."""
        noise = self.noise
        if self.outside is not None:
            noise = _plus(noise, self.outside.unsqueeze(1).expand_as(self.logits))
        m = self.classes.shape[1]
        return _moments(self.logits, noise, m, self.factor.shape[1] - m)

    @cached_property
    def mean(self) -> Tensor:
        """Shape (n, m + g); of groups, as above."""
        return self._moments[0]

    @cached_property
    def residual(self) -> Tensor | None:
        """Shape (n, m + g), or None; less v, which comes on top of it."""
        if self.outside is None:
            return None if self.noise is None else self._moments[1]
        return self._moments[1] - self.outside.unsqueeze(1)

    def _parts(self) -> dict[str, Tensor | None]:
        """What it was made of."""
        named = {"factor": self.factor, "outside": self.outside, "classes": self.classes}
        return {**named, "others": self.others, "logits": self.logits, "noise": self.noise}

    def _with(self, **changed: Tensor | None) -> "Self":
        """The same with other parts."""
        return type(self)(**{**self._parts(), **changed})  # type: ignore[arg-type]

    @classmethod
    def of(
        cls,
        gaussian: LogitGaussian,
        count: int,
        groups: int = 1,
        *,
        y: Tensor | None = None,
        scale: float = 1.0,
    ) -> "Lumped":
        """A Gaussian at the `count` classes of the largest mean, and some groups of others.

        Args:
            gaussian: Over all logits, with no residual or variances.
            count: m, below c.
            groups: The most groups.
            y: Classes that have to be among the m, shape (n,).
            scale: τ by which the logits were divided.
        """
        n, c = gaussian.mean.shape
        key = gaussian.mean if y is None else gaussian.mean.scatter(1, y.unsqueeze(1), torch.inf)
        order = key.argsort(dim=1, descending=True, stable=True)
        classes, others = order[:, :count], order[:, count:]
        size = -(-(c - count) // min(groups, c - count))
        groups, missing = -(-(c - count) // size), -(c - count) % size
        logits = F.pad(gaussian.mean.gather(1, order), (0, missing), value=-torch.inf)
        noise = gaussian.residual
        noise = None if noise is None else F.pad(noise.gather(1, order), (0, missing))
        weight = (logits[:, count:] * scale).view(n, groups, size).softmax(-1)
        # Dense weights of each group: cheaper than the rows of all classes in another order.
        place = others + torch.arange(c - count, device=others.device) // size * c
        dense = weight.new_zeros(n, groups * c).scatter_(
            1, place, weight.flatten(1)[:, : c - count]
        )
        first = gaussian.factor[torch.arange(n, device=others.device).unsqueeze(1), classes]
        factor = torch.cat([first, dense.view(n, groups, c) @ gaussian.factor], dim=1)
        order_of = {"classes": classes, "others": others}
        return cls(factor, gaussian.outside, **order_of, logits=logits, noise=noise)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Self":
        named = self._parts().items()
        return self._with(**{name: None if t is None else function(t) for name, t in named})

    @classmethod
    def joined(cls, parts: "Sequence[LogitGaussian]") -> "Lumped":
        """See `LogitGaussian`."""
        own = [part._parts() for part in parts if isinstance(part, Lumped)]
        found: dict[str, Tensor | None] = {}
        for name in own[0]:
            values = [value for each in own if (value := each[name]) is not None]
            found[name] = torch.cat(values) if values else None
        return cls(**found)  # type: ignore[arg-type] # None only where it may be

    def widened(self, scale: float) -> "Lumped":
        """See `LogitGaussian`."""
        if self.outside is None:
            return self
        return self._with(outside=self.outside * scale if scale else None)

    def beside(self, outside: Tensor) -> "Lumped":
        """See `LogitGaussian`."""
        return self._with(outside=outside)

    def norm(self) -> Tensor:
        """See `LogitGaussian`: of all c logits."""
        return centred_norm(self.logits[:, : self.classes.shape[1] + self.others.shape[1]])

    def multiplied(self, gain: Tensor) -> "Lumped":
        """See `LogitGaussian`."""
        gain = gain.unsqueeze(1)
        noise = None if self.noise is None else self.noise * gain.square()
        return self._with(
            factor=self.factor * gain.unsqueeze(2), logits=self.logits * gain, noise=noise
        )

    def settled(self) -> "Lumped":
        """See `LogitGaussian`."""
        if self.outside is None:
            return self
        noise = _plus(self.noise, self.outside.unsqueeze(1).expand_as(self.logits))
        return self._with(outside=None, noise=noise)

    def conditioned(self, whitening: Tensor, prior_precision: float) -> "Lumped":
        """See `LogitGaussian`."""
        noise = None if self.noise is None else self.noise / prior_precision
        return self._with(factor=self.factor @ whitening, noise=noise)

    def tempered(self, temperature: float, logit_temperature: float) -> "Lumped":
        """See `LogitGaussian`."""
        scale = temperature**0.5 / logit_temperature
        noise = None if self.noise is None else self.noise * scale**2
        logits = self.logits / logit_temperature
        return self._with(factor=self.factor * scale, logits=logits, noise=noise)

    def compressed(self) -> "Lumped":
        """Itself: m + g rows are few."""
        return self

    def spread(self, probs: Tensor) -> Tensor:
        r"""Probabilities of all classes (n, c) from those of the m + g logits.

        The classes of a group share its probability in the proportion of
        :math:`\mathrm{E} \min(e^{f_j + ε_j}/Y, 1)`, Y being the sum over all classes at the means:
        for little noise the mean exponential, for much the probability of being the largest.
        """
        m, groups = self.classes.shape[1], self.factor.shape[1] - self.classes.shape[1]
        weights = self.logits - self.mean.logsumexp(1, keepdim=True)
        if self.noise is not None:
            weights = _log_clipped_mean(weights, self.noise)
        shares = weights[:, m:].view(len(weights), groups, -1).softmax(-1)
        others = (shares * probs[:, m:].unsqueeze(-1)).flatten(1)[:, : self.others.shape[1]]
        order = torch.cat([self.classes, self.others], dim=1)
        found = torch.cat([probs[:, :m], others], dim=1)
        return torch.empty_like(found).scatter_(1, order, found)

    def position_of(self, y: Tensor) -> Tensor:
        """Where classes (n,) are among the m.

        Raises:
            ValueError: If one is not.
        """
        found = self.classes == y.unsqueeze(1)
        if not found.any(1).all():
            raise ValueError("`y` must be among the classes that were kept: pass it to `of`.")
        return found.long().argmax(1)

    def drawn(self, num_samples: int, seed: int) -> Callable[[float, float], Tensor]:
        """See `LogitGaussian`."""
        if self.outside is not None:
            return super().drawn(num_samples, seed)
        n, rows, k = self.factor.shape
        m = self.classes.shape[1]
        normals = standard_normals_like(self.factor, num_samples, k + rows, seed)
        of_class, of_group = normals[:, k : k + m], normals[:, k + m :].unsqueeze(-1)
        flat = self.factor.permute(2, 1, 0).reshape(k, rows * n)
        common = (normals[:, :k] @ flat).view(num_samples, rows, n)
        if self.noise is not None:
            root = self.noise[:, :m].clamp_min(0).sqrt()
            common[:, :m].addcmul_(root.T, of_class.unsqueeze(-1))

        def at(temperature: float, logit_temperature: float) -> Tensor:
            scale = temperature**0.5 / logit_temperature
            noise = None if self.noise is None else self.noise * scale**2
            mean, variance = _moments(self.logits / logit_temperature, noise, m, rows - m)
            draws = torch.add(mean.T, common, alpha=scale)
            draws[:, m:].addcmul_(variance[:, m:].sqrt().T, of_group)
            return draws

        return at


def _plus(noise: Tensor | None, other: Tensor) -> Tensor:
    return other if noise is None else noise + other


def _moments(logits: Tensor, noise: Tensor | None, m: int, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, but for the factor, of m classes and the groups: (n, m + g) both."""
    rest = logits[:, m:].view(len(logits), groups, -1)
    if noise is None:
        mean = torch.cat([logits[:, :m], rest.logsumexp(-1)], dim=1)
        return mean, torch.zeros_like(mean)
    noise = noise.clamp_min(0)
    of_groups = log_sum_moments(rest, noise[:, m:].view_as(rest))
    first = (logits[:, :m], noise[:, :m])
    mean, variance = (torch.cat(both, dim=1) for both in zip(first, of_groups, strict=True))
    return mean, variance


def _log_clipped_mean(logs: Tensor, variances: Tensor) -> Tensor:
    """Log of E min(exp(f + ε), 1), ε of some variance."""
    variances = variances.clamp_min(torch.finfo(variances.dtype).eps)
    deviation = variances.sqrt()
    below = logs + variances / 2 + torch.special.log_ndtr(-(logs + variances) / deviation)
    return torch.logaddexp(below, torch.special.log_ndtr(logs / deviation))
