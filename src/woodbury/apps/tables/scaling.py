"""Whether the columns of a table share one unit (pixels, counts on one scale), and scaling them.

Distances between rows, and so the kernel model, depend on it: pixels must be scaled together,
because a pixel that hardly varies carries noise, not as much information as any other.
"""

from __future__ import annotations

import numpy as np
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import RobustScaler, StandardScaler

__all__ = ["scale_columns", "scale_jointly", "shared_unit"]

MIN_COLUMNS = 16
MIN_RANGE = 6
# Interquartile range of a standard normal variable: with it, normal columns get variance 1.
NORMAL_IQR = 1.3489795
# Beyond this many (robust) standard deviations a value grows only logarithmically.
TAIL = 4.0
# scikit-learn works in float64 copies; this many columns at a time bounds them.
STRIP = 16


def shared_unit(rows: np.ndarray) -> str:
    """Say why all columns seem to be in one unit, or return an empty string.

    Args:
        rows: ``[n, d]`` numbers, NaN where missing.

    Returns:
        A phrase such as ``"all 64 columns are whole numbers from 0 to 16"``, or ``""``.

    Cost:
        A few passes over the rows.

    Example:
        >>> import numpy as np
        >>> shared_unit(np.arange(160).reshape(10, 16) % 7)
        'all 16 columns run from 0 to 6'
        >>> shared_unit(np.arange(160.0).reshape(10, 16))
        ''
    """
    n, d = rows.shape
    if d < MIN_COLUMNS or n == 0 or _any_nan(rows):
        return ""
    low, high = rows.min(axis=0), rows.max(axis=0)
    varies = high > low
    if not varies.any():
        return ""
    bottom, top = low.min(), high.max()
    if top - bottom < MIN_RANGE and _whole(rows):
        return ""  # answers or codes, of which each column may mean something else
    if np.mean((low == bottom)[varies]) >= 0.9 and np.mean((high == top)[varies]) >= 0.9:
        return f"all {d} columns run from {bottom:g} to {top:g}"
    from_zero = bottom == 0 and np.mean(low[varies] == 0) >= 0.9
    # Counts of words have long tails: few of their columns come near the largest count of all.
    if _whole(rows) and from_zero and np.mean(high[varies] >= top / 2) >= 0.5:
        return f"all {d} columns are whole numbers from 0 to {top:g}"
    return ""


def _whole(rows: np.ndarray) -> bool:
    return rows.dtype.kind in "iub" or all(
        bool(np.all(rows[:, j] == np.round(rows[:, j]))) for j in range(rows.shape[1])
    )


def _any_nan(rows: np.ndarray) -> bool:
    return rows.dtype.kind == "f" and bool(np.isnan(rows).any())


def scale_jointly(rows: np.ndarray) -> np.ndarray:
    """Center each column and divide all by one number: their root mean variance.

    Args:
        rows: ``[n, d]`` finite numbers in one unit.

    Returns:
        float32 ``[n, d]`` with a mean squared row norm of about the number of columns that vary.
    """
    mean = rows.mean(axis=0, dtype=np.float64)
    scaled = rows.astype(np.float32)
    scaled -= mean.astype(np.float32)
    # One column at a time: a float64 copy of a million rows would be the peak of the whole job.
    variance = np.array([np.var(scaled[:, j], dtype=np.float64) for j in range(rows.shape[1])])
    varies = variance > 0
    scaled /= np.float32(np.sqrt(variance[varies].mean()) if varies.any() else 1.0)
    return scaled


def scale_columns(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale each column by its own spread, robustly, and fill what is missing.

    Missing values become the column's median and are marked by an indicator; each column is
    centered by its median and divided by its interquartile range (by its standard deviation
    where more than half of the values are alike); beyond 4 units values grow logarithmically.

    Args:
        rows: ``[n, d]`` numbers, NaN where missing.

    Returns:
        The scaled columns, float32 ``[n, d]``, and the indicators, float32 ``[n, m]``, of the
        ``m`` columns in which something is missing.
    """
    scaled = np.empty(rows.shape, dtype=np.float32)
    indicators = []
    for start in range(0, rows.shape[1], STRIP):
        strip = np.array(rows[:, start : start + STRIP], dtype=np.float64)
        missing = np.isnan(strip)
        gaps = missing.any(axis=0)
        if gaps.any():
            strip = SimpleImputer(strategy="median", copy=False).fit_transform(strip)
            indicators.append(missing[:, gaps].astype(np.float32))
        scaled[:, start : start + STRIP] = _squash(_robust(strip))
    marks = np.concatenate(indicators, axis=1) if indicators else np.empty((len(rows), 0))
    return scaled, marks.astype(np.float32)


def _robust(strip: np.ndarray) -> np.ndarray:
    scaler = RobustScaler(copy=False).fit(strip)
    # scikit-learn writes 1 for an interquartile range of 0: look again only where it may be one.
    flat = np.flatnonzero(scaler.scale_ == 1)
    if len(flat):
        flat = flat[np.subtract(*np.percentile(strip[:, flat], [75, 25], axis=0)) == 0]
    fallback = StandardScaler().fit_transform(strip[:, flat]) if len(flat) else None
    strip = scaler.transform(strip)
    strip *= NORMAL_IQR
    if fallback is not None:
        strip[:, flat] = fallback
    return strip


def _squash(strip: np.ndarray) -> np.ndarray:
    size = np.abs(strip)
    far = size > TAIL
    if far.any():
        strip[far] = np.sign(strip[far]) * (TAIL + np.log1p(size[far] - TAIL))
    return strip
