"""
A Hugging Face text classifier, with padding
============================================

Models of ``transformers`` go in as they are: batches are mappings, ``attention_mask`` says what is
padding, labels are called ``labels``. The model here is a small BERT made from its configuration,
with random weights that are then trained, on sentences of a made-up language.
"""

# %%
# Data and model
# --------------
# A sentence has 5 to 20 words. Its class is the majority of the words of two kinds in it; a tenth
# of the labels are wrong, so that nobody should be certain.

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from ella import ELLA, NeuralEF, Training, metrics

generator = torch.Generator().manual_seed(0)
FIRST, LAST, PADDING = 1, 2, 0


def sentence():
    length = int(torch.randint(5, 21, (), generator=generator))
    words = torch.randint(3, 100, (length,), generator=generator)
    label = int((words < 50).float().mean() > 0.5)
    if torch.rand((), generator=generator) < 0.1:
        label = 1 - label
    return [FIRST, *words.tolist(), LAST], label


def collate(sentences):
    """A mapping, padded to the longest of the batch, as a tokenizer gives it."""
    longest = max(len(ids) for ids, _ in sentences)
    ids = torch.full((len(sentences), longest), PADDING)
    for row, (words, _) in zip(ids, sentences, strict=True):
        row[: len(words)] = torch.tensor(words)
    labels = torch.tensor([label for _, label in sentences])
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": labels}


train_loader, val_loader, test_loader = (
    DataLoader([sentence() for _ in range(count)], batch_size=50, collate_fn=collate)
    for count in (400, 600, 500)
)

torch.manual_seed(0)
config = BertConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
)
model = BertForSequenceClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
for _ in range(20):
    for batch in train_loader:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
model.eval()

# %%
# Fit and calibrate
# -----------------
# Nothing has to be said about the form of batches. The eigenfunctions learn from the sentences and
# from copies with words deleted and replaced; padding stays padding. A warning names what the
# validation sentences alone would not have settled.

quick = NeuralEF(rank=16, num_inputs=400, num_directions=64, teacher=Training(steps=200))
ella = ELLA(model, eigenfunctions=quick, progress=False).fit(train_loader)
ella.calibrate(val_loader)

# %%
# Predict
# -------
# For a mapping, or a whole loader.

labels = torch.cat([batch["labels"] for batch in test_loader])
plain = torch.cat([model(**batch).logits.softmax(-1).detach() for batch in test_loader])
averaged = ella.predict_proba(test_loader)
for name, probs in (("plain", plain), ("ELLA", averaged)):
    numbers = metrics.evaluate(probs, labels)
    print(f"{name:6}", *(f"{key} {value:.3f}" for key, value in numbers.items()), sep="  ")

# %%
# More padding does not change a prediction.

batch = next(iter(test_loader))
inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
longer = {key: torch.nn.functional.pad(value, (0, 6)) for key, value in inputs.items()}
difference = (ella.predict_proba(inputs) - ella.predict_proba(longer)).abs().max()
print(f"largest difference: {difference:.1e}")

# %%
# The sentences that the model knows least about:

scores = ella.uncertainty(inputs).entropy
for i in scores.argsort(descending=True)[:3]:
    print(
        f"{scores[i]:.3f} nats", inputs["input_ids"][i][inputs["attention_mask"][i] == 1].tolist()
    )
