"""Does ELLA help where there is something to know? MNIST-1D, as in `python -m ella demo`.

    python experiments/signals.py --out experiments/results

The demonstration with several seeds, of data, training and all else; 10,000 test signals each.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from _report import Column, earlier_rows, markdown_table, pipes, save_results
from _settings import Common, option, parsed, recorded

from ella import Distance
from ella.demo import SHIFTS, Demonstration
from ella.report import Bootstrap, Report, evaluate, standard_methods, timed

COLUMNS = (
    Column("accuracy", "accuracy", ".4f", spread=False),
    Column("nll", "NLL", ".4f", "min"),
    Column("ece", "ECE", ".4f", "min"),
    Column("aurc", "AURC", ".5f", "min"),
    Column("coverage", "coverage at 1 % error", ".3f", "max"),
    Column("auroc shuffled signals", "AUROC, shuffled", ".3f", "max"),
    Column("auroc white noise", "AUROC, white noise", ".3f", "max"),
    *(Column(f"nll {name}", f"NLL, {name}", ".3f", "min", spread=False) for name in SHIFTS),
    Column("predict_ratio", "predict × forward", ".1f", spread=False),
    Column("state_bytes", "state bytes", ",.0f", spread=False),
)
JUDGED = ("MAP", "ELLA", "ELLA with distance")


@dataclass(frozen=True)
class Settings(Common):
    """What the script can be asked for.

    Attributes:
        seeds: How many.
        first_seed: The first of them; sizes were chosen on seed 0.
        threads: CPU threads.
    """

    seeds: int = option(3, "how many")
    first_seed: int = option(10, "the first of them")
    threads: int = option(1, "CPU threads")


def rows_of(seed: int, settings: Settings) -> Iterator[dict[str, Any]]:
    """A row for each method."""
    scale = 0.02 if settings.smoke else 1.0
    found, made = timed(lambda: Demonstration.made(seed, scale))
    methods, fitted = timed(
        lambda: standard_methods(
            found.model,
            found.train,
            found.val,
            eigenfunctions=Demonstration.eigenfunctions(scale),
            distance=Distance(),
            seed=seed,
            progress=False,
        )
    )
    bootstrap = Bootstrap(10 if settings.smoke else 1000, seed=seed)
    common: dict[str, Any] = {"ood": found.ood, "shift": found.shift, "progress": False}
    report = evaluate(methods, found.test, bootstrap=bootstrap, **common)
    for row in report.rows:
        values = {key: interval.estimate for key, interval in row.metrics.items()}
        yield {
            "method": row.method,
            "seed": seed,
            **values,
            **differences(report, row.method),
            "predict_ratio": row.predict_ratio,
            "state_bytes": row.state_bytes,
            "made_seconds": made,
            "fit_seconds": fitted,
        }


def differences(report: Report, method: str) -> dict[str, float]:
    """NLL less that of temperature scaling, with its paired interval."""
    found = report.rows[report.column(method)].differences
    if not found:
        return {}
    nll = found["nll"]
    return {"difference": nll.estimate, "low": nll.low, "high": nll.high}


def signals_table(results: Mapping[str, Any]) -> str:
    """Means over seeds, and the paired difference of NLL for each seed."""
    rows = results["rows"]
    seeds = sorted({row["seed"] for row in rows})
    found = {(row["method"], row["seed"]): row for row in rows}
    lines = [["NLL less that of temperature scaling", *(f"seed {seed}" for seed in seeds)]]
    lines.append(["---", *("---:" for _ in seeds)])
    for method in JUDGED:
        each = [found[method, seed] for seed in seeds]
        lines.append(
            [
                method,
                *(f"{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}]" for r in each),
            ]
        )
    spread = f"Mean ± standard deviation over seeds {seeds[0]} to {seeds[-1]}; below, intervals of"
    return (
        f"{markdown_table(rows, COLUMNS)}\n\n{spread} 95 % over 1,000 paired bootstrap samples of "
        f"10,000 test signals.\n\n{pipes(lines)}"
    )


def main(argv: list[str] | None = None) -> None:
    """Run the seeds that are missing, writing after each."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(settings.threads)
    path = settings.out / "mnist1d.json"
    kept = recorded(settings, "root", "out", "seeds")
    rows = earlier_rows(path, kept, ("smoke",))
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        if seed not in {row["seed"] for row in rows}:
            rows += rows_of(seed, settings)
            save_results(path, kept, rows)
    print(signals_table({"rows": rows}))


if __name__ == "__main__":
    main()
