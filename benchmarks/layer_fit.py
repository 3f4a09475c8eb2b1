"""Time of an EK-FAC fit (factors, eigenbases, corrected eigenvalues) beside kronfluence 1.0.1.

Two models, float32, two threads, the same model, rows, batches and gradients (those of the losses)
for both sides:

- ``mlp``: 784-1024-1024-10 on the first 10,000 rows of MNIST. The peer takes about 0.05 s a row;
  with ``--peer-rows 1000`` it gets the first 1,000, its time is scaled, and the line says so.
- ``transformer``: 4 layers of width 256 and 8 heads on 64 sequences of 128 characters of
  tinyshakespeare; the linear layers, which are what the peer knows.

That both computed the same is checked: the damped inverse of each layer applied to a random matrix,
as a cosine (``--double`` computes in float64 on both sides). The peer runs in the environment of
``WOODBURY_PEERS_PYTHON`` (default ``.venv-peers/bin/python``); without it its column is missing,
and the script says so.

    python benchmarks/layer_fit.py [mlp] [transformer] [--small] [--double] [--no-peer]
        [--peer-rows N]
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(os.environ.get("WOODBURY_PEERS_PYTHON", ROOT / ".venv-peers/bin/python"))
THREADS, DAMPING = 2, 0.1


class Layer(nn.Module):
    """Attention and a small network behind it, of linear layers alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, h: Tensor) -> Tensor:
        x = self.norms[0](h)
        q, k, v = (
            f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        attended = scores.masked_fill(later, -1e9).softmax(-1) @ v
        h = h + self.o(attended.transpose(1, 2).flatten(2))
        return h + self.down(nn.functional.gelu(self.up(self.norms[1](h))))


class Transformer(nn.Module):
    """A causal language model of characters; logits with classes on axis 1."""

    def __init__(self, width: int, heads: int, layers: int, tokens: int, length: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*[Layer(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, index: Tensor) -> Tensor:
        places = torch.arange(index.shape[1]).expand(index.shape)
        h = self.layers(self.token(index) + self.place(places))
        return self.head(self.norm(h)).transpose(1, 2)


def build(kind: str, **sizes) -> nn.Module:
    """The model, which both sides make in the same way."""
    if kind == "transformer":
        return Transformer(**sizes)
    width = sizes["width"]
    return nn.Sequential(
        *[
            nn.Linear(784, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        ]
    )


def job(kind: str, small: bool, double: bool) -> dict:
    """A model, rows and settings."""
    folder = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data")).resolve()
    if not folder.is_dir():
        raise SystemExit(f"no data folder at {folder}: set WOODBURY_DATA to one with mnist.npz")
    torch.manual_seed(0)
    if kind == "mlp":
        sizes, rows, batch = {"width": 32 if small else 1024}, 64 if small else 10_000, 1000
        file = np.load(folder / "mnist.npz")
        x = torch.from_numpy(file["x_train"][:rows].reshape(rows, -1)).float() / 255
        y = torch.from_numpy(file["y_train"][:rows]).long()
    else:
        length, rows, batch = (16, 8, 4) if small else (128, 64, 16)
        with gzip.open(folder / "text/tinyshakespeare.txt.gz", "rt") as file:
            text = file.read()
        letters = sorted(set(text))
        index = torch.tensor([letters.index(c) for c in text[: rows * (length + 1)]])
        index = index.view(rows, length + 1)
        x, y = index[:, :-1].contiguous(), index[:, 1:].contiguous()
        sizes = {"width": 32 if small else 256, "heads": 8, "layers": 2 if small else 4}
        sizes |= {"tokens": len(letters), "length": length}
    model = build(kind, **sizes)
    state = (model.double() if double else model).state_dict()
    x = x.double() if double and x.is_floating_point() else x
    found = {"kind": kind, "sizes": sizes, "state": state, "x": x, "y": y, "batch": batch}
    return {**found, "threads": THREADS, "damping": DAMPING, "double": double}


def ours(work: dict) -> tuple[float, dict[str, Tensor]]:
    """Seconds, and the damped inverse of each layer applied to a random matrix."""
    from woodbury import EKFAC, Objective
    from woodbury.curvature import RelativeDamping

    torch.set_num_threads(work["threads"])
    model = build(work["kind"], **work["sizes"])
    model = model.double() if work["double"] else model
    model.load_state_dict(work["state"])
    linear = [f"{n}." for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    batches = list(zip(work["x"].split(work["batch"]), work["y"].split(work["batch"]), strict=True))
    objective = Objective(
        model,
        "cross_entropy",
        batches,
        params=lambda name, _: name.startswith(tuple(linear)),
    )
    start = time.perf_counter()
    E = EKFAC(objective, "empirical")
    seconds = time.perf_counter() - start
    inverse, vectors = E.damped_inverse(RelativeDamping(work["damping"])), {}
    for name, layer in E.layers.items():
        V = torch.randn(layer.p, layer.m, generator=torch.Generator().manual_seed(0))
        V = V.to(inverse.dtype)
        vectors[name] = (inverse.blocks[name] @ V.flatten()).view(layer.p, layer.m).double()
    return seconds, vectors


def peer(work: dict) -> tuple[float, dict[str, Tensor]] | None:
    """The same by kronfluence, in a process of its own; ``None`` where it is not there."""
    if not PEERS.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "job.pt", Path(folder) / "found.pt"
        torch.save(work, given)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(THREADS)}
        script = [str(PEERS), "-m", "benchmarks._kronfluence_fit", str(given), str(found)]
        done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"kronfluence failed: {done.stderr.strip().splitlines()[-1]}")
            return None
        result = torch.load(found)
    return result["seconds"], result["vectors"]


def main(
    kinds: list[str],
    small: bool = False,
    double: bool = False,
    with_peer: bool = True,
    peer_rows: int | None = None,
) -> None:
    for kind in kinds:
        work = job(kind, small, double)
        rows = len(work["x"])
        fewer = {**work, "x": work["x"][:peer_rows], "y": work["y"][:peer_rows]}
        seconds, vectors = ours(work)
        line = f"{kind}, {rows:,} rows: woodbury {seconds:.2f} s"
        theirs = peer(fewer) if with_peer else None
        if theirs is None:
            print(f"{line}; kronfluence is missing ({PEERS.name}), no ratio", flush=True)
            continue
        share = rows / len(fewer["x"])
        if share > 1:  # the same rows for both, to compare what they computed
            vectors = ours(fewer)[1]
        cosines = {
            name: float((theirs[1][name] * v).sum() / theirs[1][name].norm() / v.norm())
            for name, v in vectors.items()
        }
        worst = min(cosines, key=cosines.get)
        scaled = f" ({theirs[0]:.1f} s for {len(fewer['x']):,} rows, scaled)" if share > 1 else ""
        print(
            f"{line}, kronfluence {theirs[0] * share:.1f} s{scaled}: ratio "
            f"{theirs[0] * share / seconds:.1f}; smallest cosine of the damped inverses "
            f"{cosines[worst]:.6f} ({worst}, {len(cosines)} layers)",
            flush=True,
        )


if __name__ == "__main__":
    words = sys.argv[1:]
    limit = int(words.pop(words.index("--peer-rows") + 1)) if "--peer-rows" in words else None
    asked = [word for word in words if not word.startswith("--")]
    main(
        asked or ["mlp", "transformer"],
        "--small" in words,
        "--double" in words,
        "--no-peer" not in words,
        limit,
    )
