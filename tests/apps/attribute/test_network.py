import json

import pytest
import torch
from tests.apps.attribute.small_models import character_tokenizer, saved, tiny

from woodbury.apps.attribute.network import load_network
from woodbury.errors import DataError


@pytest.mark.parametrize("kind", ["causal", "classifier", "masked"])
def test_what_is_saved_is_loaded(tmp_path, kind):
    model = tiny(kind)
    network = load_network(saved(tmp_path, kind, model))
    assert (network.kind, network.context, network.notes) == (kind, 24, [])
    assert not network.model.training
    for name, parameter in network.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert network.classes == (("LABEL_0", "LABEL_1", "LABEL_2") if kind == "classifier" else ())


def test_half_precision_is_computed_in_single_and_said(tmp_path):
    network = load_network(saved(tmp_path, "causal", tiny("causal").to(torch.bfloat16)))
    assert {p.dtype for p in network.model.parameters()} == {torch.float32}
    assert "bfloat16" in network.notes[0]


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(DataError, match="There is no folder"):
        load_network(tmp_path / "none")
    with pytest.raises(DataError, match="has no config.json"):
        load_network(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_network(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTModel"]}))
    with pytest.raises(DataError, match="names the architecture ViTModel"):
        load_network(tmp_path)
    with pytest.raises(DataError, match="--task must be one of"):
        load_network(tmp_path, kind="nonsense")


def test_a_model_without_tokenizer(tmp_path):
    tiny("causal").save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has no tokenizer"):
        load_network(tmp_path)


def test_a_tokenizer_of_another_model(tmp_path):
    saved(tmp_path, "causal")
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="do not belong together"):
        load_network(tmp_path)


def test_weights_that_are_not_finite(tmp_path):
    model = tiny("causal")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match="hold NaN or infinity in transformer.h.0.mlp.c_fc.weight"):
        load_network(saved(tmp_path, "causal", model))
