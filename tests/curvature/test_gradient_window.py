from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conformance import OperatorConformance, draw, wide
from tests.curvature.reference import classification, network
from torch import nn

from woodbury import (
    CG,
    Fisher,
    GradientBuffer,
    GradientWindow,
    Identity,
    Objective,
    SolveStatus,
    solve,
)
from woodbury.curvature import WindowRecursion
from woodbury.errors import (
    ArgumentError,
    DataError,
    DtypeError,
    NonFiniteError,
    ShapeError,
    StructureError,
)

F64 = torch.float64


def gradients(m: int, n: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=F64).to(dtype)


def dense(G: torch.Tensor, damping: float, divisor: float | None = None, block: int | None = None):
    """The matrix from its definition, block by block."""
    G = wide(G)
    m, n = G.shape
    F = G.T @ G / (m if divisor is None else divisor)
    if block is not None:
        keep = torch.zeros(n, n, dtype=F64)
        for start in range(0, n, block):
            keep[start : start + block, start : start + block] = 1
        F = F * keep
    return F + damping * torch.eye(n, dtype=F64)


BLOCKS = [None, 1, 2, 3, 4, 7, 9]


def cases():
    found = []
    for dtype in (F64, torch.float32):
        for block in BLOCKS:
            G = gradients(3, 7, dtype=dtype)
            found.append((GradientWindow(G, 0.3, block=block), dense(G, 0.3, None, block)))
    G = gradients(6, 4)
    found.append((GradientWindow(G, 0.5, divisor=2.0), dense(G, 0.5, 2.0)))
    found.append((GradientWindow(torch.zeros(2, 3, dtype=F64), 2.0), 2 * torch.eye(3, dtype=F64)))
    found.append((GradientWindow(torch.ones(1, 1, dtype=F64), 1.0), 2 * torch.eye(1, dtype=F64)))
    half = gradients(3, 5, dtype=torch.bfloat16)
    found.append((GradientWindow(half, 1.0), dense(half, 1.0)))
    return found


class TestGradientWindow(OperatorConformance):
    def make(self):
        return cases()

    def gradients(self):
        return [
            (lambda G: GradientWindow(G, 0.5), (gradients(2, 4),)),
            (lambda G: GradientWindow(G, 0.5, block=3), (gradients(2, 4),)),
            (lambda G: GradientWindow(G, 0.5, block=1), (gradients(2, 3),)),
        ]


class TestWindowInverse(OperatorConformance):
    def make(self):
        return [(A.inverse(), torch.linalg.inv(M)) for A, M in cases()]


class TestWindowRecursion(OperatorConformance):
    def make(self):
        return [
            (WindowRecursion(A, pages=min(pages, len(A.gradients))), torch.linalg.inv(M))
            for A, M in cases()
            for pages in (1, 2, 3)
            if A.dtype != torch.bfloat16  # the recursion stays in the dtype of the gradients
        ]


# ------------------------------------------------------------------ one matrix in all its forms


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("pages", [1, 2, 5])
def test_all_forms_are_one_matrix(block, pages):
    G, x = gradients(5, 7), gradients(7, 3, seed=1)
    window = GradientWindow(G, 1e-2, block=block)
    want = torch.linalg.solve(dense(G, 1e-2, None, block), x)
    allowed = 1e-10 * want.abs().max()
    recursion = WindowRecursion(window, pages=pages)
    assert (window.inverse() @ x - want).abs().max() <= allowed
    assert (recursion @ x - want).abs().max() <= allowed
    inverse = torch.linalg.inv(dense(G, 1e-2, None, block))
    rows, columns = torch.arange(49) // 7, torch.arange(49) % 7
    for form in (window.inverse(), recursion):
        assert (form.entries(rows, columns) - inverse.flatten()).abs().max() <= allowed
        assert (form.diagonal() - inverse.diagonal()).abs().max() <= allowed
        logdet = torch.linalg.slogdet(inverse).logabsdet
        torch.testing.assert_close(form.logdet(), logdet, rtol=1e-10, atol=1e-10)


