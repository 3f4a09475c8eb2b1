"""The loop of sketch-and-project: random equations, each solved by the nearest point."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from woodbury.errors import NonFiniteError
from woodbury.operators.sparse import Sparse
from woodbury.solvers.certified import normal_residuals
from woodbury.solvers.columns import norms, rounding_limit, take
from woodbury.solvers.lsmr import LSMR
from woodbury.solvers.recipe import Outcome, Problem, State
from woodbury.solvers.solution import SolveStatus

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.solvers.sketch_project import SketchProject

__all__ = ["Metric", "ProjectState", "Projections", "Sampling", "draws", "prepared"]

Metric = Literal["identity", "energy", "normal"]
Sampling = Literal["norms", "uniform"]

# Steps whose equations are drawn at once, and entries of the weights that this may take.
_DRAWN = 1024
_DRAWN_ENTRIES = 2**20
# Sweeps after which to give up, where no limit is given.
SWEEPS = 200
# After so many sweeps without a fall by a twentieth it is asked whether there is a solution.
_PATIENCE = 20


@dataclass(frozen=True, eq=False)
class ProjectState(State):
    """Rows or columns of the matrix, ready to be read.

    Attributes:
        matrix: the matrix as a tensor, or as a SciPy array (by rows, or by columns for the normal
            metric); ``None`` for Gaussian sketches, which only multiply.
        metric: of the projections; that of the recipe, but in the state of an adjoint.
        sizes: what a coordinate is drawn and divided by, ``[m]`` or ``[n]``: the squared norm of
            its row or column, or its diagonal entry; ``None`` for Gaussian sketches.
    """

    matrix: Any
    metric: Metric
    sizes: Tensor | None


def prepared(recipe: SketchProject, A: LinearOperator, metric: Metric) -> ProjectState:
    """The matrix and what its coordinates are drawn by."""
    if recipe.sketch == "gaussian":
        return ProjectState.of(recipe, A, matrix=None, metric=metric, sizes=None)
    matrix: Any
    if isinstance(A, Sparse) and A.device.type == "cpu":
        matrix = A.to_scipy_sparse()
        matrix = matrix.tocsc() if metric == "normal" else matrix.tocsr()
        if metric == "energy":
            sizes = torch.from_numpy(matrix.diagonal().copy()).real
        else:
            axis = 0 if metric == "normal" else 1
            sizes = torch.from_numpy(abs(matrix).power(2).sum(axis=axis))
    else:
        work = torch.float32 if A.dtype.itemsize == 2 else A.dtype
        matrix = A.to_dense().detach().to(work)
        if metric == "energy":
            sizes = torch.diagonal(matrix).real.clone()
        else:
            sizes = matrix.abs().square().sum(0 if metric == "normal" else 1)
    sizes = sizes.double()
    largest = _largest(matrix)
    if not math.isfinite(largest):
        raise NonFiniteError(f"the matrix of {type(A).__name__} holds NaN or infinity")
    whole = float(sizes.sum())
    if not math.isfinite(whole) or (largest > 0 and whole == 0 and metric != "energy"):
        raise NonFiniteError(
            f"the largest entry of {type(A).__name__} is {largest:.3g}, and squared norms of its "
            "rows leave the range of the dtype: scale the operator and b"
        )
    return ProjectState.of(recipe, A, A.shape[1], matrix=matrix, metric=metric, sizes=sizes)


def _largest(matrix: Any) -> float:
    """The largest modulus of an entry; NaN where there is one."""
    entries = matrix if isinstance(matrix, Tensor) else torch.from_numpy(matrix.data)
    return entries.abs().amax().item() if entries.numel() else 0.0


def draws(
    weights: Tensor, block: int, sampling: Sampling, generator: torch.Generator
) -> Iterator[Tensor]:
    """Endless blocks of different coordinates, by the weights or alike where those are not zero."""
    if sampling == "uniform":
        weights = (weights > 0).to(weights.dtype)
    block = min(block, int((weights > 0).sum()))
    while True:
        if block == 1:
            found = torch.multinomial(weights, _DRAWN, replacement=True, generator=generator)
            yield from found.unsqueeze(1)
            continue
        count = max(1, min(_DRAWN, _DRAWN_ENTRIES // len(weights)))
        yield from torch.multinomial(weights.expand(count, -1), block, generator=generator)


class Projections:
    """One solve: ``X`` holds the running columns, ``R`` their residuals where they are kept."""

    def __init__(self, recipe: SketchProject, problem: Problem, state: ProjectState) -> None:
        self.recipe, self.problem, self.state = recipe, problem, state
        self.metric = state.metric
        A = problem.A
        self.generator = torch.Generator(A.device).manual_seed(recipe.seed)
        self.eps = torch.finfo(A.dtype).eps
        X, R = problem.start()
        self.vector = X.dim() == 1
        self.X = X.unsqueeze(1) if self.vector else X
        self.R = R.unsqueeze(1) if self.vector else R
        self.B = problem.b.unsqueeze(1) if self.vector else problem.b
        self.value = self.X.clone()
        width = self.X.shape[1]
        self.running = list(range(width))
        self.statuses: list[SolveStatus] = [SolveStatus.max_steps] * width
        self.residuals = [math.nan] * width
        self.normal = [math.nan] * width
        self.steps = [0] * width
        self.allowed = problem.tolerances(recipe.rtol, recipe.atol)
        self.best = [math.inf] * width
        self.since = [0] * width  # sweeps without a fall
        self.asked = [False] * width
        self.info: dict[str, Any] = {}
        self.norm = 0.0  # of A, from below
        if state.sizes is not None and len(state.sizes):
            largest = max(0.0, state.sizes.amax().item())
            self.norm = largest if self.metric == "energy" else math.sqrt(largest)

    def run(self) -> Outcome:
        """Sweep until every column has a status."""
        sweep = self.recipe.sweep(self.problem.A, self.metric)
        limit = self.recipe.max_steps
        limit = SWEEPS * sweep if limit is None else limit
        step = 0
        self.look(step, first=True)
        equations = self.equations()
        while self.running and step < limit:
            for _ in range(min(sweep, limit - step)):
                if not next(equations):
                    break
                step += 1
            if not self.running:
                break
            if self.metric != "normal" or step >= limit:
                self.R = self.residual()
            self.look(step, first=False)
        self.store(self.running, SolveStatus.max_steps)
        self.info["column_steps"] = self.steps
        if self.metric == "normal":
            self.info["normal_residual"] = self.normal
        value = self.value.squeeze(1) if self.vector else self.value
        return Outcome(value, self.statuses, max(self.steps), self.residuals, info=self.info)

    # ------------------------------------------------------------------- the steps

    def equations(self) -> Iterator[bool]:
        """Endless steps, each taken when asked for; false where it ended all columns."""
        state, recipe = self.state, self.recipe
        if state.sizes is None:
            while True:
                yield self.gaussian_step()
        low = state.sizes.argmin().unsqueeze(0)
        if self.metric == "energy" and state.sizes[low].item() < 0:
            self.is_negative(state.sizes[low].unsqueeze(1).to(self.X.dtype), self.units(low))
            yield False
        if not bool((state.sizes > 0).any()):
            # Nothing to project on: what has a solution is solved.
            self.store(self.running, SolveStatus.inconsistent)
            yield False
        weights = state.sizes.clamp_min(0)
        for index in draws(weights, recipe.block, recipe.sampling, self.generator):
            yield self.coordinate_step(index)

    def coordinate_step(self, index: Tensor) -> bool:
        """Solve the equations, or minimise over the coordinates, of an index."""
        metric, sizes = self.metric, self.state.sizes
        assert sizes is not None
        rows = self.read(index)
        right = rows.mH @ self.R if metric == "normal" else self.B[index] - rows @ self.X
        if len(index) == 1:
            C = right / sizes[index].to(right.dtype)
        elif metric == "energy":
            core = rows[:, index]
            if self.is_negative(core, self.units(index)):
                return False
            C = pseudo_solve(core, right)
        else:
            C = pseudo_solve(rows.mH @ rows if metric == "normal" else rows @ rows.mH, right)
        if metric == "identity":
            self.X.addmm_(rows.mH, C)
        else:
            self.X[index] += C
            if metric == "normal":
                self.R.addmm_(rows, C, alpha=-1)
        return True

    def units(self, index: Tensor) -> Tensor:
        """Columns of the identity."""
        S = self.X.new_zeros(self.X.shape[0], len(index))
        S[index, torch.arange(len(index), device=S.device)] = 1
        return S

    def gaussian_step(self) -> bool:
        """Solve random combinations of the equations."""
        problem, recipe = self.problem, self.recipe
        m, n = problem.A.shape
        size = n if self.metric == "normal" else m
        S = torch.randn(
            size,
            min(recipe.block, size),
            dtype=self.X.dtype,
            device=self.X.device,
            generator=self.generator,
        )
        G = problem.adjoint_product(S) if self.metric == "identity" else problem.product(S)
        if self.metric == "normal":
            right, core = G.mH @ self.R, G.mH @ G
        else:
            right = S.mH @ self.B - G.mH @ self.X
            core = G.mH @ G if self.metric == "identity" else S.mH @ G
        ratios = torch.linalg.vector_norm(G, dim=0) / torch.linalg.vector_norm(S, dim=0)
        largest = ratios.amax().item()
        if not math.isfinite(largest):
            self.store(self.running, SolveStatus.non_finite)
            return False
        self.norm = max(self.norm, largest)
        if self.metric == "energy" and self.is_negative(core, S):
            return False
        C = pseudo_solve(core, right)
        self.X += (G if self.metric == "identity" else S) @ C
        if self.metric == "normal":
            self.R -= G @ C
        return True

    def is_negative(self, core: Tensor, S: Tensor) -> bool:
        """Whether ``S^H A S`` shows that ``A`` is not positive semidefinite; then all is over."""
        values, vectors = torch.linalg.eigh((core + core.mH) / 2)
        lowest, largest = values[0].item(), values.abs().amax().item()
        if lowest >= -10 * core.shape[0] * self.eps * largest:
            return False
        direction = S @ vectors[:, 0]
        length = float(torch.linalg.vector_norm(direction))
        self.info.update(
            column=self.running[0], curvature=lowest / length**2, direction=direction / length
        )
        self.store(self.running, SolveStatus.negative_curvature)
        return True

    def read(self, index: Tensor) -> Tensor:
        """Some rows ``[k, n]``, or columns ``[m, k]`` for the normal metric, in the work dtype."""
        matrix, columns = self.state.matrix, self.metric == "normal"
        if isinstance(matrix, Tensor):
            return matrix[:, index] if columns else matrix[index]
        where = index.numpy()
        part = matrix[:, where] if columns else matrix[where]
        return torch.from_numpy(part.toarray())

    # ------------------------------------------------------------------ the verdicts

    def residual(self) -> Tensor:
        """The true residual of the running columns."""
        if self.vector:
            return self.problem.residual(self.X[:, 0]).unsqueeze(1)
        return self.problem.residual(self.X.contiguous(), self.running)

    def look(self, step: int, *, first: bool) -> None:
        """Judge the running columns by their residuals."""
        problem, A = self.problem, self.problem.A
        found = norms(A.out_space, self.R)
        normal: list[float] | None = None
        if self.metric == "normal":
            R = self.R[:, 0] if self.vector else self.R
            normal = normal_residuals(problem, R, problem.adjoint_product(R), self.norm)
        x_norms = norms(A.space, self.X)
        ended: dict[int, SolveStatus] = {}
        for place, (j, residual) in enumerate(zip(self.running, found, strict=True)):
            self.residuals[j], self.steps[j] = residual, step
            if normal is not None:
                self.normal[j] = normal[place]
            level = self.eps * (self.norm * x_norms[place] + problem.b_norms[j])
            if not math.isfinite(residual):
                ended[place] = SolveStatus.non_finite
            elif residual <= self.allowed[j]:
                ended[place] = SolveStatus.converged
            elif normal is not None and normal[place] <= self.recipe.rtol:
                ended[place] = SolveStatus.least_squares
            elif residual <= rounding_limit(level, problem.b_norms[j], self.eps) and not first:
                ended[place] = SolveStatus.precision
        if not problem.silent:
            problem.note(step, self.residuals)
        if self.metric != "normal":
            self.ask(found, ended, first=first)
        for status in set(ended.values()):
            self.store([self.running[p] for p in ended if ended[p] is status], status)

    def ask(self, found: list[float], ended: dict[int, SolveStatus], *, first: bool) -> None:
        """Whether columns whose residual does not fall any more have a solution at all."""
        places = []
        for place, (j, residual) in enumerate(zip(self.running, found, strict=True)):
            if place in ended:
                continue
            if residual < 0.95 * self.best[j]:
                self.best[j], self.since[j] = residual, 0
            else:
                self.since[j] += 1
            if self.asked[j]:
                continue
            if self.since[j] >= _PATIENCE or (first and self.impossible(place)):
                self.asked[j] = True
                places.append(place)
        if not places:
            return
        R = self.R[:, 0] if self.vector else take(self.R, places)
        inner = Problem(self.problem.A, R.contiguous(), scales=[1.0] * len(places))
        solver = LSMR(self.recipe.rtol, max_steps=4 * min(self.problem.A.shape))
        outcome = solver._run(inner, solver._prepare(self.problem.A))
        self.problem.products += inner.products
        Z = outcome.value.unsqueeze(1) if self.vector else outcome.value
        assert outcome.residuals is not None
        for position, place in enumerate(places):
            j = self.running[place]
            proved = outcome.statuses[position] is SolveStatus.least_squares
            if proved and outcome.residuals[position] > self.allowed[j]:
                ended[place] = SolveStatus.inconsistent
                self.X[:, place] += Z[:, position]
                self.residuals[j] = outcome.residuals[position]

    def impossible(self, place: int) -> bool:
        """Whether a row of zeros has a right-hand side that is not."""
        sizes = self.state.sizes
        if sizes is None:
            return False
        return bool((self.R[sizes <= 0, place] != 0).any())

    def store(self, columns: list[int], status: SolveStatus) -> None:
        """End some of the running columns."""
        if not columns:
            return
        places = [self.running.index(j) for j in columns]
        for j, place in zip(columns, places, strict=True):
            self.statuses[j] = status
            self.value[:, j] = self.X[:, place]
        keep = [p for p in range(len(self.running)) if p not in set(places)]
        self.running = [self.running[p] for p in keep]
        self.X, self.R, self.B = (take(T, keep) for T in (self.X, self.R, self.B))


def pseudo_solve(core: Tensor, right: Tensor) -> Tensor:
    """``core^+ right`` for a small positive semidefinite core, in double precision."""
    wide = torch.complex128 if core.is_complex() else torch.float64
    rcond = core.shape[0] * torch.finfo(core.dtype).eps
    inverse = torch.linalg.pinv(core.to(wide), rtol=rcond, hermitian=True)
    return (inverse @ right.to(wide)).to(right.dtype)
