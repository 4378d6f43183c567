"""The upper part of a partitioned network uses the network's own modules and gives the same embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from featpipe import backbones
from featpipe.backbones import Backbone
from featpipe.backbones.outputs import resolve_outputs
from featpipe.backbones.partition import Partition, partition_network
from featpipe.backbones.stages import find_stages, is_within, trace_modules
from featpipe.errors import ConfigError
from tests.support.finetuning import Ladder, small_transform

LOWER_MODULES = ["stem", "layer1", "layer2"]


def load_network(network: nn.Module) -> Backbone:
    return backbones.load(network, transform=small_transform)


@pytest.fixture
def ladder() -> Backbone:
    return load_network(Ladder())


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def compute_cut_value(partition: Partition, backbone: Backbone, batch: Tensor) -> Tensor:
    recording_backbone = replace(
        backbone, outputs=resolve_outputs(backbone.network, [partition.output], backbone.transform)
    )
    with torch.no_grad():
        return recording_backbone.embed(batch)[partition.output]


def list_frozen(backbone: Backbone, *trained: str) -> list[str]:
    return [name for name, _ in backbone.network.named_parameters() if not is_within(name, trained)]


def test_the_two_parts_give_the_embeddings_of_the_whole_network_bit_for_bit(ladder):
    partition = partition_network(ladder, LOWER_MODULES)
    assert partition.output == "layer2:none"
    assert torch.equal(partition.upper(compute_cut_value(partition, ladder, images())), ladder.network(images()))


def test_the_upper_part_has_the_networks_own_parameters_and_statistics(ladder):
    partition = partition_network(ladder, LOWER_MODULES)
    own_parameters, upper_parameters = (
        dict(ladder.network.named_parameters()),
        dict(partition.upper.network.named_parameters()),
    )
    assert set(upper_parameters) == {name for name in own_parameters if name.startswith("layer3")}
    assert all(upper_parameters[name] is own_parameters[name] for name in upper_parameters)
    assert partition.upper.network.layer3 is ladder.network.layer3
    assert set(partition.lower_modules) >= {"stem", "layer1", "layer2", "layer2.1.conv"}


def test_a_training_step_of_the_upper_part_equals_that_of_the_whole_network():
    """Same loss, gradients and running statistics, with dropout and batch norms on above the cut and off below it."""
    results = {}
    for part in ("whole", "upper"):
        backbone = load_network(Ladder())
        partition = partition_network(backbone, LOWER_MODULES)
        value = compute_cut_value(partition, backbone, images())
        backbone.network.layer3.requires_grad_(True)
        backbone.network.layer3.train()
        torch.manual_seed(5)
        embeddings = partition.upper(value) if part == "upper" else backbone.network(images())
        loss = embeddings.square().sum()
        loss.backward()
        gradients = [p.grad for p in backbone.network.parameters() if p.grad is not None]
        results[part] = [loss.detach(), *gradients, *(b.clone() for b in backbone.network.buffers())]
    assert len(results["upper"]) > 12
    for expected, actual in zip(results["whole"], results["upper"], strict=True):
        torch.testing.assert_close(expected, actual, rtol=1e-6, atol=1e-7)


def test_a_cut_inside_a_residual_block_moves_before_the_block(ladder):
    partition = partition_network(ladder, list_frozen(ladder, "layer2.1.norm", "layer3"))
    assert partition.output == "layer2.0:none"
    assert "'layer2.1.norm' is trained" in partition.reason
    assert "'layer2.0'" in partition.reason
    assert torch.equal(partition.upper(compute_cut_value(partition, ladder, images())), ladder.network(images()))


def test_a_network_whose_first_layer_trains_cannot_be_cut(ladder):
    with pytest.raises(ConfigError, match="'stem' is trained, and no module finishes before it"):
        partition_network(ladder, list_frozen(ladder, "stem.bias"))


def test_without_trained_parameters_the_cut_value_is_the_embedding(ladder):
    partition = partition_network(ladder, list_frozen(ladder))
    assert partition.output == "pooled"
    assert torch.equal(partition.upper(images()), images())


class TwoBranches(nn.Module):
    """Two branches that start at the image."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.left(x) + self.right(x)).relu().mean((2, 3)))


