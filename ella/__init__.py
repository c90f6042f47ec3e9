"""ella: calibrated, uncertainty-aware predictions from any trained PyTorch classifier.

Axes, everywhere: n examples, c outputs (classes), k eigenfunctions, p parameters.
"""
