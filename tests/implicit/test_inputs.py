"""Bad input is refused with the reason, and bad solutions are warned of; nothing is silently zero.

Beside it: half precision, ``torch.compile``, and the failure policies of backward solves.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from woodbury import CG
from woodbury.errors import (
    ArgumentError,
    DtypeError,
    GradientError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularError,
    SolveError,
)
from woodbury.implicit import (
    Implicit,
    OneStep,
    Phantom,
    StationarityWarning,
    Truncated,
    attach,
    fixed_point,
    implicit_jvp,
    implicit_vjp,
    minimize,
    root,
    stationarity,
)
from woodbury.solvers import Eigh, SolveReport, SolveWarning

F64 = torch.float64
ones = torch.ones(3)


def shift(x: Tensor, t: Tensor) -> Tensor:
    return x - t


def given(_: Any, t: Tensor) -> Tensor:
    return t.clone()


class Model:
    """A condition with state."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return x - t * self.weight

    def method(self, x: Tensor, t: Tensor) -> Tensor:
        return x - t * self.weight


leaf = torch.ones(3, requires_grad=True)


def closure() -> dict[str, tuple[Callable[..., Any], str]]:
    inner = torch.ones(3, requires_grad=True)
    linear = torch.nn.Linear(3, 3)
    nested = {"a": [inner]}
    return {
        "local": (lambda x, t: x - t * inner, "'inner'"),
        "global": (lambda x, t: x - t * leaf, "'leaf'"),
        "module": (lambda x, t: x - t * linear(ones).mean(), "'linear.weight'"),
        "container": (lambda x, t: x - t * nested["a"][0], r"'nested\['a'\]\[0\]'"),
        "partial": (functools.partial(lambda x, t, w: x - t * w, w=inner), "'w'"),
        "object": (Model(inner), "'self.weight'"),
        "method": (Model(inner).method, "'self.weight'"),
        "function": ((lambda f: lambda x, t: f(x, t))(lambda x, t: x - t * inner), "'inner'"),
        "computed": (lambda x, t: x - t * (lambda: leaf * 2)(), "'leaf'"),
    }


@pytest.mark.parametrize("name", closure())
def test_closed_over_tensor_is_named(name: str) -> None:
    F, word = closure()[name]
    word = word.replace("'nested\\['a'\\]\\[0\\]'", "nested\\['a'\\]\\[0\\]")
    with pytest.raises(GradientError, match=word):
        root(F, given)(None, ones)
    with pytest.raises(GradientError, match=word):
        implicit_vjp(F, ones, (ones,), ones)
    with torch.no_grad():  # no derivative, nothing lost
        root(F, given, stationary_rtol=math.inf)(None, ones)


def test_closed_over_tensor_of_a_transform_is_named() -> None:
    with pytest.raises(GradientError, match="'t' of shape .* belongs to a torch.func transform"):
        grad(lambda t: root(lambda x: x - t, lambda x0: ones)(None).sum())(ones)
    with pytest.raises(GradientError, match="'t' of shape .* belongs to a torch.func transform"):
        vmap(lambda t: root(lambda x: x - t, lambda x0: ones)(None))(torch.ones(2, 3))
    with pytest.raises(GradientError, match="'t' of shape .* belongs to a torch.func transform"):
        vmap(lambda t: root(lambda x: x - 1, lambda x0: t * 1)(None))(torch.ones(2, 3))


def test_transforms_within_the_condition_are_no_closures() -> None:
    t = ones.clone().requires_grad_()
    F = grad(lambda x, t: 0.5 * ((x - t) ** 2).sum())
    (found,) = torch.autograd.grad(root(F, given, symmetric=True)(None, t).sum(), t)
    assert torch.equal(found, ones)
    assert torch.equal(grad(lambda t: root(F, given)(None, t).sum())(ones), ones)


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        (torch.arange(3), "torch.int64"),
        (ones > 0, "torch.bool"),
        (torch.ones(0, 3), "empty"),
        (2.0, "float"),
        (ones + 1j, "torch.complex64"),
    ],
)
def test_argument_without_a_derivative(argument: Any, word: str) -> None:
    with pytest.raises(GradientError, match=f"argument 0 is {word}"):
        root(lambda x, a: x - 1, lambda x0, a: ones, argnums=0)(None, argument)
    assert torch.equal(root(lambda x, a: x - 1, lambda x0, a: ones)(None, argument), ones)


