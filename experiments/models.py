"""Does it run on anybody's model? Public classes with random weights, each all the way.

    python experiments/models.py --out experiments/results
    python experiments/models.py --large --out experiments/results

Of each model, and of NeuralEF, Nystrom and LastLayer on it, this goes through fit, calibrate,
predict, uncertainty, save and load, and checks that probabilities sum to 1, that logits and
accuracy are the model's own, that what is computed of an example does not depend on the rest of
its batch, that a loaded file predicts the same, and that the model is untouched. What ella
refuses in its own words is listed with them; anything else that is raised is a failure. `--large`
takes ResNet-50, ViT-B/16, ConvNeXt-T and BERT-base at their own sizes with NeuralEF, and records
time and memory. What is in the result file already is not run again.
"""

import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _report import PeakMemory, load_results, pipes, save_results
from _settings import Common, option, parsed
from _zoo import LIBRARIES, Entry, large_entries
from torch import Tensor, nn

import ella
from ella import ELLA, LastLayer, NeuralEF, Nystrom, Training
from ella.baselines import MAP
from ella.report import timed

BATCHES = (10, 8, 6)
QUICK = Training(steps=40, batch_size=16)
METHODS: dict[str, Any] = {
    "NeuralEF": NeuralEF(rank=4, num_inputs=32, num_directions=16, width=16, teacher=QUICK),
    "Nystrom": Nystrom(rank=4, subsample=12),
    "LastLayer": LastLayer(),
}
HEAVY: dict[str, Any] = {
    "NeuralEF": replace(METHODS["NeuralEF"], num_inputs=16, num_directions=8),
    "Nystrom": Nystrom(rank=4, subsample=6, residual="none"),
    "LastLayer": LastLayer(residual="none"),
}
"""For models whose Jacobians take seconds: fewer of them, and no residual of exact products."""
TOLERANCE = 1e-2
PACKAGE = str(Path(ella.__file__).parent)


@dataclass(frozen=True)
class Settings(Common):
    """What the script can be asked for.

    Attributes:
        library: Whose models; None for all.
        only: Names of models; none for all.
        large: Whether to take the large ones.
        num_inputs: Of the large ones.
    """

    library: str | None = option(None, "torch, torchvision, timm or transformers (default: all)")
    only: str | None = option(None, "one model")
    large: bool = option(False, "ResNet-50, ViT-B/16, ConvNeXt-T and BERT-base at their own sizes")
    num_inputs: int = option(200, "inputs that the large ones learn from")


def loader_of(entry: Entry, batches: tuple[int, ...], seed: int) -> list[Any]:
    """Batches (x, y) of made-up inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (entry.inputs(n, generator), torch.randint(entry.classes, (n,), generator=generator))
        for n in batches
    ]


def part_of(x: Any, index: Tensor) -> Any:  # noqa: ANN401
    """Some examples."""
    if isinstance(x, dict):
        return {key: value[index] for key, value in x.items()}
    return x[index]


def made(entry: Entry) -> nn.Module:
    """The model, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return entry.make()


def traces(model: nn.Module) -> dict[str, Any]:
    """What must stay as it is."""
    return {
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
    }


def go_all_the_way(entry: Entry, method: Any, folder: Path) -> ELLA:  # noqa: ANN401
    """Everything that a user does, and what must hold after it.

    Raises:
        AssertionError: If something does not hold.
        Exception: Whatever fails.
    """
    model = made(entry)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = traces(model)
    fitted = ELLA(model, eigenfunctions=method, progress=False, **dict(entry.options))
    fitted.fit(loader_of(entry, BATCHES, 0)).calibrate(loader_of(entry, (8, 8), 1))
    x = entry.inputs(8, torch.Generator().manual_seed(2))
    probs = fitted.predict_proba(x)
    assert torch.isfinite(probs).all()
    assert (probs.sum(1) - 1).abs().max() < 1e-5
    chosen = fitted.hyperparameters
    assert chosen is not None
    plain = MAP(model, progress=False).fit(loader_of(entry, (8,), 1))
    logits = plain.gaussian(x).mean
    check_close(fitted.gaussian(x).mean * chosen.logit_temperature, logits, "logits")
    assert torch.equal(fitted.predict(x), probs.argmax(1))
    check_examples_apart(fitted, x)
    for name, score in vars(fitted.uncertainty(x)).items():
        assert score is None or torch.isfinite(score).all(), name
    fitted.save(folder / "ella")
    again = ELLA.load(folder / "ella", made(entry), progress=False)
    check_close(again.predict_proba(x), probs, "predictions of a loaded file")
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert traces(model) == before, "the model was touched"
    return fitted