def test_a_cut_that_two_values_cross_is_refused():
    with pytest.raises(ConfigError, match="'last' is trained, and depends on more than one earlier value"):
        partition_network(load_network(TwoBranches()), ["left", "right"])


class InPlace(nn.Module):
    """All layers share one in-place activation, and one layer reads an attribute of another."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 5, 3)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.one(x)).reshape(len(x), self.one.out_channels, 14, 14)
        return self.three(self.activation(self.two(x))).mean((2, 3))


def test_modules_used_on_both_sides_may_work_in_place():
    backbone = load_network(InPlace())
    partition = partition_network(backbone, ["one", "two"])
    assert partition.output == "two:none"
    assert torch.equal(partition.upper(compute_cut_value(partition, backbone, images())), backbone.network(images()))


class ChannelsLast(nn.Module):
    """Has channels-last feature maps, like window transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix, self.last = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.patches(x).permute(0, 2, 3, 1))).mean((1, 2))


def test_a_channels_last_cut_value_is_restored():
    backbone = load_network(ChannelsLast())
    partition = partition_network(backbone, ["patches", "mix"])
    value = compute_cut_value(partition, backbone, images())
    assert value.shape == (5, 6, 4, 4)
    torch.testing.assert_close(partition.upper(value), backbone.network(images()))


def test_the_training_mode_is_shared_with_the_network(ladder):
    partition = partition_network(ladder, list_frozen(ladder, "layer3.1"))
    assert partition.upper.network.layer3 is not ladder.network.layer3  # has children on both sides
    partition.upper.train()
    assert ladder.network.training
    assert ladder.network.layer3[1].drop.training
    ladder.network.eval()
    partition.upper(compute_cut_value(partition, ladder, images()))
    assert not partition.upper.network.training
    assert not partition.upper.network.layer3.training


def test_partitioning_does_not_change_the_network(ladder):
    before = {name: value.clone() for name, value in ladder.network.state_dict().items()}
    rng_state = torch.get_rng_state()
    partition_network(ladder, LOWER_MODULES)
    assert all(torch.equal(value, before[name]) for name, value in ladder.network.state_dict().items())
    assert not any(module.training for module in ladder.network.modules())
    assert torch.equal(torch.get_rng_state(), rng_state)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_upper_part_takes_any_number_of_images(ladder, count):
    partition = partition_network(ladder, LOWER_MODULES)
    batch = images(count)
    torch.testing.assert_close(partition.upper(compute_cut_value(partition, ladder, batch)), ladder.network(batch))


def test_module_calls_are_traced_in_order_without_leaving_hooks(ladder):
    calls = trace_modules(ladder.network, (16, 16))
    names = [call.name for call in calls.values()]
    assert names[:3] == ["", "stem", "layer1"]
    assert names.index("layer2.1.conv") < names.index("layer3")
    assert calls[ladder.network.layer2].output.for_batch(3) == (3, 16, 8, 8)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ladder.network.modules())


def test_a_stage_contains_the_names_of_its_parameters(ladder):
    stages = find_stages(ladder.network, (16, 16))
    assert [stage.name for stage in stages] == ["stem", "layer1", "layer2", "layer3"]
    assert "layer2.0.conv.weight" in stages[2]
    assert "layer2" not in stages[1]


class Transformer(nn.Module):
    """A transformer with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        make: Callable[[], nn.Module] = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # noqa: E731
        self.blocks = nn.ModuleList(make() for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


def test_each_block_of_constant_resolution_is_a_stage():
    stages = find_stages(Transformer(), (16, 16))
    assert [stage.name for stage in stages] == ["stem", "blocks.0", "blocks.1", "blocks.2"]
    assert stages[0].modules == ("token", "patches")
    assert "norm.weight" in stages[-1]
