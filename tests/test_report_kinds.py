"""The report for real targets and for labels: numbers against slow references, the page."""

import base64
import json
import math
import re
import warnings
from itertools import permutations

import numpy as np
import pytest
import torch
from own_likelihoods import Poisson
from test_report import QUICK, Parsed, about, ends, loader, slow_interval
from torch import nn

from ella import ELLA, LastLayer, metrics
from ella.baselines import MAP, TemperatureScaling
from ella.report import (
    Bootstrap,
    ClassExamples,
    LabelExamples,
    RealExamples,
    evaluate,
    standard_methods,
    statistics,
)

sklearn_metrics = pytest.importorskip("sklearn.metrics")
pytest.importorskip("netcal")
pytest.importorskip("jinja2")

QUIET = {"progress": False}


def inputs(n, seed):
    """Images (n, 1, 4, 4)."""
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def real(n, seed, count=2):
    """Targets that differ in scale and noise."""
    x = inputs(n, seed)
    f, noise = x.flatten(1), torch.randn(n, 2, generator=torch.Generator().manual_seed(seed + 99))
    y = torch.stack([f[:, 0].sin() + f[:, 1], 2 * f[:, 2]], 1) + noise * torch.tensor([0.3, 0.5])
    return x, y[:, :count]


def bits(n, seed):
    """Three labels, the last of them rare."""
    x = inputs(n, seed)
    logits = 2 * x.flatten(1)[:, :3] - torch.tensor([0.0, 0.5, 2.5])
    generator = torch.Generator().manual_seed(seed + 99)
    return x, (torch.rand(n, 3, generator=generator) < logits.sigmoid()).long()


