from __future__ import annotations

import pytest
import torch
from tests.conformance import OperatorConformance, wide

from woodbury import Dense, Diagonal, Identity
from woodbury.errors import NonFiniteError, ShapeError, SingularError, TagError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex128,
    torch.complex64,
)


class TestDiagonal(OperatorConformance):
    def make(self):
        cases = []
        for dtype in DTYPES:
            d = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64).to(dtype)
            cases += [
                Diagonal(d),
                Diagonal(d.abs().to(dtype), tags={"positive_definite"}),
                Diagonal(torch.sgn(d), tags={"unitary"}),
            ]
        cases.append(Diagonal(torch.tensor([1 + 1j, 2 - 1j, -1j], dtype=torch.complex128)))
        return [(A, torch.diag(wide(A.values))) for A in cases]

    def gradients(self):
        return [(Diagonal, (torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),))]


@pytest.mark.parametrize(
    ("tag", "values", "message"),
    [
        ("positive_definite", [1.0, 0.0], "entry 1 is 0.0"),
        ("positive_definite", [-3.0, 1.0], "entry 0 is -3.0"),
        ("positive_semidefinite", [0.0, -1.0], "entry 1 is -1.0"),
        ("unitary", [1.0, 2.0], "entry 1 is 2.0"),
    ],
)
def test_a_false_tag_is_refused(tag, values, message):
    with pytest.raises(TagError, match=message):
        Diagonal(torch.tensor(values), tags={tag})


def test_a_complex_diagonal_is_hermitian_only_if_real():
    d = torch.tensor([1 + 1j, 2.0])
    assert "hermitian" not in Diagonal(d).tags
    with pytest.raises(TagError, match=r"tagged hermitian, but entry 0 is \(1\+1j\)"):
        Diagonal(d, tags={"hermitian"})
    assert Diagonal(d.real.to(d.dtype), tags={"positive_definite"}).H.tags >= {"positive_definite"}


def test_what_cannot_be_inverted_says_where():
    with pytest.raises(SingularError, match="entry 2 of the diagonal is 0.0"):
        Diagonal(torch.tensor([1.0, 2.0, 0.0])).inverse()
    with pytest.raises(SingularError, match="entry 0 .* is 1.4.*e-45"):
        Diagonal(torch.tensor([1e-45, 1.0])).solve(torch.ones(2))
    with pytest.raises(NonFiniteError, match="entry 1 of the diagonal is nan"):
        Diagonal(torch.tensor([1.0, float("nan")])).logdet()
    with pytest.raises(NonFiniteError, match="entry 0 of the diagonal is inf"):
        Diagonal(torch.tensor([float("inf"), 1.0])).inverse()


def test_a_matrix_is_refused():
    with pytest.raises(ShapeError, match=r"expected \[n\]"):
        Diagonal(torch.eye(2))


def test_diagonals_merge():
    d, e = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    D, E = Diagonal(d, tags={"positive_definite"}), Diagonal(e, tags={"positive_semidefinite"})
    for merged, values in [
        (D + E, d + e),
        (D - E, d - e),
        (D @ E, d * e),
        (D + 2.0 * Identity(2), d + 2),
        (Identity(2) + D, d + 1),
        (3.0 * D, 3 * d),
        (D.inverse() @ E, e / d),
        (D + Dense(torch.eye(2)) + E, None),
    ]:
        if values is not None:
            assert isinstance(merged, Diagonal)
            torch.testing.assert_close(merged.values, values)
    assert "positive_definite" in (D + E).tags
    assert "positive_semidefinite" not in (D - E).tags
    assert "positive_definite" not in (D @ E).tags
    # Terms meet in any order: one dense term, one diagonal.
    assert len((D + Dense(torch.eye(2)) + E).terms) == 2
