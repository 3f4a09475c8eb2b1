"""Gradients of queries kept as low rank: memory, time and error, beside kronfluence 1.0.1.

A transformer (2 layers of width 256, 8 heads) trained for 300 steps on sequences of 64 characters
of tinyshakespeare; 32 queries from the end of the text against 256 sequences of its beginning; the
linear layers, which are what the peer knows; EK-FAC of gradients of the losses; float32; two
threads; damping 0.1 of the mean eigenvalue of each layer. Times are of scores alone, after the fit,
gradients and the measurement of the error included. An error is the one in the Frobenius norm over
all scores, of each library against its own exact scores. "Plain" is the truncation of the paper and
of the peer, the singular value decomposition without weights, computed here on our gradients.

Bytes of queries are arithmetic: what is held for them while the training data pass.

    python benchmarks/low_rank_queries.py [--small] [--no-peer]
"""

from __future__ import annotations

import gzip
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.influence_scores import THREADS, peer  # noqa: E402
from benchmarks.layer_fit import build  # noqa: E402

from woodbury import EKFAC, Influence, Objective  # noqa: E402
from woodbury.curvature import FactoredGradients  # noqa: E402
from woodbury.influence.eigenbasis import EigenBlock, MatrixQueries  # noqa: E402
from woodbury.influence.forecast import query_bytes  # noqa: E402
from woodbury.influence.measurements import measured  # noqa: E402

Data = tuple[Tensor, Tensor]


def text(small: bool, length: int) -> tuple[Tensor, int]:
    """Sequences of one more than ``length`` characters, and how many characters there are."""
    if small:
        generator = torch.Generator().manual_seed(0)
        steps = torch.randint(1, 4, (400, length + 1), generator=generator)
        return steps.cumsum(1) % 13, 13
    folder = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data")).resolve()
    if not folder.is_dir():
        raise SystemExit(f"no data folder at {folder}: set WOODBURY_DATA to one with text/")
    with gzip.open(folder / "text/tinyshakespeare.txt.gz", "rt") as file:
        letters = file.read(400_000)
    known = sorted(set(letters))
    place = {letter: k for k, letter in enumerate(known)}
    index = torch.tensor([place[letter] for letter in letters])
    return index[: len(index) // (length + 1) * (length + 1)].view(-1, length + 1), len(known)


def train(sizes: dict, rows: Tensor, steps: int) -> nn.Module:
    """A model that has seen batches of 16 sequences."""
    torch.manual_seed(0)
    model = build("transformer", **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (16,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, 1:]).backward()
        optimizer.step()
    return model


def pairs(rows: Tensor) -> Data:
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def relative(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of the difference over that of ``b``."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def timed(influence: Influence, queries: Data, rank: int | None):
    start = time.perf_counter()
    scores = influence.scores(queries, query_rank=rank)
    return time.perf_counter() - start, scores


def plain(influence: Influence, queries: Data, ranks: list[int]) -> dict[int, Tensor]:
    """Scores with the singular value decomposition of every query, without weights."""
    asked = measured(influence.objective, "loss", queries)
    (batch,) = FactoredGradients(asked).passes("queries")
    kept = {rank: {} for rank in ranks}
    for name, inverse in influence.system.inverses.items():
        assert isinstance(inverse, EigenBlock)  # all layers are linear
        X = MatrixQueries(inverse, batch.blocks[name]).matrices()
        U, values, V = torch.linalg.svd(X, full_matrices=False)
        for rank in ranks:
            kept[rank][name] = (U[:, :, :rank] * values[:, None, :rank]) @ V[:, :rank]
    count = influence.objective.num_examples
    found = {rank: torch.zeros(len(queries[0]), count) for rank in ranks}
    for rows in FactoredGradients(influence.objective).passes("scores"):
        for rank in ranks:
            parts = [rows.blocks[name].inner(X) for name, X in kept[rank].items()]
            found[rank][:, rows.rows] = -torch.stack(parts).sum(0) / count
    return found


def main() -> None:
    """Print the table."""
    small = "--small" in sys.argv
    torch.set_num_threads(THREADS)
    width, layers, length, steps = (32, 1, 12, 20) if small else (256, 2, 64, 300)
    shown, asked, batch = (20, 4, 8) if small else (256, 32, 32)
    ranks = [2, 4, 40] if small else [8, 32, 128]
    rows, letters = text(small, length)
    sizes = {"width": width, "heads": 8, "layers": layers, "tokens": letters, "length": length}
    model = train(sizes, rows[:-asked], steps)
    x, y = pairs(rows[:shown])
    queries = pairs(rows[-asked:])
    linear = [f"{n}." for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    objective = Objective(
        model,
        "cross_entropy",
        list(zip(x.split(batch), y.split(batch), strict=True)),
        params=lambda name, _: name.startswith(tuple(linear)),
    )
    influence = Influence(objective, matrix=EKFAC(objective, "empirical"), tolerance=0.0)
    blocks = next(iter(FactoredGradients(measured(objective, "loss", queries)).passes("q"))).blocks
    whole = asked * 4 * sum(b.block.p * b.block.m for b in blocks.values())
    seconds, exact = timed(influence, queries, None)
    uncut = plain(influence, queries, ranks)
    job = {"state": model.state_dict(), "sizes": sizes, "threads": THREADS, "batch": batch}
    job |= {"x": x, "y": y, "x_query": queries[0], "y_query": queries[1], "ranks": ranks}
    theirs = None if "--no-peer" in sys.argv else peer(job, "_kronfluence_low_rank")
    head = "rank      MiB of queries   seconds   error: true   measured   at most   plain"
    print(head + ("" if theirs is None else "   kronfluence: seconds   error   ratio"))

    def line(name: str, nbytes: int, spent: float, words: str, rank: int | None) -> None:
        other = ""
        if theirs is not None:
            truth, (their_seconds, scores) = theirs["scores"][None][1], theirs["scores"][rank]
            error = f"{relative(scores, truth):.4f}" if rank else ""
            other = f"{their_seconds:23.1f}   {error:>6} {their_seconds / spent:7.1f}"
        print(f"{name:<8} {nbytes / 2**20:15.1f} {spent:9.1f}   {words:<41}{other}", flush=True)

    factors = query_bytes(blocks, asked, None)
    line("exact", factors, seconds, "", None)
    for rank in ranks:
        spent, scores = timed(influence, queries, rank)
        true = relative(scores.values, exact.values)
        found = scores.solves.get("truncation_error", 0.0)
        limit = scores.solves.get("truncation_error_at_most", 0.0)
        bare = relative(uncut[rank], exact.values)
        words = f"{true:11.4f} {found:10.4f} {limit:9.4f} {bare:7.4f}"
        line(f"{rank}", query_bytes(blocks, asked, rank), spent, words, rank)
        slack = scores.error() - (scores.values - exact.values).abs()
        held = bool((slack >= -1e-5 * exact.values.abs().max()).all())
        over = (scores.error().norm() / exact.values.norm()).item()
        print(f"         the bound holds for every score: {held}; its norm over theirs {over:.0f}")
    print(f"matrices of the queries, uncut: {whole / 2**20:.1f} MiB")
    if theirs is not None:
        truth = -theirs["scores"][None][1] / shown  # without sign and 1 / N there
        both = torch.stack([exact.values.flatten(), truth.flatten()])
        print(f"exact scores of both: correlation {torch.corrcoef(both)[0, 1].item():.6f}")


if __name__ == "__main__":
    main()
