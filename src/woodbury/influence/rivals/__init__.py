"""Other estimators of the influence of training data, for comparison.

One file each, all with the convention of :class:`~woodbury.influence.Scores`: ``gradients``
(:func:`grad_dot`, :func:`grad_cos`), ``tracin``, ``representer`` (RPS), ``trak``, ``datainf``,
``laftr``. ``common`` has the passes over gradients they share.
"""

from woodbury.influence.rivals.datainf import data_inf
from woodbury.influence.rivals.gradients import grad_cos, grad_dot
from woodbury.influence.rivals.laftr import InputMoments, function_space_distance, laftr
from woodbury.influence.rivals.representer import representer_points
from woodbury.influence.rivals.tracin import trac_in
from woodbury.influence.rivals.trak import trak

__all__ = [
    "InputMoments",
    "data_inf",
    "function_space_distance",
    "grad_cos",
    "grad_dot",
    "laftr",
    "representer_points",
    "trac_in",
    "trak",
]
