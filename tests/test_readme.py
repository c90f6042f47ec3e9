"""Every Python block of the README runs, in order, in one namespace."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

README = Path(__file__).parent.parent / "README.md"


# Whether 300 examples settle every hyperparameter depends on rounding, that is on threads.
@pytest.mark.filterwarnings("ignore:calibrate. 300 validation examples alone")
def test_python_blocks_run(capsys, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)  # blocks may save files
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)


def snippets():
    """Blocks that take a model and data for granted, by what they begin with."""
    found = re.findall(r"^```py\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    return {block.split("(")[0].split("\n")[0].strip(): block for block in found}


def run(block, namespace, tmp_path, monkeypatch):
    """A block as it is, but for smaller eigenfunctions than are the default."""
    from ella import NeuralEF, Training

    monkeypatch.chdir(tmp_path)
    assert block.count("ELLA(model)") == 1
    block = block.replace("ELLA(model)", "ELLA(model, eigenfunctions=quick)")
    namespace["quick"] = NeuralEF(8, num_inputs=60, num_directions=16, teacher=Training(steps=60))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibrate: .* validation examples alone")
        exec(compile(block, str(README), "exec"), namespace)
    return namespace


def small_classifier():
    """A classifier that is sure of too much, and its data."""
    torch.manual_seed(0)
    x = torch.randn(160, 6)
    y = (x[:, 0] + 0.5 * torch.randn(160) > 0).long()
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    return model, x, y


def sentences(count, tokenizer, seed):
    """Sentences of two kinds of words, as the tokenizer gives them, with their class."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        label = int(torch.randint(2, (), generator=generator))
        length = int(torch.randint(6, 12, (), generator=generator))
        picked = torch.randint(20, (length,), generator=generator).tolist()
        text = " ".join(f"{'bad' if label else 'good'}{i}" for i in picked)
        found.append({**tokenizer(text), "labels": label})
    return found


def bert(folder):
    """A BERT of two layers and its tokenizer, saved as if they had been fine-tuned."""
    transformers = pytest.importorskip("transformers")
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    words += tuple(f"{kind}{i}" for kind in ("good", "bad") for i in range(20))
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 16}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), **sizes, **depth)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return tokenizer


def test_the_first_screen_runs(tmp_path, monkeypatch):
    model, x, y = small_classifier()
    data = [DataLoader(TensorDataset(x[a:b], y[a:b]), 40) for a, b in ((0, 80), (80, 160))]
    given = {"model": model, "train_loader": data[0], "val_loader": data[1], "x": x}
    found = run(snippets()["from ella import ELLA"], given, tmp_path, monkeypatch)
    assert found["probs"].shape == (160, 2)
    assert torch.allclose(found["probs"].sum(1), torch.ones(160))
    assert found["scores"].entropy.shape == (160,)
    assert (tmp_path / "ella.safetensors").stat().st_size > 0


def test_the_hugging_face_snippet_runs(tmp_path, monkeypatch):
    from ella import ELLA

    tokenizer = bert(tmp_path)
    transformers = pytest.importorskip("transformers")
    pad = transformers.DataCollatorWithPadding(tokenizer)
    data = [DataLoader(sentences(60, tokenizer, i), 20, collate_fn=pad) for i in range(2)]
    given = {
        "AutoModelForSequenceClassification": transformers.AutoModelForSequenceClassification,
        "ELLA": ELLA,
        "folder": tmp_path,
        "tokenizer": tokenizer,
        "train_loader": data[0],
        "val_loader": data[1],
        "texts": ["good1", "bad3 bad4 bad5", "good6 bad7"],
    }
    block = snippets()["model = AutoModelForSequenceClassification.from_pretrained"]
    found = run(block, given, tmp_path, monkeypatch)
    assert found["probs"].shape == (3, 2)
    assert torch.allclose(found["probs"].sum(1), torch.ones(3))


def test_no_snippet_is_left_out():
    assert len(snippets()) == 2  # one test each, above


def test_first_screen_installs_and_tests():
    lines = README.read_text().splitlines()
    installs = [line for line in lines if line.startswith("python -m pip install")]
    assert any("experiments/calibration.py" in line for line in installs)
    assert any("python -m pytest" in line for line in installs)


def test_tables_match_the_result_files(monkeypatch):
    monkeypatch.syspath_prepend(README.parent / "experiments")
    import tables

    for page in tables.PAGES:
        assert tables.fill(page.read_text()) == page.read_text(), page
        assert "<!-- table:" in page.read_text()
