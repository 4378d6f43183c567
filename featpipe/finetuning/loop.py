"""The training loop: epoch, batch, forward, loss, backward, step; evaluate, record, checkpoint."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import monotonic
from types import FrameType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featpipe.errors import ConfigError
from featpipe.finetuning.augmentation import BatchMix, apply_mixup_cutmix
from featpipe.finetuning.batches import TrainingDataset, prefetch_batches
from featpipe.finetuning.optim import schedule_factor
from featpipe.finetuning.trainer import EpochRecord, Trainer, TrainingState, load_weights
from featpipe.runtime import Progress

logger = logging.getLogger(__name__)

CHECKPOINT_INTERVAL_SECONDS = 120.0
MAX_EVALUATION_BATCH = 64
MIN_GRADIENT_SCALE = 1.0  # of float16 gradients: with a lower scale, infinite gradients are not overflow

SaveCallback = Callable[[TrainingState], None]


class NonFiniteError(Exception):
    """A loss or gradient is NaN or infinite."""


def run_training_loop(trainer: Trainer, state: TrainingState, save: SaveCallback = lambda state: None) -> TrainingState:
    """Train until the last epoch, or until the validation metric stops improving; then restore the best weights.

    Parameters
    ----------
    trainer : Trainer
    state : TrainingState
        New, or loaded from a checkpoint.
    save : callable
        Called with the state every two minutes, after each epoch, and on an interrupt.

    Raises
    ------
    KeyboardInterrupt
        If the training was interrupted; the state was saved.
    """
    tuning = trainer.tuning
    with defer_signals() as stop_request, torch.random.fork_rng(enabled=True):
        if not state.curve:
            _record_epoch(trainer, state, math.nan, 0.0)
        for epoch in range(state.epoch, tuning.epochs):
            if tuning.patience and state.epochs_without_improvement >= tuning.patience:
                break
            try:
                _train_epoch(trainer, state, save, stop_request)
            except NonFiniteError as error:
                _warn_of_non_finite(trainer, state, str(error))
                break
            rate, loss = state.optimizer.param_groups[0]["lr"], state.loss / state.seen
            state.epoch, state.step, state.loss, state.seen = epoch + 1, 0, 0.0, 0
            _record_epoch(trainer, state, loss, rate)
            save(state)
            if trainer.distributed.all_reduce_any(stop_request.requested):
                raise KeyboardInterrupt
    load_weights(trainer, state.best_weights)
    return state


def _train_epoch(trainer: Trainer, state: TrainingState, save: SaveCallback, stop_request: StopRequest) -> None:
    """The remaining steps of an epoch.

    Raises
    ------
    NonFiniteError
        If a loss or a gradient is NaN or infinite; the step was not done.
    KeyboardInterrupt
    """
    tuning, epoch, first_step = trainer.tuning, state.epoch, state.epoch * trainer.steps_per_epoch
    last_save_time, total_steps = monotonic(), tuning.epochs * trainer.steps_per_epoch
    active_parameters, batches = trainer.unfreeze_for_epoch(epoch), trainer.epoch_batches(epoch)
    local_batches = [trainer.distributed.shard(rows) for rows in batches]
    for rows, inputs in prefetch_batches(trainer.train_data, local_batches, epoch, state.step):
        step, batch_size = first_step + state.step, len(batches[state.step])
        for group in state.optimizer.param_groups:
            group["lr"] = state.rate * group["share"] * schedule_factor(step, total_steps, tuning)
        torch.manual_seed(_step_seed(tuning.seed, epoch, state.step, trainer.distributed.rank))
        with trainer.training_mode():
            loss, gradient_norm = compute_gradients(trainer, state, rows, inputs, batch_size)
        optimizer_step(state, active_parameters, loss, gradient_norm, tuning.clip)
        if state.ema_weights:
            state.update_ema(trainer, step)
        state.loss += loss * batch_size
        state.seen += batch_size
        state.step += 1
        trainer.progress(Progress(f"epoch {epoch + 1}", state.seen, len(trainer.train_rows)))
        if trainer.distributed.all_reduce_any(stop_request.requested):
            save(state)
            raise KeyboardInterrupt
        if monotonic() - last_save_time > CHECKPOINT_INTERVAL_SECONDS:
            save(state)
            last_save_time = monotonic()


def _record_epoch(trainer: Trainer, state: TrainingState, loss: float, rate: float) -> None:
    validation_loss, validation_score = evaluate_validation(trainer, state)
    metrics = evaluate_monitors(trainer, state)
    epoch = EpochRecord(state.epoch, loss, validation_loss, validation_score, rate, metrics)
    state.record_epoch(epoch, trainer)
    heading = "before training" if epoch.number == 0 else f"epoch {epoch.number}: loss {epoch.loss:.4f}"
    text = f"{heading}; validation loss {validation_loss:.4f}, score {validation_score:.4f}"
    monitor_text = ", ".join(
        f"{name} {values['score']:.3f}" for name, values in metrics.items() if math.isfinite(values["score"])
    )
    logger.info(f"{text}; {monitor_text}" if monitor_text else text)
    if trainer.epoch_callback is not None:
        trainer.epoch_callback(epoch)


def _warn_of_non_finite(trainer: Trainer, state: TrainingState, reason: str) -> None:
    names = [trainer.sample_ids[int(row)] for row in trainer.epoch_batches(state.epoch)[state.step]]
    more_text = f" and {len(names) - 8} more" if len(names) > 8 else ""
    logger.warning(
        f"epoch {state.epoch + 1}, step {state.step + 1}: {reason} in the batch of {', '.join(names[:8])}{more_text}; "
        f"stopped, with the weights of epoch {state.best_epoch.number}; a lower --learning-rate may help"
    )


def compute_gradients(
    trainer: Trainer, state: TrainingState, rows: NDArray[np.int64], inputs: Tensor, global_batch_size: int
) -> tuple[float, Tensor]:
    """Compute the gradients of the mean loss of a batch; return the loss and the norm of all gradients.

    If memory runs out, the batch is divided into more pieces, whose gradients add up to the same.

    Parameters
    ----------
    trainer : Trainer
    state : TrainingState
    rows : ndarray of shape (b,), int64
        This process's share of the batch.
    inputs : Tensor of shape (b, …)
    global_batch_size : int
        Rows of the batch in all processes.
    """
    inputs, mix = apply_mixup_cutmix(trainer.to_device(inputs), trainer.tuning)
    while True:
        state.optimizer.zero_grad(set_to_none=True)
        try:
            total_loss = torch.zeros((), device=trainer.device)
            for micro_batch in np.array_split(np.arange(len(rows)), min(state.pieces, max(1, len(rows)))):
                if len(micro_batch):
                    loss = _compute_micro_batch_loss(trainer, rows, inputs, mix, micro_batch) / global_batch_size
                    state.scaler.scale(loss).backward()
                    total_loss += loss.detach()
            break
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            _increase_pieces(trainer, state, rows, error)
    if (penalty := trainer.penalty()) is not None:
        penalty = penalty / trainer.distributed.size
        state.scaler.scale(penalty).backward()
        total_loss += penalty.detach()
    active_parameters = [p for group in state.optimizer.param_groups for p in group["params"] if p.requires_grad]
    for parameter in active_parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    trainer.distributed.all_reduce_sum([*(p.grad for p in active_parameters if p.grad is not None), total_loss])
    state.scaler.unscale_(state.optimizer)
    return float(total_loss), torch.nn.utils.get_total_norm([p.grad for p in active_parameters if p.grad is not None])


def _compute_micro_batch_loss(
    trainer: Trainer, rows: NDArray[np.int64], inputs: Tensor, mix: BatchMix, micro_batch: NDArray[np.int64]
) -> Tensor:
    """The weighted loss, summed over some rows of a batch."""
    scores = trainer.compute_scores(trainer.train_data, inputs[torch.from_numpy(micro_batch)])

    def weighted_loss(loss_rows: NDArray[np.int64]) -> Tensor:
        weights = trainer.targets.select(loss_rows, trainer.device)[1]
        return (_compute_row_losses(trainer, scores, loss_rows, trainer.tuning.label_smoothing) * weights).sum()

    loss = weighted_loss(rows[micro_batch])
    if mix.partner is None:
        return loss
    return mix.lam * loss + (1 - mix.lam) * weighted_loss(rows[mix.partner[micro_batch]])


def _compute_row_losses(
    trainer: Trainer, scores: Tensor, rows: NDArray[np.int64], label_smoothing: float = 0.0
) -> Tensor:
    """The loss of each row, shape (b,), with the trainer's loss terms."""
    losses = trainer.loss_function.per_row_loss(scores, trainer.targets.select(rows, scores.device)[0], label_smoothing)
    losses = losses.mean(dim=1) if losses.ndim == 2 else losses
    for term in trainer.loss_terms:
        losses = losses + term.row_losses(scores, rows)
    return losses


