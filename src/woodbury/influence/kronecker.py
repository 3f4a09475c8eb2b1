"""Inverses of layers, from a matrix that is given by Kronecker factors and eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from woodbury.curvature import KFAC, VectorBlock
from woodbury.curvature.layer_matrix import LayerMatrix
from woodbury.curvature.layers import MatrixBlock
from woodbury.errors import SingularError, StructureError
from woodbury.influence.eigenbasis import EigenBlock, VectorInverse
from woodbury.operators import Dense, Eigendecomposed, Identity, Kronecker, LinearOperator

__all__ = ["layer_inverses", "one_by_one"]


def layer_inverses(matrix: KFAC, damped: LayerMatrix) -> dict[str, EigenBlock | VectorInverse]:
    """The inverse of every block of ``damped``, whose layers are those of ``matrix``.

    Raises:
        SingularError: an eigenvalue is not positive.
        StructureError: a block is not given by eigenvectors and eigenvalues.
    """
    found: dict[str, EigenBlock | VectorInverse] = {}
    for name, layer in matrix.layers.items():
        block = damped.blocks[name]
        if not isinstance(block, Eigendecomposed):
            raise StructureError(
                f"the block of {name!r} is a {type(block).__name__}, not given by eigenvectors; "
                "give a recipe, for example CG(), to invert it by products"
            )
        least, largest = float(block.values.amin()), float(block.values.amax())
        if not least > torch.finfo(block.values.dtype).eps * largest:
            raise SingularError(
                f"an eigenvalue of the layer {name!r} is {least:.3g}; add damping, for example "
                "damping=RelativeDamping(0.1)"
            )
        inverse, basis = block.values.reciprocal(), block.basis
        if isinstance(layer, MatrixBlock) and isinstance(basis, Kronecker):
            left, right = (_vectors(factor) for factor in basis.factors)
            plain = matrix.blocks[name]
            assert isinstance(plain, Eigendecomposed)  # adding damping keeps the form
            shape = layer.p, layer.m
            found[name] = EigenBlock(
                layer, left, right, inverse.view(shape), plain.values.view(shape)
            )
        else:
            assert isinstance(layer, VectorBlock)  # what has no Kronecker form
            vectors = _vectors(basis)
            whole = inverse if vectors is None else (vectors * inverse) @ vectors.T
            found[name] = VectorInverse(layer, whole)
    return found


def one_by_one(inverses: Mapping[str, EigenBlock | VectorInverse]) -> list[str]:
    """Parameters that the matrix has as blocks of their own, and not as parts of a layer."""
    vectors = (one.block for one in inverses.values() if isinstance(one, VectorInverse))
    return [block.name for block in vectors if block.parameters == (block.name,)]


def _vectors(basis: LinearOperator) -> torch.Tensor | None:
    if isinstance(basis, Identity):
        return None
    assert isinstance(basis, Dense)  # made by KFAC
    return basis.matrix
