"""The table of modes tells right from wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from woodbury import CG
from woodbury.errors import ArgumentError, DtypeError, GradientError
from woodbury.implicit import Implicit, compare_modes, fixed_point, minimize

F64 = torch.float64


def T(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * torch.cos(x) + t


def iterate(x: Tensor, t: Tensor, steps: int = 60) -> Tensor:
    for _ in range(steps):
        x = T(x, t)
    return x


def test_every_mode_has_its_row() -> None:
    x0, t = torch.zeros(3, dtype=F64), torch.linspace(0, 1, 3, dtype=F64)
    found = compare_modes(fixed_point(T, iterate), x0, t, loss=lambda x: (x**3).sum())
    errors = {type(row.mode).__name__: row.relative_error for row in found.rows}
    assert errors["Implicit"] < 1e-8
    assert errors["Unrolled"] < 1e-8
    assert errors["Implicit"] < errors["Truncated"] < 1e-2 < errors["OneStep"]
    assert found["truncated"].products == 10
    assert found["unrolled"].products is None
    assert found["implicit"].products > 0
    lines = str(found).splitlines()
    assert len(lines) == 7
    assert lines[1].startswith("Implicit(")
    assert "finite differences" in lines[-1]


def test_modes_that_fail_say_why() -> None:
    f = lambda x, t: ((x - t) ** 2).sum()  # noqa: E731
    solver = minimize(f, lambda x0, t: torch.from_numpy(t.numpy().copy()))
    modes = ["implicit", "unrolled", Implicit(CG(max_steps=0))]
    found = compare_modes(solver, None, torch.ones(2, dtype=F64), modes=modes)
    assert [bool(row.failure) for row in found.rows] == [False, True, True]
    assert "numpy" in found["unrolled"].failure
    assert "max_steps" in found[modes[2]].failure
    cut = compare_modes(
        minimize(f, lambda x0, t: t.detach()), None, torch.ones(2, dtype=F64), modes=["unrolled"]
    )
    assert cut["unrolled"].failure


def test_a_wrong_condition_is_seen() -> None:
    wrong = fixed_point(lambda x, t: T(x, 2 * t), iterate, stationary_rtol=10.0)
    t = torch.linspace(0, 1, 3, dtype=F64)
    found = compare_modes(wrong, torch.zeros(3, dtype=F64), t, modes=["implicit"])
    assert found["implicit"].relative_error > 0.1


def test_bad_input() -> None:
    solver = fixed_point(T, iterate)
    x0, t = torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64)
    with pytest.raises(ArgumentError, match="make it with root"):
        compare_modes(iterate, x0, t)
    with pytest.raises(ArgumentError, match="step is 0"):
        compare_modes(solver, x0, t, step=0.0)
    with pytest.raises(DtypeError, match="float32"):
        compare_modes(solver, x0.float(), t.float())
    with pytest.raises(GradientError, match="no floating tensor"):
        compare_modes(solver, x0, 0.5)
    with pytest.raises(ArgumentError, match="was not compared"):
        compare_modes(solver, x0, t, modes=["implicit"])["unrolled"]
