"""The training loop: what is trained, schedules, steps, resuming, and failures."""

from __future__ import annotations

import copy
import math
import signal
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featpipe import backbones
from featpipe.config import FineTuneConfig
from featpipe.errors import ConfigError, ModelError
from featpipe.finetuning import checkpoint
from featpipe.finetuning.augmentation import apply_mixup_cutmix
from featpipe.finetuning.loop import compute_gradients, predict_scores, run_training_loop
from featpipe.finetuning.lr_finder import find_learning_rate
from featpipe.finetuning.optim import make_parameter_groups, schedule_factor
from featpipe.finetuning.train import choose_memory_format
from featpipe.finetuning.trainer import EpochRecord, TrainingTargets
from featpipe.finetuning.unfreeze import select_unfrozen
from tests.support.finetuning import (
    LADDER_WIDTH,
    N_ROWS,
    RUN_CONFIG,
    InterruptingDataset,
    Ladder,
    TensorDataset,
    assert_tensors_equal,
    copy_weights,
    init_state,
    make_trainer,
    small_transform,
)
from tests.support.logs import logged_warning

STAGES_BY_TERM = {
    "head": set(),
    "last": {"layer3"},
    "2": {"layer2", "layer3"},
    "2 stages": {"layer2", "layer3"},
    "0.5": {"layer2", "layer3"},
    "all": {"stem", "layer1", "layer2", "layer3"},
    "layers[7:10]": {"layer2"},
    "layers[-1:]": {"layer3"},
    "layers[0]": {"stem"},
    "layer1": {"layer1"},
    "layer[12]*": {"layer1", "layer2"},
    "stem, last": {"stem", "layer3"},
}


@pytest.mark.parametrize("term", STAGES_BY_TERM)
def test_unfreeze_selects_stages_layers_and_names(term):
    unfrozen = select_unfrozen(backbones.load(Ladder(), transform=small_transform), term)
    assert {name.split(".")[0] for name in unfrozen.names} == STAGES_BY_TERM[term]


def test_unfreeze_selects_stages_of_a_registered_network():
    network = backbones.load("resnet18", weights="none")
    assert {name.split(".")[0] for name in select_unfrozen(network, "last").names} == {"layer4"}
    assert {name.split(".")[0] for name in select_unfrozen(network, "layers[15:]").names} >= {"layer3", "layer4"}
    assert len(select_unfrozen(network, "all").names) == 60


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("lyer3", "unknown part of the network 'lyer3'; did you mean 'layer3'"),
        ("9 stages", r"has [0-9] stages \(.*layer3\)"),
        ("layers[99:]", "19 layers with weights"),
        ("layers[a]", "is not a slice"),
        ("layer3.1.drop", "selects no weights"),
        ("", "unknown part of the network"),
    ],
)
def test_an_unfreeze_term_that_selects_nothing_is_an_error_with_the_alternatives(term, message):
    with pytest.raises(ConfigError, match=message):
        select_unfrozen(backbones.load(Ladder(), transform=small_transform), term)


def test_weights_that_the_output_does_not_depend_on_are_not_trained():
    backbone = backbones.load(Ladder(), transform=small_transform, outputs=["layer2:avg"])
    assert {name.split(".")[0] for name in select_unfrozen(backbone, "last").names} == {"layer2"}
    with pytest.raises(ConfigError, match="output 'layer2:avg' depends on none of these weights"):
        select_unfrozen(backbone, "layer3")


def test_frozen_weights_are_unchanged_and_have_no_gradient_or_optimizer_state():
    trainer = make_trainer(unfreeze="last")
    initial_weights, state = copy_weights(trainer), init_state(trainer)
    run_training_loop(trainer, state)
    final_weights = copy_weights(trainer)
    changed = {name for name in initial_weights if not torch.equal(initial_weights[name], final_weights[name])}
    trained = {f"b.{name}" for name in trainer.unfrozen.names}
    assert changed == trained | set(trainer.head.state_dict())
    frozen = [p for name, p in trainer.network.named_parameters() if name not in trainer.unfrozen.names]
    assert all(p.grad is None and not p.requires_grad and p not in state.optimizer.state for p in frozen)


