"""Things you can multiply by, and their algebra.

Where to find what (one class a file):

- ``base``: :class:`LinearOperator`, what every operator can be asked and the hooks of a new one.
- ``tags``: structure declared by name and the rules by which algebra keeps or loses it.
- Matrices in memory: ``dense``, ``diagonal``, ``identity``, ``sparse`` (and ``sparse_inverse``).
- Structured: ``low_rank``, ``low_rank_update`` (the Woodbury identity), ``kronecker``,
  ``shifted_kronecker`` (plus a multiple of the identity), ``block_diagonal``,
  ``eigendecomposed`` (eigenvectors and eigenvalues), ``permutation``.
- Never formed: ``kernel`` (evaluated in blocks), ``function`` (you give the product).
- Made by algebra: ``sum``, ``product``, ``scaled``, ``transpose``. ``algebra`` holds the rules for
  ``A + B``, ``c * A``, ``A @ B``, ``A.T`` and ``A.H``.
- ``factorization``: how dense matrices are factorised and when one counts as singular; ``dtypes``.

A new operator gives ``_matmat`` (and ``_rmatmat``), overrides what its structure answers without
products, and inherits ``OperatorConformance`` of ``tests/conformance.py`` in its tests.
"""

from woodbury.operators.base import LinearOperator
from woodbury.operators.block_diagonal import BlockDiagonal
from woodbury.operators.dense import Dense
from woodbury.operators.diagonal import Diagonal
from woodbury.operators.eigendecomposed import Eigendecomposed
from woodbury.operators.function import FunctionOperator
from woodbury.operators.identity import Identity
from woodbury.operators.kernel import Kernel
from woodbury.operators.kronecker import Kronecker
from woodbury.operators.low_rank import LowRank
from woodbury.operators.low_rank_update import LowRankUpdate
from woodbury.operators.permutation import Permutation
from woodbury.operators.product import Product
from woodbury.operators.scaled import Scaled
from woodbury.operators.shifted_kronecker import ShiftedKronecker
from woodbury.operators.sparse import Sparse
from woodbury.operators.sum import Sum
from woodbury.operators.tags import TAGS, Tags
from woodbury.operators.transpose import Adjoint, Transpose

__all__ = [
    "TAGS",
    "Adjoint",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Eigendecomposed",
    "FunctionOperator",
    "Identity",
    "Kernel",
    "Kronecker",
    "LinearOperator",
    "LowRank",
    "LowRankUpdate",
    "Permutation",
    "Product",
    "Scaled",
    "ShiftedKronecker",
    "Sparse",
    "Sum",
    "Tags",
    "Transpose",
]
