"""Models as people write them, one of each kind that is hard for somebody."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

CLASSES = 3
LENGTH = 6


class Recurrent(nn.Module):
    """An LSTM over (n, 6, 4), which `vmap` has no rule for on a CPU."""

    def __init__(self, cell=nn.LSTM):
        super().__init__()
        self.rnn = cell(4, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Packed(nn.Module):
    """Sequences of several lengths, packed."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.rnn = nn.GRU(4, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, ids, lengths):
        packed = pack_padded_sequence(
            self.embedding(ids), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        last = self.rnn(packed)[1]
        return self.head(torch.cat([last[0], last[1]], dim=1))


class Checkpointed(nn.Module):
    """Activations are computed again in the backward pass."""

    def __init__(self, reentrant=False):
        super().__init__()
        self.first, self.block = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head, self.reentrant = nn.Linear(6, CLASSES), reentrant

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(checkpoint(self.block, h, use_reentrant=self.reentrant))


class Doubling(torch.autograd.Function):
    """Without `setup_context`, as functions were written for years."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class OldFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(Doubling.apply(self.first(x)))


class Overwriting(nn.Module):
    """Writes into its input."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))

    def forward(self, x):
        x -= 0.5
        x[:, 0] = x[:, 0].clamp(min=-1)
        return self.net(x)


class LengthFirst(nn.Module):
    """A transformer whose sequences have the batch as axis 1, with position embeddings."""

    def __init__(self):
        super().__init__()
        self.position = nn.Embedding(LENGTH, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        h = x.transpose(0, 1) + self.position(torch.arange(x.shape[1]))[:, None]
        return self.head(self.layer(h).mean(0))


class Bags(nn.Module):
    """Instances folded into the batch, (n, 5, 4) as (5n, 4), example by example."""

    def __init__(self):
        super().__init__()
        self.instance = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.instance(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1))


class Siamese(nn.Module):
    """Two inputs one after the other in one batch."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, CLASSES)

    def forward(self, a, b):
        left, right = self.body(torch.cat([a, b])).chunk(2)
        return self.head((left - right).abs())


class Skipping(nn.Module):
    """A branch that only batches with a large value go through."""

    def __init__(self):
        super().__init__()
        self.first, self.extra = nn.Linear(4, 6), nn.Linear(6, 6)
        self.second, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if x.max() > 1.5:
            h = h + 0 * self.extra(h)
        return self.head(torch.tanh(self.second(h)))


class Mixture(nn.Module):
    """Examples are sent to experts, a part of the batch each."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            chosen = (h[:, 0] > 0) == bool(i)
            out[chosen] = expert(h[chosen])
        return self.head(torch.tanh(out))


class Windows(nn.Module):
    """Quarters of images folded into the batch, as in Swin transformers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        n = len(x)
        patches = F.unfold(x, 2, stride=2).transpose(1, 2).reshape(-1, 4, 1)
        h = self.layer(self.embed(patches))
        return self.head(h.reshape(n, -1, 4).mean(1))


class Named(nn.Module):
    """Returns a mapping, a tuple or an object, with other tensors beside the logits."""

    def __init__(self, form="mapping"):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)
        self.form = form

    def forward(self, x):
        h = torch.tanh(self.body(x))
        logits = self.head(h)
        return {"mapping": {"hidden": h, "logits": logits}, "tuple": (logits, h)}.get(
            self.form, {"features": h, "prediction": logits}
        )


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def parametrized():
    model = mlp()
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[2])
    return model.eval()


def tied():
    model = mlp()
    model.insert(3, model[2])
    return model


def inner_compiled():
    model = mlp()
    model[2] = torch.compile(model[2], backend="eager")
    return model


def normal(n, *shape, generator):
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def packed_inputs(n, generator):
    lengths = torch.randint(2, LENGTH + 1, (n,), generator=generator)
    return torch.randint(9, (n, LENGTH), generator=generator), lengths


def plain(*shape):
    return lambda n, generator: normal(n, *shape, generator=generator)


KINDS = {
    "lstm": (Recurrent, plain(LENGTH, 4)),
    "gru": (lambda: Recurrent(nn.GRU), plain(LENGTH, 4)),
    "packed": (Packed, packed_inputs),
    "checkpoints": (Checkpointed, plain(4)),
    "reentrant checkpoints": (lambda: Checkpointed(True), plain(4)),
    "old autograd function": (OldFunction, plain(4)),
    "writes into its input": (Overwriting, plain(4)),
    "length first": (LengthFirst, plain(LENGTH, 4)),
    "bags": (Bags, plain(5, 4)),
    "siamese": (
        Siamese,
        lambda n, generator: (
            normal(n, 4, generator=generator),
            normal(n, 4, generator=generator),
        ),
    ),
    "skipping": (Skipping, plain(4)),
    "experts": (Mixture, plain(4)),
    "windows": (Windows, plain(1, 4, 4)),
    "parametrized": (parametrized, plain(4)),
    "tied": (tied, plain(4)),
    "mapping": (Named, plain(4)),
    "tuple": (lambda: Named("tuple"), plain(4)),
    "compiled": (lambda: torch.compile(mlp(), backend="eager"), plain(4)),
    "compiled inside": (inner_compiled, plain(4)),
    "data parallel": (lambda: nn.DataParallel(mlp()), plain(4)),
}


def make(kind, n=24, seed=0):
    """A model in float64 and n inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = KINDS[kind][0]().double()
    return model, KINDS[kind][1](n, torch.Generator().manual_seed(seed + 1))
