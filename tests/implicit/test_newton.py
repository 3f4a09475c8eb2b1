"""Newton-CG reaches the minimum that SciPy's solver and closed forms name."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from woodbury import Objective
from woodbury.errors import NonFiniteError
from woodbury.implicit import newton_cg


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def test_rosenbrock_with_negative_curvature_on_the_way() -> None:
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    objective = Objective.functional(
        lambda p, batch: rosenbrock(p["x"]), {"x": start}, [torch.zeros(1)]
    )
    found = newton_cg(objective, gtol=1e-10)
    reference = minimize(
        lambda x: rosenbrock(torch.tensor(x)).item(),
        start.numpy(),
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 10000, "maxfev": 10000},
    )
    gradient = objective.with_params(found).gradient()
    assert gradient.norm() < 1e-6
    assert rosenbrock(found).item() <= reference.fun + 1e-10
    assert torch.equal(objective.params_vector(), start)


def test_non_finite_start_is_refused() -> None:
    objective = Objective.functional(
        lambda p, batch: p["x"].log().sum(),
        {"x": torch.full((2,), -1.0, dtype=torch.float64)},
        [torch.zeros(1)],
    )
    with pytest.raises(NonFiniteError):
        newton_cg(objective)