def test_the_setting_of_the_papers_own_test():
    """d = 1000, m = 32, damping 1e-5 beside LAPACK; the buffer in both of its forms.

    The reference is by singular values: a dense solve at this condition number has 1e-10 itself.
    """
    G, x = gradients(32, 1000), gradients(1000, 1, seed=1).squeeze(1)
    damping = 1e-5
    _, values, V = torch.linalg.svd(G, full_matrices=False)
    shrunk = values**2 / (values**2 + 32 * damping)
    want = (x - V.T @ (shrunk * (V @ x))) / damping
    dense_solve = torch.linalg.solve(dense(G, damping), x)
    assert (dense_solve - want).norm() <= 1e-8 * want.norm()
    window = GradientWindow(G, damping)
    buffer = GradientBuffer(32, 1000, damping, dtype=F64)
    for g in G:
        buffer.insert(g)
    answers = [
        window.solve(x),
        WindowRecursion(window) @ x,
        WindowRecursion(window, pages=4) @ x,
        buffer.solve(x),
        buffer.solve(x, method="coefficients"),
    ]
    for answer in answers:
        assert (answer - want).norm() <= 1e-13 * want.norm()


@pytest.mark.parametrize("block", [None, 40, 4])
def test_single_precision_forms_its_small_matrices_in_double(block):
    G = gradients(20, 200, dtype=torch.float32)
    x = gradients(200, 1, seed=1).squeeze(1)
    got = GradientWindow(G, 1e-2, block=block).solve(x.float())
    want = torch.linalg.solve(dense(G, 1e-2, None, block), wide(x.float()))
    assert (wide(got) - want).norm() <= 1e-4 * want.norm()


def test_a_window_is_what_general_recipes_agree_with():
    G, b = gradients(4, 30), gradients(30, 2, seed=1)
    window = GradientWindow(G, 0.1)
    structural = solve(window, b)
    iterative = solve(window, b, CG(rtol=1e-12))
    assert structural.status in (SolveStatus.converged, SolveStatus.completed)
    assert iterative.status is SolveStatus.converged
    torch.testing.assert_close(structural.value, iterative.value, rtol=1e-9, atol=1e-9)
    # As a preconditioner of itself it ends in one step.
    preconditioned = solve(window, b, CG(rtol=1e-10, preconditioner=window.inverse()))
    assert preconditioned.steps <= 2
    assert solve(window, torch.zeros(30, dtype=F64)).value.abs().max() == 0


# ------------------------------------------------------------------------- identities and limits


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 6), damping=st.floats(1e-4, 1e3), seed=st.integers(0, 99))
def test_identical_gradients_have_a_closed_form(m, damping, seed):
    g, x = gradients(1, 8, seed).squeeze(0), gradients(1, 8, seed + 1).squeeze(0)
    want = x / damping - g * (g @ x) / (damping * (damping + g @ g))  # Sherman and Morrison
    window = GradientWindow(g.expand(m, 8), damping)
    allowed = 1e-10 * (x.norm() + want.norm()) * max(1.0, 1 / damping)
    assert (window.solve(x) - want).norm() <= allowed
    assert (WindowRecursion(window) @ x - want).norm() <= allowed


@pytest.mark.parametrize("block", [None, 2])
def test_limits_of_the_damping(block):
    G, x = gradients(3, 6), gradients(6, 1, seed=1).squeeze(1)
    large = GradientWindow(G, 1e12, block=block).solve(x)
    torch.testing.assert_close(large * 1e12, x, rtol=1e-10, atol=0)
    # Small: what no gradient sees is 1/damping, the pseudo-inverse is left of the rest.
    seen = G.T @ torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    small = GradientWindow(G, 1e-9).solve(seen)
    want = torch.linalg.pinv(G.T @ G / 3) @ seen
    torch.testing.assert_close(small, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [None, 3])
