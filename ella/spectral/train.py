"""The one training loop for neural eigenfunctions."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ella.spectral.objectives import Objective
from ella.spectral.problems import Problem


@dataclass(frozen=True)
class Training:
    """How long and how fast to train.

    Attributes:
        steps: Gradient steps.
        batch_size: Examples a step.
        learning_rate: Peak of the cosine schedule (5 % linear warm-up).
        weight_decay: AdamW's.
        checks: How often, over the whole run, the held-out objective is measured; the best
            weights are kept, and training stops after `patience` checks without a better one.
        patience: See `checks`.
    """

    steps: int = 1500
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    checks: int = 20
    patience: int = 8


def train(
    network: nn.Module,
    problem: Problem,
    objective: Objective,
    training: Training,
    *,
    generator: torch.Generator,
    progress: bool = True,
) -> list[float]:
    """Train ψ = network(x) towards the leading eigenfunctions of the operator, in place.

    Dropout draws from a forked global RNG, seeded from `generator`.

    Args:
        network: Maps the problem's inputs to (n, c, k).
        problem: The operator and its inputs; see `Problem`.
        objective: See `Objective`.
        training: See `Training`.
        generator: A CPU generator, for the batches.
        progress: Whether to show a progress bar.

    Returns:
        The held-out objective at each check, in order; the network holds the best weights.

    Raises:
        ValueError: If the objective diverges.
    """
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warm_cosine(step, training.steps)
    )
    best, best_state, since, history = math.inf, copy.deepcopy(network.state_dict()), 0, []
    every = max(1, training.steps // training.checks)
    devices = sorted({p.device.index for p in network.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        bar = tqdm(range(training.steps), desc="eigenfunctions", disable=not progress, leave=False)
        for step in bar:
            network.train()
            psi, gradient = _judge(
                network, problem, objective, problem.batch(training.batch_size, generator)
            )
            optimizer.zero_grad()
            psi.backward(gradient)
            nn.utils.clip_grad_norm_(network.parameters(), 1e3)
            optimizer.step()
            schedule.step()
            if (step + 1) % every == 0 or step + 1 == training.steps:
                value = held_out_loss(network, problem, objective)
                history.append(value)
                bar.set_postfix(objective=f"{value:.4g}")
                since += 1
                if value < best:
                    best, best_state, since = value, copy.deepcopy(network.state_dict()), 0
                if since >= training.patience:
                    break
    if not math.isfinite(best):
        raise ValueError(
            "The eigenfunction objective was never finite. Lower `learning_rate`, or check that "
            "the kernel is positive semi-definite."
        )
    network.load_state_dict(best_state)
    network.eval()
    return history


def _judge(
    network: nn.Module,
    problem: Problem,
    objective: Objective,
    batch: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor]:
    """ψ on a batch, with its graph, and dL/dψ."""
    psi, tpsi = objective.normalize(*problem.evaluate(network, batch))
    values, gradient = psi.detach(), torch.zeros_like(psi)
    pairs = problem.pairs(len(psi))
    for rows, sources in pairs:
        part = objective.gradient(values[rows], tpsi[rows], values[sources])
        gradient[rows] += part / len(pairs)
    return psi, gradient


@torch.no_grad()
def held_out_loss(network: nn.Module, problem: Problem, objective: Objective) -> float:
    """The mean objective over the pairs of the examples held out."""
    network.eval()
    psi, tpsi = objective.normalize(*problem.evaluate(network, problem.held_out()))
    pairs = problem.pairs(len(psi))
    losses = [objective.loss(psi[rows], tpsi[rows], psi[sources]) for rows, sources in pairs]
    return sum(losses) / len(losses)


def _warm_cosine(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
