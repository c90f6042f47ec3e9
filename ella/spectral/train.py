"""The one training loop."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ella.arguments import COUNT, NOT_NEGATIVE, POSITIVE, real, settle
from ella.spectral.losses import Loss
from ella.spectral.problems import Batch


@dataclass(frozen=True)
class Training:
    """How long and how fast to train.

    Attributes:
        steps: Gradient steps.
        batch_size: Examples a step.
        learning_rate: Peak of the cosine schedule, which falls to 0 after a linear warm-up.
        weight_decay: AdamW's.
        checks: How often, over the whole run, the held-out loss is measured; the best weights are
            kept, and training stops after `patience` checks without a better one.
        patience: See `checks`.
        warmup: Share of the steps that the warm-up takes, at most .99; at least one step.
        clip: Longest gradient, over all weights, that a step follows; longer ones are shortened to
            it. The default stops explosions only.

    Raises:
        ValueError: If a number is out of range.
    """

    steps: int = 1500
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    checks: int = 20
    patience: int = 8
    warmup: float = 0.05
    clip: float = 1e3

    def __post_init__(self) -> None:
        settle(self, **dict.fromkeys(("steps", "batch_size", "checks", "patience"), COUNT))
        settle(self, learning_rate=POSITIVE, weight_decay=NOT_NEGATIVE)
        settle(self, warmup=real(0, 0.99), clip=POSITIVE)


def train(
    network: nn.Module,
    loss: Loss[Batch],
    training: Training,
    *,
    generator: torch.Generator,
    progress: bool = True,
) -> list[float]:
    """Minimise a loss by AdamW in place: eigenfunctions (`SpectralLoss`) or a `Regression`.

    Dropout draws from a forked global RNG, seeded from `generator`.

    Args:
        network: Reads what the loss feeds it; in evaluation mode wherever the held-out loss is
            measured, and afterwards.
        loss: See `Loss`.
        training: See `Training`.
        generator: A CPU generator, for the batches.
        progress: Whether to show a progress bar.

    Returns:
        The held-out loss at each check, in order; the network holds the best weights.

    Raises:
        ValueError: If the held-out loss was never finite.
    """
    optimizer, schedule = _optimizer(network, training)
    best = _Best(network)
    every = max(1, training.steps // training.checks)
    devices = sorted({p.device.index for p in network.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        bar = tqdm(range(training.steps), desc="training", disable=not progress, leave=False)
        for step in bar:
            network.train()
            with torch.enable_grad():
                scalar = loss(network, loss.batch(training.batch_size, generator))
            optimizer.zero_grad()
            scalar.backward()
            nn.utils.clip_grad_norm_(network.parameters(), training.clip)
            optimizer.step()
            schedule.step()
            if (step + 1) % every == 0 or step + 1 == training.steps:
                best.note(loss.held_out(network.eval()))
                bar.set_postfix(held_out=f"{best.history[-1]:.4g}")
                if best.since >= training.patience:
                    break
    best.restore()
    return best.history


def _optimizer(
    network: nn.Module, training: Training
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warm_cosine(step, training.steps, training.warmup)
    )
    return optimizer, schedule


class _Best:
    """The weights of the lowest held-out loss so far.

    Args:
        network: Whose.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.history: list[float] = []
        self.since = 0
        self._value, self._state = math.inf, copy.deepcopy(network.state_dict())

    def note(self, value: float) -> None:
        """The loss of the present weights."""
        self.history.append(value)
        self.since += 1
        if value < self._value:
            self._value, self._state = value, copy.deepcopy(self.network.state_dict())
            self.since = 0

    def restore(self) -> None:
        """Put the best weights back.

        Raises:
            ValueError: If there are none.
        """
        if not math.isfinite(self._value):
            raise ValueError(
                "The held-out loss was never finite. Lower `learning_rate`, or check the inputs "
                "and the targets (of eigenfunctions: that the kernel is positive semi-definite)."
            )
        self.network.load_state_dict(self._state)
        self.network.eval()


def _warm_cosine(step: int, steps: int, share: float) -> float:
    """The factor of the learning rate at a step; `share` of all steps are warm-up."""
    warm = max(1, math.floor(share * steps + 1e-6))  # 0.05 · 60 may come as 2.9999...
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
