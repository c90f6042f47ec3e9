"""Tables and figures of the CIFAR-10 study, from the result files of `_suite.py`.

A table has the name of the folder of its results, a slash, and a key of `TABLES`.
"""

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _models import RESNET_DEPTHS
from _report import Row, load_results, new_figure, pipes
from matplotlib.axes import Axes

NETWORKS = {f"resnet{depth}": f"ResNet-{depth}" for depth in RESNET_DEPTHS}
ENSEMBLE = "ensemble"
NUM_TEST = 10_000
"""Test images of CIFAR-10."""
SCALING, OURS = "temperature scaling", ("ELLA, NeuralEF", "ELLA, NeuralEF, factor")
PAPER = "ELLA, Nyström k = 20, as in the paper"

# NLL and ECE on ResNet-20, 32, 44 and 56, as published for these very checkpoints. The first two
# from Deng et al., Accelerated Linearized Laplace Approximation for Bayesian Deep Learning, 2022
# (https://arxiv.org/abs/2210.12642), tuned as protocol A. The goal is the best post-hoc figure of
# each column in Ortega et al., Fixed-Mean Gaussian Processes for Post-hoc Bayesian Deep Learning,
# 2024 (https://arxiv.org/abs/2412.04177): MFVI, VaLLA, FMGP; in ECE, ELLA as published, too.
PUBLISHED = {
    "published MAP": ((0.2815, 0.2921, 0.2753, 0.2523), (0.0390, 0.0408, 0.0385, 0.0374)),
    "published ELLA, k = 20": (
        (0.2331, 0.2161, 0.2022, 0.1866),
        (0.0092, 0.0082, 0.0073, 0.0065),
    ),
    "published best post-hoc (the goal)": (
        (0.2222, 0.2092, 0.1955, 0.1823),
        (0.0074, 0.0069, 0.0073, 0.0065),
    ),
}
METRICS = {
    "accuracy": ("accuracy", "{:.4f}", None),
    "nll": ("NLL", "{:.4f}", min),
    "brier": ("Brier", "{:.4f}", min),
    "ece": ("ECE", "{:.4f}", min),
    "ace": ("ACE", "{:.4f}", min),
    "classwise_ece": ("classwise ECE", "{:.5f}", min),
    "human_cross_entropy": ("human cross-entropy", "{:.4f}", min),
    "human_kl": ("human KL", "{:.4f}", min),
    "aurc": ("AURC", "{:.5f}", min),
}
SCORES = {
    "confidence_deficit": "max-softmax",
    "entropy": "entropy",
    "mutual_information": "mutual information",
    "logit_variance": "logit variance",
    "energy": "energy",
}
BASE_SCORES = ("confidence_deficit", "entropy", "energy")
"""Those that a method without a posterior has, too."""

Best = Callable[[Iterable[float]], float] | None


