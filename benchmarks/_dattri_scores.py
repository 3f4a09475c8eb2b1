"""Scores by dattri 0.3.0, as its own benchmark calls it. Runs in the environment of the peers.

    python benchmarks/_dattri_scores.py FOLDER METHOD MODELS

reads FOLDER/given.safetensors (rows, labels, parameter vectors, sizes of the layers, damping) and
writes FOLDER/METHOD-MODELS.safetensors: scores [queries, rows], positive ones lowering the loss.
METHOD is trak, grad_dot, grad_cos, tracin, cg (10 steps, its default) or ekfac.
"""

import itertools
import sys
import time

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FOLDER, METHOD, MODELS = sys.argv[1], sys.argv[2], int(sys.argv[3])


def build(sizes):
    layers = []
    for m, n in itertools.pairwise(sizes):
        layers += [nn.Linear(m, n), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def main():
    from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorEKFAC
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    given = load_file(f"{FOLDER}/given.safetensors")
    model = build(given["sizes"].tolist())
    checkpoints = []
    for vector in given["models"][:MODELS]:
        nn.utils.vector_to_parameters(vector.clone(), model.parameters())
        checkpoints.append({name: p.detach().clone() for name, p in model.state_dict().items()})
    loaders = [
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(given[f"x_{part}"], given[f"y_{part}"]), batch_size=500
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

    start = time.perf_counter()
    if METHOD == "trak":
        task = AttributionTask(model=model, loss_func=margin, checkpoints=checkpoints)
        attributor = TRAKAttributor(
            task=task,
            correct_probability_func=lambda params, pair: torch.exp(-loss(params, pair)),
            device="cpu",
            projector_kwargs={"proj_dim": 512, "device": "cpu"},
        )
        attributor.cache(loaders[0])
        with torch.no_grad():
            scores = attributor.attribute(loaders[1])
    elif METHOD in ("cg", "ekfac"):
        task = AttributionTask(model=model, loss_func=mean_loss, checkpoints=checkpoints)
        if METHOD == "cg":
            attributor = IFAttributorCG(task=task, regularization=damping, device="cpu")
            attributor.cache(whole)
        else:
            attributor = IFAttributorEKFAC(task=task, damping=damping, device="cpu")
            attributor.cache(loaders[0])
        with torch.no_grad():
            scores = attributor.attribute(whole, loaders[1])
    else:
        task = AttributionTask(model=model, loss_func=loss, checkpoints=checkpoints)
        attributor = TracInAttributor(
            task=task,
            weight_list=torch.ones(MODELS) * 1e-3,
            normalized_grad=METHOD == "grad_cos",
            device="cpu",
        )
        with torch.no_grad():
            scores = attributor.attribute(loaders[0], loaders[1])
    seconds = torch.tensor(time.perf_counter() - start)
    save_file(
        {"scores": scores.T.contiguous(), "seconds": seconds},
        f"{FOLDER}/{METHOD}-{MODELS}.safetensors",
    )


main()
