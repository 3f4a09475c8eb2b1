"""K-FAC and EK-FAC: dense blocks by their definition, and where theory says they are exact."""

from __future__ import annotations

import math

import pytest
import torch
from tests.conformance import OperatorConformance
from tests.curvature.layer_reference import Layer, dense_block, factors
from tests.curvature.test_capture import made
from torch import nn

from woodbury import CG, EKFAC, KFAC, Fisher, GaussNewton, Identity, Objective, solve
from woodbury.curvature import LayerMatrix, RelativeDamping, choose_damping
from woodbury.errors import (
    ArgumentError,
    DataError,
    NonFiniteError,
    ShapeError,
    SingularError,
    StructureError,
)
from woodbury.operators import Eigendecomposed

F64 = torch.float64
BOTH = pytest.mark.parametrize("method", [KFAC, EKFAC])


class Twice(nn.Module):
    """A layer used twice, and an embedding whose weights are those of another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.same = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.table.weight
        self.head = nn.Linear(6, 3)

    def forward(self, i):
        h = self.same(torch.tanh(self.same(self.table(i))))
        return self.head(torch.tanh(self.out(h))).sum(1)


def rows(*shape):
    return torch.randn(*shape, dtype=F64)


# Model, inputs, and what is in which block; weights of two kinds of layers are tested elsewhere.
CASES = {
    "bias": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)),
        lambda: rows(12, 4),
        lambda m: {"0": Layer([m[0]]), "2": Layer([m[2]])},
    ),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)),
        lambda: rows(12, 4),
        lambda m: {"0": Layer([m[0]]), "2": Layer([m[2]])},
    ),
    "three axes": (
        lambda: nn.Sequential(
            nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), nn.Flatten(), nn.Linear(10, 3)
        ),
        lambda: rows(12, 5, 4),
        lambda m: {"0": Layer([m[0]]), "2": Layer([m[2]]), "4": Layer([m[4]])},
    ),
    "grouped convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv2d(6, 2, 2, dilation=2, bias=False),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
        lambda: rows(32, 4, 7, 7),
        lambda m: {
            "0[0]": Layer([m[0]], 0),
            "0[1]": Layer([m[0]], 1),
            "2": Layer([m[2]]),
            "4": Layer([m[4]]),
        },
    ),
    "used twice": (
        Twice,
        lambda: torch.randint(6, (8, 3)),
        lambda m: {"same": Layer([m.same]), "head": Layer([m.head])},
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(6, 2), nn.Flatten(), nn.Linear(6, 3)),
        lambda: torch.randint(6, (32, 3)),
        lambda m: {"0": Layer([m[0]]), "2": Layer([m[2]])},
    ),
}


def case(name: str):
    torch.manual_seed(0)
    make_model, make_inputs, layers = CASES[name]
    model, x = make_model().double(), make_inputs()
    return model, x, torch.randint(3, (len(x),)), layers(model)


@BOTH
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", CASES)
def test_damped_inverse_is_that_of_the_dense_block(name, kind, sharing, method):
    model, x, y, layers = case(name)
    objective = Objective(model, "cross_entropy", [(x[:3], y[:3]), (x[3:], y[3:])])
    K = method(objective, kind, sharing=sharing)
    inverse = K.damped_inverse(RelativeDamping(1e-3))
    assert "positive_definite" in inverse.tags
    dense = inverse.to_dense()
    assert {*layers} <= {*K.layers}
    for block, layer in layers.items():
        found = factors(model, layer, x, y, kind)
        wanted = dense_block(found, sharing, method.corrected)
        places = K.layers[block].positions(objective.space)
        n = len(wanted)
        damped = wanted + 1e-3 * wanted.trace() / n * torch.eye(n, dtype=F64)
        truth = torch.linalg.inv(damped)
        mine = dense[places[:, None], places]
        assert (mine - truth).norm() <= 1e-8 * truth.norm()
        others = torch.ones(len(dense), dtype=torch.bool)
        others[places] = False
        assert not bool(dense[places][:, others].any())


@BOTH
def test_one_layer_and_one_datum_is_exact(method):
    torch.manual_seed(0)
    data = rows(1, 4), torch.randint(3, (1,))
    objective = Objective(nn.Linear(4, 3).double(), "cross_entropy", data)
    assert torch.allclose(method(objective, "exact").to_dense(), _by_layer(objective, method))


def _by_layer(objective, method=KFAC):
    """The blocks of the exact Fisher matrix."""
    F, result = Fisher(objective).to_dense(), None
    result = torch.zeros_like(F)
    for layer in method(objective, "empirical").layers.values():
        places = layer.positions(objective.space)
        result[places[:, None], places] = F[places[:, None], places]
    return result


@BOTH
@pytest.mark.parametrize("positions", [(), (5,)])
def test_deep_linear_networks_with_squared_error_are_exact(method, positions):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 2)).double()
    data = rows(9, *positions, 4), rows(9, *positions, 2)
    objective = Objective(model, nn.MSELoss(reduction="sum"), data)
    wanted = _by_layer(objective)
    K = method(objective, "exact")
    if (positions and method is KFAC) or not positions:
        assert (K.to_dense() - wanted).norm() <= 1e-12 * wanted.norm()
    assert torch.allclose(K.trace(), wanted.trace())  # corrected or not


def test_reduce_is_exact_where_outputs_are_averaged():
    class Averaged(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean(1)

    torch.manual_seed(0)
    objective = Objective(Averaged(4, 3).double(), "mse", (rows(9, 5, 4), rows(9, 3)))
    wanted = Fisher(objective).to_dense()
    K = KFAC(objective, "exact", sharing="reduce")
    places = torch.cat([layer.positions(objective.space) for layer in K.layers.values()])
    assert torch.equal(places.sort().values, torch.arange(15))
    assert (K.to_dense() - wanted).norm() <= 1e-12 * wanted.norm()
    assert (KFAC(objective, "exact").to_dense() - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("name", ["conv2d", "text", "mixed", "sequence first", "recurrent"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_the_corrected_diagonal_is_the_best_in_its_basis(name, kind):
    objective = made(name)
    F = Fisher(objective, kind).to_dense()
    K, E = KFAC(objective, kind), EKFAC(objective, kind)
    for block, layer in E.layers.items():
        places = layer.positions(objective.space)
        wanted, operator = F[places[:, None], places], E.blocks[block]
        Q = operator.basis.to_dense()
        assert torch.allclose(operator.values, (Q.T @ wanted @ Q).diagonal(), atol=1e-12)
        errors = [(M.blocks[block].to_dense() - wanted).norm() for M in (E, K)]
        assert errors[0] <= errors[1] + 1e-12
    assert torch.allclose(E.trace(), F.trace())


def test_positions_are_summed_before_they_are_squared():
    class Difference(nn.Linear):
        def forward(self, x):
            h = super().forward(x)
            return h[:, 0] - h[:, 1]

    torch.manual_seed(0)
    x = rows(6, 1, 4).expand(6, 2, 4)  # the gradients of both positions cancel
    objective = Objective(Difference(4, 3, bias=False).double(), "mse", (x, rows(6, 3)))
    assert EKFAC(objective, "exact").to_dense().abs().max() < 1e-25
    assert KFAC(objective, "exact").trace() > 0.1


@BOTH
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["conv2d", "text", "mixed", "linear"])
def test_batches_of_any_size_give_the_same_matrix(name, kind, method):
    objective = made(name)
    x, y = objective._batches.first().data
    model = objective._predict.model
    wanted = method(objective, kind).to_dense()
    for sizes in ([1, 2, len(x) - 3], [len(x) - 1, 1]):
        split = list(zip(x.split(sizes), y.split(sizes), strict=True))
        mine = method(Objective(model, "cross_entropy", split), kind).to_dense()
        assert (mine - wanted).norm() <= 1e-11 * wanted.norm()


@BOTH
def test_weights_are_copies(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = rows(5, 6, 3), torch.randint(2, (5, 6))

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).mT

    twice = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4])
    weights = torch.tensor([1.0, 2, 1, 3, 1], dtype=F64)
    weighted = Objective(Last(), "cross_entropy", (x, y), weights=weights)
    copied = Objective(Last(), "cross_entropy", (x[twice], y[twice]))
    for sharing in ("expand", "reduce"):
        K, wanted = (method(o, "exact", sharing=sharing).to_dense() for o in (weighted, copied))
        assert torch.allclose(K * 5 / 8, wanted)  # a mean over 5 examples, and one over 8
    negative = weighted.with_weights(-weights)
    with pytest.raises(ArgumentError, match="negative"):
        method(negative, "exact")


@BOTH
def test_masked_positions_are_in_neither_factor_nor_count(method):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

        def forward(self, x):
            return self.layers(x).mT

    torch.manual_seed(0)
    model, x, y = Tagger().double(), rows(4, 5, 3), torch.randint(2, (4, 5))
    y[:, 3:] = -100
    padded = Objective(model, "cross_entropy", (x, y))
    short = Objective(model, "cross_entropy", (x[:, :3], y[:, :3]))
    for kind in ("exact", "empirical"):
        for sharing in ("expand", "reduce"):
            mine, wanted = (method(o, kind, sharing=sharing).to_dense() for o in (padded, short))
            assert torch.allclose(mine, wanted)


def test_sampled_labels_make_the_exact_matrix_in_the_mean_and_follow_the_generator():
    objective = made("linear")
    wanted = EKFAC(objective, "exact").to_dense()

    def sampled(seed, samples):
        generator = torch.Generator().manual_seed(seed)
        return EKFAC(objective, "sampled", samples=samples, generator=generator).to_dense()

    assert torch.equal(sampled(3, 1), sampled(3, 1))
    assert not torch.equal(sampled(3, 1), sampled(4, 1))
    assert (sampled(3, 1000) - wanted).norm() < 0.1 * wanted.norm()
    assert (sampled(3, 4) - wanted).norm() > 0.1 * wanted.norm()


class TestLayerMatrix(OperatorConformance):
    def make(self):
        cases = []
        for name in ("linear", "mixed"):
            K = EKFAC(made(name), "exact")
            dense = torch.zeros(K.shape, dtype=F64)
            for block, layer in K.layers.items():
                places = layer.positions(K.objective.space)
                dense[places[:, None], places] = K.blocks[block].to_dense()
            eye = torch.eye(len(dense), dtype=F64)
            cases.append((K.damped(2.0), dense + 2 * eye))
        return cases


def test_algebra_stays_layer_by_layer():
    K = EKFAC(made("mixed"), "exact")
    n = K.shape[0]
    shifted = 2.0 * (K + 0.5 * Identity(n))
    assert isinstance(shifted, LayerMatrix)
    dense = 2 * K.to_dense() + torch.eye(n, dtype=F64)
    assert torch.allclose(shifted.to_dense(), dense)
    assert torch.allclose(shifted.logdet(), torch.logdet(dense))
    assert torch.allclose(shifted.trace(), dense.trace())
    assert torch.allclose(shifted.diagonal(), dense.diagonal())
    root = shifted.sqrt()
    assert torch.allclose(root.to_dense() @ root.to_dense(), dense)
    written = K.permutation @ K.block_diagonal @ K.permutation.T
    assert torch.allclose(written.to_dense(), K.to_dense())


def test_damping_is_that_of_each_layer_and_is_reported():
    K = EKFAC(made("mixed"), "exact")
    means = {name: float(b.to_dense().trace()) / b.shape[0] for name, b in K.blocks.items()}
    assert K.damped().damping == pytest.approx({name: 0.1 * mean for name, mean in means.items()})
    assert len({*K.damped().damping.values()}) >= len(means) - 1  # two layers see the same
    own = {name: 0.1 + i for i, name in enumerate(K.layers)}
    for damping, wanted in ((0.25, dict.fromkeys(means, 0.25)), (own, own)):
        for damped in (K.damped(damping), K.damped_inverse(damping).inverse()):
            assert damped.damping == wanted
            for name, layer in K.layers.items():
                places = layer.positions(K.objective.space)
                added = (damped.to_dense() - K.to_dense())[places[:, None], places]
                eye = wanted[name] * torch.eye(len(places), dtype=F64)
                assert torch.allclose(added, eye, atol=1e-10)
    with pytest.raises(ArgumentError, match="missing"):
        K.damped({"conv": 1.0})
    for bad in (-1.0, math.nan, "large"):
        with pytest.raises(ArgumentError):
            K.damped(bad)
    with pytest.raises(ArgumentError, match="factor"):
        RelativeDamping(-0.1)
    one = Objective(nn.Linear(4, 3).double(), "mse", (rows(1, 4), rows(1, 3)))
    with pytest.raises(SingularError, match="multiple of the identity"):
        KFAC(one, "exact").damped_inverse(0.0)


def test_regularizer_is_in_the_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = rows(7, 3), torch.randint(2, (7,))
    plain = EKFAC(Objective(model, "cross_entropy", data), "exact").to_dense()
    eye = torch.eye(26, dtype=F64)
    number = EKFAC(Objective(model, "cross_entropy", data, l2=0.3), "exact").to_dense()
    assert torch.allclose(number, plain + 0.3 * eye)
    l2 = torch.full((26,), 0.1, dtype=F64)
    l2[16:] = 0.2
    layers = EKFAC(Objective(model, "cross_entropy", data, l2=l2), "exact").to_dense()
    assert torch.allclose(layers, plain + torch.diag(l2))
    l2[0] = 0.5
    with pytest.raises(StructureError, match="within the layer '0'"):
        EKFAC(Objective(model, "cross_entropy", data, l2=l2), "exact")


def test_coverage_says_what_is_represented_how():
    objective = made("mixed")
    coverage = KFAC(objective, "empirical").coverage()
    assert sum(row.entries for row in coverage.rows) == objective.space.dim
    assert sum(coverage.shares.values()) == pytest.approx(1)
    forms = {row.name: row.form for row in coverage.rows}
    assert forms["tokens"] == forms["conv"] == "Kronecker"
    assert forms["norm"] == forms["table"] == "block"
    assert "Kronecker" in str(coverage)
    small = KFAC(objective, "empirical", block_limit=4, side_limit=4)
    forms = {row.name: (row.form, row.detail) for row in small.coverage().rows}
    assert forms["table"] == ("diagonal", "24")
    assert forms["scale"] == ("block", "4 x 4")
    assert forms["conv"] == (
        "Kronecker",
        "5 x 5, diagonal factor of the outputs, diagonal factor of the inputs",
    )


def test_other_parameters_have_the_exact_block_or_diagonal():
    objective = made("recurrent")
    F = Fisher(objective).to_dense()
    for limit, exact in ((1024, True), (0, False)):
        K = KFAC(objective, "exact", block_limit=limit)
        for name, layer in K.layers.items():
            if name.startswith("rnn"):
                places = layer.positions(objective.space)
                wanted = F[places[:, None], places]
                wanted = wanted if exact else torch.diag(wanted.diagonal())
                assert torch.allclose(K.blocks[name].to_dense(), wanted, atol=1e-12)


def test_wide_sides_have_the_diagonal_of_their_factor():
    model, x, y, layers = case("bias")
    objective = Objective(model, "cross_entropy", (x, y))
    K = KFAC(objective, "exact", side_limit=3)
    found = factors(model, layers["0"], x, y, "exact")
    A = sum(torch.outer(row, row) for a, _ in found for row in a)
    S = sum(torch.outer(row, row) for _, gs in found for g in gs for row in g)
    wanted = torch.kron(S, torch.diag(A.diagonal())) / len(x) ** 2
    assert torch.allclose(K.blocks["0"].to_dense(), wanted)


def test_unused_parameters_are_a_block_of_zeros():
    class Idle(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.idle = nn.Linear(2, 2)

    data = rows(5, 3), torch.randint(2, (5,))
    objective = Objective(Idle().double(), "cross_entropy", data, allow_unused=True)
    K = EKFAC(objective, "exact")
    assert K.coverage().shares["zero"] == pytest.approx(6 / 14)
    assert torch.allclose(K.to_dense(), _padded(Fisher(objective).to_dense(), K.to_dense()))
    damped = K.damped(RelativeDamping(0.1))
    assert damped.damping["(unused)"] == pytest.approx(0.1 * sum(K.mean_eigenvalues().values()) / 2)
    assert torch.isfinite(damped.inverse().to_dense()).all()


def _padded(F, K):
    return torch.where(F.abs() + K.abs() > 0, K, F)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_says_so(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)
    x, y = torch.randn(40, 3).to(dtype), torch.randint(2, (40,))
    K = EKFAC(Objective(model, "cross_entropy", (x, y)), "exact")
    assert K.dtype == torch.float32
    assert "float32" in str(K.coverage())
    wide = EKFAC(Objective(model.double(), "cross_entropy", (x.double(), y)), "exact")
    gap = (K.to_dense().double() - wide.to_dense()).norm()
    assert gap < 1e-4 * wide.to_dense().norm()  # half precision would be off by 1e-2
    assert not wide.note


def test_float32_inverse():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(50, 6), torch.randint(3, (50,))
    K = EKFAC(Objective(model, "cross_entropy", (x, y)), "exact")
    inverse = K.damped_inverse(RelativeDamping(1e-3)).to_dense().double()
    wide = EKFAC(Objective(model.double(), "cross_entropy", (x.double(), y)), "exact")
    truth = wide.damped_inverse(RelativeDamping(1e-3)).to_dense()
    cosine = (inverse * truth).sum() / inverse.norm() / truth.norm()
    assert cosine > 0.999999


def test_nan_in_a_batch_is_named():
    x, y = rows(9, 3), torch.randint(2, (9,))
    x[7, 1] = math.nan
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    with pytest.raises(NonFiniteError, match="batch 1"):
        KFAC(Objective(nn.Linear(3, 2).double(), "cross_entropy", batches), "empirical")


def test_bad_arguments():
    objective = made("linear")
    for options in ({"kind": "true"}, {"sharing": "some"}, {"side_limit": -1}, {"samples": 0}):
        with pytest.raises(ArgumentError):
            KFAC(objective, **options)


class KilledError(Exception):
    pass


class Kill:
    """Progress that ends the run after some batches."""

    def __init__(self, after: int | None) -> None:
        self.after, self.seen = after, []

    def __call__(self, what, done, total):
        self.seen.append((what, done))
        fits = [item for item in self.seen if item[0] in ("factors", "corrected eigenvalues")]
        if self.after is not None and len(fits) == self.after:
            raise KilledError


@pytest.mark.parametrize("kind", ["exact", "sampled"])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_a_killed_fit_goes_on_where_it_was(tmp_path, after, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = rows(9, 3), torch.randint(2, (9,))
    data = [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])]

    def fit(progress, path):
        objective = Objective(model, "cross_entropy", data, progress=progress)
        generator = torch.Generator().manual_seed(0)
        return EKFAC(objective, kind, checkpoint=path, save_every=0, generator=generator)

    wanted = fit(None, None).to_dense()
    with pytest.raises(KilledError):
        fit(Kill(after), tmp_path / "fit")
    assert not list(tmp_path.glob(".*"))  # nothing half written
    rest = Kill(None)
    mine = fit(rest, tmp_path / "fit")
    assert torch.equal(mine.to_dense(), wanted)
    first = [done for what, done in rest.seen if what == "factors"]
    second = [done for what, done in rest.seen if what == "corrected eigenvalues"]
    assert len(second) == 3
    assert bool(first) == (after <= 3)
    again = Kill(None)
    assert torch.equal(fit(again, tmp_path / "fit").to_dense(), wanted)
    assert not [what for what, _ in again.seen if what in ("factors", "corrected eigenvalues")]


def test_a_store_of_another_model_is_refused(tmp_path):
    x, y = rows(9, 3), torch.randint(2, (9,))
    model = nn.Linear(3, 2).double()
    objective = Objective(model, "cross_entropy", (x, y))
    KFAC(objective, "exact", checkpoint=tmp_path / "fit")
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    others = {
        "model": (Objective(nn.Linear(3, 2).double(), "cross_entropy", (x, y)), "exact"),
        "data": (Objective(model, "cross_entropy", (x + 1, y)), "exact"),
        "settings": (objective, "empirical"),
        "criterion": (Objective(model, smooth, (x, y)), "exact"),
    }
    for other, kind in others.values():
        with pytest.raises(DataError, match="fingerprint"):
            KFAC(other, kind, checkpoint=tmp_path / "fit")
    two = [(x[:4], y[:4]), (x[4:], y[4:])]
    KFAC(Objective(model, "cross_entropy", two), "exact", checkpoint=tmp_path / "two")
    later = Objective(model, "cross_entropy", [two[0], (x[4:] + 1, y[4:])])
    with pytest.raises(DataError, match="fingerprint"):
        KFAC(later, "exact", checkpoint=tmp_path / "two")
    (tmp_path / "fit.safetensors").write_bytes(b"something else")
    with pytest.raises(DataError, match="cannot be read"):
        KFAC(objective, "exact", checkpoint=tmp_path / "fit")


def test_a_store_of_a_model_with_other_constants_is_refused(tmp_path):
    x, y = rows(9, 3), torch.randint(2, (9,))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
    model[0].requires_grad_(False)
    EKFAC(Objective(model, "cross_entropy", (x, y)), "exact", checkpoint=tmp_path / "fit")
    for change in (model[0].weight.data.mul_, model[1].running_var.mul_):
        change(2)
        with pytest.raises(DataError, match="fingerprint"):
            EKFAC(Objective(model, "cross_entropy", (x, y)), "exact", checkpoint=tmp_path / "fit")
        change(0.5)
    EKFAC(Objective(model, "cross_entropy", (x, y)), "exact", checkpoint=tmp_path / "fit")


def _process(rank: int, folder: str, checkpoint: str = "") -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    objective = made("text")
    x, y = objective._batches.first().data
    batches = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    K = EKFAC(
        Objective(objective._predict.model, "cross_entropy", batches),
        "exact",
        group=dist.group.WORLD,
        checkpoint=checkpoint.format(rank) or None,
        save_every=0.0,
    )
    torch.save(K.to_dense(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_the_batches_and_agree(tmp_path):
    wanted = EKFAC(made("text"), "exact").to_dense()
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        mine = torch.load(tmp_path / f"{rank}.pt")
        assert (mine - wanted).norm() <= 1e-11 * wanted.norm()


def test_processes_that_were_stopped_in_different_passes_go_on_together(tmp_path):
    wanted = EKFAC(made("text"), "exact").to_dense()
    for turn in range(2):
        torch.multiprocessing.spawn(_process, (str(tmp_path), str(tmp_path / "fit")), nprocs=2)
        for rank in range(2):
            mine = torch.load(tmp_path / f"{rank}.pt")
            assert (mine - wanted).norm() <= 1e-11 * wanted.norm()
        if turn == 0:  # one is in the second pass then, and the other before the first
            for name in ("fit", "fit.part1of2"):
                (tmp_path / f"{name}.safetensors").unlink()


def test_a_process_that_does_not_see_the_whole_fit_gets_it(tmp_path):
    wanted = EKFAC(made("text"), "exact").to_dense()
    for _ in range(2):
        torch.multiprocessing.spawn(_process, (str(tmp_path), str(tmp_path / "{}")), nprocs=2)
    assert not (tmp_path / "1.safetensors").exists()
    mine = torch.load(tmp_path / "1.pt")
    assert (mine - wanted).norm() <= 1e-11 * wanted.norm()


def test_as_preconditioner_it_saves_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x, y = rows(200, 8) * torch.logspace(0, 2, 8, dtype=F64), torch.randint(4, (200,))
    objective = Objective(model, "cross_entropy", (x, y))
    A = GaussNewton(objective) + 1e-4 * Identity(objective.space.dim)
    b = torch.randn(objective.space.dim, dtype=F64)
    plain = solve(A, b, CG(rtol=1e-8))
    M = EKFAC(objective, "exact").damped_inverse(1e-4)
    ours = solve(A, b, CG(rtol=1e-8, preconditioner=M))
    assert torch.allclose(
        ours.value, plain.value, rtol=1e-4, atol=1e-4 * float(plain.value.abs().max())
    )
    assert ours.steps < plain.steps / 2


def test_blocks_are_given_by_eigenvectors():
    K = KFAC(made("linear"), "exact")
    assert all(isinstance(block, Eigendecomposed) for block in K.blocks.values())


def test_damping_is_chosen_by_the_residual():
    objective = made("linear")
    K = EKFAC(objective, "exact")
    A = 4.0 * K.damped(RelativeDamping(0.03))  # the right damping for this matrix would be 0.03
    b = torch.randn(K.shape[0], 2, dtype=F64)
    choice = choose_damping(K, A / 4, vectors=b)
    assert choice.damping == RelativeDamping(0.03)
    assert choice.residuals[0.03] < 1e-12
    x = K.damped_inverse(RelativeDamping(1.0)) @ b
    residual = ((b - (A / 4) @ x).norm(dim=0) / b.norm(dim=0)).mean()
    assert choice.residuals[1.0] == pytest.approx(float(residual))
    drawn = [choose_damping(K, A, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    with pytest.raises(ArgumentError, match="at least one"):
        choose_damping(K, A, factors=[])
    with pytest.raises(ShapeError, match="curvature"):
        choose_damping(K, Identity(3, dtype=F64))
