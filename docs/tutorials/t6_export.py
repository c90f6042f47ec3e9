"""
Deployment by export
====================

A server should not need this package. ``predictive_module()`` is the whole prediction, draws and
all, as one plain ``nn.Module`` that ``torch.export``, ``torch.compile(fullgraph=True)`` and ONNX
can follow.
"""

# %%
# A fitted estimator
# ------------------

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ella import ELLA, NeuralEF, Training

torch.manual_seed(0)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x).float() / 16, torch.tensor(y)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[:300]), y[:300]).backward()
    optimizer.step()

train_loader = DataLoader(TensorDataset(x[:300], y[:300]), batch_size=100)
val_loader = DataLoader(TensorDataset(x[300:700], y[300:700]), batch_size=100)
quick = NeuralEF(rank=16, num_inputs=600, num_directions=128, teacher=Training(steps=200))
ella = ELLA(model, eigenfunctions=quick, progress=False).fit(train_loader)
ella.calibrate(val_loader)

# %%
# One plain module
# ----------------
# Inputs go in; class probabilities, mutual information and the variance of the logits come out.

module = ella.predictive_module(n_samples=64)
probabilities, mutual_information, logit_variance = module(x[:5])
print(probabilities.argmax(1), mutual_information.shape, logit_variance.shape)

# %%
# A file for a server
# -------------------
# Any number of examples, in a file that ``torch.export.load`` opens without this package.

batch = torch.export.Dim("batch", min=2, max=4096)
program = torch.export.export(module, (x[:8],), dynamic_shapes=({0: batch},))
path = Path(tempfile.mkdtemp()) / "digits.pt2"
torch.export.save(program, path)
served = torch.export.load(path).module()

with torch.no_grad():
    ours, theirs = ella.predict_proba(x[700:], n_samples=64), served(x[700:])[0]
print(f"largest difference: {(ours - theirs).abs().max():.1e}")

# %%
# ONNX goes the same way: ``torch.onnx.export(module, (x[:8],), "digits.onnx",
# dynamo=True, dynamic_shapes=({0: batch},))``, with the extra ``onnx``.
#
# Beside a network as small as this one 64 draws cost far more than the forward pass; beside a
# ResNet or a BERT the whole adds 15 to 25 % (:doc:`measured </evidence/models>`).
