"""Text as batches of tokens that an objective takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.apps.attribute.network import Network
from woodbury.apps.attribute.records import Record
from woodbury.errors import DataError

__all__ = ["IGNORED", "Sequences", "encode"]

IGNORED = -100  # the label of what is not predicted, as in torch and transformers
_MASKED_SHARE = 0.15


@dataclass(frozen=True, eq=False)
class Sequences:
    """Tokenised rows: batches in a fixed order, each padded to its own longest row.

    Labels are **of the same place as the logits that predict them**: those of a causal model are
    shifted by one already, so that ``cross_entropy`` of logits and labels is its loss. The loss of
    a row is the mean over its own predicted tokens.

    Attributes:
        ids: of the tokens, one tensor ``[T_i]`` a row.
        labels: ``[T_i]`` of token numbers (``-100``: not predicted), or ``[]`` of a classifier.
        batch_size: rows of a batch.
        pad: the token that fills up.
        truncated: how many rows were longer than allowed and lost their end.
    """

    ids: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    batch_size: int
    pad: int
    truncated: int = 0

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.ids), self.batch_size):
            yield self._batch(range(start, min(start + self.batch_size, len(self.ids))))

    def _batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        longest = max(len(self.ids[row]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros_like(ids)
        classes = self.labels[rows[0]].dim() == 0
        labels = torch.full((len(rows),) if classes else ids.shape, IGNORED)
        for place, row in enumerate(rows):
            found = self.ids[row]
            ids[place, : len(found)] = found
            mask[place, : len(found)] = 1
            if classes:
                labels[place] = self.labels[row]
            else:
                labels[place, : len(found)] = self.labels[row]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "indices": torch.tensor(list(rows)),
        }

    @property
    def tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(len(row) for row in self.ids)

    def take(self, rows: Sequence[int]) -> Sequences:
        """Some of the rows, in this order."""
        return Sequences(
            tuple(self.ids[row] for row in rows),
            tuple(self.labels[row] for row in rows),
            self.batch_size,
            self.pad,
            self.truncated,
        )


def encode(
    records: Sequence[Record],
    network: Network,
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    file: str = "the file",
) -> Sequences:
    """Tokenise ``records`` for what ``network`` predicts.

    - causal: every token after the first is predicted, of rows with a prompt those of the
      completion;
    - classifier: the class;
    - masked: 15 % of the tokens (at least one) are replaced by the mask token and predicted; which,
      is drawn for each row from ``seed`` and its tokens, so equal rows are masked alike.

    Args:
        records: rows of text.
        network: model and tokenizer.
        max_length: tokens of a row at most; by default what the model takes. Longer rows lose
            their end, and their number is reported.
        batch_size: rows of a batch.
        seed: of the masked tokens.
        file: what messages call the records.

    Raises:
        DataError: a row has nothing to predict, a class is not one of the model's, or the tokenizer
            has no mask token.
    """
    longest = network.context if max_length is None else max_length
    if not 2 <= longest <= network.context:
        raise DataError(
            f"--max-length is {longest}; the model takes 2 to {network.context:,} tokens."
        )
    if batch_size < 1:
        raise DataError(f"--batch-size must be at least 1, not {batch_size}.")
    ids, labels, truncated = [], [], 0
    for record in records:
        where = f"Line {record.line} of {file}"
        row, start = _tokens(record, network)
        truncated += len(row) > longest
        row = row[:longest]
        if not len(row):
            raise DataError(f"{where} has no tokens.")
        row, label = _labelled(row, start, record, network, seed, where)
        ids.append(row)
        labels.append(label)
    return Sequences(tuple(ids), tuple(labels), batch_size, network.pad, truncated)


def _tokens(record: Record, network: Network) -> tuple[Tensor, int]:
    """Tokens of a row, and the place of the first that is predicted.

    Special tokens (a first or last one) are those of any other text.
    """
    tokenizer = network.tokenizer
    whole = tokenizer(record.prompt + record.text)["input_ids"]
    prompt = tokenizer(record.prompt)["input_ids"] if record.prompt else []
    # A token over the seam, or where the prompt alone would end, belongs to the completion.
    shared = 0
    while shared < min(len(prompt), len(whole)) and prompt[shared] == whole[shared]:
        shared += 1
    return torch.tensor(whole, dtype=torch.long), shared


def _labelled(
    row: Tensor, start: int, record: Record, network: Network, seed: int, where: str
) -> tuple[Tensor, Tensor]:
    if network.kind == "classifier":
        return row, torch.tensor(_class(record, network, where))
    if network.kind == "causal":
        if len(row) < 2 or start >= len(row):
            raise DataError(
                f"{where} has {len(row)} tokens and none to predict: a causal model predicts every "
                "token after the first, of a row with a prompt those of the completion."
                + (
                    f" Its prompt fills all that is taken ({len(row)} tokens, see --max-length); "
                    "shorten the prompt or take the row out."
                    if 0 < len(row) <= start
                    else ""
                )
            )
        labels = torch.full_like(row, IGNORED)
        first = max(start, 1)
        labels[first - 1 : -1] = row[first:]
        return row, labels
    return _masked(row, network, seed, where)


def _masked(row: Tensor, network: Network, seed: int, where: str) -> tuple[Tensor, Tensor]:
    mask = network.tokenizer.mask_token_id
    if mask is None:
        raise DataError("The tokenizer has no mask token, which a masked language model needs.")
    special: list[int] = network.tokenizer.get_special_tokens_mask(
        row.tolist(), already_has_special_tokens=True
    )
    open_places = torch.tensor([k for k, flag in enumerate(special) if not flag])
    if not len(open_places):
        raise DataError(f"{where} has no tokens besides special ones.")
    # Seeded by its own tokens: a row is masked in the same way wherever it stands.
    own = hash((seed, *row.tolist())) % 2**63
    generator = torch.Generator().manual_seed(own)
    count = max(1, round(_MASKED_SHARE * len(open_places)))
    chosen = open_places[torch.randperm(len(open_places), generator=generator)[:count]]
    labels = torch.full_like(row, IGNORED)
    labels[chosen] = row[chosen]
    row = row.clone()
    row[chosen] = mask
    return row, labels


def _class(record: Record, network: Network, where: str) -> int:
    label: Any = record.label
    names = network.classes
    if isinstance(label, str):
        if label in names:
            return names.index(label)
        if not label.isdigit():
            raise DataError(
                f"{where} has the class {label!r}, and the model knows {', '.join(names)}."
            )
        label = int(label)
    if not 0 <= label < len(names):
        raise DataError(
            f"{where} has the class {label}, and the model knows 0 to {len(names) - 1}."
        )
    return label
