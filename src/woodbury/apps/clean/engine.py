r"""The loop that finds wrong labels: fit, leave one out, judge, weigh, and fit again.

1. Every candidate model has its penalty (and length scale) tuned by gradients of the score of its
   held-out predictions; the one with the best score is taken.
2. It is fitted with one weight per row, and every row is predicted by the fit without it.
3. A noise model, fitted to those predictions, gives each row's error probability $e_i$ and the
   outer loss $F(w)$: minus the log-likelihood of the observed labels under it, of all rows held
   out one at a time, or of the trusted rows where there are some.
4. New weights: $\mathrm{logit}\,w_i = \mathrm{logit}(1 - e_i) - \frac12\, dF/dw_i$. The posterior
   odds that the label is right, times what the row's presence does to the likelihood of the others;
   both are in nats. (Half of it: the derivative at the present weight overstates what taking the
   row out altogether would do.) Back to 2, with the penalty tuned once more after the first
   weights, until error probabilities settle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from woodbury.apps.clean.checkpoint import Checkpoint, State
from woodbury.apps.clean.kernel import KernelModel
from woodbury.apps.clean.label_noise import LabelNoise
from woodbury.apps.clean.linear import Logistic, Ridge
from woodbury.apps.clean.mlp import Network
from woodbury.apps.clean.models import Data, HeldOut, Model
from woodbury.apps.clean.noise import Judgement, NoiseModel, ResidualNoise
from woodbury.errors import ArgumentError, BudgetError, DataError

__all__ = ["EngineResult", "run"]

Progress = Callable[[str, float], None]

MODELS = ("linear", "kernel", "mlp")
MAX_ROUNDS = 6
# Settled: error probabilities change by less than this on average.
SETTLED = 3e-3
TUNING_ROWS = 1500
# Targets are cut off at this many robust deviations, so that one absurd value cannot hide others.
FAR = 20.0
LARGEST_ODDS = 14.0
STEP = 0.5
# Arrays of a float64 for each row and class that are in memory at once.
ROW_ARRAYS = 10


@dataclass
class EngineResult:
    """What the loop found; arrays are in the order of the rows.

    Attributes:
        error_probability: that the label is wrong, ``[n]``.
        suggested: class ``[n]`` (the observed one unless it is probably wrong), or predicted
            quantity.
        weight: how much the row counted in the last fit, ``[n]`` in [0, 1].
        probabilities: calibrated held-out probabilities ``[n, C]``; None for regression.
        certificate: the model, the inverse it used and what it is worth.
        history: one entry a round.
    """

    error_probability: np.ndarray
    suggested: np.ndarray
    weight: np.ndarray
    probabilities: np.ndarray | None
    certificate: dict[str, Any]
    history: list[dict[str, Any]]


def run(
    X: np.ndarray,
    y: np.ndarray,
    *,
    task: str,
    n_classes: int,
    model: str = "auto",
    seed: int = 0,
    budget_bytes: int = 2 * 2**30,
    trusted: np.ndarray | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> EngineResult:
    """Find the rows whose label is probably wrong.

    Args:
        X: prepared rows ``[n, d]``, float32, finite, columns of comparable scale.
        y: classes 0 to C - 1 ``[n]``, or quantities.
        task: ``"classification"`` or ``"regression"``.
        n_classes: $C$; not used for regression.
        model: ``"auto"``, ``"linear"``, ``"kernel"`` or ``"mlp"``.
        seed: of what draws.
        budget_bytes: memory the model may use besides ``X``.
        trusted: rows whose label is right, bool ``[n]``.
        progress: called with ``(stage, fraction)``.
        checkpoint: file to keep the state of the run in.
        resume: go on from it if it is there.

    Returns:
        :class:`EngineResult`.

    Raises:
        DataError: fewer than two rows or classes.
        ArgumentError: an unknown task or model.
        BudgetError: rows times classes do not fit into the budget; says what would.

    Cost: a few fits. Kernel: $n^3$ multiplications each up to 5,000 rows, $n m^2$ beyond.

    Example:
        >>> import numpy as np
        >>> from woodbury.apps.clean.engine import run
        >>> x = np.linspace(-1, 1, 60, dtype=np.float32)[:, None]
        >>> y = (x[:, 0] > 0).astype(int)
        >>> y[5] = 1
        >>> found = run(x, y, task="classification", n_classes=2, model="linear")
        >>> int(found.error_probability.argmax()), int(found.suggested[5])
        (5, 0)
    """
    report = progress or (lambda stage, fraction: None)
    data, unit = _data(X, y, task, n_classes, seed, budget_bytes, trusted)
    store = Checkpoint(checkpoint)
    state = store.load(len(data.X)) if resume else None
    if state is None:
        state, chosen = _choose(data, model, report)
        store.save(state)
    else:
        chosen = _make(state.model, data)
        chosen.restore(state.settings)
    state, held, judged = _rounds(data, chosen, state, store, report)
    return _result(state, held, judged, unit)


@dataclass(frozen=True)
class _Unit:
    """Target = center + scale * standardised target."""

    center: float = 0.0
    scale: float = 1.0


def _data(
    X: np.ndarray,
    y: np.ndarray,
    task: str,
    n_classes: int,
    seed: int,
    budget_bytes: int,
    trusted: np.ndarray | None,
) -> tuple[Data, _Unit]:
    if task not in ("classification", "regression"):
        raise ArgumentError(f"task is {task!r}; it must be 'classification' or 'regression'")
    if len(X) < 2:
        raise DataError(f"the table has {len(X)} rows with a label; at least two are needed")
    points = torch.from_numpy(np.array(X, dtype=np.float32))
    points -= points.mean(0)
    spread = float(points.square().sum(dtype=torch.float64) / len(points)) ** 0.5
    points /= spread or 1.0
    known = None if trusted is None else torch.from_numpy(np.asarray(trusted, dtype=bool))
    if task == "classification":
        if n_classes < 2:
            raise DataError(f"the labels have {n_classes} classes; at least two are needed")
        _require_memory(len(points), n_classes, budget_bytes)
        observed = torch.from_numpy(np.asarray(y).astype(np.int64))
        return Data(points, observed, n_classes, known, seed, budget_bytes), _Unit()
    target = np.asarray(y, dtype=np.float64)
    low, center, high = np.percentile(target, [25, 50, 75])
    scale = float((high - low) / 1.349 or target.std() or 1.0)
    standard = np.clip((target - center) / scale, -FAR, FAR)
    unit = _Unit(float(center), scale)
    return Data(points, torch.from_numpy(standard), 0, known, seed, budget_bytes), unit


def _require_memory(n: int, classes: int, budget_bytes: int) -> None:
    need = ROW_ARRAYS * n * classes * 8
    if need > budget_bytes:
        raise BudgetError(
            f"probabilities of {n:,} rows and {classes:,} classes take {need / 2**30:.1f} GiB in "
            f"all and the budget is {budget_bytes / 2**30:.1f} GiB. Raise --budget to that, or "
            "give fewer rows or classes."
        )


def _make(name: str, data: Data) -> Model:
    if name == "kernel":
        return KernelModel(data)
    if name == "mlp":
        return Network(data)
    return Ridge(data) if data.regression else Logistic(data)


def _first_noise(data: Data) -> NoiseModel:
    if data.regression:
        return ResidualNoise()
    return LabelNoise.start(data.targets()[:1000])


def _choose(data: Data, model: str, report: Progress) -> tuple[State, Model]:
    """Tune the candidates and take the one with the best held-out score."""
    if model not in ("auto", *MODELS):
        raise ArgumentError(f"model is {model!r}; it must be auto, {', '.join(MODELS)}")
    names = MODELS if model == "auto" else (model,)
    rows = data.sample(TUNING_ROWS)
    weights = torch.ones(len(data.X), dtype=torch.float64)
    scores: dict[str, float] = {}
    best: Model | None = None
    for i, name in enumerate(names):
        candidate = _make(name, data)

        def note(fraction: float, i: int = i) -> None:
            report("choosing the model", (i + fraction) / len(names))

        scores[name], _ = candidate.tune(rows, weights, _first_noise(data), note)
        if isinstance(candidate, Network) and len(names) > 1:
            scores[name] = candidate.fold_score(rows, weights, _first_noise(data))
        if best is None or scores[name] < scores[best.name]:
            best = candidate
    assert best is not None
    return State(best.name, best.settings(), scores, 0, weights, []), best


def _rounds(
    data: Data, model: Model, state: State, store: Checkpoint, report: Progress
) -> tuple[State, HeldOut, Judgement]:
    """Fit, judge and weigh until error probabilities settle."""
    while True:
        if state.round == 1 and model.retunes and not state.retuned:
            state = _tune_again(data, model, state, report)
            store.save(state)
        stage = f"round {state.round + 1}"
        report(stage, 0.0)
        held = model.fit(state.weights, _part_of(report, stage))
        noise = _first_noise(data).choose(held.outputs, data.observed, held.variance, data.trusted)
        judged = noise.judge(held.outputs, data.observed, held.variance, data.trusted)
        change = float("inf")
        if state.error is not None:
            change = (judged.error - state.error).abs().mean().item()
        entry = {
            "round": state.round + 1,
            "held_out_loss": judged.losses.mean().item(),
            "expected_wrong_labels": judged.error.sum().item(),
            "mean_change": None if state.error is None else change,
            "mean_weight": state.weights.mean().item(),
        }
        if change < SETTLED or state.round + 1 >= MAX_ROUNDS:
            report(stage, 1.0)
            certificate = {**held.certificate(), "noise": noise.certificate()}
            final = state.ended([*state.history, entry], certificate, change < SETTLED)
            return final, held, judged
        state = state.advanced(new_weights(data, held, judged), judged.error, entry)
        report(stage, 1.0)
        store.save(state)


def _part_of(report: Progress, stage: str) -> Callable[[float], None]:
    """Progress of the fit, which is about the first half of a round."""
    return lambda fraction: report(stage, 0.5 * fraction)


def _tune_again(data: Data, model: Model, state: State, report: Progress) -> State:
    """Settings half way, in the logarithm, between those without and with weights.

    Without weights the penalty has to fight the noise and is too large; with weights that have seen
    the labels, held-out scores are too rosy and it comes out too small.
    """
    rows = data.sample(TUNING_ROWS)
    model.tune(rows, state.weights, _first_noise(data), lambda part: report("tuning again", part))
    again = model.settings()
    between = {name: (again[name] * value) ** 0.5 for name, value in state.settings.items()}
    model.restore(between)
    return state.tuned_to(between)


def new_weights(data: Data, held: HeldOut, judged: Judgement) -> Tensor:
    """Posterior odds of a right label, times the likelihood of others with over without the row."""
    slopes = judged.slopes
    if data.trusted is not None and bool(data.trusted.any()):
        slopes = slopes * data.trusted[:, None]
    push = held.weight_hypergradient(slopes)
    right = (1 - judged.error).clamp(1e-6, 1 - 1e-6)
    weights = torch.sigmoid((right.logit() - STEP * push).clamp(-LARGEST_ODDS, LARGEST_ODDS))
    return weights if data.trusted is None else torch.where(data.trusted, 1.0, weights)


def _result(state: State, held: HeldOut, judged: Judgement, unit: _Unit) -> EngineResult:
    suggested = judged.suggested.numpy()
    if judged.probabilities is None:
        suggested = unit.center + unit.scale * suggested
    certificate = {
        "model": state.model,
        "held_out_score_by_model": state.scores,
        "rounds": len(state.history),
        "settled": state.settled,
        **state.certificate,
    }
    return EngineResult(
        error_probability=judged.error.numpy(),
        suggested=suggested,
        weight=state.weights.numpy(),
        probabilities=None if judged.probabilities is None else judged.probabilities.numpy(),
        certificate=certificate,
        history=state.history,
    )
