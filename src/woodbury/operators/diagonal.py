"""A diagonal matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from woodbury.errors import NonFiniteError, ShapeError, SingularError, TagError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dtypes import is_batched
from woodbury.operators.identity import multiple_of_identity
from woodbury.operators.tags import inverse_tags, scaled_tags, sum_tags, transposed_tags
from woodbury.spaces import Space

__all__ = ["Diagonal"]


class Diagonal(LinearOperator):
    r"""$\operatorname{diag}(d)$.

    Args:
        values: the diagonal ``d``, ``[n]``; kept, not copied.
        tags: further tags. Those about definiteness are verified against the values.
        space: :class:`~woodbury.Space` of its vectors.

    Raises:
        ShapeError: ``values`` is not one-dimensional.
        TagError: a tag is given that the values contradict.

    Cost: a product is ``n k`` multiplications.

    Example:
        >>> import torch
        >>> from woodbury import Diagonal
        >>> D = Diagonal(torch.tensor([1.0, 4.0]), tags={"positive_definite"})
        >>> D.inverse() @ torch.tensor([1.0, 1.0])
        tensor([1.0000, 0.2500])
        >>> D.logdet()
        tensor(1.3863)
    """

    _made_of = ("values",)

    def __init__(
        self, values: Tensor, *, tags: Iterable[str] = (), space: Space | None = None
    ) -> None:
        if values.dim() != 1:
            raise ShapeError(f"the diagonal has shape {tuple(values.shape)}, expected [n]")
        n = values.shape[0]
        given = {"diagonal"} | ({tags} if isinstance(tags, str) else set(tags))
        if not values.dtype.is_complex:
            given.add("hermitian")
        super().__init__((n, n), dtype=values.dtype, device=values.device, tags=given, space=space)
        self.values = values
        self._verify_tags()

    @classmethod
    def _derived(cls, values: Tensor, tags: Iterable[str], space: Space) -> Diagonal:
        """A diagonal whose tags follow from a rule: nothing is verified (no device waits)."""
        self = cls.__new__(cls)
        n = values.shape[0]
        LinearOperator.__init__(
            self, (n, n), dtype=values.dtype, device=values.device, tags=tags, space=space
        )
        self.values = values
        return self

    def _verify_tags(self) -> None:
        if is_batched(self.values):
            return
        for tag, contradicts in _CONTRADICTIONS.items():
            if tag not in self.tags or (tag == "hermitian" and not self.dtype.is_complex):
                continue
            wrong = contradicts(self.values.detach())
            if bool(wrong.any()):
                index = int(wrong.nonzero()[0])
                raise TagError(f"tagged {tag}, but entry {index} is {self.values[index].item()}")

    def _matvec(self, x: Tensor) -> Tensor:
        return self.values * x

    def _matmat(self, X: Tensor) -> Tensor:
        return self.values.unsqueeze(1) * X

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self.values.conj().unsqueeze(1) * Y

    def _to_dense(self) -> Tensor:
        return torch.diag(self.values)

    def _diagonal(self) -> Tensor:
        return self.values.clone()

    def _trace(self) -> Tensor:
        return self.values.sum()

    def _logdet(self) -> Tensor:
        self._require_invertible()
        return self.values.abs().log().sum()

    def _inverse(self) -> LinearOperator:
        self._require_invertible()
        return Diagonal._derived(self.values.reciprocal(), inverse_tags(self.tags), self.space)

    def _require_invertible(self) -> None:
        values = self.values.detach()
        finite = torch.isfinite(values)
        # The reciprocal of a subnormal number overflows: it is as singular as a zero.
        bad = torch.where(finite, ~torch.isfinite(values.reciprocal()), True)
        if not bool(bad.any()):
            return
        index = int(bad.nonzero()[0])
        if not bool(finite[index]):
            raise NonFiniteError(f"entry {index} of the diagonal is {values[index].item()}")
        raise SingularError(
            f"entry {index} of the diagonal is {values[index].item()}, so it has no inverse; add "
            "a multiple of the identity"
        )

    def _transpose(self) -> LinearOperator:
        return self

    def _adjoint(self) -> LinearOperator:
        return Diagonal._derived(self.values.conj(), transposed_tags(self.tags), self.space)

    def _scale(self, factor: complex | Tensor) -> LinearOperator:
        tags = scaled_tags(self.tags, factor)
        return Diagonal._derived(factor * self.values, tags, self.space)

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, Diagonal):
            values = self.values + other.values
        else:
            factor = multiple_of_identity(other)
            if factor is None:
                return None
            values = self.values + factor
        return Diagonal._derived(values, sum_tags(self.tags, other.tags), self.space)

    def _compose(self, other: LinearOperator) -> LinearOperator | None:
        if not isinstance(other, Diagonal):
            return None
        tags = {"diagonal"} | (self.tags & other.tags & {"unitary", "hermitian"})
        for tag in ("positive_semidefinite", "positive_definite"):
            tags |= self.tags & other.tags & {tag}  # real non-negative times real non-negative
        return Diagonal._derived(self.values * other.values, tags, self.space)


_CONTRADICTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hermitian": lambda values: values.imag != 0,
    "positive_definite": lambda values: values.real <= 0,
    "positive_semidefinite": lambda values: values.real < 0,
    "unitary": lambda values: (values.abs() - 1).abs() > 8 * torch.finfo(values.dtype).eps,
}
