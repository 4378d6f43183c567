"""A learning rate to begin with, from a few batches."""

from __future__ import annotations

import math

import torch

from featpipe.errors import ConfigError
from featpipe.finetuning.job import Job
from featpipe.finetuning.loop import NotFinite, gradients, step
from featpipe.finetuning.source import ahead
from featpipe.finetuning.state import State, copied, put
from featpipe.progress import Progress

__all__ = ["found_rate"]

LOWEST, HIGHEST = 1e-6, 1.0
TRIES = 60
SMOOTHING = 0.9
DIVERGED = 3.0  # times the lowest loss so far
SAFELY_BELOW = 10.0  # Smith 2017 takes a rate well below where the loss is lowest


def found_rate(job: Job) -> float:
    """The rate a tenth of that at which the loss, smoothed, is lowest while the rate grows from batch to batch.

    The network is afterwards as it was.

    Raises
    ------
    ConfigError
        If no rate makes the loss smaller.
    """
    before, state = copied(job.kept()), State.begun(job, LOWEST)
    active = job.thaw(job.tuning.epochs)
    batches = [rows for epoch in range(-(-TRIES // job.steps)) for rows in job.batches(epoch)][:TRIES]
    smoothed, lowest, rate_of_lowest, first = 0.0, math.inf, LOWEST, math.inf
    with torch.random.fork_rng(enabled=True):
        for number, (rows, inputs) in enumerate(ahead(job.source, [job.world.share(rows) for rows in batches], 0)):
            rate = LOWEST * (HIGHEST / LOWEST) ** (number / max(1, len(batches) - 1))
            for group in state.optimizer.param_groups:
                group["lr"] = rate * group["share"]
            torch.manual_seed(number)
            try:
                with job.training():
                    loss, norm = gradients(job, state, rows, inputs, len(batches[number]))
                step(state, active, loss, norm, job.tuning.clip)
            except NotFinite:
                break
            smoothed = SMOOTHING * smoothed + (1 - SMOOTHING) * loss
            seen = smoothed / (1 - SMOOTHING ** (number + 1))
            first = min(first, seen) if number == 0 else first
            if seen < lowest:
                lowest, rate_of_lowest = seen, rate
            if seen > DIVERGED * lowest:
                break
            job.progress(Progress("bar", "looking for a learning rate", number + 1, len(batches), "batches"))
    put(job, before)
    if not lowest < first:
        raise ConfigError("no learning rate made the loss smaller; give one with --learning-rate, or freeze less")
    found = rate_of_lowest / SAFELY_BELOW
    job.progress(Progress("note", f"learning rate {found:.2g}: the loss was lowest at {rate_of_lowest:.2g}"))
    return found
