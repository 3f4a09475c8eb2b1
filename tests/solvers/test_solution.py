from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from woodbury import CG, Diagonal, Solution, SolveStatus, solve
from woodbury.solvers import SolveReport


def test_statuses_are_sentences_with_a_remedy() -> None:
    for status in SolveStatus:
        assert len(status.value) > 30
        if not status.ok:
            assert any(mark in status.value for mark in (":", ";")), f"{status.name}: and now?"
    assert len({status.value for status in SolveStatus}) == len(SolveStatus)


def test_good_statuses_come_first() -> None:
    order = [status.ok for status in SolveStatus]
    assert order == sorted(order, reverse=True)
    assert SolveStatus.worst([]) is SolveStatus.converged
    worst = SolveStatus.worst(
        [SolveStatus.converged, SolveStatus.non_finite, SolveStatus.max_steps]
    )
    assert worst is SolveStatus.non_finite


def solution(**changes) -> Solution:
    found = solve(
        Diagonal(torch.tensor([1.0, 2.0]), tags={"positive_definite"}), torch.ones(2, 3), CG()
    )
    return dataclasses.replace(found, **changes)


def test_solution_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        solution().value = torch.zeros(2)


def test_repr_is_one_line_without_the_numbers() -> None:
    text = repr(solution())
    assert text.startswith("Solution(converged, residual=")
    assert "value=[2, 3] torch.float32" in text
    assert "tensor(" not in text


def test_certificate_is_plain() -> None:
    certificate = solution().certificate()
    assert json.loads(json.dumps(certificate)) == certificate
    assert certificate["status"] == "converged"
    assert (certificate["columns"], certificate["failed_columns"]) == (3, 0)


def test_message_names_the_columns() -> None:
    bad = SolveStatus.max_steps
    found = solution(status=bad, column_status=(bad,) * 20, residual=torch.ones(20))
    assert "max_steps in 20 of 20 columns (0, 1, 2, 3, 4, 5, 6, 7, ...)" in found.message()


def test_report_does_not_forget_nan() -> None:
    report = SolveReport()
    for residual in (1e-3, float("nan"), 1e-6):
        report.add(solution(residual=torch.tensor(residual)))
    assert report.residual != report.residual
    assert report.calls == 3
