"""Pairwise EK-FAC scores by kronfluence 1.0.1, as its own examples call it.

Reads a model and rows from ``argv[1]`` (``torch.save``), writes seconds and scores to ``argv[2]``.
Runs in the peers' environment.
"""

from __future__ import annotations

import sys
import tempfile
import time
from types import SimpleNamespace

import torch
from benchmarks._kronfluence_fit import Classification
from benchmarks.layer_fit import build
from kronfluence import Analyzer, FactorArguments, ScoreArguments, prepare_model
from torch.utils.data import TensorDataset


def main() -> None:
    job = SimpleNamespace(**torch.load(sys.argv[1], weights_only=False))
    torch.set_num_threads(job.threads)
    model = build("mlp", width=job.width)
    model.load_state_dict(job.state)
    task = Classification()
    model = prepare_model(model, task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("scores", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors(
            factors_name="ekfac",
            dataset=TensorDataset(job.x[: job.fitted], job.y[: job.fitted]),
            per_device_batch_size=job.batch,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
        )
        start = time.perf_counter()
        analyzer.compute_pairwise_scores(
            scores_name="pairs",
            factors_name="ekfac",
            query_dataset=TensorDataset(job.x_query, job.y_query),
            train_dataset=TensorDataset(job.x, job.y),
            per_device_query_batch_size=len(job.x_query),
            per_device_train_batch_size=job.batch,
            score_args=ScoreArguments(damping_factor=None),  # 0.1 of the mean, for each layer
        )
        seconds = time.perf_counter() - start
        scores = analyzer.load_pairwise_scores("pairs")["all_modules"]
    torch.save({"seconds": seconds, "scores": scores.float()}, sys.argv[2])


if __name__ == "__main__":
    main()
