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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from _data import Task, data_root, load_task
from _fidelity import ExactKernel, fidelity, plot_fidelity
from _given import (
    DRAWS,
    Given,
    Reduced,
    Remembered,
    Split,
    batches_of,
    performance,
    scaled,
    splits,
    temperature_scaling,
)
from _models import DigitsNet, checkpoint_path, load_model, train_classifier
from _report import FIDELITY_COLUMNS, SHIFT_COLUMNS, markdown_table, save_results
from _settings import OnDevice, option, parsed, recorded
from torch import Tensor
from torch.utils.data import DataLoader

from ella import (
    ELLA,
    Categorical,
    Evaluated,
    FeatureTaps,
    Linearized,
    LogitGaussian,
    NestedLoRA,
    NeuralEF,
    NeuralEFObjective,
    Nystrom,
    Tap,
    Training,
)
from ella.eigenfunctions import KernelSample
from ella.metrics import expected_calibration_error, negative_log_likelihood
from ella.report import timed

SHIFTS = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "gaussian_blur")


@dataclass(frozen=True)
class Settings(OnDevice):
    """What the script can be asked for; what depends on the data set is None until `filled`.

    Attributes:
        dataset: "digits" or "cifar10".
        arch: The network for CIFAR-10.
        rank: k.
        num_inputs: Inputs to learn from.
        held_out: Inputs to compare kernels on.
        num_test: Test inputs for NLL, ECE and AUROC; None takes all.
        num_shift: Shifted inputs for exact products.
        num_ood: Out-of-distribution inputs.
        num_sources: Training inputs that G comes from.
        seeds: How many.
        first_seed: The first of them.
        only: Parts of the names of the networks to run, a|b|c.
    """

    dataset: str = option("digits", "digits or cifar10", choices=("digits", "cifar10"))
    arch: str = option("resnet20", "network for CIFAR-10")
    rank: int | None = option(None, "k (default: 20 on digits, else 64)", parse=int)
    num_inputs: int | None = option(None, "inputs to learn from", parse=int)
    held_out: int | None = option(None, "inputs to compare kernels on", parse=int)
    num_test: int | None = option(None, "test inputs for NLL, ECE and AUROC", parse=int)
    num_shift: int = option(400, "shifted inputs, exact products")
    num_ood: int = option(2000, "out-of-distribution inputs")
    num_sources: int = option(4000, "inputs that G comes from")
    seeds: int | None = option(None, "default: 3 on digits, else 1", parse=int)
    first_seed: int = option(10, "the first of them")
    only: str | None = option(None, "run the networks whose name contains one of these, a|b|c")

    def filled(self) -> "Settings":
        """With the defaults of the data set, or those of a smoke test."""
        digits, smoke = self.dataset == "digits", self.smoke
        few = {"num_ood": 100, "num_sources": 100} if smoke else {}
        return replace(
            self,
            rank=self.rank or (4 if smoke else 20 if digits else 64),
            num_inputs=self.num_inputs or (100 if smoke else 3000 if digits else 10_000),
            held_out=self.held_out or (40 if smoke else 300 if digits else 500),
            seeds=self.seeds or (3 if digits else 1),
            **few,
        )


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
        sources: Training images, and their labels, from which G is estimated.
        kernel: The exact kernel on the first test images.
    """

    task: Task
    linearized: Linearized
    loader: DataLoader
    images: Tensor
    labels: Tensor
    parts: list[Split]
    ood: Tensor
    sources: tuple[Tensor, Tensor]
    kernel: ExactKernel

    @property
    def held(self) -> slice:
        """Rows of `images` where the kernel is known."""
        start = len(self.task.val)
        return slice(start, start + len(self.kernel.blocks))

    def fit(self, fitted: Any) -> ELLA:  # noqa: ANN401 - eigenfunctions of any kind
        """ELLA with these eigenfunctions; G from some training images stands for that of all."""
        share = len(self.task.train) / len(self.sources[0])
        likelihood = Categorical(class_weights=[share] * self.task.num_classes)
        ella = ELLA(
            self.linearized.network.model,
            likelihood=likelihood,
            eigenfunctions=Given(fitted),
            progress=False,
        )
        return ella.fit(batches_of(*self.sources))

    def evaluate(self, ella: ELLA) -> tuple[Evaluated, Evaluated]:
        """At the labelled images and the OOD images."""
        labelled, ood = (ella.evaluated(batches_of(x)) for x in (self.images, self.ood))
        return labelled, ood

    def prior(self, labelled: Evaluated) -> LogitGaussian:
        """Where the kernel is known, on the CPU."""
        rows = torch.arange(len(self.labels))[self.held]
        return labelled.evaluation.prior.rows(rows).to("cpu")

    def judge(self, labelled: Evaluated, ood: Evaluated) -> dict[str, float]:
        """All figures of one method."""
        return {
            **fidelity(self.kernel, self.prior(labelled)),
            **performance(labelled, self.labels, ood, self.parts),
        }


def prepare(settings: Settings, seed: int) -> Study:
    """Load or train the classifier; compute the exact kernel."""
    digits = settings.dataset == "digits"
    task = load_task(
        settings.dataset, settings.root, seed if digits else 0, num_test=settings.num_test
    )
    if digits:
        model = train_classifier(DigitsNet(task.num_classes), task.train, seed)
    else:
        model = load_model(settings.arch, checkpoint_path(settings.arch, data_root(settings.root)))
    linearized = Linearized(model.to(settings.device))
    # Shuffled by seed: a subset of a large training set should not depend on its order.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(task.train), generator=generator)
    loader = DataLoader(task.train, batch_size=100, shuffle=True, generator=generator)
    both = zip(task.val.tensors, task.test.tensors, strict=True)
    images, labels = (torch.cat(pair) for pair in both)
    some = order[: settings.num_sources]
    images_of_train, labels_of_train = task.train.tensors
    held = task.test.tensors[0][: settings.held_out].to(settings.device)
    return Study(
        task=task,
        linearized=linearized,
        loader=loader,
        images=images,
        labels=labels,
        parts=splits(len(labels), len(task.val), 1 if digits else 5),
        ood=next(iter(task.ood.values()))[: settings.num_ood],
        sources=(images_of_train[some], labels_of_train[some]),
        kernel=ExactKernel.of(linearized, held),
    )


@dataclass(frozen=True)
class Variant:
    """A network and what it reads.

    Attributes:
        method: Settings of the networks.
        choose: Selects or changes taps.
    """

    method: NeuralEF
    choose: Callable[[Tap], Tap | None] = lambda tap: tap


def variants(settings: Settings) -> dict[str, Variant]:
    """What is compared; the default first."""
    digits = settings.dataset == "digits"
    width, short = 256, 500 if digits else 1000
    long = Training(weight_decay=0.3)
    refine = Training(steps=short, learning_rate=3e-4)
    if settings.smoke:
        width, long = 16, Training(steps=20, batch_size=32)
        refine = long
    base = NeuralEF(settings.rank, num_inputs=settings.num_inputs, width=width, teacher=long)
    k = f"k = {settings.rank}"
    found = {
        f"teacher, {k}": Variant(base),
        f"teacher, {k}, factor": Variant(replace(base, residual="factor")),
        f"teacher, {k}, no residual": Variant(replace(base, residual="none")),
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
        if rank != settings.rank and (rank <= 64 or not digits):
            other = replace(base, rank=rank)
            found[f"teacher, k = {rank}"] = Variant(other)
            found[f"teacher, k = {rank}, factor"] = Variant(replace(other, residual="factor"))
    if settings.smoke:
        found = {name: found[name] for name in list(found)[:4]}
    wanted = settings.only.split("|") if settings.only else [""]
    return {name: each for name, each in found.items() if any(part in name for part in wanted)}


def retapped(
    sample: KernelSample, linearized: Linearized, choose: Callable[[Tap], Tap | None]
) -> KernelSample:
    """The same sample with other features."""
    chosen = [new for tap in sample.taps.taps if (new := choose(tap)) is not None]
    if chosen == sample.taps.taps:
        return sample
    taps = FeatureTaps(linearized.network, chosen)
    activations = torch.cat([taps(part)[1] for part in sample.inputs.chunks(250)])
    return replace(sample, taps=taps, activations=activations)


Rows = Iterator[dict[str, Any]]


@dataclass
class Output:
    """What the figures and the second table are made of.

    Attributes:
        priors: By method, where the kernel is known.
        shifts: Rows of the first network on corrupted images.
        exactly: Rows of exact products on corrupted images.
    """

    priors: dict[str, LogitGaussian] = field(default_factory=dict)
    shifts: list[dict[str, Any]] = field(default_factory=list)
    exactly: list[dict[str, Any]] = field(default_factory=list)


def exact_rows(study: Study, settings: Settings, seed: int, output: Output) -> Rows:
    """Temperature scaling, and ELLA with exact Jacobian products."""
    method = Nystrom(settings.rank, 2000, residual="exact")
    fitted, fit_seconds = timed(
        lambda: method.fit(study.linearized, study.loader, seed=seed, progress=False)
    )
    whole = Remembered(fitted)
    labelled, ood = study.evaluate(study.fit(whole))
    output.priors["exact products"] = study.prior(labelled)
    logits = [known.evaluation.logits.cpu() for known in (labelled, ood)]
    yield {
        "method": "temperature scaling",
        **temperature_scaling(logits[0], study.labels, logits[1], study.parts),
    }
    for rank in sorted({min(20, settings.rank), settings.rank}):
        for residual, title in (("none", "no residual"), ("diag", "diagonal"), ("exact", "full")):
            ella = study.fit(Reduced(whole, rank, residual))
            name = f"exact products, k = {rank}, {title}"
            figures = study.judge(*study.evaluate(ella))
            yield {"method": name, "fit_seconds": fit_seconds, **figures}
    # The last one is the most exact.
    output.exactly += shift_rows(study, ella, name, settings.num_shift)


def network_rows(study: Study, settings: Settings, seed: int, output: Output) -> Rows:
    """Every network, all from one sample."""
    progress = not settings.smoke
    chosen = variants(settings)
    # Directions for the highest rank, all of which one sample then serves.
    if not chosen:
        return
    widest = max((each.method for each in chosen.values()), key=lambda method: method.rank)
    widest = replace(widest, num_directions=20 if settings.smoke else 256)
    sample, sample_seconds = timed(
        lambda: widest.sample(study.linearized, study.loader, seed=seed, progress=progress)
    )
    for name, each in chosen.items():
        data = retapped(sample, study.linearized, each.choose)
        fitted, seconds = timed(
            lambda each=each, data=data: each.method.learn(data, seed=seed, progress=progress)
        )
        ella = study.fit(fitted)
        labelled, ood = study.evaluate(ella)
        if len(output.priors) < 2:
            output.shifts += shift_rows(study, ella, name)
        if len(output.priors) < 3:
            output.priors[name] = study.prior(labelled)
        yield {
            "method": name,
            "fit_seconds": sample_seconds + seconds,
            "learn_seconds": seconds,
            **study.judge(labelled, ood),
        }


def shift_rows(study: Study, ella: ELLA, name: str, count: int = 2000) -> Rows:
    """NLL and variance on corrupted test images, of ELLA and of temperature scaling."""
    split = study.parts[0]  # the only one whose test images are those of the task, in order
    labelled, _ = study.evaluate(ella)
    tuned = labelled.copied().calibrate([(split.val, study.labels[split.val])], n_samples=DRAWS)
    scaling = scaled(labelled.evaluation.logits.cpu(), study.labels, split)
    labels = study.task.test.tensors[1][:count]
    few = min(100, count)
    device = study.linearized.device
    for kind in SHIFTS:
        for severity in range(1, 6):
            images = study.task.corrupted_test(kind, severity).tensors[0][:count]
            at = ella.evaluated(batches_of(images)).copied(tuned)
            probs = at.predict_proba([torch.arange(len(at))])
            plain = scaling.predict_proba(at.evaluation.logits.cpu())
            variances = at.evaluation.prior.variance().sum(1)
            exact = study.linearized.kernel_diagonal(images[:few].to(device)).sum(1).mean().item()
            yield {
                "method": name,
                "corruption": kind,
                "severity": severity,
                "nll": negative_log_likelihood(probs, labels),
                "nll_scaling": negative_log_likelihood(plain, labels),
                "ece": expected_calibration_error(probs, labels),
                "ece_scaling": expected_calibration_error(plain, labels),
                "variance": variances.mean().item(),
                f"variance_{severity}": variances[:few].mean().item(),
                f"exact_variance_{severity}": exact,
            }


def main(argv: list[str] | None = None) -> None:
    """Run and write everything."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv).filled()
    if settings.dataset == "digits":
        torch.set_num_threads(1)  # the network is too small for threads to pay
    rows: list[dict[str, Any]] = []
    output = Output()
    name = settings.dataset if settings.dataset == "digits" else settings.arch
    stem = settings.out / f"eigenfunctions-{name}"
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        study = prepare(settings, seed)
        output.priors.clear()
        for make in (exact_rows, network_rows):
            for row in make(study, settings, seed, output):
                rows.append({"seed": seed, **row})
                print(row, flush=True)
                save_results(stem.with_suffix(".json"), recorded(settings), rows)
        save_results(settings.out / f"shift-exact-{name}.json", recorded(settings), output.exactly)
        save_results(settings.out / f"shift-{name}.json", recorded(settings), output.shifts)
        plot_fidelity(study.kernel, output.priors, stem.with_suffix(".png"))  # the last seed
    text = markdown_table(rows, FIDELITY_COLUMNS) + "\n"
    for part in (output.shifts, output.exactly):
        text += "\n" + markdown_table(part, SHIFT_COLUMNS, by="corruption") + "\n"
    stem.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
