"""Slow and obvious: dense Jacobians, Gauss-Newton matrices and linearized Laplace."""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor


def call(model, x):
    if isinstance(x, Tensor):
        out = model(x)
    elif isinstance(x, Mapping):
        out = model(**x)
    else:
        out = model(*x)
    return getattr(out, "logits", out)


def dense_jacobian(model, x):
    """Logits (n, c) and J (n, c, p) over the trainable weights, one entry at a time."""
    model = copy.deepcopy(model).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    logits = call(model, x)
    jacobian = torch.stack(
        [
            torch.stack(
                [
                    torch.cat(
                        [
                            g.reshape(-1)
                            for g in torch.autograd.grad(
                                value, parameters, retain_graph=True, materialize_grads=True
                            )
                        ]
                    )
                    for value in row
                ]
            )
            for row in logits
        ]
    )
    return logits.detach(), jacobian


def softmax_hessian(logits):
    """Λ = diag(p) − ppᵀ, shape (n, c, c)."""
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


def gaussian_hessian(logits, noise_variance):
    """Λ = I/σ², shape (n, c, c)."""
    n, c = logits.shape
    return torch.eye(c, dtype=logits.dtype).expand(n, c, c) / noise_variance


def dense_ggn(jacobian, hessian):
    """Σ JᵀΛJ, shape (p, p)."""
    return torch.einsum("nip,nij,njq->pq", jacobian, hessian, jacobian)


def lla_covariance(jacobian, ggn, prior_precision):
    """J (GGN + δI)⁻¹ Jᵀ, shape (n, c, c)."""
    precision = ggn + prior_precision * torch.eye(len(ggn), dtype=ggn.dtype)
    return jacobian @ torch.linalg.solve(precision, jacobian.mT)


def lla_evidence(log_likelihood, theta, ggn, prior_precision):
    """log p(D|θ) + log N(θ; 0, I/δ) + (p/2) log 2π − ½ log det(GGN + δI)."""
    p = len(theta)
    prior = 0.5 * p * math.log(prior_precision / (2 * math.pi))
    prior -= 0.5 * prior_precision * theta.square().sum().item()
    precision = ggn + prior_precision * torch.eye(p, dtype=ggn.dtype)
    occam = 0.5 * p * math.log(2 * math.pi) - 0.5 * torch.logdet(precision).item()
    return log_likelihood + prior + occam


def flat_weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def smallest_eigenvalue(matrices):
    """Over a batch of symmetric matrices."""
    return torch.linalg.eigvalsh((matrices + matrices.mT) / 2).min().item()