def test_batch_norms_follow_the_batches_only_if_trained_and_unfrozen():
    statistics = {}
    for batch_norm in ("frozen", "trained"):
        trainer = make_trainer(unfreeze="last", batch_norm=batch_norm)
        initial_weights = copy_weights(trainer)
        run_training_loop(trainer, init_state(trainer))
        final_weights = copy_weights(trainer)
        statistics[batch_norm] = {
            n for n in initial_weights if "running" in n and not torch.equal(initial_weights[n], final_weights[n])
        }
    assert statistics["frozen"] == set()
    assert statistics["trained"] == {
        f"b.layer3.{n}.norm.running_{statistic}" for n in (0, 1) for statistic in ("mean", "var")
    }


def test_gradual_unfreezes_one_stage_after_the_other():
    trainer = make_trainer(gradual=1, epochs=4)
    active_stages = [{name.split(".")[0] for name in trainer.unfrozen.active_names(epoch, 1)} for epoch in range(5)]
    stages = [
        {name.split(".")[0] for name in trainer.unfrozen.names if trainer.unfrozen.depth[name] == d} for d in (1, 2, 3)
    ]
    assert active_stages[0] == set()
    assert active_stages[1] == stages[0] == {"layer3"}
    assert active_stages[2] == stages[0] | stages[1]
    assert active_stages[4] == {"stem", "layer1", "layer2", "layer3"}
    slow_trainer = make_trainer(gradual=8, epochs=8, monitor="loss", learning_rate=0.1, schedule="constant", warmup=0)
    initial_weights = copy_weights(slow_trainer)
    run_training_loop(slow_trainer, init_state(slow_trainer))
    final_weights = copy_weights(slow_trainer)
    assert {name for name in initial_weights if not torch.equal(initial_weights[name], final_weights[name])} == {
        "0.weight",
        "0.bias",
    }


def test_rates_fall_geometrically_with_depth_and_norms_and_biases_have_no_weight_decay():
    trainer = make_trainer(layer_decay=0.5, weight_decay=0.3)
    depths = {f"backbone.{name}": depth for name, depth in trainer.unfrozen.depth.items()}
    groups = make_parameter_groups(trainer.trained_parameters(), depths, trainer.tuning)
    assert sum(len(group["params"]) for group in groups) == len(trainer.trained_parameters())
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert group["share"] == 0.5 ** depths.get(name, 0)
            is_norm_or_bias = name.endswith("bias") or ".norm." in name
            assert is_norm_or_bias == (parameter.ndim == 1)
            assert group["weight_decay"] == (0.0 if is_norm_or_bias else 0.3)


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "constant"])
def test_schedules_warm_up_to_one_and_decay(schedule):
    tuning = FineTuneConfig(schedule=schedule, warmup=0.25)
    result = [schedule_factor(step, 100, tuning) for step in range(100)]
    assert max(result) == pytest.approx(1.0)
    assert np.argmax(result) in (24, 25)
    assert all(a < b for a, b in pairwise(result[:25]))
    assert (result[-1] < 0.01) == (schedule != "constant")


def test_one_cycle_equals_that_of_torch():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    torch_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=100, cycle_momentum=False)
    tuning, factors, expected = FineTuneConfig(schedule="one-cycle", warmup=0.3), [], []
    for step in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        factors.append(schedule_factor(step, 100, tuning))
        optimizer.step()
        if step < 99:
            torch_schedule.step()
    assert np.abs(np.array(factors) - expected).max() < 0.06  # the schedule of torch peaks one step earlier
    assert factors[29] == pytest.approx(expected[29], abs=1e-6)


def test_the_learning_rate_finder_restores_the_network():
    trainer = make_trainer(epochs=1)
    initial_weights = copy_weights(trainer)
    rate = find_learning_rate(trainer)
    assert 1e-5 < rate < 1
    assert_tensors_equal(initial_weights, copy_weights(trainer))


