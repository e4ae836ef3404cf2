"""Metrics of texts, by name in `METRICS`: each a reward per sample and an evaluation over a set.

rouge = metric("rougeL", {"stem": False})
rouge.score(texts, references)      # one float per text
rouge.corpus(texts, references)     # Corpus(value, low, high, count)
"""

from steersman.metrics.core import Corpus, Metric, MetricInput, Scorer
from steersman.metrics.named import METRICS, metric

__all__ = ["METRICS", "Corpus", "Metric", "MetricInput", "Scorer", "metric"]
