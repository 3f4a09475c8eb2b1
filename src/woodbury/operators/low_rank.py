"""A low-rank matrix given by its factors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from woodbury.errors import DeviceError, DtypeError, ShapeError, TagError
from woodbury.operators.base import LinearOperator
from woodbury.operators.tags import scaled_tags, sum_tags, transposed_tags
from woodbury.spaces import Space

__all__ = ["LowRank"]


class LowRank(LinearOperator):
    r"""$U C V^H$ with thin $U$ and $V$.

    Added to anything that has a structural inverse it becomes a
    :class:`~woodbury.operators.LowRankUpdate`, which is inverted by the Woodbury identity.

    Args:
        U: ``[m, r]``.
        C: ``[r, s]``, or ``[r]`` for a diagonal; the identity if not given. May be singular.
        V: ``[n, s]``; ``U`` if not given, and then the operator is hermitian where ``C`` is, and
            positive semidefinite where ``C`` is the identity or a diagonal that is not negative.
        tags: further tags, taken on trust.
        space: :class:`~woodbury.Space` of the vectors ``x`` in ``A @ x``.

    Raises:
        ShapeError: the shapes do not fit.
        DtypeError: the dtypes differ.
        DeviceError: the devices differ.
        TagError: tagged positive definite with a rank below ``n``.

    Cost: a product with ``k`` columns is ``(m r + r s + n s) k`` multiplications.

    Example:
        >>> import torch
        >>> from woodbury import Identity, LowRank
        >>> A = LowRank(torch.ones(4, 1)) + 2.0 * Identity(4)
        >>> A.inverse() @ torch.ones(4)
        tensor([0.1667, 0.1667, 0.1667, 0.1667])
    """

    _made_of = ("U", "C", "V")

    def __init__(
        self,
        U: Tensor,
        C: Tensor | None = None,
        V: Tensor | None = None,
        *,
        tags: Iterable[str] = (),
        space: Space | None = None,
    ) -> None:
        given = {tags} if isinstance(tags, str) else set(tags)
        C = torch.diag(C) if C is not None and C.dim() == 1 else C
        _require_fit(U, C, V)
        rows, columns = U.shape[0], (U if V is None else V).shape[0]
        if V is None:
            given |= _core_tags(C, U.dtype)
        if "positive_definite" in given and U.shape[1] < rows:
            raise TagError(f"tagged positive_definite, but the rank {U.shape[1]} is below {rows}")
        super().__init__((rows, columns), dtype=U.dtype, device=U.device, tags=given, space=space)
        self.U = U
        self.C = C
        self.V = U if V is None else V

    @classmethod
    def _derived(
        cls,
        U: Tensor,
        C: Tensor | None,
        V: Tensor,
        tags: Iterable[str],
        space: Space | None = None,
        out_space: Space | None = None,
    ) -> LowRank:
        """Factors whose tags follow from a rule; pass the tensor ``U`` as ``V`` to share it."""
        self = cls.__new__(cls)
        LinearOperator.__init__(
            self,
            (U.shape[0], V.shape[0]),
            dtype=U.dtype,
            device=U.device,
            tags=tags,
            space=space,
            out_space=out_space,
        )
        self.U, self.C, self.V = U, C, V
        return self

    @property
    def core(self) -> Tensor:
        """``C`` as a matrix ``[r, s]``."""
        if self.C is not None:
            return self.C
        return torch.eye(self.U.shape[1], dtype=self.dtype, device=self.device)

    def _times_core(self, X: Tensor) -> Tensor:
        return X if self.C is None else X @ self.C

    def _matmat(self, X: Tensor) -> Tensor:
        inner = self.V.mH @ X
        return self.U @ (inner if self.C is None else self.C @ inner)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        inner = self.U.mH @ Y
        return self.V @ (inner if self.C is None else self.C.mH @ inner)

    def _to_dense(self) -> Tensor:
        return self._times_core(self.U) @ self.V.mH

    def _columns(self, index: Tensor) -> Tensor:
        return self._times_core(self.U) @ self.V[index].mH

    def _diagonal(self) -> Tensor:
        return (self._times_core(self.U) * self.V.conj()).sum(1)

    def _transpose(self) -> LinearOperator:
        U, V = self.V.conj().resolve_conj(), self.U.conj().resolve_conj()
        return self._flipped(U, None if self.C is None else self.C.mT, V)

    def _adjoint(self) -> LinearOperator:
        return self._flipped(self.V, None if self.C is None else self.C.mH, self.U)

    def _flipped(self, U: Tensor, C: Tensor | None, V: Tensor) -> LowRank:
        return LowRank._derived(U, C, V, transposed_tags(self.tags), self.out_space, self.space)

    def _scale(self, factor: complex | Tensor) -> LinearOperator:
        tags = scaled_tags(self.tags, factor)
        return LowRank._derived(
            self.U, factor * self.core, self.V, tags, self.space, self.out_space
        )

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        from woodbury.operators.low_rank_update import LowRankUpdate

        if isinstance(other, LowRank):
            return self._joined(other)
        if isinstance(other, LowRankUpdate):
            return other._add(self)
        return LowRankUpdate(other, self) if other.has_inverse else None

    def _joined(self, other: LowRank) -> LowRank:
        """``[U1 U2] diag(C1, C2) [V1 V2]^H``."""
        U = torch.cat([self.U, other.U], dim=1)
        shared = self.V is self.U and other.V is other.U
        V = U if shared else torch.cat([self.V, other.V], dim=1)
        plain = self.C is None and other.C is None
        C = None if plain else torch.block_diag(self.core, other.core)
        tags = sum_tags(self.tags, other.tags)
        return LowRank._derived(U, C, V, tags, self.space, self.out_space)


def _require_fit(U: Tensor, C: Tensor | None, V: Tensor | None) -> None:
    parts = {"U": U, "C": C, "V": V}
    for name, part in parts.items():
        if part is None:
            continue
        if part.dim() != 2:
            raise ShapeError(f"{name} has shape {tuple(part.shape)}, expected two dimensions")
        if part.dtype != U.dtype:
            raise DtypeError(f"{name} is {part.dtype}, U is {U.dtype}; make them of one dtype")
        if part.device != U.device:
            raise DeviceError(f"{name} is on {part.device}, U on {U.device}; move it first")
    rank = U.shape[1], (U if V is None else V).shape[1]
    core = (rank[0], rank[0]) if C is None else tuple(C.shape)
    if core != rank:
        raise ShapeError(
            f"U has {rank[0]} columns, V has {rank[1]}, C has shape {core}; they must fit"
        )


def _core_tags(C: Tensor | None, dtype: torch.dtype) -> set[str]:
    """Tags of ``U C U^H``: those that ``C`` provably has."""
    if C is None:
        return {"positive_semidefinite"}
    core = C.detach()
    if not torch.equal(core, core.mH):
        return set()
    diagonal = torch.diagonal(core).real if dtype.is_complex else torch.diagonal(core)
    is_diagonal = torch.equal(core, torch.diag(torch.diagonal(core)))
    return {"positive_semidefinite" if is_diagonal and bool((diagonal >= 0).all()) else "hermitian"}
