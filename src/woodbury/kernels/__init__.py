"""Kernels: ridge regression with closed-form leave-one-out, exact or by Nystrom features.

- :class:`RBF`, :func:`median_lengthscale`: the Gaussian kernel and a length to start from.
- :class:`KernelRidge`: a weighted fit, its leave-one-out predictions and their hypergradients.
- :func:`tune`: length scale and penalty by the gradient of a leave-one-out score.
"""

from woodbury.kernels.rbf import RBF, median_lengthscale
from woodbury.kernels.ridge import KernelRidge, KernelRidgeFit, KernelRidgeState
from woodbury.kernels.tuning import Tuned, squared_error, tune

__all__ = [
    "RBF",
    "KernelRidge",
    "KernelRidgeFit",
    "KernelRidgeState",
    "Tuned",
    "median_lengthscale",
    "squared_error",
    "tune",
]
