from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance, wide
from torch import nn

from woodbury import Identity, Kernel, LowRank
from woodbury.errors import BudgetError, DeviceError, DtypeError, ShapeError, TagError


class RBF(nn.Module):
    """A kernel with a parameter and a diagonal hook, which counts what it is asked."""

    def __init__(self, scale=0.7, dtype=torch.float64):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(scale, dtype=dtype).log())
        self.evaluated = []

    def forward(self, x, z):
        self.evaluated.append((x.shape[0], z.shape[0]))
        gap = (x[:, None] - z[None]).square().sum(-1)
        return torch.exp(-gap / self.log_scale.exp())

    def diagonal(self, x, z):
        return torch.exp(-(x - z).square().sum(-1) / self.log_scale.exp())


def rbf(x, z):
    return torch.exp(-(x[:, None] - z[None]).square().sum(-1))


def phases(x, z):
    """Complex, hermitian: a shift-invariant kernel with a complex spectrum."""
    gap = x[:, None, 0] - z[None, :, 0]
    return torch.exp(-(gap.abs() ** 2)) * torch.exp(1j * gap)


def dense(kernel, x, z):
    return wide(kernel(wide(x), wide(z)))


class TestKernel(OperatorConformance):
    def make(self):
        cases = []
        for dtype in (torch.float64, torch.float32):
            x, z = torch.randn(9, 2, dtype=dtype), torch.randn(7, 2, dtype=dtype)
            for block_bytes in (8, 200, 2**20):  # single entries, a few rows, everything at once
                cases += [
                    (Kernel(x, kernel=rbf, block_bytes=block_bytes), dense(rbf, x, x)),
                    (Kernel(x, z, kernel=rbf, block_bytes=block_bytes), dense(rbf, x, z)),
                ]
            cases.append((Kernel(x, kernel=rbf, tags={"positive_definite"}), dense(rbf, x, x)))
        x = torch.randn(5, 1, dtype=torch.complex128).real.to(torch.complex128)
        cases.append((Kernel(x, x.clone(), kernel=phases, tags={"hermitian"}), dense(phases, x, x)))
        z = torch.randn(4, 1, dtype=torch.complex128)
        cases.append((Kernel(x, z, kernel=phases, block_bytes=64), dense(phases, x, z)))
        symmetric = lambda x, z: (1 + 1j) * x @ z.mT  # noqa: E731
        cases.append((Kernel(x, kernel=symmetric), dense(symmetric, x, x)))
        x = torch.randn(6, 2).to(torch.bfloat16)
        cases.append((Kernel(x, kernel=rbf, block_bytes=64), dense(rbf, x, x)))
        return cases

    def gradients(self):
        x, z = torch.randn(4, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
        scale = torch.tensor(0.7, dtype=torch.float64)

        def build(x, scale):
            return Kernel(x, kernel=lambda a, b: rbf(a / scale, b / scale), block_bytes=64)

        def rectangular(x, z, scale):
            return Kernel(x, z, kernel=lambda a, b: rbf(a / scale, b / scale), block_bytes=64)

        return [(build, (x, scale)), (rectangular, (x, z, scale))]


@pytest.mark.parametrize("block_bytes", [8, 8 * 100, 8 * 5000, 2**20])
def test_no_block_is_larger_than_the_budget(block_bytes):
    kernel = RBF()
    x, z = torch.randn(300, 2, dtype=torch.float64), torch.randn(200, 2, dtype=torch.float64)
    K = Kernel(x, z, kernel=kernel, block_bytes=max(block_bytes, 8 * 64))
    kernel.evaluated.clear()
    with torch.no_grad():
        Y = K @ torch.ones(200, 3, dtype=torch.float64)
    torch.testing.assert_close(Y[:, 0], kernel(x, z).sum(1).detach())
    kernel.evaluated.pop()
    assert all(8 * rows * columns <= K.block_bytes for rows, columns in kernel.evaluated)
    assert sum(rows * columns for rows, columns in kernel.evaluated) == 300 * 200  # each entry once


def test_backward_evaluates_each_block_once_more_and_keeps_none():
    kernel = RBF()
    x = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    K = Kernel(x, kernel=kernel, block_bytes=8 * 50 * 10)
    kernel.evaluated.clear()
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = K @ torch.ones(50, 2, dtype=torch.float64)
    assert kernel.evaluated == [(10, 50)] * 5
    assert max(saved, default=0) <= 50 * 2  # points and vectors, no block of 500 entries
    y.square().sum().backward()
    assert kernel.evaluated == [(10, 50)] * 10
    reference = x.detach().clone().requires_grad_()
    twin = RBF()
    (twin(reference, reference) @ torch.ones(50, 2, dtype=torch.float64)).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)
    torch.testing.assert_close(kernel.log_scale.grad, twin.log_scale.grad)


