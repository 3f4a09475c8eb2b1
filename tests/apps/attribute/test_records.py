import json

import pytest

from woodbury.apps.attribute.records import read_records
from woodbury.errors import DataError


def write(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def test_rows_of_text_keep_line_name_and_label(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        {"text": "first", "label": "bad", "id": 7},
        "",
        {"text": "second", "label": 1},
    )
    first, second = read_records(path, label="label")
    assert (first.text, first.label, first.line, first.name) == ("first", "bad", 1, "7")
    assert (second.text, second.label, second.line, second.name) == ("second", 1, 3, None)


def test_prompt_and_completion(tmp_path):
    (row,) = read_records(write(tmp_path / "a.jsonl", {"prompt": "Who? ", "completion": "He."}))
    assert (row.prompt, row.text) == ("Who? ", "He.")


def test_another_field(tmp_path):
    (row,) = read_records(write(tmp_path / "a.jsonl", {"body": "x y"}), text="body")
    assert row.text == "x y"


@pytest.mark.parametrize(
    ("line", "label", "said"),
    [
        ('{"text": "a"', None, "Line 2 of rows.jsonl is not JSON"),
        ("[1, 2]", None, "Line 2 of rows.jsonl is a list"),
        ('{"body": "a"}', None, "no field 'text'; it has 'body'"),
        ('{"text": 3}', None, "'text' is a int, not text"),
        ('{"text": "  "}', None, "Line 2 of rows.jsonl has no text"),
        ('{"text": "a"}', "label", "no field 'label'"),
        ('{"text": "a", "label": 1.5}', "label", "'label' is 1.5"),
        ('{"text": "a", "label": true}', "label", "'label' is True"),
        ('{"prompt": 1, "completion": "a"}', None, "'prompt' is a int"),
    ],
)
def test_a_broken_row_is_named(tmp_path, line, label, said):
    path = write(tmp_path / "rows.jsonl", {"text": "a", "label": 0}, line)
    with pytest.raises(DataError, match="rows.jsonl") as error:
        read_records(path, label=label)
    assert said in str(error.value)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        read_records(write(tmp_path / "empty.jsonl", "", "  "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(DataError, match="is not UTF-8"):
        read_records(tmp_path / "latin.jsonl")
