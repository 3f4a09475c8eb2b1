"""A model as a pure function of some of its parameters: nothing of the model is changed by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from woodbury.curvature.batches import Batch, split
from woodbury.errors import ArgumentError, DataError, GradientError, NonDeterministicError

__all__ = ["ModuleFunction", "Selection", "output_tensor", "select_parameters"]

Selection = Iterable[str] | Iterable[Tensor] | Callable[[str, Tensor], bool] | None


def select_parameters(model: nn.Module, params: Selection) -> dict[str, Tensor]:
    """The parameters of ``model`` an objective is a function of, by name, in the model's order.

    Tied weights appear once, under the first of their names.

    Raises:
        ArgumentError: ``params`` names or holds what the model does not have.
        GradientError: nothing is selected.
    """
    available = dict(model.named_parameters())
    if params is None or callable(params):
        chosen: dict[str, Tensor] = {
            name: p
            for name, p in available.items()
            if p.requires_grad and (params is None or params(name, p))
        }
    else:
        wanted = {_canonical(model, available, item) for item in _listed(params)}
        chosen = {name: p for name, p in available.items() if name in wanted}
    if not chosen:
        raise GradientError(
            f"no parameter is selected; {type(model).__name__} has {len(available)}, of which "
            f"{sum(p.requires_grad for p in available.values())} require a gradient"
        )
    return chosen


def _listed(params: Any) -> list[Any]:
    if isinstance(params, str | Tensor) or not isinstance(params, Iterable):
        raise ArgumentError(
            f"params is a {type(params).__name__}; give a list of names, a list of parameters, or "
            "a function (name, parameter) -> bool"
        )
    return list(params)


def _canonical(model: nn.Module, available: dict[str, nn.Parameter], item: str | Tensor) -> str:
    aliases = dict(model.named_parameters(remove_duplicate=False))
    parameter = aliases.get(item) if isinstance(item, str) else item
    for name, candidate in available.items():
        if candidate is parameter:
            return name
    what = f"called {item!r}" if isinstance(item, str) else f"of shape {tuple(item.shape)}"
    raise ArgumentError(
        f"the model has no parameter {what}; it has {', '.join(available) or 'none'}"
    )


class ModuleFunction:
    """``(params, batch) -> output`` of a module, free of side effects.

    Parameters that are not selected are constants. Buffers are those of the moment this is made. In
    mode ``"eval"`` dropout and batch norm are frozen. In mode ``"train"`` dropout draws the same
    numbers for a batch at every call, and batch norm uses the statistics of the batch. ``flags``,
    one for each of ``model.modules()``, says which of them are in training mode in mode ``"train"``
    (default all).
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        mode: str,
        seed: int,
        flags: Sequence[bool] | None = None,
    ) -> None:
        if mode not in ("eval", "train"):
            raise ArgumentError(f"mode is {mode!r}; use 'eval' or 'train'")
        self.model = model
        self.training = mode == "train"
        self.flags = [self.training for _ in model.modules()] if flags is None else flags
        self.seed = seed
        self.device = next(iter(params.values())).device
        others = {name: p.detach() for name, p in model.named_parameters() if name not in params}
        self.constants = others
        self.buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.weight_norm = any(_has_weight_norm(module) for module in model.modules())

    def __call__(self, params: Mapping[str, Tensor], batch: Batch) -> Any:
        """What the model returns for a batch."""
        args, kwargs, _ = split(batch.data)
        buffers = self.buffers
        if self.training:
            buffers = {name: b.clone() for name, b in buffers.items()}
        versions = [b._version for b in buffers.values()]
        values = {**self.constants, **params, **buffers}
        exact = _ExactWeightNorm() if self.weight_norm else nullcontext()
        with self._modes(), self._randomness(batch), exact, _no_recomputation():
            result = functional_call(self.model, values, args, kwargs, tie_weights=True)
        if not self.training:
            changed = [
                n for v, (n, b) in zip(versions, buffers.items(), strict=True) if b._version != v
            ]
            if changed:
                raise NonDeterministicError(
                    f"the model changes its buffers {changed} in evaluation mode, so two "
                    "evaluations differ; use mode='train', where every call starts from the same "
                    "buffers"
                )
        return result

    def require_shifted(self, batch: Batch) -> None:
        """Raise where a causal language model is given its own inputs for labels.

        Models of transformers shift such labels in a loss of their own; a criterion compares
        logits and labels place by place.

        Raises:
            DataError: the labels are the inputs, not what follows them.
        """
        names = [type(module).__name__ for module in self.model.modules()]
        causal = next((n for n in names if n.endswith(("ForCausalLM", "LMHeadModel"))), None)
        data = batch.data
        if causal is None or not isinstance(data, Mapping):
            return
        ids, labels = data.get("input_ids"), data.get("labels")
        if not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
            return
        if ids.shape != labels.shape or ids.dim() != 2:
            return
        counted = labels >= 0
        follows = bool((labels == ids.roll(-1, 1))[counted].all())
        if bool(counted.any()) and not follows and torch.equal(labels[counted], ids[counted]):
            raise DataError(
                f"the labels of batch {batch.index} are its input_ids, place by place, and "
                f"{causal} predicts at each place the token after it; shift them: labels = "
                "input_ids.roll(-1, 1), with -100 in the last column and where there is padding"
            )

    @contextmanager
    def _modes(self) -> Iterator[None]:
        before = [(module, module.training) for module in self.model.modules()]
        for (module, _), flag in zip(before, self.flags, strict=True):
            module.training = flag
        fast = torch.backends.mha.get_fastpath_enabled()
        # One implementation with and without gradients, and one that can be differentiated twice.
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, training in before:
                module.training = training

    @contextmanager
    def _randomness(self, batch: Batch) -> Iterator[None]:
        if not self.training:
            yield
            return
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.default_generator.manual_seed(self.seed + batch.index)
            if cuda:
                torch.cuda.manual_seed(self.seed + batch.index)
            yield


