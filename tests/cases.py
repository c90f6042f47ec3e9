"""Small float64 networks with their data: every kind of model that the library must accept."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 3


class Attention(nn.Module):
    """A transformer layer, and attention called directly, over sequences (n, 4, 4)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        h = self.layer(x)
        return self.head(F.scaled_dot_product_attention(h, h, h).mean(1))


class TwoInputs(nn.Module):
    """Called as model(a, b); one parameter is never used."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 5), nn.Linear(2, 5)
        self.unused = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(5, CLASSES)

    def forward(self, a, b):
        return self.head(torch.tanh(self.left(a) * self.right(b)))


@dataclass
class Output:
    """What Hugging Face models return, as far as the library reads it."""

    logits: Tensor


class Tokens(nn.Module):
    """Called as model(ids=..., weight=...); returns an object with `.logits`."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, ids, weight):
        h = torch.einsum("nl,nld->nd", weight, self.embedding(ids))
        return Output(self.head(self.dropout(torch.tanh(h))))


class Padded(nn.Module):
    """Padded sequences, model(input_ids=..., attention_mask=...); branches on the mask's values.

    `torch.vmap` refuses such a model, as it does those of Hugging Face.
    """

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, input_ids, attention_mask):
        padding = None if attention_mask.all() else attention_mask == 0
        h = self.layer(self.embedding(input_ids), src_key_padding_mask=padding)
        real = attention_mask.unsqueeze(-1).to(h)
        return self.head((h * real).sum(1) / real.sum(1))


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, CLASSES))


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


def frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


FACTORIES = {
    "mlp": (mlp, (4,)),
    "conv": (conv, (1, 5, 5)),
    "attention": (Attention, (4, 4)),
    "tuple": (TwoInputs, {"a": (3,), "b": (2,)}),
    "mapping": (Tokens, {"ids": (4,), "weight": (4,)}),
    "padded": (Padded, {"input_ids": (5,), "attention_mask": (5,)}),
    "frozen": (frozen, (4,)),
}
NAMES = tuple(FACTORIES)


@dataclass
class Case:
    model: nn.Module
    x: Tensor | tuple | Mapping
    y: Tensor


def make_inputs(name, n, seed=1):
    """n inputs in the form that the model takes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(n, *shape, generator=generator, dtype=torch.float64)

    if name == "tuple":
        return normal((3,)), normal((2,))
    if name == "mapping":
        return {"ids": torch.randint(6, (n, 4), generator=generator), "weight": normal((4,))}
    if name == "padded":
        lengths = torch.randint(1, 6, (n, 1), generator=generator)
        mask = (torch.arange(5) < lengths).long()
        return {"input_ids": torch.randint(6, (n, 5), generator=generator), "attention_mask": mask}
    return normal(FACTORIES[name][1])


def make_labels(n, seed=2):
    return torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(seed))


def make_model(name, seed=0):
    """Untrained, in train mode, with batch statistics far from (0, 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FACTORIES[name][0]().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def make_case(name, n=7, seed=0):
    return Case(make_model(name, seed), make_inputs(name, n, seed + 1), make_labels(n, seed + 2))


def train(model, x, y, *, steps, rate, loss=F.cross_entropy):
    """Adam on all examples at once; no gradient is left."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    model.zero_grad()


def part_of(x, index):
    """Some examples of inputs in any form."""
    if isinstance(x, Tensor):
        return x[index]
    if isinstance(x, Mapping):
        return {key: value[index] for key, value in x.items()}
    return tuple(value[index] for value in x)


def loader_of(x, y, batch_size=5):
    """A list of (x, y) batches; the last is smaller unless `batch_size` divides n."""
    starts = range(0, len(y), batch_size)
    return [(part_of(x, slice(i, i + batch_size)), y[i : i + batch_size]) for i in starts]
