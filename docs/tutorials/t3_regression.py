"""
Regression with error bars
==========================

A regressor's outputs become Gaussians: the mean is the model's own, the variance says how well
the data determine it there. The noise of the targets is a number of its own, which ``calibrate``
finds.
"""

# %%
# A function with a gap in its data
# ---------------------------------

import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ella import ELLA, Nystrom, metrics, report
from ella.baselines import TemperatureScaling

generator = torch.Generator().manual_seed(0)


def draw(count):
    """Inputs in [-4, -1] and [1, 4], and a sine with noise of standard deviation .2."""
    x = 1 + 3 * torch.rand(count, 1, generator=generator)
    x = x * (1 - 2 * torch.randint(0, 2, (count, 1), generator=generator))
    return x, x.sin() + 0.2 * torch.randn(count, 1, generator=generator)


train, val, test = draw(80), draw(60), draw(1000)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(500):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(train[0]), train[1]).backward()
    optimizer.step()

# %%
# Fit and calibrate
# -----------------
# A network this small can afford exact Jacobian products: ``Nystrom``. The rank is nearly that of
# the 80 training rows, which makes this the linearized Laplace approximation over all weights.

train_loader, val_loader = (
    DataLoader(TensorDataset(*data), batch_size=20) for data in (train, val)
)
exact = Nystrom(rank=30, residual="exact")
ella = ELLA(model, likelihood="regression", eigenfunctions=exact, progress=False)
ella.fit(train_loader).calibrate(val_loader)
print(f"temperature chosen: {ella.hyperparameters.temperature:.2f}")

# %%
# Where the temperature is 0, validation data of the same kind as the training data say that one
# noise variance for all inputs is enough. They hold no input from the gap, so that they cannot say
# what an error bar there is worth. ``calibrate`` also keeps the best numbers with a posterior:

ella.hyperparameters = ella.tuning.posterior
noise = ella.hyperparameters.noise_variance
print(f"standard deviation of the noise: {noise**0.5:.3f} (true: .2)")

# %%
# Error bars
# ----------
# ``logits`` gives mean and covariance of the function; for what will be observed, add the noise.

mean, covariance = ella.logits(test[0])
variance = covariance.diagonal(dim1=-2, dim2=-1) + noise
for level in (0.5, 0.9, 0.95):
    covered = metrics.interval_coverage(mean, variance, test[1], level)
    print(f"{level:.0%} intervals hold {covered:.1%} of the test targets")

line = torch.linspace(-6, 6, 300).unsqueeze(1)
mean, covariance = ella.logits(line)
function = covariance[:, 0, 0].sqrt()
total = (covariance[:, 0, 0] + noise).sqrt()
figure, panel = plt.subplots(figsize=(7, 3.2))
for deviation, color, name in ((total, "C0", "with noise"), (function, "C1", "of the function")):
    low, high = mean[:, 0] - 2 * deviation, mean[:, 0] + 2 * deviation
    panel.fill_between(line[:, 0], low, high, color=color, alpha=0.3, label=f"± 2 s.d. {name}")
panel.plot(line, mean, "k", linewidth=1, label="the model")
panel.plot(*train, "k.", markersize=3, label="training data")
panel.set(ylim=(-3, 3), xlabel="x")
panel.legend(fontsize=7, ncol=2)
figure.tight_layout()

# %%
# The bars are narrow where there are data and open in the gap and outside. How fast they open is
# the network's tangent kernel's business, and no promise.

# %%
# Is it worth it?
# ---------------
# The fair opponent is the model with its noise variance tuned on the same validation data. The
# NLL is that of test data like the training data; inputs from the gap are what a deviation should
# tell.

tuned = TemperatureScaling(model, likelihood="regression", progress=False)
tuned.fit(train_loader).calibrate(val_loader)
gap = 2 * torch.rand(500, 1, generator=generator) - 1
found = report.evaluate(
    {"MAP, noise tuned": tuned, "ELLA": ella},
    DataLoader(TensorDataset(*test), batch_size=500),
    ood={"the gap": [gap]},
    progress=False,
)
print(found.verdict.sentence)
print(found.verdict.beside)

# %%
# ``found.to_html("report.html")`` writes the page: the quantiles, the error that is left without
# the most uncertain, deviations inside and in the gap.
