"""A model of transformers and its tokenizer, read from a folder without the network."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from woodbury.errors import DataError

__all__ = ["KINDS", "Network", "load_network"]

# What a model predicts, and the class of transformers that loads it.
KINDS = {
    "causal": "AutoModelForCausalLM",
    "classifier": "AutoModelForSequenceClassification",
    "masked": "AutoModelForMaskedLM",
}
_SUFFIXES = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForSequenceClassification": "classifier",
    "ForMaskedLM": "masked",
}
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")
_LONGEST = 1_000_000  # tokenizers without a limit say 1e30


@dataclass(frozen=True)
class Network:
    """A model with what is needed to feed it.

    Attributes:
        model: in evaluation mode, with attention written out (it can be differentiated twice).
        tokenizer: of transformers.
        kind: ``"causal"``, ``"classifier"`` or ``"masked"``.
        context: the longest sequence, in tokens.
        pad: the token that fills up shorter sequences.
        classes: names of the classes of a classifier, by number.
        notes: what a reader of the results should know.
    """

    model: nn.Module
    tokenizer: Any
    kind: str
    context: int
    pad: int
    classes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def load_network(
    folder: Path, *, kind: str | None = None, dtype: torch.dtype = torch.float32
) -> Network:
    """Read the model and the tokenizer that ``save_pretrained`` wrote to ``folder``.

    Args:
        folder: with ``config.json``, weights as safetensors, and the files of the tokenizer. No
            code of the folder is run, and nothing is fetched.
        kind: one of :data:`KINDS`; by default what the configuration says.
        dtype: to compute in. Weights in half precision are converted, and a note says so: second
            moments of gradients in half precision would be noise.

    Raises:
        DataError: transformers is not installed, or something about the folder is wrong.
    """
    if find_spec("transformers") is None:
        raise DataError(
            'Language models need transformers. Install it with: pip install "woodbury[text]"'
        )
    stored = _configuration(folder)
    kind = _kind(stored, folder, kind)
    # Without files some tokenizers are made with an empty vocabulary, and every token is unknown.
    if not any(file for glob in _VOCABULARIES for file in folder.glob(glob)):
        raise DataError(
            f"{folder} has no tokenizer. Put the files of the model's own tokenizer there, with "
            "tokenizer.save_pretrained()."
        )
    import transformers
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = _read(transformers.AutoTokenizer, folder, "tokenizer")
        model = _read(
            getattr(transformers, KINDS[kind]),
            folder,
            "model",
            attn_implementation="eager",
            dtype=dtype,
            use_safetensors=True,
        )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    model.eval()
    notes = []
    was = str(stored.get("dtype") or stored.get("torch_dtype") or "")
    if was in ("float16", "bfloat16"):
        notes.append(
            f"The weights are stored in {was}; everything was computed in "
            f"{str(dtype).removeprefix('torch.')}, because second moments of gradients in {was} "
            "are noise."
        )
    bad = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise DataError(f"The weights of {folder} hold NaN or infinity in {bad[0]}.")
    _fits(model, tokenizer, folder)
    return Network(
        model=model,
        tokenizer=tokenizer,
        kind=kind,
        context=_context(model.config, tokenizer),
        pad=_padding(model.config, tokenizer),
        classes=_classes(model.config) if kind == "classifier" else (),
        notes=notes,
    )


def _configuration(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {folder}. Give the folder that model.save_pretrained() wrote."
        )
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder} has no config.json, so it is no model of transformers. Give the folder that "
            "model.save_pretrained() wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object.")
    return found


def _kind(stored: dict[str, Any], folder: Path, asked: str | None) -> str:
    if asked is not None:
        if asked not in KINDS:
            raise DataError(f"--task must be one of {', '.join(KINDS)}, not {asked!r}.")
        return asked
    names = [str(name) for name in stored.get("architectures") or []]
    for name in names:
        for suffix, kind in _SUFFIXES.items():
            if name.endswith(suffix):
                return kind
    raise DataError(
        f"{folder}/config.json names the architecture {', '.join(names) or 'nothing'}, which is "
        "no causal language model, sequence classifier or masked language model. Choose with "
        f"--task {'|'.join(KINDS)} if it can be loaded as one."
    )


def _read(factory: Any, folder: Path, what: str, **settings: Any) -> Any:
    try:
        return factory.from_pretrained(str(folder), local_files_only=True, **settings)
    except Exception as error:
        said = " ".join(str(error).split())[:240]
        raise DataError(
            f"The {what} of {folder} cannot be read ({type(error).__name__}: {said}). It must be "
            f"what {what}.save_pretrained() wrote, with weights as safetensors and no code of its "
            "own."
        ) from None


def _fits(model: Any, tokenizer: Any, folder: Path) -> None:
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise DataError(
            f"The tokenizer of {folder} has {len(tokenizer):,} tokens and the model knows "
            f"{known:,}; they do not belong together."
        )


def _context(config: Any, tokenizer: Any) -> int:
    found = [
        value
        for value in (
            getattr(config, "max_position_embeddings", None),
            getattr(tokenizer, "model_max_length", None),
        )
        if isinstance(value, int | float) and 0 < value < _LONGEST
    ]
    return int(min(found)) if found else 1024


def _padding(config: Any, tokenizer: Any) -> int:
    """Any token will do: padding is masked out of attention and has no label."""
    for value in (tokenizer.pad_token_id, config.pad_token_id, tokenizer.eos_token_id):
        if isinstance(value, int) and value >= 0:
            return value
    return 0


def _classes(config: Any) -> tuple[str, ...]:
    names = getattr(config, "id2label", None) or {}
    return tuple(str(names.get(k, k)) for k in range(config.num_labels))
