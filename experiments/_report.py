"""How the experiments report: environment, timing, result files, tables and plots."""

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ella.report import timed, uncertainty_histograms

Row = Mapping[str, Any]
T = TypeVar("T")

IN_COLOR = "#4477AA"
OUT_COLOR = "#EE6677"


@dataclass(frozen=True)
class Summary:
    """One metric of one method over seeds.

    Attributes:
        mean: Mean.
        std: Sample standard deviation; None from a single run.
        count: Number of runs.
    """

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: The entry of a row that it shows.
        title: Its heading.
        format: How a number is written, e.g. ".3f".
        best: "min" or "max" to set the best mean in bold, else None.
        spread: Whether to write ± the standard deviation.
    """

    key: str
    title: str
    format: str
    best: str | None = None
    spread: bool = True


COLUMNS = (
    Column("accuracy", "accuracy", ".3f"),
    Column("nll", "NLL", ".4f", "min"),
    Column("brier", "Brier", ".4f"),
    Column("ece", "ECE", ".4f", "min"),
    Column("ece_floor", "ECE if calibrated", ".4f", spread=False),
    Column("ace", "ACE", ".4f"),
    Column("auroc", "OOD AUROC", ".3f", "max"),
    Column("fit_seconds", "fit s", ".1f", spread=False),
    Column("predict_ratio", "predict × MAP", ".2f", spread=False),
    Column("state_bytes", "state bytes", ",.0f", spread=False),
)
DENSE_COLUMNS = (
    *COLUMNS[:4],
    Column("wrong", "wrong AUROC", ".3f", "max"),
    Column("outside", "outside AUROC", ".3f", "max"),
    *COLUMNS[-3:],
)
TEXT_KERNEL_COLUMNS = (
    Column("tokens", "tokens", ".1f"),
    Column("trace", "tr κ(x, x)", ",.0f"),
)
FIDELITY_COLUMNS = (
    Column("energy", "energy", ".3f", "max"),
    Column("kernel_error", "kernel error", ".3f", "min"),
    Column("block_error", "block error", ".3f", "min"),
    Column("log_trace", "log trace r", ".3f", "max"),
    Column("nll", "NLL", ".4f", "min"),
    Column("ece", "ECE", ".4f", "min"),
    Column("auroc", "OOD AUROC", ".4f", "max"),
    Column("fit_seconds", "fit s", ".1f", spread=False),
)
SHIFT_COLUMNS = (
    Column("nll_scaling", "NLL, temperature scaling", ".4f", spread=False),
    Column("nll", "NLL, ELLA", ".4f", spread=False),
    Column("ece_scaling", "ECE, temperature scaling", ".4f", spread=False),
    Column("ece", "ECE, ELLA", ".4f", spread=False),
    *(
        Column(f"{kind}variance_{severity}", f"{title}, severity {severity}", ".0f", spread=False)
        for kind, title in (("", "variance"), ("exact_", "exact"))
        for severity in (1, 3, 5)
    ),
)
COST_COLUMNS = (
    Column("predict_ratio", "predict × MAP", ".2f", spread=False),
    Column("fit_seconds", "fit s", ".0f", spread=False),
    Column("fit_passes", "fit in training passes", ".1f", spread=False),
    Column("fit_gib", "fit GiB", ".2f", spread=False),
    Column("fit_memory_ratio", "fit memory × training step", ".1f", spread=False),
    Column("state_bytes", "state bytes", ",.0f", spread=False),
)


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the code's settings; JSON-ready."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def save_results(path: str | Path, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write settings, `environment()` and rows as JSON, making the folder if need be.

    Args:
        path: Where to.
        settings: What was run, such as `vars(arguments)`; paths become strings.
        rows: One mapping for each method and seed; numbers that are not finite become null.
    """
    content = {"settings": settings, "environment": environment(), "rows": list(rows)}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def load_results(path: str | Path) -> dict[str, Any]:
    """What `save_results` wrote: "settings", "environment" and "rows"."""
    return json.loads(Path(path).read_text())


def earlier_rows(
    path: Path, settings: Mapping[str, Any], compared: Iterable[str]
) -> list[dict[str, Any]]:
    """Rows of an earlier run, to go on with; none if there was none.

    Args:
        path: Its result file.
        settings: Those of this run.
        compared: The settings that must be the same for rows to stand in one file.

    Raises:
        ValueError: If one of them differs.
    """
    if not path.exists():
        return []
    results = load_results(path)
    then = results["settings"]
    changed = [name for name in compared if settings[name] != then.get(name)]
    if changed:
        raise ValueError(
            f"{path} was made with another {', '.join(changed)}. Give the same options to go on "
            f"with it, or another --out to start anew."
        )
    return results["rows"]