def check_examples_apart(fitted: ELLA, x: Any) -> None:  # noqa: ANN401
    """What is computed of an example does not depend on the others."""
    whole = fitted.features(x)
    order = torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])
    for index in (order, order[:3]):
        found = fitted.features(part_of(x, index))
        for name in ("mean", "factor", "residual"):
            if getattr(whole, name) is not None:
                check_close(getattr(found, name), getattr(whole, name)[index], name)


def check_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal but for rounding, which half precision has more of."""
    apart = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    assert apart < TOLERANCE, f"{what} differ by {apart:.1e}"


def outcome(entry: Entry, name: str) -> dict[str, Any]:
    """What became of one model and method."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            go_all_the_way(entry, (HEAVY if entry.heavy else METHODS)[name], Path(folder))
            found = {"outcome": "runs"}
        except Exception as error:  # that is the question
            found = {
                "outcome": "refused" if is_own(error) else "fails",
                "error": type(error).__name__,
                "message": str(error)[:400],
                "where": innermost(error),
            }
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def is_own(error: BaseException) -> bool:
    """Whether ella raised it itself."""
    return innermost(error).startswith("ella/") and not isinstance(error, AssertionError)


def innermost(error: BaseException) -> str:
    """Where it was raised."""
    while error.__cause__ is not None:  # what it was before a batch was named
        error = error.__cause__
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = frame.filename
    if place.startswith(PACKAGE):
        place = f"ella{place.removeprefix(PACKAGE)}"
    return f"{place}:{frame.lineno}"


def run_all(settings: Settings, path: Path) -> list[dict[str, Any]]:
    """Every model and method that is not in the file yet."""
    rows: list[dict[str, Any]] = load_results(path)["rows"] if path.exists() else []
    known = {(r["library"], r["model"], r["method"]): r for r in rows if r["outcome"] != "fails"}
    for library, entries in LIBRARIES.items():
        if settings.library not in (None, library):
            continue
        for entry in entries():
            if settings.only not in (None, entry.name) or (settings.smoke and entry.heavy):
                continue
            for name in METHODS:
                key = (library, entry.name, name)
                if key not in known:
                    known[key] = described(entry, name)
                    print(known[key], flush=True)
            save_results(path, {}, list(known.values()))
    return list(known.values())


def described(entry: Entry, name: str) -> dict[str, Any]:
    """A row of the result."""
    row = {"library": entry.library, "model": entry.name, "family": entry.family, "method": name}
    parameters = sum(p.numel() for p in made(entry).parameters())
    return {**row, "parameters": parameters, **outcome(entry, name)}


def run_large(settings: Settings, path: Path) -> list[dict[str, Any]]:
    """The large models with the default method on few inputs: time and memory."""
    rows: list[dict[str, Any]] = load_results(path)["rows"] if path.exists() else []
    for entry in large_entries():
        if entry.name in {row["model"] for row in rows} or settings.only not in (None, entry.name):
            continue
        rows.append({"model": entry.name, **large(entry, settings)})
        print(rows[-1], flush=True)
        save_results(path, {"num_inputs": settings.num_inputs}, rows)
    return rows