def test_the_diagonal_hook_is_used_and_the_loop_needs_few_entries():
    kernel = RBF()
    x = torch.randn(100, 2, dtype=torch.float64)
    K = Kernel(x, kernel=kernel)
    kernel.evaluated.clear()
    torch.testing.assert_close(K.diagonal(), torch.ones(100, dtype=torch.float64))
    assert kernel.evaluated == []
    K = Kernel(x, kernel=lambda a, b: kernel(a, b))
    kernel.evaluated.clear()
    torch.testing.assert_close(K.diagonal(), torch.ones(100, dtype=torch.float64))
    assert sum(rows * columns for rows, columns in kernel.evaluated) < 100 * 33
    torch.testing.assert_close(K.trace().detach(), torch.tensor(100.0).double())


def test_columns_are_evaluated_not_multiplied():
    kernel = RBF()
    x = torch.randn(40, 2, dtype=torch.float64)
    K = Kernel(x, kernel=kernel, block_bytes=8 * 64)
    kernel.evaluated.clear()
    columns = K.columns(torch.tensor([3, 7])).detach()
    assert sum(rows * count for rows, count in kernel.evaluated) == 40 * 2
    torch.testing.assert_close(columns, kernel(x, x)[:, [3, 7]].detach())


def test_points_of_any_shape():
    images = torch.randn(5, 2, 3, dtype=torch.float64)
    K = Kernel(images, kernel=lambda a, b: rbf(a.flatten(1), b.flatten(1)))
    torch.testing.assert_close(K.to_dense(), rbf(images.flatten(1), images.flatten(1)))
    times = torch.linspace(0, 1, 5)
    minimum = Kernel(times, kernel=lambda a, b: torch.minimum(a[:, None], b[None]))
    torch.testing.assert_close(minimum.diagonal(), times)


def test_a_kernel_that_is_not_symmetric_is_found():
    x = torch.randn(20, 2)
    weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    skew = lambda a, b: a @ weight @ b.T  # noqa: E731
    with pytest.raises(TagError, match=r"differ by .*; pass z=x\.clone\(\)"):
        Kernel(x, kernel=skew)
    torch.testing.assert_close(Kernel(x, x.clone(), kernel=skew).to_dense(), skew(x, x))


def test_algebra_keeps_it_lazy():
    kernel = RBF()
    x = torch.randn(30, 2, dtype=torch.float64)
    K = Kernel(x, kernel=kernel, tags={"positive_semidefinite"})
    kernel.evaluated.clear()
    A = 2.0 * K + 1e-2 * Identity(30) + LowRank(torch.ones(30, 1, dtype=torch.float64))
    assert kernel.evaluated == []
    assert "positive_definite" in A.tags
    assert not K.has_inverse


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernel": lambda a, b: a @ a.T}, ShapeError, r"returned \(4, 4\) for \(4, 3\) points"),
        ({"kernel": lambda a, b: (a @ b.T).double()}, DtypeError, "kernel returned torch.float64"),
        ({"kernel": lambda a, b: None}, ShapeError, "NoneType"),
        ({"kernel": rbf, "block_bytes": 2}, BudgetError, "one entry takes 4 bytes"),
        ({"kernel": rbf, "z": torch.ones(3, 5)}, ShapeError, "points of shape"),
        ({"kernel": rbf, "z": torch.ones(3, 2).double()}, DtypeError, "z is torch.float64"),
        ({"kernel": rbf, "z": torch.ones(3, 2, device="meta")}, DeviceError, "z on meta"),
        ({"kernel": rbf, "z": torch.tensor(1.0)}, ShapeError, "z is a scalar"),
    ],
)
def test_wrong_input_is_refused(arguments, error, message):
    arguments = {"z": torch.randn(3, 2), **arguments}
    with pytest.raises(error, match=message):
        Kernel(torch.randn(4, 2), **arguments)


