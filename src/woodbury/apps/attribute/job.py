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
from woodbury.influence.runs import Run, fingerprint

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
# Passes of a fit over the training rows, and what the user reads meanwhile.
_FITTING = {"factors": "fitting the curvature", "corrected eigenvalues": "fitting its eigenvalues"}
_KINDS = {
    "causal": "causal language model",
    "classifier": "sequence classifier",
    "masked": "masked language model",
}


@dataclass(frozen=True, eq=False)
class AttributeResult:
    r"""What a run found.

    Attributes:
        scores: of every query (rows) and scored training row (columns); negative scores lower the
            loss of the query and speak for it.
        table: one line for each query and training row, strongest support first: ``query``,
            ``query_line``, ``row``, ``line`` (of the files), ``score``.
        summary: what ``summary.json`` holds: JSON values.
        folder: where the files are; ``None`` where nothing was written.

    Example:
        A GPT-2 with random weights that reads digits, and a query that is its second row:

        >>> import json, pathlib, tempfile
        >>> import tokenizers, torch, transformers
        >>> from woodbury.apps.attribute import attribute
        >>> inner = tokenizers.Tokenizer(
        ...     tokenizers.models.WordLevel({str(k): k for k in range(10)}, unk_token="0")
        ... )
        >>> inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
        >>> _ = torch.manual_seed(0)
        >>> sizes = {"n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
        >>> config = transformers.GPT2Config(vocab_size=10, bos_token_id=0, eos_token_id=0, **sizes)
        >>> rows = ["1 2 3 4 5", "2 4 6 8", "9 8 7 6 5", "1 1 2 3 5 8"]
        >>> transformers.utils.logging.disable_progress_bar()
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = pathlib.Path(place)
        ...     transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
        ...     _ = tokenizer.save_pretrained(folder / "model")
        ...     for name, lines in (("train", rows), ("query", rows[1:2])):
        ...         text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        ...         _ = (folder / f"{name}.jsonl").write_text(text)
        ...     result = attribute(folder / "model", folder / "train.jsonl", folder / "query.jsonl")
        >>> result.scores.values.shape
        torch.Size([1, 4])
        >>> int(result.table["line"].iloc[0])  # the row that speaks most for it
        2
        >>> result.summary["kind"], result.folder is None
        ('causal language model', True)
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
    query_rank: int | None = None,
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
        query_rank: keep what is solved for a query as a matrix of this rank for each layer, as the
            paper does with 32, where exact ones take more memory: many long queries then take one
            pass. What it costs is measured and in the report. K-FAC and EK-FAC only.
        keep: score only this many training rows for each query, those that share the rarest tokens
            with it (TF-IDF); all by default.
        top: rows of a list in the report.
        max_length: tokens of a row at most; longer rows lose their end.
        batch_size: rows of a batch.
        budget: memory for scores, gradients and solves, beside the model and what it needs for a
            batch of ``batch_size`` rows.
        seed: of sampled labels and masks.
        out: folder for ``scores.parquet``, ``summary.json`` and ``attribution.html``; a run that
            was killed goes on there, and one of another model, other data or other settings is
            refused before work starts. Nothing is written if not given.
        say: called with what is known before the work starts: what it will take.
        progress: whether to show it.

    Returns:
        An :class:`AttributeResult`.

    Raises:
        DataError: something about the input is wrong; the message says what to do.
        BudgetError: the budget is too small.

    Cost: EK-FAC takes two passes over the training rows, scores one more; the rows in the lists of
    the report are passed once more for their tokens, all queries together as far as the budget
    holds their solutions. For a layer ``[p, m]`` each token takes, beside the forward and the
    backward pass, ``p^2 + m^2`` multiplications in either pass of the fit (and ``p m`` in the
    second), and ``p m`` in the scores.

    Example:
        >>> from woodbury.apps.attribute import attribute
        >>> attribute("no-model", "train.jsonl", "query.jsonl")
        Traceback (most recent call last):
            ...
        woodbury.errors.DataError: There is no folder no-model. ...
    """
    started = time.perf_counter()
    _check(matrix, layers, damping, tolerance, query_rank, keep, top, seed)
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
        chosen = _similar(sequences, queries, keep)
        params = choose_layers(network.model, layers)
        objective = Objective(
            network.model, "cross_entropy", sequences, params=params, progress=_fitting(display)
        )
        work = None
        if folder is not None:
            found: dict[str, Any] = {"matrix": matrix, "layers": layers, "damping": damping}
            found |= {"tolerance": tolerance, "query_rank": query_rank, "keep": keep, **options}
            work = _work(folder, found, objective, queries)
        settings: dict[str, Any] = {"damping": damping, "tolerance": tolerance, "memory": memory}
        if say is not None:
            plain = Influence(objective, matrix=matrix, **settings)  # type: ignore[arg-type]
            say(_forecast(plain, sequences, queries, chosen, query_rank))
        fitted = _matrix(matrix, seed, work, memory // 4)
        influence = Influence(objective, matrix=fitted, progress=display, **settings)
        display("fitting the curvature", 0.0)
        stored = None if work is None else work / "scores"
        scores = influence.scores(queries, rows=chosen, query_rank=query_rank, folder=stored)
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
            "damping_chosen": damping is None,
            "query_rank": query_rank,
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
    query_rank: int | None,
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
    for name, value in (("query-rank", query_rank), ("keep", keep), ("top", top)):
        if value is not None and value < 1:
            raise DataError(f"--{name} must be at least 1, not {value}.")
    if query_rank is not None and matrix not in ("ekfac", "kfac"):
        raise DataError(f"--query-rank is for --matrix ekfac and kfac, not {matrix}.")
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


def _fitting(display: Display) -> Callable[[str, int, int | None], None]:
    """Shows how far the passes of a fit have come; other passes have their own progress."""

    def progress(what: str, done: int, total: int | None) -> None:
        if total and what in _FITTING:
            display(_FITTING[what], done / total)

    return progress


def _work(folder: Path, settings: dict[str, Any], objective: Objective, queries: Sequences) -> Path:
    """The folder of what is done, where it is of this run.

    Raises:
        DataError: it is of another model, other data or other settings.
    """
    work = folder / "work"
    for left in (*folder.glob(".*.tmp.*"), *folder.glob("work/**/.*.tmp.*")):  # of a killed run
        left.unlink(missing_ok=True)
    words = {"kind": "woodbury attribute", **settings, "model_and_data": fingerprint(objective)}
    words["queries"] = fingerprint(objective.with_data(queries))
    try:
        Run(work, words)
    except DataError as error:
        raise DataError(f"{error} (or start anew in another folder with --out).") from None
    return work


def _matrix(matrix: str, seed: int, work: Path | None, cache: int) -> Any:
    """EK-FAC and K-FAC with what they need to go on after a kill."""
    if matrix not in ("ekfac", "kfac"):
        return matrix
    make = EKFAC if matrix == "ekfac" else KFAC
    checkpoint = None if work is None else work / f"{matrix}.safetensors"

    def fit(objective: Objective) -> KFAC:
        generator = torch.Generator().manual_seed(seed)
        return make(objective, generator=generator, checkpoint=checkpoint, cache=cache)

    return fit


def _forecast(
    influence: Influence,
    sequences: Sequences,
    queries: Sequences,
    chosen: Tensor | None,
    query_rank: int | None,
) -> str:
    """What the run will take, in words; an :class:`Influence` that fits nothing says it."""
    rows = len(sequences.ids) if chosen is None else len(chosen)
    forecast = influence.forecast(queries, rows=chosen, query_rank=query_rank)
    return (
        f"{len(queries.ids):,} queries x {rows:,} training rows ({sequences.tokens:,} tokens), "
        f"{influence.objective.space.dim:,} parameters: {forecast}"
    )


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
