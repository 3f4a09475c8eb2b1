"""Which parameters of a model count in its scores."""

from __future__ import annotations

import re

from torch import nn

from woodbury.errors import DataError

__all__ = ["LAYERS", "choose_layers"]

LAYERS = ("linear", "mlp", "all")
_ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|crossattention)([._]|$)")


def choose_layers(model: nn.Module, layers: str) -> list[str]:
    """Names of the parameters.

    Args:
        model: of transformers.
        layers: ``"linear"``: weights and biases of linear layers (and of ``Conv1D`` of
            transformers), but not what is tied to an embedding. ``"mlp"``: those of them that are
            not in an attention module. ``"all"``: everything.

    Raises:
        DataError: there are none.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    if layers == "all":
        return list(names.values())
    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    chosen = []
    for path, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            continue
        if layers == "mlp" and _ATTENTION.search(path):
            continue
        own = list(module.parameters(recurse=False))
        if embeddings.isdisjoint(own):
            chosen += [names[parameter] for parameter in own]
    if not chosen:
        raise DataError(
            f"{type(model).__name__} has no layers that --layers {layers} means; take --layers all."
        )
    return list(dict.fromkeys(chosen))