def large(entry: Entry, settings: Settings) -> dict[str, Any]:
    """One large model with everything by default but the number of inputs."""
    model = made(entry)
    n = settings.num_inputs
    batches = (20,) * (n // 20)
    seconds: dict[str, float] = {}

    def clocked(what: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401
        value, taken = timed(call)
        seconds[what] = round(taken, 2)
        return value

    x = entry.inputs(8, torch.Generator().manual_seed(2))
    with PeakMemory("cpu") as memory, tempfile.TemporaryDirectory() as folder:
        fitted = ELLA(model, eigenfunctions=NeuralEF(num_inputs=n), progress=False)
        clocked("fit", lambda: fitted.fit(loader_of(entry, batches, 0)))
        clocked("calibrate", lambda: fitted.calibrate(loader_of(entry, (20, 20), 1)))
        clocked("forward", lambda: fitted.network(x))
        probs = clocked("predict", lambda: fitted.predict_proba(x))
        clocked("save", lambda: fitted.save(Path(folder) / "ella"))
        file_bytes = (Path(folder) / "ella").stat().st_size
        again = clocked("load", lambda: ELLA.load(Path(folder) / "ella", model, progress=False))
        assert torch.equal(again.predict_proba(x), probs)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": entry.classes,
        "seconds": seconds,
        "peak_bytes": memory.bytes,
        "file_bytes": file_bytes,
    }


def cell(row: Mapping[str, Any] | None) -> str:
    """One outcome in a table."""
    if row is None:
        return "–"
    return f"{row['seconds']:.1f} s" if row["outcome"] == "runs" else str(row["outcome"])


def model_table(results: Mapping[str, Any]) -> str:
    """A line for each model, a column for each method; then the refusals, in ella's words."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in results["rows"]:
        found.setdefault((row["library"], row["model"]), {})[row["method"]] = row
    titles = ["model", "library", "family", "weights", *METHODS]
    lines = [titles, ["---"] * 3 + ["---:"] * 4]
    for (library, model), by_method in found.items():
        any_row = next(iter(by_method.values()))
        weights = f"{any_row['parameters']:,}"
        cells = [cell(by_method.get(name)) for name in METHODS]
        lines.append([model, library, any_row["family"], weights, *cells])
    text = pipes(lines)
    counts = Counter(row["outcome"] for row in results["rows"])
    text += f"\n\n{len(found)} models: {dict(counts)}."
    messages = Counter(
        (row["method"], row["message"]) for row in results["rows"] if row["outcome"] == "refused"
    )
    said = (f"- {method}, {n} models: {message}" for (method, message), n in messages.items())
    return "\n".join([text, "", *said]).rstrip()


def large_table(results: Mapping[str, Any]) -> str:
    """A line for each large model."""
    titles = ["model", "weights", "classes", "fit s", "calibrate s", "predict 8, s"]
    titles += ["forward 8, s", "peak GB", "file MB"]
    lines = [titles, ["---"] + ["---:"] * 8]
    for row in results["rows"]:
        seconds = row["seconds"]
        times = [f"{seconds[n]:.1f}" for n in ("fit", "calibrate", "predict", "forward")]
        sizes = [f"{row['peak_bytes'] / 1e9:.1f}", f"{row['file_bytes'] / 1e6:.0f}"]
        about = [row["model"], f"{row['parameters']:,}", f"{row['classes']:,}"]
        lines.append([*about, *times, *sizes])
    n = results["settings"]["num_inputs"]
    return f"{pipes(lines)}\n\n{n} inputs, 224 pixels or up to 32 tokens."


def main(argv: list[str] | None = None) -> None:
    """See the module."""
    settings = parsed(Settings, __doc__ or "", argv)
    torch.set_num_threads(1)
    name = "models-large" if settings.large else "models"
    path = settings.out / f"{name}.json"
    if settings.large:
        run_large(settings, path)
    else:
        run_all(settings, path)


if __name__ == "__main__":
    main()
