"""An expansion that goes on into the network: what holds it to the old classes is what the papers say."""

from __future__ import annotations

import copy
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
from featpipe.finetuning.head_layers import HeadLayers
from featpipe.finetuning.loop import compute_gradients, run_training_loop
from featpipe.finetuning.regularizers import DistillationLoss, EWCPenalty, Regularizers, compute_network_fisher
from featpipe.finetuning.trainer import EpochRecord
from featpipe.incremental import Expansion
from featpipe.incremental.dataset import ClassMapping, LabeledEmbeddings
from featpipe.incremental.deep.ewc import make_ewc_penalty
from featpipe.incremental.deep.methods import make_replay_dataset
from featpipe.incremental.problem import ExpansionConfig, IncrementalStep
from featpipe.model import Model, ReplayMemory
from featpipe.runtime import format_size
from tests import finetuning as pictures
from tests.conftest import interrupt_fine_tuning
from tests.unit.test_finetune_loop import ASKED, Interrupting, N, assert_equal, begun, job_of, weights

OLD, NEW = ("ape", "bee"), ("cow", "dog")
K_OLD = 2
QUICK = {"epochs": 2, "batch": 8, "learning_rate": 1e-4, "device": "cpu"}
LEARNS = {"learning_rate": 1e-3, "epochs": 3, "patience": 0, "monitor": "score"}


# -- the ties, against a loop that is written out ---------------------------------------------------------------------


def held(strength: float = 3.0, temperature: float = 2.0, amount: float = 5.0) -> Regularizers:
    """A past with both ties, of made-up answers and importances."""
    job = job_of()
    generator = torch.Generator().manual_seed(5)
    start = {name: parameter.detach().clone() for name, parameter in job.trained_parameters().items()}
    before = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in start.items()}
    important = {name: amount * torch.rand(value.shape, generator=generator) for name, value in start.items()}
    scores = torch.randn(N, K_OLD, generator=generator)
    return Regularizers(K_OLD, DistillationLoss(scores, temperature, strength), EWCPenalty(before, important))


def without_dropout(job: Any) -> Any:
    for module in job.network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return job


def plain_loss(job: Any, past: Regularizers, rows: np.ndarray, network: nn.Module, head: nn.Module) -> Tensor:
    """As in the papers, row by row and weight by weight."""
    where = torch.from_numpy(rows)
    scores, y = head(network(job.source.batch(rows, 0))), job.targets.Y[where]
    loss = functional.cross_entropy(scores, y)
    T, distilled = past.distillation.temperature, 0.0
    for score, said in zip(scores, past.distillation.teacher_scores[where], strict=True):
        old, new = torch.softmax(said / T, 0), torch.softmax(score[:K_OLD] / T, 0)
        distilled = distilled + sum(p * (p.log() - q.log()) for p, q in zip(old, new, strict=True))
    loss = loss + past.distillation.strength * T**2 * distilled / len(rows)
    named = {f"head.{n}": p for n, p in head.named_parameters()}
    named |= {f"backbone.{n}": p for n, p in network.named_parameters()}
    for name, importance in past.ewc.importances.items():
        loss = loss + 0.5 * (importance * (named[name] - past.ewc.reference_weights[name]) ** 2).sum()
    return loss


