"""The whole job, on a model small enough for the formula to be written out."""

import json

import pandas as pd
import pytest
import torch
from tests.apps.attribute.small_models import saved, tiny

from woodbury import Influence, Objective
from woodbury.apps.attribute import attribute
from woodbury.apps.attribute.layers import choose_layers
from woodbury.apps.attribute.network import load_network
from woodbury.apps.attribute.records import read_records
from woodbury.apps.attribute.sequences import encode
from woodbury.errors import DataError

TEXTS = ["to be or not", "hello", "a man walks in", "Good day sir", "who is it", "to be a man"]


def files(folder, kind="causal"):
    folder.mkdir(exist_ok=True)
    for name, texts in (("train", TEXTS), ("query", ["to be or not", "who walks in"])):
        lines = [{"text": t, "label": k % 3, "id": f"{name}-{k}"} for k, t in enumerate(texts)]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return saved(folder / "model", kind), folder / "train.jsonl", folder / "query.jsonl"


@pytest.mark.parametrize("kind", ["causal", "classifier", "masked"])
def test_everything_is_written_and_the_scores_are_those_of_influence(tmp_path, kind):
    model, train, query = files(tmp_path, kind)
    said = []
    out = tmp_path / "out"
    result = attribute(model, train, query, out=out, tolerance=0.0, batch_size=2, say=said.append)
    assert "2 queries x 6 training rows" in said[0]

    network = load_network(model)
    label = "label" if kind == "classifier" else None
    data = encode(read_records(train, label=label), network, batch_size=2)
    asked = encode(read_records(query, label=label), network)
    params = choose_layers(network.model, "linear")
    objective = Objective(network.model, "cross_entropy", data, params=params)
    damping = result.scores.settings["damping"]
    assert damping
    assert all(value > 0 for value in damping.values())
    expected = Influence(objective, matrix="ekfac", tolerance=0.0).scores(asked)
    torch.testing.assert_close(result.scores.values, expected.values, rtol=1e-3, atol=1e-4)

    table = pd.read_parquet(out / "scores.parquet")
    assert list(table.columns) == ["query", "query_line", "row", "line", "score"]
    assert len(table) == 12
    for line in table.itertuples():
        assert line.score == pytest.approx(float(result.scores.values[line.query, line.row]))
        assert line.line == line.row + 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["train_rows"] == 6
    assert summary["parameters"] == objective.space.dim
    page = (out / "attribution.html").read_text()
    assert "train-0" in page
    assert "query-1" in page
    assert "http" not in page.replace("http-equiv", "")


def test_exact_scores_without_sampling_are_the_same_for_any_batches(tmp_path):
    model, train, query = files(tmp_path)
    first, second = (
        attribute(model, train, query, matrix="diagonal", batch_size=size).scores.values
        for size in (1, 4)
    )
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


def test_a_row_speaks_for_itself(tmp_path):
    model, train, query = files(tmp_path)
    result = attribute(model, train, query, matrix="ekfac")
    assert int(result.scores.top(1).rows[0]) == 0  # the first query is the first training row


def test_a_finished_run_is_taken_up_again(tmp_path):
    model, train, query = files(tmp_path)
    out = tmp_path / "out"
    first = attribute(model, train, query, out=out)
    assert (out / "work").is_dir()
    again = attribute(model, train, query, out=out)
    assert torch.equal(first.scores.values, again.scores.values)


def test_another_model_in_the_same_folder_is_refused(tmp_path):
    model, train, query = files(tmp_path)
    out = tmp_path / "out"
    attribute(model, train, query, out=out)
    other = tiny("causal")
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight += 1
    saved(model, "causal", other)
    with pytest.raises(DataError):
        attribute(model, train, query, out=out)


def test_rows_with_rare_words_in_common(tmp_path):
    model, train, query = files(tmp_path)
    result = attribute(model, train, query, keep=2)
    whole = attribute(model, train, query)
    chosen = result.scores.rows
    assert 2 <= len(chosen) <= 4
    expected = whole.scores.values[:, chosen]
    torch.testing.assert_close(result.scores.values, expected, rtol=0.05, atol=1e-4)
    assert "similar in words" in result.summary["notes"][0]


def test_layers_that_count(tmp_path):
    model, _, _ = files(tmp_path)
    network = load_network(model).model
    linear = choose_layers(network, "linear")
    mlp = choose_layers(network, "mlp")
    assert {name for name in linear if "attn" in name} == set(linear) - set(mlp)
    assert all(".mlp." in name for name in mlp)
    assert not any("wte" in name or "lm_head" in name for name in linear)
    assert choose_layers(network, "all") == [name for name, _ in network.named_parameters()]
    with pytest.raises(DataError, match="take --layers all"):
        choose_layers(torch.nn.LayerNorm(3), "linear")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"matrix": "hessian"}, "--matrix must be one of"),
        ({"layers": "some"}, "--layers must be one of"),
        ({"damping": -1.0}, "--damping must be 0 or more"),
        ({"tolerance": 1.0}, "--tolerance must be"),
        ({"keep": 0}, "--keep must be at least 1"),
        ({"top": 0}, "--top must be at least 1"),
        ({"seed": -1}, "--seed must be"),
        ({"budget": "nonsense"}, "nonsense"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_work_starts(tmp_path, changed, said):
    with pytest.raises(DataError) as error:
        attribute(tmp_path, tmp_path, tmp_path, **changed)
    assert said in str(error.value)
