"""Tiny models of transformers with a tokenizer of characters, saved as users save theirs."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

LETTERS = "\n !',-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def character_tokenizer() -> transformers.PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[MASK]"]
    vocabulary = {token: k for k, token in enumerate([*special, *LETTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )


def tiny(kind: str, *, width: int = 8, layers: int = 1, context: int = 24, classes: int = 3):
    """A model of ``kind`` with random weights."""
    torch.manual_seed(0)
    words = len(character_tokenizer())
    if kind == "causal":
        config = transformers.GPT2Config(
            vocab_size=words,
            n_positions=context,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        attn_implementation="eager",
        intermediate_size=2 * width,
        max_position_embeddings=context,
        num_labels=classes,
        pad_token_id=0,
    )
    if kind == "masked":
        return transformers.BertForMaskedLM(config)
    return transformers.BertForSequenceClassification(config)


def saved(folder: Path, kind: str, model=None) -> Path:
    model = tiny(kind) if model is None else model
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder
