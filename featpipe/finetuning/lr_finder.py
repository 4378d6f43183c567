"""Learning rate finder (Smith 2017)."""

from __future__ import annotations

import logging
import math

import torch

from featpipe.errors import ConfigError
from featpipe.finetuning.batches import prefetch_batches
from featpipe.finetuning.loop import NonFiniteError, compute_gradients, optimizer_step
from featpipe.finetuning.trainer import Trainer, TrainingState, clone_tensors, load_weights
from featpipe.runtime import Progress

logger = logging.getLogger(__name__)

MIN_TRIED_RATE, MAX_TRIED_RATE = 1e-6, 1.0
MAX_FINDER_STEPS = 60
LOSS_SMOOTHING = 0.9
DIVERGENCE_RATIO = 3.0  # stop when the loss exceeds this multiple of the lowest
RATE_DIVISOR = 10.0  # Smith 2017 uses a rate well below the one with the lowest loss


def find_learning_rate(trainer: Trainer) -> float:
    """A tenth of the rate with the lowest smoothed loss, while the rate grows exponentially from batch to batch.

    The network's weights are restored afterwards.

    Raises
    ------
    ConfigError
        If no rate reduces the loss.
    """
    initial_weights, state = clone_tensors(trainer.trained_tensors()), TrainingState.init(trainer, MIN_TRIED_RATE)
    active_parameters = trainer.unfreeze_for_epoch(trainer.tuning.epochs)
    batches = [
        rows
        for epoch in range(-(-MAX_FINDER_STEPS // trainer.steps_per_epoch))
        for rows in trainer.epoch_batches(epoch)
    ][:MAX_FINDER_STEPS]
    smoothed_loss, lowest_loss, lowest_loss_rate, first_loss = 0.0, math.inf, MIN_TRIED_RATE, math.inf
    with torch.random.fork_rng(enabled=True):
        for step_index, (rows, inputs) in enumerate(
            prefetch_batches(trainer.train_data, [trainer.distributed.shard(rows) for rows in batches], 0)
        ):
            rate = MIN_TRIED_RATE * (MAX_TRIED_RATE / MIN_TRIED_RATE) ** (step_index / max(1, len(batches) - 1))
            for group in state.optimizer.param_groups:
                group["lr"] = rate * group["share"]
            torch.manual_seed(step_index)
            try:
                with trainer.training_mode():
                    loss, gradient_norm = compute_gradients(trainer, state, rows, inputs, len(batches[step_index]))
                optimizer_step(state, active_parameters, loss, gradient_norm, trainer.tuning.clip)
            except NonFiniteError:
                break
            smoothed_loss = LOSS_SMOOTHING * smoothed_loss + (1 - LOSS_SMOOTHING) * loss
            corrected_loss = smoothed_loss / (1 - LOSS_SMOOTHING ** (step_index + 1))
            first_loss = min(first_loss, corrected_loss) if step_index == 0 else first_loss
            if corrected_loss < lowest_loss:
                lowest_loss, lowest_loss_rate = corrected_loss, rate
            if corrected_loss > DIVERGENCE_RATIO * lowest_loss:
                break
            trainer.progress(Progress("finding a learning rate", step_index + 1, len(batches), "batches"))
    load_weights(trainer, initial_weights)
    if not lowest_loss < first_loss:
        raise ConfigError("no learning rate reduced the loss; give one with --learning-rate, or unfreeze more")
    learning_rate = lowest_loss_rate / RATE_DIVISOR
    logger.info(f"learning rate {learning_rate:.2g}: the loss was lowest at {lowest_loss_rate:.2g}")
    return learning_rate