def test_a_wrong_diagonal_hook_is_refused():
    kernel = RBF()
    kernel.diagonal = lambda x, z: torch.ones(1)
    with pytest.raises(ShapeError, match=r"expected \(4,\)"):
        Kernel(torch.randn(4, 2, dtype=torch.float64), kernel=kernel).diagonal()


def test_no_points():
    K = Kernel(torch.zeros(0, 2), torch.zeros(3, 2), kernel=rbf)
    assert (K @ torch.ones(3)).shape == (0,)
    assert (K.rmatmat(torch.ones(0))).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("block_bytes", [8 * 300, 8 * 5000, 2**20])
def test_without_gradients_a_symmetric_kernel_is_evaluated_by_half(block_bytes):
    kernel = RBF()
    x = torch.randn(300, 2, dtype=torch.float64)
    K = Kernel(x, kernel=kernel, block_bytes=block_bytes)
    dense = kernel(x, x).detach()
    for V in (torch.randn(300, dtype=torch.float64), torch.randn(300, 4, dtype=torch.float64)):
        kernel.evaluated.clear()
        with torch.no_grad():
            torch.testing.assert_close(K @ V, dense @ V)
        entries = sum(rows * columns for rows, columns in kernel.evaluated)
        blocks = max(rows for rows, _ in kernel.evaluated)
        assert 300 * 301 / 2 <= entries <= 300 * (300 + blocks) / 2
        assert all(8 * rows * columns <= block_bytes for rows, columns in kernel.evaluated)


def test_mirrored_entries_of_a_complex_symmetric_kernel_are_not_conjugated():
    x = torch.randn(40, 2, dtype=torch.complex128)
    symmetric = lambda x, z: (1 + 1j) * x @ z.mT  # noqa: E731
    K = Kernel(x, kernel=symmetric, block_bytes=16 * 200)
    V = torch.randn(40, 3, dtype=torch.complex128)
    with torch.no_grad():
        torch.testing.assert_close(K @ V, symmetric(x, x) @ V)
        torch.testing.assert_close(K.rmatmat(V), symmetric(x, x).mH @ V)


class Writing:
    """A kernel that writes where it is told to."""

    def __init__(self):
        self.buffers = set()
        self.calls = 0

    def __call__(self, x, z):
        self.calls += 1
        return rbf(x, z)

    def write(self, x, z, out):
        self.buffers.add(out.data_ptr())
        out.copy_(rbf(x, z))


def test_blocks_share_one_buffer_where_the_kernel_can_write():
    x, z = torch.randn(50, 2, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    v, w = torch.randn(30, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    for K, other in (
        (Kernel(x, z, kernel=Writing(), block_bytes=8 * 200), z),
        (Kernel(x, kernel=Writing(), block_bytes=8 * 200), x),
    ):
        K.kernel.calls = 0
        with torch.no_grad():
            torch.testing.assert_close(
                K @ (v if other is z else w), rbf(x, other) @ (v if other is z else w)
            )
            torch.testing.assert_close(K.rmatmat(w[:, None]), rbf(x, other).T @ w[:, None])
        assert len(K.kernel.buffers) <= 2  # one a product
        assert K.kernel.calls == 0
        x_grad = K @ (v if other is z else w).requires_grad_()
        assert x_grad.requires_grad
        assert K.kernel.calls > 0  # gradients need a tensor of their own
        v, w = v.detach(), w.detach()


def test_gradient_mode_costs_nothing_where_nothing_has_a_gradient():
    kernel = RBF()
    x, v = torch.randn(300, 2, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    K = Kernel(x, kernel=kernel, block_bytes=8 * 5000)
    kernel.evaluated.clear()
    assert (K @ v).requires_grad  # the parameter of the kernel has one
    assert sum(rows * columns for rows, columns in kernel.evaluated) >= 300 * 300
    kernel.log_scale.requires_grad_(False)
    kernel.evaluated.clear()
    y = K @ v
    assert not y.requires_grad
    assert sum(rows * columns for rows, columns in kernel.evaluated) < 0.6 * 300 * 300
    kernel.log_scale.requires_grad_(True)
    torch.testing.assert_close(y, (K @ v).detach())
    assert (K @ v.clone().requires_grad_()).requires_grad
