"""How good are learned eigenfunctions of the NTK on held-out inputs, against exact ones?

    python experiments/eigenfunctions.py
    python experiments/eigenfunctions.py --dataset cifar10 --root $ELLA_DATA --rank 64

On held-out inputs the exact kernel matrix κ (all outputs) is compared with φφᵀ:

- energy: share of the trace of κ within the span of φ, relative to the best span of that rank;
- kernel error: ‖κ − φφᵀ‖ / ‖κ‖ in Frobenius norm over all pairs of inputs;
- block error: the same for the c×c blocks κ(x, x) with R added, averaged over inputs;
- log trace r: correlation of log tr(φφᵀ + R) with log tr κ(x, x).
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _data import DATASETS, load_task
from _models import DigitsNet, checkpoint_path, load_model, train_classifier
from _report import FIDELITY_COLUMNS, markdown_table, save_results, timed
from torch import Tensor
from torch.utils.data import DataLoader

from ella import NestedLoRA, NeuralEF, NeuralEFObjective, Nystrom, Training
from ella.eigenfunctions import EigenfunctionMethod, Features
from ella.linearize import Linearized


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=[d for d in DATASETS if "mnist" not in d])
    parser.add_argument("--root", help="folder of the data (default: $ELLA_DATA)")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--rank", type=int, default=20)
    parser.add_argument("--num-inputs", type=int, default=None, help="inputs to learn from")
    parser.add_argument("--held-out", type=int, default=300, help="inputs to measure on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=10)
    parser.add_argument("--only", help="run the methods whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: no real result")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.set_defaults(dataset="digits")
    return parser.parse_args(argv)


def methods(args: argparse.Namespace) -> dict[str, EigenfunctionMethod]:
    """What is compared: both objectives, the teacher, and exact products."""
    digits = args.dataset == "digits"
    size: dict[str, Any] = {
        "rank": args.rank,
        "num_inputs": args.num_inputs or (3000 if digits else 4000),
        "num_directions": 128 if digits else 256,
        "width": 256 if digits else 512,
    }
    long, short = Training(weight_decay=0.3), Training(steps=500, learning_rate=3e-4)
    if args.smoke:
        size |= {"rank": 4, "num_inputs": 100, "num_directions": 20, "width": 16}
        long = short = Training(steps=20, batch_size=32)
    objectives = {"NestedLoRA": NestedLoRA(), "NeuralEF objective": NeuralEFObjective()}
    found: dict[str, EigenfunctionMethod] = {
        "Nyström, exact products": Nystrom(size["rank"], 2000),
        "network: teacher": NeuralEF(teacher=long, **size),
    }
    for name, objective in objectives.items():
        found[f"network: {name}"] = NeuralEF(
            objective=objective, teacher=None, training=long, **size
        )
        found[f"network: teacher, then {name}"] = NeuralEF(
            objective=objective, teacher=long, training=short, **size
        )
    return {name: method for name, method in found.items() if (args.only or "") in name}


def exact_kernel(linearized: Linearized, x: Tensor) -> Tensor:
    """κ at all pairs, shape (n·c, n·c), float64; Jacobians of two parts at a time in memory."""
    parts = list(linearized.jacobian_chunks(x))
    rows = torch.cat([jacobian.flatten(0, 1) for _, jacobian in parts])
    return (rows @ rows.T).double()


def fidelity(kernel: Tensor, features: Features) -> dict[str, float]:
    """The four figures; see the module."""
    n, c, k = features.phi.shape
    phi = features.phi.double().flatten(0, 1)
    basis = torch.linalg.qr(phi).Q
    best = torch.linalg.eigvalsh(kernel)[-k:].sum()
    exact = kernel.view(n, c, n, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    blocks = (features.phi @ features.phi.mT).double()
    if features.residual is not None:
        blocks = blocks + torch.diag_embed(features.residual.double())
    errors = (blocks - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    traces = torch.stack([b.diagonal(dim1=1, dim2=2).sum(-1).log() for b in (blocks, exact)])
    return {
        "energy": (((kernel @ basis) * basis).sum() / best).item(),
        "kernel_error": ((kernel - phi @ phi.T).norm() / kernel.norm()).item(),
        "block_error": errors.mean().item(),
        "log_trace": torch.corrcoef(traces)[0, 1].item(),
    }


def main(argv: list[str] | None = None) -> None:
    """Run and write everything."""
    args = arguments(argv)
    if args.dataset == "digits":
        torch.set_num_threads(1)  # the network is too small for threads to pay
    rows: list[dict[str, Any]] = []
    stem = args.out / f"eigenfunctions-{args.dataset}"
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        task = load_task(args.dataset, args.root, seed)
        if args.dataset == "digits":
            model = train_classifier(DigitsNet(task.num_classes), task.train, seed)
        else:
            model = load_model(args.arch, checkpoint_path(args.arch, args.root))
        linearized = Linearized(model)
        held = task.test.tensors[0][: 40 if args.smoke else args.held_out]
        kernel = exact_kernel(linearized, held)
        # Shuffled by seed: a subset of a large training set should not depend on its order.
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(task.train, batch_size=100, shuffle=True, generator=generator)
        for name, method in methods(args).items():
            options: dict[str, Any] = {"residual": "diag", "seed": seed}
            fit = partial(method.fit, linearized, loader, **options, progress=not args.smoke)
            fitted, fit_seconds = timed(fit)
            figures = fidelity(kernel, fitted(held))
            rows.append({"method": name, "seed": seed, "fit_seconds": fit_seconds, **figures})
            save_results(stem.with_suffix(".json"), vars(args), rows)
        print(markdown_table(rows, FIDELITY_COLUMNS), flush=True)
    stem.with_suffix(".md").write_text(markdown_table(rows, FIDELITY_COLUMNS) + "\n")


if __name__ == "__main__":
    main()