def test_steps_with_soft_targets_and_importances_are_those_of_a_plain_loop() -> None:
    """Three epochs of SGD on all rows at once, written out."""
    settings = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0, "layer_decay": 1.0}
    job = without_dropout(job_of(**settings, batch=32, schedule="constant", warmup=0.0, learning_rate=3e-3))
    past = held()
    job = replace(job, past=past, source=job.validation_data)
    job.source.batch = lambda rows, epoch: job.source.images[torch.from_numpy(rows)]  # the same in every epoch
    network, head = copy.deepcopy(job.network).eval(), copy.deepcopy(job.head)
    network.requires_grad_(True)
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=3e-3)
    for epoch in range(3):
        (rows,) = job.batches(epoch)
        optimizer.zero_grad()
        plain_loss(job, past, rows, network, head).backward()
        optimizer.step()
    state = run_training_loop(job, begun(job))
    assert state.best_epoch.number == 3
    wanted = {f"b.{n}": p.detach() for n, p in network.named_parameters()}
    wanted |= {n: p.detach() for n, p in head.named_parameters()}
    assert_equal({name: value for name, value in weights(job).items() if name in wanted}, wanted, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        watched = float(plain_loss(job, past, job.validation, network, head))
    assert state.curve[-1].validation_loss == pytest.approx(watched, rel=1e-4)


@pytest.mark.parametrize("pieces", [2, 5])
def test_a_batch_in_pieces_is_held_as_strongly_as_a_whole_one(pieces: int) -> None:
    found = []
    for accumulate in (1, pieces):
        job = replace(without_dropout(job_of(accumulate=accumulate)), past=held())
        state, (rows, *_) = begun(job), job.batches(0)
        job.unfreeze_for_epoch(0)
        loss, _ = compute_gradients(job, state, rows, job.source.batch(rows, 0), len(rows))
        found.append((loss, {name: p.grad.clone() for name, p in job.parameters().items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_equal(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)


def test_blended_images_are_held_to_what_was_said_of_both() -> None:
    job = replace(without_dropout(job_of(mixup=1.0)), past=held())
    state, (rows, *_) = begun(job), job.batches(0)
    job.unfreeze_for_epoch(0)
    torch.manual_seed(0)
    loss, _ = compute_gradients(job, state, rows, job.source.batch(rows, 0), len(rows))
    assert np.isfinite(loss)
    plain = replace(job, past=None)
    torch.manual_seed(0)
    assert loss > compute_gradients(plain, begun(plain), rows, plain.source.batch(rows, 0), len(rows))[0]


def test_importances_are_the_mean_of_squares_image_by_image_and_answer_by_answer() -> None:
    job, rows = job_of(unfreeze="last"), np.arange(7)
    found = compute_network_fisher(job, rows)
    network, head = copy.deepcopy(job.network).eval().requires_grad_(True), copy.deepcopy(job.head)
    named = {f"head.{n}": p for n, p in head.named_parameters()}
    named |= {f"backbone.{n}": p for n, p in network.named_parameters() if n in job.unfrozen.names}
    wanted = {name: torch.zeros_like(p) for name, p in named.items()}
    for row in rows:
        p = torch.softmax(head(network(job.train_data.batch(np.array([row]), 0)))[0], 0).detach()
        for answer in range(len(p)):
            loss = functional.cross_entropy(
                head(network(job.train_data.batch(np.array([row]), 0))), torch.tensor([answer])
            )
            for name, slope in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                wanted[name] += p[answer] * slope**2 / len(rows)
    assert found.keys() == wanted.keys()
    assert_equal(found, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("gradual", [0, 2])
def test_importances_do_not_depend_on_how_many_images_are_read_at_once(gradual: int, monkeypatch: Any) -> None:
    from featpipe.finetuning import regularizers

    one = compute_network_fisher(job_of(gradual=gradual), np.arange(9))
    monkeypatch.setattr(regularizers, "FISHER_BATCH_SIZE", 2)
    assert_equal(one, compute_network_fisher(job_of(gradual=gradual), np.arange(9)), atol=1e-7, rtol=1e-5)


def test_of_the_last_layer_they_are_the_closed_form() -> None:
    from featpipe.heads.last_layer import LastLayer, compute_fisher_diagonal

    job, rows = job_of(unfreeze="last"), np.arange(11)
    with torch.no_grad():
        Z = job.network.eval()(job.train_data.batch(rows, 0)).numpy()
    W, b = (p.detach().double().numpy() for p in job.head.parameters())
    wanted, found = compute_fisher_diagonal(LastLayer(W, b), Z), compute_network_fisher(job, rows)
    np.testing.assert_allclose(found["head.0.weight"].numpy(), wanted[:, :-1], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found["head.0.bias"].numpy(), wanted[:, -1], rtol=1e-3, atol=1e-6)


def test_both_sides_are_watched_by_rows_that_decide_nothing() -> None:
    job = replace(job_of(), past=Regularizers(K_OLD), beside=np.arange(30, 40))
    state = run_training_loop(job, begun(job))
    plain = job_of()
    assert_equal(weights(plain) | {}, weights(job_of()))
    run_training_loop(plain, begun(plain))
    assert_equal(weights(plain), weights(job))
    with torch.no_grad():
        scores, y = job.head(job.network(job.train_data.images[30:])), job.targets.Y[30:]
    best = state.best_epoch
    assert best.old_loss == pytest.approx(float(functional.cross_entropy(scores[y < 2], y[y < 2])), rel=1e-4)
    assert best.new_score == pytest.approx(float((scores.argmax(1) == y)[y >= 2].float().mean()))
    assert EpochRecord.from_dict(best.to_dict()) == best
    assert "old_loss" not in EpochRecord(1, 0.5, 0.5, 0.5).to_dict()


def test_a_run_that_is_held_goes_on_as_one_that_never_stopped(tmp_path: Path) -> None:
    how = {"past": held(), "beside": np.arange(36, 40)}
    whole = replace(job_of(), **how)
    uninterrupted = run_training_loop(whole, begun(whole))
    place, first = tmp_path / "c", replace(job_of(), **how)
    stopped = replace(first, source=Interrupting(first.train_data, 6))
    with pytest.raises(KeyboardInterrupt):
        run_training_loop(
            stopped, begun(stopped), lambda state: checkpoint.save_checkpoint(place, stopped, state, ASKED)
        )
    second = replace(job_of(), **how)
    state = run_training_loop(second, checkpoint.load_checkpoint(place, second, ASKED))
    assert_equal(weights(second), weights(whole))
    assert [e.to_dict() for e in state.curve] == [e.to_dict() for e in uninterrupted.curve]


# -- the whole way ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of old and of new classes, and others to judge by."""
    home = tmp_path_factory.mktemp("network")
    colours = {"dog": (150, 150, 90)}
    with pytest.MonkeyPatch.context() as patch:
        for name, colour in colours.items():
            patch.setitem(pictures.COLOURS, name, colour)
        pictures.write_photos(home / "old", 12, OLD)
        pictures.write_photos(home / "new", 12, NEW, first=9000)
        pictures.write_photos(home / "test", 6, (*OLD, *NEW), first=50_000)
    return home


@pytest.fixture(scope="module")
def ladder() -> Any:
    return backbones.load(pictures.Ladder(), transform=pictures.small_transform)


@pytest.fixture(scope="module")
def model(home: Path, ladder: Any) -> Model:
    cache = featpipe.extract(home / "old", backbone=ladder, cache=home / "cache")
    made = featpipe.train(cache, cv=0, params={"C": 0.01}).attach(ladder)
    made.save(home / "two.model")
    return made


@pytest.fixture(scope="module")
def grow(home: Path, model: Model) -> Callable[..., Expansion]:
    def run(method: str | None, *data: str, of: Model | None = None, **how: Any) -> Expansion:
        params = {**({} if how.get("unfreeze") == "head" else QUICK), **how.pop("params", {})}
        how = {"test": home / "test", "unfreeze": "last", "cache": home / "cache", **how}
        return expand(of or model, [home / name for name in data or ("new",)], method=method, params=params, **how)

    return run


@pytest.mark.parametrize("method", ["joint", "replay", "distill", "ewc", "naive"])
def test_each_method_gives_a_model_like_any_other(method: str, grow: Any, home: Path, tmp_path: Path) -> None:
    data = ("new",) if method in ("distill", "naive") else ("old", "new")
    found = grow(method, *data, out=tmp_path / "m.model", params={"epochs": 6, "learning_rate": 1e-3, "patience": 0})
    assert found.outcomes[0].method == method
    assert found.images["tested"] == 24
    files = sorted((home / "test").rglob("*.png"))
    loaded = load_model(tmp_path / "m.model").attach(found.model.backbone)
    assert loaded.classes == (*OLD, *NEW)
    np.testing.assert_allclose(loaded.predict_proba(files), found.model.predict_proba(files), atol=1e-6)
    right = np.mean([name == file.parent.name for name, file in zip(loaded.predict(files), files, strict=True)])
    assert found.outcomes[0].all.value == pytest.approx(right)
    assert [step["method"] for step in loaded.history["steps"]] == ["train", method]
    again = Expansion.from_dict(loaded, loaded.scores["expansion"]["result"])
    assert again.as_table() == found.as_table()
    names = [row[0] for row in found.as_table()]
    if not any("stays as it was" in note for note in found.notes):
        assert f"{method} on features" in names
        assert loaded.history["expansions"][0]["unfreeze"] == "last"
        assert loaded.head_name == "linear"
    assert "naive" in " ".join(names)
    curves = found.outcomes[0].curves
    assert {len(values) for values in curves.values()} <= {len(curves["epochs"])} if curves else True
    assert not (tmp_path / "m.model.checkpoint").exists()


def test_naive_forgets_and_each_epoch_says_so(grow: Any, log: list[str]) -> None:
    found = grow("naive", params={"epochs": 8, "learning_rate": 1e-3, "patience": 0})
    curves = found.outcomes[0].curves
    assert curves["epochs"] == list(range(9))
    assert curves["old_accuracy"][0] > curves["old_accuracy"][-1]
    assert found.outcomes[0].old.value < found.before.value
    lines = [text for text in log if "; old classes " in text]
    assert len(lines) == 9
    assert lines[0].endswith(f"old classes {curves['old_accuracy'][0]:.3f}, new ones {curves['new_accuracy'][0]:.3f}")


def test_importances_are_kept_said_by_info_and_are_all_that_the_next_step_needs(
    grow: Any, home: Path, tmp_path: Path
) -> None:
    first = grow("ewc", "old", "new", out=tmp_path / "m.model", params=LEARNS)
    kept = first.model.kept
    assert all(name.startswith("backbone.layer3") for name in kept.network)
    assert kept.to_dict()["bytes"]["network"] == 4 * 1880 == sum(array.nbytes for array in kept.network.values())
    assert kept.importances.shape == (4, 11)
    shown = CliRunner().invoke(cli, ["info", str(tmp_path / "m.model")]).stdout
    assert f"importances of the network: {format_size(4 * 1880)}" in shown
    loaded = load_model(tmp_path / "m.model").attach(first.model.backbone)
    for name, array in kept.network.items():
        np.testing.assert_array_equal(loaded.kept.network[name], array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pictures.COLOURS, "eel", (90, 150, 150))
        more = str(pictures.write_photos(tmp_path / "more", 8, ("eel",), first=70_000))
    second = grow("ewc", more, of=loaded, params=LEARNS)
    assert second.model.classes == (*OLD, *NEW, "eel")
    assert second.model.kept.network.keys() == kept.network.keys()
    with pytest.raises(ConfigError, match=r"no importances of \d+ of the weights \(stem"):
        grow("ewc", more, of=loaded, unfreeze="all")
    bare = grow("ewc", "old", "new", keep="none", params=LEARNS)
    assert bare.model.kept is None
    with pytest.raises(ConfigError, match="ewc with --unfreeze needs importances of the network, and the model keeps"):
        grow("ewc", more, of=bare.model)


def test_an_interrupted_expansion_goes_on_to_the_same_model(grow: Any, tmp_path: Path, monkeypatch: Any) -> None:
    how = {"params": LEARNS, "out": tmp_path / "m.model"}
    whole = grow("ewc", "old", "new", **{**how, "out": tmp_path / "whole.model"})
    interrupt_fine_tuning(monkeypatch, after=3)
    with pytest.raises(KeyboardInterrupt):
        grow("ewc", "old", "new", **how)
    assert not (tmp_path / "m.model").exists()
    with pytest.raises(ConfigError, match=r"past.settings.strength is None, asked for 2.0.*--restart"):
        grow("ewc", "old", "new", **{**how, "params": {**LEARNS, "strength": 2.0}})
    resumed = grow("ewc", "old", "new", **how)
    assert resumed.model.backbone.digest == whole.model.backbone.digest
    np.testing.assert_array_equal(resumed.model.head[-1].coefs_[0], whole.model.head[-1].coefs_[0])
    assert resumed.outcomes[0].curves == whole.outcomes[0].curves
    assert not (tmp_path / "m.model.checkpoint").exists()
    written = (tmp_path / "m.model").stat().st_mtime_ns
    assert grow("ewc", "old", "new", **how).to_dict()["outcomes"] == resumed.to_dict()["outcomes"]
    assert (tmp_path / "m.model").stat().st_mtime_ns == written


def test_a_network_that_got_no_better_stays_and_the_model_is_that_of_features(grow: Any, model: Model) -> None:
    found = grow("distill", params={"learning_rate": 10.0, "epochs": 1, "clip": 0.0, "monitor": "loss"})
    assert found.notes[0].startswith("no epoch was better than the start")
    assert found.model.facts == model.facts
    features = grow("distill", unfreeze="head")
    assert [o.to_dict() | {"seconds": 0} for o in found.outcomes] == [
        o.to_dict() | {"seconds": 0} for o in features.outcomes
    ]


def test_the_next_step_is_like_any_other(grow: Any, home: Path, tmp_path: Path) -> None:
    found = grow("joint", "old", "new", keep="rows=3,statistics", params=LEARNS)
    assert np.bincount(found.model.kept.codes).tolist() == [3] * 4
    cache = featpipe.extract(home / "test", backbone=found.model.backbone, cache=home / "cache")
    fewer = found.model.expand((), drop=["ape"])
    assert set(fewer.predict_features(cache.X)) <= {"bee", "cow", "dog"}
    shutil.copytree(home / "old", tmp_path / "all")
    shutil.copytree(home / "new", tmp_path / "all", dirs_exist_ok=True)
    tuned = found.model.finetune(tmp_path / "all", cache=home / "cache", keep_worse=True, **{**QUICK, "epochs": 1})
    assert tuned.classes == found.model.classes


def test_old_images_are_replayed_that_are_known_by_their_bytes(
    grow: Any, home: Path, tmp_path: Path, log: list[str]
) -> None:
    for name in OLD:
        (tmp_path / "some" / name).mkdir(parents=True)
        for file in sorted((home / "old" / name).glob("*.png"))[:6]:
            shutil.copy(file, tmp_path / "some" / name / f"a-{file.name}")
    found = grow("replay", str(tmp_path / "some"), "new", memory=5)
    assert found.images["old"] == 12
    how = next(text for text in log if "to say when to stop" in text)
    trained, watched = (int(part.split()[0]) for part in how.split(", ")[:2])
    assert trained + watched == 2 * 5 + 24


def test_an_image_that_stands_for_others_weighs_as_much(model: Model) -> None:
    """The root of it, and the rest as an offset of its class, as on features."""
    d, random = int(model.head[-1].n_features_in_), np.random.default_rng(0)

    def side(codes: list[int], seed: int) -> LabeledEmbeddings:
        digests = np.random.default_rng(seed).integers(0, 256, (len(codes), 32), dtype=np.uint8)
        return LabeledEmbeddings(random.normal(size=(len(codes), d)).astype(np.float32), np.array(codes), digests)

    old, new = side([0] * 5 + [1] * 5, 1), side([2] * 10, 2)
    kept = ReplayMemory(np.array([45, 20, 0]), np.zeros((0, d), np.float32), np.zeros(0, np.int32))
    step = IncrementalStep(
        model.head, 1.0, ClassMapping.from_labels(OLD, ["cow"]), kept, new, old, False, ExpansionConfig(memory=5)
    )
    lesson = make_replay_dataset(step, "replay", 0.2)
    assert sorted(lesson.represented_counts.tolist()) == [1.0] * 10 + [4.0] * 5 + [9.0] * 5
    past = lesson.make_regularizers(np.arange(20), 25, 1.0)
    assert past.sample_weights[:20][lesson.is_train].mean() == pytest.approx(1)
    ninth, first = (int(np.flatnonzero(lesson.represented_counts == n)[0]) for n in (9, 1))
    assert past.sample_weights[ninth] / past.sample_weights[first] == pytest.approx(3)
    np.testing.assert_allclose(past.logit_adjustment, [-0.5 * np.log(9), -0.5 * np.log(4), 0])
    assert lesson.step.replay_memory.counts.tolist() == [45, 20, 0]
    np.testing.assert_allclose(
        past.distillation.teacher_scores[:20].numpy(), step.compute_old_scores(lesson.pool.X), rtol=1e-5, atol=1e-6
    )


def test_the_pull_is_to_the_old_layer_whatever_is_added_to_all_of_its_rows() -> None:
    """Where training starts at the old rows, all of them moved by the same, nothing pulls."""
    random = np.random.default_rng(0)
    W, b = random.normal(size=(3, 5)), random.normal(size=3)
    before = HeadLayers((W,), (b,))
    new = np.vstack([W, random.normal(size=(1, 5))]), np.append(b, 0.3)
    start = HeadLayers((new[0],), (new[1],)).center_logits()
    known = {"head.0.weight": np.ones((4, 5), np.float32), "head.0.bias": np.ones(4, np.float32)}
    anchor = make_ewc_penalty(start, before.center_logits(), known, 1.0, nn.Identity())
    parameters = {f"head.{name}": parameter for name, parameter in start.to_module().named_parameters()}
    with torch.no_grad():
        assert float(anchor.compute(parameters)) < 1e-12
        parameters["head.0.weight"][0, 0] += 0.1
        assert float(anchor.compute(parameters)) == pytest.approx(0.5 * 0.1**2, rel=1e-4)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "data", "how", "problem"),
    [
        ("statistics", "new", {}, "statistics is sums over embeddings, and a network that is trained gives others"),
        ("frozen-old", "new", {}, "frozen-old keeps the old scores bit for bit, and a network that is trained moves"),
        ("all", "new", {}, "all compares methods on features.*What works with --unfreeze: joint, replay, distill"),
        (
            "joint",
            "new",
            {},
            "joint needs the images that the model was trained on, and there are none of 'ape', 'bee'",
        ),
        (
            "replay",
            "new",
            {},
            "kept rows are embeddings, which cannot go through the network again.*an archive with 20",
        ),
        ("ewc", "new", {}, "needs importances of the network, and the model keeps none"),
        ("distill", "new", {"unfreeze": "layer9"}, "unknown part of the network 'layer9'; did you mean"),
        ("distill", "new", {"params": {"epoch": 3}}, "unknown setting 'epoch'; did you mean 'epochs'"),
        ("distill", "new", {"params": {"temperature": 0}}, "temperature"),
        ("distill", "new", {"params": {"weights": "none"}}, "weights is for `featpipe finetune`"),
        ("distill", "new", {"keep": "network,rows=x"}, "keep is 'network,rows=x'"),
        ("distill", "new", {"unfreeze": "head", "keep": "network"}, "embeddings do not; keep them where"),
        ("distill", "new", {"unfreeze": "head", "params": {"batch": 8}}, "unknown setting 'batch'"),
        ("distill", "old", {}, "no class is new: nothing to learn"),
        ("distill", "new", {"calibration": "old"}, "--calibration is for a network that stays as it is"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(method: str, data: str, how: Any, problem: str, grow: Any) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        grow(method, data, **how)
    assert "\n" not in str(caught.value)


def test_a_cache_has_no_pictures(home: Path, model: Model, ladder: Any) -> None:
    cache = featpipe.extract(home / "new", backbone=ladder, cache=home / "cache")
    for given in (cache, cache.path):
        with pytest.raises(ConfigError, match=r"is a cache, and --unfreeze trains on pictures.*give the archives"):
            expand(model, given, method="distill", unfreeze="last")


def test_too_few_images_to_say_when_to_stop(home: Path, grow: Any, tmp_path: Path) -> None:
    (tmp_path / "few" / "cow").mkdir(parents=True)
    for file in sorted((home / "new" / "cow").glob("*.png"))[:2]:
        shutil.copy(file, tmp_path / "few" / "cow")
    with pytest.raises(ConfigError, match="no class has 3 images to train on, of which some say when to stop"):
        grow("distill", str(tmp_path / "few"))


def test_a_head_that_is_no_layer_needs_old_images(home: Path, grow: Any, ladder: Any, log: list[str]) -> None:
    cache = featpipe.extract(home / "old", backbone=ladder, cache=home / "cache")
    knn = featpipe.train(cache, "knn", cv=0).attach(ladder)
    with pytest.raises(ConfigError, match=r"is for heads that end in a softmax layer.*KNeighborsClassifier"):
        grow("distill", of=knn)
    grow("joint", "old", "new", of=knn)
    assert any("knn is no layer of a network" in text for text in log)


def test_what_is_kept_of_the_network_is_checked(home: Path, ladder: Any) -> None:
    cache = featpipe.extract(home / "old", backbone=ladder, cache=home / "cache")
    with pytest.raises(ConfigError, match=r"keep=network: .* `featpipe expand --unfreeze`"):
        featpipe.train(cache, keep="network")
    known = {"backbone.x": np.ones(3, np.float32)}
    kept = ReplayMemory(np.array([3, 4]), np.zeros((0, 2), np.float32), np.zeros(0, np.int32), network=known)
    np.testing.assert_array_equal(ReplayMemory.from_bytes(kept.to_bytes(), 2).network["backbone.x"], np.ones(3))
    for bad in (-np.ones(3, np.float32), np.full(3, np.nan, np.float32)):
        with pytest.raises(ValueError, match="kept importances of the network are no numbers"):
            ReplayMemory.from_bytes(replace(kept, network={"backbone.x": bad}).to_bytes(), 2)
