"""Squares of rotated gradients against the formula, whichever way they are formed."""

from __future__ import annotations

import pytest
import torch

from woodbury.curvature import factors
from woodbury.curvature.factors import Corrections
from woodbury.curvature.layers import MatrixBlock, MatrixGradients

F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("large", [1, 10**9], ids=["one by one", "in chunks"])
@pytest.mark.parametrize("rotated", ["both", "outputs", "inputs", "none"])
@pytest.mark.parametrize("t", [1, 2, 5, 40])
def test_squares_of_rotated_gradients(monkeypatch, t, rotated, large, weighted, dtype):
    monkeypatch.setattr(factors, "_LARGE", large)
    b, p, m = 3, 4, 6
    torch.manual_seed(t)
    block = MatrixBlock("layer", p, m, None)
    a, g = torch.randn(b, t, m, dtype=dtype), torch.randn(b, t, p, dtype=dtype)
    w = torch.tensor([0.5, 0.0, 2.0], dtype=dtype) if weighted else None
    Q_S, Q_A = (torch.linalg.qr(torch.randn(n, n, dtype=F64))[0] for n in (p, m))
    bases = {}
    if rotated in ("both", "outputs"):
        bases["layer/Q_S"] = Q_S
    if rotated in ("both", "inputs"):
        bases["layer/Q_A"] = Q_A
    sums = Corrections({"layer": block}, bases, dtype, torch.device("cpu"))
    gradients = MatrixGradients(block, a, g)
    batch = factors.FactoredBatch(0, b, torch.arange(b), w, {"layer": gradients})
    sums.add(batch)
    sums.add(batch)
    D = torch.einsum("btp,btm->bpm", g.double(), a.double())
    D = bases.get("layer/Q_S", torch.eye(p, dtype=F64)).T @ D
    D = D @ bases.get("layer/Q_A", torch.eye(m, dtype=F64))
    weights = torch.ones(b, dtype=F64) if w is None else w.double()
    expected = 2 * torch.einsum("b,bpm->pm", weights, D.square())
    found = sums.sums["layer/corrected"]
    assert found.dtype == F64
    tolerance = 1e-12 if dtype == F64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
