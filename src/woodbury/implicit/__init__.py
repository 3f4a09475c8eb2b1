"""Solutions of optimality conditions, found to high accuracy.

- :func:`newton_cg`: minimise an objective by line-search Newton with conjugate gradients.
- :func:`stationary`, :func:`kkt`, :func:`projected_gradient`, :func:`proximal_gradient` and others:
  what holds at solutions; with projections (``project_*``) and proximal operators (``prox_*``).
"""

from woodbury.implicit.conditions import (
    Cones,
    block_proximal,
    conic_residual,
    kkt,
    mirror_descent,
    newton_residual,
    projected_gradient,
    proximal_gradient,
    stationary,
)
from woodbury.implicit.newton import newton_cg
from woodbury.implicit.projections import (
    project_affine,
    project_birkhoff,
    project_box,
    project_halfspace,
    project_l1_ball,
    project_l2_ball,
    project_linf_ball,
    project_second_order_cone,
    project_semidefinite,
    project_simplex,
    project_transport,
)
from woodbury.implicit.proxes import (
    prox_elastic_net,
    prox_group_lasso,
    prox_l1,
    prox_log,
    prox_nonnegative,
    prox_ridge,
)

__all__ = [
    "Cones",
    "block_proximal",
    "conic_residual",
    "kkt",
    "mirror_descent",
    "newton_cg",
    "newton_residual",
    "project_affine",
    "project_birkhoff",
    "project_box",
    "project_halfspace",
    "project_l1_ball",
    "project_l2_ball",
    "project_linf_ball",
    "project_second_order_cone",
    "project_semidefinite",
    "project_simplex",
    "project_transport",
    "projected_gradient",
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_l1",
    "prox_log",
    "prox_nonnegative",
    "prox_ridge",
    "proximal_gradient",
    "stationary",
]
