"""
An image classifier
===================

From a trained network and two loaders to probabilities that can be believed: fit, calibrate, look
at the numbers, and decide. Data are scikit-learn's digits, 8 by 8 pixels.
"""

# %%
# A trained classifier
# --------------------
# Anything will do that maps a batch to logits. This one has seen 150 images, which it knows by
# heart: it is surer than it should be.

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ella import ELLA, NeuralEF, Training, metrics
from ella.baselines import MAP, TemperatureScaling

torch.manual_seed(0)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(y)
order = torch.randperm(len(x))
train, val, test = order[:150], order[150:550], order[550:]

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(512, 10),
)
optimizer = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(150):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[train]), y[train]).backward()
    optimizer.step()
print("training accuracy", (model(x[train]).argmax(1) == y[train]).float().mean().item())

# %%
# Fit and calibrate
# -----------------
# ``fit`` takes training data and never changes the model. ``calibrate`` takes data that the model
# has not seen, and sets three numbers: δ, how far weights may be from where training left them; T,
# how much of the resulting variance is believed; τ, what logits are divided by.

train_loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=50)
val_loader = DataLoader(TensorDataset(x[val], y[val]), batch_size=100)

quick = NeuralEF(rank=16, num_inputs=600, num_directions=128, teacher=Training(steps=200))
ella = ELLA(model, eigenfunctions=quick, progress=False).fit(train_loader)
ella.calibrate(val_loader)
print(ella.tuning.hyperparameters)

# %%
# Is it better?
# -------------
# Temperature scaling is what to beat, as it costs nothing. It has the same calls.

plain = MAP(model, progress=False).fit(train_loader)
scaled = TemperatureScaling(model, progress=False).fit(train_loader)
scaled.calibrate(val_loader)

probs = {
    name: method.predict_proba(x[test])
    for name, method in (("plain", plain), ("temperature scaling", scaled), ("ELLA", ella))
}
for name, found in probs.items():
    numbers = metrics.evaluate(found, y[test])
    wrong = found.argmax(1) != y[test]
    numbers["aurc"] = metrics.area_under_risk_coverage(1 - found.amax(1), wrong)
    print(f"{name:20}", *(f"{key} {value:.4f}" for key, value in numbers.items()), sep="  ")

# %%
# Both are far better than the plain model, and one thousand digits and one seed decide nothing
# between the two: here take temperature scaling. What larger networks show is among the
# :doc:`evidence </evidence/cifar10>`.

figure = metrics.reliability_diagram(probs, y[test])

# %%
# Keep it
# -------
# The file holds everything but the model, and opening it executes nothing. It refuses any other
# model.

path = Path(tempfile.mkdtemp()) / "digits.safetensors"
ella.save(path)
again = ELLA.load(path, model)
print("same predictions:", torch.equal(again.predict_proba(x[test]), probs["ELLA"]))