def test_a_step_equals_that_of_an_explicit_loop():
    trainer = make_trainer(
        unfreeze="all", optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=0.0, layer_decay=1.0, epochs=1
    )
    trainer = replace(trainer, tuning=replace(trainer.tuning, batch=32, schedule="constant", warmup=0.0))
    network, head = copy.deepcopy(trainer.network).eval(), copy.deepcopy(trainer.head)
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    for module in trainer.network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    network.requires_grad_(True)
    (rows,) = trainer.epoch_batches(0)
    scores = head(network(trainer.train_data.batch(rows, 0)))
    nn.functional.cross_entropy(scores, trainer.targets.Y[torch.from_numpy(rows)]).backward()
    expected = {f"b.{n}": p.detach() - 1e-2 * p.grad for n, p in network.named_parameters()}
    expected |= {n: p.detach() - 1e-2 * p.grad for n, p in head.named_parameters()}
    state = init_state(trainer)
    run_training_loop(trainer, state)
    result = {**{name: value for name, value in copy_weights(trainer).items() if name in expected}}
    if state.best_epoch.number == 1:
        assert_tensors_equal(result, expected, atol=1e-6, rtol=1e-5)
    else:
        pytest.fail("the step increased the loss")


@pytest.mark.parametrize("pieces", [2, 3, 8])
def test_gradients_of_pieces_add_up_to_those_of_the_batch(pieces):
    result = []
    for accumulate in (1, pieces):
        trainer = make_trainer(accumulate=accumulate)
        state, (rows, *_) = init_state(trainer), trainer.epoch_batches(0)
        trainer.unfreeze_for_epoch(0)
        loss, _ = compute_gradients(trainer, state, rows, trainer.train_data.batch(rows, 0), len(rows))
        result.append((loss, {name: p.grad.clone() for name, p in trainer.trained_parameters().items()}))
    assert result[0][0] == pytest.approx(result[1][0], rel=1e-5)
    assert_tensors_equal(result[0][1], result[1][1], atol=1e-6, rtol=1e-4)


def test_batches_have_almost_equal_sizes_and_contain_each_row_once():
    trainer = replace(make_trainer(), train_rows=np.arange(33))
    assert [len(rows) for rows in trainer.epoch_batches(0)] == [7, 7, 7, 6, 6]
    assert sorted(np.concatenate(trainer.epoch_batches(0)).tolist()) == list(range(33))
    assert trainer.epoch_batches(0)[0].tolist() != trainer.epoch_batches(1)[0].tolist()
    assert trainer.epoch_batches(1)[0].tolist() == trainer.epoch_batches(1)[0].tolist()


def test_balanced_sampling_draws_each_class_equally_often():
    trainer = make_trainer(sampling="balanced")
    Y = torch.zeros(N_ROWS, dtype=torch.int64)
    Y[:4] = 1
    trainer = replace(trainer, targets=TrainingTargets(Y, torch.ones(N_ROWS)))
    drawn_rows = np.concatenate([rows for epoch in range(20) for rows in trainer.epoch_batches(epoch)])
    assert abs(np.mean(Y.numpy()[drawn_rows] == 1) - 0.5) < 0.06


@pytest.mark.parametrize("settings", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_mixup_and_cutmix_mix_images_by_the_reported_share(settings):
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 16, 16)
    torch.manual_seed(3)
    for _ in range(10):
        result, mix = apply_mixup_cutmix(images, FineTuneConfig(**settings))
        expected = mix.lam * torch.arange(6.0) + (1 - mix.lam) * torch.from_numpy(mix.partner).float()
        torch.testing.assert_close(result.mean((1, 2, 3)), expected)


