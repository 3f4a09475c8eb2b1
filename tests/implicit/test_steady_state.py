"""Steady states: SciPy's integrator says where the flow rests, closed forms how that depends."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import torch
from tests.implicit.derivatives import check_derivatives
from torch import Tensor

from woodbury import GMRES
from woodbury.errors import ArgumentError, GradientError, NonFiniteError, ShapeError, SolveError
from woodbury.implicit import IterationStatus, SteadyState

# Torch itself scripts what forward mode needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is dep:DeprecationWarning")

DOUBLE = torch.float64
ONE = torch.ones((), dtype=DOUBLE)


def pitchfork(x: Tensor, t: Tensor) -> Tensor:
    return t * x - x**3


def toggle(x: Tensor, a: Tensor) -> Tensor:
    """Two genes that repress each other: two stable states, and an unstable one between."""
    u, v = x[..., 0], x[..., 1]
    return torch.stack([a / (1 + v**2) - u, a / (1 + u**2) - v], -1)


@pytest.mark.parametrize("start", [[0.1, 0.3], [0.3, 0.1], [4.0, 0.0], [1.0, 1.4]])
def test_it_ends_where_the_flow_does(start: list[float]) -> None:
    a = torch.tensor(4.0, dtype=DOUBLE)
    flow = scipy.integrate.solve_ivp(
        lambda t, x: toggle(torch.from_numpy(x), a).numpy(), (0, 200), start, rtol=1e-10, atol=1e-12
    )
    found = SteadyState(tol=1e-12, step=0.1).run(toggle, torch.tensor(start, dtype=DOUBLE), a)
    assert found.status is IterationStatus.converged
    np.testing.assert_allclose(found.value.numpy(), flow.y[:, -1], atol=1e-8)


def test_each_root_of_a_pitchfork_by_its_basin() -> None:
    starts = torch.tensor([[1e-3], [-1e-3], [3.0], [-0.5]], dtype=DOUBLE)
    found = SteadyState(batched=True, tol=1e-12).run(pitchfork, starts, 4 * ONE)
    torch.testing.assert_close(found.value[:, 0], torch.tensor([2.0, -2, 2, -2], dtype=DOUBLE))
    assert found.row_status == (IterationStatus.converged,) * 4


def test_an_unstable_state_says_so() -> None:
    zero = torch.zeros(1, dtype=DOUBLE)
    found = SteadyState().run(pitchfork, zero, ONE, throw=False)
    assert found.status is IterationStatus.unstable
    assert not found.ok
    with pytest.raises(SolveError, match="small disturbances leave"):
        SteadyState().run(pitchfork, zero, ONE)
    meant = SteadyState(stability=False).run(pitchfork, zero, ONE)
    assert meant.ok
    # With t < 0 the same point is stable; a centre, with imaginary eigenvalues, is not.
    assert SteadyState().run(pitchfork, zero, -ONE).ok
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=DOUBLE)
    centre = SteadyState().run(lambda x: turn @ x, torch.ones(2, dtype=DOUBLE), throw=False)
    assert centre.status is IterationStatus.unstable
    rows = torch.tensor([[0.0], [0.5]], dtype=DOUBLE)
    mixed = SteadyState(batched=True).run(pitchfork, rows, ONE, throw=False)
    assert mixed.row_status == (IterationStatus.unstable, IterationStatus.converged)


def test_a_linear_flow_in_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    R = torch.randn(6, 6, generator=generator, dtype=DOUBLE)
    J = -(R @ R.mT + 0.1 * torch.eye(6, dtype=DOUBLE)) + (R - R.mT)
    c = torch.randn(6, generator=generator, dtype=DOUBLE)
    rest = SteadyState(tol=1e-13).differentiable(lambda x, J, c: J @ x + c)
    x = rest(torch.zeros(6, dtype=DOUBLE), J, c)
    torch.testing.assert_close(x, -torch.linalg.solve(J, c), rtol=1e-9, atol=1e-10)
    in_c = torch.func.jacrev(lambda c: rest(torch.zeros(6, dtype=DOUBLE), J, c))(c)
    torch.testing.assert_close(in_c, -torch.linalg.inv(J), rtol=1e-8, atol=1e-9)


def test_derivatives_of_every_kind_and_in_a_batch() -> None:
    one = SteadyState(tol=1e-13, step=0.1).differentiable(toggle)
    start = torch.tensor([3.0, 0.1], dtype=DOUBLE)
    a = torch.tensor(4.0, dtype=DOUBLE)
    check_derivatives(lambda a: one(start, a), a, batched=False)
    many = SteadyState(tol=1e-13, step=0.1, batched=True).differentiable(toggle)
    rates = torch.tensor([3.0, 4.0, 5.0], dtype=DOUBLE)
    jacobian = torch.func.jacrev(lambda a: many(start.expand(3, 2), a))(rates)
    for i in range(3):
        expected = torch.func.jacrev(lambda a: one(start, a))(rates[i])
        torch.testing.assert_close(jacobian[i, :, i], expected, rtol=1e-8, atol=1e-10)
        jacobian[i, :, i] = 0
    assert jacobian.abs().max() == 0
    mapped = torch.func.vmap(lambda a: one(start, a))(rates)
    torch.testing.assert_close(mapped, many(start.expand(3, 2), rates), rtol=0, atol=1e-10)


def heat(x: Tensor, source: Tensor) -> Tensor:
    """Diffusion on a line with fixed ends, and a reaction."""
    wide = torch.cat([x.new_zeros(1), x, x.new_zeros(1)])
    return 400 * (wide[2:] - 2 * x + wide[:-2]) - x**3 + source


def test_recipes_find_the_same_state() -> None:
    source = 10 * torch.ones(20, dtype=DOUBLE)
    start = torch.zeros(20, dtype=DOUBLE)
    formed = SteadyState(tol=1e-11).run(heat, start, source)
    by_products = SteadyState(tol=1e-11, recipe=GMRES(rtol=1e-4)).run(heat, start, source)
    torch.testing.assert_close(by_products.value, formed.value, rtol=1e-8, atol=1e-10)
    assert heat(by_products.value, source).abs().max() < 1e-8
    unstable = SteadyState(recipe=GMRES()).run(pitchfork, torch.zeros(2).double(), ONE, throw=False)
    assert unstable.status is IterationStatus.unstable


def test_rows_end_for_themselves_and_the_budget_is_kept() -> None:
    starts = torch.tensor([[2.0], [1e-6]], dtype=DOUBLE)  # solved, and far from it
    found = SteadyState(batched=True).run(pitchfork, starts, 4 * ONE)
    assert found.value[0].item() == 2.0
    solved = SteadyState().run(pitchfork, starts[0], 4 * ONE)
    assert solved.steps == 0
    none = SteadyState(max_steps=0).run(pitchfork, starts[1], 4 * ONE, throw=False)
    assert none.status is IterationStatus.max_steps
    assert none.value.item() == 1e-6
    with pytest.raises(SolveError, match="max_steps"):
        SteadyState(max_steps=2).run(pitchfork, starts[1], 4 * ONE)


def test_a_flow_without_rest_is_no_success() -> None:
    found = SteadyState(max_steps=200).run(
        lambda x: 1 + x**2, torch.ones(1, dtype=DOUBLE), throw=False
    )
    assert found.status in (IterationStatus.stagnation, IterationStatus.max_steps)
    assert torch.isfinite(found.value).all()


def test_float32_and_trees() -> None:
    start = {"u": torch.tensor([0.1]), "v": torch.tensor([2.0])}

    def both(x: dict[str, Tensor], t: Tensor) -> dict[str, Tensor]:
        return {"u": pitchfork(x["u"], t), "v": x["u"] - x["v"]}

    found = SteadyState(tol=1e-5).run(both, start, torch.tensor(4.0))
    assert found.value["u"].dtype == torch.float32
    torch.testing.assert_close(found.value["v"], torch.tensor([2.0]), rtol=1e-5, atol=1e-5)


def test_bad_input() -> None:
    for settings, word in (
        ({"step": 0.0}, "step is 0.0"),
        ({"step": float("nan")}, "step is nan"),
        ({"recipe": "GMRES"}, "recipe is str"),
        ({"recipe": GMRES(), "batched": True}, "solves one problem"),
        ({"tol": -1.0}, "tol is -1.0"),
    ):
        with pytest.raises(ArgumentError, match=word):
            SteadyState(**settings)
    one = torch.ones(1, dtype=DOUBLE)
    with pytest.raises(NonFiniteError, match="at the start"):
        SteadyState().run(lambda x: x / 0, one)
    with pytest.raises(GradientError, match="does not depend on x"):
        SteadyState().run(lambda x: torch.ones(1, dtype=DOUBLE), one)
    with pytest.raises(ShapeError, match="the value of f"):
        SteadyState().run(lambda x: torch.cat([x, x]), one)
