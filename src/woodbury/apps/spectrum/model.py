"""A model, its weights and its data as a curvature operator, without running any pickle."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from woodbury.apps.spectrum.matrix import Source
from woodbury.curvature import Fisher, GaussNewton, Hessian, Objective
from woodbury.errors import DataError

__all__ = ["CRITERIA", "DTYPES", "MATRICES", "read_model"]

CRITERIA = ("cross_entropy", "mse", "bce")
MATRICES = ("hessian", "gauss-newton", "fisher")
DTYPES = ("auto", "float32", "float64")
_BATCH = 1024
_SHOWN = 5


def read_model(
    model: str,
    *,
    weights: Path | None,
    data: Path | None,
    criterion: str,
    matrix: str,
    l2: float,
    dtype: str,
    cache: int,
) -> Source:
    """Build the operator.

    Args:
        model: ``module:factory``; the factory is called without arguments and returns a module.
        weights: safetensors; ``None`` keeps what the factory made.
        data: NPZ with arrays ``X`` and ``y``.
        criterion: one of :data:`CRITERIA`.
        matrix: one of :data:`MATRICES`.
        l2: of the regulariser.
        dtype: one of :data:`DTYPES`; the precision to compute in.
        cache: bytes for what the operator keeps between products.

    Raises:
        DataError: something is missing or does not fit; the message says what to do.
    """
    for name, value, allowed in (
        ("criterion", criterion, CRITERIA),
        ("matrix", matrix, MATRICES),
        ("dtype", dtype, DTYPES),
    ):
        if value not in allowed:
            raise DataError(f"--{name} must be one of {', '.join(allowed)}, not {value!r}.")
    if not (l2 >= 0 and np.isfinite(l2)):
        raise DataError(f"--l2 must be 0 or more, not {l2}.")
    if data is None:
        raise DataError("A model needs --data FILE.npz, with arrays X and y.")
    network = _build(model)
    notes = []
    if weights is None:
        notes.append("No --weights were given: the weights are those that the factory made.")
    else:
        _load(network, weights)
    if dtype != "auto":
        network.to(getattr(torch, dtype))
    parameter = next((p for p in network.parameters() if p.requires_grad), None)
    if parameter is None:
        raise DataError(f"The network of {model} has no parameters that require a gradient.")
    network.eval()
    X, y = _read(data, criterion, parameter.dtype)
    _fit(network, X, y, criterion, data.name)
    batches = list(zip(X.split(_BATCH), y.split(_BATCH), strict=True))
    loss: Any = nn.BCEWithLogitsLoss() if criterion == "bce" else criterion
    objective = Objective(network, loss, batches, l2=l2)
    kinds = {"hessian": Hessian, "gauss-newton": GaussNewton, "fisher": Fisher}
    operator = kinds[matrix](objective, cache=cache)
    facts = {
        "model": model,
        "weights": None if weights is None else str(weights),
        "data": str(data),
        "examples": len(X),
        "parameters": objective.space.dim,
        "criterion": criterion,
        "matrix": matrix,
        "l2": l2,
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }
    words = {"hessian": "Hessian", "gauss-newton": "Gauss-Newton matrix", "fisher": "Fisher matrix"}
    return Source(operator, f"{words[matrix]} of {model}", facts, notes)


def _build(model: str) -> nn.Module:
    if re.search(r"\.(pt2?|pth|pkl|pickle|bin|ckpt)$", model):
        raise DataError(
            f"{model} is a file that can hold code, which reading it would run. Give --model "
            "module:factory (a function of yours that builds the network) and its weights as "
            "--weights FILE.safetensors."
        )
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", model) is None:
        raise DataError(
            f"--model is {model!r}. Write it as module:factory, for example my_module:make_model "
            "for the function make_model of my_module.py."
        )
    module_name, name = model.split(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if not (module_name == missing or module_name.startswith(missing + ".")):
            raise DataError(
                f"{module_name} needs the module {missing!r}, which is not installed here."
            ) from None
        raise DataError(
            f"There is no module {module_name!r} that Python can import from {here}. Run the "
            "command in the folder of the file, or install the package."
        ) from None
    except Exception as error:
        raise DataError(f"Importing {module_name} failed with {_said(error)}.") from None
    finally:
        sys.path.remove(here)
    factory = getattr(module, name, None)
    if factory is None:
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise DataError(
            f"The module {module_name} has no {name!r}. It has: "
            f"{', '.join(known[:8]) or 'nothing'}."
        )
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise DataError(f"{model} is not a function, but a {type(factory).__name__}.")
    try:
        network = factory()
    except Exception as error:
        raise DataError(
            f"Calling {name}() of {module_name} failed with {_said(error)}. It is called without "
            "arguments."
        ) from None
    if not isinstance(network, nn.Module):
        raise DataError(
            f"{name}() of {module_name} returned a {type(network).__name__}; it must return a "
            "torch.nn.Module."
        )
    return network


def _load(network: nn.Module, path: Path) -> None:
    if not path.exists():
        raise DataError(f"There is no file {path}.")
    if path.suffix != ".safetensors":
        raise DataError(
            f"{path.name} is not a safetensors file, and other formats can hold code. Save the "
            "weights with safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')."
        )
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except Exception as error:
        raise DataError(f"{path.name} cannot be read as safetensors ({_said(error)}).") from None
    wanted = network.state_dict()
    # Tied weights are stored under one of their names.
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    tied = {t.data_ptr() for name, t in wanted.items() if name in state and t.numel()}
    missing = [name for name in missing if wanted[name].data_ptr() not in tied]
    if missing or extra:
        raise DataError(
            f"{path.name} does not fit the network: missing {_some(missing)}, unknown "
            f"{_some(extra)}. Give the weights of this network."
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise DataError(
                f"{path.name} does not fit the network: {name} has shape {list(tensor.shape)}, the "
                f"network needs {list(wanted[name].shape)}."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{path.name} holds NaN or infinity in {name}.")
    network.load_state_dict(state, strict=False)


def _read(path: Path, criterion: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if not path.exists():
        raise DataError(f"There is no file {path}.")
    try:
        with np.load(path, allow_pickle=False) as stored:
            if not hasattr(stored, "files"):
                raise DataError(f"{path.name} holds one array. Save two: np.savez(file, X=X, y=y).")
            absent = [name for name in ("X", "y") if name not in stored.files]
            if absent:
                raise DataError(
                    f"{path.name} has no array {' and '.join(absent)}; it has "
                    f"{', '.join(stored.files) or 'none'}. Save it with np.savez(file, X=X, y=y)."
                )
            X, y = stored["X"], stored["y"]
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path.name} cannot be read as NPZ without running code ({_said(error)}). Save "
            "numbers with np.savez(file, X=X, y=y)."
        ) from None
    for name, array in (("X", X), ("y", y)):
        if array.dtype.kind not in "fiub":
            raise DataError(f"{name} of {path.name} is {array.dtype}; it must hold numbers.")
        if array.ndim == 0 or len(array) == 0:
            raise DataError(f"{name} of {path.name} is empty.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            place = tuple(int(k) for k in np.argwhere(~np.isfinite(array))[0])
            raise DataError(f"{name} of {path.name} holds NaN or infinity, first at {place}.")
    if len(X) != len(y):
        raise DataError(f"X of {path.name} has {len(X)} rows and y has {len(y)}.")
    inputs = torch.from_numpy(np.ascontiguousarray(X))
    targets = torch.from_numpy(np.ascontiguousarray(y))
    # Whole numbers are tokens or indices; a network that wants numbers gets them from floats.
    inputs = inputs.to(dtype) if X.dtype.kind in "fb" or X.dtype == np.uint8 else inputs.long()
    if criterion != "cross_entropy":
        return inputs, targets.to(dtype)
    if y.dtype.kind == "f" and not (y == np.round(y)).all():
        raise DataError(
            f"y of {path.name} holds {y[y != np.round(y)][0]}; cross_entropy needs class "
            "numbers 0, 1, 2, ... For quantities take --criterion mse."
        )
    return inputs, targets.long()


def _fit(network: nn.Module, X: Tensor, y: Tensor, criterion: str, name: str) -> None:
    """Raise unless the network takes the data and gives outputs that the criterion takes."""
    try:
        with torch.no_grad():
            output = network(X[:2])
    except Exception as error:
        raise DataError(
            f"The network does not take X of {name} ({list(X.shape)}, {X.dtype}): {_said(error)}."
        ) from None
    output = output[0] if isinstance(output, tuple | list) else output
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise DataError(f"The network returns a {type(output).__name__}, not a tensor.")
    if criterion == "cross_entropy":
        if output.dim() < 2:
            raise DataError(
                f"The network returns {list(output.shape)} for 2 rows; cross_entropy needs one "
                "score per class: [rows, classes]."
            )
        classes, low, high = output.shape[1], int(y.min()), int(y.max())
        if low < 0 or high >= classes:
            raise DataError(
                f"y of {name} has classes {low} to {high}, the network scores for 0 to "
                f"{classes - 1}."
            )
    elif output.shape[1:] != y.shape[1:]:
        raise DataError(
            f"The network returns {['rows', *output.shape[1:]]}, y of {name} is "
            f"{['rows', *y.shape[1:]]}. Reshape y, for example y[:, None]."
        )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"[{shown}]"
