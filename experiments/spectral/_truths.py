"""Kernels whose eigenpairs are known in closed form or to rounding error."""

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ella.spectral import RBF, Kernel, Polynomial


@dataclass(frozen=True)
class Truth:
    """A kernel on a distribution, with its leading eigenpairs.

    Attributes:
        kernel: κ.
        points: Quadrature nodes or a dense grid, shape (m, d).
        weights: Probabilities of the points, shape (m,).
        eigenvalues: μ, shape (k,), decreasing.
        functions: Orthonormal eigenfunctions at the points, shape (m, k).
    """

    kernel: Kernel
    points: Tensor
    weights: Tensor
    eigenvalues: Tensor
    functions: Tensor

    def angle(self, values: Tensor) -> float:
        """Largest principal angle, in degrees and in L²(p), from values (m, k) at the points."""
        root = self.weights.sqrt().unsqueeze(1)
        bases = [torch.linalg.qr(root * each.double()).Q for each in (values, self.functions)]
        cosine = torch.linalg.svdvals(bases[0].T @ bases[1]).min().clamp(0, 1).item()
        return math.degrees(math.acos(cosine))

    def eigenvalue_errors(self, values: Tensor) -> Tensor:
        """Relative errors of estimated eigenvalues, shape (k,)."""
        return (values.double() - self.eigenvalues).abs() / self.eigenvalues


def gaussian_rbf(rank: int = 10, dim: int = 2, nodes: int = 40) -> Truth:
    r"""The RBF kernel with l = 1 on N(0, I), by Mehler's formula.

    In one dimension, with a = 1/4, b = 1/2, :math:`c = \sqrt{a^2 + 2ab}`, A = a + b + c:
    :math:`μ_j = \sqrt{2a/A} (b/A)^j` and :math:`ψ_j(x) = (c/a)^{1/4} e^{-(c-a)x^2}
    H_j(\sqrt{2c} x) / \sqrt{2^j j!}`; products of these in more dimensions. In two dimensions the
    levels have 1, 2, 3 and 4 functions, so that ten are a closed set.

    Reference: Gaussian Processes for Machine Learning (Rasmussen & Williams, 2006), section 4.3.
    """
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    x, w = torch.from_numpy(x), torch.from_numpy(w / w.sum())
    a, b = 0.25, 0.5
    c = math.sqrt(a * a + 2 * a * b)
    ratio = b / (a + b + c)
    count = rank if dim == 1 else math.ceil(rank ** (1 / dim)) + 3
    hermite = [torch.ones_like(x), 2 * math.sqrt(2 * c) * x]
    for j in range(1, count):
        hermite.append(2 * math.sqrt(2 * c) * x * hermite[j] - 2 * j * hermite[j - 1])
    scale = (c / a) ** 0.25 * torch.exp(-(c - a) * x * x)
    ones = [scale * h / math.sqrt(2.0**j * math.factorial(j)) for j, h in enumerate(hermite)]
    orders = sorted(product(range(count), repeat=dim), key=sum)[:rank]
    values = [math.sqrt(2 * a / (a + b + c)) ** dim * ratio ** sum(order) for order in orders]
    functions = []
    for order in orders:
        grid = torch.ones((), dtype=torch.float64)
        for j in order:
            grid = grid.unsqueeze(-1) * ones[j]
        functions.append(grid.flatten())
    points = torch.cartesian_prod(*[x] * dim).view(-1, dim)
    weights = torch.cartesian_prod(*[w] * dim).view(-1, dim).prod(1)
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    return Truth(RBF(1.0), points, weights, eigenvalues, torch.stack(functions, 1))


def uniform_polynomial(rank: int = 10, nodes: int = 12) -> Truth:
    r"""(x·y + 1.5)⁴ on U([-1, 1] × [-.8, .8]), exact by Gauss-Legendre quadrature.

    The kernel has 15 monomial features z(x), κ = z·z'; the eigenpairs are those of E[zzᵀ], whose
    entries are polynomials that the quadrature integrates exactly.
    """
    x, w = np.polynomial.legendre.leggauss(nodes)
    sides = torch.from_numpy(x), 0.8 * torch.from_numpy(x)
    points = torch.cartesian_prod(*sides)
    weights = torch.cartesian_prod(*[torch.from_numpy(w / w.sum())] * 2).prod(1)
    degree, bias = 4, 1.5
    columns = []
    for i, j in product(range(degree + 1), repeat=2):
        if i + j <= degree:
            rest = degree - i - j
            ways = math.factorial(degree) / math.prod(map(math.factorial, (i, j, rest)))
            columns.append(math.sqrt(ways * bias**rest) * points[:, 0] ** i * points[:, 1] ** j)
    features = torch.stack(columns, 1)
    values, vectors = torch.linalg.eigh(features.T @ (weights.unsqueeze(1) * features))
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    return Truth(
        Polynomial(degree, bias), points, weights, values, features @ vectors / values.sqrt()
    )
