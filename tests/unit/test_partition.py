"""A network in two: the upper part is the network's own, and gives what the whole network gives, in every mode."""

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

BELOW = ["stem", "layer1", "layer2"]


def load(network: nn.Module) -> Backbone:
    return backbones.load(network, transform=small_transform)


@pytest.fixture
def ladder() -> Backbone:
    return load(Ladder())


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def value_at(made: Partition, loaded: Backbone, pictures: Tensor) -> Tensor:
    both = replace(loaded, outputs=resolve_outputs(loaded.network, [made.output], loaded.transform))
    with torch.no_grad():
        return both.embed(pictures)[made.output]


def all_but(loaded: Backbone, *trained: str) -> list[str]:
    return [name for name, _ in loaded.network.named_parameters() if not is_within(name, trained)]


def test_above_of_below_is_the_whole_network_bit_for_bit(ladder):
    made = partition_network(ladder, BELOW)
    assert made.output == "layer2:none"
    assert torch.equal(made.upper(value_at(made, ladder, images())), ladder.network(images()))


def test_the_upper_part_has_the_networks_own_parameters_and_statistics(ladder):
    made = partition_network(ladder, BELOW)
    own, above = dict(ladder.network.named_parameters()), dict(made.upper.network.named_parameters())
    assert set(above) == {name for name in own if name.startswith("layer3")}
    assert all(above[name] is own[name] for name in above)
    assert made.upper.network.layer3 is ladder.network.layer3
    assert set(made.lower_modules) >= {"stem", "layer1", "layer2", "layer2.1.conv"}


def test_a_step_in_training_mode_is_that_of_the_whole_network():
    """Same loss, gradients and running statistics, with dropout and batch norms on above the cut and off below it."""
    found = {}
    for way in ("whole", "cut"):
        loaded = load(Ladder())
        made = partition_network(loaded, BELOW)
        value = value_at(made, loaded, images())
        loaded.network.layer3.requires_grad_(True)
        loaded.network.layer3.train()
        torch.manual_seed(5)
        answer = made.upper(value) if way == "cut" else loaded.network(images())
        loss = answer.square().sum()
        loss.backward()
        gradients = [p.grad for p in loaded.network.parameters() if p.grad is not None]
        found[way] = [loss.detach(), *gradients, *(b.clone() for b in loaded.network.buffers())]
    assert len(found["cut"]) > 12
    for one, other in zip(found["whole"], found["cut"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_inside_a_residual_block_the_boundary_moves_down_to_before_it(ladder):
    made = partition_network(ladder, all_but(ladder, "layer2.1.norm", "layer3"))
    assert made.output == "layer2.0:none"
    assert "'layer2.1.norm' is trained" in made.reason
    assert "'layer2.0'" in made.reason
    assert torch.equal(made.upper(value_at(made, ladder, images())), ladder.network(images()))


def test_where_the_first_layer_trains_there_is_nothing_to_cut(ladder):
    with pytest.raises(ConfigError, match="'stem' is trained, and no module finishes before it"):
        partition_network(ladder, all_but(ladder, "stem.bias"))


def test_with_nothing_that_trains_the_value_is_the_embedding(ladder):
    made = partition_network(ladder, all_but(ladder))
    assert made.output == "pooled"
    assert torch.equal(made.upper(images()), images())


class Two(nn.Module):
    """Two branches from the picture on."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.left(x) + self.right(x)).relu().mean((2, 3)))


def test_where_two_values_cross_it_says_so():
    with pytest.raises(ConfigError, match="'last' is trained, and depends on more than one earlier value"):
        partition_network(load(Two()), ["left", "right"])


class Written(nn.Module):
    """With one activation for all layers, that works in place, and a size that one layer asks another for."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 5, 3)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.one(x)).reshape(len(x), self.one.out_channels, 14, 14)
        return self.three(self.activation(self.two(x))).mean((2, 3))


def test_what_runs_below_and_above_is_kept_and_may_work_in_place():
    loaded = load(Written())
    made = partition_network(loaded, ["one", "two"])
    assert made.output == "two:none"
    assert torch.equal(made.upper(value_at(made, loaded, images())), loaded.network(images()))


class Flat(nn.Module):
    """Channels last, as transformers of windows have them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix, self.last = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.patches(x).permute(0, 2, 3, 1))).mean((1, 2))


def test_a_map_with_its_channels_last_comes_back_as_it_was():
    loaded = load(Flat())
    made = partition_network(loaded, ["patches", "mix"])
    value = value_at(made, loaded, images())
    assert value.shape == (5, 6, 4, 4)
    torch.testing.assert_close(made.upper(value), loaded.network(images()))


def test_modes_are_the_networks_own_whichever_is_told(ladder):
    made = partition_network(ladder, all_but(ladder, "layer3.1"))
    assert made.upper.network.layer3 is not ladder.network.layer3  # has children on both sides
    made.upper.train()
    assert ladder.network.training
    assert ladder.network.layer3[1].drop.training
    ladder.network.eval()
    made.upper(value_at(made, ladder, images()))
    assert not made.upper.network.training
    assert not made.upper.network.layer3.training


def test_cutting_leaves_the_network_as_it_was(ladder):
    before = {name: value.clone() for name, value in ladder.network.state_dict().items()}
    drawn = torch.get_rng_state()
    partition_network(ladder, BELOW)
    assert all(torch.equal(value, before[name]) for name, value in ladder.network.state_dict().items())
    assert not any(module.training for module in ladder.network.modules())
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_images(ladder, count):
    made = partition_network(ladder, BELOW)
    pictures = images(count)
    torch.testing.assert_close(made.upper(value_at(made, ladder, pictures)), ladder.network(pictures))


def test_runs_are_in_order_and_leave_no_hooks(ladder):
    found = trace_modules(ladder.network, (16, 16))
    names = [run.name for run in found.values()]
    assert names[:3] == ["", "stem", "layer1"]
    assert names.index("layer2.1.conv") < names.index("layer3")
    assert found[ladder.network.layer2].output.for_batch(3) == (3, 16, 8, 8)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ladder.network.modules())


def test_stages_of_a_ladder_and_names_within_them(ladder):
    found = find_stages(ladder.network, (16, 16))
    assert [stage.name for stage in found] == ["stem", "layer1", "layer2", "layer3"]
    assert "layer2.0.conv.weight" in found[2]
    assert "layer2" not in found[1]


class Tower(nn.Module):
    """Of one resolution, with a token of its own."""

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


def test_a_tower_of_blocks_has_a_stage_for_each():
    found = find_stages(Tower(), (16, 16))
    assert [stage.name for stage in found] == ["stem", "blocks.0", "blocks.1", "blocks.2"]
    assert found[0].modules == ("token", "patches")
    assert "norm.weight" in found[-1]
