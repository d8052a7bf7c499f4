"""Judging: loss on held-out text, benchmarks through lm-eval, and paired comparison with an interval."""

from tinyonn_lib.evaluate.losses import MIN_GROUPS, Difference, Loss, loss, paired

__all__ = ["MIN_GROUPS", "Difference", "Loss", "loss", "paired"]
