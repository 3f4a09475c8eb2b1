import pytest
import torch
import torch.nn.functional as F
from tests.apps.attribute.small_models import character_tokenizer, tiny
from tokenizers import processors

from woodbury import Influence, Objective
from woodbury.apps.attribute.network import Network
from woodbury.apps.attribute.records import Record
from woodbury.apps.attribute.sequences import IGNORED, encode
from woodbury.errors import DataError

TEXTS = ["to be or not", "hello", "a man walks in", "Good day sir"]


def network(kind):
    classes = ("calm", "loud", "odd") if kind == "classifier" else ()
    return Network(tiny(kind).double().eval(), character_tokenizer(), kind, 24, 0, classes)


def records(texts=TEXTS):
    return [Record(k + 1, "", text, k % 3) for k, text in enumerate(texts)]


def objective(net, sequences):
    return Objective(net.model, "cross_entropy", sequences)


def test_the_loss_of_a_causal_row_is_that_of_transformers():
    net = network("causal")
    losses = objective(net, encode(records(), net, batch_size=2)).per_example_losses()
    for text, loss in zip(TEXTS, losses, strict=True):
        ids = torch.tensor(net.tokenizer(text)["input_ids"])[None]
        with torch.no_grad():
            found = net.model(input_ids=ids, labels=ids)
        expected = F.cross_entropy(found.logits[0, :-1], ids[0, 1:])
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        # transformers computes its own in single precision
        torch.testing.assert_close(loss.float(), found.loss.float(), rtol=1e-5, atol=0)


def test_only_the_completion_of_a_prompt_is_predicted():
    net = network("causal")
    row = encode([Record(1, "To be ", "or not")], net)
    ids = torch.tensor(net.tokenizer("To be or not")["input_ids"])
    with torch.no_grad():
        logits = net.model(input_ids=ids[None]).logits[0]
    expected = F.cross_entropy(logits[5:-1], ids[6:])
    torch.testing.assert_close(objective(net, row).per_example_losses()[0], expected)


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A </s>"])
def test_a_prompt_has_the_special_tokens_of_any_text(template):
    net = network("causal")
    special = [("<s>", 1), ("</s>", 2)]
    net.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=special
    )
    with_prompt = encode([Record(1, "To be ", "or not")], net)
    plain = encode([Record(1, "", "To be or not")], net)
    assert torch.equal(with_prompt.ids[0], plain.ids[0])
    first = 6 + template.startswith("<s>")  # of the completion
    assert bool((with_prompt.labels[0][: first - 1] == IGNORED).all())
    assert torch.equal(with_prompt.labels[0][first - 1 :], plain.labels[0][first - 1 :])


def test_the_loss_of_a_class_by_number_and_by_name():
    net = network("classifier")
    rows = [Record(1, "", "hello", "loud"), Record(2, "", "hello", 1), Record(3, "", "hello", "1")]
    losses = objective(net, encode(rows, net)).per_example_losses()
    ids = torch.tensor(net.tokenizer("hello")["input_ids"])[None]
    with torch.no_grad():
        expected = F.cross_entropy(net.model(input_ids=ids).logits[0], torch.tensor(1))
    torch.testing.assert_close(losses, expected.expand(3))


def test_masked_tokens_are_those_predicted_and_depend_on_the_row_alone():
    net = network("masked")
    alone = encode(records()[2:3], net)
    among = encode(records(), net)
    assert torch.equal(alone.ids[0], among.ids[2])
    assert torch.equal(alone.labels[0], among.labels[2])
    plain = torch.tensor(net.tokenizer(TEXTS[2])["input_ids"])
    hidden = alone.labels[0] != IGNORED
    assert int(hidden.sum()) == round(0.15 * len(plain))
    assert bool((alone.ids[0][hidden] == net.tokenizer.mask_token_id).all())
    assert torch.equal(alone.labels[0][hidden], plain[hidden])
    assert torch.equal(alone.ids[0][~hidden], plain[~hidden])
    other = encode(records(["a man walks in"]), net, seed=5)
    assert not torch.equal(other.ids[0], alone.ids[0])


