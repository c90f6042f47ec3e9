"""Does an exported prediction give the same, and what does it cost? Three models, three ways.

    python experiments/export.py --out experiments/results

A convolution net, a transformer and a perceptron with random weights, each with NeuralEF and the
distance term, through `torch.export`, `torch.compile(fullgraph=True)` and ONNX (onnxruntime). The
error is the largest difference of a probability, the mutual information or the variance (relative
to the largest) from those of the estimator on 1,000 inputs. Times are those of 32 inputs, in turn
with the plain model that went the same way, on one thread.
"""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _minilm import VOCABULARY
from _report import pipes, save_results
from _settings import Common, option, parsed, recorded
from torch import Tensor, nn
from torch.export import Dim
from torchvision.models import resnet18

from ella import ELLA, Distance, NeuralEF, Training
from ella.report import forward_ratio

BATCH, CHECKED = 32, 1000
WAYS = ("export", "compile", "ONNX")
Inputs = Any


@dataclass(frozen=True)
class Settings(Common):
    """What the script can be asked for.

    Attributes:
        repeats: Pairs of timed calls.
    """

    repeats: int = option(15, "pairs of timed calls")


class Logits(nn.Module):
    """A transformer's logits alone, as ONNX wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Shape (n, c)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def transformer() -> nn.Module:
    """A BERT of 4 layers of width 128."""
    import transformers

    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    sizes |= {"hidden_size": 128, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    config = transformers.BertConfig(num_labels=10, attn_implementation="eager", **sizes)
    return Logits(transformers.BertForSequenceClassification(config))


def perceptron() -> nn.Module:
    """Three hidden layers of 512 units."""
    layers: list[nn.Module] = [nn.Linear(64, 512), nn.ReLU()]
    layers += [nn.Linear(512, 512), nn.ReLU()] * 2
    return nn.Sequential(*layers, nn.Linear(512, 10))


def images(n: int, generator: torch.Generator) -> Tensor:
    """Shape (n, 3, 64, 64)."""
    return torch.randn(n, 3, 64, 64, generator=generator)


def vectors(n: int, generator: torch.Generator) -> Tensor:
    """Shape (n, 64)."""
    return torch.randn(n, 64, generator=generator)


def tokens(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Shape (n, 32)."""
    lengths = torch.randint(8, 33, (n, 1), generator=generator)
    mask = (torch.arange(32) < lengths).long()
    ids = torch.randint(1, VOCABULARY, (n, 32), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[..., Inputs]]] = {
    "ResNet-18, 64 pixels": (lambda: resnet18(num_classes=10), images),
    "BERT, 4 layers": (transformer, tokens),
    "perceptron, 3 × 512": (perceptron, vectors),
}


class Named(nn.Module):
    """A model that takes its inputs as one object, as a `PredictiveModule` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Inputs) -> Tensor:
        """The model's outputs."""
        return self.model(**x) if isinstance(x, dict) else self.model(x)


def sent(module: nn.Module, way: str, x: Inputs, folder: Path) -> Callable[[Inputs], list[Tensor]]:
    """The module after it went one of the ways."""
    free = {name: {0: Dim.DYNAMIC} for name in x} if isinstance(x, dict) else {0: Dim.DYNAMIC}
    if way == "compile":
        compiled = torch.compile(module, fullgraph=True)
        return lambda y: _listed(compiled(y))
    if way == "export":
        exported = torch.export.export(module, (x,), dynamic_shapes=(free,), strict=False)
        runnable = exported.module()
        return lambda y: _listed(runnable(y))
    import onnxruntime

    program = torch.onnx.export(
        module, kwargs={"x": x}, dynamo=True, dynamic_shapes={"x": free}, verbose=False
    )
    path = folder / f"{type(module).__name__}.onnx"
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    names = [each.name for each in session.get_inputs()]

    def run(y: Inputs) -> list[Tensor]:
        values = y.values() if isinstance(y, dict) else [y]
        given = dict(zip(names, (value.numpy() for value in values), strict=True))
        return [torch.from_numpy(found) for found in session.run(None, given)]

    return run


def _listed(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def rows_of(name: str, settings: Settings) -> list[dict[str, Any]]:
    """A row for each way."""
    make, inputs = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    generator = torch.Generator().manual_seed(0)
    x, y = inputs(64, generator), torch.randint(10, (64,), generator=generator)
    short = Training(steps=200, batch_size=32)
    method = NeuralEF(num_inputs=64, num_directions=128, teacher=short)
    ella = ELLA(model, eigenfunctions=method, distance=Distance(), progress=False).fit([(x, y)])
    assert ella.hyperparameters is not None
    ella.hyperparameters = replace(ella.hyperparameters, distance_scale=0.1)
    checked, batch = inputs(CHECKED, generator), inputs(BATCH, generator)
    scores = ella.uncertainty(checked, n_samples=64)
    expected = [ella.predict_proba(checked, n_samples=64)]
    expected += [scores.mutual_information, scores.logit_variance]
    rows = []
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            module = sent(ella.predictive_module(64), way, batch, Path(folder))
            plain = sent(Named(model), way, batch, Path(folder))
            pairs = zip(module(checked), expected, strict=True)
            error = max(_apart(found, wanted) for found, wanted in pairs)
            ratio = forward_ratio(
                lambda module=module: module(batch),
                lambda plain=plain: plain(batch),
                repeats=settings.repeats,
            )
        rows.append({"model": name, "way": way, "error": error, "ratio": ratio})
        print(rows[-1], flush=True)
    return rows


def _apart(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1)).item()


def export_table(results: Mapping[str, Any]) -> str:
    """A line for each model and way."""
    lines = [["model", "way", "largest error", "time × plain model"], ["---"] * 2 + ["---:"] * 2]
    for row in results["rows"]:
        lines.append([row["model"], row["way"], f"{row['error']:.0e}", f"{row['ratio']:.2f}"])
    return pipes(lines)


def main(argv: list[str] | None = None) -> None:
    """See the module."""
    settings = parsed(Settings, __doc__ or "", argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = list(MODELS)[2:] if settings.smoke else list(MODELS)
    rows = [row for name in names for row in rows_of(name, settings)]
    save_results(settings.out / "export.json", recorded(settings, "root", "out", "smoke"), rows)
    print(export_table({"rows": rows}))


if __name__ == "__main__":
    main()
