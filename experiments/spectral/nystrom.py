"""How near do Nyström eigenfunctions come to the true ones, with how many landmarks?

    python experiments/spectral/nystrom.py

The RBF kernel with length scale 1 on N(0, I) in the plane, whose eigenpairs are known in closed
form (`_truths.gaussian_rbf`). The ten leading ones are four whole levels, so that their span is
unique. Eigenvalues are compared one by one, spans by the largest principal angle in L²(p).
scikit-learn's `Nystroem` gives features of the same approximation, whose principal axes are the
same eigenfunctions: the rows show that ours agrees with it, and what either costs.

Reference: Using the Nyström Method to Speed Up Kernel Machines (Williams & Seeger, 2000).
"""

from functools import partial
from typing import Any

import torch
from _common import Headline, SpectralSettings, asked, cpu_timed, finish, mean_of, new_figure
from _truths import Truth, gaussian_rbf
from matplotlib.figure import Figure
from torch import Tensor

from ella.spectral import NystromBasis

RANK = 10


def ours(truth: Truth, landmarks: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, and eigenfunctions at the points of the truth."""
    basis = NystromBasis.of(truth.kernel, landmarks, RANK)
    return basis.eigenvalues, basis(truth.points)[:, 0]


def scikit(truth: Truth, landmarks: Tensor) -> tuple[Tensor, Tensor]:
    """The same from scikit-learn's features Z(x), by the principal axes of Z at the landmarks."""
    from sklearn.kernel_approximation import Nystroem

    found = Nystroem(kernel="rbf", gamma=0.5, n_components=len(landmarks), random_state=0)
    at = torch.from_numpy(found.fit_transform(landmarks.numpy()))
    values, axes = torch.linalg.eigh(at.T @ at / len(at))
    values, axes = values.flip(0)[:RANK], axes.flip(1)[:, :RANK]
    return values, torch.from_numpy(found.transform(truth.points.numpy())) @ axes / values.sqrt()


def main(argv: list[str] | None = None) -> None:
    """Run and write everything."""
    settings = asked(SpectralSettings, __doc__.splitlines()[0], argv)
    truth = gaussian_rbf(RANK)
    rows: list[dict[str, Any]] = []
    largest = 256 if settings.smoke else 2048
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        generator = torch.Generator().manual_seed(seed)
        everything = torch.randn(largest, 2, generator=generator, dtype=torch.float64)
        for count in (largest // 16, largest // 4, largest):
            for name, method in (("Nyström", ours), ("scikit-learn Nystroem", scikit)):
                run = partial(method, truth, everything[:count])
                (values, functions), seconds = cpu_timed(run)
                errors = truth.eigenvalue_errors(values)
                rows.append(
                    {
                        "method": f"{name}, {count} landmarks",
                        "seed": seed,
                        "eigenvalue_error": errors.mean().item(),
                        "worst_eigenvalue_error": errors.max().item(),
                        "angle": truth.angle(functions),
                        "seconds": seconds,
                    }
                )
    first, second = (
        f"{name}, {largest} landmarks" for name in ("Nyström", "scikit-learn Nystroem")
    )
    error, angle = (mean_of(rows, first, key) for key in ("eigenvalue_error", "angle"))
    headline = Headline(
        question="How exact are classical Nyström eigenfunctions?",
        metric=f"largest angle of ten functions, degrees ({largest} landmarks)",
        ours=angle,
        peer="scikit-learn Nystroem",
        theirs=mean_of(rows, second, "angle"),
        truth=0.0,
        goal="angle < 5°, mean eigenvalue error < 5 %",
        reached=angle < 5 and error < 0.05,
        seconds=mean_of(rows, first, "seconds"),
    )
    finish("nystrom", settings, rows, headline, figure(truth, everything))


def figure(truth: Truth, landmarks: Tensor) -> Figure:
    """The first functions on the plane, and eigenvalues with more and more landmarks."""
    axis = torch.linspace(-3, 3, 60, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    basis = NystromBasis.of(truth.kernel, landmarks, RANK)
    values = basis(grid)[:, 0].view(60, 60, RANK)
    drawn = new_figure(11, 2.6)
    panels = drawn.subplots(1, 5)
    panels[0].semilogy(range(1, RANK + 1), truth.eigenvalues, "k_", markersize=12, label="exact")
    for count, marker in ((len(landmarks) // 16, "x"), (len(landmarks), "o")):
        few = NystromBasis.of(truth.kernel, landmarks[:count], RANK).eigenvalues
        panels[0].semilogy(
            range(1, RANK + 1), few, marker, fillstyle="none", label=f"{count} landmarks"
        )
    panels[0].set(xlabel="index", ylabel="eigenvalue")
    panels[0].legend(frameon=False, fontsize=7)
    for j, panel in enumerate(panels[1:]):
        limit = values[..., j].abs().max().item()
        panel.imshow(
            values[..., j].T,
            origin="lower",
            cmap="PuOr",
            vmin=-limit,
            vmax=limit,
            extent=(-3, 3) * 2,
        )
        panel.set_title(f"function {j + 1}", fontsize=9)
    return drawn


if __name__ == "__main__":
    main()
