"""Expansion through the network: loss terms equal the formulas of the papers, and whole expansions."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional

import featpipe
from featpipe import backbones, expand, load_model
from featpipe.cli import cli
from featpipe.errors import ConfigError
from featpipe.finetuning import checkpoint
from featpipe.finetuning.augmentation import apply_mixup_cutmix
from featpipe.finetuning.head_layers import HeadLayers
from featpipe.finetuning.loop import compute_gradients, run_training_loop
from featpipe.finetuning.trainer import EpochRecord, Trainer
from featpipe.heads.last_layer import LastLayer, compute_fisher_diagonal
from featpipe.incremental import Expansion
from featpipe.incremental.dataset import ClassMapping
from featpipe.incremental.deep import regularizers
from featpipe.incremental.deep.ewc import make_ewc_penalty
from featpipe.incremental.deep.methods import make_replay_dataset
from featpipe.incremental.deep.regularizers import DistillationLoss, EWCPenalty, compute_network_fisher
from featpipe.incremental.problem import ExpansionConfig, IncrementalStep
from featpipe.model import Model, ReplayMemory
from featpipe.runtime import format_size
from featpipe.training import EmbeddingDataset
from tests.support import finetuning as pictures
from tests.support.finetuning import (
    LADDER_WIDTH,
    N_ROWS,
    RUN_CONFIG,
    InterruptingDataset,
    assert_tensors_equal,
    copy_weights,
    disable_dropout,
    init_state,
    make_trainer,
)
from tests.support.interrupts import interrupt_fine_tuning

OLD_NAMES, NEW_NAMES = ("ape", "bee"), ("cow", "dog")
K_OLD = 2
LEARNING_RATE = 3e-3
QUICK_TRAINING = {"epochs": 2, "batch": 8, "learning_rate": 1e-4, "device": "cpu"}
LONGER_TRAINING = {"learning_rate": 1e-3, "epochs": 3, "patience": 0, "monitor": "score"}


def make_loss_terms(
    strength: float = 3.0, temperature: float = 2.0, importance: float = 5.0
) -> tuple[DistillationLoss, EWCPenalty]:
    """Both terms, with random teacher scores, reference weights and importances."""
    trainer = make_trainer()
    generator = torch.Generator().manual_seed(5)
    start = {name: parameter.detach().clone() for name, parameter in trainer.trained_parameters().items()}
    reference = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in start.items()}
    importances = {name: importance * torch.rand(value.shape, generator=generator) for name, value in start.items()}
    teacher_scores = torch.randn(N_ROWS, K_OLD, generator=generator)
    return DistillationLoss(teacher_scores, temperature, strength), EWCPenalty(reference, importances)


def compute_plain_loss(
    trainer: Trainer, rows: np.ndarray, network: nn.Module, head: nn.Module, *, distillation: Any, ewc: Any
) -> Tensor:
    """The loss as in the papers, row by row and weight by weight."""
    indices = torch.from_numpy(rows)
    scores, y = head(network(trainer.train_data.batch(rows, 0))), trainer.targets.Y[indices]
    loss = functional.cross_entropy(scores, y)
    T, distilled = distillation.temperature, 0.0
    for row_scores, teacher in zip(scores, distillation.teacher_scores[indices], strict=True):
        old, new = torch.softmax(teacher / T, 0), torch.softmax(row_scores[:K_OLD] / T, 0)
        distilled = distilled + sum(p * (p.log() - q.log()) for p, q in zip(old, new, strict=True))
    loss = loss + distillation.strength * T**2 * distilled / len(rows)
    parameters = {f"head.{n}": p for n, p in head.named_parameters()}
    parameters |= {f"backbone.{n}": p for n, p in network.named_parameters()}
    for name, importance in ewc.importances.items():
        loss = loss + 0.5 * (importance * (parameters[name] - ewc.reference_weights[name]) ** 2).sum()
    return loss


def test_steps_with_distillation_and_ewc_equal_those_of_an_explicit_loop() -> None:
    """Three epochs of SGD on all rows at once."""
    settings = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0, "layer_decay": 1.0}
    trainer = disable_dropout(
        make_trainer(**settings, batch=32, schedule="constant", warmup=0.0, learning_rate=LEARNING_RATE)
    )
    distillation, ewc = make_loss_terms()
    trainer = replace(trainer, loss_terms=(distillation, ewc))
    images = trainer.train_data.images
    trainer.train_data.batch = lambda rows, epoch: images[torch.from_numpy(rows)]  # the same in every epoch
    network, head = copy.deepcopy(trainer.network).eval(), copy.deepcopy(trainer.head)
    network.requires_grad_(True)
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=LEARNING_RATE)
    for epoch in range(3):
        (rows,) = trainer.epoch_batches(epoch)
        optimizer.zero_grad()
        compute_plain_loss(trainer, rows, network, head, distillation=distillation, ewc=ewc).backward()
        optimizer.step()
    state = run_training_loop(trainer, init_state(trainer))
    assert state.best_epoch.number == 3
    expected = {f"b.{n}": p.detach() for n, p in network.named_parameters()}
    expected |= {n: p.detach() for n, p in head.named_parameters()}
    trained = {name: value for name, value in copy_weights(trainer).items() if name in expected}
    assert_tensors_equal(trained, expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        validation_loss = float(
            compute_plain_loss(trainer, trainer.validation_rows, network, head, distillation=distillation, ewc=ewc)
        )
    assert state.curve[-1].validation_loss == pytest.approx(validation_loss, rel=1e-4)


@pytest.mark.parametrize("pieces", [2, 5])
def test_loss_terms_have_the_same_weight_in_a_batch_that_is_divided_into_pieces(pieces: int) -> None:
    results = []
    for accumulate in (1, pieces):
        trainer = replace(disable_dropout(make_trainer(accumulate=accumulate)), loss_terms=make_loss_terms())
        state, (rows, *_) = init_state(trainer), trainer.epoch_batches(0)
        trainer.unfreeze_for_epoch(0)
        loss, _ = compute_gradients(trainer, state, rows, trainer.train_data.batch(rows, 0), len(rows))
        results.append((loss, {name: p.grad.clone() for name, p in trainer.trained_parameters().items()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert_tensors_equal(results[0][1], results[1][1], atol=1e-5, rtol=1e-4)


def test_mixed_images_are_distilled_from_the_teacher_scores_of_both() -> None:
    distillation, _ = make_loss_terms()
    trainer = disable_dropout(make_trainer(mixup=1.0))
    (rows, *_) = trainer.epoch_batches(0)
    trainer.unfreeze_for_epoch(0)
    losses = {}
    for name, terms in {"none": (), "distillation": (distillation,)}.items():
        trainer = replace(trainer, loss_terms=terms)
        torch.manual_seed(0)
        inputs = trainer.train_data.batch(rows, 0)
        losses[name] = compute_gradients(trainer, init_state(trainer), rows, inputs, len(rows))[0]
    torch.manual_seed(0)
    mixed, mix = apply_mixup_cutmix(trainer.train_data.batch(rows, 0), trainer.tuning)
    with torch.no_grad():
        scores = trainer.compute_scores(trainer.train_data, mixed)
    first, second = (distillation.row_losses(scores, r).mean() for r in (rows, rows[mix.partner]))
    expected = mix.lam * float(first) + (1 - mix.lam) * float(second)
    assert losses["distillation"] - losses["none"] == pytest.approx(expected, rel=1e-3)


def test_fisher_information_is_the_mean_of_squared_gradients_of_each_image_and_class() -> None:
    trainer, rows = make_trainer(unfreeze="last"), np.arange(7)
    fisher = compute_network_fisher(trainer, rows)
    network, head = copy.deepcopy(trainer.network).eval().requires_grad_(True), copy.deepcopy(trainer.head)
    parameters = {f"head.{n}": p for n, p in head.named_parameters()}
    parameters |= {f"backbone.{n}": p for n, p in network.named_parameters() if n in trainer.unfrozen.names}
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        images = trainer.train_data.batch(np.array([row]), 0)
        p = torch.softmax(head(network(images))[0], 0).detach()
        for code in range(len(p)):
            loss = functional.cross_entropy(head(network(images)), torch.tensor([code]))
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                expected[name] += p[code] * gradient**2 / len(rows)
    assert fisher.keys() == expected.keys()
    assert_tensors_equal(fisher, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("gradual", [0, 2])
def test_fisher_information_does_not_depend_on_the_batch_size(gradual: int, monkeypatch: Any) -> None:
    fisher = compute_network_fisher(make_trainer(gradual=gradual), np.arange(9))
    monkeypatch.setattr(regularizers, "FISHER_BATCH_SIZE", 2)
    in_small_batches = compute_network_fisher(make_trainer(gradual=gradual), np.arange(9))
    assert_tensors_equal(fisher, in_small_batches, atol=1e-7, rtol=1e-5)


def test_fisher_information_of_the_last_layer_equals_the_closed_form() -> None:
    trainer, rows = make_trainer(unfreeze="last"), np.arange(11)
    with torch.no_grad():
        Z = trainer.network.eval()(trainer.train_data.batch(rows, 0)).numpy()
    W, b = (p.detach().double().numpy() for p in trainer.head.parameters())
    expected, fisher = compute_fisher_diagonal(LastLayer(W, b), Z), compute_network_fisher(trainer, rows)
    np.testing.assert_allclose(fisher["head.0.weight"].numpy(), expected[:, :-1], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(fisher["head.0.bias"].numpy(), expected[:, -1], rtol=1e-3, atol=1e-6)


def test_monitors_record_loss_and_score_and_do_not_influence_training() -> None:
    rows = np.arange(30, N_ROWS)
    y = make_trainer().targets.Y.numpy()[rows]
    monitors = {"old": rows[y < K_OLD], "new": rows[y >= K_OLD], "none": rows[:0]}
    trainer = replace(make_trainer(), monitors=monitors)
    state = run_training_loop(trainer, init_state(trainer))
    plain = make_trainer()
    run_training_loop(plain, init_state(plain))
    assert_tensors_equal(copy_weights(plain), copy_weights(trainer))
    with torch.no_grad():
        scores = trainer.head(trainer.network(trainer.train_data.images))
    metrics = state.best_epoch.metrics
    for name in ("old", "new"):
        monitor_scores, targets = scores[monitors[name]], trainer.targets.Y[monitors[name]]
        loss = float(functional.cross_entropy(monitor_scores, targets))
        assert metrics[name]["loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics[name]["score"] == pytest.approx(float((monitor_scores.argmax(1) == targets).float().mean()))
    assert np.isnan(list(metrics["none"].values())).all()
    document = state.best_epoch.to_dict()
    assert document["metrics"]["none"] == {"loss": None, "score": None}
    assert EpochRecord.from_dict(document).to_dict() == document
    assert "metrics" not in EpochRecord(1, 0.5, 0.5, 0.5).to_dict()


def test_a_resumed_run_with_loss_terms_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def make_penalized_trainer() -> Trainer:
        return replace(make_trainer(), loss_terms=make_loss_terms(), monitors={"some": np.arange(36, N_ROWS)})

    whole_trainer, stopped_trainer, resumed_trainer = (
        make_penalized_trainer(),
        make_penalized_trainer(),
        make_penalized_trainer(),
    )
    uninterrupted = run_training_loop(whole_trainer, init_state(whole_trainer))
    path = tmp_path / "checkpoint"
    stopped_trainer = replace(stopped_trainer, train_data=InterruptingDataset(stopped_trainer.train_data, 6))
    with pytest.raises(KeyboardInterrupt):
        run_training_loop(
            stopped_trainer,
            init_state(stopped_trainer),
            lambda state: checkpoint.save_checkpoint(path, stopped_trainer, state, RUN_CONFIG),
        )
    state = run_training_loop(resumed_trainer, checkpoint.load_checkpoint(path, resumed_trainer, RUN_CONFIG))
    assert_tensors_equal(copy_weights(resumed_trainer), copy_weights(whole_trainer))
    assert [e.to_dict() for e in state.curve] == [e.to_dict() for e in uninterrupted.curve]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of old and of new classes, and test images."""
    home = tmp_path_factory.mktemp("network")
    colours = {"dog": (150, 150, 90)}
    with pytest.MonkeyPatch.context() as patch:
        for name, colour in colours.items():
            patch.setitem(pictures.COLOURS, name, colour)
        pictures.write_photos(home / "old", 12, OLD_NAMES)
        pictures.write_photos(home / "new", 12, NEW_NAMES, first=9000)
        pictures.write_photos(home / "test", 6, (*OLD_NAMES, *NEW_NAMES), first=50_000)
    return home


