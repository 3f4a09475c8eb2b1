"""Tags: structure declared by name, with written rules for how algebra keeps or loses it.

| tag | meaning |
| --- | --- |
| ``symmetric`` | ``A.T == A`` |
| ``hermitian`` | ``A.H == A`` (the same as ``symmetric`` for a real dtype) |
| ``positive_semidefinite`` | hermitian and ``x^H A x >= 0`` for all ``x`` |
| ``positive_definite`` | hermitian and ``x^H A x > 0`` for all ``x != 0`` |
| ``diagonal`` | zero off the diagonal |
| ``lower_triangular`` / ``upper_triangular`` | zero above / below the diagonal |
| ``unitary`` | ``A.H @ A == A @ A.H == I`` (orthogonal for a real dtype) |

Implications: positive definite is positive semidefinite is hermitian; diagonal is symmetric and
triangular on both sides; triangular on both sides, or on one and symmetric or hermitian, is
diagonal.

Rules. A tag is a promise by whoever gives it; it is closed under implication and carried through
algebra only where that is a theorem:

- ``A.T``, ``A.H``, conjugation: all tags are kept, ``lower_triangular`` and ``upper_triangular``
  change places.
- ``A + B``: a tag held by both is kept, except ``unitary``; positive definite plus positive
  semidefinite is positive definite.
- ``c * A``: ``symmetric`` and triangular tags are kept for any ``c``; ``hermitian`` for real
  ``c``; ``positive_definite`` for ``c > 0``; ``positive_semidefinite`` for ``c >= 0``; ``unitary``
  for ``|c| = 1``.
- ``A @ B``: ``diagonal``, ``lower_triangular``, ``upper_triangular`` and ``unitary`` are kept where
  both hold them; everything else is lost, except that ``P @ M @ P.H`` is hermitian (positive
  semidefinite) where ``M`` is, positive definite where ``P`` is moreover unitary, and symmetric for
  ``P @ M @ P.T`` where ``M`` is.
- ``A.inverse()``: all tags are kept; positive semidefinite becomes positive definite, because the
  inverse exists.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from woodbury.errors import TagError
from woodbury.operators.dtypes import is_batched

__all__ = ["TAGS", "Tags", "close", "inverse_tags", "scaled_tags", "sum_tags", "transposed_tags"]

Tags = frozenset[str]

TAGS: Tags = frozenset(
    {
        "symmetric",
        "hermitian",
        "positive_semidefinite",
        "positive_definite",
        "diagonal",
        "lower_triangular",
        "upper_triangular",
        "unitary",
    }
)

_IMPLIES = {
    "positive_definite": ("positive_semidefinite",),
    "positive_semidefinite": ("hermitian",),
    "diagonal": ("symmetric", "lower_triangular", "upper_triangular"),
}


def close(tags: Iterable[str], *, complex_dtype: bool, square: bool) -> Tags:
    """The closure of ``tags`` under implication; unknown or impossible tags raise.

    Raises:
        TagError: a name is unknown, or a tag of square matrices is given to a rectangular one.
    """
    if isinstance(tags, str):
        raise TagError(
            f"tags is the string {tags!r}; give a set of names, for example {{{tags!r}}}"
        )
    found = set(tags)
    unknown = sorted(found - TAGS)
    if unknown:
        raise TagError(f"unknown tags {unknown}; known tags are {sorted(TAGS)}")
    if found and not square:
        raise TagError(
            f"tags {sorted(found)} describe square matrices, this operator is not square"
        )
    size = -1
    while len(found) > size:
        size = len(found)
        found |= {implied for tag in found for implied in _IMPLIES.get(tag, ())}
        mirrored = found & {"symmetric", "hermitian"}
        if mirrored and not complex_dtype:
            found |= {"symmetric", "hermitian"}
        sides = found & {"lower_triangular", "upper_triangular"}
        if len(sides) == 2 or (sides and mirrored):
            found.add("diagonal")
    return frozenset(found)


def transposed_tags(tags: Tags) -> Tags:
    """Tags of ``A.T`` (and ``A.H``) from those of ``A``."""
    swap = {"lower_triangular": "upper_triangular", "upper_triangular": "lower_triangular"}
    return frozenset(swap.get(tag, tag) for tag in tags)


def sum_tags(left: Tags, right: Tags) -> Tags:
    """Tags of ``A + B``."""
    tags = (left & right) - {"unitary"}
    if "positive_semidefinite" in tags and "positive_definite" in left | right:
        tags |= {"positive_definite"}
    return tags


def scaled_tags(tags: Tags, factor: complex | Tensor) -> Tags:
    """Tags of ``c * A``; those that no ``c`` takes away where it is a batch of numbers (vmap)."""
    kept = tags & {"symmetric", "diagonal", "lower_triangular", "upper_triangular"}
    if isinstance(factor, Tensor) and is_batched(factor):
        return kept if factor.is_complex() else kept | (tags & {"hermitian"})
    number = complex(factor.item() if isinstance(factor, Tensor) else factor)
    if number.imag == 0:
        kept |= tags & {"hermitian"}
        if number.real > 0:
            kept |= tags & {"positive_semidefinite", "positive_definite"}
        elif number.real == 0:
            kept |= tags & {"positive_semidefinite"}
    if abs(number) == 1:
        kept |= tags & {"unitary"}
    return kept


def inverse_tags(tags: Tags) -> Tags:
    """Tags of the inverse of ``A``, which is taken to exist."""
    if "positive_semidefinite" in tags:
        return tags | {"positive_definite"}
    return tags
