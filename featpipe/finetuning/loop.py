"""The loop: epoch, batch, forward, loss, backward, step; evaluate, record, checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featpipe.errors import ConfigError
from featpipe.finetuning.blending import Blend, blended
from featpipe.finetuning.interrupts import between_steps
from featpipe.finetuning.job import Job
from featpipe.finetuning.rates import factor
from featpipe.finetuning.source import Source, ahead
from featpipe.finetuning.state import Epoch, State, put
from featpipe.progress import Progress

__all__ = ["NotFinite", "answers", "fine_tune", "gradients"]

SECONDS_BETWEEN_SAVES = 120.0
JUDGED_AT_ONCE = 64
LEAST_SCALE = 1.0  # of float16 gradients: below it, it is not the scale that is too large

Save = Callable[[State], None]


class NotFinite(Exception):
    """A loss or a gradient that is no number."""


def fine_tune(job: Job, state: State, save: Save = lambda state: None) -> State:
    """Train until the last epoch, or until validation no longer gets better; then the best weights are put back.

    Parameters
    ----------
    job : Job
    state : State
        Just begun, or as it was saved.
    save : callable
        Told the state now and then, after each epoch, and when the work is interrupted.

    Raises
    ------
    KeyboardInterrupt
        If the work was interrupted; the state was saved.
    """
    tuning, steps = job.tuning, job.steps
    saved = monotonic()
    with between_steps() as asked, torch.random.fork_rng(enabled=True):
        if not state.curve:
            state.record(Epoch(0, float("nan"), *judged(job, state), **both_sides(job, state)), job)
            _tell(job, state)
        for epoch in range(state.epoch, tuning.epochs):
            if tuning.patience and state.waited >= tuning.patience:
                break
            active, batches = job.thaw(epoch), job.batches(epoch)
            shares = [job.world.share(rows) for rows in batches]
            for rows, inputs in ahead(job.source, shares, epoch, state.step):
                done = epoch * steps + state.step
                for group in state.optimizer.param_groups:
                    group["lr"] = state.rate * group["share"] * factor(done, tuning.epochs * steps, tuning)
                torch.manual_seed(_seed(tuning.seed, epoch, state.step, job.world.rank))
                try:
                    with job.training():
                        loss, norm = gradients(job, state, rows, inputs, len(batches[state.step]))
                    step(state, active, loss, norm, tuning.clip)
                except NotFinite as reason:
                    return _stopped(job, state, batches[state.step], str(reason))
                if state.average:
                    state.follow(job, done)
                state.loss += loss * len(batches[state.step])
                state.seen += len(batches[state.step])
                state.step += 1
                job.progress(Progress("bar", f"epoch {epoch + 1}", state.seen, len(job.train)))
                if job.world.agree(asked.to_stop):
                    save(state)
                    raise KeyboardInterrupt
                if monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    save(state)
                    saved = monotonic()
            rate = state.optimizer.param_groups[0]["lr"]
            told = (*judged(job, state), rate)
            state.record(Epoch(epoch + 1, state.loss / state.seen, *told, **both_sides(job, state)), job)
            state.epoch, state.step, state.loss, state.seen = epoch + 1, 0, 0.0, 0
            _tell(job, state)
            save(state)
            if job.world.agree(asked.to_stop):
                raise KeyboardInterrupt
    put(job, state.best)
    return state


def gradients(job: Job, state: State, rows: NDArray[np.int64], inputs: Tensor, whole: int) -> tuple[float, Tensor]:
    """The gradients of the mean loss of a batch, and how long they are together.

    Where the memory is not enough, the batch is divided into more pieces, whose gradients add up to the same.

    Parameters
    ----------
    rows : ndarray of shape (b,), int64
        Of this process.
    inputs : Tensor of shape (b, …)
    whole : int
        Rows of the batch in all processes.
    """
    layout = torch.channels_last if inputs.ndim == 4 else torch.preserve_format
    inputs, blend = blended(inputs.to(job.device, memory_format=layout), job.tuning)
    while True:
        state.optimizer.zero_grad(set_to_none=True)
        try:
            total = torch.zeros((), device=job.device)
            for piece in np.array_split(np.arange(len(rows)), min(state.pieces, max(1, len(rows)))):
                if len(piece):
                    loss = _loss(job, rows, inputs, blend, piece) / whole
                    state.scaler.scale(loss).backward()
                    total += loss.detach()
            break
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_memory(error):
                raise
            _divide(job, state, rows, error)
    if (pull := job.pull()) is not None:
        pull = pull / job.world.size
        state.scaler.scale(pull).backward()
        total += pull.detach()
    active = [p for group in state.optimizer.param_groups for p in group["params"] if p.requires_grad]
    for parameter in active:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    job.world.add_up([*(p.grad for p in active if p.grad is not None), total])
    state.scaler.unscale_(state.optimizer)
    return float(total), torch.nn.utils.get_total_norm([p.grad for p in active if p.grad is not None])


def _loss(job: Job, rows: NDArray[np.int64], inputs: Tensor, blend: Blend, piece: NDArray[np.int64]) -> Tensor:
    """Summed over some rows of a batch."""
    scores = job.scores(job.source, inputs[torch.from_numpy(piece)])

    def of(chosen: NDArray[np.int64]) -> Tensor:
        weights = job.targets.of(chosen, job.device)[1]
        return (_each(job, scores, chosen, job.tuning.label_smoothing) * weights).sum()

    loss = of(rows[piece])
    return loss if blend.partner is None else blend.share * loss + (1 - blend.share) * of(rows[blend.partner[piece]])


def _each(job: Job, scores: Tensor, rows: NDArray[np.int64], smoothing: float = 0.0) -> Tensor:
    """The loss of each row, shape (b,), with what ties its answer to the one of the model before."""
    each = job.objective.each(scores, job.targets.of(rows, scores.device)[0], smoothing)
    each = each.mean(dim=1) if each.ndim == 2 else each
    return each if job.past is None or job.past.teacher is None else each + job.past.teacher.each(scores, rows)


def step(state: State, active: tuple[Tensor, ...], loss: float, norm: Tensor, clip: float) -> None:
    """One step of the optimizer, with gradients that are not too long.

    Raises
    ------
    NotFinite
        If the loss or a gradient is no number. float16 gradients that overflow are no such case: the step is left out
        and the next one scaled down.
    """
    if not np.isfinite(loss):
        raise NotFinite(f"the loss is {loss}")
    overflows = state.scaler.is_enabled() and state.scaler.get_scale() > LEAST_SCALE
    if not torch.isfinite(norm) and not overflows:
        raise NotFinite("the gradient is not finite")
    if clip and clip < norm < torch.inf:
        torch.nn.utils.clip_grads_with_norm_(active, clip, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def judged(job: Job, state: State) -> tuple[float, float]:
    """Loss and score on the validation rows, without augmentation; the loss is of what is trained for."""
    with state.averaged(job), torch.no_grad():
        scores = answers(job, job.watched, job.validation)
        pull = job.pull()
    Y, weights = job.targets.of(job.validation, torch.device("cpu"))
    loss = (_each(job, scores, job.validation) * weights).sum() / weights.sum() + (0.0 if pull is None else float(pull))
    variance = Y.var(dim=0, correction=0) if job.objective.link == "identity" else None
    return float(loss), float(job.objective.right(scores, Y, variance).mean())


def both_sides(job: Job, state: State) -> dict[str, float]:
    """Cross-entropy and share of right answers on rows of old and of new classes, where classes have come."""
    if job.past is None or not len(job.beside):
        return {}
    with state.averaged(job):
        scores = answers(job, job.watched, job.beside)
    found: dict[str, float] = {}
    Y = job.targets.of(job.beside, scores.device)[0]
    losses, right = torch.nn.functional.cross_entropy(scores, Y, reduction="none"), scores.argmax(dim=1) == Y
    for side, rows in (("old", job.past.k_old > Y), ("new", job.past.k_old <= Y)):
        found |= {f"{side}_loss": float(losses[rows].mean()), f"{side}_score": float(right[rows].double().mean())}
    return found


@torch.no_grad()
def answers(job: Job, source: Source, rows: NDArray[np.int64]) -> Tensor:
    """What the network answers for some rows, shape (m, k), on the CPU; each process computes its share."""
    job.network.eval()
    job.head.eval()
    mine = job.world.share(np.arange(len(rows)))
    parts = np.array_split(mine, -(-len(mine) // JUDGED_AT_ONCE)) if len(mine) else []
    found = torch.zeros(len(rows), job.outputs, device=job.device)
    for part, (_, inputs) in zip(parts, ahead(source, [rows[part] for part in parts], 0), strict=True):
        found[torch.from_numpy(part)] = job.scores(source, inputs.to(job.device))
    job.world.add_up([found])
    return found.cpu()


def _seed(*numbers: int) -> int:
    """A seed of its own for each step, so that a run that goes on draws as one that never stopped."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _is_memory(error: BaseException) -> bool:
    """Whether memory ran out; on a CPU torch raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("not enough memory", "can't allocate memory")
    )


def _divide(job: Job, state: State, rows: NDArray[np.int64], error: BaseException) -> None:
    least = 2 if job.follows else 1  # of a batch of one there are no statistics
    most = len(rows) // least
    if state.pieces >= most:
        number = "one image" if least == 1 else "two images"
        raise ConfigError(
            f"there is not enough memory to train on {number} at a time ({error}); unfreeze less, or "
            "take --precision bf16"
        ) from error
    state.pieces = min(2 * state.pieces, most)
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    same = "each with batch statistics of its own" if job.follows else "with the same gradients"
    text = f"memory ran out: batches of {job.tuning.batch} are computed in {state.pieces} pieces, {same}"
    job.progress(Progress("warning", text))


def _stopped(job: Job, state: State, rows: NDArray[np.int64], reason: str) -> State:
    """The best weights so far, and which images it was."""
    names = [job.ids[int(row)] for row in rows]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    where = f"epoch {state.epoch + 1}, step {state.step + 1}"
    text = f"{where}: {reason} in the batch of {', '.join(names[:8])}{more}; stopped, with the weights of epoch "
    job.progress(Progress("warning", f"{text}{state.best_epoch.number}; a lower --learning-rate may help"))
    put(job, state.best)
    return state


def _tell(job: Job, state: State) -> None:
    epoch = state.curve[-1]
    loss = "before training" if epoch.number == 0 else f"epoch {epoch.number}: loss {epoch.loss:.4f}"
    text = f"{loss}; validation loss {epoch.validation_loss:.4f}, score {epoch.validation_score:.4f}"
    sides = {"old classes": epoch.old_score, "new ones": epoch.new_score}
    shown = [f"{side} {score:.3f}" for side, score in sides.items() if score is not None and math.isfinite(score)]
    text += f"; {', '.join(shown)}" if shown else ""
    job.progress(Progress("note", text))
    if job.board is not None:
        job.board(epoch)