@contextmanager
def _no_recomputation() -> Iterator[None]:
    """Refuse activation checkpointing.

    It would run parts of the module again during the backward pass, where the module has its own
    parameters, buffers and modes, and not those of the objective.
    """
    message = (
        "the model uses activation checkpointing (or other hooks on saved tensors), whose second "
        "forward pass would not see the objective's parameters and mode; turn it off "
        "(model.gradient_checkpointing_disable() in transformers): what operators keep is bounded "
        "by their argument cache"
    )
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(message):
            yield
    except RuntimeError as error:
        if message in str(error):
            raise GradientError(message) from None
        raise


class _ExactWeightNorm(TorchFunctionMode):
    """Weight norm written out: the second derivative of torch's fused one is wrong (seen in 2.13).

    ``gradgradcheck`` of ``torch._weight_norm`` fails, and Hessians come out asymmetric.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch._weight_norm:
            v, g, dim = (*args, 0)[:3]
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **(kwargs or {}))


def _has_weight_norm(module: nn.Module) -> bool:
    hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    return type(module).__name__ == "_WeightNorm" or "WeightNorm" in hooks


def output_tensor(result: Any, size: int) -> tuple[Tensor, bool]:
    """The predictions in what a model returned, and whether they are Hugging Face's ``logits``.

    Raises:
        DataError: there is no tensor of predictions, or not one row for each of ``size`` examples.
    """
    named = False
    output = result
    if not isinstance(result, Tensor):
        logits = (
            result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
        )
        named = isinstance(logits, Tensor)
        output = logits if named else None
        if output is None and isinstance(result, tuple | list) and result:
            output = result[0]
    if not isinstance(output, Tensor):
        raise DataError(
            f"the model returned {type(result).__name__}; it must return a tensor, a tuple that "
            "starts with one, or an object with 'logits'"
        )
    if output.dim() == 0 or output.shape[0] != size:
        raise DataError(
            f"the model returned shape {tuple(output.shape)} for {size} examples; the first axis "
            "must be the examples"
        )
    return output, named
