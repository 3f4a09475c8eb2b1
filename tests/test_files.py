"""Files are there whole or not at all."""

import os

import pytest
import torch

from woodbury._files import atomic, load_tensors, save_tensors
from woodbury.errors import DataError


def test_the_old_file_stays_on_failure(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("old")

    def fail():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, done = tmp_path / "rows.csv", []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("sync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("name"), replace(*names)))
    with atomic(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.suffix == ".csv"  # writers that look at the name know what it is
    assert done == ["sync", "name"]
    assert path.read_text() == "whole"


def test_tensors_and_words_come_back(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"turned": torch.arange(6.0).view(2, 3).T, "empty": torch.zeros(0, 2).double()}
    save_tensors(path, tensors, {"rounds": 3, "name": "ß"}, form="test 1")
    found, words = load_tensors(path, form="test 1")
    assert words == {"rounds": 3, "name": "ß"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(DataError, match="cannot be read"):
        load_tensors(path, form="test 1")
    path.write_bytes(b"cut short")
    with pytest.raises(DataError, match="cannot be read .* delete it and run again"):
        load_tensors(path, form="test 1")
    save_tensors(path, {"x": torch.ones(1)}, {}, form="test 2")
    with pytest.raises(DataError, match="no file of the form 'test 1'"):
        load_tensors(path, form="test 1")
