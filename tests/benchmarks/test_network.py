"""The benchmark of the network alone: its arithmetic, its rows, and every way to compile."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_config
from torch import Tensor, nn

from b2diffurl.models.stable_diffusion import StableDiffusion
from benchmarks import network, stage, stage_report


class LowRank(nn.Module):
    """A frozen layer with a low-rank path, as peft's, of 5 -> 2 -> 7 beside 5 -> 7."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(5, 7, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_flops_of_a_layer_with_a_lora():
    """By hand, 3 rows: forward 3 products; backward the gradients of `up`, of its input and of `down`, none of `base`."""
    layer, x = LowRank(), torch.ones(3, 5)
    forward = 2 * 3 * (5 * 7 + 5 * 2 + 2 * 7)
    backward = 2 * 3 * (2 * 7 + 2 * 7 + 5 * 2)
    assert stage.count_flops(layer, lambda: layer(x)) == (forward, forward + backward)


def test_flops_of_a_unet(models):
    """Twice the rows, twice the FLOPs but for embedding the one timestep; a backward costs about as much as a forward."""
    config = json.loads((models / "sd" / "unet" / "config.json").read_text())
    one, two = stage.unet_flops(config, 1, 77, 4), stage.unet_flops(config, 2, 77, 4)
    assert two[0] == 2 * one[0]
    assert two[1] == 2 * one[1]
    assert 1.7 < one[1] / one[0] < 2.5


def test_the_network_alone(overrides, monkeypatch):
    """A row for each kind at the settings' sizes, and at a quarter of them; FLOPs as by the other way to count."""
    config = make_config(overrides | {"sample.micro_batch_size": 4, "train.micro_batch_size": 2})
    monkeypatch.setattr(StableDiffusion, "compiled", StableDiffusion.compiled)  # what it was before it is measured
    compiled = []
    monkeypatch.setattr(StableDiffusion, "compile", lambda self: compiled.append(self.compiled))
    rows = [row for way in ("no", "whole", "transformers") for row in network.measure_network(config, way)]
    assert [(row["compiled"], row["kind"], row["at_once"]) for row in rows] == [
        *(("no", "evaluation", size) for size in (1, 4)),
        *(("no", "transition", size) for size in (1, 2)),
        *((way, *kind) for way in ("whole", "transformers") for kind in (("evaluation", 4), ("transition", 2))),
    ]
    assert compiled == [("UNet2DConditionModel",), ("ResnetBlock2D", "Transformer2DModel")]
    unet = json.loads(Path(overrides["pretrained.model"], "unet", "config.json").read_text())
    # In these narrow layers the LoRA is added to the weights, which is less work than the two products of peft.
    for row, by_peft in zip(rows[::2], stage.unet_flops(unet, 2, 77, config.train.lora_rank), strict=False):
        assert 0.9 * by_peft < row["flops"] < by_peft
    machine = {"matmul_tflops": 1.0, "evaluation_flops": 10**9, "transition_flops": 3 * 10**9}
    facts = {"command": "COMMAND", "date": "", "hardware": "", "versions": "", "precision": "float32", "machine": machine}
    page = stage_report.network_markdown(facts | {"rows": [row | {"seconds": 0.5} for row in rows]})
    assert "| evaluations | 4 | no | 500 | 0.00800 (0.8 %) |" in page
    assert "| transitions | 2 | whole | 500 | 0.0120 (1.2 %) |" in page


@pytest.mark.slow
@pytest.mark.parametrize("way", ["blocks", "transformers", "whole"])
def test_the_network_is_compiled_in_every_way(overrides, monkeypatch, way):
    """For real, on the tiny model."""
    monkeypatch.setattr(StableDiffusion, "compiled", StableDiffusion.compiled)  # what it was before it is measured
    torch._dynamo.reset()
    rows = network.measure_network(make_config(overrides), way)
    assert [row["kind"] for row in rows] == ["evaluation", "transition"]
    assert all(row["first_seconds"] > 3 * row["seconds"] for row in rows)  # compiling, or reading back