@pytest.fixture(scope="module")
def ladder() -> Any:
    return backbones.load(pictures.Ladder(), transform=pictures.small_transform)


@pytest.fixture(scope="module")
def model(home: Path, ladder: Any) -> Model:
    cache = featpipe.extract(home / "old", backbone=ladder, cache=home / "cache")
    trained = featpipe.train(cache, cv=0, params={"C": 0.01}).attach(ladder)
    trained.save(home / "two.model")
    return trained


@pytest.fixture(scope="module")
def expand_ladder(home: Path, model: Model) -> Callable[..., Expansion]:
    def run(method: str | None, *data: str, base_model: Model | None = None, **options: Any) -> Expansion:
        params = {**({} if options.get("unfreeze") == "head" else QUICK_TRAINING), **options.pop("params", {})}
        options = {"test": home / "test", "unfreeze": "last", "cache": home / "cache", **options}
        return expand(
            base_model or model, [home / name for name in data or ("new",)], method=method, params=params, **options
        )

    return run


@pytest.mark.parametrize("method", ["joint", "replay", "distill", "ewc", "naive"])
def test_each_method_gives_a_model_that_predicts_the_same_after_saving(
    method: str, expand_ladder: Any, home: Path, tmp_path: Path
) -> None:
    data = ("new",) if method in ("distill", "naive") else ("old", "new")
    expansion = expand_ladder(
        method, *data, out=tmp_path / "m.model", params={"epochs": 6, "learning_rate": 1e-3, "patience": 0}
    )
    assert expansion.outcomes[0].method == method
    assert expansion.images["tested"] == 24
    files = sorted((home / "test").rglob("*.png"))
    loaded = load_model(tmp_path / "m.model").attach(expansion.model.backbone)
    assert loaded.classes == (*OLD_NAMES, *NEW_NAMES)
    np.testing.assert_allclose(loaded.predict_proba(files), expansion.model.predict_proba(files), atol=1e-6)
    accuracy = np.mean([name == file.parent.name for name, file in zip(loaded.predict(files), files, strict=True)])
    assert expansion.outcomes[0].all.value == pytest.approx(accuracy)
    assert [step["method"] for step in loaded.history["steps"]] == ["train", method]
    restored = Expansion.from_dict(loaded, loaded.scores["expansion"]["result"])
    assert restored.as_table() == expansion.as_table()
    names = [row[0] for row in expansion.as_table()]
    if not any("stays as it was" in note for note in expansion.notes):
        assert f"{method} on features" in names
        assert loaded.history["expansions"][0]["unfreeze"] == "last"
        assert loaded.head_name == "linear"
    assert "naive" in " ".join(names)
    curves = expansion.outcomes[0].curves
    assert {len(values) for values in curves.values()} <= {len(curves["epochs"])} if curves else True
    assert not (tmp_path / "m.model.checkpoint").exists()