def fitted(make, likelihood, outputs, names, kinds=(MAP, TemperatureScaling, ELLA)):
    """Three methods for one model, which is trained too long."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, outputs))
    x, y = make(120, 0)
    loss = nn.MSELoss() if likelihood == "regression" else nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model(x), y.float()).backward()
        optimizer.step()
    found = {}
    for name, kind in zip(names, kinds, strict=True):
        options = {"eigenfunctions": LastLayer()} if kind is ELLA else {}
        found[name] = kind(model, likelihood=likelihood, **options, **QUIET)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibrate: 300 validation examples alone")
        for method in found.values():
            method.fit(loader((x, y))).calibrate(loader(make(300, 1)))
    return found


@pytest.fixture(scope="module")
def regressors():
    return fitted(real, "regression", 2, ("MAP", "MAP, noise tuned", "ELLA"))


@pytest.fixture(scope="module")
def taggers():
    return fitted(bits, "multilabel", 3, ("MAP", "temperature scaling", "ELLA"))


@pytest.fixture(scope="module")
def real_report(regressors):
    x, y = real(400, 2)
    far = {"far <&>": loader((4 * inputs(150, 3),))}
    shift = {"darker": loader((x * 0.5, y))}
    names = ["length", "width"]
    return evaluate(
        regressors, loader((x, y)), ood=far, shift=shift, risk=0.7, classes=names, **QUICK
    )


@pytest.fixture(scope="module")
def label_report(taggers):
    x, y = bits(400, 2)
    far = {"far": loader((4 * inputs(150, 3),))}
    shift = {"darker": loader((x * 0.5, y))}
    names = ["cat", "dog", "tree"]
    return evaluate(
        taggers, loader((x, y)), ood=far, shift=shift, risk=0.1, classes=names, **QUICK
    )


def gaussian(method, x):
    """Mean and variance with noise, from public calls alone."""
    mean, covariance = method.logits(x)
    noise = method.hyperparameters.noise_variance
    return mean.double(), covariance.diagonal(dim1=1, dim2=2).double() + noise


def normal_cdf(z):
    return 0.5 * (1 + math.erf(z / 2**0.5))


# --- real targets -------------------------------------------------------------------------------


def test_real_estimates_are_those_of_ella_metrics(real_report, regressors):
    x, y = real(400, 2)
    for i, (row, method) in enumerate(zip(real_report.rows, regressors.values(), strict=True)):
        mean, variance = gaussian(method, x)
        coverage = {
            level: metrics.interval_coverage(mean, variance, y, level) for level in (0.5, 0.95)
        }
        transforms = [normal_cdf(z) for z in ((y - mean) / variance.sqrt()).flatten().tolist()]
        quantiles = np.mean(
            [abs(np.mean([u <= j / 100 for u in transforms]) - j / 100) for j in range(1, 100)]
        )
        expected = {
            "nll": metrics.gaussian_negative_log_likelihood(mean, variance, y),
            "rmse": metrics.root_mean_squared_error(mean, y),
            "off_95": abs(coverage[0.95] - 0.95),
            "off_50": abs(coverage[0.5] - 0.5),
            "width": 2 * 1.959963984540054 * variance.sqrt().mean().item(),
            "quantiles": quantiles,
            "nll darker": metrics.gaussian_negative_log_likelihood(*gaussian(method, 0.5 * x), y),
        }
        if i == 2:  # the only one whose scores differ
            scores, squares = variance.log().sum(1), (y - mean).square().mean(1)
            expected["aurc"] = metrics.area_under_risk_coverage(scores, squares)
            risks = metrics.risk_coverage(scores, squares)[1]
            kept = [j + 1 for j, risk in enumerate(risks) if risk <= 0.7**2]
            expected["coverage"] = max(kept, default=0) / len(y)
        for key, value in expected.items():
            assert row.metrics[key].estimate == pytest.approx(value, abs=2e-6, rel=1e-6), key


def test_the_deviation_tells_far_inputs_as_the_variance_does(real_report, regressors):
    x, far = real(400, 2)[0], 4 * inputs(150, 3)
    here, there = (gaussian(regressors["ELLA"], each)[1].prod(1) for each in (x, far))
    found = [row.metrics["auroc far <&>"].estimate for row in real_report.rows]
    assert found[2] == pytest.approx(metrics.auroc(here, there), abs=1e-6)
    assert found[:2] == [0.5, 0.5]
    assert found[2] > 0.9


def test_the_deviation_of_one_target_is_its_standard_deviation():
    methods = fitted(lambda n, s: real(n, s, 1), "regression", 1, ("MAP", "ELLA"), (MAP, ELLA))
    x, y = real(100, 2, 1)
    report = evaluate(methods, loader((x, y)), **QUICK)
    assert report.score == "standard_deviation"
    expected = gaussian(methods["ELLA"], x)[1].sqrt().squeeze(1)
    assert torch.allclose(report.examples.scores[:, 1], expected, rtol=1e-5)
    assert "coverage" not in report.rows[0].metrics  # no RMSE was asked for


def test_a_constant_deviation_keeps_the_mean_error(real_report):
    for row in real_report.rows[:2]:
        squared = row.metrics["rmse"].estimate ** 2
        assert row.metrics["aurc"].estimate == pytest.approx(squared, rel=1e-9)


def test_sharpness_alone_is_no_merit(real_report):
    (width,) = [metric for metric in real_report.metrics if metric.key == "width"]
    assert [row.better(width) for row in real_report.rows] == [0, 0, 0]
    assert real_report.rows[0].differences["width"].side == -1
    assert "width" not in " ".join(real_report.verdict.better + real_report.verdict.worse)


def test_real_targets_are_told_one_by_one(real_report, regressors):
    x, y = real(400, 2)
    by_name = {gap.name: gap for gap in real_report.gaps}
    assert set(by_name) == {"length", "width"}
    mean, variance = gaussian(regressors["ELLA"], x)
    other = gaussian(regressors["MAP, noise tuned"], x)
    for i, name in enumerate(("length", "width")):
        here, gap = (mean[:, i], variance[:, i], y[:, i]), by_name[name]
        nll = metrics.gaussian_negative_log_likelihood(*here)
        against = metrics.gaussian_negative_log_likelihood(*(e[:, i] for e in other), y[:, i])
        assert gap.nll == pytest.approx(nll, abs=1e-6)
        assert gap.difference.estimate == pytest.approx(nll - against, abs=1e-6)
        assert gap.rmse == pytest.approx(metrics.root_mean_squared_error(*here[::2]), abs=1e-6)
        assert gap.half == pytest.approx(metrics.interval_coverage(*here, level=0.5))
        assert gap.most == pytest.approx(metrics.interval_coverage(*here, level=0.95))
    total = sum(gap.difference.estimate for gap in real_report.gaps)
    assert total == pytest.approx(real_report.verdict.difference.estimate, abs=1e-9)


def test_the_opponent_of_a_regressor(regressors):
    data = loader(real(100, 2))
    assert evaluate(regressors, data, **QUICK).verdict.against == "MAP, noise tuned"
    pair = {"first": regressors["ELLA"], "MAP": regressors["MAP"], "ELLA": regressors["ELLA"]}
    verdict = evaluate(pair, data, **QUICK).verdict
    assert (verdict.method, verdict.against, verdict.decision) == ("ELLA", "MAP", "use it")
    assert "The NLL of ELLA is" in verdict.sentence


def test_other_scores_rank_regressors(regressors):
    x, y = real(100, 2)
    found = evaluate(regressors, loader((x, y)), score="mutual_information", **QUICK)
    expected = regressors["ELLA"].uncertainty(x).mutual_information
    assert torch.allclose(found.examples.scores[:, 2], expected.double(), rtol=1e-5)


# --- labels -------------------------------------------------------------------------------------


def slow_ece(probs, happened):
    """Fifteen bins of equal width, the last closed."""
    total = 0.0
    for i in range(15):
        chosen = (probs >= i / 15) & ((probs < (i + 1) / 15) | (i == 14))
        total += abs((probs[chosen] - happened[chosen]).sum())
    return total / len(probs)


def average_precisions(probs, y):
    return [sklearn_metrics.average_precision_score(y[:, c], probs[:, c]) for c in range(3)]


def test_label_estimates_are_those_of_ella_metrics(label_report, taggers):
    x, y = bits(400, 2)
    for row, method in zip(label_report.rows, taggers.values(), strict=True):
        probs, scores = method.predict_proba(x), method.uncertainty(x).entropy
        wrong = ((probs > 0.5).long() != y).double()
        wide, risks = probs.double().numpy(), metrics.risk_coverage(scores, wrong.mean(1))[1]
        kept = [i + 1 for i, risk in enumerate(risks) if risk <= 0.1]
        expected = {
            "nll": metrics.binary_negative_log_likelihood(probs, y),
            "hamming": wrong.mean().item(),
            "subset": (wrong.sum(1) == 0).double().mean().item(),
            "brier": np.mean([np.mean((wide[:, c] - y[:, c].numpy()) ** 2) for c in range(3)]),
            "ece": slow_ece(wide.flatten(), y.flatten().numpy()),
            "map": np.mean(average_precisions(wide, y)),
            "aurc": metrics.area_under_risk_coverage(scores, wrong.mean(1)),
            "coverage": max(kept, default=0) / len(y),
            "nll darker": metrics.binary_negative_log_likelihood(method.predict_proba(x / 2), y),
        }
        for key, value in expected.items():
            assert row.metrics[key].estimate == pytest.approx(value, abs=2e-6), key


def test_the_worst_labels_are_told(label_report, taggers):
    x, y = bits(400, 2)
    probs, other = (
        taggers[name].predict_proba(x).double().numpy() for name in ("ELLA", "temperature scaling")
    )
    names = ["cat", "dog", "tree"]
    errors = {name: slow_ece(probs[:, c], y[:, c].numpy()) for c, name in enumerate(names)}
    assert [gap.name for gap in label_report.gaps] == sorted(names, key=lambda n: -errors[n])
    for gap in label_report.gaps:
        own = y[:, gap.place].numpy()
        assert gap.error.estimate == pytest.approx(errors[gap.name], abs=1e-6)
        assert gap.frequency == pytest.approx(own.mean())
        assert gap.gap == pytest.approx(probs[:, gap.place].mean() - own.mean(), abs=1e-6)
        assert gap.against == pytest.approx(slow_ece(other[:, gap.place], own), abs=1e-6)


def test_without_any_label_there_is_no_precision(taggers):
    x, _ = bits(60, 4)
    report = evaluate(taggers, loader((x, torch.zeros(60, 3).long())), **QUICK)
    assert "map" not in report.rows[0].metrics
    assert report.rows[0].metrics["hamming"].estimate >= 0
    json.loads(report.to_json())


def test_one_logit_is_two_classes_with_a_page(tmp_path):
    def one(n, seed):
        x, y = bits(n, seed)
        return x, y[:, 0]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    x, y = one(200, 2)
    pair = {"a": MAP, "b": TemperatureScaling}
    methods = {
        name: kind(model, likelihood="binary", **QUIET).fit(loader(one(100, 0)))
        for name, kind in pair.items()
    }
    report = evaluate(methods, loader((x, y)), **QUICK)
    assert isinstance(report.examples, ClassExamples)
    probs = methods["a"].predict_proba(x)
    both = torch.cat([1 - probs, probs], 1)
    assert report.rows[0].metrics["brier"].estimate == pytest.approx(metrics.brier(both, y))
    assert "Worst-calibrated" in report.to_html(tmp_path / "page.html").read_text()


# --- intervals ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    """Rows of resamples of 50 examples; probabilities, labels, scores and losses with ties."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.randint(9, (50, 2, 2), generator=generator).double() / 8
    labels = (torch.rand(50, 2, generator=generator) < 0.3).double()
    scores = torch.randint(200, (50, 2), generator=generator).double()
    losses = torch.rand(50, 2, generator=generator, dtype=torch.float64)
    own = torch.Generator().manual_seed(7)
    rows = [torch.randint(50, (50,), generator=own) for _ in range(30)]
    return probs, labels, scores, losses, rows, Bootstrap(30, seed=7)


