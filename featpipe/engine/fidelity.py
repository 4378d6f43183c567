"""The fastest precision whose embeddings are still those of float32, measured on somebody's own images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from featpipe.backbone import Backbone
from featpipe.backbone.products import Picture
from featpipe.engine.runner import Embeddings
from featpipe.engine.running import Engine

__all__ = ["Fidelity", "candidates", "choose", "embeddings_of", "least_cosine"]


@dataclass
class Fidelity:
    """What was measured, and what was chosen.

    Attributes
    ----------
    precision : str
        The chosen one.
    images : int
        How many were compared.
    min_cosine : float
        What was asked for.
    cosine : dict from precision to float
        The smallest cosine between an embedding and that of float32, over images and outputs.
    images_per_second : dict from precision to float
        Of the forward passes on the calling thread alone; told, and not what is chosen by, so that another run on the
        same images chooses the same.
    """

    precision: str
    images: int
    min_cosine: float
    cosine: dict[str, float] = field(default_factory=dict)
    images_per_second: dict[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "images": self.images,
            "min_cosine": self.min_cosine,
            "cosine": {name: round(value, 9) for name, value in self.cosine.items()},
            "images_per_second": {name: round(value, 2) for name, value in self.images_per_second.items()},
        }


def candidates(device: torch.device) -> tuple[str, ...]:
    """The precisions that are faster than float32 on this device, the fastest first, the more exact of equals before.

    Half precision that the hardware does not have is slower than float32, and no candidate.
    """
    if device.type == "cuda":
        recent = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("fp16", "bf16", "tf32") if recent else ("fp16",)
    if device.type == "mps":
        return ("fp16",)
    return ("bf16",) if _cpu_has_bf16() else ()


def _cpu_has_bf16() -> bool:
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False  # not Linux
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def choose(
    backbone: Backbone, device: torch.device, pictures: Sequence[Picture], min_cosine: float, **settings: Any
) -> tuple[Engine, Fidelity]:
    """The engine of the fastest precision that is faithful enough on some pictures.

    Parameters
    ----------
    backbone : Backbone
    device : torch.device
    pictures : sequence of Tensor of shape (3, h, w), or for a GPU of Unresized
        As the transform's geometry leaves them.
    min_cosine : float
    **settings
        Of :class:`Engine`, for each of them.
    """
    found = Fidelity("fp32", len(pictures), min_cosine)
    engine, exact = _measured(backbone, device, pictures, "fp32", settings, found)
    for precision in candidates(device) if pictures else ():
        candidate, embeddings = _measured(backbone, device, pictures, precision, settings, found)
        found.cosine[precision] = least_cosine(embeddings, exact)
        if found.cosine[precision] >= min_cosine:
            found.precision = precision
            return candidate, found
    return engine, found


def _measured(
    backbone: Backbone,
    device: torch.device,
    pictures: Sequence[Picture],
    precision: str,
    settings: dict[str, Any],
    found: Fidelity,
) -> tuple[Engine, Embeddings]:
    engine = Engine(backbone, device, precision, **settings)
    with engine.running():
        engine.enter_stream(engine.workers)
        embeddings_of(engine, pictures[: engine.batch])  # the first pass chooses algorithms
        started = perf_counter()
        embeddings = embeddings_of(engine, pictures)
        found.images_per_second[precision] = len(pictures) / max(perf_counter() - started, 1e-9)
    return engine, embeddings


def embeddings_of(engine: Engine, pictures: Sequence[Picture]) -> Embeddings:
    """The embeddings of some pictures, batch by batch on the calling thread; empty without a picture."""
    parts = [pictures[start : start + engine.batch] for start in range(0, len(pictures), engine.batch)]
    answers = [engine.embed(engine.collect(part)) for part in parts]
    return {name: np.concatenate([answer[name] for answer in answers]) for name in (answers or [{}])[0]}


def least_cosine(found: Embeddings, exact: Embeddings) -> float:
    """The smallest cosine between two engines' embeddings of the same images, over all outputs."""
    return min(_cosine(found[name], exact[name]) for name in exact)


def _cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """The smallest of the rows; -1 where a row is not finite."""
    a, b = (value.reshape(len(value), -1).astype(np.float64) for value in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    same = (a == b).all(axis=1)  # zeros have no direction
    return float(np.where(same, 1.0, np.nan_to_num(cosine, nan=-1.0, posinf=-1.0, neginf=-1.0)).min())
