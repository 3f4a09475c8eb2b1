"""EK-FAC factors by kronfluence 1.0.1, as its own examples call it. Runs in the peers' environment.

Reads a model and rows from ``argv[1]`` (``torch.save``), writes seconds and one preconditioned
vector per layer to ``argv[2]``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from types import SimpleNamespace

import torch
from benchmarks.layer_fit import build
from kronfluence import Analyzer, FactorArguments, Task, prepare_model
from torch.nn import functional as F
from torch.utils.data import TensorDataset


class Classification(Task):
    """Sums of losses, as the library asks for; labels are those of the data."""

    def compute_train_loss(self, batch, model, sample=False):
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def main() -> None:
    job = SimpleNamespace(**torch.load(sys.argv[1], weights_only=False))
    torch.set_num_threads(job.threads)
    model = build(job.kind, **job.sizes)
    model = model.double() if job.double else model
    model.load_state_dict(job.state)
    # With a mean over positions in each loss of a sequence, as the other side has it.
    if job.kind == "transformer":
        Classification.compute_train_loss = lambda self, batch, model, sample=False: (
            F.cross_entropy(model(batch[0]), batch[1], reduction="sum") / batch[1].shape[1]
        )
    task = Classification()
    model = prepare_model(model, task)
    names = [name for name, m in model.named_modules() if hasattr(m, "original_module")]
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("fit", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        if job.double:
            for part in ("activation_covariance", "gradient_covariance", "per_sample_gradient"):
                setattr(arguments, f"{part}_dtype", torch.float64)
            arguments.lambda_dtype = torch.float64
        start = time.perf_counter()
        analyzer.fit_all_factors(
            factors_name="ekfac",
            dataset=TensorDataset(job.x, job.y),
            per_device_batch_size=job.batch,
            factor_args=arguments,
        )
        seconds = time.perf_counter() - start
        lambdas = analyzer.load_lambda_matrices("ekfac")
        eigen = analyzer.load_eigendecomposition("ekfac")
    vectors = {}
    for name in names:
        Q_S = eigen["gradient_eigenvectors"][name].double()
        Q_A = eigen["activation_eigenvectors"][name].double()
        count = lambdas["num_lambda_processed"][name].double()
        values = lambdas["lambda_matrix"][name].double() / count
        V = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).double()
        damped = values + job.damping * values.mean()
        vectors[name] = Q_S @ ((Q_S.T @ V @ Q_A) / damped) @ Q_A.T
    torch.save({"seconds": seconds, "vectors": vectors}, sys.argv[2])


if __name__ == "__main__":
    main()
