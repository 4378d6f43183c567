"""The loop trains what it is told to and nothing else, goes on as if it had never stopped, and survives bad luck."""

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
from featpipe.finetuning.batches import EmbeddingNetwork
from featpipe.finetuning.loop import compute_gradients, predict_scores, run_training_loop
from featpipe.finetuning.lr_finder import find_learning_rate
from featpipe.finetuning.optim import make_parameter_groups, schedule_factor
from featpipe.finetuning.trainer import EpochRecord, Trainer, TrainingState, TrainingTargets
from featpipe.finetuning.unfreeze import select_unfrozen
from featpipe.heads.neural.losses import LossFunction
from tests.finetuning import Ladder, small_transform
from tests.support.logs import logged_warning

N, K = 40, 3


class Tensors:
    """Pictures at hand, shifted a little by the epoch."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.network, self.images = network, images

    def batch(self, rows, epoch: int) -> Tensor:
        return self.images[torch.from_numpy(rows)] + 0.01 * epoch


def job_of(network: nn.Module | None = None, **settings) -> Trainer:
    tuning = FineTuneConfig(
        **{"unfreeze": "all", "batch": 8, "epochs": 3, "patience": 0, "learning_rate": 1e-2, **settings}
    )
    whole = backbones.load(network or Ladder(), transform=small_transform)
    chosen = select_unfrozen(whole, tuning.unfreeze)
    trained = copy.deepcopy(whole.network)
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(N) % K
    images = torch.randn(N, 3, 16, 16, generator=generator) + nn.functional.one_hot(y, K)[:, :, None, None]
    source = Tensors(EmbeddingNetwork(trained, whole.outputs[0]), images)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        head = nn.Sequential(nn.Linear(10, K))
    rows = np.arange(N)
    return Trainer(
        network=trained,
        head=head,
        unfrozen=chosen,
        train_data=source,
        validation_data=source,
        train_rows=rows[:32],
        validation_rows=rows[32:],
        targets=TrainingTargets(y, torch.ones(N)),
        loss_function=LossFunction("softmax", "cross_entropy"),
        tuning=tuning,
        sample_ids=[f"image {row}" for row in rows],
    )


def begun(job: Trainer) -> TrainingState:
    return TrainingState.init(job, float(job.tuning.learning_rate))


def weights(job: Trainer) -> dict[str, Tensor]:
    state = {f"b.{name}": value for name, value in job.network.state_dict().items()}
    return {name: value.clone() for name, value in [*state.items(), *job.head.state_dict().items()]}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **{"rtol": 0, "atol": 0, **tolerance}, msg=name)


# -- what is trained ---------------------------------------------------------------------------------------------------

EXPECTED = {
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


@pytest.mark.parametrize("what", EXPECTED)
def test_what_is_trained_is_said_in_the_fields_words(what):
    chosen = select_unfrozen(backbones.load(Ladder(), transform=small_transform), what)
    assert {name.split(".")[0] for name in chosen.names} == EXPECTED[what]


def test_every_stage_of_a_network_of_the_table_can_be_named():
    network = backbones.load("resnet18", weights="none")
    assert {name.split(".")[0] for name in select_unfrozen(network, "last").names} == {"layer4"}
    assert {name.split(".")[0] for name in select_unfrozen(network, "layers[15:]").names} >= {"layer3", "layer4"}
    assert len(select_unfrozen(network, "all").names) == 60


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("lyer3", "unknown part of the network 'lyer3'; did you mean 'layer3'"),
        ("9 stages", r"has [0-9] stages \(.*layer3\)"),
        ("layers[99:]", "19 layers with weights"),
        ("layers[a]", "no slice"),
        ("layer3.1.drop", "nothing is left to train"),
        ("", "unknown part of the network"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(what, words):
    with pytest.raises(ConfigError, match=words):
        select_unfrozen(backbones.load(Ladder(), transform=small_transform), what)


def test_weights_that_the_output_does_not_depend_on_are_not_trained():
    part = backbones.load(Ladder(), transform=small_transform, outputs=["layer2:avg"])
    assert {name.split(".")[0] for name in select_unfrozen(part, "last").names} == {"layer2"}
    with pytest.raises(ConfigError, match="none of its weights has a part in output 'layer2:avg'"):
        select_unfrozen(part, "layer3")


def test_what_is_frozen_keeps_every_bit_and_has_no_gradient_and_no_state():
    job = job_of(unfreeze="last")
    before, state = weights(job), begun(job)
    run_training_loop(job, state)
    after = weights(job)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {f"b.{name}" for name in job.unfrozen.names}
    assert changed == trained | set(job.head.state_dict())
    frozen = [p for name, p in job.network.named_parameters() if name not in job.unfrozen.names]
    assert all(p.grad is None and not p.requires_grad and p not in state.optimizer.state for p in frozen)


def test_batch_norms_follow_the_batches_only_if_asked_and_only_in_what_is_trained():
    statistics = {}
    for how in ("frozen", "trained"):
        job = job_of(unfreeze="last", batch_norm=how)
        before = weights(job)
        run_training_loop(job, begun(job))
        after = weights(job)
        statistics[how] = {n for n in before if "running" in n and not torch.equal(before[n], after[n])}
    assert statistics["frozen"] == set()
    assert statistics["trained"] == {f"b.layer3.{n}.norm.running_{what}" for n in (0, 1) for what in ("mean", "var")}


def test_stages_are_thawed_one_after_the_other():
    job = job_of(gradual=1, epochs=4)
    thawed = [{name.split(".")[0] for name in job.unfrozen.active_names(epoch, 1)} for epoch in range(5)]
    stages = [{name.split(".")[0] for name in job.unfrozen.names if job.unfrozen.depth[name] == d} for d in (1, 2, 3)]
    assert thawed[0] == set()
    assert thawed[1] == stages[0] == {"layer3"}
    assert thawed[2] == stages[0] | stages[1]
    assert thawed[4] == {"stem", "layer1", "layer2", "layer3"}
    fresh = job_of(gradual=2, epochs=2)
    before = weights(fresh)
    run_training_loop(fresh, begun(fresh))
    after = weights(fresh)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"0.weight", "0.bias"}


# -- rates ------------------------------------------------------------------------------------------------------------


def test_rates_fall_geometrically_and_norms_and_biases_do_not_decay():
    job = job_of(layer_decay=0.5, weight_decay=0.3)
    below = {n: p for n, p in job.trained_parameters().items() if n in job.parameter_depths()}
    head = {n: p for n, p in job.trained_parameters().items() if n not in below}
    for group in make_parameter_groups(head, below, job.parameter_depths(), job.tuning):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert group["share"] == 0.5 ** job.parameter_depths().get(name, 0)
            is_norm_or_bias = name.endswith("bias") or ".norm." in name
            assert is_norm_or_bias == (parameter.ndim == 1)
            assert group["weight_decay"] == (0.0 if is_norm_or_bias else 0.3)


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "constant"])
def test_schedules_rise_to_one_and_fall(schedule):
    tuning = FineTuneConfig(schedule=schedule, warmup=0.25)
    found = [schedule_factor(step, 100, tuning) for step in range(100)]
    assert max(found) == pytest.approx(1.0)
    assert np.argmax(found) in (24, 25)
    assert all(a < b for a, b in pairwise(found[:25]))
    assert (found[-1] < 0.01) == (schedule != "constant")


def test_one_cycle_is_that_of_torch():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=100, cycle_momentum=False)
    tuning, ours, wanted = FineTuneConfig(schedule="one-cycle", warmup=0.3), [], []
    for step in range(100):
        wanted.append(optimizer.param_groups[0]["lr"])
        ours.append(schedule_factor(step, 100, tuning))
        optimizer.step()
        if step < 99:
            theirs.step()
    assert np.abs(np.array(ours) - wanted).max() < 0.06  # theirs peaks a step earlier
    assert ours[29] == pytest.approx(wanted[29], abs=1e-6)


def test_a_rate_is_found_and_the_network_is_left_as_it_was():
    job = job_of(epochs=1)
    before = weights(job)
    rate = find_learning_rate(job)
    assert 1e-5 < rate < 1
    assert_equal(before, weights(job))


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_step_is_that_of_a_plain_loop():
    job = job_of(unfreeze="all", optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=0.0, layer_decay=1.0, epochs=1)
    job = replace(job, tuning=replace(job.tuning, batch=32, schedule="constant", warmup=0.0))
    network, head = copy.deepcopy(job.network).eval(), copy.deepcopy(job.head)
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    for module in job.network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    network.requires_grad_(True)
    (rows,) = job.epoch_batches(0)
    scores = head(network(job.train_data.batch(rows, 0)))
    nn.functional.cross_entropy(scores, job.targets.Y[torch.from_numpy(rows)]).backward()
    wanted = {f"b.{n}": p.detach() - 1e-2 * p.grad for n, p in network.named_parameters()}
    wanted |= {n: p.detach() - 1e-2 * p.grad for n, p in head.named_parameters()}
    state = begun(job)
    run_training_loop(job, state)
    found = {**{name: value for name, value in weights(job).items() if name in wanted}}
    if state.best_epoch.number == 1:
        assert_equal(found, wanted, atol=1e-6, rtol=1e-5)
    else:
        pytest.fail("the step made it worse")


@pytest.mark.parametrize("pieces", [2, 3, 8])
def test_gradients_of_pieces_add_up_to_those_of_the_batch(pieces):
    found = []
    for accumulate in (1, pieces):
        job = job_of(accumulate=accumulate)
        state, (rows, *_) = begun(job), job.epoch_batches(0)
        job.unfreeze_for_epoch(0)
        loss, _ = compute_gradients(job, state, rows, job.train_data.batch(rows, 0), len(rows))
        found.append((loss, {name: p.grad.clone() for name, p in job.trained_parameters().items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_equal(found[0][1], found[1][1], atol=1e-6, rtol=1e-4)


def test_batches_are_never_of_one_image_unless_asked_and_each_row_comes_once():
    job = replace(job_of(), train=np.arange(33))
    assert [len(rows) for rows in job.epoch_batches(0)] == [7, 7, 7, 6, 6]
    assert sorted(np.concatenate(job.epoch_batches(0)).tolist()) == list(range(33))
    assert job.epoch_batches(0)[0].tolist() != job.epoch_batches(1)[0].tolist()
    assert job.epoch_batches(1)[0].tolist() == job.epoch_batches(1)[0].tolist()


def test_balanced_sampling_draws_each_class_as_often():
    job = job_of(sampling="balanced")
    Y = torch.zeros(N, dtype=torch.int64)
    Y[:4] = 1
    job = replace(job, targets=TrainingTargets(Y, torch.ones(N)))
    drawn = np.concatenate([rows for epoch in range(20) for rows in job.epoch_batches(epoch)])
    assert abs(np.mean(Y.numpy()[drawn] == 1) - 0.5) < 0.06


@pytest.mark.parametrize("settings", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_blends_hold_as_much_of_each_picture_as_they_say(settings):
    ones = torch.arange(6.0)[:, None, None, None].expand(6, 3, 16, 16)
    torch.manual_seed(3)
    for _ in range(10):
        found, blend = apply_mixup_cutmix(ones, FineTuneConfig(**settings))
        wanted = blend.lam * torch.arange(6.0) + (1 - blend.lam) * torch.from_numpy(blend.partner).float()
        torch.testing.assert_close(found.mean((1, 2, 3)), wanted)


def test_the_average_is_what_is_judged_and_kept():
    job = job_of(ema=0.9, epochs=2)
    state = begun(job)
    run_training_loop(job, state)
    assert state.ema_weights.keys() == job.trained_tensors().keys()
    if state.best_epoch.number == 2:
        assert_equal(dict(job.trained_tensors()), state.ema_weights)
    by_hand = nn.functional.cross_entropy(
        predict_scores(job, job.validation_data, job.validation_rows),
        job.targets.Y[torch.from_numpy(job.validation_rows)],
    )
    assert float(by_hand) == pytest.approx(state.best_epoch.validation_loss, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights_about_as_well(precision):
    found = {}
    for name in ("fp32", precision):
        job = job_of(precision=name, epochs=3)
        state = run_training_loop(job, begun(job))
        found[name] = [epoch.validation_loss for epoch in state.curve]
        assert all(parameter.dtype == torch.float32 for parameter in job.trained_parameters().values())
    assert found[precision][-1] < found[precision][0]
    np.testing.assert_allclose(found[precision], found["fp32"], rtol=0.15)


def test_it_stops_when_validation_gets_no_better_and_puts_the_best_weights_back():
    job = job_of(epochs=30, patience=2, learning_rate=0.3)
    state = run_training_loop(job, begun(job))
    assert len(state.curve) < 31
    assert state.curve[-1].number - state.best_epoch.number == 2
    assert_equal(dict(job.trained_tensors()), state.best_weights)


def test_the_best_epoch_is_that_of_the_lowest_loss_or_of_the_most_right_answers():
    curve = [
        EpochRecord(0, 1.0, 0.5, 0.7),
        EpochRecord(1, 1.0, 0.6, 0.9),
        EpochRecord(2, 1.0, 0.55, 0.9),
        EpochRecord(3, 1.0, 0.5, 0.8),
    ]
    for monitor, best in (("loss", 0), ("score", 2)):
        state = begun(job_of(monitor=monitor))
        state.curve = curve
        assert state.best_epoch.number == best


# -- interruptions ----------------------------------------------------------------------------------------------------

ASKED = {"settings": {"epochs": 3, "learning_rate": 0.01}}


class Interrupting(Tensors):
    """Ctrl-C while some batch is trained on."""

    def __init__(self, of: Tensors, at: int, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__(of.network, of.images)
        self.left, self.number = at, number

    def batch(self, rows, epoch: int) -> Tensor:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)
        return super().batch(rows, epoch)


SETTINGS = {
    "plain": {},
    "sgd": {"optimizer": "sgd"},
    "ema, batch norms and mixup": {"ema": 0.9, "batch_norm": "trained", "mixup": 0.5},
    "gradual": {"gradual": 1, "unfreeze": "2"},
    "one-cycle, accumulated": {"schedule": "one-cycle", "accumulate": 2},
    "fp16": {"precision": "fp16"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_goes_on_ends_as_one_that_never_stopped(tmp_path, name):
    whole = job_of(**SETTINGS[name])
    uninterrupted = run_training_loop(whole, begun(whole))
    for at in (2, 6, 10):
        place = tmp_path / f"{at}.checkpoint"
        first = job_of(**SETTINGS[name])
        stopped = replace(first, source=Interrupting(first.train_data, at))
        with pytest.raises(KeyboardInterrupt):
            run_training_loop(
                stopped,
                begun(stopped),
                lambda state, j=stopped, p=place: checkpoint.save_checkpoint(p, j, state, ASKED),
            )
        second = job_of(**SETTINGS[name])
        state = run_training_loop(second, checkpoint.load_checkpoint(place, second, ASKED))
        assert_equal(weights(second), weights(whole))
        assert [e.to_dict() for e in state.curve] == [e.to_dict() for e in uninterrupted.curve]


def test_a_schedulers_signal_saves_too(tmp_path):
    job = job_of()
    job = replace(job, source=Interrupting(job.train_data, 3, signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    saved = []
    with pytest.raises(KeyboardInterrupt):
        run_training_loop(job, begun(job), lambda state: saved.append(state.step))
    assert saved
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_changed_setting_is_an_error_that_lists_what_differs(tmp_path):
    job = job_of()
    checkpoint.save_checkpoint(tmp_path / "c", job, begun(job), ASKED)
    other = {"settings": {"epochs": 3, "learning_rate": 0.02}}
    with pytest.raises(ConfigError, match=r"settings.learning_rate is 0.01, asked for 0.02.*--restart"):
        checkpoint.load_checkpoint(tmp_path / "c", job, other)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    job = job_of()
    place = tmp_path / "c"
    checkpoint.save_checkpoint(place, job, begun(job), ASKED)
    data = place.read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        place.write_bytes(data[:length])
        with pytest.raises(ModelError, match="is damaged or no checkpoint"):
            checkpoint.load_checkpoint(place, job, ASKED)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    job = job_of()
    checkpoint.save_checkpoint(tmp_path / "c", job, begun(job), ASKED)
    with pytest.raises(ModelError, match="does not fit the network"):
        checkpoint.load_checkpoint(tmp_path / "c", job_of(Wider(), unfreeze="all"), ASKED)


class Wider(Ladder):
    def __init__(self) -> None:
        super().__init__()
        self.layer4 = nn.Sequential(nn.Conv2d(10, 10, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x))))).mean((2, 3))


# -- bad luck ---------------------------------------------------------------------------------------------------------


class Poisoned(Tensors):
    """One image turns to NaN in the second epoch."""

    def batch(self, rows, epoch: int) -> Tensor:
        found = super().batch(rows, epoch)
        if epoch == 1:
            found[rows == 5] = math.nan
        return found


def test_a_loss_that_is_no_number_stops_restores_and_names_the_batch(log):
    job = job_of(learning_rate=1e-3)
    job = replace(job, source=Poisoned(job.train_data.network, job.train_data.images))
    state = run_training_loop(job, begun(job))
    (warning,) = (text for text in log if "the loss is" in text)
    assert "epoch 2" in warning
    assert "the loss is nan in the batch of" in warning
    assert "image 5" in warning
    assert [epoch.number for epoch in state.curve] == [0, 1]
    assert all(value.isfinite().all() for value in weights(job).values())
    assert_equal(dict(job.trained_tensors()), state.best_weights)


class Small(nn.Module):
    """A device for so many images."""

    def __init__(self, network: nn.Module, most: int) -> None:
        super().__init__()
        self.network, self.most = network, most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return self.network(x)


@pytest.mark.parametrize("most", [3, 1])
def test_where_memory_runs_out_batches_are_computed_in_pieces_with_the_same_result(most):
    whole = job_of(epochs=1)
    small = job_of(epochs=1)
    source = Tensors(Small(small.train_data.network, most), small.train_data.images)
    small = replace(small, source=source)
    state = begun(small)
    for job in (whole, small):
        for module in job.network.modules():
            if isinstance(module, nn.Dropout2d):
                module.p = 0.0
    run_training_loop(whole, begun(whole))
    with logged_warning("with the same gradients"):
        run_training_loop(small, state)
    assert state.pieces == {3: 4, 1: 8}[most]
    assert_equal(weights(whole), weights(small), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("batch_norm", "least"), [("frozen", "one image"), ("trained", "two images")])
def test_memory_for_not_even_the_smallest_batch_is_an_error(batch_norm, least, log):
    job = job_of(batch_norm=batch_norm)
    source = Tensors(Small(job.train_data.network, 0), job.train_data.images)
    job = replace(job, source=source, watched=job.train_data)
    with pytest.raises(ConfigError, match=f"not enough memory to train on {least} at a time"):
        run_training_loop(job, begun(job))
    assert any("with the same gradients" in text for text in log) == (batch_norm == "frozen")
