"""
Lightning: fit and calibrate after training
===========================================

A callback that does both when training ends, so that a checkpoint never leaves without its
uncertainty.
"""

# %%
# The callback
# ------------
# It reads the loaders that the trainer has and saves beside the checkpoint. Calibrate on data that
# did not choose the checkpoint, if you have them: what early stopping looked at is a little too
# good.

import logging
import tempfile
import warnings
from pathlib import Path

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ella import ELLA, NeuralEF, Training, metrics


class Laplace(lightning.Callback):
    """Fits an `ELLA` to the module's network when training ends, and calibrates it.

    Args:
        path: Where to save.
        settings: For `ELLA`.
    """

    def __init__(self, path, **settings):
        self.path, self.settings, self.ella = path, settings, None

    def on_fit_end(self, trainer, pl_module):
        ella = ELLA(pl_module.network, **self.settings)
        ella.fit(trainer.train_dataloader).calibrate(trainer.val_dataloaders)
        if trainer.is_global_zero:  # one process saves
            ella.save(self.path)
        self.ella = ella


# %%
# A module and its trainer
# ------------------------


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def validation_step(self, batch):
        x, y = batch
        self.log("loss", nn.functional.cross_entropy(self.network(x), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


lightning.seed_everything(0, verbose=False)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x).float() / 16, torch.tensor(y)
train, val, test = (
    TensorDataset(x[s], y[s]) for s in (slice(200), slice(200, 600), slice(600, None))
)
train_loader = DataLoader(train, batch_size=50, shuffle=True)
val_loader = DataLoader(val, batch_size=100)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
folder = Path(tempfile.mkdtemp())
quick = NeuralEF(rank=16, num_inputs=600, num_directions=128, teacher=Training(steps=200))
callback = Laplace(folder / "ella.safetensors", eigenfunctions=quick, progress=False)
module = Digits()
trainer = lightning.Trainer(
    max_epochs=25,
    accelerator="cpu",
    callbacks=[callback],
    default_root_dir=folder,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, train_loader, val_loader)

# %%
# Afterwards
# ----------

plain = module.network(x[600:]).softmax(-1)
probs = callback.ella.predict_proba(x[600:])
for name, found in (("plain", plain), ("ELLA", probs)):
    print(f"{name:6} NLL {metrics.negative_log_likelihood(found, y[600:]):.4f}")
again = ELLA.load(folder / "ella.safetensors", module.network)
print("from the file:", torch.equal(again.predict_proba(x[600:]), probs))
