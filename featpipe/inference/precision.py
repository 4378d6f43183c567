"""Select the fastest precision whose embeddings agree with float32, measured on the user's images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from featpipe.backbones import Backbone, PreparedImage
from featpipe.config import Precision
from featpipe.inference.engine import Engine
from featpipe.inference.runner import Embeddings


@dataclass
class Fidelity:
    """The measurements for each precision, and the selected precision.

    Attributes
    ----------
    precision : str
        The selected precision.
    images : int
        Number of images compared.
    min_cosine : float
        The required minimum cosine.
    cosine : dict from precision to float
        The minimum cosine between an embedding and that of float32, over images and outputs.
    images_per_second : dict from precision to float
        Throughput of the forward passes on the calling thread alone. For information only: the selection does not
        depend on it, so that another run on the same images selects the same precision.
    """

    precision: Precision
    images: int
    min_cosine: float
    cosine: dict[str, float] = field(default_factory=dict)
    images_per_second: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "min_cosine": self.min_cosine,
            "cosine": {name: round(value, 9) for name, value in self.cosine.items()},
            "images_per_second": {name: round(value, 2) for name, value in self.images_per_second.items()},
        }


def candidate_precisions(device: torch.device) -> tuple[Precision, ...]:
    """List the precisions that are faster than float32 on a device, fastest first; ties: the more accurate first.

    Half precision without hardware support is slower than float32 and not a candidate.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("fp16", "bf16", "tf32") if has_bf16 else ("fp16",)
    if device.type == "mps":
        return ("fp16",)
    try:
        cpu_flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:  # not Linux
        return ()
    return () if {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_flags) else ("bf16",)


def select_precision(
    backbone: Backbone, device: torch.device, probe_images: Sequence[PreparedImage], min_cosine: float, **settings: Any
) -> tuple[Engine, Fidelity]:
    """Select the fastest precision whose embeddings reach ``min_cosine`` on the probe images, and make its engine.

    Parameters
    ----------
    backbone : Backbone
    device : torch.device
    probe_images : sequence of Tensor of shape (3, h, w), or for a GPU UnresizedImage
        Results of the geometric part of the transform.
    min_cosine : float
        Minimum cosine to the float32 embeddings.
    **settings
        Further arguments of :class:`Engine`.
    """
    fidelity = Fidelity("fp32", len(probe_images), min_cosine)
    engine, exact_embeddings = _measure_precision(backbone, device, probe_images, "fp32", settings, fidelity)
    for precision in candidate_precisions(device) if probe_images else ():
        candidate_engine, embeddings = _measure_precision(backbone, device, probe_images, precision, settings, fidelity)
        fidelity.cosine[precision] = compute_min_cosine(embeddings, exact_embeddings)
        if fidelity.cosine[precision] >= min_cosine:
            fidelity.precision = precision
            return candidate_engine, fidelity
    return engine, fidelity


def _measure_precision(
    backbone: Backbone,
    device: torch.device,
    images: Sequence[PreparedImage],
    precision: str,
    settings: dict[str, Any],
    fidelity: Fidelity,
) -> tuple[Engine, Embeddings]:
    engine = Engine(backbone, device, precision, **settings)
    with engine.session():
        engine.enter_stream(engine.workers)
        compute_embeddings(engine, images[: engine.batch])  # warm-up: the first pass selects algorithms
        started = perf_counter()
        embeddings = compute_embeddings(engine, images)
        fidelity.images_per_second[precision] = len(images) / max(perf_counter() - started, 1e-9)
    return engine, embeddings


def compute_embeddings(engine: Engine, images: Sequence[PreparedImage]) -> Embeddings:
    """Compute embeddings batch by batch on the calling thread; empty if there are no images."""
    batches = [images[start : start + engine.batch] for start in range(0, len(images), engine.batch)]
    batch_embeddings = [engine.embed(engine.collate(batch)) for batch in batches]
    return {
        name: np.concatenate([embeddings[name] for embeddings in batch_embeddings])
        for name in (batch_embeddings or [{}])[0]
    }


def compute_min_cosine(embeddings: Embeddings, exact_embeddings: Embeddings) -> float:
    """Compute the minimum cosine between two engines' embeddings of the same images, over all outputs."""
    return min(_min_row_cosine(embeddings[name], exact_embeddings[name]) for name in exact_embeddings)


def _min_row_cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """The minimum cosine over rows; -1 for a row that is not finite."""
    a, b = (value.reshape(len(value), -1).astype(np.float64) for value in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    is_identical = (a == b).all(axis=1)  # zeros have no direction
    return float(np.where(is_identical, 1.0, np.nan_to_num(cosine, nan=-1.0, posinf=-1.0, neginf=-1.0)).min())
