"""How good are learned eigenfunctions of the NTK on held-out inputs, against exact ones?

    python experiments/eigenfunctions.py
    python experiments/eigenfunctions.py --dataset cifar10 --root $ELLA_DATA --arch resnet20

On held-out inputs the exact kernel matrix κ (all outputs) is compared with φφᵀ:

- energy: share of the trace of κ within the span of φ, relative to the best span of that rank;
- kernel error: ‖κ − φφᵀ‖ / ‖κ‖ in Frobenius norm over all pairs of inputs;
- block error: the same for the c×c blocks κ(x, x) with R added, averaged over inputs;
- log trace r: correlation of log tr(φφᵀ + R) with log tr κ(x, x);

and NLL, ECE and AUROC of ELLA with each of them, tuned by the same search on the same images, are
put beside those with exact Jacobian products and those of temperature scaling. The shift to noise
and blur is measured with the first network.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _data import DATASETS, Task, data_root, load_task
from _fidelity import ExactKernel, fidelity, plot_fidelity
from _models import DigitsNet, checkpoint_path, load_model, train_classifier
from _posterior import (
    Split,
    evaluated,
    performance,
    reduced,
    scaled,
    select,
    splits,
    temper,
    temperature_scaling,
    tuned,
    variances,
)
from _report import FIDELITY_COLUMNS, SHIFT_COLUMNS, markdown_table, save_results, timed
from torch import Tensor
from torch.utils.data import DataLoader

from ella import NestedLoRA, NeuralEF, NeuralEFObjective, Nystrom, Training
from ella.activations import FeatureTaps, Tap
from ella.eigenfunctions import Eigenfunctions, Features, KernelSample
from ella.linearize import Linearized
from ella.metrics import expected_calibration_error, negative_log_likelihood

SHIFTS = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "gaussian_blur")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=[d for d in DATASETS if "mnist" not in d])
    parser.add_argument("--root", help="folder of the data (default: $ELLA_DATA)")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, help="k (default: 20 on digits, else 64)")
    parser.add_argument("--num-inputs", type=int, help="inputs to learn from")
    parser.add_argument("--held-out", type=int, help="inputs to compare kernels on")
    parser.add_argument("--num-test", type=int, help="test inputs for NLL, ECE and AUROC")
    parser.add_argument(
        "--num-shift", type=int, default=400, help="shifted inputs, exact products"
    )
    parser.add_argument("--num-ood", type=int, default=2000, help="out-of-distribution inputs")
    parser.add_argument("--num-sources", type=int, default=4000, help="inputs that G comes from")
    parser.add_argument("--seeds", type=int, help="default: 3 on digits, else 1")
    parser.add_argument("--first-seed", type=int, default=10)
    parser.add_argument("--only", help="run the networks whose name contains one of these, a|b|c")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: no real result")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.set_defaults(dataset="digits")
    args = parser.parse_args(argv)
    digits = args.dataset == "digits"
    args.rank = args.rank or (4 if args.smoke else 20 if digits else 64)
    args.num_inputs = args.num_inputs or (100 if args.smoke else 3000 if digits else 10_000)
    args.held_out = args.held_out or (40 if args.smoke else 300 if digits else 500)
    if args.smoke:
        args.num_ood = args.num_sources = 100
    args.seeds = args.seeds or (3 if digits else 1)
    return args


@dataclass(frozen=True)
class Study:
    """A classifier, and the data on which its eigenfunctions are judged.

    Attributes:
        task: The data set.
        linearized: The classifier.
        loader: Training data, shuffled.
        images: The validation images, then the test images.
        labels: Theirs.
        parts: How they are divided for tuning and testing.
        ood: Out-of-distribution images.
        sources: Training images from which G is estimated.
        kernel: The exact kernel on the first test images.
    """

    task: Task
    linearized: Linearized
    loader: DataLoader
    images: Tensor
    labels: Tensor
    parts: list[Split]
    ood: Tensor
    sources: Tensor
    kernel: ExactKernel

    @property
    def held(self) -> slice:
        """Rows of `images` where the kernel is known."""
        start = len(self.task.val)
        return slice(start, start + len(self.kernel.blocks))

    def features(self, fitted: Eigenfunctions) -> tuple[Features, Features, Features]:
        """At the labelled images, the OOD images and the sources."""
        device = self.linearized.device
        labelled, ood, sources = (
            evaluated(fitted, images, device) for images in (self.images, self.ood, self.sources)
        )
        return labelled, ood, sources

    def judge(self, found: tuple[Features, ...]) -> dict[str, float]:
        """All figures of one method."""
        labelled, ood, sources = found
        count = len(self.task.train)
        return {
            **fidelity(self.kernel, select(labelled, torch.arange(len(self.labels))[self.held])),
            **performance(sources, labelled, self.labels, ood, self.parts, count),
        }


def prepare(args: argparse.Namespace, seed: int) -> Study:
    """Load or train the classifier; compute the exact kernel."""
    digits = args.dataset == "digits"
    task = load_task(args.dataset, args.root, seed if digits else 0, num_test=args.num_test)
    if digits:
        model = train_classifier(DigitsNet(task.num_classes), task.train, seed)
    else:
        model = load_model(args.arch, checkpoint_path(args.arch, data_root(args.root)))
    linearized = Linearized(model.to(args.device))
    # Shuffled by seed: a subset of a large training set should not depend on its order.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(task.train), generator=generator)
    loader = DataLoader(task.train, batch_size=100, shuffle=True, generator=generator)
    both = zip(task.val.tensors, task.test.tensors, strict=True)
    images, labels = (torch.cat(pair) for pair in both)
    held = task.test.tensors[0][: args.held_out].to(args.device)
    return Study(
        task=task,
        linearized=linearized,
        loader=loader,
        images=images,
        labels=labels,
        parts=splits(len(labels), len(task.val), 1 if digits else 5),
        ood=next(iter(task.ood.values()))[: args.num_ood],
        sources=task.train.tensors[0][order[: args.num_sources]],
        kernel=ExactKernel.of(linearized, held),
    )


@dataclass(frozen=True)
class Variant:
    """A network and its residual.

    Attributes:
        method: Settings of the networks.
        residual: "diag", "factor" or "none".
        choose: Selects or changes taps.
    """

    method: NeuralEF
    residual: str = "diag"
    choose: Callable[[Tap], Tap | None] = lambda tap: tap


def variants(args: argparse.Namespace) -> dict[str, Variant]:
    """What is compared; the default first."""
    digits = args.dataset == "digits"
    width, short = 256, 500 if digits else 1000
    long = Training(weight_decay=0.3)
    refine = Training(steps=short, learning_rate=3e-4)
    if args.smoke:
        width, long = 16, Training(steps=20, batch_size=32)
        refine = long
    base = NeuralEF(args.rank, num_inputs=args.num_inputs, width=width, teacher=long)
    k = f"k = {args.rank}"
    found = {
        f"teacher, {k}": Variant(base),
        f"teacher, {k}, factor": Variant(base, "factor"),
        f"teacher, {k}, no residual": Variant(base, "none"),
    }
    for name, objective in (("NestedLoRA", NestedLoRA()), ("NeuralEF", NeuralEFObjective())):
        alone = replace(base, objective=objective, teacher=None, training=long)
        after = replace(base, objective=objective, training=refine)
        found[f"{name} objective, {k}"] = Variant(alone)
        found[f"teacher, then {name}, {k}"] = Variant(after)
    found |= {
        f"teacher, {k}, penultimate features": Variant(
            base, choose=lambda tap: tap if tap.side == "input" else None
        ),
        f"teacher, {k}, linear head": Variant(replace(base, depth=0)),
    }
    for rank in (20, 64, 128, 256):
        if rank != args.rank and (rank <= 64 or not digits):
            found[f"teacher, k = {rank}"] = Variant(replace(base, rank=rank))
            found[f"teacher, k = {rank}, factor"] = Variant(replace(base, rank=rank), "factor")
    if args.smoke:
        found = {name: found[name] for name in list(found)[:4]}
    wanted = args.only.split("|") if args.only else [""]
    return {name: each for name, each in found.items() if any(part in name for part in wanted)}


def retapped(
    sample: KernelSample, linearized: Linearized, choose: Callable[[Tap], Tap | None]
) -> KernelSample:
    """The same sample with other features."""
    chosen = [new for tap in sample.taps.taps if (new := choose(tap)) is not None]
    if chosen == sample.taps.taps:
        return sample
    taps = FeatureTaps(linearized, chosen)
    assert isinstance(sample.inputs, Tensor)
    activations = torch.cat([taps(part)[1] for part in sample.inputs.split(250)])
    return replace(sample, taps=taps, activations=activations)


def exact_rows(
    study: Study,
    args: argparse.Namespace,
    seed: int,
    found: dict[str, Features],
    shifts: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Temperature scaling, and ELLA with exact Jacobian products; the latter is put in `found`."""
    method = Nystrom(args.rank, 2000)
    fitted, fit_seconds = timed(
        lambda: method.fit(
            study.linearized, study.loader, residual="exact", seed=seed, progress=False
        )
    )
    full = study.features(fitted)
    labelled, ood, _ = full
    found["exact products"] = select(labelled, torch.arange(len(study.labels))[study.held])
    scaling = temperature_scaling(labelled.logits, study.labels, ood.logits, study.parts)
    yield {"method": "temperature scaling", **scaling}
    for rank in sorted({min(20, args.rank), args.rank}):
        for residual, title in (("none", "no residual"), ("diag", "diagonal"), ("exact", "full")):
            some = tuple(reduced(part, rank, residual) for part in full)
            figures = study.judge(some)
            name = f"exact products, k = {rank}, {title}"
            yield {"method": name, "fit_seconds": fit_seconds, **figures}
    # The last one is the most exact.
    shifts += shift_rows(
        study, lambda x: reduced(fitted(x), args.rank, "exact"), some, name, args.num_shift
    )


