"""EK-FAC scores with low-rank gradients of queries by kronfluence 1.0.1, as its examples call it.

Reads a model, rows and ranks from ``argv[1]`` (``torch.save``), writes seconds and scores of every
rank (``None``: exact) to ``argv[2]``. Runs in the peers' environment.
"""

from __future__ import annotations

import sys
import tempfile
import time
from types import SimpleNamespace

import torch
from benchmarks.layer_fit import build
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from torch.nn import functional as F
from torch.utils.data import TensorDataset


class Language(Task):
    """Sums over sequences of mean losses over their positions."""

    def compute_train_loss(self, batch, model, sample=False):
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="sum") / y.shape[1]

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def main() -> None:
    job = SimpleNamespace(**torch.load(sys.argv[1], weights_only=False))
    torch.set_num_threads(job.threads)
    model = build("transformer", **job.sizes)
    model.load_state_dict(job.state)
    task = Language()
    model = prepare_model(model, task)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("scores", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        shown = TensorDataset(job.x, job.y)
        analyzer.fit_all_factors(
            factors_name="ekfac",
            dataset=shown,
            per_device_batch_size=job.batch,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
        )
        for rank in (None, *job.ranks):
            start = time.perf_counter()
            analyzer.compute_pairwise_scores(
                scores_name=f"pairs-{rank}",
                factors_name="ekfac",
                query_dataset=TensorDataset(job.x_query, job.y_query),
                train_dataset=shown,
                per_device_query_batch_size=len(job.x_query),
                per_device_train_batch_size=job.batch,
                # 0.1 of the mean eigenvalue, for each layer
                score_args=ScoreArguments(damping_factor=None, query_gradient_low_rank=rank),
            )
            seconds = time.perf_counter() - start
            scores = analyzer.load_pairwise_scores(f"pairs-{rank}")["all_modules"]
            found[rank] = seconds, scores.float()
    torch.save({"scores": found}, sys.argv[2])


if __name__ == "__main__":
    main()
