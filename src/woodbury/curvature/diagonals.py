"""The diagonal and the diagonal blocks of curvature, exact and from drawn labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from woodbury.curvature.batches import Batch
from woodbury.curvature.finite import finite_outputs
from woodbury.curvature.gradient_rows import sampled_gradients
from woodbury.curvature.hessian import Hessian
from woodbury.curvature.objective import Objective
from woodbury.curvature.per_example import each_row
from woodbury.errors import ArgumentError, BudgetError, DataError, NonFiniteError
from woodbury.operators import BlockDiagonal, Dense, Diagonal
from woodbury.operators.memory import available_bytes, in_words

__all__ = ["block_curvature", "diagonal_curvature"]

Kind = Literal["gauss_newton", "fisher", "empirical_fisher", "hessian"]
Method = Literal["exact", "sampled"]

# A pair of matrices [b, r, n] whose products, summed over b and r, are the curvature.
Pairs = Iterator[tuple[Tensor, Tensor]]

_CHUNK_BYTES = 64 * 2**20


def diagonal_curvature(
    objective: Objective,
    kind: Kind = "gauss_newton",
    *,
    method: Method = "exact",
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Diagonal:
    r"""The diagonal of a curvature matrix of the mean objective, with its regulariser.

    - ``"gauss_newton"`` (for a likelihood the same as ``"fisher"``): exact,
      $\frac1N \sum_i w_i \operatorname{diag}(J_i^T H_i J_i)$ from the Jacobians of the outputs; or
      sampled, the mean of squared gradients at labels drawn from the model, which is unbiased.
    - ``"empirical_fisher"``: $\frac1N \sum_i w_i (\nabla\ell_i)^{2}$.
    - ``"hessian"``: exact by ``n`` products; or sampled, Hutchinson's $v \odot H v$ with random
      signs, which is unbiased and may be negative where the Hessian's diagonal is not.

    Args:
        objective: at its parameters of this moment.
        kind: which matrix.
        method: ``"exact"`` or ``"sampled"``.
        samples: labels drawn per example, or products with the Hessian.
        generator: draws; the same numbers every time if not given.

    Returns:
        A :class:`~woodbury.Diagonal`, positive semidefinite (definite) by its values.

    Raises:
        ArgumentError: an argument that is not known, or a sampled empirical Fisher matrix.
        StructureError: no outputs, or (sampled, Fisher) a criterion that is no likelihood.
        DataError: rows that depend on their batch (mode ``"train"``), but for the Hessian.

    Cost: exact Gauss-Newton as many gradients as there are outputs; sampled ``samples`` gradients;
    empirical one; the Hessian ``n`` or ``samples`` products.

    Source: Schraudolph (2002); Martens and Grosse, "Optimizing neural networks with
    Kronecker-factored approximate curvature" (2015), section 2.2, on drawn labels; Bekas,
    Kokiopoulou and Saad, "An estimator for the diagonal of a matrix" (2007).

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.curvature import diagonal_curvature
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> D = diagonal_curvature(Objective(model, "mse", (x, torch.zeros(2, 1)), l2=0.25))
        >>> D.values
        tensor([1.2500, 4.2500])
    """
    _check(kind, method, samples)
    if kind == "hessian":
        values = _hessian_diagonal(objective, method, samples, generator)
    else:
        total = torch.zeros(objective.space.dim, dtype=torch.float64, device=objective.device)
        for left, right in _pairs(objective, kind, method, samples, generator):
            total += (left * right).sum((0, 1))
        values = total / objective.num_examples + torch.as_tensor(objective.l2, dtype=torch.float64)
    values = values.to(objective.dtype)
    tags = set()
    if bool((values >= 0).all()):
        tags = {"positive_definite" if bool((values > 0).all()) else "positive_semidefinite"}
    return Diagonal(values, tags=tags, space=objective.space)


def block_curvature(
    objective: Objective,
    kind: Kind = "gauss_newton",
    *,
    blocks: Sequence[Sequence[str]] | None = None,
    method: Method = "exact",
    samples: int = 1,
    generator: torch.Generator | None = None,
    memory: int | None = None,
) -> BlockDiagonal:
    r"""The diagonal blocks of a curvature matrix of the mean objective, with its regulariser.

    The matrices are those of :func:`diagonal_curvature`, entries outside of the blocks are zero.
    Blocks are dense: their inverse is structural.

    Args:
        objective: at its parameters of this moment.
        kind: which matrix.
        blocks: names of the parameters of each block, in the order of ``objective.space`` and
            every name once; default one block for each parameter tensor.
        method: ``"exact"``, or ``"sampled"`` at labels drawn from the model (not for the Hessian).
        samples: labels drawn per example.
        generator: draws; the same numbers every time if not given.
        memory: bytes that the blocks may take; default what is available.

    Returns:
        A :class:`~woodbury.BlockDiagonal` of dense blocks.

    Raises:
        ArgumentError: an argument that is not known, names that are missing or out of order, or a
            sampled Hessian or empirical Fisher matrix.
        BudgetError: the blocks do not fit; nothing was computed.
        StructureError, DataError: as for :func:`diagonal_curvature`.

    Cost: as for :func:`diagonal_curvature`, and $\sum_b n_b^2$ multiplications for each row; the
    Hessian ``n`` products. Memory $\sum_b n_b^2$.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.curvature import block_curvature
        >>> x = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
        >>> objective = Objective(torch.nn.Linear(2, 1), "mse", (x, torch.zeros(2, 1)))
        >>> block_curvature(objective).to_dense()  # weight, then bias
        tensor([[1., 1., 0.],
                [1., 5., 0.],
                [0., 0., 2.]])
    """
    _check(kind, method, samples)
    ends = _ends(objective, blocks)
    sizes = [stop - start for start, stop in ends]
    _require_room(objective, sizes, memory)
    if kind == "hessian":
        if method == "sampled":
            raise ArgumentError("blocks of a Hessian are exact only; use method='exact'")
        matrices = _hessian_blocks(objective, ends)
    else:
        matrices = [
            torch.zeros(n, n, dtype=objective.dtype, device=objective.device) for n in sizes
        ]
        for left, right in _pairs(objective, kind, method, samples, generator):
            for (start, stop), matrix in zip(ends, matrices, strict=True):
                a, b = (side[..., start:stop].flatten(0, 1) for side in (left, right))
                matrix.addmm_(a.T, b)
        count = objective.num_examples
        penalty = torch.as_tensor(objective.l2, dtype=torch.float64, device=objective.device)
        penalty = penalty.expand(objective.space.dim)
        for (start, stop), matrix in zip(ends, matrices, strict=True):
            matrix /= count
            matrix.diagonal().add_(penalty[start:stop])
    tags = {"symmetric"}
    weights, l2 = objective.weights, torch.as_tensor(objective.l2)
    signed = weights is not None and bool((weights < 0).any())
    convex = kind == "empirical_fisher" or (
        kind == "fisher" or (kind == "gauss_newton" and objective.criterion.convex)
    )
    if convex and not signed and bool((l2 >= 0).all()):
        tags.add("positive_definite" if bool((l2 > 0).all()) else "positive_semidefinite")
    halves = [(matrix + matrix.T) / 2 for matrix in matrices]
    return BlockDiagonal(
        [Dense._derived(matrix, _closed(tags)) for matrix in halves], space=objective.space
    )


def _closed(tags: set[str]) -> frozenset[str]:
    from woodbury.operators.tags import close

    return close(tags, complex_dtype=False, square=True)


# ---------------------------------------------------------------- rows whose products are curvature


def _pairs(
    objective: Objective,
    kind: Kind,
    method: Method,
    samples: int,
    generator: torch.Generator | None,
) -> Pairs:
    if kind == "empirical_fisher":
        if method == "sampled":
            raise ArgumentError(
                "the empirical Fisher matrix has the labels of the data, there is nothing to draw: "
                "use method='exact', or kind='fisher'"
            )
        return _weighted(objective, ((i, g[:, None]) for i, g in objective.per_example_gradients()))
    if method == "sampled":
        rows = sampled_gradients(objective, samples, generator)
        return _weighted(objective, ((i, g / samples**0.5) for i, g in rows))
    if kind == "fisher":
        from woodbury.curvature.fisher import Fisher

        Fisher(objective)  # raises where the criterion is no likelihood
    return _jacobian_pairs(objective)


def _weighted(objective: Objective, rows: Iterator[tuple[Tensor, Tensor]]) -> Pairs:
    for places, gradients in rows:
        if not bool(torch.isfinite(gradients).all()):
            bad = places[~torch.isfinite(gradients).flatten(1).all(1)].tolist()
            raise NonFiniteError(
                f"the gradients of {len(bad)} examples hold NaN or infinity (rows "
                f"{', '.join(map(str, bad[:8]))}); look at these rows, or leave them out"
            )
        if objective.weights is None:
            yield gradients, gradients
        else:
            yield gradients, gradients * objective.weights[places].view(-1, 1, 1)


def _jacobian_pairs(objective: Objective) -> Pairs:
    """Jacobians of the outputs ``[b, C, n]``, and times the curvature of the criterion."""
    if objective.replayed:
        raise DataError(
            "in mode 'train' the outputs of a row depend on its batch, so it has no Jacobian of "
            "its own; use mode='eval'"
        )
    flat = objective.params_vector()
    params = objective.space.unflatten(flat)

    def outputs(theta: Tensor, single: Batch) -> Tensor:
        return objective.outputs(objective.space.unflatten(theta), single).reshape(-1)

    jacobian: Callable[..., Tensor] = torch.func.jacrev(outputs)
    for batch in objective.batches("Jacobians"):
        with torch.no_grad():
            z = finite_outputs(objective.outputs(params, batch), batch)
        curvature = objective.criterion.curvature(
            z, objective.target(batch), objective.batch_weights(batch)
        )
        width = z[0].numel()
        itemsize = torch.finfo(objective.dtype).bits // 8
        step = max(1, _CHUNK_BYTES // (itemsize * width * objective.space.dim))
        H = _criterion_matrices(curvature, z)
        for start in range(0, batch.size, step):
            part = slice(start, min(start + step, batch.size))
            try:
                J = each_row(objective, batch, part, jacobian)
            except (RuntimeError, ValueError):  # the model has something that vmap cannot do
                J = _jacobian_one_by_one(objective, batch, part)
            J = J.detach()
            yield J, H[part] @ J


def _criterion_matrices(curvature: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The Hessian of the criterion in the outputs of every row, ``[B, C, C]``."""
    width = z[0].numel()
    basis = torch.eye(width, dtype=z.dtype, device=z.device)
    units = basis.view(width, 1, width).expand(width, len(z), width).reshape(width, *z.shape)
    return curvature(units.contiguous()).reshape(width, len(z), width).permute(1, 2, 0)


