"""Scores of places: they add up, and each is what the gradients at its place make of it."""

import pytest
import torch
from tests.apps.attribute.small_models import character_tokenizer, tiny

from woodbury import EKFAC, Influence, Objective
from woodbury.apps.attribute.network import Network
from woodbury.apps.attribute.records import Record
from woodbury.apps.attribute.sequences import encode
from woodbury.errors import ArgumentError, ShapeError, StructureError
from woodbury.influence import token_scores

TEXTS = ["to be or not", "hello", "a man walks in", "Good day sir", "who is it"]


def rows(net, size=2):
    records = [Record(k + 1, "", text, k % 3) for k, text in enumerate(TEXTS)]
    return encode(records, net, batch_size=size)


def network(kind):
    classes = ("a", "b", "c") if kind == "classifier" else ()
    return Network(tiny(kind).double().eval(), character_tokenizer(), kind, 24, 0, classes)


@pytest.mark.parametrize("kind", ["causal", "classifier", "masked"])
@pytest.mark.parametrize("matrix", ["ekfac", "diagonal"])
def test_places_add_up_to_the_score(kind, matrix):
    net = network(kind)
    data = rows(net)
    influence = Influence(
        Objective(net.model, "cross_entropy", data), matrix=matrix, damping=1e-2, tolerance=0.0
    )
    queries, examples = data.take([1, 3]), data.take([0, 2, 4])
    found = token_scores(influence, queries, examples)
    expected = influence.scores(queries, rows=torch.tensor([0, 2, 4])).values
    assert found.values.shape == (2, 3, 14)
    torch.testing.assert_close(found.values.sum(2) + found.rest, expected, rtol=1e-8, atol=1e-10)
    for row, example in enumerate((0, 2, 4)):  # padding is nobody's place
        assert not found.values[:, row, len(TEXTS[example]) :].any()


def test_without_attention_a_place_is_its_own_loss():
    """In a model that looks at one token at a time a place is an example of its own."""
    torch.manual_seed(0)
    words, targets = torch.randint(5, (4, 3)), torch.randint(5, (4, 3))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5)

        def forward(self, words):
            return self.out(torch.tanh(self.embed(words))).mT

    model = Model().double()
    whole = Influence(Objective(model, "cross_entropy", (words, targets)), damping=0.1)
    found = token_scores(whole, (words, targets), (words, targets))
    places = (words.view(-1, 1), targets.view(-1, 1))
    alone = Objective(model, "cross_entropy", places)
    asked = Objective(model, "cross_entropy", (words, targets))
    gradients = torch.cat([g for _, g in alone.per_example_gradients()]).view(4, 3, -1)
    measured = torch.cat([g for _, g in asked.per_example_gradients()])
    A = whole.system.operator.to_dense()
    expected = -torch.einsum("qn,itn->qit", torch.linalg.solve(A, measured.T).T, gradients) / 12
    torch.testing.assert_close(found.values, expected, rtol=1e-8, atol=1e-12)
    assert not found.rest.any()


def test_a_matrix_that_is_given():
    net = network("causal")
    data = rows(net)
    objective = Objective(net.model, "cross_entropy", data)
    K = EKFAC(objective, "exact")
    influence = Influence(objective, matrix=K, damping=1e-2, tolerance=0.0)
    found = token_scores(influence, data.take([0]), data)
    expected = influence.scores(data.take([0])).values
    torch.testing.assert_close(found.values.sum(2) + found.rest, expected, rtol=1e-8, atol=1e-10)


def test_a_model_without_places():
    norm = torch.nn.LayerNorm(3)
    data = torch.randn(4, 3), torch.randn(4, 3)
    influence = Influence(Objective(norm, "mse", data), damping=1.0)
    with pytest.raises(StructureError, match="no layer of the model"):
        token_scores(influence, data, data)


def test_pairs_and_blocks_of_queries_give_the_same():
    """A memory for one solution at a time, rows in any order and more than once."""
    net = network("causal")
    data = rows(net)
    objective = Objective(net.model, "cross_entropy", data)
    K = EKFAC(objective, "exact")
    stages = []
    kwargs = {"matrix": K, "damping": 1e-2, "tolerance": 0.0}
    whole = token_scores(Influence(objective, **kwargs), data, data)
    least = 11 * objective.space.dim * 8 + 5 * 5 * 8
    small = Influence(
        objective, memory=least + 100, progress=lambda *given: stages.append(given), **kwargs
    )
    pairs = torch.tensor([[4, 0], [1, 3], [1, 0], [0, 4], [1, 3]])
    found = token_scores(small, data, data, pairs=pairs)
    assert found.values.shape == (5, 14)
    torch.testing.assert_close(found.values, whole.values[pairs[:, 0], pairs[:, 1]])
    torch.testing.assert_close(found.rest, whole.rest[pairs[:, 0], pairs[:, 1]])
    assert stages[-1] == ("scoring tokens", 1.0)
    assert small.system.report.calls == 3  # queries 0, 1 and 4, one at a time
    everything = token_scores(small, data, data)
    torch.testing.assert_close(everything.values, whole.values)
    none = token_scores(small, data, data, pairs=torch.empty(0, 2, dtype=torch.long))
    assert (none.values.shape, none.rest.shape) == ((0, 0), (0,))


def test_all_queries_are_solved_for_together():
    net = network("causal")
    data = rows(net)
    objective = Objective(net.model, "cross_entropy", data)
    influence = Influence(objective, matrix="diagonal", damping=1e-2)
    token_scores(influence, data, data)
    assert influence.system.report.calls == 1


@pytest.mark.parametrize(
    ("pairs", "error", "said"),
    [
        (torch.zeros(3, dtype=torch.long), ShapeError, r"pairs are torch.int64 of shape \(3,\)"),
        (torch.zeros(3, 2), ShapeError, "pairs are torch.float32"),
        (torch.tensor([[0, 5]]), ArgumentError, "examples from 5 to 5; there are 5"),
        (torch.tensor([[-1, 0]]), ArgumentError, "queries from -1 to -1; there are 5"),
    ],
)
def test_pairs_of_nothing(pairs, error, said):
    net = network("causal")
    data = rows(net)
    objective = Objective(net.model, "cross_entropy", data)
    with pytest.raises(error, match=said):
        token_scores(Influence(objective, matrix="identity"), data, data, pairs=pairs)
