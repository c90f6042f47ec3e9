"""Put the tables of the result files into the pages: no number there is typed by hand.

    python experiments/tables.py           # rewrite the pages
    python experiments/tables.py --check   # fail if they are out of date

A block `<!-- table:NAME -->` ... `<!-- /table -->` gets the table of
`experiments/results/NAME.json` and a line that says what was run, and where. The block `spectral`
gets a line for each result file of `experiments/spectral/results`. A name FOLDER/KEY is a table of
the CIFAR-10 study in that folder, whose figures are drawn anew, too.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _distance_tables import TABLES as DISTANCE_TABLES
from _front import front
from _regression import toy_table, uci_table
from _report import (
    COLUMNS,
    COST_COLUMNS,
    DENSE_COLUMNS,
    FIDELITY_COLUMNS,
    SHIFT_COLUMNS,
    TEXT_KERNEL_COLUMNS,
    load_results,
    markdown_table,
    pipes,
)
from _study import TABLES, Study, draw
from export import export_table
from imagenet import imagenet_table
from latency import latency_table
from models import large_table, model_table
from scaling import scaling_table
from signals import signals_table
from small_validation import table as small_validation_table

FIGURE_METHODS = (
    "MAP",
    "temperature scaling",
    "last-layer Laplace, Kronecker",
    "ELLA, NeuralEF",
    "ELLA, NeuralEF, factor",
)
WIDE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "uci": uci_table,
    "toy": toy_table,
    "small-validation": small_validation_table,
    "export": export_table,
    "imagenet": imagenet_table,
    "latency": latency_table,
    "mnist1d": signals_table,
    "models": model_table,
    "models-large": large_table,
    "scaling": scaling_table,
}
"""Tables that are not one row for each method."""
STUDY = {**TABLES, "front": front}
"""Those of the CIFAR-10 study."""
EXPERIMENTS = Path(__file__).parent
SPECTRAL = EXPERIMENTS / "spectral"
PAGES = (
    EXPERIMENTS.parent / "README.md",
    EXPERIMENTS.parent / "docs" / "choosing.md",
    *sorted(page for page in EXPERIMENTS.glob("*.md") if page.name != "README.md"),
    SPECTRAL / "README.md",
)
"""The main README, one of the documentation, one for each study; their index has no tables."""
BLOCK = re.compile(r"(<!-- table:([\w/-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def spectral_table() -> str:
    """One line for each spectral experiment that is complete, from its headline."""
    titles = ("question", "command", "figure", "ours", "peer", "truth", "better", "goal")
    titles += ("reached", "CPU s", "seeds")
    lines = [titles, ("---",) * len(titles)]
    for path in sorted((SPECTRAL / "results").glob("*.json")):
        results = load_results(path)
        head, seeds = results["settings"]["headline"], {row["seed"] for row in results["rows"]}
        if head is None:  # a run that was interrupted
            continue
        first = f" --first-seed {min(seeds)}" if min(seeds) else ""
        cells = (
            head["question"],
            f"[{path.stem}.py]({path.stem}.py) `--seeds {len(seeds)}{first}`",
            head["metric"],
            f"{head['ours']:.3g}",
            f"{head['peer']}: {head['theirs']:.3g}",
            "–" if head["truth"] is None else f"{head['truth']:.3g}",
            _better(head),
            head["goal"],
            {True: "yes", False: "**no**", None: "–"}[head["reached"]],
            f"{head['seconds']:.0f}",
            str(len(seeds)),
        )
        lines.append(cells)
    return pipes(lines) + "\n"


def _better(head: Mapping[str, Any]) -> str:
    """Who is nearer to the truth or, of a score without one, who has more; in three digits."""
    ours, theirs = (float(f"{head[key]:.3g}") for key in ("ours", "theirs"))
    if ours == theirs:
        return "tie"
    if head["truth"] is None:
        return "ours" if ours > theirs else "**peer**"
    ours, theirs = (abs(value - head["truth"]) for value in (ours, theirs))
    return "ours" if ours < theirs else "**peer**"


def table(name: str) -> str:
    """The table of one result file and the line below it."""
    if name == "spectral":
        return spectral_table()
    if "/" in name:
        folder, key = name.split("/")
        study = Study(EXPERIMENTS / "results" / folder)
        if folder == "distance":
            return f"{DISTANCE_TABLES[key](study)}\n\n{study.machine()}\n"
        return f"{STUDY[key](study)}\n\n{study.line()}\n"
    results = load_results(EXPERIMENTS / "results" / f"{name}.json")
    machine = results["environment"]
    where = machine["gpu"] or f"{machine['cpus']} CPU cores, {machine['threads']} thread(s)"
    if name in WIDE:
        return f"{WIDE[name](results)}\n\nTorch {machine['torch']}; {where}.\n"
    columns, by = COLUMNS, "method"
    if name.startswith("eigenfunctions"):
        columns = FIDELITY_COLUMNS
    elif name.startswith("shift"):
        columns, by = SHIFT_COLUMNS, "corruption"
    elif name.startswith("cost"):
        columns = COST_COLUMNS
    elif name.startswith("dense"):
        columns = DENSE_COLUMNS
    elif name == "text-kernel":
        columns = TEXT_KERNEL_COLUMNS
    rows = results["rows"]
    seeds = sorted({row["seed"] for row in rows if "seed" in row})
    drawn = "one seed" if len(seeds) < 2 else f"seeds {seeds[0]} to {seeds[-1]}"
    what = "Mean ± standard deviation; " if len(seeds) > 1 else ""
    ran = f"{what}{drawn}; torch {machine['torch']}; {where}"
    return f"{markdown_table(rows, columns, by)}\n\n{ran[0].upper()}{ran[1:]}.\n"


def fill(text: str) -> str:
    """A page with all its tables made anew."""
    return BLOCK.sub(lambda match: match[1] + table(match[2]) + match[3], text)


def main(argv: list[str] | None = None) -> None:
    """Rewrite, or check, all pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    for page in PAGES:
        old = page.read_text()
        new = fill(old)
        if args.check and new != old:
            sys.exit(f"{page.name} is out of date: run python experiments/tables.py")
        page.write_text(new)
    if not args.check:
        draw(Study(EXPERIMENTS / "results" / "cifar10"), FIGURE_METHODS)


if __name__ == "__main__":
    main()
