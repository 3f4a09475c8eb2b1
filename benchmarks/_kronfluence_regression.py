"""Pairwise EK-FAC scores of kronfluence 1.0.1, as its UCI example calls it. Runs with the peers.

    python benchmarks/_kronfluence_regression.py FOLDER

reads FOLDER/given.safetensors and writes FOLDER/scores.safetensors.
"""

import math
import os
import sys

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import TensorDataset


class Regression(Task):
    def compute_train_loss(self, batch, model, sample=False):
        inputs, targets = batch
        outputs = model(inputs)
        if sample:
            with torch.no_grad():
                targets = torch.normal(outputs.detach(), std=math.sqrt(0.5))
        return nn.functional.mse_loss(outputs, targets, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def main() -> None:
    folder = sys.argv[1]
    given = load_file(f"{folder}/given.safetensors")
    layers = [nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
    nn.utils.vector_to_parameters(given["vector"], model.parameters())
    os.chdir(folder)
    task = Regression()
    analyzer = Analyzer("concrete", prepare_model(model, task), task, cpu=True)
    train = TensorDataset(given["x"], given["y"])
    test = TensorDataset(given["xt"], given["yt"])
    analyzer.fit_all_factors(
        "ekfac",
        train,
        per_device_batch_size=len(train),
        factor_args=FactorArguments(strategy="ekfac"),
    )
    analyzer.compute_pairwise_scores(
        "scores",
        "ekfac",
        test,
        train,
        per_device_query_batch_size=len(test),
        per_device_train_batch_size=len(train),
    )
    scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    save_file({"scores": scores.contiguous()}, f"{folder}/scores.safetensors")


main()
