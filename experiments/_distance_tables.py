"""Tables of `distance.py` and `rivals.py`, from the result files of their folder.

A table is named `distance/`, then a key of `TABLES`.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence

from _corruptions import CORRUPTIONS
from _report import Row, pipes
from _study import NETWORKS, SCALING, Study, grid

P_NORM = "max_logit_p_norm"
METHODS = (SCALING, f"{SCALING} + D", "ELLA", "ELLA + D", "ELLA + D, perturbed")


def distance_table(study: Study) -> str:
    """A line for each network and method."""
    sources = _sources(study)
    titles = ["network", "method", "NLL", "ECE", "AURC · 10³", "of p-norm"]
    titles += ["AUROC, mean", *sources, "of variance", "of D", "of energy", "corrected energy"]
    titles += ["NLL, shift", "ECE, shift"]
    titles += ["corruptions of 11 below t. s. in NLL", "in ECE", "predict × forward"]
    lines = [titles, ["---"] * 2 + ["---:"] * (len(titles) - 2)]
    lines += [
        [arch, method, *_line(study, sources, arch=arch, method=method)]
        for arch in study.networks()
        for method in METHODS
        if study.mean("calibration", "nll", arch=arch, method=method) is not None
    ]
    settings = study.settings()
    seeds = f"{settings['first_seed']} to {settings['first_seed'] + settings['seeds'] - 1}"
    about = f"Seeds {seeds}; {settings['num_inputs']:,} images to learn on, "
    about += f"{settings['fit_on']:,} for G and distances; {settings['num_ood']:,} of each "
    about += f"source, {settings['num_shift']} a corruption and severity."
    return f"{pipes(lines)}\n\n{about}"


def _line(study: Study, sources: Sequence[str], **where: str) -> list[str]:
    def number(measure: str, key: str, form: str, **more: str) -> str:
        value = study.mean(measure, key, **where, **more)
        return "–" if value is None or value == 0.5 else form.format(value)

    return [
        *(number("calibration", key, "{:.4f}") for key in ("nll", "ece")),
        *(_thousandths(study, score, **where) for score in ("confidence_deficit", P_NORM)),
        number("ood", "auroc", "{:.4f}", score="entropy"),
        *(number("ood", "auroc", "{:.3f}", score="entropy", source=each) for each in sources),
        *(
            number("ood", "auroc", "{:.4f}", score=score)
            for score in ("logit_variance", "distance", "energy", "corrected_energy")
        ),
        *(number("shift", key, "{:.4f}") for key in ("nll", "ece")),
        *(_below(study, key, **where) for key in ("nll", "ece")),
        number("calibration", "predict_ratio", "{:.3f}"),
    ]


def _thousandths(study: Study, score: str, **where: str) -> str:
    value = study.mean("calibration", f"aurc {score}", **where)
    return "–" if value is None else f"{1e3 * value:.2f}"


def _below(study: Study, key: str, **where: str) -> str:
    """On how many corruptions, over all severities, it is below temperature scaling."""
    if where["method"] == SCALING:
        return "–"
    scaled = where | {"method": SCALING}
    pairs = [
        [study.mean("shift", key, corruption=kind, **each) or 0.0 for each in (where, scaled)]
        for kind in CORRUPTIONS
    ]
    return str(sum(own < other for own, other in pairs))


# The rivals


def rivals_table(study: Study) -> str:
    """AURC and AUROC of every score, ours among them; the best of each column in bold."""
    names = study.networks("rivals")
    sources = _sources(study)
    lines: dict[str, list[float | None]] = {}
    for method in study.methods("rivals"):
        lines[method] = [
            *(_thousand(study.mean("rivals", "aurc", arch=a, method=method)) for a in names),
            *(_rival_auroc(study, sources, arch=a, method=method) for a in names),
            *(_rival_auroc(study, [source], method=method) for source in sources),
        ]
    for method in METHODS:
        for score, title in OWN_SCORES.items():
            where = {"method": method, "score": score}
            aurc = [
                study.mean("calibration", f"aurc {score}", arch=a, method=method) for a in names
            ]
            auroc = [study.mean("ood", "auroc", arch=a, **where) for a in names]
            by_source = [study.mean("ood", "auroc", source=each, **where) for each in sources]
            if any(value not in (None, 0.5) for value in auroc):
                lines[f"{method}: {title}"] = [*map(_thousand, aurc), *auroc, *by_source]
    columns = [f"AURC · 10³, {NETWORKS[a]}" for a in names]
    columns += [f"AUROC, {NETWORKS[a]}" for a in names] + sources
    forms = ["{:.2f}"] * len(names) + ["{:.4f}"] * len(names) + ["{:.3f}"] * len(sources)
    best = [min] * len(names) + [max] * (len(names) + len(sources))
    return grid("score", columns, lines, forms, best)


OWN_SCORES = {
    "confidence_deficit": "max-softmax",
    "entropy": "entropy",
    "energy": "energy",
    "corrected_energy": "corrected energy",
    "logit_variance": "logit variance",
    "max_logit_p_norm": "p-norm, p = 3",
    "distance": "D",
}


def _rival_auroc(study: Study, sources: Iterable[str], **where: str) -> float | None:
    found = [study.mean("rivals", f"auroc {source}", **where) for source in sources]
    values = [value for value in found if value is not None]
    return statistics.fmean(values) if values else None


def _sources(study: Study) -> list[str]:
    return list(dict.fromkeys(row["source"] for row in study.rows("ood")))


def _thousand(value: float | None) -> float | None:
    return None if value is None else 1e3 * value


# Recalibrations


def recalibrated_table(study: Study) -> str:
    """NLL and ECE in distribution and under shift, means over networks."""
    lines: dict[str, list[float | None]] = {}
    rows = study.rows("rivals")
    for method in study.methods("rivals"):
        own = [row for row in rows if row["method"] == method and "nll" in row]
        if own:
            shift = [f"{kind} {s}" for kind in CORRUPTIONS for s in range(1, 6)]
            lines[method] = [
                *(_mean(own, [key]) for key in ("nll", "ece")),
                *(_mean(own, [f"{key} {each}" for each in shift]) for key in ("nll", "ece")),
            ]
    for method in METHODS:
        lines[method] = [
            *(study.mean("calibration", key, method=method) for key in ("nll", "ece")),
            *(study.mean("shift", key, method=method) for key in ("nll", "ece")),
        ]
    columns = ["NLL", "ECE", "NLL, shift", "ECE, shift"]
    return grid("method", columns, lines, ["{:.4f}"] * 4, [min] * 4)


def _mean(rows: Sequence[Row], keys: Sequence[str]) -> float:
    return statistics.fmean(row[key] for row in rows for key in keys)


TABLES: dict[str, Callable[[Study], str]] = {
    "methods": distance_table,
    "rivals": rivals_table,
    "recalibrated": recalibrated_table,
}
