"""Differentiate through a solution: roots, fixed points, minimisers, and what finds them.

- :func:`root`, :func:`fixed_point`, :func:`minimize`: any solver, made differentiable.
- :func:`attach`, :func:`implicit_vjp`, :func:`implicit_jvp`: the same for a solution at hand.
- :class:`Implicit`, :class:`Unrolled`, :class:`Truncated`, :class:`OneStep`, :class:`Phantom`: how.
- :func:`compare_modes`: all of them beside finite differences.
- :func:`stationarity`: whether a solution is one, and how far off it may be.
- :class:`GradientDescent`, :class:`LBFGS`, :class:`NewtonCG`, :class:`AcceleratedProximalGradient`,
  :class:`Anderson`, :class:`BlockCoordinateDescent`, :class:`MirrorDescent`,
  :class:`LevenbergMarquardt`, :class:`Broyden`: solvers, for batches; :class:`DeepEquilibrium`: a
  layer.
- :class:`SteadyState`: where an ordinary differential equation comes to rest.
- :func:`least_squares`, :func:`linear_program`, :func:`quadratic_program`: layers.
- :func:`newton_cg`: minimise an objective by line-search Newton with conjugate gradients.
- :func:`stationary`, :func:`kkt`, :func:`projected_gradient`, :func:`proximal_gradient` and others:
  what holds at solutions; with projections (``project_*``) and proximal operators (``prox_*``).
"""

from woodbury.implicit.accelerated import AcceleratedProximalGradient
from woodbury.implicit.anderson import Anderson
from woodbury.implicit.blocks import BlockCoordinateDescent
from woodbury.implicit.broyden import Broyden
from woodbury.implicit.compare import ModeComparison, ModeRow, compare_modes
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
from woodbury.implicit.decorators import fixed_point, minimize, root
from woodbury.implicit.descent import GradientDescent
from woodbury.implicit.equilibrium import DeepEquilibrium
from woodbury.implicit.iteration import Found, InnerSolver, IterationStatus
from woodbury.implicit.lbfgs import LBFGS
from woodbury.implicit.levenberg_marquardt import LevenbergMarquardt
from woodbury.implicit.linear_least_squares import least_squares
from woodbury.implicit.linear_programs import linear_program
from woodbury.implicit.link import WarmStart
from woodbury.implicit.mirror import MirrorDescent
from woodbury.implicit.modes import Implicit, Mode, OneStep, Phantom, Truncated, Unrolled
from woodbury.implicit.newton import newton_cg
from woodbury.implicit.products import attach, implicit_jvp, implicit_vjp
from woodbury.implicit.programs import (
    QuadraticProgram,
    QuadraticProgramStatus,
    quadratic_program,
)
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
from woodbury.implicit.solver import ImplicitSolver
from woodbury.implicit.stationarity import Stationarity, StationarityWarning, stationarity
from woodbury.implicit.steady_state import SteadyState
from woodbury.implicit.truncated_newton import NewtonCG

__all__ = [
    "LBFGS",
    "AcceleratedProximalGradient",
    "Anderson",
    "BlockCoordinateDescent",
    "Broyden",
    "Cones",
    "DeepEquilibrium",
    "Found",
    "GradientDescent",
    "Implicit",
    "ImplicitSolver",
    "InnerSolver",
    "IterationStatus",
    "LevenbergMarquardt",
    "MirrorDescent",
    "Mode",
    "ModeComparison",
    "ModeRow",
    "NewtonCG",
    "OneStep",
    "Phantom",
    "QuadraticProgram",
    "QuadraticProgramStatus",
    "Stationarity",
    "StationarityWarning",
    "SteadyState",
    "Truncated",
    "Unrolled",
    "WarmStart",
    "attach",
    "block_proximal",
    "compare_modes",
    "conic_residual",
    "fixed_point",
    "implicit_jvp",
    "implicit_vjp",
    "kkt",
    "least_squares",
    "linear_program",
    "minimize",
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
    "quadratic_program",
    "root",
    "stationarity",
    "stationary",
]
