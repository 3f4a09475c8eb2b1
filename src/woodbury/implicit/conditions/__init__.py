"""Conditions ``F(x, *args) = 0`` that hold at the solutions of problems of many kinds."""

from woodbury.implicit.conditions.block_proximal import block_proximal
from woodbury.implicit.conditions.conic import Cones, conic_residual
from woodbury.implicit.conditions.kkt import kkt
from woodbury.implicit.conditions.mirror_descent import mirror_descent
from woodbury.implicit.conditions.newton import newton_residual
from woodbury.implicit.conditions.projected_gradient import projected_gradient
from woodbury.implicit.conditions.proximal_gradient import proximal_gradient
from woodbury.implicit.conditions.stationary import stationary

__all__ = [
    "Cones",
    "block_proximal",
    "conic_residual",
    "kkt",
    "mirror_descent",
    "newton_residual",
    "projected_gradient",
    "proximal_gradient",
    "stationary",
]
