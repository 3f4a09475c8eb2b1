"""Euclidean projections onto sets, batched, exact, with closed-form derivatives."""

from woodbury.implicit.projections.affine import project_affine
from woodbury.implicit.projections.balls import (
    project_box,
    project_halfspace,
    project_l2_ball,
    project_linf_ball,
)
from woodbury.implicit.projections.second_order import project_second_order_cone
from woodbury.implicit.projections.semidefinite import project_semidefinite
from woodbury.implicit.projections.simplex import project_l1_ball, project_simplex
from woodbury.implicit.projections.transport import project_birkhoff, project_transport

__all__ = [
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
]