def test_signs_and_order_of_gradients_do_not_matter(block):
    G, x = gradients(5, 8), gradients(8, 1, seed=2).squeeze(1)
    want = GradientWindow(G, 0.1, block=block).solve(x)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=F64)
    flipped = GradientWindow(signs[:, None] * G, 0.1, block=block)
    shuffled = GradientWindow(G[[3, 0, 4, 1, 2]], 0.1, block=block)
    for other in (flipped, shuffled):
        torch.testing.assert_close(other.solve(x), want, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(WindowRecursion(other) @ x, want, rtol=1e-11, atol=1e-11)


def test_a_shift_and_a_factor_keep_the_structure():
    G = gradients(3, 6)
    window = 2.0 * GradientWindow(G, 0.5) + 0.25 * Identity(6)
    assert isinstance(window, GradientWindow)
    assert window.damping == 1.25
    torch.testing.assert_close(window.to_dense(), 2 * dense(G, 0.5) + 0.25 * torch.eye(6).double())
    # A shift that takes the damping away leaves no window.
    assert not isinstance(GradientWindow(G, 0.5) - Identity(6), GradientWindow)


# ------------------------------------------------------------------------------- the ring buffer


@pytest.mark.parametrize("method", ["cholesky", "coefficients"])
def test_the_ring_follows_its_gradients(method):
    """Partly filled, full and overwritten; with queries after every insertion or not."""
    G = gradients(17, 9)
    x = gradients(9, 2, seed=3)
    buffer = GradientBuffer(5, 9, 1e-2, dtype=F64)
    held = torch.zeros(5, 9, dtype=F64)
    assert (buffer.solve(x, method=method) - x / 1e-2).abs().max() == 0
    for i, g in enumerate(G):
        buffer.insert(g)
        held[i % 5] = g
        if i in (2, 3, 8, 9):  # several slots are new at the next query
            continue
        want = torch.linalg.solve(dense(held, 1e-2), x)
        got = buffer.solve(x, method=method)
        assert (got - want).abs().max() <= 1e-10 * want.abs().max()
        column = buffer.solve(x[:, 0], method=method)
        torch.testing.assert_close(column, got[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(buffer.operator().to_dense(), dense(held, 1e-2))


def test_the_matrices_of_the_paper_are_what_they_say():
    G, damping = gradients(4, 6), 0.3
    buffer = GradientBuffer(4, 6, damping, dtype=F64)
    for g in gradients(4, 6, seed=9):  # other gradients first, which are then replaced
        buffer.insert(g)
    buffer.solve(G[0], method="coefficients")
    for g in G:
        buffer.insert(g)
        buffer.solve(G[0], method="coefficients")
    found = buffer._coefficients
    before = damping * torch.eye(6, dtype=F64)  # F_{i-1}
    for i in range(4):
        solved = torch.linalg.solve(before, G[i])
        D = found.upper[i, i:] - torch.cat([torch.tensor([4.0]), torch.zeros(3 - i)])
        torch.testing.assert_close(D, G[i:] @ solved, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.B[i] @ G, solved, rtol=1e-10, atol=1e-10)
        before = before + torch.outer(G[i], G[i]) / 4


def test_an_operator_of_a_buffer_does_not_change_with_it():
    buffer = GradientBuffer(2, 3, 1.0)
    buffer.insert(torch.ones(3))
    window = buffer.operator()
    kept = window.to_dense()
    buffer.insert(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(window.to_dense(), kept)


def test_a_buffer_continues_from_its_state():
    G = gradients(7, 5)
    one, other = (GradientBuffer(3, 5, 0.1, dtype=F64) for _ in range(2))
    for g in G[:4]:
        one.insert(g)
    other.load(one.state())
    for g in G[4:]:
        one.insert(g)
        other.insert(g)
    x = gradients(5, 1, seed=5).squeeze(1)
    for method in ("cholesky", "coefficients"):
        torch.testing.assert_close(
            one.solve(x, method=method), other.solve(x, method=method), rtol=1e-12, atol=1e-12
        )
    with pytest.raises(ShapeError, match="this window"):
        GradientBuffer(2, 5, 0.1).load(one.state())


def test_a_bad_gradient_leaves_the_buffer_as_it_was():
    buffer = GradientBuffer(2, 3, 1.0)
    buffer.insert(torch.ones(3))
    before = buffer.solve(torch.ones(3))
    with pytest.raises(NonFiniteError, match="gradient 1"):
        buffer.insert(torch.tensor([1.0, math.nan, 0.0]))
    with pytest.raises(ShapeError, match="expected"):
        buffer.insert(torch.ones(4))
    assert torch.equal(buffer.solve(torch.ones(3)), before)
    with pytest.raises(ShapeError, match=r"\[3, k\]"):
        buffer.solve(torch.ones(4))
    with pytest.raises(ArgumentError, match="coefficients"):
        buffer.solve(torch.ones(3), method="lu")
    for size, dim, damping in [(0, 3, 1.0), (2, 0, 1.0), (2, 3, 0.0), (2, 3, math.inf)]:
        with pytest.raises(ArgumentError):
            GradientBuffer(size, dim, damping)


# ------------------------------------------------------------------------------ from an objective


def objective(weights=None, l2=0.0, parts=((0, 3), (3, 9))):
    model = network((3, 4, 2))
    x, y = classification(9, 3, 2)
    data = [(x[a:b], y[a:b]) for a, b in parts]
    return Objective(model, "cross_entropy", data, weights=weights, l2=l2)


@pytest.mark.parametrize("weighted", [False, True])
def test_all_examples_are_the_empirical_fisher_matrix(weighted):
    weights = torch.linspace(0, 2, 9, dtype=F64) if weighted else None
    given = objective(weights, l2=0.25)
    n = given.space.dim
    window = GradientWindow.from_objective(given, 0.5)
    want = Fisher(given, "empirical").to_dense() + 0.5 * torch.eye(n, dtype=F64)
    torch.testing.assert_close(window.to_dense(), want, rtol=1e-10, atol=1e-12)
    assert window.space == given.space


@pytest.mark.parametrize("samples", [1, 3])
def test_drawn_labels_are_the_sampled_fisher_matrix(samples):
    given = objective(torch.linspace(0.5, 2, 9, dtype=F64), l2=0.1)
    make = torch.Generator().manual_seed
    window = GradientWindow.from_objective(
        given, 0.0, rows="sampled", samples=samples, generator=make(3)
    )
    want = Fisher(given, "sampled", samples=samples, generator=make(3)).to_dense()
    torch.testing.assert_close(window.to_dense(), want, rtol=1e-10, atol=1e-12)


def test_many_drawn_labels_approach_gauss_newton():
    """The error falls as one over the square root of the number of labels."""
    given = objective()
    exact = Fisher(given).to_dense()
    errors = []
    for samples in (10, 1000):
        window = GradientWindow.from_objective(given, 1.0, rows="sampled", samples=samples)
        gap = window.to_dense() - torch.eye(len(exact), dtype=F64) - exact
        errors.append(float(gap.norm() / exact.norm()))
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 3


def test_gradients_of_batches():
    model = network((3, 4, 2))
    x, y = classification(9, 3, 2)
    w = torch.linspace(-1, 2, 9, dtype=F64)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    given = Objective(model, "cross_entropy", batches, weights=w, l2=1.0)
    window = GradientWindow.from_objective(given, 0.5, rows="batch")
    for row, (a, b) in zip(window.gradients, [(0, 3), (3, 9)], strict=True):
        losses = nn.functional.cross_entropy(model(x[a:b]), y[a:b], reduction="none")
        parts = torch.autograd.grad((w[a:b] * losses).mean(), list(model.parameters()))
        torch.testing.assert_close(row, torch.cat([part.flatten() for part in parts]))
    assert window.damping == 1.5
    assert window.divisor == 2


def test_some_examples_are_drawn_the_same_every_time():
    given = objective()
    full = GradientWindow.from_objective(given, 1.0).gradients
    make = torch.Generator().manual_seed
    one, two = (
        GradientWindow.from_objective(given, 1.0, size=4, generator=make(1)) for _ in range(2)
    )
    assert torch.equal(one.gradients, two.gradients)
    assert one.divisor == 4
    gaps = torch.cdist(one.gradients, full)
    assert (gaps.min(1).values < 1e-12).all()
    assert len(set(gaps.argmin(1).tolist())) == 4
    window = GradientWindow.from_objective(given, 1.0, size=1, rows="batch")
    assert window.gradients.shape[0] == 1


class Unvectorizable(nn.Module):
    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        scale = 1.0 if x.sum().item() > -math.inf else 0.0  # .item() is not for vmap
        return scale * self.inner(x)


def test_models_that_cannot_be_vectorized_give_the_same_rows():
    x, y = classification(9, 3, 2)
    model = network((3, 4, 2))
    plain = Objective(model, "cross_entropy", (x, y))
    other = Objective(Unvectorizable(model), "cross_entropy", (x, y))
    for kind in ("example", "sampled"):
        make = torch.Generator().manual_seed
        one, two = (
            GradientWindow.from_objective(o, 1.0, rows=kind, generator=make(0)).gradients
            for o in (plain, other)
        )
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_objectives_that_have_no_window_are_refused():
    with pytest.raises(ArgumentError, match="weight of example 0"):
        GradientWindow.from_objective(objective(torch.linspace(-1, 1, 9, dtype=F64)), 1.0)
    n = objective().space.dim
    with pytest.raises(ArgumentError, match="vector"):
        GradientWindow.from_objective(objective(l2=torch.ones(n, dtype=F64)), 1.0)
    with pytest.raises(ArgumentError, match="sum positive"):
        GradientWindow.from_objective(objective(), 0.0)
    with pytest.raises(ArgumentError, match="9 examples"):
        GradientWindow.from_objective(objective(), 1.0, size=10)
    with pytest.raises(ArgumentError, match="2 batches"):
        GradientWindow.from_objective(objective(), 1.0, size=3, rows="batch")
    with pytest.raises(ArgumentError, match="'example', |example, batch, sampled"):
        GradientWindow.from_objective(objective(), 1.0, rows="token")
    with pytest.raises(ArgumentError, match="at least one label"):
        GradientWindow.from_objective(objective(), 1.0, rows="sampled", samples=0)
    x, y = classification(9, 3, 2)
    smooth = Objective(network((3, 4, 2)), nn.MultiMarginLoss(), (x, y))
    with pytest.raises(StructureError, match="likelihood"):
        GradientWindow.from_objective(smooth, 1.0, rows="sampled")
    train = Objective(network((3, 4, 2)), "cross_entropy", (x, y), mode="train")
    with pytest.raises(DataError, match="mode='eval'"):
        GradientWindow.from_objective(train, 1.0, rows="sampled")


# -------------------------------------------------------------------------------------- bad input


def test_what_makes_no_window_is_refused():
    G = gradients(3, 5)
    for bad in (G[0], G[:0], G[None]):
        with pytest.raises(ShapeError, match=r"\[m, n\]"):
            GradientWindow(bad, 1.0)
    for bad in (G.to(torch.complex128), G.long()):
        with pytest.raises(DtypeError, match="real"):
            GradientWindow(bad, 1.0)
    for damping in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="damping"):
            GradientWindow(G, damping)
    for divisor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="divisor"):
            GradientWindow(G, 1.0, divisor=divisor)
    with pytest.raises(ArgumentError, match="block"):
        GradientWindow(G, 1.0, block=0)
    for pages in (0, 4):
        with pytest.raises(ArgumentError, match="pages"):
            WindowRecursion(GradientWindow(G, 1.0), pages=pages)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_named(value):
    G = gradients(3, 5)
    G[1, 2] = value
    window = GradientWindow(G, 1.0)
    for use in (window.inverse, window.logdet, lambda: WindowRecursion(window)):
        with pytest.raises(NonFiniteError, match=r"\(1, 2\)"):
            use()


def test_indices_of_entries_are_checked():
    window = GradientWindow(gradients(3, 5), 1.0)
    for form in (window.inverse(), WindowRecursion(window)):
        with pytest.raises(ShapeError, match="outside"):
            form.entries(torch.tensor([0]), torch.tensor([5]))
        with pytest.raises(ShapeError, match="pairs"):
            form.entries(torch.tensor([0]), torch.tensor([1, 2]))
        with pytest.raises(ShapeError, match="integers"):
            form.entries(torch.tensor([0.5]), torch.tensor([1]))
        assert form.entries(torch.tensor([]).long(), torch.tensor([]).long()).shape == (0,)


def test_draws_of_rows_follow_the_operator():
    """Rows of a float32 objective are float32, and its products those of its dense form."""
    x, y = classification(9, 3, 2)
    single = Objective(network((3, 4, 2)).float(), "cross_entropy", (x.float(), y))
    window = GradientWindow.from_objective(single, 0.5)
    assert window.dtype == torch.float32
    v = draw(window.shape[1], like=window)
    torch.testing.assert_close(window @ v, window.to_dense() @ v, rtol=1e-4, atol=1e-4)
