"""What the report shows: tokens with their colours, escaped, and what the scores are worth."""

import html
import json
import re

import pyarrow.parquet
import pytest
import torch
import transformers
from tests.apps.attribute.small_models import character_tokenizer, saved, tiny
from tokenizers import ByteLevelBPETokenizer

from woodbury.apps.attribute import attribute
from woodbury.apps.attribute.network import Network
from woodbury.apps.attribute.pages import token_texts
from woodbury.apps.attribute.report import coloured
from woodbury.errors import DataError

SPAN = re.compile(
    r'<span(?: class="(\w+)" style="--share:([\d.]+)" title="(\S+)")?>(.*?)</span>', re.S
)
TEXTS = ["to be or not", "a <b>man</b> & you", "hello", "who is it"]


def byte_tokenizer():
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(["plain words only"], vocab_size=260, show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer)


def network(tokenizer):
    return Network(tiny("causal"), tokenizer, "causal", 24, 0)


@pytest.mark.parametrize(
    "text", ["plain words", "Zürich – 東京 🙂!", "a \ufffd b", " spaced  out "]
)
def test_texts_of_tokens_join_to_the_text(text):
    net = network(byte_tokenizer())
    ids = torch.tensor(net.tokenizer(text)["input_ids"])
    texts = token_texts(net, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "\ufffd" not in "".join(texts).replace("\ufffd", "", text.count("\ufffd"))


def test_texts_of_tokens_take_a_few_tokens_at_a_time(monkeypatch):
    net = network(byte_tokenizer())
    ids = torch.tensor(net.tokenizer("🙂" * 50 + "words " * 50)["input_ids"])
    seen, decode = [], net.tokenizer.decode
    monkeypatch.setattr(
        net.tokenizer, "decode", lambda ids, **how: (seen.append(len(ids)), decode(ids, **how))[1]
    )
    token_texts(net, ids)
    assert max(seen) <= 8


def test_colours_are_shares_of_the_strongest():
    shown = coloured(["a", "b", "c"], [-2.0, 1.0, 0.0])
    assert [(t.kind, t.share) for t in shown] == [("for", 1.0), ("against", 0.5), ("", 0.0)]
    assert [t.kind for t in coloured(["a"], [0.0])] == [""]


def files(folder, model=None, tokenizer=None):
    rows = [{"text": text} for text in TEXTS]
    for name, lines in (("train", rows), ("query", rows[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    saved(folder / "model", "causal", model)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "model")
    return folder / "model", folder / "train.jsonl", folder / "query.jsonl"


def byte_model(tokenizer):
    config = tiny("causal").config
    config.vocab_size = len(tokenizer)
    return transformers.GPT2LMHeadModel(config)


def test_the_page_shows_every_row_with_its_tokens(tmp_path):
    tokenizer = byte_tokenizer()
    given = files(tmp_path, byte_model(tokenizer), tokenizer)
    result = attribute(*given, out=tmp_path / "out", tolerance=0.0)
    page = (tmp_path / "out" / "attribution.html").read_text()
    assert "<b>" not in re.sub("<li><b>.*?</b>", "", page)
    assert "&lt;" in page
    rows = re.findall(
        r'<p class="soft">line (\d+) · score (\S+?)</p>\s*<p class="tokens">(.*?)</p>', page, re.S
    )
    assert len(rows) == 2 * len(TEXTS)  # every row is on one side of either query
    lines = iter(rows)
    for q in range(2):
        for line, score, body in (next(lines) for _ in TEXTS):
            row = int(line) - 1
            spans = SPAN.findall(body)
            assert "".join(html.unescape(text) for *_, text in spans) == TEXTS[row]
            value = float(result.scores.values[q, row])
            assert float(score) == pytest.approx(value, rel=1e-2)
            # Every linear layer sees all places: the parts of the tokens are the whole score.
            parts = [float(part) for _, _, part, _ in spans if part]
            size = sum(abs(part) for part in parts)
            assert sum(parts) == pytest.approx(value, abs=1e-2 * size)
            strongest = max(spans, key=lambda span: float(span[1] or 0))
            assert strongest[1] == "1.00"
            assert strongest[0] == ("for" if float(strongest[2]) < 0 else "against")


def test_the_page_says_signs_units_damping_coverage_and_error(tmp_path):
    attribute(*files(tmp_path), out=tmp_path / "out")
    page = " ".join((tmp_path / "out" / "attribution.html").read_text().split())
    counted = 8 * (24 + 8 + 32) + 32 * 8 + 24 + 8 + 32 + 8  # weights and biases of linear layers
    share = counted / sum(p.numel() for p in tiny("causal").parameters())
    for said in (
        "negative scores lower the loss",
        "nats",
        "a tenth of the mean eigenvalue, the default",
        f"{counted}, {share:.0%} of the model",
        "<th>represented as</th><td>Kronecker 100%</td>",
        "not in these numbers",
        "a score larger than the loss itself",
    ):
        assert said in page, said
    attribute(*files(tmp_path), out=tmp_path / "own", damping=1e-3)
    own = (tmp_path / "own" / "attribution.html").read_text()
    assert re.search(r"<th>damping</th><td>0\.001[^<]* \(--damping\)", own)


def test_queries_of_low_rank_say_what_they_cost(tmp_path):
    model, train, query = files(tmp_path)
    exact = attribute(model, train, query, tolerance=0.0)
    found = attribute(model, train, query, query_rank=2, out=tmp_path / "out")
    page = " ".join((tmp_path / "out" / "attribution.html").read_text().split())
    assert "error of queries kept with rank 2 for each layer" in page
    off = (found.scores.values - exact.scores.values).abs().double()
    assert bool((off <= found.scores.error() + 1e-5 * exact.scores.values.abs()).all())
    assert float(off.max()) > 0
    with pytest.raises(DataError, match="--query-rank is for --matrix ekfac and kfac"):
        attribute(model, train, query, query_rank=2, matrix="identity")
    with pytest.raises(DataError, match="--query-rank must be at least 1"):
        attribute(model, train, query, query_rank=0)


def test_the_table_of_scores_has_the_columns_that_are_promised(tmp_path):
    result = attribute(*files(tmp_path), out=tmp_path / "out")
    path = tmp_path / "out" / "scores.parquet"
    schema = pyarrow.parquet.read_schema(path)
    assert [(name, str(kind)) for name, kind in zip(schema.names, schema.types, strict=True)] == [
        ("query", "int64"),
        ("query_line", "int64"),
        ("row", "int64"),
        ("line", "int64"),
        ("score", "float"),
    ]
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(path)
    assert frame["score"].to_list() == result.table["score"].tolist()


def test_weights_in_half_precision_are_computed_in_single_and_the_page_says_so(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        folder = tmp_path / name
        folder.mkdir()
        model = tiny("causal").to(dtype)
        result = attribute(*files(folder, model=model), out=folder / "out")
        assert result.scores.values.dtype == torch.float32
        page = (folder / "out" / "attribution.html").read_text()
        assert f"stored in {name}; everything was computed in float32" in page


def test_a_prompt_that_fills_all_that_is_taken(tmp_path):
    model, train, query = files(tmp_path)
    query.write_text(json.dumps({"prompt": "to be or not to be that is ", "completion": "it"}))
    with pytest.raises(DataError, match=r"Line 1 of query.jsonl .* prompt fills all that is taken"):
        attribute(model, train, query)


def test_a_character_tokenizer_has_a_text_for_every_token():
    net = network(character_tokenizer())
    ids = torch.tensor(net.tokenizer("a <b> c")["input_ids"])
    assert len(token_texts(net, ids)) == len(ids)
