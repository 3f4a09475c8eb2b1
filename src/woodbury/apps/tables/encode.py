"""Categories, dates and text as numbers, by scikit-learn, without ever looking at the label."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction import FeatureHasher
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import OneHotEncoder

__all__ = ["encode_categories", "encode_dates", "encode_text"]

MISSING = "(missing)"
MAX_ONE_HOT = 30  # columns of one categorical column; rarer values share the last
MAX_LEVELS = 100  # above this many values, hashing
HASHED = 32
TEXT_COMPONENTS = 512
MANY_DOCUMENTS = 20_000  # above, half of the components, to bound time and memory
TEXT_TERMS = 50_000
# Total variance of a text block: as much as this many numeric columns of variance 1.
TEXT_WEIGHT = 16.0


def encode_categories(values: pd.Series) -> tuple[np.ndarray, str]:
    """One column of categories as numbers.

    Up to 100 different values: one 0/1 column each, where values beyond the 30 most frequent, or
    seen fewer than 3 times, share one. More: signed feature hashing to 32 columns and the
    logarithm of the value's frequency. Missing is a value of its own.

    Args:
        values: ``[n]`` strings, None where missing.

    Returns:
        float32 ``[n, k]`` and a phrase that says how.

    Example:
        >>> import pandas as pd
        >>> encode_categories(pd.Series(["red", "blue", "red"] * 4))[0].shape
        (12, 1)
    """
    filled = values.where(values.notna(), MISSING).astype(object)
    levels = filled.nunique()
    if levels <= MAX_LEVELS:
        encoder = OneHotEncoder(
            max_categories=MAX_ONE_HOT,
            min_frequency=3 if len(filled) >= 100 else 1,
            drop="if_binary",
            sparse_output=False,
            dtype=np.float32,
        )
        encoded = encoder.fit_transform(filled.to_numpy().reshape(-1, 1))
        return encoded, f"one-hot, {levels} values"
    codes, names = pd.factorize(filled)
    hashed = FeatureHasher(HASHED, input_type="string", dtype=np.float32).transform(
        # Several hashes of one value: two values then rarely share all their columns.
        [[f"{i}={name}" for i in range(4)] for name in names]
    )
    log_count = np.log(np.bincount(codes))[codes]
    spread = max(float(log_count.std()), 1e-6)
    frequency = ((log_count - log_count.mean()) / spread).astype(np.float32)
    table = hashed.toarray() * np.float32(0.5)
    return np.column_stack([table[codes], frequency]), f"hashed, {levels:,} values"


def encode_dates(values: pd.Series) -> np.ndarray:
    """Dates as numbers: seconds since 1970, year's and week's phase, time of day if there is one.

    Args:
        values: ``[n]`` datetime64, NaT where missing.

    Returns:
        float64 ``[n, 5]`` or ``[n, 7]``, NaN where missing; only the first column needs scaling.
    """
    missing = values.isna().to_numpy()
    at = values.dt
    year = 2 * np.pi * (at.day_of_year.to_numpy(dtype=np.float64, na_value=0) - 1) / 365.25
    week = 2 * np.pi * at.day_of_week.to_numpy(dtype=np.float64, na_value=0) / 7
    seconds = (values - pd.Timestamp(0)).dt.total_seconds().to_numpy(dtype=np.float64)
    parts = [seconds, np.sin(year), np.cos(year), np.sin(week), np.cos(week)]
    day = np.where(missing, 0.0, seconds) % 86400
    if day.any():
        parts += [np.sin(2 * np.pi * day / 86400), np.cos(2 * np.pi * day / 86400)]
    encoded = np.column_stack(parts)
    encoded[missing] = np.nan
    return encoded


def encode_text(values: pd.Series, seed: int) -> tuple[np.ndarray | None, str]:
    """One column of text as numbers: TF-IDF of words and word pairs, then a truncated SVD.

    Args:
        values: ``[n]`` strings, None where missing.
        seed: of the randomised SVD.

    Returns:
        float32 ``[n, k]``, ``k <= 512`` (256 above 20,000 rows), and a phrase that says how;
        None and the reason where there are no words.

    Source:
        Deerwester et al. 1990, Indexing by latent semantic analysis.
    """
    documents = values.where(values.notna(), "").tolist()
    vectorizer = TfidfVectorizer(
        sublinear_tf=True,
        ngram_range=(1, 2),
        min_df=2 if len(documents) >= 100 else 1,
        max_features=TEXT_TERMS,
        strip_accents="unicode",
        token_pattern=r"(?u)\b\w+\b",
        dtype=np.float32,
    )
    try:
        terms = vectorizer.fit_transform(documents)
    except ValueError:
        return None, "it contains no words that occur twice"
    most = TEXT_COMPONENTS if len(documents) <= MANY_DOCUMENTS else TEXT_COMPONENTS // 2
    k = min(most, min(terms.shape) - 1)
    if k < 1:
        return None, "it contains a single word"
    encoded = TruncatedSVD(k, random_state=seed).fit_transform(terms).astype(np.float32)
    encoded -= encoded.mean(axis=0)
    total = float(encoded.var(axis=0).sum())
    encoded *= np.float32(np.sqrt(TEXT_WEIGHT / total)) if total > 0 else np.float32(1)
    return encoded, f"TF-IDF of {terms.shape[1]:,} words and pairs, {k} components"
