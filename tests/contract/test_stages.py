"""Every network has the stages of the literature and can be cut between them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from featpipe.backbones import Backbone, load
from featpipe.backbones.outputs import resolve_outputs
from featpipe.backbones.partition import partition_network
from featpipe.backbones.stages import Stage, find_stages

pytestmark = pytest.mark.thorough

STAGES = {  # as in the papers and libraries; their number where these give no names
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
class StagesCase:
    backbone: Backbone
    stages: tuple[Stage, ...]
    expected: list[str] | int


@pytest.fixture(scope="module", params=STAGES)
def case(request):
    backbone = load(request.param, weights="none")
    return StagesCase(backbone, find_stages(backbone.network, backbone.transform.size), STAGES[request.param])


def test_the_stages_are_those_of_the_literature(case):
    names = [stage.name for stage in case.stages]
    assert (len(names) if isinstance(case.expected, int) else names) == case.expected


def test_every_parameter_belongs_to_exactly_one_stage(case):
    for name, _ in case.backbone.network.named_parameters():
        assert sum(name in stage for stage in case.stages) == 1, name


def test_a_network_cut_before_the_last_stage_gives_bit_identical_embeddings(case):
    backbone, last_stage = case.backbone, case.stages[-1]
    partition = partition_network(backbone, [module for stage in case.stages[:-1] for module in stage.modules])
    recording_backbone = replace(
        backbone,
        outputs=(*backbone.outputs, *resolve_outputs(backbone.network, [partition.output], backbone.transform)),
    )
    with torch.no_grad():
        values = recording_backbone.embed(
            torch.rand(2, 3, *backbone.transform.size, generator=torch.Generator().manual_seed(1))
        )
    assert torch.equal(partition.upper(values[partition.output].clone()), values["pooled"])
    trained = {name for name, _ in backbone.network.named_parameters() if name in last_stage}
    assert trained <= {name for name, _ in partition.upper.network.named_parameters()}
