"""Tensors that a loss uses without having been given them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from woodbury.errors import GradientError

__all__ = ["require_known_leaves"]


def require_known_leaves(
    loss: Tensor, known: Iterable[Tensor], what: str, names: Mapping[int, str]
) -> None:
    """Raise if ``loss`` depends on a tensor that requires a gradient and is not ``known``.

    Such a tensor (of the model, kept by a criterion) would be a constant of the derivatives.
    """
    allowed = {id(tensor) for tensor in known}
    pending: list[Any] = [loss.grad_fn]
    seen = set(pending)
    while pending:
        node = pending.pop()
        leaf = getattr(node, "variable", None)  # of a node that accumulates into .grad
        if isinstance(leaf, Tensor) and id(leaf) not in allowed:
            name = names.get(id(leaf), f"a tensor of shape {tuple(leaf.shape)}")
            raise GradientError(
                f"the {what} loss uses {name} from outside, whose part of the derivatives would be "
                "lost; let the model compute with it (or put a penalty into WeightDecay), or "
                "detach it"
            )
        parents = [] if node is None else [parent for parent, _ in node.next_functions]
        for parent in parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)
