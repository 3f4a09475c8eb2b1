"""The files of this room."""

from __future__ import annotations

from functools import partial

from woodbury import _files

__all__ = ["load_tensors", "save_tensors"]

_FORM = "woodbury influence 1"

save_tensors = partial(_files.save_tensors, form=_FORM)
load_tensors = partial(_files.load_tensors, form=_FORM)