def network_rows(
    study: Study,
    args: argparse.Namespace,
    seed: int,
    found: dict[str, Features],
    shifts: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Every network, all from one sample. Features of the first ones are put in `found`."""
    progress = not args.smoke
    chosen = variants(args)
    # Directions for the highest rank, all of which one sample then serves.
    if not chosen:
        return
    widest = max((each.method for each in chosen.values()), key=lambda method: method.rank)
    widest = replace(widest, num_directions=20 if args.smoke else 256)
    sample, sample_seconds = timed(
        lambda: widest.sample(study.linearized, study.loader, seed=seed, progress=progress)
    )
    for name, each in chosen.items():
        data = retapped(sample, study.linearized, each.choose)
        fitted, seconds = timed(
            lambda each=each, data=data: each.method.learn(
                data, residual=each.residual, seed=seed, progress=progress
            )
        )
        features = study.features(fitted)
        if len(found) < 2:
            shifts += shift_rows(study, fitted, features, name)
        if len(found) < 3:
            found[name] = select(features[0], torch.arange(len(study.labels))[study.held])
        yield {
            "method": name,
            "fit_seconds": sample_seconds + seconds,
            "learn_seconds": seconds,
            **study.judge(features),
        }


def shift_rows(
    study: Study,
    fitted: Callable[[Tensor], Features],
    features: tuple[Features, ...],
    name: str,
    count: int = 2000,
) -> Iterator[dict[str, Any]]:
    """NLL and variance on corrupted test images, of ELLA and of temperature scaling."""
    split = study.parts[0]  # the only one whose test images are those of the task, in order
    labelled, _, sources = features
    posterior, tuning = tuned(sources, labelled, study.labels, split, len(study.task.train))
    scaling = scaled(labelled.logits, study.labels, split)
    labels = study.task.test.tensors[1][:count]
    few = min(100, count)
    device = study.linearized.device
    for kind in SHIFTS:
        for severity in range(1, 6):
            images = study.task.corrupted_test(kind, severity).tensors[0][:count]
            at = evaluated(fitted, images, device)
            probs, plain = temper(at, posterior, tuning), scaling.predict_proba(at.logits)
            exact = study.linearized.kernel_diagonal(images[:few].to(device)).sum(1).mean().item()
            yield {
                "method": name,
                "corruption": kind,
                "severity": severity,
                "nll": negative_log_likelihood(probs, labels),
                "nll_scaling": negative_log_likelihood(plain, labels),
                "ece": expected_calibration_error(probs, labels),
                "ece_scaling": expected_calibration_error(plain, labels),
                "variance": variances(at).mean().item(),
                f"variance_{severity}": variances(select(at, torch.arange(few))).mean().item(),
                f"exact_variance_{severity}": exact,
            }


def main(argv: list[str] | None = None) -> None:
    """Run and write everything."""
    args = arguments(argv)
    if args.dataset == "digits":
        torch.set_num_threads(1)  # the network is too small for threads to pay
    rows: list[dict[str, Any]] = []
    shifts: list[dict[str, Any]] = []
    exactly: list[dict[str, Any]] = []
    name = args.dataset if args.dataset == "digits" else args.arch
    stem = args.out / f"eigenfunctions-{name}"
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        study = prepare(args, seed)
        found: dict[str, Features] = {}
        rows_of = (
            exact_rows(study, args, seed, found, exactly),
            network_rows(study, args, seed, found, shifts),
        )
        for row in (row for each in rows_of for row in each):
            rows.append({"seed": seed, **row})
            print(row, flush=True)
            save_results(stem.with_suffix(".json"), vars(args), rows)
        save_results(args.out / f"shift-exact-{name}.json", vars(args), exactly)
        save_results(args.out / f"shift-{name}.json", vars(args), shifts)
        plot_fidelity(study.kernel, found, stem.with_suffix(".png"))  # shows the last seed
    text = markdown_table(rows, FIDELITY_COLUMNS) + "\n"
    for part in (shifts, exactly):
        text += "\n" + markdown_table(part, SHIFT_COLUMNS, by="corruption") + "\n"
    stem.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
