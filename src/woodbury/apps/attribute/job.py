"""The job behind ``woodbury attribute``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from woodbury import __version__
from woodbury._files import atomic
from woodbury.apps.attribute.layers import LAYERS, choose_layers
from woodbury.apps.attribute.network import Network, load_network
from woodbury.apps.attribute.pages import certificate_lines, query_pages
from woodbury.apps.attribute.records import Record, read_records
from woodbury.apps.attribute.report import write_report
from woodbury.apps.attribute.sequences import Sequences, encode
from woodbury.apps.files import writable_folder, write_json
from woodbury.apps.progress import Display
from woodbury.apps.settings import check_seed, parse_bytes
from woodbury.curvature import EKFAC, KFAC, Objective
from woodbury.errors import DataError
from woodbury.influence import Influence, Scores, TfIdf

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MATRICES", "AttributeResult", "attribute"]

MATRICES = ("ekfac", "kfac", "diagonal", "identity", "gauss_newton")
_WORDS = {
    "ekfac": "EK-FAC",
    "kfac": "K-FAC",
    "diagonal": "the diagonal of the empirical Fisher matrix",
    "identity": "products of gradients (no curvature)",
    "gauss_newton": "the Gauss-Newton matrix, by conjugate gradients",
}
_KINDS = {
    "causal": "causal language model",
    "classifier": "sequence classifier",
    "masked": "masked language model",
}


@dataclass(frozen=True, eq=False)
class AttributeResult:
    """What a run found.

    Attributes:
        scores: of every query (rows) and scored training row (columns); negative scores lower the
            loss of the query and speak for it.
        table: one line for each query and training row, strongest support first: ``query``,
            ``query_line``, ``row``, ``line`` (of the files), ``score``.
        summary: what ``summary.json`` holds: JSON values.
        folder: where the files are; ``None`` where nothing was written.

    Example:
        >>> from woodbury.apps.attribute import AttributeResult
        >>> AttributeResult.__name__
        'AttributeResult'
    """

    scores: Scores
    table: pd.DataFrame
    summary: dict[str, Any]
    folder: Path | None


def attribute(
    model: str | Path,
    train: str | Path,
    query: str | Path,
    *,
    text: str = "text",
    label: str = "label",
    task: str | None = None,
    matrix: str = "ekfac",
    layers: str = "linear",
    damping: float | None = None,
    tolerance: float = 0.01,
    keep: int | None = None,
    top: int = 10,
    max_length: int | None = None,
    batch_size: int = 8,
    budget: str | int = "4GiB",
    seed: int = 0,
    out: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    progress: bool = False,
) -> AttributeResult:
    r"""Rank training sequences by their influence on the loss of queries.

    Args:
        model: folder that ``save_pretrained`` wrote: a causal language model, a sequence
            classifier or a masked language model of transformers with its tokenizer. No code of it
            is run, and nothing is fetched.
        train: JSON Lines with the sequences it was trained on.
        query: JSON Lines with the sequences that are asked about.
        text: field of the text; rows may have ``prompt`` and ``completion`` instead.
        label: field of the class, for classifiers.
        task: ``"causal"``, ``"classifier"`` or ``"masked"``; by default what the model says.
        matrix: ``"ekfac"``, ``"kfac"``, ``"diagonal"``, ``"identity"`` or ``"gauss_newton"``.
        layers: whose parameters count: ``"linear"`` (all linear layers, without embeddings and
            what is tied to them), ``"mlp"`` (of those the ones outside of attention, as in the
            paper), ``"all"``.
        damping: absolute; by default 0.1 of the mean eigenvalue, for K-FAC and EK-FAC of each
            layer.
        tolerance: relative error that a faster form of the scores may cost; 0 for exact ones.
        keep: score only this many training rows for each query, those that share the rarest tokens
            with it (TF-IDF); all by default.
        top: rows of a list in the report.
        max_length: tokens of a row at most; longer rows lose their end.
        batch_size: rows of a batch.
        budget: memory for scores, gradients and solves.
        seed: of sampled labels and masks.
        out: folder for ``scores.parquet``, ``summary.json`` and ``attribution.html``; a run that
            was killed goes on there. Nothing is written if not given.
        say: called with what is known before the work starts: what it will take.
        progress: whether to show it.

    Returns:
        An :class:`AttributeResult`.

    Raises:
        DataError: something about the input is wrong; the message says what to do.
        BudgetError: the budget is too small.

    Cost: EK-FAC takes two passes over the training rows, scores one more; for each query the rows
    in its lists are passed once more for their tokens.

    Example:
        >>> from woodbury.apps.attribute import attribute
        >>> attribute("no-model", "train.jsonl", "query.jsonl")
        Traceback (most recent call last):
            ...
        woodbury.errors.DataError: There is no folder no-model. ...
    """
    started = time.perf_counter()
    _check(matrix, layers, damping, tolerance, keep, top, seed)
    memory = parse_bytes(budget)
    with Display(quiet=not progress) as display:
        display("reading", 0.0)
        network = load_network(Path(model), kind=task)
        field = label if network.kind == "classifier" else None
        rows = read_records(Path(train), text=text, label=field)
        asked = read_records(Path(query), text=text, label=field)
        options: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size, "seed": seed}
        sequences = encode(rows, network, file=Path(train).name, **options)
        queries = encode(asked, network, file=Path(query).name, **options)
        folder = None if out is None else writable_folder(Path(out))
        work = None if folder is None else folder / "work"
        chosen = _similar(sequences, queries, keep)
        params = choose_layers(network.model, layers)
        objective = Objective(network.model, "cross_entropy", sequences, params=params)
        influence = Influence(
            objective,
            matrix=_matrix(matrix, seed, work),
            damping=damping,
            tolerance=tolerance,
            memory=memory,
            progress=display,
        )
        if say is not None:
            say(_forecast(influence, objective, sequences, queries, chosen, matrix))
        display("fitting the curvature", 0.0)
        stored = None if work is None else work / "scores"
        scores = influence.scores(queries, rows=chosen, folder=stored)
        losses = objective.with_data(queries).per_example_losses().tolist()
        display("tokens", 0.0)
        pages = query_pages(
            influence, scores, sequences, queries, network, rows, asked, losses, top
        )
        table = _table(scores, rows, asked)
        summary = {
            "model": str(model),
            "kind": _KINDS[network.kind],
            "train": str(train),
            "query": str(query),
            "queries": len(asked),
            "train_rows": len(rows),
            "train_rows_scored": len(rows) if chosen is None else len(chosen),
            "train_tokens": sequences.tokens,
            "truncated_rows": sequences.truncated,
            "parameters": objective.space.dim,
            "share_of_parameters": objective.space.dim / _count(network),
            "layers": layers,
            "matrix": _WORDS[matrix],
            "damping": scores.settings["damping"],
            "query_losses": losses,
            "certificate": scores.certificate(),
            "notes": _notes(network, sequences, queries, keep),
            "version": __version__,
            "seconds": round(time.perf_counter() - started, 3),
        }
        if folder is not None:
            display("writing", 0.0)
            with atomic(folder / "scores.parquet") as temporary:
                table.to_parquet(temporary, index=False)
            write_json(summary, folder / "summary.json")
            write_report(
                summary, pages, certificate_lines(influence, summary), folder / "attribution.html"
            )
            display("writing", 1.0)
    return AttributeResult(scores, table, summary, folder)


def _check(
    matrix: str,
    layers: str,
    damping: float | None,
    tolerance: float,
    keep: int | None,
    top: int,
    seed: int,
) -> None:
    if matrix not in MATRICES:
        raise DataError(f"--matrix must be one of {', '.join(MATRICES)}, not {matrix!r}.")
    if layers not in LAYERS:
        raise DataError(f"--layers must be one of {', '.join(LAYERS)}, not {layers!r}.")
    if damping is not None and not 0 <= damping < math.inf:
        raise DataError(f"--damping must be 0 or more, not {damping}.")
    if not 0 <= tolerance < 1:
        raise DataError(f"--tolerance must be at least 0 and below 1, not {tolerance}.")
    for name, value in (("keep", keep), ("top", top)):
        if value is not None and value < 1:
            raise DataError(f"--{name} must be at least 1, not {value}.")
    check_seed(seed)


def _similar(sequences: Sequences, queries: Sequences, keep: int | None) -> Tensor | None:
    """The training rows that share rare tokens with a query, ascending."""
    if keep is None or keep >= len(sequences.ids):
        return None
    index = TfIdf(row.tolist() for row in sequences.ids)
    found = [index.top(row.tolist(), keep) for row in queries.ids]
    chosen = torch.cat(found).unique()
    if not len(chosen):
        raise DataError("No training row shares a token with a query; leave --keep away.")
    return chosen


def _matrix(matrix: str, seed: int, work: Path | None) -> Any:
    """EK-FAC and K-FAC with what they need to go on after a kill."""
    if matrix not in ("ekfac", "kfac"):
        return matrix
    make = EKFAC if matrix == "ekfac" else KFAC
    checkpoint = None
    if work is not None:
        work.mkdir(exist_ok=True)
        checkpoint = work / f"{matrix}.safetensors"

    def fit(objective: Objective) -> KFAC:
        generator = torch.Generator().manual_seed(seed)
        return make(objective, generator=generator, checkpoint=checkpoint)

    return fit


def _forecast(
    influence: Influence,
    objective: Objective,
    sequences: Sequences,
    queries: Sequences,
    chosen: Tensor | None,
    matrix: str,
) -> str:
    """What the run will take, in words, from the gradients of one batch."""
    started = time.perf_counter()
    few = objective.with_data(sequences.take(range(min(sequences.batch_size, len(sequences.ids)))))
    few.gradient()
    batch = time.perf_counter() - started
    passes = {"ekfac": 3, "kfac": 2, "gauss_newton": 1, "diagonal": 2, "identity": 1}[matrix]
    rows = len(sequences.ids) if chosen is None else len(chosen)
    numbers = rows * len(queries.ids)
    text = (
        f"{len(queries.ids):,} queries x {rows:,} training rows ({sequences.tokens:,} tokens), "
        f"{objective.space.dim:,} parameters: {passes} passes over the training rows of about "
        f"{batch * len(sequences):.0f} s each"
    )
    if matrix == "gauss_newton":
        text += ", and for every query a solve of up to hundreds of passes"
    vector = objective.space.dim * 4
    factors = 4 * vector if matrix in ("ekfac", "kfac") else vector
    return f"{text}; about {(factors + 4 * numbers) / 2**20:,.0f} MiB for curvature and scores."


def _table(scores: Scores, rows: list[Record], asked: list[Record]) -> pd.DataFrame:
    table = scores.to_frame()
    table.insert(1, "query_line", [asked[q].line for q in table["query"]])
    table.insert(3, "line", [rows[row].line for row in table["row"]])
    return table


def _count(network: Network) -> int:
    return sum(p.numel() for p in network.model.parameters())


def _notes(
    network: Network, sequences: Sequences, queries: Sequences, keep: int | None
) -> list[str]:
    notes = list(network.notes)
    for what, found in (("training rows", sequences), ("queries", queries)):
        if found.truncated:
            notes.append(
                f"{found.truncated:,} {what} were longer than allowed and lost their end; their "
                "scores are of what was left. See --max-length."
            )
    if keep is not None:
        notes.append(
            f"Only rows among the {keep:,} most similar in words to a query were scored. Rows that "
            "share no rare word with a query are not found, whatever their influence."
        )
    if network.kind == "masked":
        notes.append(
            "The loss of a row is that of 15 % of its tokens, which are masked; which of them is "
            "drawn from the seed and the row."
        )
    return notes
