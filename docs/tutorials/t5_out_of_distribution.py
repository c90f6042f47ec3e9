"""
Out-of-distribution scores, and a threshold
===========================================

Which inputs are of no class that the model was trained on? Every score of ``uncertainty`` ranks
inputs; which one ranks best depends on how the strange inputs differ. A threshold comes from
held-out ordinary data alone: strange ones are not needed to choose it.
"""

# %%
# Digits 0 to 7 are known, 8 and 9 are not
# ----------------------------------------
# Beside these near strangers there are far ones: the same pixels in random order.

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ella import ELLA, Distance, NeuralEF, Training, metrics
from ella.baselines import TemperatureScaling

torch.manual_seed(0)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(y)
known = torch.where(y < 8)[0]
known = known[torch.randperm(len(known))]
train, val, test = known[:300], known[300:700], known[700:]
near = x[y >= 8]
far = x[test].flatten(1)[:, torch.randperm(64)].reshape(-1, 1, 8, 8)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(512, 8),
)
optimizer = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(60):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[train]), y[train]).backward()
    optimizer.step()

# %%
# With a term for distance
# ------------------------
# ``distance=Distance()`` lets variance grow with the distance of activations from those of the
# training data, which the tangent kernel alone does not promise. It costs no second forward pass.

train_loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=100)
val_loader = DataLoader(TensorDataset(x[val], y[val]), batch_size=100)
quick = NeuralEF(rank=16, num_inputs=600, num_directions=128, teacher=Training(steps=200))
ella = ELLA(model, eigenfunctions=quick, distance=Distance(), progress=False)
ella.fit(train_loader).calibrate(val_loader)
scaled = TemperatureScaling(model, progress=False).fit(train_loader)
scaled.calibrate(val_loader)

# %%
# Scores
# ------
# Area under the ROC curve: the probability that a strange input has a higher score than an
# ordinary one. One half is chance.

chosen = ("entropy", "mutual_information", "energy", "corrected_energy", "distance")
for title, method in (("temperature scaling", scaled), ("ELLA", ella)):
    inside = method.uncertainty(x[test])
    for name, strangers in (("8 and 9", near), ("random order", far)):
        outside = method.uncertainty(strangers)
        found = {
            score: metrics.auroc(getattr(inside, score), getattr(outside, score))
            for score in chosen
            if getattr(inside, score) is not None and getattr(inside, score).std() > 0
        }
        print(f"{title:20} {name:13}", *(f"{k} {v:.3f}" for k, v in found.items()), sep="  ")

# %%
# A threshold
# -----------
# Accept a false alarm for 5 % of ordinary inputs: the 95 % quantile of the score on validation
# data. What it catches is known only when strange inputs come.

score = "corrected_energy"
threshold = getattr(ella.uncertainty(x[val]), score).quantile(0.95)
shares = {}
figure, panel = plt.subplots(figsize=(7, 3))
for name, inputs in (("known digits", x[test]), ("8 and 9", near), ("random order", far)):
    values = getattr(ella.uncertainty(inputs), score)
    panel.hist(values, bins=40, density=True, alpha=0.5, label=name)
    print(f"{name:13} flagged: {(values > threshold).float().mean():.1%}")
panel.axvline(threshold, color="k", linestyle=":", label="threshold")
panel.set(xlabel=score.replace("_", " "), ylabel="density")
panel.legend()
figure.tight_layout()

# %%
# Compare with temperature scaling before you keep it: where one scalar ranks as well, use the
# scalar. On CIFAR-10 the entropy of ELLA is better on similar classes, and worse on grey pictures
# unless the distance term is there (:doc:`evidence </evidence/distance>`).
