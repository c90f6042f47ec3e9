"""The one training loop for neural eigenfunctions."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ella._checks import Inputs, num_examples, take
from ella.spectral.objectives import Objective
from ella.spectral.operators import KernelOperator


@dataclass(frozen=True)
class Training:
    """How long and how fast to train.

    Attributes:
        steps: Gradient steps.
        batch_size: Examples a step, split into two halves.
        learning_rate: Peak of the cosine schedule (5 % linear warm-up).
        weight_decay: AdamW's.
        holdout: Share of the examples kept for the held-out objective.
        checks: How often, over the whole run, the held-out objective is measured; the best
            weights are kept, and training stops after `patience` checks without a better one.
        patience: See `checks`.
    """

    steps: int = 1500
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    holdout: float = 0.1
    checks: int = 20
    patience: int = 8


def train(
    network: nn.Module,
    operator: KernelOperator,
    network_inputs: Inputs,
    operator_inputs: Inputs,
    objective: Objective,
    training: Training,
    *,
    generator: torch.Generator,
    progress: bool = True,
) -> list[float]:
    """Train ψ = network(x) towards the leading eigenfunctions of the operator, in place.

    Each step draws a batch and splits it into two halves that are each other's source
    (`Objective`). Dropout draws from a forked global RNG, seeded from `generator`.

    Args:
        network: Maps `network_inputs` to (n, c, k).
        operator: See `KernelOperator`.
        network_inputs: All training inputs, as the network reads them.
        operator_inputs: The same examples, as the operator reads them.
        objective: See `Objective`.
        training: See `Training`.
        generator: A CPU generator, for the hold-out split and the batches.
        progress: Whether to show a progress bar.

    Returns:
        The held-out objective at each check, in order; the network holds the best weights.

    Raises:
        ValueError: If there are too few examples for two halves, or the objective diverges.
    """
    n = num_examples(network_inputs)
    order = torch.randperm(n, generator=generator)
    num_held = max(2, int(training.holdout * n))
    held, pool = order[:num_held], order[num_held:]
    if len(pool) < 2:
        raise ValueError(f"Training eigenfunctions needs at least 4 examples; got {n}.")
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
            chosen = pool[torch.randint(len(pool), (training.batch_size,), generator=generator)]
            _step(network, operator, network_inputs, operator_inputs, chosen, objective, optimizer)
            schedule.step()
            if (step + 1) % every == 0 or step + 1 == training.steps:
                value = held_out_loss(
                    network, operator, network_inputs, operator_inputs, held, objective
                )
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


def _step(
    network: nn.Module,
    operator: KernelOperator,
    network_inputs: Inputs,
    operator_inputs: Inputs,
    chosen: Tensor,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
) -> None:
    network.train()
    psi = objective.normalize(network(take(network_inputs, chosen)))
    gradient = torch.cat([*_halves(operator, operator_inputs, chosen, psi.detach(), objective)])
    optimizer.zero_grad()
    psi.backward(gradient / 2)
    nn.utils.clip_grad_norm_(network.parameters(), 1e3)
    optimizer.step()


def _halves(
    operator: KernelOperator, inputs: Inputs, chosen: Tensor, psi: Tensor, objective: Objective
) -> list[Tensor]:
    """The gradient on either half of a batch, the other half being its source."""
    b = len(psi) // 2
    gradients = []
    for one, other in ((slice(0, b), slice(b, None)), (slice(b, None), slice(0, b))):
        tpsi = operator.apply(take(inputs, chosen[one]), take(inputs, chosen[other]), psi[other])
        gradients.append(objective.gradient(psi[one], tpsi, psi[other]))
    return gradients


@torch.no_grad()
def held_out_loss(
    network: nn.Module,
    operator: KernelOperator,
    network_inputs: Inputs,
    operator_inputs: Inputs,
    held: Tensor,
    objective: Objective,
) -> float:
    """The objective on examples `held`, one half against the other."""
    network.eval()
    psi = objective.normalize(network(take(network_inputs, held)))
    b = len(psi) // 2
    tpsi = operator.apply(
        take(operator_inputs, held[:b]), take(operator_inputs, held[b:]), psi[b:]
    )
    return objective.loss(psi[:b], tpsi, psi[b:])


def _warm_cosine(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