def optimizer_step(
    state: TrainingState, active_parameters: tuple[Tensor, ...], loss: float, gradient_norm: Tensor, max_norm: float
) -> None:
    """One step of the optimizer, with the gradient norm clipped to ``max_norm``; 0 does not clip.

    Raises
    ------
    NonFiniteError
        If the loss or a gradient is NaN or infinite. If float16 gradients overflow, the step is skipped instead, and
        the next one is scaled down.
    """
    if not np.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss}")
    may_overflow = state.scaler.is_enabled() and state.scaler.get_scale() > MIN_GRADIENT_SCALE
    if not torch.isfinite(gradient_norm) and not may_overflow:
        raise NonFiniteError("the gradient is not finite")
    if max_norm and max_norm < gradient_norm < torch.inf:
        torch.nn.utils.clip_grads_with_norm_(active_parameters, max_norm, gradient_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def evaluate_validation(trainer: Trainer, state: TrainingState) -> tuple[float, float]:
    """Loss and score on the validation rows, without augmentation; the loss includes the loss terms."""
    with state.use_ema_weights(trainer), torch.no_grad():
        scores = predict_scores(trainer, trainer.validation_data, trainer.validation_rows)
        penalty = trainer.penalty()
    Y, weights = trainer.targets.select(trainer.validation_rows, torch.device("cpu"))
    loss = (_compute_row_losses(trainer, scores, trainer.validation_rows) * weights).sum() / weights.sum() + (
        0.0 if penalty is None else float(penalty)
    )
    variance = Y.var(dim=0, correction=0) if trainer.loss_function.link == "identity" else None
    return float(loss), float(trainer.loss_function.row_scores(scores, Y, variance).mean())


def evaluate_monitors(trainer: Trainer, state: TrainingState) -> dict[str, dict[str, float]]:
    """Mean loss and score of each monitor: of the task alone, without loss terms, weights and logit adjustment."""
    all_rows = np.unique(np.concatenate([np.zeros(0, np.int64), *trainer.monitors.values()]))
    if not len(all_rows):
        return {}
    with state.use_ema_weights(trainer):
        scores = predict_scores(trainer, trainer.validation_data, all_rows)
    Y, task_loss = trainer.targets.select(all_rows, scores.device)[0], replace(trainer.loss_function, adjustment=None)
    variance = Y.var(dim=0, correction=0) if task_loss.link == "identity" else None
    losses, row_scores = task_loss.per_row_loss(scores, Y), task_loss.row_scores(scores, Y, variance)
    metrics = {}
    for name, rows in trainer.monitors.items():
        positions = torch.from_numpy(np.searchsorted(all_rows, rows))
        metrics[name] = {
            "loss": float(losses[positions].mean()),
            "score": float(row_scores[positions].double().mean()),
        }
    return metrics


@torch.no_grad()
def predict_scores(trainer: Trainer, dataset: TrainingDataset, rows: NDArray[np.int64]) -> Tensor:
    """Outputs of the network for some rows, shape (m, k), on the CPU; each process computes its share."""
    trainer.network.eval()
    trainer.head.eval()
    local_indices = trainer.distributed.shard(np.arange(len(rows)))
    n_batches = -(-len(local_indices) // MAX_EVALUATION_BATCH)
    index_batches = np.array_split(local_indices, n_batches) if n_batches else []
    batches = prefetch_batches(dataset, [rows[indices] for indices in index_batches], 0)
    scores = torch.zeros(len(rows), trainer.n_outputs, device=trainer.device)
    for indices, (_, inputs) in zip(index_batches, batches, strict=True):
        scores[torch.from_numpy(indices)] = trainer.compute_scores(dataset, trainer.to_device(inputs))
    trainer.distributed.all_reduce_sum([scores])
    return scores.cpu()


def _step_seed(*numbers: int) -> int:
    """A seed for each step, so that a resumed run draws the same random numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; on a CPU, torch raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        message in str(error) for message in ("not enough memory", "can't allocate memory")
    )


def _increase_pieces(trainer: Trainer, state: TrainingState, rows: NDArray[np.int64], error: BaseException) -> None:
    min_rows = 2 if trainer.updates_batch_norm else 1  # a batch of one has no statistics
    max_pieces = len(rows) // min_rows
    if state.pieces >= max_pieces:
        count_text = "one image" if min_rows == 1 else "two images"
        raise ConfigError(
            f"there is not enough memory to train on {count_text} at a time ({error}); unfreeze less, or "
            "give --precision bf16"
        ) from error
    state.pieces = min(2 * state.pieces, max_pieces)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    consequence = "each with its own batch statistics" if trainer.updates_batch_norm else "with the same gradients"
    text = f"memory ran out: batches of {trainer.tuning.batch} are computed in {state.pieces} pieces, {consequence}"
    logger.warning(text)


def make_tensorboard_logger(folder: str | os.PathLike[str]) -> Callable[[EpochRecord], None]:
    """A function that writes an epoch's metrics into a TensorBoard folder.

    Raises
    ------
    ConfigError
        If TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            f"{folder}: TensorBoard is not installed; pip install tensorboard, or omit --tensorboard"
        ) from None

    def log_epoch(epoch: EpochRecord) -> None:
        with SummaryWriter(os.fspath(folder)) as writer:
            document = epoch.to_dict()
            number, metrics = document.pop("number"), document.pop("metrics", {})
            for monitor, values in metrics.items():
                document |= {f"{monitor}/{name}": value for name, value in values.items()}
            for name, value in document.items():
                if value is not None:
                    writer.add_scalar(name, value, number)

    return log_epoch


@dataclass
class StopRequest:
    """Whether a signal has requested a stop."""

    requested: bool = False


@contextmanager
def defer_signals() -> Iterator[StopRequest]:
    """Defer the first SIGINT or SIGTERM; the second one interrupts at once. Does nothing outside the main thread."""
    stop_request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop_request
        return
    previous_handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle_signal(number: int, frame: FrameType | None) -> None:
        if stop_request.requested:
            raise KeyboardInterrupt
        stop_request.requested = True

    for number in previous_handlers:
        signal.signal(number, handle_signal)
    try:
        yield stop_request
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
