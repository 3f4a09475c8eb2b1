"""Scores by dattri 0.3.0, as its own benchmark calls it. Runs in the environment of the peers.

    python benchmarks/_dattri_scores.py FOLDER METHOD MODELS

reads FOLDER/given.safetensors (rows, labels, parameter vectors, sizes of the layers, damping) and
writes FOLDER/METHOD-model000.safetensors and so on, one file for each of the first MODELS models
that has none yet: scores [queries, rows], positive ones lowering the loss, and seconds. METHOD is
trak, grad_dot, grad_cos, cg (10 steps, its default) or ekfac. What dattri makes of several models
is the mean of the scores of each (TracIn with the same weight for all: of grad_dot). TRAK averages
its two factors apart: its files hold the first as scores and the second, 1 - p, as doubt [rows].
"""

import itertools
import os
import sys
import time

import torch
from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorEKFAC
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from safetensors.torch import load_file, save_file
from torch import nn

FOLDER, METHOD, MODELS = sys.argv[1], sys.argv[2], int(sys.argv[3])


def build(sizes):
    layers = []
    for m, n in itertools.pairwise(sizes):
        layers += [nn.Linear(m, n), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def main():
    given = load_file(f"{FOLDER}/given.safetensors")
    for number, vector in enumerate(given["models"][:MODELS]):
        path = f"{FOLDER}/{METHOD}-model{number:03d}.safetensors"
        if not os.path.exists(path):
            start = time.perf_counter()
            found = scores(given, vector, number)
            found["scores"] = found["scores"].T.contiguous()
            found["seconds"] = torch.tensor(time.perf_counter() - start)
            save_file(found, path + ".tmp")
            os.replace(path + ".tmp", path)


def scores(given, vector, number):
    model = build(given["sizes"].tolist())
    nn.utils.vector_to_parameters(vector.clone(), model.parameters())
    checkpoint = {name: p.detach().clone() for name, p in model.state_dict().items()}
    loaders = [
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(given[f"x_{part}"], given[f"y_{part}"]), batch_size=1000
        )
        for part in ("train", "test")
    ]

    whole = torch.utils.data.DataLoader(loaders[0].dataset, batch_size=len(given["x_train"]))
    damping = float(given["damping"])

    def logits(params, image):
        return torch.func.functional_call(model, params, image.unsqueeze(0))

    def loss(params, pair):
        return nn.functional.cross_entropy(logits(params, pair[0]), pair[1].unsqueeze(0))

    def mean_loss(params, pair):  # of one row or of all, with an axis for it
        values = torch.func.functional_call(model, params, pair[0])
        return nn.functional.cross_entropy(values, pair[1])

    def margin(params, pair):
        logp = -loss(params, pair)
        return logp - torch.log(1 - torch.exp(logp))

    def task(function):
        return AttributionTask(model=model, loss_func=function, checkpoints=[checkpoint])

    if METHOD == "trak":
        attributor = TRAKAttributor(
            task=task(margin),
            correct_probability_func=lambda params, pair: torch.exp(-loss(params, pair)),
            device="cpu",
            # The seed that dattri gives to the projection of this model among several.
            projector_kwargs={"proj_dim": 512, "device": "cpu", "proj_seed": 100_000 * number},
        )
        attributor.cache(loaders[0])
        doubt = attributor.Q
        attributor.Q = torch.ones_like(doubt)
        with torch.no_grad():
            return {"scores": attributor.attribute(loaders[1]), "doubt": doubt}
    if METHOD == "cg":
        attributor = IFAttributorCG(task=task(mean_loss), regularization=damping, device="cpu")
        attributor.cache(whole)
        with torch.no_grad():
            return {"scores": attributor.attribute(whole, loaders[1])}
    if METHOD == "ekfac":
        attributor = IFAttributorEKFAC(task=task(mean_loss), damping=damping, device="cpu")
        attributor.cache(loaders[0])
        with torch.no_grad():
            return {"scores": attributor.attribute(whole, loaders[1])}
    attributor = TracInAttributor(
        task=task(loss),
        weight_list=torch.ones(1) * 1e-3,
        normalized_grad=METHOD == "grad_cos",
        device="cpu",
    )
    with torch.no_grad():
        return {"scores": attributor.attribute(loaders[0], loaders[1])}


main()
