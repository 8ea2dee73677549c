"""Measuring a trained model: what it drew and what it wrote, against the truth.

In: a sampler and held-out documents. Out: plain numbers with confidence intervals. It must never look at
anything but held-out data, nor grade a picture by the model that drew it.
"""

from mmtrain.evaluate.ablation import Estimate, Measured, compare_arms, draw_differences
from mmtrain.evaluate.curves import Curve, draw_curves, measure_curve
from mmtrain.evaluate.distances import Distances, measure_distances
from mmtrain.evaluate.infill import MaskedWord, mask_word, measure_infill
from mmtrain.evaluate.intervals import Proportion, wilson
from mmtrain.evaluate.losses import DocumentLosses, measure_documents
from mmtrain.evaluate.shapes import ShapesResult, evaluate_shapes
from mmtrain.evaluate.shapes_grader import compare, grade

__all__ = [
    "Curve",
    "Distances",
    "DocumentLosses",
    "Estimate",
    "MaskedWord",
    "Measured",
    "Proportion",
    "ShapesResult",
    "compare",
    "compare_arms",
    "draw_curves",
    "draw_differences",
    "evaluate_shapes",
    "grade",
    "mask_word",
    "measure_curve",
    "measure_distances",
    "measure_documents",
    "measure_infill",
    "wilson",
]
