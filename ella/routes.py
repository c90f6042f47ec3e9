"""Which way the Jacobian products of a model are computed: tried, compared and timed once."""

import logging
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ella.derivatives import Functional, Parameters, Plain, is_out_of_memory
from ella.inputs import Inputs, num_examples, take
from ella.network import Network

log = logging.getLogger("ella")

TIMED = 8
"""Examples, and rows of each, that the ways to compute rows are timed on, at most."""
WORTH_TIMING = 0.05
"""Seconds below which the first way is taken as it is: few calls of small models say nothing."""
CLEARLY = 0.75
"""Share of the time that another way has to take at most to be chosen by the clock."""


class Routes:
    """By `torch.func`, vmapped, or by ordinary autograd, one example and output after the other.

    Args:
        network: The model.
        names: For each weight all names by which modules reach it.
    """

    def __init__(self, network: Network, names: Mapping[str, list[str]]) -> None:
        self.functional, self.plain = Functional(network, names), Plain(network, names)
        self.network = network
        self.chosen: dict[str, Functional | Plain] = {}

    def of(self, product: str, x: Inputs, parameters: Parameters) -> Functional | Plain:
        """What computes a kind of product.

        Args:
            product: "jvp", "vjp" or "rows".
            x: Some examples to try it on.
            parameters: Values of the weights.
        """
        if product not in self.chosen:
            self._choose(product, self._refusal(product, take(x, slice(2)), parameters))
        return self.chosen[product]

    def time_rows(self, x: Inputs, parameters: Parameters) -> None:
        """Before many rows: leave `torch.func` where it is clearly slower than autograd.

        It is with depthwise convolutions. The two differ by rounding, so that a choice by the
        clock should not hang on a hair, and is not made where results have to be the same again.

        Args:
            x: See `of`; at most `TIMED`.
            parameters: See `of`.
        """
        if isinstance(self.of("rows", x, parameters), Functional):
            self._choose("rows", self._slower(x, parameters))

    def _choose(self, product: str, reason: str | None) -> None:
        """By `torch.func`, unless there is a reason against it."""
        self.chosen[product] = self.functional if reason is None else self.plain
        if reason is not None:
            log.info("%s: by autograd, one example at a time: %s", product, reason)

    def _refusal(self, product: str, x: Inputs, parameters: Parameters) -> str | None:
        """Why `torch.func` cannot compute a kind of product, or None if it can."""
        try:
            found = self._sample(product, self.functional, x, parameters)
        except Exception as error:  # anything may be raised in the user's forward pass
            if is_out_of_memory(error):
                raise
            self._sample(
                "rows", self.plain, x, parameters
            )  # an error of the model's own comes again
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        expected = self._sample("rows", self.plain, x, parameters)
        tolerance = 1e3 * torch.finfo(self.network.dtype).eps
        apart = (found - expected).abs().max()
        if not bool(apart <= tolerance * expected.abs().max().clamp_min(1e-30)):
            return "its products differ from those of autograd"
        return None

    def _sample(
        self, product: str, route: Functional | Plain, x: Inputs, parameters: Parameters
    ) -> Tensor:
        """uᵀJ(x)v for each example, one output u and one random tangent v, by each product."""
        n, dtype, device = num_examples(x), self.network.dtype, self.network.device
        c = self.network(x).shape[1]
        p = sum(weight.numel() for weight in parameters.values())
        v = torch.randn(p, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        u = nn.functional.one_hot(torch.arange(n) % c, c).to(device, dtype)
        if product == "jvp":
            found = route.jvp(x, parameters, v.unsqueeze(0), 1).squeeze(-1)
            return (found * u).sum(-1).float()
        if product == "vjp":
            each = (slice(i, i + 1) for i in range(n))
            gradients = [
                route.vjp(take(x, i), parameters, u[i].unsqueeze(-1), 1).squeeze(0) for i in each
            ]
            return torch.stack(gradients).float() @ v.float()
        return route.rows(x, parameters, u.unsqueeze(1)).squeeze(1).float() @ v.float()

    def _slower(self, x: Inputs, parameters: Parameters) -> str | None:
        c = self.network(x).shape[1]
        eye = torch.eye(c, dtype=self.network.dtype, device=self.network.device)[:TIMED]
        cotangents = eye.expand(num_examples(x), *eye.shape)
        vmapped = self._seconds(self.functional, x, parameters, cotangents)
        if vmapped < WORTH_TIMING:
            return None
        plain = self._seconds(self.plain, x, parameters, cotangents)
        if plain < CLEARLY * vmapped:
            return f"{plain:.3g} s against {vmapped:.3g} s by torch.func"
        return None

    @staticmethod
    def _seconds(
        route: Functional | Plain, x: Inputs, parameters: Parameters, cotangents: Tensor
    ) -> float:
        """On a CPU of this process alone: others may be busy, too."""
        on_cpu = cotangents.device.type == "cpu"
        clock = time.process_time if on_cpu else time.perf_counter
        start = clock()
        route.rows(x, parameters, cotangents)
        if cotangents.is_cuda:
            torch.cuda.synchronize(cotangents.device)
        return clock() - start
