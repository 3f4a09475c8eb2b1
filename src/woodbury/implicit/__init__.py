"""Solutions of optimality conditions, found to high accuracy.

- :func:`newton_cg`: minimise an objective by line-search Newton with conjugate gradients.
"""

from woodbury.implicit.newton import newton_cg

__all__ = ["newton_cg"]