def test_naive_forgets_and_each_epoch_reports_it(expand_ladder: Any, log: list[str]) -> None:
    expansion = expand_ladder("naive", params={"epochs": 8, "learning_rate": 1e-3, "patience": 0})
    curves = expansion.outcomes[0].curves
    assert curves["epochs"] == list(range(9))
    assert curves["old_accuracy"][0] > curves["old_accuracy"][-1]
    assert expansion.outcomes[0].old.value < expansion.before.value
    lines = [text for text in log if "; old classes " in text]
    assert len(lines) == 9
    assert lines[0].endswith(
        f"old classes {curves['old_accuracy'][0]:.3f}, new classes {curves['new_accuracy'][0]:.3f}"
    )


@pytest.mark.thorough
def test_importances_are_retained_and_suffice_for_the_next_step(expand_ladder: Any, home: Path, tmp_path: Path) -> None:
    first = expand_ladder("ewc", "old", "new", out=tmp_path / "m.model", params=LONGER_TRAINING)
    memory = first.model.kept
    assert all(name.startswith("backbone.layer3") for name in memory.network)
    layer3 = sum(p.numel() for n, p in pictures.Ladder().named_parameters() if n.startswith("layer3"))
    assert (
        memory.to_summary()["bytes"]["network"] == 4 * layer3 == sum(array.nbytes for array in memory.network.values())
    )
    assert memory.importances.shape == (4, LADDER_WIDTH + 1)
    output = CliRunner().invoke(cli, ["info", str(tmp_path / "m.model")]).stdout
    assert f"importances of the network: {format_size(4 * layer3)}" in output
    loaded = load_model(tmp_path / "m.model").attach(first.model.backbone)
    for name, array in memory.network.items():
        np.testing.assert_array_equal(loaded.kept.network[name], array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pictures.COLOURS, "eel", (90, 150, 150))
        more = str(pictures.write_photos(tmp_path / "more", 8, ("eel",), first=70_000))
    second = expand_ladder("ewc", more, base_model=loaded, params=LONGER_TRAINING)
    assert second.model.classes == (*OLD_NAMES, *NEW_NAMES, "eel")
    assert second.model.kept.network.keys() == memory.network.keys()
    with pytest.raises(ConfigError, match=r"no importances of \d+ weights \(stem"):
        expand_ladder("ewc", more, base_model=loaded, unfreeze="all")
    unretained = expand_ladder("ewc", "old", "new", keep="none", params=LONGER_TRAINING)
    assert unretained.model.kept is None
    with pytest.raises(ConfigError, match="ewc with --unfreeze needs importances of the network, and the model"):
        expand_ladder("ewc", more, base_model=unretained.model)


