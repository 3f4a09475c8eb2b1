"""A table with known errors, to see the job at work."""

from __future__ import annotations

import numpy as np
import pandas as pd

from woodbury.errors import DataError

__all__ = ["DEMOS", "demo_table", "flip_uniformly"]

DEMOS = ("digits",)
FLIPPED = 0.2


def flip_uniformly(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Replace ``round(share n)`` labels, drawn with the seed, each by one of the other classes.

    Args:
        labels: class indices ``[n]``.
        share: of the rows.
        seed: of the draw.

    Returns:
        The labels with errors, ``[n]``.

    Example:
        >>> import numpy as np
        >>> clean = np.arange(100) % 5
        >>> int((flip_uniformly(clean, 0.2, seed=0) != clean).sum())
        20
    """
    generator = np.random.default_rng(seed)
    classes = np.unique(labels)
    flipped = labels.copy()
    chosen = generator.choice(len(labels), round(share * len(labels)), replace=False)
    place = np.searchsorted(classes, labels[chosen])
    shift = generator.integers(1, len(classes), size=len(chosen))
    flipped[chosen] = classes[(place + shift) % len(classes)]
    return flipped


def demo_table(name: str, seed: int) -> tuple[pd.DataFrame, str, np.ndarray]:
    """The demonstration's table, the name of its label column, and the true labels ``[n]``.

    ``digits`` is the 1,797 handwritten digits (8 x 8 pixels) that scikit-learn bundles, with 20 %
    of the labels flipped.

    Raises:
        DataError: there is no demonstration of that name.
    """
    if name not in DEMOS:
        raise DataError(f"There is no demonstration {name!r}. There is: {', '.join(DEMOS)}.")
    from sklearn.datasets import load_digits

    data = load_digits()
    frame = pd.DataFrame(data.data.astype(np.int64), columns=list(data.feature_names))
    frame["digit"] = flip_uniformly(data.target, FLIPPED, seed)
    return frame, "digit", data.target
