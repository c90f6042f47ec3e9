"""Whether a method is worth it, on a user's own data: numbers with intervals, pictures, a verdict.

The page needs `ella-laplace[metrics]`, the numbers nothing.
"""

from ella.report.bootstrap import Bootstrap, Interval, Sampled
from ella.report.cost import forward_ratio, timed
from ella.report.evaluation import evaluate
from ella.report.examples import Examples
from ella.report.figures import uncertainty_histograms
from ella.report.hardest import Picture
from ella.report.result import ClassGap, Metric, Report, Row, Verdict
from ella.report.standard import standard_methods

__all__ = [
    "Bootstrap",
    "ClassGap",
    "Examples",
    "Interval",
    "Metric",
    "Picture",
    "Report",
    "Row",
    "Sampled",
    "Verdict",
    "evaluate",
    "forward_ratio",
    "standard_methods",
    "timed",
    "uncertainty_histograms",
]
