"""The scripts behind the figures of hypergradients run to their end at a small size."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path


def test_every_bound_holds(tmp_path: Path, printed: Callable[..., str]) -> None:
    out = printed("hypergradient_bounds.py", "--small", "--figure", str(tmp_path / "a.svg"))
    assert (tmp_path / "a.svg").stat().st_size > 1000
    assert "every bound holds in every draw" in out
    assert len(re.findall(r"converged|completed", out)) == 15


def test_terms_are_counted_for_both_models(tmp_path: Path, printed: Callable[..., str]) -> None:
    out = printed("hypergradient_terms.py", "--small", "--figure", str(tmp_path / "a.svg"))
    assert (tmp_path / "a.svg").stat().st_size > 1000
    assert out.count("CG, 20 steps") == 4
    # 10 unknowns: 20 steps of conjugate gradients are exact
    assert re.search(r"CG, 20 steps +1\.0000 +1\.0000", out)


def test_every_setting_of_the_logistic_example_is_measured(
    tmp_path: Path, printed: Callable[..., str]
) -> None:
    out = printed("nystrom_logistic.py", "--small", "--figure", str(tmp_path / "a.svg"))
    assert (tmp_path / "a.svg").stat().st_size > 1000
    assert len(re.findall(r"^  (?:5|10|20), (?:0\.01|0\.1|1) ", out, re.M)) == 27
    exact = re.search(r"^exact.*\n +1\.000 +1\.00 ", out, re.M)
    assert exact
