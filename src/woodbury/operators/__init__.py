"""Things you can multiply by, and their algebra.

Still being filled.
"""

from woodbury.operators.base import LinearOperator
from woodbury.operators.dense import Dense
from woodbury.operators.diagonal import Diagonal
from woodbury.operators.function import FunctionOperator
from woodbury.operators.identity import Identity
from woodbury.operators.product import Product
from woodbury.operators.scaled import Scaled
from woodbury.operators.sum import Sum
from woodbury.operators.tags import TAGS, Tags
from woodbury.operators.transpose import Adjoint, Transpose

__all__ = [
    "TAGS",
    "Adjoint",
    "Dense",
    "Diagonal",
    "FunctionOperator",
    "Identity",
    "LinearOperator",
    "Product",
    "Scaled",
    "Sum",
    "Tags",
    "Transpose",
]