@pytest.mark.parametrize("kind", ["causal", "classifier", "masked"])
def test_padding_has_no_influence(kind):
    """Rows of 5 to 14 tokens, alone and padded together, have the same losses and scores."""
    net = network(kind)
    scores, losses = [], []
    for size in (1, 2, 4):
        sequences = encode(records(), net, batch_size=size)
        of_size = objective(net, sequences)
        losses.append(of_size.per_example_losses())
        scores.append(Influence(of_size, matrix="diagonal", damping=1e-2).scores(sequences).values)
    for other in (1, 2):
        torch.testing.assert_close(losses[other], losses[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(scores[other], scores[0], rtol=1e-6, atol=1e-9)


def test_scores_are_those_of_the_dense_formula():
    r"""Every parameter, $A = \frac1N\sum_i J_i^T H_i J_i + \rho I$ from Jacobians of the logits."""
    net = network("causal")
    sequences = encode(records(), net, batch_size=4)
    given = objective(net, sequences)
    n, N, rho = given.space.dim, len(TEXTS), 1e-3
    (batch,) = sequences
    params = {name: p.detach() for name, p in net.model.named_parameters()}

    def logits(flat):
        values = dict(zip(params, _split(flat, params), strict=True))
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        return torch.func.functional_call(net.model, values, (), inputs).logits

    flat = torch.cat([p.flatten() for p in params.values()])
    J = torch.func.jacrev(logits)(flat)
    z = logits(flat)
    A, gradients = rho * torch.eye(n, dtype=z.dtype), torch.zeros(N, n, dtype=z.dtype)
    for i in range(N):
        counted = batch["labels"][i] != IGNORED
        for t in torch.nonzero(counted)[:, 0]:
            p, Jt = z[i, t].softmax(0), J[i, t]
            share = 1 / int(counted.sum())
            A += share / N * Jt.T @ (torch.diag(p) - torch.outer(p, p)) @ Jt
            slope = p.clone()
            slope[batch["labels"][i, t]] -= 1
            gradients[i] += share * Jt.T @ slope
    expected = -gradients @ torch.linalg.solve(A, gradients.T) / N
    found = Influence(given, damping=rho).scores(sequences).values
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def _split(flat, params):
    sizes = [p.numel() for p in params.values()]
    parts = zip(flat.split(sizes), params.values(), strict=True)
    return [part.view_as(p) for part, p in parts]


def test_long_rows_lose_their_end_and_are_counted():
    net = network("causal")
    sequences = encode(records(["short", "x" * 40]), net, max_length=10)
    assert sequences.truncated == 1
    assert [len(row) for row in sequences.ids] == [5, 10]
    assert sequences.tokens == 15


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("causal", Record(4, "", "a"), "Line 4 of t.jsonl has 1 tokens and none to predict"),
        (
            "classifier",
            Record(2, "", "a", "blue"),
            "has the class 'blue', and the model knows calm",
        ),
        ("classifier", Record(2, "", "a", 3), "the class 3, and the model knows 0 to 2"),
    ],
)
def test_rows_that_cannot_be_predicted(kind, row, said):
    with pytest.raises(DataError) as error:
        encode([row], network(kind), file="t.jsonl")
    assert said in str(error.value)


def test_settings_that_make_no_sense():
    net = network("causal")
    with pytest.raises(DataError, match="--max-length is 25"):
        encode(records(), net, max_length=25)
    with pytest.raises(DataError, match="--batch-size must be at least 1"):
        encode(records(), net, batch_size=0)
    net.tokenizer.mask_token = None
    masked = Network(net.model, net.tokenizer, "masked", 24, 0)
    with pytest.raises(DataError, match="no mask token"):
        encode(records(), masked)