def _jacobian_one_by_one(objective: Objective, batch: Batch, part: slice) -> Tensor:
    leaves = objective.leaves()
    with torch.enable_grad():
        z = objective.outputs(leaves, batch)[part].flatten(1)
    result = torch.zeros(
        *z.shape, objective.space.dim, dtype=objective.dtype, device=objective.device
    )
    for i in range(z.shape[0]):
        for c in range(z.shape[1]):
            found = torch.autograd.grad(
                z[i, c], list(leaves.values()), retain_graph=True, allow_unused=True
            )
            views = objective.space.unflatten(result[i, c]).values()
            for view, gradient in zip(views, found, strict=True):
                if gradient is not None:
                    view.copy_(gradient)
    return result


# ------------------------------------------------------------------------------------- the Hessian


def _hessian_diagonal(
    objective: Objective, method: Method, samples: int, generator: torch.Generator | None
) -> Tensor:
    H = Hessian(objective)
    if method == "exact":
        return H.diagonal()
    if generator is None:
        generator = torch.Generator(objective.device).manual_seed(0)
    total = torch.zeros(objective.space.dim, dtype=torch.float64, device=objective.device)
    width = H._block_width()
    for start in range(0, samples, width):
        shape = (objective.space.dim, min(width, samples - start))
        signs = torch.randint(2, shape, generator=generator, device=generator.device)
        V = (2 * signs - 1).to(device=objective.device, dtype=objective.dtype)
        total += (V * (H @ V)).sum(1)
    return total / samples