@pytest.mark.thorough
def test_a_resumed_expansion_gives_the_same_model(expand_ladder: Any, tmp_path: Path, monkeypatch: Any) -> None:
    options = {"params": LONGER_TRAINING, "out": tmp_path / "m.model"}
    uninterrupted = expand_ladder("ewc", "old", "new", **{**options, "out": tmp_path / "whole.model"})
    interrupt_fine_tuning(monkeypatch, n_steps=3)
    with pytest.raises(KeyboardInterrupt):
        expand_ladder("ewc", "old", "new", **options)
    assert not (tmp_path / "m.model").exists()
    with pytest.raises(ConfigError, match=r"expansion.settings.strength is None, asked for 2.0.*--restart"):
        expand_ladder("ewc", "old", "new", **{**options, "params": {**LONGER_TRAINING, "strength": 2.0}})
    resumed = expand_ladder("ewc", "old", "new", **options)
    assert resumed.model.backbone.digest == uninterrupted.model.backbone.digest
    np.testing.assert_array_equal(resumed.model.head[-1].coefs_[0], uninterrupted.model.head[-1].coefs_[0])
    assert resumed.outcomes[0].curves == uninterrupted.outcomes[0].curves
    assert not (tmp_path / "m.model.checkpoint").exists()
    mtime = (tmp_path / "m.model").stat().st_mtime_ns
    assert expand_ladder("ewc", "old", "new", **options).to_dict()["outcomes"] == resumed.to_dict()["outcomes"]
    assert (tmp_path / "m.model").stat().st_mtime_ns == mtime


