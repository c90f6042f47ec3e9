"""Whether a method is worth it, on a user's own data: numbers with intervals, pictures, a verdict.

The page needs `ella-laplace[metrics]`, the numbers nothing.
"""

from ella.report.bootstrap import Bootstrap, Interval, Sampled
from ella.report.classes import ClassExamples, ClassGap
from ella.report.cost import forward_ratio, timed
from ella.report.evaluation import evaluate
from ella.report.examples import Examples, Gap
from ella.report.figures import uncertainty_histograms
from ella.report.hardest import Picture
from ella.report.kinds import kind_of
from ella.report.labels import LabelExamples, LabelGap
from ella.report.metric import Metric
from ella.report.real import RealExamples, TargetGap
from ella.report.result import Report, Row, Verdict
from ella.report.standard import standard_methods

__all__ = [
    "Bootstrap",
    "ClassExamples",
    "ClassGap",
    "Examples",
    "Gap",
    "Interval",
    "LabelExamples",
    "LabelGap",
    "Metric",
    "Picture",
    "RealExamples",
    "Report",
    "Row",
    "Sampled",
    "TargetGap",
    "Verdict",
    "evaluate",
    "forward_ratio",
    "kind_of",
    "standard_methods",
    "timed",
    "uncertainty_histograms",
]
