"""BSVRB, both versions, against deterministic descent and closed forms in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from woodbury import Cholesky
from woodbury.bilevel import BSVRBv1, BSVRBv2
from woodbury.errors import ArgumentError, DataError, DtypeError, NonFiniteError, ShapeError

DOUBLE = {"dtype": torch.float64}
Method = type[BSVRBv1] | type[BSVRBv2]
BOTH = pytest.mark.parametrize("method", [BSVRBv1, BSVRBv2])


class Blocks:
    """m copies of T0 with their own data: g_i = 0.5 y'(A_i + diag(exp x)) y - b_i'y."""

    def __init__(self, m: int = 4, n: int = 5) -> None:
        gen = torch.Generator().manual_seed(5)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, **DOUBLE)

        root = randn(m, n, n)
        self.m, self.n = m, n
        self.A, self.b = root @ root.mT / n, randn(m, n)
        self.C, self.e = randn(m, 3, n), randn(m, 3)
        self.x = 0.5 * randn(n)

    def inner(self, y: Tensor, x: Tensor, blocks: Tensor, batch: Any) -> Tensor:
        quadratic = 0.5 * torch.einsum("ij,ijk,ik->i", y, self.A[blocks], y)
        return quadratic + 0.5 * (x.exp() * y.square()).sum(1) - (self.b[blocks] * y).sum(1)

    def outer(self, y: Tensor, x: Tensor, blocks: Tensor, batch: Any) -> Tensor:
        misfit = torch.einsum("ijk,ik->ij", self.C[blocks], y) - self.e[blocks]
        return 0.5 * misfit.square().sum(1) + 0.1 * x.square().sum()

    def H(self, x: Tensor) -> Tensor:
        return self.A + torch.diag(x.exp())

    def solution(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.H(x), self.b)

    def slopes(self, y: Tensor) -> Tensor:
        misfit = torch.einsum("ijk,ik->ij", self.C, y) - self.e
        return torch.einsum("ijk,ij->ik", self.C, misfit)

    def adjoints(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.solve(self.H(x), self.slopes(y))

    def hypergradient(self, x: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
        """Mean of d_i - J_i v_i at any y and v."""
        v = self.adjoints(x, y) if v is None else v
        return 0.2 * x - (x.exp() * y * v).mean(0)

    def radius(self) -> float:
        return torch.linalg.eigvalsh(self.H(self.x)).max().item()

    def make(self, method: Method, **options: Any) -> Any:
        given: dict[str, Any] = {"inner_step": 0.2 / self.radius(), "outer": 0.05, **options}
        zeros = torch.zeros(self.m, self.n, **DOUBLE)
        return method(self.inner, self.outer, zeros, self.x.clone(), **given)


DETERMINISTIC = {"tracking": (1.0, 0.0), "momentum": 1.0}


def test_v1_with_all_blocks_and_no_memory_is_deterministic_descent() -> None:
    problem = Blocks()
    found = problem.make(BSVRBv1, **DETERMINISTIC)
    tau = found.inner_step
    x, y = problem.x.clone(), torch.zeros(problem.m, problem.n, **DOUBLE)
    for _ in range(15):
        report = found.step()
        slope = torch.einsum("ijk,ik->ij", problem.H(x), y) - problem.b
        direction = problem.hypergradient(x, y)
        assert report.direction_norm == pytest.approx(direction.norm().item(), rel=1e-10)
        x, y = x - 0.05 * direction, y - tau * slope
        torch.testing.assert_close(found.hyper[""], x, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.params[""], y, rtol=1e-10, atol=1e-12)


def test_v2_with_all_blocks_and_no_memory_is_deterministic_descent() -> None:
    problem = Blocks()
    found = problem.make(BSVRBv2, adjoint_step=0.3 / problem.radius(), radius=1e6, **DETERMINISTIC)
    x, y = problem.x.clone(), torch.zeros(problem.m, problem.n, **DOUBLE)
    v = torch.zeros_like(y)
    for _ in range(15):
        found.step()
        H = problem.H(x)
        slope = torch.einsum("ijk,ik->ij", H, y) - problem.b
        misfit = torch.einsum("ijk,ik->ij", H, v) - problem.slopes(y)
        direction = problem.hypergradient(x, y, v)
        x, y = x - 0.05 * direction, y - found.inner_step * slope
        v = v - found.adjoint_step * misfit
        torch.testing.assert_close(found.hyper[""], x, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.params[""], y, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.adjoints, v, rtol=1e-10, atol=1e-12)


@BOTH
def test_direction_at_the_inner_solution_is_the_exact_hypergradient(method: Method) -> None:
    problem = Blocks()
    found = problem.make(method)
    y = problem.solution(problem.x)
    state = {**found.state_dict(), "params": y}
    if method is BSVRBv2:
        state["adjoints"] = problem.adjoints(problem.x, y)
    found.load_state_dict(state)
    found.step()
    x = problem.x.clone().requires_grad_()
    exact = torch.autograd.grad(  # through LAPACK's solution, not by the formula
        problem.outer(torch.linalg.solve(problem.H(x), problem.b), x, torch.arange(4), None).mean(),
        x,
    )[0]
    torch.testing.assert_close((problem.x - found.hyper[""]) / 0.05, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("blocks", [4, 2])
def test_adjoints_tend_to_the_inverse_for_a_frozen_point(blocks: int) -> None:
    problem = Blocks()
    y = problem.solution(problem.x)
    found = problem.make(
        BSVRBv2,
        outer=1e-300,
        blocks=blocks,
        radius=1e6,
        tracking=(0.9, 0.1),
        inner_step=1e-300,
        adjoint_step=0.25 / problem.radius(),
    )
    found.load_state_dict({**found.state_dict(), "params": y})
    for _ in range(1500):
        found.step()
    expected = problem.adjoints(problem.x, y)
    torch.testing.assert_close(found.adjoints, expected, rtol=1e-8, atol=1e-8)


@BOTH
@pytest.mark.parametrize("blocks", [2, 3])
def test_sampled_blocks_reach_the_minimum(method: Method, blocks: int) -> None:
    problem = Blocks()
    found = problem.make(method, blocks=blocks, outer=0.02, inner_step=0.15 / problem.radius())
    for _ in range(1000):
        found.step()
    x = problem.x.clone()
    for _ in range(1500):  # the reference: exact hypergradient descent
        x = x - 0.1 * problem.hypergradient(x, problem.solution(x))
    assert problem.hypergradient(x, problem.solution(x)).norm() < 1e-10
    start = (problem.x - x).norm()
    assert (found.hyper[""] - x).norm() < 0.05 * start
    exact = problem.hypergradient(found.hyper[""], problem.solution(found.hyper[""])).norm()
    assert exact < 0.05 * problem.hypergradient(problem.x, problem.solution(problem.x)).norm()


def test_every_pass_visits_every_block_and_the_missed_ones_are_counted() -> None:
    problem = Blocks()
    found = problem.make(BSVRBv2, blocks=2)
    for _ in range(5):
        one, two = found.step().blocks, found.step().blocks
        assert sorted([*one.tolist(), *two.tolist()]) == [0, 1, 2, 3]
    assert int(found.state_dict()["missed"].max()) == 1


def test_delay_of_a_block_multiplies_its_step() -> None:
    problem = Blocks()
    found = problem.make(BSVRBv2, blocks=1, tracking=(1.0, 0.0), outer=1e-300)
    seen = [found.step().blocks.item() for _ in range(4)]
    tau = found.inner_step
    for delay, block in enumerate(seen, start=1):  # from y = 0 the slope is -b
        expected = delay * tau * problem.b[block]
        torch.testing.assert_close(found.params[""][block], expected, rtol=1e-12, atol=0)


class Noisy:
    """Blocks whose losses are means over rows: linear regression with a weight for each row."""

    def __init__(self, m: int = 3, rows: int = 40, n: int = 3) -> None:
        gen = torch.Generator().manual_seed(9)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, **DOUBLE)

        self.m, self.n, self.rows = m, n, rows
        self.X, self.t = randn(rows, n), randn(rows)
        self.Xv, self.tv = randn(30, n), randn(30)
        self.scale = torch.tensor([0.5, 1.0, 2.0], **DOUBLE)[:m]
        self.x = torch.zeros(rows, **DOUBLE)
        self.train = (self.X, self.t, torch.arange(rows))
        self.valid = (self.Xv, self.tv)

    def inner(self, y: Tensor, x: Tensor, blocks: Tensor, batch: Any) -> Tensor:
        X, t, index = batch
        error = torch.einsum("ibn,in->ib", X, y) - self.scale[blocks, None] * t
        return (x[index].sigmoid() * error.square()).mean(1) + 0.1 * y.square().sum(1)

    def outer(self, y: Tensor, x: Tensor, blocks: Tensor, batch: Any) -> Tensor:
        X, t = batch
        error = torch.einsum("ibn,in->ib", X, y) - self.scale[blocks, None] * t
        return error.square().mean(1)

    def exact(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        weights = x.sigmoid() / self.rows
        H = 2 * (self.X.T * weights) @ self.X + 0.2 * torch.eye(self.n, **DOUBLE)
        values = []
        for scale in self.scale:
            y = torch.linalg.solve(H, 2 * self.X.T @ (weights * scale * self.t))
            values.append((self.Xv @ y - scale * self.tv).square().mean())
        return torch.autograd.grad(torch.stack(values).mean(), x)[0]

    def make(self, method: Method, **options: Any) -> Any:
        given: dict[str, Any] = {
            "inner_data": self.train,
            "outer_data": self.valid,
            "batch_size": 8,
            **options,
        }
        zeros = torch.zeros(self.m, self.n, **DOUBLE)
        return method(self.inner, self.outer, zeros, self.x.clone(), **given)


@BOTH
def test_variance_falls_with_tracking_where_plain_estimates_keep_theirs(method: Method) -> None:
    problem = Noisy()
    exact = problem.exact(problem.x)

    def errors(**options: Any) -> float:
        found = problem.make(
            method,
            blocks=2,
            outer=1e-300,
            inner_step=0.02,
            generator=torch.Generator().manual_seed(1),
            **options,
        )
        total = 0.0
        for k in range(600):
            found.step()
            if k >= 400:
                total += (found.state_dict()["direction"] - exact).norm().item() / 200
        return total

    tracked = errors(tracking=(0.05, 0.95), momentum=0.05)
    plain = errors(tracking=(1.0, 0.0), momentum=1.0)
    assert tracked < plain / 3  # with equal samples


@BOTH
def test_full_batches_do_not_depend_on_the_draws(method: Method) -> None:
    problem = Noisy()
    ends = []
    for seed in (0, 1):
        found = problem.make(method, batch_size=None, generator=torch.Generator().manual_seed(seed))
        for _ in range(3):
            found.step()
        assert found.samples == 3 * 3 * 70
        ends.append(found.hyper[""])
    assert torch.equal(*ends)


@BOTH
def test_data_of_its_own_for_each_block(method: Method) -> None:
    problem = Noisy()
    shared = problem.make(method, batch_size=None)
    copies = {
        "inner_data": tuple(t.expand(3, *t.shape).clone() for t in problem.train),
        "outer_data": tuple(t.expand(3, *t.shape).clone() for t in problem.valid),
    }
    own = problem.make(method, batch_size=None, per_block=True, **copies)
    shared.step(), own.step()
    torch.testing.assert_close(own.hyper[""], shared.hyper[""], rtol=1e-13, atol=0)
    copies["inner_data"][1][2] += 1  # targets of the last block only
    other = problem.make(method, batch_size=4, per_block=True, **copies)
    report = other.step()
    assert report.blocks.tolist() == [0, 1, 2]


@BOTH
def test_mappings_and_single_tensors_agree(method: Method) -> None:
    problem = Blocks()
    plain = problem.make(method, blocks=2)
    halves = {"a": torch.zeros(4, 2, **DOUBLE), "b": torch.zeros(4, 3, **DOUBLE)}
    hyper = {"u": problem.x[:1].clone(), "v": problem.x[1:].clone()}

    def joined(loss: Any) -> Any:
        def of_parts(y: Any, x: Any, blocks: Tensor, batch: Any) -> Tensor:
            return loss(torch.cat([y["a"], y["b"]], 1), torch.cat([x["u"], x["v"]]), blocks, batch)

        return of_parts

    parts = method(
        joined(problem.inner),
        joined(problem.outer),
        halves,
        hyper,
        blocks=2,
        outer=0.05,
        inner_step=plain.inner_step,
    )
    for _ in range(6):
        plain.step(), parts.step()
    assert torch.equal(torch.cat([hyper["u"], hyper["v"]]), plain.hyper[""])  # in place
    assert torch.equal(torch.cat([halves["a"], halves["b"]], 1), plain.params[""])


@BOTH
def test_resumes_exactly(method: Method) -> None:
    problem = Noisy()

    def make() -> Any:
        return problem.make(
            method, blocks=2, outer=lambda tensors: torch.optim.Adam(tensors, lr=0.01)
        )

    whole, first = make(), make()
    for _ in range(7):
        first.step()
    state = first.state_dict()
    first.step()  # the state is a copy
    second = make()
    second.load_state_dict(state)
    for _ in range(5):
        second.step()
    for _ in range(12):
        whole.step()
    assert second.steps == 12
    assert second.samples == whole.samples
    assert torch.equal(second.hyper[""], whole.hyper[""])
    assert torch.equal(second.params[""], whole.params[""])
    assert torch.equal(second.state_dict()["direction"], whole.state_dict()["direction"])


def test_tracked_hessian_is_kept_positive_definite() -> None:
    # The curvature of -y^2/2 + y^4/4 at 0 is -1: it is lifted to min_curvature.
    def inner(y: Tensor, x: Tensor, blocks: Tensor, batch: Any) -> Tensor:
        return (-0.5 * y.square() + 0.25 * y**4 - 1e-3 * x * y).sum(1)

    found = BSVRBv1(
        inner,
        lambda y, x, blocks, batch: y.sum(1),
        torch.zeros(2, 2, **DOUBLE),
        torch.ones(1, **DOUBLE),
        min_curvature=0.3,
        outer=1e-300,
        recipe=Cholesky(),
    )
    found.step()
    values = torch.linalg.eigvalsh(found.state_dict()["hessians"])
    torch.testing.assert_close(values, torch.full((2, 2), 0.3, **DOUBLE), rtol=1e-12, atol=1e-12)


def test_adjoints_stay_in_their_ball() -> None:
    problem = Blocks()
    found = problem.make(BSVRBv2, radius=0.01)
    for _ in range(5):
        found.step()
    norms = found.adjoints.norm(dim=1)
    torch.testing.assert_close(norms, torch.full((4,), 0.01, **DOUBLE))


@BOTH
def test_one_block_of_one_variable_and_float32(method: Method) -> None:
    x = torch.zeros(1)
    found = method(
        lambda y, x, blocks, batch: 0.5 * (y - x).square().sum(1),
        lambda y, x, blocks, batch: 0.5 * (y - 1).square().sum(1),
        torch.zeros(1, 1),
        x,
        outer=0.05,
        inner_step=0.5,
    )
    for _ in range(400):
        found.step()
    assert x.dtype == found.params[""].dtype == torch.float32
    assert x.item() == pytest.approx(1, abs=1e-3)


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 5}, "blocks is 5; there are 4 blocks"),
        ({"blocks": 0}, "blocks is 0"),
        ({"tracking": (0.0, 1.0)}, "0 < a <= 1"),
        ({"tracking": (0.5, -1.0)}, "g >= 0"),
        ({"momentum": 0.0}, "momentum is 0.0"),
        ({"inner_step": math.nan}, "inner_step is nan"),
        ({"outer": -1.0}, "-1.0; it must be positive"),
    ],
)
def test_settings_that_make_no_sense(method: Method, options: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Blocks().make(method, **options)


def test_settings_of_one_version() -> None:
    with pytest.raises(ArgumentError, match="min_curvature is 0.0"):
        Blocks().make(BSVRBv1, min_curvature=0.0)
    with pytest.raises(ArgumentError, match="radius is inf"):
        Blocks().make(BSVRBv2, radius=math.inf)
    with pytest.raises(ArgumentError, match="batch_size is 0"):
        Noisy().make(BSVRBv2, batch_size=0)


@BOTH
def test_refuses_wrong_shapes_data_and_values(method: Method) -> None:
    problem = Blocks()
    y, x = torch.zeros(4, 5, **DOUBLE), problem.x.clone()

    def build(inner: Any = problem.inner, params: Any = y, hyper: Any = x, **more: Any) -> Any:
        return method(inner, problem.outer, params, hyper, **more)

    with pytest.raises(ShapeError, match=r"\[m, ...\]"):
        build(params=torch.zeros((), **DOUBLE))
    with pytest.raises(ShapeError, match="one m >= 1 for all"):
        build(params={"a": y, "b": y[:2].clone()})
    with pytest.raises(DtypeError, match="params are torch.float32"):
        build(params=y.float())
    with pytest.raises(ShapeError, match="one value for each of the 4 sampled blocks"):
        build(inner=lambda y, x, blocks, batch: y.sum()).step()
    with pytest.raises(DataError, match=r"\[3, 4\] rows"):
        build(inner_data=(torch.ones(3), torch.ones(4)))
    with pytest.raises(DataError, match="row per example"):
        build(inner_data=("text",))
    with pytest.raises(DataError, match="with m = 4"):
        build(inner_data=torch.ones(3, 7), per_block=True)
    found = build(inner=lambda y, x, blocks, batch: problem.inner(y, x, blocks, batch) / 0.0)
    before = found.state_dict()
    with pytest.raises(NonFiniteError, match="the inner loss of block 0"):
        found.step()
    assert torch.equal(found.state_dict()["hyper"], before["hyper"])
    with pytest.raises(ArgumentError, match="lacks \\['slopes'\\]"):
        found.load_state_dict({k: v for k, v in before.items() if k != "slopes"})
    with pytest.raises(ShapeError, match="'slopes' of the state"):
        found.load_state_dict({**before, "slopes": torch.ones(3, 5, **DOUBLE)})
