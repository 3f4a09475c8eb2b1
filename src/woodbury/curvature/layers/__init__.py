"""How the parameters of each kind of layer enter, seen while the model runs.

- ``references``: which parameter, or rows of one, an argument of a function is.
- ``watch``: notes every call of a function with parameters; ``linear``, ``convolution`` and
  ``elementwise`` say which calls have a known form, as a ``uses.Use``.
- ``plan``: the ``blocks`` these uses make, and the gradients per example of each.
"""

from woodbury.curvature.layers.blocks import (
    Block,
    MatrixBlock,
    MatrixGradients,
    VectorBlock,
    VectorGradients,
)
from woodbury.curvature.layers.plan import Plan, make_plan
from woodbury.curvature.layers.watch import Watch

__all__ = [
    "Block",
    "MatrixBlock",
    "MatrixGradients",
    "Plan",
    "VectorBlock",
    "VectorGradients",
    "Watch",
    "make_plan",
]
