"""
Triage: automate what is safe, pass on the rest
===============================================

Often the question is not which class, but whether a machine may decide at all. Choose the error
rate that is acceptable, find on held-out data the uncertainty up to which it holds, and send every
example beyond to a person.
"""

# %%
# A classifier and its uncertainty
# --------------------------------

import torch
from matplotlib import pyplot as plt
from scipy.stats import beta
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ella import ELLA, NeuralEF, Training, metrics

torch.manual_seed(0)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x).float() / 16, torch.tensor(y)
order = torch.randperm(len(x))
train, tune, choose, test = order[:150], order[150:350], order[350:950], order[950:]

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[train]), y[train]).backward()
    optimizer.step()


def loader(rows):
    return DataLoader(TensorDataset(x[rows], y[rows]), batch_size=100)


quick = NeuralEF(rank=16, num_inputs=600, num_directions=128, teacher=Training(steps=200))
ella = ELLA(model, eigenfunctions=quick, progress=False).fit(loader(train))
ella.calibrate(loader(tune))

# %%
# Choose a threshold
# ------------------
# The wish: at most 4 % errors among what is automated, with 95 % confidence. On data that neither
# training nor calibration has seen, take the largest threshold whose *upper confidence bound* of
# the error rate is below 4 %; the observed rate alone would be too hopeful. As many thresholds are
# tried, each gets its share of the 5 % (Bonferroni).
#
# Reference: Selective Classification for Deep Neural Networks (Geifman & El-Yaniv, 2017),
# https://arxiv.org/abs/1705.08500

ALLOWED, CONFIDENCE = 0.04, 0.95


def decided(rows):
    """Uncertainty of each example, and whether the decision would be wrong."""
    probs = ella.predict_proba(x[rows])
    return 1 - probs.amax(1), probs.argmax(1) != y[rows]


scores, wrong = decided(choose)
ranked = scores.argsort()
counts = torch.arange(100, len(choose) + 1, 50)  # how many examples each threshold admits
doubt = (1 - CONFIDENCE) / len(counts)
threshold = None
for count in counts.tolist():
    errors = int(wrong[ranked[:count]].sum())
    bound = beta.ppf(1 - doubt, errors + 1, count - errors)  # Clopper and Pearson
    if bound <= ALLOWED:
        threshold = float(scores[ranked[count - 1]])
        print(f"{count} examples, {errors} errors: at most {bound:.2%}")
print("threshold:", threshold)

# %%
# Does it hold?
# -------------

scores, wrong = decided(test)
admitted = scores <= threshold
print(f"automated: {admitted.float().mean():.1%}")
print(f"errors among them: {wrong[admitted].float().mean():.2%} (allowed: {ALLOWED:.0%})")
print(f"errors without triage: {wrong.float().mean():.2%}")

coverage, risk = metrics.risk_coverage(scores, wrong)
figure, panel = plt.subplots(figsize=(6, 3))
panel.plot(coverage, risk)
panel.axhline(ALLOWED, color="C3", linestyle=":", label="allowed")
panel.axvline(
    admitted.double().mean(), color="C2", linestyle=":", label="the threshold's coverage"
)
panel.set(xlabel="coverage: share that is automated", ylabel="risk: errors among them")
panel.legend()
figure.tight_layout()

# %%
# The bound holds for data like those it was chosen on, and for nothing else: under shift, watch
# what share is passed on, and choose again when it moves.
