"""Tables in, plotly figures out. Only the modules of this package draw with plotly."""

from tinyonn_lib.plots.align import distilled, filtered, lifts, rewards
from tinyonn_lib.plots.base import (
    ACCENT,
    DIVERGING,
    INK,
    MAP_SAMPLE,
    PALETTE,
    QUIET,
    SEQUENTIAL,
    TABLE_ROWS,
    describe,
    stratified,
)
from tinyonn_lib.plots.experts import expert_means, intervals, projection, trial
from tinyonn_lib.plots.kv import kv_after, kv_contest, kv_distributions, kv_factors, kv_similarity
from tinyonn_lib.plots.neurons import (
    CURVE_POINTS,
    correlations,
    delta_sc_map,
    explorer_map,
    neuron_map,
    palette,
    profiles,
    ranking,
    score_colours,
)
from tinyonn_lib.plots.pretrain import lessons, recipes, tokenizers
from tinyonn_lib.plots.routing import specialisation, throughput, usage_over_time
from tinyonn_lib.plots.scan import activation_gradient, delta_sc, distributions, module_heat
from tinyonn_lib.plots.selection import auroc, kept, score_correlations, score_distributions, selection_overlap
from tinyonn_lib.plots.target import benchmarks, target_loss, warmup
from tinyonn_lib.plots.training import bits_per_byte, corpus_sizes, loss_curves, refinement

__all__ = [
    "ACCENT",
    "CURVE_POINTS",
    "DIVERGING",
    "INK",
    "MAP_SAMPLE",
    "PALETTE",
    "QUIET",
    "SEQUENTIAL",
    "TABLE_ROWS",
    "activation_gradient",
    "auroc",
    "benchmarks",
    "bits_per_byte",
    "corpus_sizes",
    "correlations",
    "delta_sc",
    "delta_sc_map",
    "describe",
    "distilled",
    "distributions",
    "expert_means",
    "explorer_map",
    "filtered",
    "intervals",
    "kept",
    "kv_after",
    "kv_contest",
    "kv_distributions",
    "kv_factors",
    "kv_similarity",
    "lessons",
    "lifts",
    "loss_curves",
    "module_heat",
    "neuron_map",
    "palette",
    "profiles",
    "projection",
    "ranking",
    "recipes",
    "refinement",
    "rewards",
    "score_colours",
    "score_correlations",
    "score_distributions",
    "selection_overlap",
    "specialisation",
    "stratified",
    "target_loss",
    "throughput",
    "tokenizers",
    "trial",
    "usage_over_time",
    "warmup",
]
