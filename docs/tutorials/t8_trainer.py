"""
Hugging Face ``Trainer``: fit and calibrate after training
==========================================================

The same for ``transformers.Trainer``: a callback that fits and calibrates when training ends, on
the loaders the trainer itself makes. The model is a small BERT made from its configuration.
"""

# %%
# The callback
# ------------

import tempfile
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ella import ELLA, NeuralEF, Training, metrics


class Laplace(TrainerCallback):
    """Fits an `ELLA` when training ends, calibrates it, and saves it in the output folder.

    Args:
        settings: For `ELLA`.
    """

    def __init__(self, **settings):
        self.settings, self.ella = settings, None

    def on_train_end(self, args, state, control, *, model, train_dataloader, eval_dataloader, **_):
        self.ella = ELLA(model, **self.settings).fit(train_dataloader)
        self.ella.calibrate(eval_dataloader)
        self.ella.save(Path(args.output_dir) / "ella.safetensors")


# %%
# Data, model, trainer
# --------------------
# Sentences of a made-up language: the class is the majority of the words of two kinds. A tenth of
# the labels are wrong.

generator = torch.Generator().manual_seed(0)


def sentences(count):
    found = []
    for _ in range(count):
        length = int(torch.randint(5, 21, (), generator=generator))
        words = torch.randint(3, 100, (length,), generator=generator)
        label = int((words < 50).float().mean() > 0.5)
        label = 1 - label if torch.rand((), generator=generator) < 0.1 else label
        found.append({"input_ids": torch.cat([torch.tensor([1]), words]), "labels": label})
    return found


def collate(examples):
    ids = torch.nn.utils.rnn.pad_sequence([e["input_ids"] for e in examples], batch_first=True)
    labels = torch.tensor([e["labels"] for e in examples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


train, val, test = sentences(400), sentences(600), sentences(500)
torch.manual_seed(0)
config = BertConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
)
folder = tempfile.mkdtemp()
quick = NeuralEF(rank=16, num_inputs=400, num_directions=64, teacher=Training(steps=200))
callback = Laplace(eigenfunctions=quick, progress=False)
trainer = Trainer(
    BertForSequenceClassification(config),
    TrainingArguments(
        output_dir=folder,
        num_train_epochs=20,
        per_device_train_batch_size=50,
        per_device_eval_batch_size=50,
        learning_rate=2e-3,
        use_cpu=True,
        save_strategy="no",
        eval_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    ),
    data_collator=collate,
    train_dataset=train,
    eval_dataset=val,
    callbacks=[callback],
)
trainer.remove_callback(PrinterCallback)  # what it prints is of no use here
result = trainer.train()
print(f"training loss {result.training_loss:.3f}")

# %%
# Afterwards
# ----------

batch = collate(test)
labels = batch.pop("labels")
with torch.no_grad():
    plain = trainer.model.eval()(**batch).logits.softmax(-1)
probs = callback.ella.predict_proba(batch)
for name, found in (("plain", plain), ("ELLA", probs)):
    print(f"{name:6} NLL {metrics.negative_log_likelihood(found, labels):.4f}")
again = ELLA.load(Path(folder) / "ella.safetensors", trainer.model)
print("from the file:", torch.equal(again.predict_proba(batch), probs))