def summarize(rows: Sequence[Row], by: str = "method") -> dict[str, dict[str, Summary]]:
    """Mean and standard deviation over seeds of every numeric entry, for each method.

    Args:
        rows: One mapping for each method and seed, all of one data set and network.
        by: The entry that names the method.

    Returns:
        The summaries by method, in order of appearance, then by metric. Missing entries, None and
        NaN are left out; `Summary.count` tells how many runs remain.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        metrics = groups.setdefault(str(row[by]), {})
        for key, value in row.items():
            if key not in (by, "seed") and _is_number(value):
                metrics.setdefault(key, []).append(float(value))
    return {
        method: {key: _summary(values) for key, values in metrics.items()}
        for method, metrics in groups.items()
    }


def markdown_table(
    rows: Sequence[Row], columns: Sequence[Column] = COLUMNS, by: str = "method"
) -> str:
    """The rows as a Markdown table: mean ± standard deviation over seeds, the best mean in bold.

    Means that are written alike are all best. Columns that no row fills are left out; nothing is
    bold where there is only one method.

    Args:
        rows: One mapping for each method and seed, all of one data set and network.
        columns: What to show.
        by: The entry that names the method.

    Returns:
        The table, without a final line break.
    """
    summaries = summarize(rows, by)
    shown = [c for c in columns if any(c.key in metrics for metrics in summaries.values())]
    cells = [_column_cells(column, list(summaries.values())) for column in shown]
    lines = [[by, *(column.title for column in shown)], ["---", *("---:" for _ in shown)]]
    lines += [[method, *row] for method, *row in zip(summaries, *cells, strict=True)]
    return pipes(lines)


def pipes(lines: Iterable[Sequence[str]]) -> str:
    """Cells as a Markdown table, without a final line break."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cpu_timed(function: Callable[[], T]) -> tuple[T, float]:
    """A result and its CPU seconds, which a busy machine does not change much."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def seconds(
    function: Callable[[], object],
    device: torch.device | str | None = None,
    repeats: int = 5,
    warmup: int = 1,
) -> float:
    """Median seconds of a call, as for a prediction.

    Args:
        function: What to call.
        device: As for `timed`.
        repeats: Timed calls.
        warmup: Calls before those, not timed.

    Returns:
        The median of the timed calls.
    """
    for _ in range(warmup):
        function()
    return statistics.median(timed(function, device)[1] for _ in range(repeats))


class PeakMemory:
    """The most memory held inside a `with` block above what was held when it began.

    On a CUDA device the allocator counts it. On the CPU of a Linux system a thread reads the
    process's resident memory every 5 ms; elsewhere the result is NaN.

    Args:
        device: Whose memory.
    """

    STATM = Path("/proc/self/statm")

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.bytes = math.nan

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        elif self.STATM.exists():
            self._start = self._peak = self._resident()
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        elif self.STATM.exists():
            self._done.set()
            self._thread.join()
            self.bytes = self._peak - self._start

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, self._resident())

    def _resident(self) -> int:
        return int(self.STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to nobody's pyplot state: nothing global to set or to close."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_uncertainty(
    scores_in: Mapping[str, Tensor],
    scores_out: Mapping[str, Tensor],
    path: str | Path,
    *,
    xlabel: str = "predictive entropy (nats)",
    bins: int = 30,
) -> None:
    """Histograms of an uncertainty score in and out of distribution, one panel a method.

    Args:
        scores_in: Scores of test inputs, shape (n,), by method.
        scores_out: Scores of out-of-distribution inputs, by the same methods.
        path: Where to write; the suffix decides the format.
        xlabel: Name of the score.
        bins: Number of bins, the same in all panels.

    Raises:
        ValueError: If the methods differ or there are none.
    """
    if not scores_in or scores_in.keys() != scores_out.keys():
        raise ValueError(
            "`scores_in` and `scores_out` must hold the same methods, at least one; got "
            f"{list(scores_in)} and {list(scores_out)}."
        )
    scores = {
        method: {"in distribution": inside, "out of distribution": scores_out[method]}
        for method, inside in scores_in.items()
    }
    figure = uncertainty_histograms(scores, xlabel=xlabel, bins=bins)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=200)


def _column_cells(column: Column, metrics: Sequence[Mapping[str, Summary]]) -> list[str]:
    found = [each.get(column.key) for each in metrics]
    means = [summary.mean for summary in found if summary is not None]
    best = None
    if column.best is not None and len(found) > 1:
        best = f"{(min if column.best == 'min' else max)(means):{column.format}}"
    return [_cell(column, summary, best) for summary in found]


def _cell(column: Column, summary: Summary | None, best: str | None) -> str:
    if summary is None:
        return "–"
    mean = f"{summary.mean:{column.format}}"
    bold = f"**{mean}**" if mean == best else mean
    if not column.spread or summary.std is None:
        return bold
    return f"{bold} ± {summary.std:{column.format}}"


def _summary(values: Sequence[float]) -> Summary:
    std = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), std, len(values))


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return not math.isnan(value)


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON-like value
    """`value` in types that JSON knows."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, (bool, int, str)) or value is None else str(value)


def _git(*arguments: str) -> str | None:
    """What git prints about this checkout; None without git or outside a checkout."""
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
