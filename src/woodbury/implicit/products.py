"""Derivatives of a solution that is at hand, without a solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from woodbury.errors import DtypeError, ShapeError
from woodbury.implicit.condition import Condition, FlatCondition, Kind
from woodbury.implicit.link import Link, attach_flat
from woodbury.implicit.modes import Implicit
from woodbury.implicit.run import Checks, examined
from woodbury.implicit.trees import Arguments, Unknown, checked_argnums
from woodbury.operators.parts import transforms_active
from woodbury.solvers import Recipe, SolveReport
from woodbury.solvers.solve import OnFailure

__all__ = ["attach", "implicit_jvp", "implicit_vjp"]


def attach(
    function: Callable[..., Any],
    x: Any,
    *args: Any,
    kind: Kind = "root",
    argnums: int | Sequence[int] | None = None,
    symmetric: bool | None = None,
    recipe: Recipe | None = None,
    on_failure: OnFailure = "raise",
    report: SolveReport | None = None,
    stationary_rtol: float = 1e-3,
) -> Any:
    r"""A solution found elsewhere, given the derivatives of a solution.

    The value is that of ``x``; its derivative in ``args`` is that of the solution of
    $F(x, \theta) = 0$, as for :func:`root` in the mode ``Implicit``.

    Args:
        function: $F$, $T$ or $f$, as ``kind`` says.
        x: the solution; what it may depend on by itself is cut off.
        *args: what the function takes beside it.
        kind: ``"root"``, ``"fixed_point"`` or ``"minimum"``.
        argnums: which of ``args`` are differentiated; all floating tensors by default.
        symmetric: whether $\partial F/\partial x$ is.
        recipe: how to solve, as for :class:`Implicit`.
        on_failure: what a failed solve does.
        report: receives every linear solve.
        stationary_rtol: warn beyond this relative residual; not checked inside transforms of
            ``torch.func``.

    Returns:
        A pytree like ``x``.

    Raises:
        GradientError: a derivative would be lost: of a closed-over tensor, or of an argument that
            has none.
        NonFiniteError: ``x`` or its residual is NaN or infinite.

    Cost: two evaluations of the condition or so; one solve per backward pass.

    Source: Blondel et al. (2022), equation 2.

    Example:
        >>> import torch
        >>> from woodbury.implicit import attach
        >>> t = torch.tensor([4.0, 9.0], requires_grad=True)
        >>> x = attach(lambda x, t: x**2 - t, torch.tensor([2.0, 3.0]), t)
        >>> x.sum().backward()
        >>> t.grad
        tensor([0.2500, 0.1667])
    """
    link, point, tensors = _linked(
        function, x, args, kind, argnums, symmetric, recipe, on_failure, report, stationary_rtol
    )
    return link.flat.unknown.unflatten(attach_flat(link, point, tensors), work=False)


def implicit_vjp(
    function: Callable[..., Any],
    x: Any,
    args: tuple[Any, ...],
    cotangent: Any,
    *,
    kind: Kind = "root",
    argnums: int | Sequence[int] | None = None,
    symmetric: bool | None = None,
    recipe: Recipe | None = None,
    on_failure: OnFailure = "raise",
    report: SolveReport | None = None,
    stationary_rtol: float = 1e-3,
) -> Any:
    r"""$g \mapsto g^T\, \partial x/\partial\theta = -(A^{-T} g)^T B$, by one linear solve.

    Args:
        function: $F$, $T$ or $f$, as ``kind`` says.
        x: a solution, a pytree of tensors.
        args: what the function takes beside it.
        cotangent: $g$, like ``x``.
        kind: ``"root"``, ``"fixed_point"`` or ``"minimum"``.
        argnums: which of ``args`` are differentiated; all floating tensors by default.
        symmetric: whether $\partial F/\partial x$ is.
        recipe: how to solve, as for :class:`Implicit`.
        on_failure: what a failed solve does.
        report: receives the solve.
        stationary_rtol: warn beyond this relative residual.

    Returns:
        For each differentiated argument, in their order, a pytree like it, with ``None`` for leaves
        that have no derivative and zeros where the function does not depend on a leaf; for an
        integer ``argnums`` that one alone.

    Raises:
        GradientError: a derivative would be lost.
        NonFiniteError: ``x`` or its residual is NaN or infinite.
        SolveError: the solve failed and ``on_failure`` is ``"raise"``.

    Cost: one solve, one backward pass of the condition.

    Source: Blondel et al. (2022), section 2.1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import implicit_vjp
        >>> x, t = torch.tensor([2.0, 3.0]), torch.tensor([4.0, 9.0])
        >>> implicit_vjp(lambda x, t: x**2 - t, x, (t,), torch.ones(2), argnums=0)
        tensor([0.2500, 0.1667])
    """
    link, point, tensors = _linked(
        function, x, args, kind, argnums, symmetric, recipe, on_failure, report, stationary_rtol
    )
    g = link.flat.unknown.flatten(cotangent, "the cotangent")
    arguments = link.flat.arguments
    found = link.pull(point, tensors, arguments.wanted, g)
    leaves: list[Any] = [None] * len(arguments.leaves)
    parts = zip(arguments.places, arguments.wanted, tensors, found, strict=True)
    for place, wanted, tensor, part in parts:
        if wanted:
            leaves[place] = torch.zeros_like(tensor) if part is None else part
    result = tree_unflatten(leaves, arguments.spec)
    chosen = checked_argnums(argnums, len(args))
    if isinstance(argnums, int) and chosen is not None:
        return result[chosen[0]]
    return tuple(result) if chosen is None else tuple(result[i] for i in chosen)


def implicit_jvp(
    function: Callable[..., Any],
    x: Any,
    args: tuple[Any, ...],
    tangents: Any,
    *,
    kind: Kind = "root",
    argnums: int | Sequence[int] | None = None,
    symmetric: bool | None = None,
    recipe: Recipe | None = None,
    on_failure: OnFailure = "raise",
    report: SolveReport | None = None,
    stationary_rtol: float = 1e-3,
) -> Any:
    r"""$\dot\theta \mapsto \dot x = -A^{-1} B \dot\theta$, by one linear solve.

    Args:
        function: $F$, $T$ or $f$, as ``kind`` says.
        x: a solution, a pytree of tensors.
        args: what the function takes beside it.
        tangents: for each differentiated argument a pytree like it (``None`` in the place of leaves
            that are not differentiated or do not move); for an integer ``argnums`` that one alone.
        kind: ``"root"``, ``"fixed_point"`` or ``"minimum"``.
        argnums: which of ``args`` move; all by default.
        symmetric: whether $\partial F/\partial x$ is.
        recipe: how to solve, as for :class:`Implicit`.
        on_failure: what a failed solve does.
        report: receives the solve.
        stationary_rtol: warn beyond this relative residual.

    Returns:
        A pytree like ``x``.

    Raises:
        ShapeError: the tangents are not like the arguments.
        GradientError: a derivative would be lost.
        SolveError: the solve failed and ``on_failure`` is ``"raise"``.

    Cost: one solve, one tangent of the condition.

    Source: Blondel et al. (2022), section 2.1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import implicit_jvp
        >>> x, t = torch.tensor([2.0, 3.0]), torch.tensor([4.0, 9.0])
        >>> implicit_jvp(lambda x, t: x**2 - t, x, (t,), torch.tensor([1.0, 0.0]), argnums=0)
        tensor([0.2500, 0.0000])
    """
    link, point, tensors = _linked(
        function, x, args, kind, argnums, symmetric, recipe, on_failure, report, stationary_rtol
    )
    directions = _directions(link.flat.arguments, args, argnums, tangents)
    return link.flat.unknown.unflatten(link.push(point, tensors, directions), work=False)


def _linked(
    function: Callable[..., Any],
    x: Any,
    args: tuple[Any, ...],
    kind: Kind,
    argnums: int | Sequence[int] | None,
    symmetric: bool | None,
    recipe: Recipe | None,
    on_failure: OnFailure,
    report: SolveReport | None,
    stationary_rtol: float,
) -> tuple[Link, Tensor, tuple[Tensor, ...]]:
    """The solution as a vector, checked, and what it hangs on."""
    Implicit(recipe, on_failure)  # refuses what makes no sense
    if not isinstance(args, tuple):
        raise ShapeError(f"args is {type(args).__name__}; give the arguments as a tuple")
    arguments = Arguments.of(args, argnums)
    unknown = Unknown.of(x)
    flat = FlatCondition(Condition.of(function, kind, symmetric), unknown, arguments)
    point = unknown.flatten(x, "x").detach()
    witness = None
    if not transforms_active():
        plain = [t.detach() for t in arguments.tensors]
        checks = Checks(stationary_rtol, None, closures=torch.is_grad_enabled())
        witness = examined(flat, point, plain, None, checks)
    link = Link(flat, recipe, on_failure, report, witness=witness)
    return link, point, arguments.tensors


def _directions(
    arguments: Arguments, args: tuple[Any, ...], argnums: int | Sequence[int] | None, given: Any
) -> list[Tensor | None]:
    """One tangent, or ``None``, for each tensor that is differentiated."""
    chosen = checked_argnums(argnums, len(args))
    places = range(len(args)) if chosen is None else chosen
    parts = (given,) if isinstance(argnums, int) else tuple(given)
    if len(parts) != len(places):
        raise ShapeError(f"{len(parts)} tangents for {len(places)} differentiated arguments")
    full = [tree_map(lambda _: None, arg) for arg in args]
    for place, part in zip(places, parts, strict=True):
        full[place] = part
    leaves, _ = tree_flatten(tuple(full), is_leaf=lambda leaf: leaf is None)
    if len(leaves) != len(arguments.leaves):
        raise ShapeError(
            f"the tangents have {len(leaves)} leaves, the arguments {len(arguments.leaves)}; give "
            "None for leaves that do not move"
        )
    found: list[Tensor | None] = []
    for place, name, tensor, wanted in zip(
        arguments.places, arguments.names, arguments.tensors, arguments.wanted, strict=True
    ):
        direction = leaves[place] if wanted else None
        if direction is not None:
            if not isinstance(direction, Tensor) or direction.shape != tensor.shape:
                shape = tuple(direction.shape) if isinstance(direction, Tensor) else direction
                raise ShapeError(
                    f"the tangent of {name} is {shape}, expected {tuple(tensor.shape)}"
                )
            if direction.dtype != tensor.dtype:
                raise DtypeError(f"the tangent of {name} is {direction.dtype}, not {tensor.dtype}")
        found.append(direction)
    return found
