"""Operators made from a model and its data.

Where to find what:

- ``objective``: :class:`Objective`, what is differentiated; ``problem`` is the part of it that
  operators use, ``batches`` gives data the same way at every pass, ``functions`` makes a module a
  pure function, ``criteria`` (with ``losses`` and ``likelihoods``) turns a criterion into losses
  per example with their curvature in the outputs, ``per_example`` takes gradients one by one.
- One matrix a file: ``jacobian``, ``hessian``, ``gauss_newton``, ``fisher``; ``matrix`` is what
  they share. ``gradient_window`` (with ``window_inverse``, ``window_recursion`` and
  ``gradient_buffer``) is a matrix of gradients, which ``gradient_rows`` collects from an
  objective; ``diagonals`` takes diagonals and diagonal blocks.
- Layer by layer: ``capture`` gives gradients per example as inputs and output gradients of the
  ``layers``, ``backprop`` says of what (at labels from ``draws``), ``single`` takes those of
  parameters without known form one by one, ``probes`` checks that a loss belongs to its example.
  ``kfac`` is made of them: a ``layer_matrix`` whose blocks ``layer_fit`` finds from the sums of
  ``factors`` (``products`` of whichever library is faster) over ``two_passes``, kept by
  ``layer_store``; ``partitioned_fit`` merges them from files; ``damping`` and ``coverage`` say what
  was added and what is represented how, ``preconditioning`` makes a preconditioner of it, and
  ``promotion`` takes half precision to float32.
- Linearise once, multiply many times: ``graphs`` by automatic differentiation for any model,
  ``signals`` faster for networks of linear layers, ``linearization`` keeps both within a budget,
  ``memory`` measures.
"""

from woodbury.curvature.capture import FactoredBatch, FactoredGradients
from woodbury.curvature.coverage import Coverage, CoverageRow
from woodbury.curvature.damping import (
    DampingChoice,
    RelativeDamping,
    choose_damping,
    damping_for_steps,
)
from woodbury.curvature.diagonals import block_curvature, diagonal_curvature
from woodbury.curvature.fisher import Fisher
from woodbury.curvature.gauss_newton import GaussNewton
from woodbury.curvature.gradient_buffer import GradientBuffer
from woodbury.curvature.gradient_window import GradientWindow
from woodbury.curvature.hessian import Hessian
from woodbury.curvature.jacobian import Jacobian
from woodbury.curvature.kfac import EKFAC, KFAC
from woodbury.curvature.layer_matrix import LayerMatrix
from woodbury.curvature.layers import MatrixBlock, MatrixGradients, VectorBlock, VectorGradients
from woodbury.curvature.objective import Objective
from woodbury.curvature.partitioned_fit import PartitionedFit
from woodbury.curvature.preconditioning import curvature_preconditioner, heavy_columns
from woodbury.curvature.window_inverse import WindowInverse
from woodbury.curvature.window_recursion import WindowRecursion

__all__ = [
    "EKFAC",
    "KFAC",
    "Coverage",
    "CoverageRow",
    "DampingChoice",
    "FactoredBatch",
    "FactoredGradients",
    "Fisher",
    "GaussNewton",
    "GradientBuffer",
    "GradientWindow",
    "Hessian",
    "Jacobian",
    "LayerMatrix",
    "MatrixBlock",
    "MatrixGradients",
    "Objective",
    "PartitionedFit",
    "RelativeDamping",
    "VectorBlock",
    "VectorGradients",
    "WindowInverse",
    "WindowRecursion",
    "block_curvature",
    "choose_damping",
    "curvature_preconditioner",
    "damping_for_steps",
    "diagonal_curvature",
    "heavy_columns",
]