def test_the_moving_average_is_evaluated_and_returned():
    trainer = make_trainer(ema=0.9, epochs=2)
    state = init_state(trainer)
    run_training_loop(trainer, state)
    assert state.ema_weights.keys() == trainer.trained_tensors().keys()
    if state.best_epoch.number == 2:
        assert_tensors_equal(dict(trainer.trained_tensors()), state.ema_weights)
    by_hand = nn.functional.cross_entropy(
        predict_scores(trainer, trainer.validation_data, trainer.validation_rows),
        trainer.targets.Y[torch.from_numpy(trainer.validation_rows)],
    )
    assert float(by_hand) == pytest.approx(state.best_epoch.validation_loss, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights_about_as_well(precision):
    result = {}
    for name in ("fp32", precision):
        trainer = make_trainer(precision=name, epochs=3, learning_rate=3e-3)
        state = run_training_loop(trainer, init_state(trainer))
        result[name] = [epoch.validation_loss for epoch in state.curve]
        assert all(parameter.dtype == torch.float32 for parameter in trainer.trained_parameters().values())
    assert result[precision][-1] < result[precision][0]
    np.testing.assert_allclose(result[precision], result["fp32"], rtol=0.15)


def test_early_stopping_restores_the_best_weights():
    trainer = make_trainer(epochs=30, patience=2, learning_rate=0.3)
    state = run_training_loop(trainer, init_state(trainer))
    assert len(state.curve) < 31
    assert state.curve[-1].number - state.best_epoch.number == 2
    assert_tensors_equal(dict(trainer.trained_tensors()), state.best_weights)


def test_the_best_epoch_has_the_lowest_loss_or_the_highest_score():
    curve = [
        EpochRecord(0, 1.0, 0.5, 0.7),
        EpochRecord(1, 1.0, 0.6, 0.9),
        EpochRecord(2, 1.0, 0.55, 0.9),
        EpochRecord(3, 1.0, 0.5, 0.8),
    ]
    for monitor, best in (("loss", 0), ("score", 2)):
        state = init_state(make_trainer(monitor=monitor))
        state.curve = curve
        assert state.best_epoch.number == best


@pytest.mark.parametrize(
    ("layer", "device", "is_safe"),
    [
        (nn.Conv2d(6, 8, 1, stride=2), "cpu", False),
        (nn.Conv2d(16, 8, 1, stride=2), "cpu", True),
        (nn.Conv2d(6, 8, 3, stride=2), "cpu", True),
        (nn.Conv2d(6, 8, 1), "cpu", True),
        (nn.Conv2d(6, 8, 1, stride=2), "cuda", True),
    ],
)
def test_networks_train_in_channels_last_unless_its_backward_pass_is_unsafe(layer, device, is_safe):
    expected = torch.channels_last if is_safe else torch.contiguous_format
    assert choose_memory_format(nn.Sequential(nn.Conv2d(3, 6, 3), layer), torch.device(device)) == expected


def test_no_layer_of_an_unsafe_network_gets_a_channels_last_input():
    """Batches have the channels-last layout of cached feature maps."""
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layouts = []
    for layer in network[:2]:
        layer.register_forward_pre_hook(lambda layer, inputs: layouts.append(inputs[0].is_contiguous()))
    memory_format = choose_memory_format(network, torch.device("cpu"))
    trainer = replace(make_trainer(), memory_format=memory_format)
    batch = torch.randn(5, 3, 16, 16).to(memory_format=torch.channels_last)
    network.to(memory_format=memory_format)(trainer.to_device(batch)).sum().backward()
    assert layouts == [True, True]


RESUMED_SETTINGS = {
    "plain": {},
    "sgd": {"optimizer": "sgd"},
    "ema, batch norms and mixup": {"ema": 0.9, "batch_norm": "trained", "mixup": 0.5},
    "gradual": {"gradual": 1, "unfreeze": "2"},
    "one-cycle, accumulated": {"schedule": "one-cycle", "accumulate": 2},
    "fp16": {"precision": "fp16"},
}


@pytest.mark.parametrize("name", RESUMED_SETTINGS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, name):
    whole_trainer = make_trainer(**RESUMED_SETTINGS[name])
    uninterrupted = run_training_loop(whole_trainer, init_state(whole_trainer))
    for stop_batch in (2, 6, 10):
        path = tmp_path / f"{stop_batch}.checkpoint"
        first = make_trainer(**RESUMED_SETTINGS[name])
        stopped = replace(first, train_data=InterruptingDataset(first.train_data, stop_batch))
        with pytest.raises(KeyboardInterrupt):
            run_training_loop(
                stopped,
                init_state(stopped),
                lambda state, j=stopped, p=path: checkpoint.save_checkpoint(p, j, state, RUN_CONFIG),
            )
        second = make_trainer(**RESUMED_SETTINGS[name])
        state = run_training_loop(second, checkpoint.load_checkpoint(path, second, RUN_CONFIG))
        assert_tensors_equal(copy_weights(second), copy_weights(whole_trainer))
        assert [e.to_dict() for e in state.curve] == [e.to_dict() for e in uninterrupted.curve]


def test_sigterm_saves_the_state(tmp_path):
    trainer = make_trainer()
    trainer = replace(trainer, train_data=InterruptingDataset(trainer.train_data, 3, signal.SIGTERM))
    previous_handler = signal.getsignal(signal.SIGTERM)
    saved = []
    with pytest.raises(KeyboardInterrupt):
        run_training_loop(trainer, init_state(trainer), lambda state: saved.append(state.step))
    assert saved
    assert signal.getsignal(signal.SIGTERM) is previous_handler


def test_resuming_with_another_setting_is_an_error_that_lists_the_differences(tmp_path):
    trainer = make_trainer()
    checkpoint.save_checkpoint(tmp_path / "c", trainer, init_state(trainer), RUN_CONFIG)
    other_config = {"settings": {"epochs": 3, "learning_rate": 0.02}}
    with pytest.raises(ConfigError, match=r"settings.learning_rate is 0.01, asked for 0.02.*--restart"):
        checkpoint.load_checkpoint(tmp_path / "c", trainer, other_config)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    trainer = make_trainer()
    path = tmp_path / "c"
    checkpoint.save_checkpoint(path, trainer, init_state(trainer), RUN_CONFIG)
    data = path.read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError, match="is damaged or not a checkpoint"):
            checkpoint.load_checkpoint(path, trainer, RUN_CONFIG)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    trainer = make_trainer()
    checkpoint.save_checkpoint(tmp_path / "c", trainer, init_state(trainer), RUN_CONFIG)
    with pytest.raises(ModelError, match="does not fit the network"):
        checkpoint.load_checkpoint(tmp_path / "c", make_trainer(WiderLadder(), unfreeze="all"), RUN_CONFIG)


