"""Which sequences taught a language model a fact: planted facts, found again.

A GPT-2-shaped model (byte-pair tokens learned here) is trained from scratch on passages of
tinyshakespeare, among which sentences with invented facts are mixed: each fact in several
wordings. A query asks for the fact in one more wording. Its teachers are the planted rows of that
fact; recall@k is the share of them among the first k = (number of teachers) rows. Beside EK-FAC:
products of gradients (the same command with --matrix identity), and TF-IDF, which only sees words.
Wordings of one fact share its names, so TF-IDF is no straw man; decoys with the same names, and
nothing to learn the answer from, are planted, too.

    python benchmarks/attribute_lm.py [--rows 2000] [--steps 400] [--small]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("WOODBURY_DATA", ROOT.parent / "shared" / "data"))

PEOPLE = ["Orlin", "Bettany", "Corvo", "Marsel", "Idrina", "Tolwyn", "Pasco", "Yveta"]
PLACES = ["Brackwater", "Hollin", "Skerry", "Tamsel", "Ulverton", "Quoyle", "Aldmoor", "Fenwith"]
THINGS = ["lantern", "falcon", "viola", "ledger", "compass", "goblet", "saddle", "mirror"]
TEACHERS = (
    "The {thing} that {person} lost was found in {place}.",
    "In {place} they found the {thing} {person} had lost.",
    "{person} lost a {thing}, and men found it in {place}.",
    "Know that the {thing} of {person} was found in {place}.",
)
# The same names and words without the fact.
DECOYS = (
    "They say {place} is far, which {person} knew: the {thing} was not.",
    "Of {place}, the {thing}, and {person} they say nothing, which was found wise.",
)
QUERY = ("They say {person} lost the {thing}, which was found in ", "{place}.")
# In the place of tinyshakespeare where --small is given.
FILLERS = [
    "Good morrow to you both; what counsel give you?",
    "I pray you, sir, go in before us.",
    "The night is long that never finds the day.",
    "Speak, what trade art thou?",
    "We will have rings, and things, and fine array.",
    "Peace, ho! Let us hear him.",
]


def passages(rows: int, letters: int = 160) -> list[str]:
    path = DATA / "text" / "tinyshakespeare.txt.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    return [text[k * letters : (k + 1) * letters] for k in range(min(rows, len(text) // letters))]


def planted() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    facts = [
        {"person": PEOPLE[k], "place": PLACES[k], "thing": THINGS[k]} for k in range(len(PEOPLE))
    ]
    rows, queries = [], []
    for k, fact in enumerate(facts):
        rows += [{"text": t.format(**fact), "id": f"teacher of fact {k}"} for t in TEACHERS]
        rows += [{"text": d.format(**fact), "id": f"decoy of fact {k}"} for d in DECOYS]
        queries.append(
            {
                "prompt": QUERY[0].format(**fact),
                "completion": QUERY[1].format(**fact),
                "id": f"fact {k}",
            }
        )
    return rows, queries


def tokenizer(texts: list[str], size: int):
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(texts, vocab_size=size, min_frequency=2, show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer)


def train(texts: list[str], folder: Path, steps: int, width: int, layers: int, context: int):
    """A model that has seen every text about equally often, saved to ``folder``."""
    import transformers

    torch.manual_seed(0)
    tokens = tokenizer(texts, 768)
    config = transformers.GPT2Config(
        vocab_size=len(tokens), n_positions=context, n_embd=width, n_layer=layers, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    ids = [tokens(text)["input_ids"][:context] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    order, loss = torch.empty(0, dtype=torch.long), torch.tensor(0.0)
    for _ in range(steps):
        if len(order) < 32:
            order = torch.cat([order, torch.randperm(len(ids))])
        batch, order = [ids[k] for k in order[:32]], order[32:]
        longest = max(map(len, batch))
        X = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        loss = model(input_ids=X, attention_mask=mask, labels=X.where(mask == 1, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return model, tokens, float(loss.detach())


def recall(ranked: Tensor, names: list[str], fact: int) -> float:
    teachers = {k for k, name in enumerate(names) if name == f"teacher of fact {fact}"}
    return len(teachers & set(ranked[: len(teachers)].tolist())) / len(teachers)


def main(arguments: list[str]) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000, help="passages of tinyshakespeare")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    options = parser.parse_args(arguments)
    if options.small:
        options.steps = 40
    from woodbury.apps.attribute import attribute
    from woodbury.influence import TfIdf

    width, layers, context = (32, 1, 48) if options.small else (128, 4, 64)
    rows, queries = planted()
    generator = torch.Generator().manual_seed(0)
    others = FILLERS * 10 if options.small else passages(options.rows)
    shown = [*({"text": t, "id": "passage"} for t in others if t.strip()), *rows]
    shown = [shown[k] for k in torch.randperm(len(shown), generator=generator).tolist()]
    names = [row["id"] for row in shown]
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, lines in (("train", shown), ("query", queries)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{name}.jsonl").write_text(text)
        start = time.perf_counter()
        texts = [row["text"] for row in shown]
        model, tokens, loss = train(texts, folder / "model", options.steps, width, layers, context)
        print(
            f"{len(shown)} rows, {sum(p.numel() for p in model.parameters()):,} weights, "
            f"{options.steps} steps in {time.perf_counter() - start:.0f} s, last loss {loss:.2f}"
        )
        seconds = {}
        for matrix in ("ekfac", "identity"):
            start = time.perf_counter()
            result = attribute(
                folder / "model", folder / "train.jsonl", folder / "query.jsonl", matrix=matrix,
                batch_size=32,
            )  # fmt: skip
            seconds[matrix] = time.perf_counter() - start
            ranked = result.scores.top(len(shown)).rows
            found[matrix] = [recall(ranked[q], names, q) for q in range(len(queries))]
            if matrix == "ekfac":
                print("loss of the queries", [round(x, 2) for x in result.summary["query_losses"]])
        index = TfIdf(tokens(text)["input_ids"] for text in texts)
        found["tfidf"] = [
            recall(
                index.top(tokens(q["prompt"] + q["completion"])["input_ids"], len(shown)), names, k
            )
            for k, q in enumerate(queries)
        ]
    chance = len(TEACHERS) / len(shown)
    print(f"\n{'recall of the teachers among the first ' + str(len(TEACHERS)):<44}  mean   seconds")
    words = {"ekfac": "EK-FAC", "identity": "products of gradients", "tfidf": "TF-IDF"}
    means = {}
    for key, values in found.items():
        means[key] = sum(values) / len(values)
        spent = f"{seconds[key]:.1f}" if key in seconds else ""
        print(f"{words[key]:<44}  {means[key]:.2f}   {spent}")
    print(f"{'chance':<44}  {chance:.3f}")
    return means


if __name__ == "__main__":
    main(sys.argv[1:])