def slow_retention(scores, losses):
    """Mean over shares of the mean loss of the surest, where those that tie have one loss."""
    scores, losses = scores.numpy(), losses.numpy()
    same = np.array([losses[scores == score].mean() for score in scores])
    ranked = same[np.argsort(scores, kind="stable")]
    return np.mean([ranked[: k + 1].mean() for k in range(len(ranked))])


CASES = {
    "root": (
        lambda p, y, s, e: statistics.root_mean_of(e),
        lambda p, y, s, e: e.mean().item() ** 0.5,
    ),
    "distance": (
        lambda p, y, s, e: statistics.distance_from(e, 0.4),
        lambda p, y, s, e: abs(e.mean().item() - 0.4),
    ),
    "quantiles": (
        lambda p, y, s, e: statistics.quantile_error(p),
        lambda p, y, s, e: np.mean(
            [abs((p.flatten() <= j / 100).double().mean().item() - j / 100) for j in range(1, 100)]
        ),
    ),
    "map": (
        lambda p, y, s, e: statistics.mean_average_precision(p, y),
        lambda p, y, s, e: np.mean(
            [
                sklearn_metrics.average_precision_score(y[:, c], p[:, c])
                for c in range(2)
                if y[:, c].any()
            ]
        ),
    ),
    "retention": (
        lambda p, y, s, e: statistics.area_under_retention(s, e),
        lambda p, y, s, e: slow_retention(s, e),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_intervals_are_those_of_resampling_one_by_one(name, drawn):
    statistic, metric = CASES[name]
    probs, labels, scores, losses, rows, bootstrap = drawn

    def on(row):
        return [
            metric(probs[row][..., i], labels[row], scores[row, i], losses[row, i])
            for i in range(2)
        ]

    found = bootstrap.sampled(statistic(probs, labels, scores, losses), 50)
    estimates, values = on(torch.arange(50)), np.array([on(row) for row in rows])
    for i in range(2):
        assert ends(found.interval(i)) == about(slow_interval(estimates[i], values[:, i]))


def test_ties_are_what_random_orders_are_on_average():
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    losses = torch.tensor([0.3, 0.1, 0.9, 0.4, 0.7], dtype=torch.float64)
    orders = [torch.tensor(order) for order in permutations(range(5))]
    expected = np.mean(
        [metrics.area_under_risk_coverage(scores[order], losses[order]) for order in orders]
    )
    statistic = statistics.area_under_retention(scores[:, None], losses[:, None])
    assert statistic(torch.ones(5, dtype=torch.float64)).item() == pytest.approx(expected)


# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "drawings"),
    # Quantiles, retention and three histograms; six diagrams, a curve and three histograms.
    [("real_report", 1 + 1 + 3), ("label_report", 3 + 3 + 1 + 3)],
)
def test_the_page_needs_nothing_else(kind, drawings, request, tmp_path):
    report = request.getfixturevalue(kind)
    text = report.to_html(tmp_path / "page.html", title="<Mine>").read_text(encoding="utf-8")
    page = Parsed(text)
    assert page.stack == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[\w+/=]+", "", text))
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == drawings + 12
    assert len({each["alt"] for each in pictures}) == len(pictures)
    vector = re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", text)
    assert len(vector) == drawings
    for each in vector:
        assert not re.search(r'(href|src)="http', base64.b64decode(each).decode())
    assert "no class" not in text
    for name in report.classes:
        assert f'<th scope="row">{name}</th>' in text


def test_captions_say_what_is_right_and_what_was_said(real_report, label_report):
    shown = real_report.pictures[0]
    target, mean, variance = (
        getattr(shown.example, name).flatten() for name in ("targets", "means", "variances")
    )
    caption = shown.example.caption(real_report)[1].replace("−", "-")
    assert f"{target[0]:.3g}, {target[1]:.3g}; said {mean[0]:.3g} ± {variance[0] ** 0.5:.3g}" in (
        caption
    )
    shown = label_report.pictures[0]
    text, caption = shown.example.caption(label_report)
    said = [
        n
        for n, p in zip(label_report.classes, shown.example.probs[0, :, 0], strict=True)
        if p > 0.5
    ]
    assert len(said) == 3
    assert text.endswith("predicted cat, dog and tree")
    assert re.search(r"\((none|[123] of 3) wrong\)$", caption)


def test_json_has_the_names_of_the_kind(real_report, label_report):
    found = json.loads(real_report.to_json())
    assert {each["name"] for each in found["targets"]} == {"length", "width"}
    assert found["risk"] == 0.7
    found = json.loads(label_report.to_json())
    assert {each["name"] for each in found["labels"]} == {"cat", "dog", "tree"}
    assert isinstance(label_report.examples, LabelExamples)
    assert isinstance(real_report.examples, RealExamples)


def test_markdown_is_a_table(real_report, label_report):
    for report in (real_report, label_report):
        lines = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
        assert len(lines) == 2 + 3
        assert len({line.count("|") for line in lines}) == 1


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("regressors", {"risk": 0.0}, "`risk`, an RMSE, must be above 0"),
        ("regressors", {"score": "variance"}, "`score` must be one of 'standard_deviation'"),
        ("regressors", {"score": "energy"}, "`score`='energy' is not known"),
        ("regressors", {"classes": ["a"]}, "`classes` must be a list of 2 names"),
        ("taggers", {"risk": 1.0}, "`risk` must lie between 0 and 1"),
        ("taggers", {"score": "standard_deviation"}, "`score` must be one of 'entropy'"),
        ("taggers", {"classes": "abc"}, "`classes` must be a list of 3 names"),
    ],
)
def test_bad_options_are_named(kind, options, message, request):
    data = loader((real if kind == "regressors" else bits)(50, 2))
    with pytest.raises(ValueError, match=message):
        evaluate(request.getfixturevalue(kind), data, **options, **QUICK)