def test_argnums_out_of_range() -> None:
    with pytest.raises(ArgumentError, match="argnums holds 1, but there are 1 arguments"):
        root(shift, given, argnums=1)(None, ones)
    with pytest.raises(ArgumentError, match="argnums holds -2"):
        implicit_vjp(shift, ones, (ones,), ones, argnums=-2)


def test_option_that_requires_a_gradient() -> None:
    solver = root(shift, lambda x0, t, scale: t * scale)
    with pytest.raises(GradientError, match=r"options \['scale'\]"):
        solver(None, ones, scale=leaf)


@pytest.mark.parametrize(
    ("solution", "error", "word"),
    [
        (torch.ones(0, 3), ShapeError, "no entries"),
        (torch.arange(3), DtypeError, "int64"),
        (ones + 1j, DtypeError, "complex64"),
        ("found", DtypeError, "str"),
        ((ones, ones.double()), DtypeError, "several dtypes"),
        (ones * math.nan, NonFiniteError, "3 of 3 entries of the solution"),
        ({"a": ones, "b": ones}, ShapeError, "structure"),
    ],
)
def test_solution_that_is_none(solution: Any, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        root(lambda x, t: torch.ones(3), lambda x0, t: solution)(None, ones)


def test_condition_of_another_kind() -> None:
    with pytest.raises(ShapeError, match=r"shape \(2,\) where the solution has \(3,\)"):
        root(lambda x, t: x[:2], given)(None, ones)
    with pytest.raises(DtypeError, match="int64"):
        root(lambda x, t: torch.arange(3), given)(None, ones)
    with pytest.raises(NonFiniteError, match="condition at the solution"):
        root(lambda x, t: x / 0, given)(None, ones)
    with pytest.raises(GradientError, match="scalar"):
        minimize(shift, given)(None, ones)
    with pytest.raises(GradientError, match="does not depend"):
        minimize(lambda x, t: t.sum(), given)(None, ones)
    with pytest.raises(NonFiniteError, match="f = <lambda> is nan .* mean of an empty batch"):
        minimize(lambda x, t, rows: ((rows @ x) ** 2).mean(), lambda x0, t, rows: t)(
            None, ones, torch.ones(0, 3)
        )


def test_settings_that_make_no_sense() -> None:
    for make in (
        lambda: root(shift, given, mode="implict"),
        lambda: root(3, given),
        lambda: root(shift, 3),
        lambda: root(shift, given, strong_convexity=0.0),
        lambda: root(shift, given, stationary_rtol=-1.0),
        lambda: Implicit(on_failure="never"),
        lambda: Implicit("CG"),
        lambda: Truncated(steps=0),
        lambda: OneStep(step=0.0),
        lambda: Phantom(damping=0.0),
        lambda: attach(shift, ones, ones, kind="saddle"),
        lambda: stationarity(shift, ones, ones, strong_convexity=-1.0),
        lambda: root(shift, given, has_aux=True)(None, ones),
        lambda: root(shift, given, mode="one_step")(None, ones),
    ):
        with pytest.raises(ArgumentError):
            make()


def test_settings_that_do_not_exist() -> None:
    for make in (root, fixed_point, minimize):
        with pytest.raises(TypeError, match="there is no setting 'modes'; there are mode, argnums"):
            make(shift, given, modes="implicit")
    with pytest.raises(TypeError, match="there is no setting 'symmetric'"):  # it always is
        minimize(shift, given, symmetric=True)


def test_tangents_that_do_not_fit() -> None:
    for tangents in ((ones, ones), (torch.ones(2),), (2.0,)):
        with pytest.raises(ShapeError):
            implicit_jvp(shift, ones, (ones,), tangents)
    with pytest.raises(DtypeError):
        implicit_jvp(shift, ones, (ones,), (ones.double(),))
    with pytest.raises(ShapeError, match="tuple"):
        implicit_vjp(shift, ones, [ones], ones)


def test_modified_in_place() -> None:
    data = torch.ones(3)
    solver = root(lambda x, t: x - t**2 * data, lambda x0, t: t**2 * data)
    t = ones.clone().requires_grad_()
    x = solver(None, t)
    with torch.no_grad():
        t.mul_(2)
    with pytest.raises(GradientError, match=r"\(argument 0\) was modified in place"):
        x.sum().backward()
    x = solver(None, t)
    data.add_(1)
    with pytest.raises(GradientError, match="'data' of shape .* modified in place"):
        x.sum().backward()
    t = ones.clone().requires_grad_()
    start = torch.ones(3)
    x = root(lambda x, t: x - t, lambda x0, t: x0)(start, t)
    start.add_(1)  # the solver handed its start back; the solution keeps its value
    assert torch.equal(x, ones)
    x.sum().backward()


def test_optimizer_step_before_backward() -> None:
    t = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([t], lr=0.1)
    x = root(lambda x, t: x - t**2, lambda x0, t: t**2)(None, t)
    t.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(GradientError, match="optimizer step"):
        x.sum().backward()


def quadratic(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (torch.tensor([1.0, 2.0, 4.0], dtype=F64) * (x - t) ** 2).sum()


def test_solution_that_is_not_stationary() -> None:
    t = torch.ones(3, dtype=F64)
    off = torch.tensor([0.1, 0.0, 0.0], dtype=F64)
    solver = minimize(quadratic, lambda x0, t: t + off)
    with pytest.warns(StationarityWarning, match=r"\|F\(x\)\| = 0.1, .* <= 0.1 \(smallest sing"):
        solver(torch.zeros(3, dtype=F64), t)
    known = minimize(quadratic, lambda x0, t: t + off, strong_convexity=0.5)
    with pytest.warns(StationarityWarning, match=r"<= 0.2 \(strong convexity 0.5\)"):
        known(None, t)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minimize(quadratic, lambda x0, t: t + off, stationary_rtol=math.inf)(None, t)
    with pytest.warns(StationarityWarning):
        attach(quadratic, t + off, t, kind="minimum")
    with pytest.warns(StationarityWarning):
        vmap(lambda t: solver(None, t))(t.expand(2, 3))


@pytest.mark.parametrize("start", [None, torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)])
@pytest.mark.parametrize("at", [0.0, 1.0, 1e6, 1e-6])
def test_solutions_to_rounding_are_not_warned_of(at: float, start: Tensor | None) -> None:
    t = torch.full((3,), at, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minimize(quadratic, lambda x0, t: t * (1 + 1e-15) + 1e-15)(start, t)


def test_bound_holds_and_is_sharp() -> None:
    t, x = torch.zeros(3, dtype=F64), torch.tensor([0.3, 0.2, 0.1], dtype=F64)
    found = stationarity(quadratic, x, t, kind="minimum")
    assert x.norm() <= found.error_bound
    along = stationarity(quadratic, torch.tensor([0.3, 0.0, 0.0], dtype=F64), t, kind="minimum")
    assert along.error_bound == pytest.approx(0.3, rel=1e-12)
    n = 400
    d = torch.linspace(1, 2, n, dtype=F64)
    big = stationarity(lambda x: d * x, torch.ones(n, dtype=F64), symmetric=True)
    assert torch.linalg.vector_norm(d).item() / 1.0 <= big.error_bound * 1.0001
    assert "estimate" in big.bound
    unknown = stationarity(lambda x: d * x, torch.ones(n, dtype=F64))
    assert math.isnan(unknown.error_bound)
    singular = stationarity(lambda x: x[:1].expand(3), torch.ones(3, dtype=F64))
    assert math.isnan(singular.error_bound)
    assert "singular" in singular.message()


def test_singular_jacobian() -> None:
    t = torch.ones(2, requires_grad=True)
    x = root(lambda x, t: (x.sum() - t.sum()).expand(2), lambda x0, t: t.clone())(None, t)
    with pytest.raises(SingularError, match=r"Jacobian \(2, 2\) of the condition F = <lambda>"):
        x.sum().backward()
    x = root(lambda x, t: x.detach() - t, lambda x0, t: t.clone())(None, t)
    with pytest.raises(SingularError):
        x.sum().backward()


def saddle(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (torch.tensor([1.0, -1.0, 2.0]) * (x - t) ** 2).sum()


def test_indefinite_hessian() -> None:
    t = torch.ones(3, requires_grad=True)
    with pytest.raises(NotPositiveDefiniteError, match="the Jacobian .* f = saddle"):
        minimize(saddle, given)(None, t).sum().backward()
    with pytest.raises(SolveError, match="negative_curvature"):
        minimize(saddle, given, mode=Implicit(CG()))(None, t).sum().backward()
    minimize(saddle, given, mode=Implicit(Eigh()))(None, t).sum().backward()
    assert torch.allclose(t.grad, ones)


def test_failure_policies_of_the_backward_solve() -> None:
    n = 30
    d = torch.logspace(0, 6, n, dtype=F64)
    f = lambda x, t: 0.5 * (d * (x - t) ** 2).sum()  # noqa: E731
    t = torch.ones(n, dtype=F64, requires_grad=True)

    def derivative(policy: Any) -> tuple[Tensor, SolveReport]:
        report = SolveReport()
        mode = Implicit(CG(max_steps=2), on_failure=policy)
        x = minimize(f, given, mode=mode, report=report)(None, t)
        return torch.autograd.grad(x.sum(), t)[0], report

    with pytest.raises(SolveError, match="max_steps"):
        derivative("raise")
    with pytest.warns(SolveWarning, match="max_steps"):
        _, report = derivative("warn")
    assert (report.calls, report.failures, report.ok) == (1, 1, False)
    assert derivative("nan")[0].isnan().all()
    found, report = derivative("ignore")
    assert found.isfinite().all()
    assert report.last.status.name == "max_steps"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_solved_in_float32(dtype: torch.dtype) -> None:
    report = SolveReport()
    f = lambda x, t: ((x - t) ** 2).sum() + (x**2).sum()  # noqa: E731
    solver = minimize(f, lambda x0, t: t / 2, report=report)
    t = torch.ones(3, dtype=dtype, requires_grad=True)
    x = solver(None, t)
    x.sum().backward()
    assert (x.dtype, t.grad.dtype, report.last.value.dtype) == (dtype, dtype, torch.float32)
    assert torch.equal(t.grad, torch.full((3,), 0.5, dtype=dtype))


def test_autocast_does_not_reach_the_solve() -> None:
    torch.manual_seed(0)
    A = torch.randn(40, 8)

    def f(x: Tensor, t: Tensor) -> Tensor:
        return ((A @ x - t) ** 2).sum() + (x**2).sum()

    def solve(x0: Any, t: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.linalg.solve(A.mT @ A + torch.eye(8), A.mT @ t)

    t = torch.randn(40, requires_grad=True)
    (wanted,) = torch.autograd.grad(minimize(f, solve)(None, t).sum(), t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = minimize(f, solve)(None, t)
        (found,) = torch.autograd.grad(x.sum(), t)
    assert torch.equal(found, wanted)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.warns(StationarityWarning),  # to the precision of bfloat16 only
    ):
        minimize(f, lambda x0, t: solve(None, t).bfloat16())(None, t)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_function_breaks_its_graph_at_the_call(backend: str) -> None:
    solver = root(lambda x, t: x**2 - t, lambda x0, t: t.sqrt())

    def f(t: Tensor) -> Tensor:
        return (solver(None, t * 2) * 3).sum()

    t = torch.rand(3, requires_grad=True)
    torch._dynamo.reset()
    (wanted,) = torch.autograd.grad(f(t), t)
    (found,) = torch.autograd.grad(torch.compile(f, backend=backend)(t), t)
    torch.testing.assert_close(found, wanted)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="woodbury.implicit calls any solver"):
        torch.compile(f, backend=backend, fullgraph=True)(t)