@dataclass(frozen=True)
class Study:
    """The result files of one run.

    Attributes:
        folder: Where they are.
    """

    folder: Path
    _read: dict[str, list[Row]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def rows(self, measure: str) -> list[Row]:
        """Of all networks, in their order; each file is read once."""
        if measure not in self._read:
            names = self._names(measure)
            self._read[measure] = [
                row for name in names for row in self._file(measure, name)["rows"]
            ]
        return self._read[measure]

    def mean(self, measure: str, key: str, **where: str | int) -> float | None:
        """Mean of an entry over the rows that have these values, and over lists in it."""
        found = [
            statistics.fmean(row[key]) if isinstance(row[key], list) else row[key]
            for row in self.rows(measure)
            if key in row and all(row.get(name) == value for name, value in where.items())
        ]
        return statistics.fmean(found) if found else None

    def networks(self, measure: str = "calibration") -> list[str]:
        """Those that have results, without the ensemble."""
        return [name for name in self._names(measure) if name != ENSEMBLE]

    def methods(self, measure: str = "calibration") -> list[str]:
        """In order of appearance, on any network."""
        return list(dict.fromkeys(row["method"] for row in self.rows(measure)))

    def settings(self) -> dict[str, Any]:
        """The command line of the first network's run."""
        return self._file("calibration", self.networks()[0])["settings"]

    def line(self) -> str:
        """What was run, and where."""
        sizes = self.settings()
        machine = self.machine()
        return (
            f"Seeds {sizes['first_seed']} to {sizes['first_seed'] + sizes['seeds'] - 1}; "
            f"{sizes['num_test']:,} test images; G from {sizes['fit_on']:,} training images "
            f"({sizes['fit_slow_on']:,} for exact products), {sizes['num_inputs']:,} images for "
            f"NeuralEF; {machine[0].lower()}{machine[1:]}"
        )

    def machine(self) -> str:
        """Where it was run."""
        machine = self._file("calibration", self.networks()[0])["environment"]
        where = machine["gpu"] or f"{machine['cpus']} CPU cores, {machine['threads']} thread(s)"
        return f"Torch {machine['torch']}; {where}."

    def _names(self, measure: str) -> list[str]:
        order = [*NETWORKS, ENSEMBLE]
        return [name for name in order if (self.folder / f"{measure}-{name}.json").exists()]

    def _file(self, measure: str, name: str) -> dict[str, Any]:
        return load_results(self.folder / f"{measure}-{name}.json")


def grid(
    corner: str,
    columns: Sequence[str],
    lines: Mapping[str, Sequence[float | None]],
    formats: Sequence[str],
    best: Sequence[Best],
    references: Collection[str] = (),
) -> str:
    """A Markdown table of numbers, the best of each column in bold; "–" where there is none.

    Args:
        corner: Heading of the first column.
        columns: The other headings.
        lines: Numbers by name.
        formats: Of each column.
        best: Chooses the best of each column; None for no choice.
        references: Names of lines that are not rivals.
    """
    out = [[corner, *columns], ["---", *["---:"] * len(columns)]]
    for name, values in lines.items():
        cells = []
        for j, value in enumerate(values):
            if value is None:
                cells.append("–")
                continue
            text = formats[j].format(value)
            choose = best[j]
            if choose is not None and name not in references:
                rivals = [line[j] for other, line in lines.items() if other not in references]
                top = choose(rival for rival in rivals if rival is not None)
                text = f"**{text}**" if text == formats[j].format(top) else text
            cells.append(text)
        out.append([name, *cells])
    return pipes(out)


def protocol(study: Study, letter: str) -> str:
    """NLL and ECE on each network; beside protocol A on all test images, the published ones."""
    names = study.networks()
    wheres = [(key, name) for key in ("nll", "ece") for name in names]
    lines: dict[str, list[float | None]] = {}
    for method in study.methods():
        where = {"method": method, "protocol": letter}
        lines[method] = [
            study.mean("calibration", key, arch=name, **where) for key, name in wheres
        ]
    rivals = set(lines)
    for title, ensemble in _ensembles(study, "calibration"):
        nll, ece = (
            study.mean("calibration", key, protocol=letter, **ensemble) for key in ("nll", "ece")
        )
        blank = [None] * (len(names) - 1)
        lines[title] = [*blank, nll, *blank, ece]
    if letter == "A" and study.settings()["num_test"] == NUM_TEST:
        order = list(NETWORKS)
        for title, both in PUBLISHED.items():
            lines[title] = [part[order.index(name)] for part in both for name in names]
    columns = [f"{title}, {NETWORKS[name]}" for title in ("NLL", "ECE") for name in names]
    count = len(columns)
    references = lines.keys() - rivals  # the ensemble costs four times as much
    return grid("method", columns, lines, ["{:.4f}"] * count, [min] * count, references)


def metrics(study: Study) -> str:
    """Every metric of protocol B, mean over the networks that every method has."""
    lines, networks = {}, study.networks()
    for method in study.methods():
        where = {"method": method, "protocol": "B"}
        per_network = [
            [study.mean("calibration", key, arch=name, **where) for name in networks]
            for key in METRICS
        ]
        if all(value is not None for value in per_network[0]):
            lines[method] = [
                statistics.fmean(v for v in values if v is not None) for values in per_network
            ]
    titles, formats, best = zip(*METRICS.values(), strict=True)
    return grid("method", titles, lines, formats, best)


def detection(study: Study) -> str:
    """AUROC of predictive entropy by source, mean over networks; the ensemble, too."""
    sources = list(dict.fromkeys(row["source"] for row in study.rows("ood")))
    lines: dict[str, list[float | None]] = {}
    for method in study.methods("ood"):
        values = [
            _over_networks(study, "ood", "auroc", method=method, source=source, score="entropy")
            for source in sources
        ]
        lines[method] = [*values, statistics.fmean(v for v in values if v is not None)]
    for title, where in _ensembles(study, "ood"):
        values = [
            study.mean("ood", "auroc", source=source, score="entropy", **where)
            for source in sources
        ]
        lines[title] = [*values, statistics.fmean(v for v in values if v is not None)]
    count = len(sources) + 1
    references = lines.keys() - set(study.methods("ood"))
    return grid("method", [*sources, "mean"], lines, ["{:.4f}"] * count, [max] * count, references)


def detection_by_score(study: Study) -> str:
    """AUROC, AUPR and FPR95 of every score, mean over sources and networks."""
    lines: dict[str, list[float | None]] = {}
    for method in study.methods("ood"):
        for score, title in SCORES.items():
            variance = study.mean("ood", "auroc", method=method, score="logit_variance")
            if score not in BASE_SCORES and variance == 0.5:
                continue
            lines[f"{method}: {title}"] = [
                _over_networks(study, "ood", key, method=method, score=score)
                for key in ("auroc", "aupr", "fpr95")
            ]
    best: list[Best] = [max, max, min]
    return grid("method: score", ["AUROC", "AUPR", "FPR95"], lines, ["{:.4f}"] * 3, best)


def shift(study: Study) -> str:
    """NLL and ECE by severity, mean over corruptions and networks."""
    lines: dict[str, list[float | None]] = {}
    for method in study.methods("shift"):
        lines[method] = [
            _over_networks(study, "shift", key, method=method, severity=severity)
            for key in ("nll", "ece")
            for severity in range(1, 6)
        ]
    for title, where in _ensembles(study, "shift"):
        lines[title] = [
            study.mean("shift", key, severity=severity, **where)
            for key in ("nll", "ece")
            for severity in range(1, 6)
        ]
    columns = [f"{title}, severity {i}" for title in ("NLL", "ECE") for i in range(1, 6)]
    references = lines.keys() - set(study.methods("shift"))
    return grid("method", columns, lines, ["{:.4f}"] * 10, [min] * 10, references)


def shift_by_corruption(study: Study) -> str:
    """NLL and ECE by corruption, mean over severities and networks: scaling against ours."""
    kinds = list(dict.fromkeys(row["corruption"] for row in study.rows("shift")))
    methods = ("MAP", SCALING, *OURS)
    lines = {
        kind: [
            _over_networks(study, "shift", key, method=method, corruption=kind)
            for key in ("nll", "ece")
            for method in methods
        ]
        for kind in kinds
    }
    columns = [f"{title}, {method}" for title in ("NLL", "ECE") for method in methods]
    return grid("corruption", columns, lines, ["{:.4f}"] * 8, [None] * 8)


def cost(study: Study) -> str:
    """CPU seconds, memory, prediction and state, on the smallest and the largest network."""
    networks = study.networks()
    ends = list(dict.fromkeys([networks[0], networks[-1]]))
    keys = {
        "fit_seconds": ("fit s", "{:,.0f}"),
        "fit_bytes": ("fit MiB", "{:,.0f}"),
        "predict_ratio": ("predict × forward pass", "{:.2f}"),
        "state_bytes": ("state bytes", "{:,.0f}"),
    }
    lines: dict[str, list[float | None]] = {}
    for method in study.methods():
        cells = []
        for name in ends:
            for key in keys:
                value = study.mean("calibration", key, arch=name, method=method)
                cells.append(value / 2**20 if key == "fit_bytes" and value else value)
        lines[method] = cells
    columns = [f"{title}, {NETWORKS[name]}" for name in ends for title, _ in keys.values()]
    formats = [form for _ in ends for _, form in keys.values()]
    return grid("method", columns, lines, formats, [None] * len(columns))


def goals(study: Study) -> str:
    """What the study had to reach, and what it did, of the better of our two methods."""
    rows = [*_calibration_goals(study), *_reproduction_goals(study)]
    rows += [*_ood_goals(study), *_shift_goals(study)]
    lines = [["goal", "wanted", "found", "reached"], ["---", "---:", "---:", "---"]]
    lines += [[*row[:3], "yes" if row[3] else "**no**"] for row in rows]
    return pipes(lines)


def _calibration_goals(study: Study) -> Iterable[tuple[str, str, str, bool]]:
    order = list(NETWORKS)
    for name in study.networks():
        i, title = order.index(name), NETWORKS[name]
        plain = {"arch": name, "protocol": "A", "method": "MAP"}
        nll = _known(study.mean("calibration", "nll", **plain))
        wanted = PUBLISHED["published MAP"][0][i]
        yield (
            f"MAP NLL as published, {title}",
            f"{wanted:.4f} ± .002",
            f"{nll:.4f}",
            abs(nll - wanted) <= 0.002,
        )
        for key, number in (("nll", 0), ("ece", 1)):
            ours = min(
                _known(study.mean("calibration", key, arch=name, protocol="A", method=method))
                for method in OURS
            )
            rival = PUBLISHED["published best post-hoc (the goal)"][number][i]
            scaled = study.mean("calibration", key, arch=name, protocol="A", method=SCALING)
            what = f"protocol A, {key.upper()}, {title}"
            yield (
                f"{what}, below the best published",
                f"{rival:.4f}",
                f"{ours:.4f}",
                ours < rival,
            )
            yield (
                f"{what}, below temperature scaling",
                f"{_known(scaled):.4f}",
                f"{ours:.4f}",
                ours < _known(scaled),
            )


def _reproduction_goals(study: Study) -> Iterable[tuple[str, str, str, bool]]:
    """The paper's ELLA, measured on the first test images in the folder `...-exact`.

    Its NLL on all test images is estimated as that on the first ones plus what temperature scaling
    has more, or less, on all than on those: the two methods' errors go together.
    """
    exact = Study(study.folder.with_name(f"{study.folder.name}-exact"))
    for name in exact.networks():
        where = {"arch": name, "protocol": "A"}
        first = exact.mean("calibration", "nll", method=PAPER, **where)
        if first is None or name not in study.networks():
            continue
        whole, part = (
            _known(each.mean("calibration", "nll", method=SCALING, **where))
            for each in (study, exact)
        )
        wanted = PUBLISHED["published ELLA, k = 20"][0][list(NETWORKS).index(name)]
        found = first + whole - part
        yield (
            f"NLL of the paper's ELLA as published, {NETWORKS[name]}",
            f"{wanted:.4f} ± .01",
            f"{found:.4f}",
            abs(found - wanted) <= 0.01,
        )


def _ood_goals(study: Study) -> Iterable[tuple[str, str, str, bool]]:
    """AUROC: the best score of each method on each source, mean over networks."""
    if not study.networks("ood"):
        return
    sources = list(dict.fromkeys(row["source"] for row in study.rows("ood")))

    def best(methods: Iterable[str], source: str) -> float:
        return max(
            _known(_over_networks(study, "ood", "auroc", method=m, source=source, score="entropy"))
            for m in methods
        )

    gains = []
    for source in sources:
        ours, theirs = best(OURS, source), best([SCALING], source)
        gains.append(ours - theirs)
        yield (
            f"AUROC (entropy), {source}, above temperature scaling",
            f"{theirs:.4f}",
            f"{ours:.4f}",
            ours > theirs,
        )
    gain = statistics.fmean(gains)
    yield "AUROC gain, mean over sources", "+.0100", f"{gain:+.4f}", gain >= 0.01


def _shift_goals(study: Study) -> Iterable[tuple[str, str, str, bool]]:
    if not study.networks("shift"):
        return
    kinds = list(dict.fromkeys(row["corruption"] for row in study.rows("shift")))
    for key in ("nll", "ece"):
        below = [
            kind
            for kind in kinds
            if min(
                _known(_over_networks(study, "shift", key, method=m, corruption=kind))
                for m in OURS
            )
            < _known(_over_networks(study, "shift", key, method=SCALING, corruption=kind))
        ]
        yield (
            f"corruptions whose mean {key.upper()} is below temperature scaling's",
            f"{len(kinds)}",
            f"{len(below)}",
            len(below) == len(kinds),
        )


def _ensembles(study: Study, measure: str) -> Iterable[tuple[str, dict[str, str]]]:
    """Names of the ensembles and where their rows are: references, at the cost of all networks."""
    if any(row["arch"] == ENSEMBLE for row in study.rows(measure)):
        yield "ensemble of the four", {"arch": ENSEMBLE, "method": "MAP"}
        yield f"ensemble of the four, {SCALING}", {"arch": ENSEMBLE, "method": SCALING}


def _over_networks(study: Study, measure: str, key: str, **where: Any) -> float | None:  # noqa: ANN401
    """Mean over the networks, the ensemble aside."""
    found = [study.mean(measure, key, arch=name, **where) for name in study.networks(measure)]
    values = [value for value in found if value is not None]
    return statistics.fmean(values) if values else None


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("The study lacks a method that this table compares. Run it first.")
    return value


TABLES: dict[str, Callable[[Study], str]] = {
    "protocol-a": lambda study: protocol(study, "A"),
    "protocol-b": lambda study: protocol(study, "B"),
    "metrics": metrics,
    "ood": detection,
    "ood-scores": detection_by_score,
    "shift": shift,
    "shift-corruptions": shift_by_corruption,
    "cost": cost,
    "goals": goals,
}


def draw(study: Study, shown: Sequence[str]) -> None:
    """`shift.png` and `risk.png` in the folder of the study, if it has results."""
    if not study.networks():
        return
    colors = {method: f"C{i}" for i, method in enumerate(shown)}
    if study.networks("shift"):
        figure = new_figure(9, 3.6)
        for panel, (key, title) in zip(
            figure.subplots(1, 2), (("nll", "NLL"), ("ece", "ECE")), strict=True
        ):
            _boxes(panel, study, key, colors)
            panel.set(xlabel="severity", ylabel=title)
        figure.axes[0].legend(
            [figure.axes[0].plot([], [], color=c, linewidth=5)[0] for c in colors.values()],
            shown,
            frameon=False,
            fontsize=7,
        )
        figure.savefig(study.folder / "shift.png", dpi=130)
    figure = new_figure(2.6 * len(study.networks()) + 1, 2.8)
    panels = figure.subplots(1, len(study.networks()), squeeze=False)[0]
    for panel, name in zip(panels, study.networks(), strict=True):
        for method, color in colors.items():
            curves = [
                row["risk"]
                for row in study.rows("calibration")
                if (row["arch"], row["method"], row["protocol"]) == (name, method, "B")
            ]
            mean = [statistics.fmean(points) for points in zip(*curves, strict=True)]
            shares = [(i + 1) / len(mean) for i in range(len(mean))]
            panel.plot(shares, mean, color=color, label=method, linewidth=1)
        panel.set(title=NETWORKS[name], xlabel="coverage", xlim=(0.5, 1))
    panels[0].set_ylabel("risk (error rate)")
    panels[0].legend(frameon=False, fontsize=6)
    figure.savefig(study.folder / "risk.png", dpi=130)


def _boxes(panel: Axes, study: Study, key: str, colors: Mapping[str, str]) -> None:
    """As the ELLA paper draws them: a box over all corruptions, for each severity and method."""
    width = 0.8 / len(colors)
    for i, (method, color) in enumerate(colors.items()):
        values = [
            [
                statistics.fmean(row[key])
                for row in study.rows("shift")
                if row["method"] == method
                and row["severity"] == severity
                and row["arch"] != ENSEMBLE
            ]
            for severity in range(1, 6)
        ]
        places = [severity + (i - (len(colors) - 1) / 2) * width for severity in range(1, 6)]
        panel.boxplot(
            values,
            positions=places,
            widths=0.85 * width,
            patch_artist=True,
            boxprops={"facecolor": color, "alpha": 0.6, "linewidth": 0.6},
            medianprops={"color": "black", "linewidth": 0.8},
            flierprops={"markersize": 1.5},
            whiskerprops={"linewidth": 0.6},
            capprops={"linewidth": 0.6},
        )
    panel.set_xticks(range(1, 6), [str(i) for i in range(1, 6)])
    panel.spines[["top", "right"]].set_visible(False)