def test_kinds_are_not_mixed(regressors, taggers):
    with pytest.raises(ValueError, match=r"`methods` mixes kinds.*'MAP' are for real ones"):
        evaluate({"MAP": regressors["MAP"], "b": taggers["MAP"]}, loader(bits(50, 2)), **QUICK)
    x, y = inputs(50, 0), torch.arange(50) % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    classes = MAP(model, **QUIET).fit(loader((x, y)))
    with pytest.raises(ValueError, match=r"`methods` mixes kinds of targets: MAP has 3 labels"):
        evaluate({"a": taggers["MAP"], "b": classes}, loader(bits(50, 2)), **QUICK)


def test_a_likelihood_without_a_report_is_named():
    x, y = inputs(50, 0), torch.arange(50).double() % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    counts = MAP(model, likelihood=Poisson(), **QUIET).fit(loader((x, y[:, None])))
    with pytest.raises(ValueError, match=r"`methods`\['a'\]: .*got the likelihood .*Poisson"):
        evaluate({"a": counts, "b": counts}, loader((x, y[:, None])), **QUICK)


@pytest.mark.parametrize(
    ("kind", "targets", "error", "message"),
    [
        ("regressors", torch.zeros(20, 3), ValueError, r"shape \(n, 2\)"),
        ("regressors", torch.zeros(20, 2).long(), TypeError, "must be floating point"),
        ("regressors", torch.full((20, 2), math.nan), ValueError, "NaN or infinite"),
        ("taggers", torch.zeros(20, 2), ValueError, r"shape \(n, 3\)"),
        ("taggers", torch.full((20, 3), 2), ValueError, "must be 0 or 1"),
    ],
)
def test_a_bad_batch_is_named(kind, targets, error, message, request):
    good = (real if kind == "regressors" else bits)(20, 2)
    batches = [good, (good[0], targets)]
    with pytest.raises(error, match=f"Batch 1: .*{message}"):
        evaluate(request.getfixturevalue(kind), batches, **QUICK)


@pytest.mark.parametrize("likelihood", ["regression", "multilabel"])
def test_outputs_for_every_position_are_refused(likelihood):
    model, x = nn.Conv2d(1, 3, 1), inputs(20, 0)
    y = (x.expand(-1, 3, -1, -1) > 0).to(torch.float if likelihood == "regression" else torch.long)
    dense = MAP(model, likelihood=likelihood, **QUIET).fit(loader((x, y)))
    with pytest.raises(ValueError, match="one prediction an example"):
        evaluate({"a": dense, "b": dense}, loader((x, y)), **QUICK)


@pytest.mark.filterwarnings("ignore:calibrate. 300 validation examples alone")
def test_standard_methods_of_a_regressor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    found = standard_methods(
        model,
        loader(real(100, 0)),
        loader(real(300, 1)),
        eigenfunctions=LastLayer(),
        likelihood="regression",
        **QUIET,
    )
    assert list(found) == ["MAP", "MAP, noise tuned", "ELLA"]
    assert evaluate(found, loader(real(50, 2)), **QUICK).verdict.against == "MAP, noise tuned"