def test_without_an_improvement_the_result_equals_expansion_on_features(expand_ladder: Any, model: Model) -> None:
    expansion = expand_ladder("distill", params={"learning_rate": 10.0, "epochs": 1, "clip": 0.0, "monitor": "loss"})
    assert expansion.notes[0].startswith("no epoch was better than the start")
    assert expansion.model.facts == model.facts
    features = expand_ladder("distill", unfreeze="head")
    assert [o.to_dict() | {"seconds": 0} for o in expansion.outcomes] == [
        o.to_dict() | {"seconds": 0} for o in features.outcomes
    ]


def test_an_expanded_network_is_expanded_again(expand_ladder: Any, home: Path, tmp_path: Path) -> None:
    expansion = expand_ladder("joint", "old", "new", keep="rows=3,statistics", params=LONGER_TRAINING)
    assert np.bincount(expansion.model.kept.codes).tolist() == [3] * 4
    cache = featpipe.extract(home / "test", backbone=expansion.model.backbone, cache=home / "cache")
    fewer = expansion.model.expand((), drop=["ape"])
    assert set(fewer.predict_features(cache.X)) <= {"bee", "cow", "dog"}
    shutil.copytree(home / "old", tmp_path / "all")
    shutil.copytree(home / "new", tmp_path / "all", dirs_exist_ok=True)
    tuned = expansion.model.finetune(
        tmp_path / "all", cache=home / "cache", keep_worse=True, **{**QUICK_TRAINING, "epochs": 1}
    )
    assert tuned.classes == expansion.model.classes