class WiderLadder(Ladder):
    def __init__(self) -> None:
        super().__init__()
        self.layer4 = nn.Sequential(nn.Conv2d(LADDER_WIDTH, LADDER_WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x))))).mean((2, 3))


class NanDataset(TensorDataset):
    """One image becomes NaN in the second epoch."""

    def batch(self, rows, epoch: int) -> Tensor:
        result = super().batch(rows, epoch)
        if epoch == 1:
            result[rows == 5] = math.nan
        return result


def test_a_nan_loss_stops_restores_the_best_weights_and_names_the_batch(log):
    trainer = make_trainer(learning_rate=1e-3)
    trainer = replace(trainer, train_data=NanDataset(trainer.train_data.network, trainer.train_data.images))
    state = run_training_loop(trainer, init_state(trainer))
    (warning,) = (text for text in log if "the loss is" in text)
    assert "epoch 2" in warning
    assert "the loss is nan in the batch of" in warning
    assert "image 5" in warning
    assert [epoch.number for epoch in state.curve] == [0, 1]
    assert all(value.isfinite().all() for value in copy_weights(trainer).values())
    assert_tensors_equal(dict(trainer.trained_tensors()), state.best_weights)


class MemoryLimited(nn.Module):
    """A network that runs out of memory with more than ``max_images`` images."""

    def __init__(self, network: nn.Module, max_images: int) -> None:
        super().__init__()
        self.network, self.max_images = network, max_images

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.max_images:
            raise torch.OutOfMemoryError("tried to allocate more than available")
        return self.network(x)


@pytest.mark.parametrize("max_images", [3, 1])
def test_out_of_memory_divides_batches_into_pieces_with_the_same_result(max_images):
    unlimited = make_trainer(epochs=1)
    limited = make_trainer(epochs=1)
    dataset = TensorDataset(MemoryLimited(limited.train_data.network, max_images), limited.train_data.images)
    limited = replace(limited, train_data=dataset)
    state = init_state(limited)
    for trainer in (unlimited, limited):
        for module in trainer.network.modules():
            if isinstance(module, nn.Dropout2d):
                module.p = 0.0
    run_training_loop(unlimited, init_state(unlimited))
    with logged_warning("with the same gradients"):
        run_training_loop(limited, state)
    assert state.pieces == {3: 4, 1: 8}[max_images]
    assert_tensors_equal(copy_weights(unlimited), copy_weights(limited), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("batch_norm", "count_text"), [("frozen", "one image"), ("trained", "two images")])
def test_out_of_memory_with_the_smallest_batch_is_an_error(batch_norm, count_text, log):
    trainer = make_trainer(batch_norm=batch_norm)
    dataset = TensorDataset(MemoryLimited(trainer.train_data.network, 0), trainer.train_data.images)
    trainer = replace(trainer, train_data=dataset, validation_data=trainer.train_data)
    with pytest.raises(ConfigError, match=f"not enough memory to train on {count_text} at a time"):
        run_training_loop(trainer, init_state(trainer))
    assert any("with the same gradients" in text for text in log) == (batch_norm == "frozen")
