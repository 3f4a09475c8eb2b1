"""What Influence refuses, or must not refuse: rows, losses, NaN, parts of matrices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from woodbury import EKFAC, Fisher, GaussNewton, Influence, Objective
from woodbury.errors import DataError, NonFiniteError
from woodbury.influence import EigenProjection, GradientStore
from woodbury.influence.rivals import grad_dot, trac_in

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 3, generator=G).double(), torch.arange(12) % 3
ASKED = X[:1] + 0.1, Y[:1]
MATRICES = ("gauss_newton", "hessian", "fisher", "empirical_fisher", "ekfac", "diagonal")


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def numbered(rows: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    return [(X[i : i + 4], Y[i : i + 4], rows[i : i + 4]) for i in (0, 4, 8)]


WRONG_NUMBERS = {
    "of another data set": torch.arange(12) + 100,
    "twice": torch.arange(12) // 2,
    "negative": torch.arange(12) - 1,
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_row_numbers_that_are_not_those_of_the_rows(name, tmp_path):
    rows = WRONG_NUMBERS[name]
    objective = Objective(network(), "cross_entropy", numbered(rows))
    said = f"go from {int(rows.min())} to {int(rows.max())}; they must be the row numbers 0 to 11"
    for matrix in ("gauss_newton", "identity", "ekfac"):
        influence = Influence(objective, matrix=matrix, damping=0.1)
        with pytest.raises(DataError, match=said):
            influence.scores(ASKED)
        with pytest.raises(DataError, match=said):
            influence.self_influence()
    with pytest.raises(DataError, match=said):
        GradientStore(objective, tmp_path)
    with pytest.raises(DataError, match=said):
        Objective(network(), "cross_entropy", numbered(rows), weights=torch.ones(12).double())


def test_row_numbers_in_another_order_put_scores_in_their_places():
    order = torch.randperm(12, generator=G)
    mixed = [(X[part], Y[part], part) for part in order.split(4)]
    for matrix in ("gauss_newton", "identity"):
        one, other = (
            Influence(Objective(network(), "cross_entropy", data), matrix=matrix, damping=0.1)
            for data in ((X, Y), mixed)
        )
        wanted = one.scores(ASKED).values
        assert torch.allclose(other.scores(ASKED).values, wanted, rtol=1e-8)


WRONG_LOSSES = {
    "divided by the batch": lambda z, y: F.cross_entropy(z, y, reduction="none") / len(z),
    "the mean, repeated": lambda z, y: F.cross_entropy(z, y).expand(len(z)),
    "centred in the batch": lambda z, y: (z - z.mean(0)).square().sum(1),
}


@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_losses_that_depend_on_their_batch(name):
    objective = Objective(network(), WRONG_LOSSES[name], (X, Y))
    for matrix in ("gauss_newton", "hessian", "empirical_fisher", "identity", "diagonal"):
        influence = Influence(objective, matrix=matrix, damping=0.1)
        for ask in (lambda one=influence: one.scores(ASKED), influence.self_influence):
            with pytest.raises(DataError, match="on its own and .* within its batch of 12"):
                ask()
    with pytest.raises(DataError, match="within its batch"):
        grad_dot(objective, ASKED)
    with pytest.raises(DataError, match="within its batch"):
        trac_in(objective, [objective.params_vector()], ASKED)


def test_a_measurement_that_depends_on_its_batch():
    influence = Influence(
        Objective(network(), "cross_entropy", (X, Y)), lambda z, batch: z[:, 0] / len(z)
    )
    with pytest.raises(DataError, match="within its batch"):
        influence.scores((X[:3], Y[:3]))


@pytest.mark.parametrize("matrix", [*MATRICES, "identity", "kfac"])
def test_nan_is_named_by_its_row(matrix):
    x = X.clone()
    x[6, 1] = torch.nan
    data = [(x[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
    influence = Influence(Objective(network(), "cross_entropy", data), matrix=matrix, damping=0.1)
    with pytest.raises(NonFiniteError, match=r"rows? 6"):
        influence.scores(ASKED)


def test_nan_in_a_query_is_named_by_its_row():
    asked = X[:3].clone(), Y[:3]
    asked[0][2] = torch.inf
    for matrix in ("gauss_newton", "ekfac"):
        influence = Influence(Objective(network(), "cross_entropy", (X, Y)), matrix=matrix)
        with pytest.raises(NonFiniteError, match="row 2 "):
            influence.scores(asked)


def test_a_matrix_with_parameters_apart_from_their_layer(tmp_path):
    objective = Objective(network(), "cross_entropy", (X, Y))
    matrix = EKFAC(objective, "exact", dense=["0.weight"])
    damped = matrix.damped(0.1).to_dense()
    influence = Influence(objective, matrix=matrix, damping=0.1, tolerance=0)
    (asked,) = (g for _, g in objective.with_data(ASKED).per_example_gradients())
    (rows,) = (g for _, g in objective.per_example_gradients())
    wanted = -asked @ torch.linalg.solve(damped, rows.T) / 12
    assert torch.allclose(influence.scores(ASKED).values, wanted, rtol=1e-8)
    own = -(rows * torch.linalg.solve(damped, rows.T).T).sum(1) / 12
    assert torch.allclose(influence.self_influence().values, own, rtol=1e-8)
    whole = EigenProjection(8, 8)
    store = GradientStore(objective, tmp_path, whole, matrix=matrix, damping=0.1, dtype="float64")
    assert torch.allclose(store.scores(ASKED).values, wanted, rtol=1e-8)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_examples_in_single_precision(rows):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(rows, 5), torch.arange(rows)
    found = Influence(Objective(model, "cross_entropy", (x, y)))
    values = found.scores((x[:1] + 0.1, y[:1])).values
    curvature = GaussNewton(Objective(model, "cross_entropy", (x, y))).to_dense()
    assert found.system.damping == pytest.approx(0.1 * float(curvature.trace()) / 75, rel=1e-3)
    assert bool(torch.isfinite(values).all())


class TinyForCausalLM(nn.Module):
    """Predicts the token after each place from the token there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.out(torch.tanh(self.embed(input_ids))))


def test_labels_of_a_causal_model_that_are_its_inputs():
    model, ids = TinyForCausalLM().double(), torch.randint(5, (6, 7), generator=G)
    following = ids.roll(-1, 1)
    following[:, -1] = -100
    padded = ids.clone()
    padded[:, 4:] = -100
    for labels in (ids, padded):
        objective = Objective(model, "cross_entropy", {"input_ids": ids, "labels": labels})
        with pytest.raises(DataError, match="predicts at each place the token after it; shift"):
            objective.gradient()
    constant = ids[:, :1].expand(6, 7).clone()  # what follows is what is there
    for given, labels in (
        (ids, following),
        (ids, torch.full_like(ids, -100)),
        (constant, constant),
    ):
        Objective(model, "cross_entropy", {"input_ids": given, "labels": labels}).gradient()


def test_a_model_in_double_precision_with_norms_in_single_is_taken():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=7,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(settings).double().eval()
    ids = torch.randint(7, (5, 6), generator=G)
    data = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    matrix = EKFAC(Objective(model, "cross_entropy", data), "exact")
    fisher = Fisher(Objective(model, "cross_entropy", data))
    assert float(matrix.trace()) == pytest.approx(float(fisher.trace()), rel=1e-6)