def _hessian_blocks(objective: Objective, ends: list[tuple[int, int]]) -> list[Tensor]:
    H = Hessian(objective)
    width = H._block_width()
    matrices = []
    for start, stop in ends:
        index = torch.arange(start, stop, device=objective.device)
        columns = [H.columns(part)[start:stop] for part in index.split(width)]
        matrices.append(torch.cat(columns, dim=1))
    return matrices


# ---------------------------------------------------------------------------------------- checks


def _check(kind: str, method: str, samples: int) -> None:
    if kind not in get_args(Kind):
        raise ArgumentError(f"kind is {kind!r}; use one of {', '.join(get_args(Kind))}")
    if method not in get_args(Method):
        raise ArgumentError(f"method is {method!r}; use 'exact' or 'sampled'")
    if samples < 1:
        raise ArgumentError(f"samples is {samples}; at least one is drawn")


def _ends(objective: Objective, blocks: Sequence[Sequence[str]] | None) -> list[tuple[int, int]]:
    """Where each block starts and stops in the flat vector."""
    sizes = objective.space.sizes
    groups = [[name] for name in sizes] if blocks is None else [list(block) for block in blocks]
    if [name for group in groups for name in group] != list(sizes) or not all(groups):
        raise ArgumentError(
            f"blocks are {groups}; they must name {list(sizes)}, each once and in this order"
        )
    ends, start = [], 0
    for group in groups:
        stop = start + sum(sizes[name] for name in group)
        ends.append((start, stop))
        start = stop
    return ends


def _require_room(objective: Objective, sizes: list[int], memory: int | None) -> None:
    need = 2 * sum(n * n for n in sizes) * torch.finfo(objective.dtype).bits // 8
    allowed = available_bytes(objective.device) if memory is None else memory
    if need > allowed:
        raise BudgetError(
            f"blocks of {max(sizes)} and fewer parameters take {in_words(need)} and "
            f"{in_words(allowed)} are allowed; use smaller blocks, a Kronecker-factored matrix or "
            "diagonal_curvature"
        )
