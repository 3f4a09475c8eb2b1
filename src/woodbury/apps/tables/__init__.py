"""Tables: reading them, and preparing them as numbers for a model."""

from woodbury.apps.tables.labels import Labels, prepare_labels
from woodbury.apps.tables.prepare import Prepared, prepare
from woodbury.apps.tables.source import CHANGED_COLUMN, Table, fingerprint, read_table
from woodbury.apps.tables.trusted import read_trusted, trusted_mask

__all__ = [
    "CHANGED_COLUMN",
    "Labels",
    "Prepared",
    "Table",
    "fingerprint",
    "prepare",
    "prepare_labels",
    "read_table",
    "read_trusted",
    "trusted_mask",
]
