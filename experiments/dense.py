"""Are outputs for every position better calibrated, too? Street scenes and words in capitals.

    python experiments/dense.py camvid --root $ELLA_DATA
    python experiments/dense.py truecasing --root $ELLA_DATA

The tasks are described in `_dense.py`. Methods are fitted to a sample of positions of the
training data and tuned on one of the validation data, by the same search; scores are those of
every position of the test data that has a label. `wrong` is how well the entropy tells wrong
predictions from right ones, `outside` how well it tells positions of no known class (CamVid's
void; words of film reviews) from the others, both as AUROC. laplace-torch has no likelihood that
ignores labels, so that it is not compared. Writes dense-TASK.json after each seed and method, and
goes on where it was stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _dense import TASKS, Batches, DenseTask
from _report import DENSE_COLUMNS, earlier_rows, markdown_table, save_results
from _settings import Common, option, parsed, recorded
from torch import Tensor

from ella import ELLA, Categorical, LastLayer, NeuralEF, Predictor, Training, entropy
from ella.baselines import MAP, TemperatureScaling
from ella.metrics import auroc, evaluate
from ella.report import forward_ratio, timed


@dataclass(frozen=True)
class Settings(Common):
    """What the script can be asked for.

    Attributes:
        task: Which.
        seeds: How many networks.
        first_seed: The first of them.
        num_inputs: Examples that NeuralEF learns from.
        num_directions: See `NeuralEF`.
        threads: CPU threads.
    """

    task: str = option(None, "which", choices=sorted(TASKS), positional=True)
    seeds: int = option(3, "how many networks")
    first_seed: int = option(0, "the first of them")
    num_inputs: int = option(2000, "positions that NeuralEF learns from")
    num_directions: int = option(256, "of NeuralEF")
    threads: int = option(1, "CPU threads")


def methods(task: DenseTask, settings: Settings, seed: int) -> dict[str, Callable[[], Predictor]]:
    """All methods, by their names in the table, unfitted."""
    options: dict[str, Any] = {
        "likelihood": Categorical(ignore_index=task.ignored),
        "seed": seed,
        "progress": False,
    }
    neural = NeuralEF(32, num_inputs=settings.num_inputs, num_directions=settings.num_directions)
    if settings.smoke:
        short = Training(steps=30, batch_size=32)
        neural = NeuralEF(4, num_inputs=32, num_directions=8, width=16, teacher=short)
    return {
        "MAP": lambda: MAP(task.model, **options),
        "temperature scaling": lambda: TemperatureScaling(task.model, **options),
        "ELLA, last layer, no residual": lambda: ELLA(
            task.model, eigenfunctions=LastLayer(residual="none"), **options
        ),
        "ELLA, NeuralEF": lambda: ELLA(task.model, eigenfunctions=neural, **options),
    }


def rows_of(probs: Tensor) -> Tensor:
    """Probabilities (n, c, h, w) or (n, length, c) as rows (n·positions, c)."""
    return (probs.movedim(1, -1) if probs.ndim == 4 else probs).flatten(0, -2)


def predicted(fitted: Predictor, batches: Batches, ignored: int) -> tuple[Tensor, Tensor]:
    """Probabilities and labels of all positions that count."""
    probs, labels = [], []
    for x, y in batches:
        counted = y.flatten() != ignored
        probs.append(rows_of(fitted.predict_proba(x))[counted])
        labels.append(y.flatten()[counted])
    return torch.cat(probs), torch.cat(labels)


def row_of(make: Callable[[], Predictor], task: DenseTask) -> dict[str, Any]:
    """One method: fitted, tuned, scored."""
    fitted, seconds = timed(lambda: make().fit(task.train))
    fitted.calibrate(task.val)
    probs, labels = predicted(fitted, task.test, task.ignored)
    outside, _ = predicted(fitted, task.outside, task.ignored)
    uncertain, wrong = entropy(probs), probs.argmax(1) != labels
    x, _ = task.test[0]
    with torch.no_grad():
        ratio = forward_ratio(
            lambda: fitted.predict_proba(x, n_samples=64),
            lambda: task.model(**x) if isinstance(x, dict) else task.model(x),
            repeats=5,
        )
    return {
        **evaluate(probs, labels),
        "wrong": auroc(uncertain[~wrong], uncertain[wrong]),
        "outside": auroc(uncertain, entropy(outside)),
        "fit_seconds": seconds,
        "predict_ratio": ratio,
        "state_bytes": fitted.state_bytes,
        "positions": len(labels),
        **vars(fitted.hyperparameters),
    }


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, writing after each method."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(settings.threads)
    path = settings.out / f"dense-{settings.task}.json"
    kept = recorded(settings, "root", "out", "threads")
    rows = earlier_rows(path, kept, [name for name in kept if name not in ("seeds", "first_seed")])
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        done = {row["method"] for row in rows if row["seed"] == seed}
        task = TASKS[settings.task](settings.root, seed, smoke=settings.smoke)
        for name, make in methods(task, settings, seed).items():
            if name in done:
                continue
            rows.append({"method": name, "seed": seed, **row_of(make, task)})
            save_results(path, kept, rows)
            print(markdown_table(rows, DENSE_COLUMNS), flush=True)


if __name__ == "__main__":
    main()
