"""The report: its metrics, intervals against resampling one by one, the verdict, the page."""

import json
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ella import ELLA, Categorical, LastLayer, NotFittedError, metrics
from ella.baselines import MAP, TemperatureScaling
from ella.report import Bootstrap, Interval, evaluate, standard_methods, statistics
from ella.report.hardest import scaled, visible

pytest.importorskip("netcal")
pytest.importorskip("jinja2")

QUICK = {"bootstrap": Bootstrap(40), "progress": False}


def images(n, seed):
    """Images (n, 1, 4, 4) of three classes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=generator)
    x = torch.randn(n, 1, 4, 4, generator=generator)
    x[torch.arange(n), 0, y, y] += 1.5
    return x, y


def loader(data, **options):
    return DataLoader(TensorDataset(*data), batch_size=50, **options)


def classifier(sharpness):
    """Right about as often as one can be; `sharpness` 1 is calibrated, more is over-confident."""
    linear = nn.Linear(16, 3)
    with torch.no_grad():
        linear.weight.zero_(), linear.bias.zero_()
        for c in range(3):
            linear.weight[c, 5 * c] = 1.5 * sharpness
    return nn.Sequential(nn.Flatten(), linear)


@pytest.fixture(scope="module")
def methods():
    model, train, val = classifier(4), loader(images(200, 0)), loader(images(300, 1))
    quiet = {"progress": False}
    found = {
        "MAP": MAP(model, **quiet),
        "temperature scaling": TemperatureScaling(model, **quiet),
        "ELLA": ELLA(model, eigenfunctions=LastLayer(), **quiet),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibrate: 300 validation examples alone")
        return {name: method.fit(train).calibrate(val) for name, method in found.items()}


@pytest.fixture(scope="module")
def data():
    return images(400, 2)


@pytest.fixture(scope="module")
def report(methods, data):
    x = torch.randn(150, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    return evaluate(
        methods,
        loader(data),
        ood={"noise <&>": loader((3 * x,))},
        shift={"darker": loader((data[0] * 0.5, data[1]))},
        risk=0.1,
        **QUICK,
    )


# --- metrics ------------------------------------------------------------------------------------


def test_estimates_are_those_of_ella_metrics(report, methods, data):
    x, y = data
    for row, method in zip(report.rows, methods.values(), strict=True):
        probs = method.predict_proba(x)
        scores, wrong = method.uncertainty(x).entropy, probs.argmax(1) != y
        risks = metrics.risk_coverage(scores, wrong)[1]
        expected = {
            "nll": metrics.negative_log_likelihood(probs, y),
            "accuracy": metrics.accuracy(probs, y),
            "brier": metrics.brier(probs, y),
            "ece": metrics.expected_calibration_error(probs, y),
            "aurc": metrics.area_under_risk_coverage(scores, wrong),
            "coverage": max([i + 1 for i, r in enumerate(risks) if r <= 0.1], default=0) / len(y),
            "nll darker": metrics.negative_log_likelihood(method.predict_proba(x * 0.5), y),
        }
        for key, value in expected.items():
            assert row.metrics[key].estimate == pytest.approx(value, abs=1e-6), key


def test_detection_is_that_of_ella_metrics(report):
    for i, row in enumerate(report.rows):
        value = metrics.auroc(report.examples.scores[:, i], report.outside["noise <&>"][:, i])
        assert row.metrics["auroc noise <&>"].estimate == pytest.approx(value, abs=1e-12)


def test_the_order_of_the_data_does_not_matter(report, methods, data):
    shuffled = loader(data, shuffle=True, generator=torch.Generator().manual_seed(5))
    again = evaluate(methods, shuffled, risk=0.1, **QUICK)
    for row, other in zip(report.rows, again.rows, strict=True):
        for key in ("nll", "accuracy", "brier", "ece"):
            assert other.metrics[key].estimate == pytest.approx(row.metrics[key].estimate)
    scores = [picture.score for picture in report.pictures]
    assert [picture.score for picture in again.pictures] == pytest.approx(scores)


def test_labels_that_do_not_count_are_left_out(data):
    x, y = data
    kept = y.clone()
    kept[::3] = -1
    counted = kept >= 0

    def judged(x, y):
        likelihood = Categorical(ignore_index=-1)
        model = classifier(2)
        pair = {
            "a": MAP(model, likelihood=likelihood, progress=False),
            "b": TemperatureScaling(model, likelihood=likelihood, progress=False),
        }
        for method in pair.values():
            method.fit(loader((x, y)))
        return evaluate(pair, loader((x, y)), **QUICK)

    some, clean = judged(x, kept), judged(x[counted], y[counted])
    assert some.verdict.num_examples == int(counted.sum())
    assert some.rows[0].metrics["nll"] == clean.rows[0].metrics["nll"]


def test_one_logit_is_two_classes(data):
    x, y = data[0], (data[1] > 0).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    pair = {"a": MAP, "b": TemperatureScaling}
    fitted = {
        name: kind(model, likelihood="binary", progress=False).fit(loader((x, y)))
        for name, kind in pair.items()
    }
    found = evaluate(fitted, loader((x, y)), **QUICK)
    p = model(x).detach().sigmoid().squeeze(1)
    expected = metrics.binary_negative_log_likelihood(p, y)
    assert found.rows[0].metrics["nll"].estimate == pytest.approx(expected, abs=1e-6)
    assert found.classes == ("0", "1")


def test_another_score_ranks(methods, data):
    found = evaluate(methods, loader(data), score="confidence_deficit", **QUICK)
    deficit = 1 - methods["MAP"].predict_proba(data[0]).amax(1)
    assert torch.allclose(found.examples.scores[:, 0], deficit.double(), atol=1e-6)
    found = evaluate(methods, loader(data), score="logit_variance", **QUICK)
    variance = methods["ELLA"].uncertainty(data[0]).logit_variance
    assert torch.allclose(found.examples.scores[:, 2], variance.double(), rtol=1e-5)


# --- bootstrap ----------------------------------------------------------------------------------


def slow_interval(estimate, values, level=0.95):
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    bias = np.mean(values) - estimate
    if abs(bias) <= 3 * np.std(values, ddof=1) / len(values) ** 0.5:
        bias = 0
    return Interval(float(estimate), float(low - bias), float(high - bias))


def about(interval):
    return pytest.approx([interval.estimate, interval.low, interval.high], abs=1e-9)


def ends(interval):
    return [interval.estimate, interval.low, interval.high]


@pytest.fixture(scope="module")
def drawn():
    """Confidences, correctness and scores with ties of two methods, and the resamples as rows."""
    generator = torch.Generator().manual_seed(0)
    n, k, b = 60, 35, 30
    confidence = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    correct = torch.rand(n, 2, generator=generator) < confidence
    scores = torch.randint(12, (n, 2), generator=generator).double()
    outside = torch.randint(15, (k, 2), generator=generator).double()
    rows = []
    for stream, size in enumerate((n, k)):
        own = torch.Generator().manual_seed(7 + (stream << 32))
        rows.append([torch.randint(size, (size,), generator=own) for _ in range(b)])
    return confidence, correct, scores, outside, rows, Bootstrap(b, seed=7)


def on_rows(metric, rows, columns):
    """A metric of the two methods on the examples of one resample, in their own order."""
    rows = rows.sort().values
    return np.array([metric(*(column[rows, i] for column in columns)) for i in range(2)])


CASES = {
    "mean": (
        lambda c, k, s: statistics.mean_of(c),
        lambda c, k, s: c.mean().item(),
    ),
    "ece": (
        lambda c, k, s: statistics.calibration_error(c, k),
        lambda c, k, s: sum(
            abs((c[m] - k[m].double()).sum().item()) / len(c)
            for i in range(15)
            for m in [(c >= i / 15) & ((c < (i + 1) / 15) | (i == 14))]
        ),
    ),
    "aurc": (
        lambda c, k, s: statistics.area_under_risk_coverage(s, ~k),
        lambda c, k, s: metrics.area_under_risk_coverage(s, ~k),
    ),
    "coverage": (
        lambda c, k, s: statistics.coverage_at(s, ~k, 0.4),
        lambda c, k, s: max(
            [
                share.item()
                for share, risk in zip(*metrics.risk_coverage(s, ~k), strict=True)
                if risk <= 0.4
            ],
            default=0.0,
        ),
    ),
    "gap": (
        lambda c, k, s: statistics.gap_where(s > 5, c, k),
        lambda c, k, s: (c - k.double())[s > 5].mean().item(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_intervals_are_those_of_resampling_one_by_one(name, drawn):
    statistic, metric = CASES[name]
    *columns, _, rows, bootstrap = drawn
    columns = columns[:3]
    found = bootstrap.sampled(statistic(*columns), 60)
    values = np.stack([on_rows(metric, each, columns) for each in rows[0]])
    estimates = on_rows(metric, torch.arange(60), columns)
    for i in range(2):
        assert ends(found.interval(i)) == about(slow_interval(estimates[i], values[:, i]))
    paired = slow_interval(estimates[1] - estimates[0], values[:, 1] - values[:, 0])
    assert ends(found.difference(1, 0)) == about(paired)


def test_both_sides_of_a_detection_are_resampled(drawn):
    _, _, scores, outside, rows, bootstrap = drawn
    found = bootstrap.sampled(statistics.auroc(scores, outside), 60, 35)
    values = np.array(
        [
            [metrics.auroc(scores[ins, i], outside[outs, i]) for i in range(2)]
            for ins, outs in zip(*rows, strict=True)
        ]
    )
    for i in range(2):
        estimate = metrics.auroc(scores[:, i], outside[:, i])
        assert ends(found.interval(i)) == about(slow_interval(estimate, values[:, i]))


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(200):
        losses = torch.randn(60, 1, generator=generator, dtype=torch.float64)
        found = Bootstrap(150, level=0.8, seed=seed).sampled(statistics.mean_of(losses), 60)
        held += found.interval(0).low <= 0 <= found.interval(0).high
    assert 0.72 < held / 200 < 0.88


def test_an_interval_holds_its_estimate_where_resamples_are_biased():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(300, 1, generator=generator, dtype=torch.float64)
    correct = torch.rand(300, 1, generator=generator) < confidence
    found = Bootstrap(200).sampled(statistics.calibration_error(confidence, correct), 300)
    assert found.values.mean() > found.estimates[0] * 1.1
    interval = found.interval(0)
    assert interval.low < interval.estimate < interval.high


def test_one_example_makes_no_difference():
    """Half of the resamples lack it, whatever their mean happens to be."""
    losses = torch.zeros(500, 2, dtype=torch.float64)
    losses[0, 1] = 1
    for seed in range(20):
        found = Bootstrap(200, seed=seed).sampled(statistics.mean_of(losses), 500)
        assert found.difference(1, 0).side == 0


@pytest.mark.parametrize("bad", [{"num_resamples": 1}, {"level": 1.0}])
def test_a_bootstrap_checks_its_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Bootstrap(**bad)


# --- verdict ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "against", "decision", "where"),
    [
        ("temperature scaling", "MAP", "use it", "below"),
        ("MAP", "temperature scaling", "do not", "above"),
        ("twin", "MAP", "no difference that these data can show", "below"),
    ],
)
def test_the_verdict_is_by_the_paired_interval(methods, data, method, against, decision, where):
    twins = {**methods, "twin": methods["MAP"]}
    verdict = evaluate(twins, loader(data), method=method, against=against, **QUICK).verdict
    assert verdict.decision == decision
    assert verdict.sentence.endswith(f"bootstrap samples of 400 test examples): {decision}.")
    assert f" {where} that of {against}" in verdict.sentence
    assert f"{abs(verdict.difference.estimate):.4f}" in verdict.sentence


def test_the_last_is_judged_by_temperature_scaling(report):
    assert (report.verdict.method, report.verdict.against) == ("ELLA", "temperature scaling")
    assert report.rows[1].differences == {}


def test_a_verdict_says_what_else_differs(methods, data):
    verdict = evaluate(
        methods, loader(data), method="temperature scaling", against="MAP", **QUICK
    ).verdict
    assert any(words.startswith("ECE (") for words in verdict.better)
    assert not verdict.worse
    assert verdict.beside.startswith("Beside the NLL it is better in")
    same = replace(verdict, better=(), worse=())
    assert same.beside == "In nothing else measured can it be told from MAP."


# --- what comes out -----------------------------------------------------------------------------


class Parsed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.stack = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_page_needs_nothing_else(report, tmp_path):
    path = report.to_html(tmp_path / "page.html", title="<Mine>")
    text = path.read_text(encoding="utf-8")
    page = Parsed(text)
    assert page.stack == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[\w+/=]+", "", text))
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), tag
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 3 + 1 + 3 + 12
    assert all(each["alt"].strip() for each in pictures)
    assert len({each["alt"] for each in pictures}) == len(pictures)
    assert "prefers-color-scheme: dark" in text
    assert "<title>&lt;Mine&gt;</title>" in text
    assert "noise &lt;&amp;&gt;" in text


def test_the_pictures_ask_for_nothing(report, tmp_path):
    import base64

    text = report.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    drawings = re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", text)
    assert len(drawings) == 7
    for each in drawings:
        drawing = base64.b64decode(each).decode()
        assert not re.search(r'(href|src)="http', drawing)
        assert "prefers-color-scheme:dark" in drawing


@pytest.mark.parametrize("verdict", [-1, 0, 1])
def test_the_page_shows_the_verdict(report, tmp_path, verdict):
    difference = Interval(0.1 * verdict, 0.1 * verdict - 0.01, 0.1 * verdict + 0.01)
    changed = replace(report, verdict=replace(report.verdict, difference=difference))
    text = changed.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    decision = {-1: "use it", 0: "no difference that these data can show", 1: "do not"}[verdict]
    assert f"<strong>By its NLL: {decision}</strong>" in text


def test_matplotlib_is_left_as_it_was(report, tmp_path):
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    settings = dict(mpl.rcParams)
    report.to_html(tmp_path / "page.html")
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == settings


def test_json_is_everything(report):
    found = json.loads(report.to_json())
    assert [row["method"] for row in found["rows"]] == list(report.methods)
    assert found["verdict"]["decision"] == report.verdict.decision
    nll = found["rows"][2]["metrics"]["nll"]
    assert nll["low"] <= nll["estimate"] <= nll["high"]
    assert found["rows"][2]["predict_ratio"] > 0


def test_markdown_is_a_table(report):
    lines = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert "▲" in lines[-1] or "▼" in lines[2]


def test_the_most_uncertain_inputs_are_shown(report, methods, data):
    x, y = data
    entropy = methods["ELLA"].uncertainty(x).entropy
    rows = entropy.argsort(descending=True)[:12]
    assert [p.score for p in report.pictures] == pytest.approx(entropy[rows].tolist(), rel=1e-5)
    assert [int(p.example.labels) for p in report.pictures] == y[rows].tolist()
    assert torch.equal(report.pictures[0].values, x[rows[0]])


def test_what_can_be_seen_is_told_from_what_cannot():
    assert visible(torch.rand(2, 3, 8, 8)).shape == (2, 3, 8, 8)
    assert visible(torch.rand(2, 1, 40)).shape == (2, 40)
    assert visible((torch.rand(2, 1, 8, 8),)).shape == (2, 1, 8, 8)
    for other in (
        torch.rand(2, 4, 8, 8),
        torch.rand(2, 16),
        torch.ones(2, 8).long(),
        {"x": torch.rand(2, 3, 8, 8)},
        (torch.rand(2, 3), torch.rand(2, 3)),
    ):
        assert visible(other) is None


def test_images_are_scaled_to_be_seen():
    image = scaled(torch.randn(3, 5, 6) * 7)
    assert image.shape == (5, 6, 3)
    assert (image.min(), image.max()) == (0, 1)
    assert torch.equal(scaled(torch.ones(1, 2, 2)), torch.zeros(2, 2, 1))


def test_inputs_that_cannot_be_seen_leave_no_pictures(tmp_path):
    x, y = images(200, 0)
    x = x.flatten(1)
    model = classifier(2)[1]
    pair = {"a": MAP(model, progress=False), "b": TemperatureScaling(model, progress=False)}
    for method in pair.values():
        method.fit(loader((x, y)))
    found = evaluate(pair, loader((x, y)), classes=["x", "y", "z"], **QUICK)
    assert found.pictures == ()
    assert "most uncertain" not in found.to_html(tmp_path / "page.html").read_text()


def test_gaps_are_of_what_is_said(report, methods, data):
    x, y = data
    probs = methods["ELLA"].predict_proba(x)
    for gap in report.gaps:
        said = probs.argmax(1) == int(gap.name)
        accuracy = (y[said] == int(gap.name)).double().mean().item()
        assert gap.count == int(said.sum())
        assert gap.accuracy == pytest.approx(accuracy)
        expected = probs[said].amax(1).double().mean().item() - accuracy
        assert gap.gap.estimate == pytest.approx(expected, abs=1e-6)
    sizes = [abs(gap.gap.estimate) for gap in report.gaps]
    assert sizes == sorted(sizes, reverse=True)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ella"}, "`method` must be one of 'MAP'"),
        ({"against": "none"}, "`against` must be one of"),
        ({"method": "MAP", "against": "MAP"}, "nothing to compare"),
        ({"risk": 1.5}, "`risk` must lie between 0 and 1"),
        ({"score": "variance"}, "`score` must be one of 'entropy'"),
        ({"score": "distance"}, "'entropy', which all have"),
        ({"classes": ["a"]}, "`classes` must be a list of 3 names"),
    ],
)
def test_bad_options_are_named(methods, data, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(methods, loader(data), **options, **QUICK)


def test_bad_methods_are_named(methods, data):
    with pytest.raises(TypeError, match="mapping of names to fitted methods"):
        evaluate(list(methods.values()), loader(data))
    with pytest.raises(TypeError, match=r"'plain' is a Sequential.*ella.baselines.MAP"):
        evaluate({**methods, "plain": classifier(1)}, loader(data))
    with pytest.raises(ValueError, match="at least two methods"):
        evaluate({"MAP": methods["MAP"]}, loader(data))
    with pytest.raises(NotFittedError, match="MAP is not fitted"):
        evaluate({**methods, "new": MAP(classifier(1))}, loader(data))


def test_outputs_for_every_position_are_refused():
    model = nn.Conv2d(1, 3, 1)
    x, y = torch.randn(20, 1, 4, 4), torch.randint(3, (20, 4, 4))
    dense = MAP(model, progress=False).fit(loader((x, y)))
    with pytest.raises(ValueError, match="one prediction an example"):
        evaluate({"a": dense, "b": dense}, loader((x, y)), **QUICK)


def test_a_bad_batch_is_named(methods, data):
    batches = [data, (data[0], data[1] + 7)]
    with pytest.raises(ValueError, match=r"Batch 1: .*0\.\.2"):
        evaluate(methods, batches, **QUICK)


@pytest.mark.filterwarnings("ignore:calibrate. 100 validation examples alone")
def test_standard_methods_are_fitted_and_calibrated(data):
    found = standard_methods(
        classifier(3),
        loader(images(100, 0)),
        loader(images(100, 1)),
        eigenfunctions=LastLayer(),
        progress=False,
    )
    assert list(found) == ["MAP", "temperature scaling", "ELLA"]
    assert found["temperature scaling"].hyperparameters.logit_temperature > 1.5
    assert evaluate(found, loader(data), **QUICK).verdict.method == "ELLA"
