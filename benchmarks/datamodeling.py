"""Linear datamodeling scores on MNIST by dattri's protocol, beside dattri's own estimators.

Logistic regression and a 784-128-64-10 network on the first 5,000 training and 500 test rows, 100
models trained on random halves (SGD as dattri trains them). Every estimator is given the same
models, trained on all rows; its score is the mean over them. Nothing is chosen by looking at these
halves or test rows: the damping is one over the length of training (learning rate times steps, over
one minus momentum), the library's default, or chosen on 16 other halves and other test rows, where
it is also chosen whether labels are drawn and whether losses or margins are averaged. Prints
the linear datamodeling score with a 95 % interval (over halves and test rows) and seconds for
scoring. dattri runs in an environment of its own, named by ``WOODBURY_PEERS_PYTHON`` (default
``.venv-peers/bin/python``); without it its lines are missing, and that is said.

Models and the scores of each by itself are kept in the folder, so a run that was stopped goes on;
delete ``FOLDER/scores`` to score anew.

    python benchmarks/datamodeling.py --model mlp --models 50 --folder runs/datamodeling
    python benchmarks/datamodeling.py --model mlp --queries 100 --costly 10 \\
        --only "Gauss-Newton" "dattri cg" chosen --folder runs/datamodeling
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from _attribution import PEERS, ROOT, Setting
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from woodbury import CG, EKFAC, Cholesky, Influence, Objective
from woodbury.curvature import RelativeDamping
from woodbury.errors import SingularError
from woodbury.influence import Scores, rivals
from woodbury.influence.evaluation import half_subsets, linear_datamodeling_score, retrain
from woodbury.influence.rivals.common import asked_of
from woodbury.influence.runs import Run

Method = Callable[[Objective], Tensor]


# EK-FAC is chosen among labels drawn from the model or all of them, and dampings that are shares of
# the mean eigenvalue of each layer.
KINDS = ("sampled", "exact")
SHARES = (10.0, 1.0, 0.1, 0.01)
CHOSEN = "EK-FAC, chosen by other halves"


def estimators(setting: Setting, queries: tuple[Tensor, Tensor], options) -> dict:
    """Names, functions from the objective of a model to scores of losses [Q, N], most models.

    Of the network only what is compared at more models than one is given them.
    """

    def by(**options) -> Method:
        return lambda objective: Influence(objective, "loss", **options).scores(queries).values

    damping = options.damping or setting.damping
    found: dict[str, tuple[Method, int]] = {}
    if setting.name == "lr" and setting.train > 1000:
        recipe = {"recipe": Cholesky(), "damping": setting.damping}
        found["exact (Cholesky)"] = by(**recipe), options.costly
    found["EK-FAC, damping of training"] = by(matrix=ekfac, damping=setting.damping), 10
    found["EK-FAC, default damping"] = by(matrix=ekfac), 10
    found["EK-FAC, exact, default damping"] = by(matrix=exact), 10
    if setting.name == "mlp" and setting.train > 1000:
        found["Gauss-Newton, CG"] = by(recipe=CG(rtol=0.1), damping=damping), options.costly
    several = 10 if setting.name == "lr" else 1
    found["Grad-Dot"] = (lambda objective: rivals.grad_dot(objective, queries).values), 10
    found["Grad-Cos"] = (lambda objective: rivals.grad_cos(objective, queries).values), several
    found["DataInf"] = (lambda objective: rivals.data_inf(objective, queries).values), several
    return found


def ekfac(objective: Objective, kind: str = "sampled") -> EKFAC:
    generator = torch.Generator().manual_seed(0) if kind == "sampled" else None
    return EKFAC(objective, kind, generator=generator)


def exact(objective: Objective) -> EKFAC:
    return ekfac(objective, "exact")


def layered(
    objective: Objective, queries: tuple[Tensor, Tensor], kind: str, share: float, measured: str
) -> Tensor:
    """EK-FAC scores that rise with the loss, in the unit of what is measured."""
    options = {"matrix": ekfac(objective, kind), "damping": RelativeDamping(share)}
    values = Influence(objective, measured, **options).scores(queries).values
    return values if measured == "loss" else -values


class Kept:
    """Scores of single models, in a folder: what was computed before is read.

    Args:
        folder: of all scores.
        words: what all of them depend on.
    """

    def __init__(self, folder: Path, **words: object) -> None:
        self.folder, self.words = folder, words

    def __call__(self, name: str, number: int, method: Callable[[], Tensor]) -> tuple:
        """Scores by ``method`` of the model with this number, and the seconds they took."""
        words = {**self.words, "method": name}
        slug = re.sub("[^a-z0-9.]+", "-", " ".join(map(str, words.values())).lower())
        run = Run(self.folder / slug, words)
        piece = run.load(f"model{number:03d}")
        if piece is None:
            start = time.perf_counter()
            values = method().float()
            seconds = torch.tensor(time.perf_counter() - start)
            piece = {"values": values, "seconds": seconds}, {}
            run.keep(f"model{number:03d}", *piece)
        return piece[0]["values"], float(piece[0]["seconds"])


def chosen(
    setting: Setting, objectives: list, options: argparse.Namespace, folder: Path
) -> tuple[str, float, str]:
    """Kind, damping and measurement of the EK-FAC that predicts other halves best, for other rows.

    Kind and damping are chosen with one model; then, with two, whether losses or margins are
    averaged over models (of one model both give the same order).
    """
    other = replace(setting, test=2 * setting.test, skip=setting.test, data=None)
    generator = torch.Generator().manual_seed(77)
    count = min(16, options.subsets)
    truth = retrain(
        other,
        other.losses,
        half_subsets(setting.train, count, generator=generator),
        seeds=torch.arange(5000, 5000 + count)[:, None],
        folder=folder / f"{setting.name}-select",
        key=f"{setting.key}, test rows from {setting.test}",
        processes=options.processes,
    )
    _, _, *queries = other.rows()
    kept = Kept(folder / "scores", key=f"{setting.key}, other rows")

    def best(models: list, settings: list[tuple]) -> tuple:
        found = {}
        for given in settings:
            try:
                values = sum(
                    kept(str(given), i, partial(layered, model, tuple(queries), *given))[0]
                    for i, model in enumerate(models)
                )
            except SingularError:  # too small a damping for single precision
                continue
            found[given] = linear_datamodeling_score(values, truth, resamples=2).mean.value
        said = ", ".join(f"{' '.join(map(str, g))} {value:.3f}" for g, value in found.items())
        print(
            f"on {count} other halves, {len(models)} model{'s' * (len(models) > 1)}: {said}",
            flush=True,
        )
        return max(found, key=found.get)

    kind, share, _ = best(objectives[:1], [(k, s, "loss") for k in KINDS for s in SHARES])
    measured = "loss"
    if len(objectives) > 1:
        *_, measured = best(objectives, [(kind, share, m) for m in ("loss", "margin")])
    return kind, share, measured


def peer_scores(folder: Path, method: str, models: int) -> list[dict[str, Tensor]]:
    """What dattri makes of each model: scores in the convention of losses, and its seconds."""
    script = ROOT / "benchmarks/_dattri_scores.py"
    arguments = [str(PEERS), str(script), str(folder), method, str(models)]
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        print(f"dattri {method} with {models} models failed: {run.stderr.strip()[-300:]}")
        return []
    pieces = [load_file(folder / f"{method}-model{i:03d}.safetensors") for i in range(models)]
    return [{**piece, "scores": -piece["scores"]} for piece in pieces]


def our_trak(
    objective: Objective, queries: tuple[Tensor, Tensor], dim: int, number: int
) -> tuple[Tensor, Tensor]:
    """The two factors of TRAK with one model, which several models average apart: [Q, N], [N]."""
    measured = {"dim": dim, "measurement": "loss", "seed": number}
    values = rivals.trak(objective, queries, **measured).values
    doubt = torch.sigmoid(-asked_of(objective, "margin", None).per_example_losses())
    return values / doubt, doubt


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["lr", "mlp"], default="lr")
    parser.add_argument("--models", type=int, default=10, help="trained on all rows")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where trained models are kept")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="lines that have one of these in their name")
    parser.add_argument("--damping", type=float, help="of CG and dattri's EK-FAC (of training)")
    parser.add_argument("--queries", type=int, help="score the first test rows only")
    parser.add_argument("--costly", type=int, default=1, help="models for CG and for Cholesky")
    parser.add_argument("--small", action="store_true", help="a few rows and models, no peer")
    parser.add_argument("--figure", type=Path, help="draw the table as a PNG or SVG file")
    options = parser.parse_args(arguments)
    if options.small:
        setting = Setting(options.model, train=120, test=20, epochs=3)
        options.models, options.subsets, options.processes = 2, 6, 1
    else:
        setting = Setting(options.model)
    folder = options.folder or Path(tempfile.mkdtemp())
    table = run(setting, options, folder)
    if options.figure:
        draw(table, setting, options.figure)
    return {name: interval.value for name, (interval, _) in table.items()}


def run(setting: Setting, options: argparse.Namespace, folder: Path) -> dict:
    everything = torch.arange(setting.train)
    started = time.perf_counter()
    shared = {"key": setting.key, "processes": options.processes}
    vectors = retrain(
        setting,
        setting.parameters,
        [everything],
        seeds=range(1000, 1000 + options.models),
        folder=folder / f"{setting.name}-full{options.models}",
        **shared,
    ).values[0]
    truth = retrain(
        setting,
        setting.losses,
        half_subsets(setting.train, options.subsets),
        seeds=torch.arange(options.subsets)[:, None],
        folder=folder / f"{setting.name}-half",
        **shared,
    )
    print(
        f"{setting.key}; {options.subsets} halves; damping {setting.damping:.3g}; "
        f"models trained or read in {time.perf_counter() - started:.0f} s"
    )
    x, y, *queries = setting.rows()
    if options.queries is not None:
        queries = [part[: options.queries] for part in queries]
        truth = replace(truth, values=truth.values[..., : options.queries])
        print(f"only the first {options.queries} test rows are scored, by all")
    objectives = [Objective(setting.restored(v), "cross_entropy", (x, y)) for v in vectors]
    asked = queries[0], queries[1]
    table: dict = {}

    def show(name: str, values: Tensor, count: int, seconds: float) -> None:
        found = linear_datamodeling_score(
            Scores(values, everything, support=-1), truth, resamples=200
        )
        name = f"{name}, {count} model{'s' * (count > 1)}"
        table[name] = found.mean, seconds
        print(f"{name:48s} {found.mean}   {seconds:6.1f} s", flush=True)

    def averaged(name: str, pieces: Iterable[tuple[Tensor, Tensor, float]], several: int) -> None:
        """A line for one, ten and all models: the mean of their scores, times their mean doubt."""
        total, doubts, seconds = torch.zeros(len(asked[0]), setting.train), 0.0, 0.0
        for count, (values, doubt, spent) in enumerate(pieces, 1):
            total, doubts, seconds = total + values, doubts + doubt, seconds + spent
            if count in (1, 10, several):
                show(name, total / count * (doubts / count), count, seconds)

    def wanted(name: str) -> bool:
        return options.only is None or any(part in name for part in options.only)

    words = {"key": setting.key, "queries": len(asked[0])}
    kept = Kept(folder / "scores", **words)
    one = torch.ones(())
    for name, (method, most) in estimators(setting, asked, options).items():
        if wanted(name):
            several = min(options.models, most)
            label = name if options.damping is None else f"{name}, damping {options.damping:g}"
            found = (kept(label, i, partial(method, o)) for i, o in enumerate(objectives[:several]))
            averaged(name, ((values, one, spent) for values, spent in found), several)
    if wanted(CHOSEN):
        best = chosen(setting, objectives[:2], options, folder)
        found = (
            kept(f"EK-FAC {best}", i, partial(layered, o, asked, *best))
            for i, o in enumerate(objectives)
        )
        averaged(CHOSEN, ((values, one, spent) for values, spent in found), options.models)
    if wanted("TRAK (ours)"):
        dim = 512 if not options.small else 16
        found = (
            kept("TRAK", i, lambda o=o, i=i: torch.vstack(our_trak(o, asked, dim, i)))
            for i, o in enumerate(objectives)
        )
        pieces = ((both[:-1], both[-1], spent) for both, spent in found)
        averaged("TRAK (ours)", pieces, options.models)
    if options.small:
        return table
    if not PEERS.exists():
        print(f"dattri is missing: no Python at {PEERS}; set WOODBURY_PEERS_PYTHON")
        return table
    damping = options.damping or setting.damping
    exchange = folder / "scores" / f"dattri-{setting.name}-{len(asked[0])}-{damping:.3g}"
    Run(exchange, {"peer": "dattri", **words, "damping": damping})  # refuses that of others
    sizes = [layer.in_features for layer in setting.model() if isinstance(layer, nn.Linear)] + [10]
    given = {
        "x_train": x,
        "y_train": y,
        "x_test": asked[0],
        "y_test": asked[1],
        "models": vectors.float(),
        "sizes": torch.tensor(sizes),
        "damping": torch.tensor(damping),
    }
    save_file(given, exchange / "given.safetensors")
    for name, method, most in [
        ("tracin", "grad_dot", 10),  # its TracIn of final models is the mean of their Grad-Dot
        ("grad_cos", "grad_cos", 1),
        ("trak", "trak", options.models),
        ("ekfac", "ekfac", 1),
        ("cg", "cg", options.costly),
    ]:
        if wanted(f"dattri {name}"):
            several = min(options.models, most)
            found = peer_scores(exchange, method, several)
            pieces = ((p["scores"], p.get("doubt", one), float(p["seconds"])) for p in found)
            averaged(f"dattri {name}", pieces, several)
    for count in (1, 10, options.models):
        suffix = f", {count} model{'s' * (count > 1)}"
        ours = {n: t[0].value for n, t in table.items() if n.endswith(suffix) and "dattri" not in n}
        peers = {n: t[0].value for n, t in table.items() if n.endswith(suffix) and "dattri" in n}
        if ours and peers:
            a, b = max(ours, key=ours.get), max(peers, key=peers.get)
            print(
                f"best{suffix}: {a} {ours[a]:.3f}, {b} {peers[b]:.3f}: ratio "
                f"{ours[a] / peers[b]:.2f}"
            )
    return table


def draw(table: dict, setting: Setting, path: Path) -> None:
    """The scores with their intervals, best on top."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = sorted(table, key=lambda name: table[name][0].value)
    values = [table[name][0].value for name in names]
    spread = [
        [max(0.0, table[n][0].value - table[n][0].low) for n in names],
        [max(0.0, table[n][0].high - table[n][0].value) for n in names],
    ]
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(names) + 1))
    colours = ["tab:gray" if "dattri" in name else "tab:blue" for name in names]
    axes.barh(names, values, xerr=spread, color=colours)
    axes.set_xlabel(f"linear datamodeling score, MNIST, {setting.name}")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
