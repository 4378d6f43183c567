"""What every network promises of its stages and of being cut between them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from featpipe.backbones import Backbone, load
from featpipe.backbones.outputs import resolve_outputs
from featpipe.backbones.partition import partition_network
from featpipe.backbones.stages import Stage, find_stages

pytestmark = pytest.mark.thorough

STAGES = {  # as the papers and the libraries divide them; where these give them no names, how many
    "resnet18": ["stem", "layer1", "layer2", "layer3", "layer4"],
    "efficientnet_lite0": ["stem", *(f"blocks.{n}" for n in range(7))],
    "efficientnet_b0": ["stem", *(f"features.{n}" for n in range(1, 8))],
    "convnext_tiny": ["stem", "features.1", "features.3", "features.5", "features.7"],
    "swin_t": ["stem", "features.1", "features.3", "features.5", "features.7"],
    "densenet121": ["stem", *(f"features.denseblock{n}" for n in range(1, 5))],
    "regnet_y_400mf": ["stem", *(f"trunk_output.block{n}" for n in range(1, 5))],
    "shufflenet_v2_x0_5": ["stem", "stage2", "stage3", "stage4"],
    "mnasnet0_5": ["stem", *(f"layers.{n}" for n in range(8, 14))],
    "mobilenet_v2": 6,
    "mobilenet_v3_small": 5,
    "vgg11": 5,
    "alexnet": 3,
    "googlenet": 4,
    "squeezenet1_1": 4,
    "timm/vit_tiny_patch16_224": ["stem", *(f"blocks.{n}" for n in range(12))],
    "timm/convnext_atto": ["stem", *(f"stages.{n}" for n in range(4))],
    "timm/mobilenetv4_conv_small": ["stem", *(f"blocks.{n}" for n in range(4))],
}


@dataclass
class Case:
    backbone: Backbone
    stages: tuple[Stage, ...]
    expected: list[str] | int


@pytest.fixture(scope="module", params=STAGES)
def case(request):
    loaded = load(request.param, weights="none")
    return Case(loaded, find_stages(loaded.network, loaded.transform.size), STAGES[request.param])


def test_the_stages_are_those_of_the_field(case):
    names = [stage.name for stage in case.stages]
    assert (len(names) if isinstance(case.expected, int) else names) == case.expected


def test_every_parameter_belongs_to_exactly_one(case):
    for name, _ in case.backbone.network.named_parameters():
        assert sum(name in stage for stage in case.stages) == 1, name


def test_cut_before_the_last_stage_it_answers_bit_for_bit(case):
    loaded, last = case.backbone, case.stages[-1]
    made = partition_network(loaded, [module for stage in case.stages[:-1] for module in stage.modules])
    both = replace(loaded, outputs=(*loaded.outputs, *resolve_outputs(loaded.network, [made.output], loaded.transform)))
    with torch.no_grad():
        values = both.embed(torch.rand(2, 3, *loaded.transform.size, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(made.upper(values[made.output].clone()), values["pooled"])
    trained = {name for name, _ in loaded.network.named_parameters() if name in last}
    assert trained <= {name for name, _ in made.upper.network.named_parameters()}