def test_old_images_are_recognized_by_their_bytes_and_replayed(
    expand_ladder: Any, home: Path, tmp_path: Path, log: list[str]
) -> None:
    for name in OLD_NAMES:
        (tmp_path / "some" / name).mkdir(parents=True)
        for file in sorted((home / "old" / name).glob("*.png"))[:6]:
            shutil.copy(file, tmp_path / "some" / name / f"a-{file.name}")
    expansion = expand_ladder("replay", str(tmp_path / "some"), "new", memory=5)
    assert expansion.images["old"] == 12
    text = next(text for text in log if "validation and" in text)
    n_train, n_validation = map(int, re.match(r"(\d+) training, (\d+) validation", text).groups())
    assert n_train + n_validation == 2 * 5 + 24


def test_an_exemplar_weighs_as_much_as_the_images_it_represents(model: Model) -> None:
    """Half in logarithms as a sample weight, half as an offset of its class, as on features."""
    d, rng = int(model.head[-1].n_features_in_), np.random.default_rng(0)

    def make_dataset(codes: list[int], seed: int) -> EmbeddingDataset:
        digests = np.random.default_rng(seed).integers(0, 256, (len(codes), 32), dtype=np.uint8)
        X = rng.normal(size=(len(codes), d)).astype(np.float32)
        return EmbeddingDataset(np.arange(len(codes)), X, np.array(codes), (*OLD_NAMES, "cow"), digests)

    old_set, new_set = make_dataset([0] * 5 + [1] * 5, 1), make_dataset([2] * 10, 2)
    memory = ReplayMemory(np.array([45, 20, 0]), np.zeros((0, d), np.float32), np.zeros(0, np.int32))
    step = IncrementalStep(
        model.head,
        1.0,
        ClassMapping.from_labels(OLD_NAMES, ["cow"]),
        memory,
        new_set,
        old_set,
        False,
        ExpansionConfig(memory=5),
    )
    replay_dataset = make_replay_dataset(step, "replay", 0.2)
    assert sorted(replay_dataset.represented_counts.tolist()) == [1.0] * 10 + [4.0] * 5 + [9.0] * 5
    weights, adjustment = replay_dataset.compute_sample_weights(np.arange(20), 25)
    assert weights[:20][replay_dataset.is_train].mean() == pytest.approx(1)
    ninth, first = (int(np.flatnonzero(replay_dataset.represented_counts == n)[0]) for n in (9, 1))
    assert weights[ninth] / weights[first] == pytest.approx(3)
    np.testing.assert_allclose(adjustment, [-0.5 * np.log(9), -0.5 * np.log(4), 0])
    assert replay_dataset.step.replay_memory.counts.tolist() == [45, 20, 0]
    np.testing.assert_allclose(
        replay_dataset.make_distillation_loss(np.arange(20), 25, 1.0).teacher_scores[:20].numpy(),
        step.compute_old_scores(replay_dataset.pool.X),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_ewc_penalty_ignores_a_shift_of_all_rows_of_the_last_layer() -> None:
    """The penalty is zero where training starts at the old rows, shifted by the same vector."""
    rng = np.random.default_rng(0)
    W, b = rng.normal(size=(3, 5)), rng.normal(size=3)
    old_layers = HeadLayers((W,), (b,))
    new_theta = np.vstack([W, rng.normal(size=(1, 5))]), np.append(b, 0.3)
    initial_layers = HeadLayers((new_theta[0],), (new_theta[1],)).center_logits()
    importances = {"head.0.weight": np.ones((4, 5), np.float32), "head.0.bias": np.ones(4, np.float32)}
    penalty = make_ewc_penalty(initial_layers, old_layers.center_logits(), importances, 1.0, nn.Identity())
    parameters = {f"head.{name}": parameter for name, parameter in initial_layers.to_module().named_parameters()}
    with torch.no_grad():
        assert float(penalty.penalty(parameters)) < 1e-12
        parameters["head.0.weight"][0, 0] += 0.1
        assert float(penalty.penalty(parameters)) == pytest.approx(0.5 * 0.1**2, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "data", "options", "problem"),
    [
        (
            "statistics",
            "new",
            {},
            "statistics uses sums over embeddings, and training the network changes the embeddings",
        ),
        ("frozen-old", "new", {}, "frozen-old keeps the old scores bit for bit, and training the network changes them"),
        ("all", "new", {}, "all compares methods on features.*Available with --unfreeze: joint, replay, distill"),
        (
            "joint",
            "new",
            {},
            "joint needs old images of every class, and there are none of 'ape', 'bee'",
        ),
        (
            "replay",
            "new",
            {},
            "stored exemplars are embeddings, which cannot go through the network again.*an archive with 20",
        ),
        ("ewc", "new", {}, "needs importances of the network, and the model retains none"),
        ("distill", "new", {"unfreeze": "layer9"}, "unknown part of the network 'layer9'; did you mean"),
        ("distill", "new", {"params": {"epoch": 3}}, "unknown setting 'epoch'; did you mean 'epochs'"),
        ("distill", "new", {"params": {"temperature": 0}}, "temperature"),
        ("distill", "new", {"params": {"weights": "none"}}, "weights is for `featpipe finetune`"),
        ("distill", "new", {"keep": "network,rows=x"}, "keep is 'network,rows=x'"),
        ("distill", "new", {"unfreeze": "head", "keep": "network"}, "embeddings are not enough; retain them when"),
        ("distill", "new", {"unfreeze": "head", "params": {"batch": 8}}, "unknown setting 'batch'"),
        ("distill", "old", {}, "no class is new; give new images"),
        ("distill", "new", {"calibration": "old"}, "--calibration is not supported with --unfreeze"),
    ],
)
def test_invalid_input_is_refused_in_one_line(
    method: str, data: str, options: Any, problem: str, expand_ladder: Any
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        expand_ladder(method, data, **options)
    assert "\n" not in str(caught.value)


def test_a_cache_in_place_of_an_archive_is_refused(home: Path, model: Model, ladder: Any) -> None:
    cache = featpipe.extract(home / "new", backbone=ladder, cache=home / "cache")
    for archive in (cache, cache.path):
        with pytest.raises(ConfigError, match=r"is a cache, and --unfreeze trains on images.*give the archives"):
            expand(model, archive, method="distill", unfreeze="last")


def test_too_few_images_for_validation_are_refused(home: Path, expand_ladder: Any, tmp_path: Path) -> None:
    (tmp_path / "few" / "cow").mkdir(parents=True)
    for file in sorted((home / "new" / "cow").glob("*.png"))[:2]:
        shutil.copy(file, tmp_path / "few" / "cow")
    with pytest.raises(ConfigError, match="no class has 3 images to train on, of which some are for validation"):
        expand_ladder("distill", str(tmp_path / "few"))


def test_a_head_that_cannot_become_a_layer_needs_old_images(
    home: Path, expand_ladder: Any, ladder: Any, log: list[str]
) -> None:
    cache = featpipe.extract(home / "old", backbone=ladder, cache=home / "cache")
    knn = featpipe.train(cache, "knn", cv=0).attach(ladder)
    with pytest.raises(ConfigError, match=r"is for heads that end in a softmax layer.*KNeighborsClassifier"):
        expand_ladder("distill", base_model=knn)
    expand_ladder("joint", "old", "new", base_model=knn)
    assert any("knn cannot become a layer" in text for text in log)


def test_retained_importances_of_the_network_are_validated(home: Path, ladder: Any) -> None:
    cache = featpipe.extract(home / "old", backbone=ladder, cache=home / "cache")
    with pytest.raises(ConfigError, match=r"keep=network: .* `featpipe expand --unfreeze`"):
        featpipe.train(cache, keep="network")
    importances = {"backbone.x": np.ones(3, np.float32)}
    memory = ReplayMemory(np.array([3, 4]), np.zeros((0, 2), np.float32), np.zeros(0, np.int32), network=importances)
    np.testing.assert_array_equal(ReplayMemory.from_bytes(memory.to_bytes(), 2).network["backbone.x"], np.ones(3))
    for invalid_importances in (-np.ones(3, np.float32), np.full(3, np.nan, np.float32)):
        with pytest.raises(ValueError, match="retained importances of the network are not all numbers"):
            ReplayMemory.from_bytes(replace(memory, network={"backbone.x": invalid_importances}).to_bytes(), 2)
