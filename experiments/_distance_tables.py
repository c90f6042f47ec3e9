"""Tables of `distance.py` and `rivals.py`, from the result files of their folder.

A table is named `distance/`, then a key of `TABLES`.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence

from _corruptions import CORRUPTIONS
from _report import Row, pipes
from _study import NETWORKS, SCALING, Study, grid

P_NORM = "max_logit_p_norm"
METHODS = (
    *(SCALING, f"{SCALING} + D", "ELLA"),
    *("ELLA + D", "ELLA + D, perturbed", "ELLA + D, norms kept"),
)


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
    for method, score in OWN_SCORES:
        where = {"method": method, "score": score}
        aurc = [study.mean("calibration", f"aurc {score}", arch=a, method=method) for a in names]
        lines[f"{method}: {score.replace('_', ' ')}"] = [
            *map(_thousand, aurc),
            *(study.mean("ood", "auroc", arch=a, **where) for a in names),
            *(study.mean("ood", "auroc", source=each, **where) for each in sources),
        ]
    lines = {name: line for name, line in lines.items() if any(v is not None for v in line)}
    columns = [f"AURC · 10³, {NETWORKS[a]}" for a in names]
    columns += [f"AUROC, {NETWORKS[a]}" for a in names] + sources
    forms = ["{:.2f}"] * len(names) + ["{:.4f}"] * len(names) + ["{:.3f}"] * len(sources)
    best = [min] * len(names) + [max] * (len(names) + len(sources))
    return grid("score", columns, lines, forms, best)


PROBABILITIES = ("confidence_deficit", "entropy")
OWN_SCORES = [
    *((method, score) for method in METHODS[:3:2] for score in PROBABILITIES),
    *((m, score) for m in METHODS[1::2] for score in (*PROBABILITIES, "corrected_energy")),
    *(("ELLA + D", score) for score in ("logit_variance", "distance")),
    *((METHODS[4], score) for score in (*PROBABILITIES, "corrected_energy")),
]
"""Of our methods: those that say something that no other line says."""


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


# Sets

SET_METHODS = METHODS[:4]
GROUPS = ("all", "all agree", "most", "some", "severity 1", "severity 3", "severity 5")


def sets_table(study: Study) -> str:
    """Size and coverage of conformal sets, means over networks."""
    titles = ["score, level: method"]
    titles += [f"{what}, {group}" for group in GROUPS for what in ("size", "coverage")]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    kinds = dict.fromkeys((row["score"], row["level"]) for row in study.rows("sets"))
    for score, level in kinds:
        for method in SET_METHODS:
            where = {"score": score, "level": level, "method": method}
            cells = [
                form.format(study.mean("sets", f"{what} {group}", **where))
                for group in GROUPS
                for what, form in (("size", "{:.2f}"), ("coverage", "{:.3f}"))
            ]
            lines.append([f"{score.upper()}, {level}: {method}", *cells])
    return pipes(lines)


# What it had to reach


def goals_table(study: Study) -> str:
    """Of both ways to tune the term, on each network."""
    lines = [["goal", "wanted", *(f"{m}, {NETWORKS[a]}" for m, a in _ours(study))]]
    lines.append(["---", "---:"] + ["---:"] * (len(lines[0]) - 2))
    for name, wanted, found in GOALS:
        cells = [found(study, arch, method) for method, arch in _ours(study)]
        texts = (text if reached else f"**{text}**" for text, reached in cells)
        lines.append([name, wanted, *texts])
    return f"{pipes(lines)}\n\nIn bold what was not reached."


def _ours(study: Study) -> list[tuple[str, str]]:
    pairs = [(method, arch) for arch in study.networks() for method in METHODS[3:5]]
    return [(m, a) for m, a in pairs if study.mean("calibration", "nll", method=m, arch=a)]


Verdict = tuple[str, bool]


def _cost(study: Study, arch: str, method: str) -> Verdict:
    own, other = (_known(study, "calibration", "nll", arch, m) for m in (method, "ELLA"))
    return f"{own - other:+.4f}", own - other <= 0.0005


def _mean_auroc(study: Study, arch: str, method: str) -> Verdict:
    found = _known(study, "ood", "auroc", arch, method, score="entropy")
    return f"{found:.4f}", found >= 0.935


def _sources_won(study: Study, arch: str, method: str) -> Verdict:
    def auroc(m: str, score: str, source: str) -> float:
        return _known(study, "ood", "auroc", arch, m, score=score, source=source)

    sources = _sources(study)
    won = sum(
        auroc(method, "entropy", each)
        > max(auroc(SCALING, "entropy", each), auroc(SCALING, "energy", each))
        for each in sources
    )
    return f"{won} of {len(sources)}", won == len(sources)


def _shifts_won(study: Study, arch: str, method: str) -> Verdict:
    both = [_below(study, key, arch=arch, method=method) for key in ("nll", "ece")]
    return ", ".join(both), both == [str(len(CORRUPTIONS))] * 2


def _calibrated(study: Study, arch: str, method: str) -> Verdict:
    own, other = (_known(study, "calibration", "ece", arch, m) for m in (method, SCALING))
    return f"{own - other:+.4f}", own <= other


def _ranked(study: Study, arch: str, method: str) -> Verdict:
    scores = ("confidence_deficit", P_NORM)
    own, other = (_known(study, "calibration", f"aurc {s}", arch, method) for s in scores)
    return f"{1e3 * (own - other):+.2f}", own <= other


def _known(study: Study, measure: str, key: str, arch: str, method: str, **where: str) -> float:
    found = study.mean(measure, key, arch=arch, method=method, **where)
    if found is None:
        raise ValueError(f"The study lacks {method} on {arch}. Run it first.")
    return found


GOALS: tuple[tuple[str, str, Callable[[Study, str, str], Verdict]], ...] = (
    ("NLL above ELLA's without the term", "≤ .0005", _cost),
    ("mean AUROC of the entropy", "≥ .935", _mean_auroc),
    ("sources above temperature scaling's entropy and energy", "4 of 4", _sources_won),
    ("corruptions below temperature scaling in NLL, in ECE", "11, 11", _shifts_won),
    ("ECE above temperature scaling's", "≤ 0", _calibrated),
    ("AURC · 10³ above the p-norm's", "≤ 0", _ranked),
)
TABLES: dict[str, Callable[[Study], str]] = {
    "methods": distance_table,
    "goals": goals_table,
    "rivals": rivals_table,
    "recalibrated": recalibrated_table,
    "sets": sets_table,
}
