"""The settings of each stage: the one home of the defaults that commands, recipes and Python share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from featpipe.deadline import seconds_of
from featpipe.errors import ConfigError
from featpipe.names import unknown

__all__ = ["AUTO", "ENGINES", "PRECISIONS", "STORAGES", "Extraction"]

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
STORAGES = ("float32", "float16")
ENGINES = ("auto", "torch", "openvino")
AUTO = "auto"


@dataclass(frozen=True)
class Extraction:
    """How to extract: the one home of the defaults.

    Parameters
    ----------
    backbone : str or torch.nn.Module or Backbone
        A name that ``featpipe backbones`` lists, ``package.module:factory``, or a network.
    weights : str or path-like, optional
        A published name, a file, or ``"none"`` for the untrained architecture; the published default if not given.
    outputs : sequence of str
        What to cache of the network: ``pooled``, or ``NODE[:POOL]``.
    transform : callable, optional
        For a network of your own: uint8 (3, H, W) → float32 (3, h, w).
    seed : int
        For untrained weights.
    labels : path-like or Table, optional
        A CSV or Parquet table of paths and labels.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``, or several joined by commas: then a process for each.
        ``cuda`` is all GPUs of the machine.
    precision : {"fp32", "tf32", "bf16", "fp16", "auto"}
        ``auto``: the fastest whose embeddings of the first images are within ``min_cosine`` of those in fp32.
    min_cosine : float
        The smallest cosine to fp32 that ``precision="auto"`` accepts.
    engine : {"auto", "torch", "openvino"}
        What computes on a CPU; not part of a cache's identity, as the device is not.
    storage : {"float32", "float16"}
        How the features are stored.
    cache : path-like
        The folder where caches are kept and looked for.
    out : path-like, optional
        The cache's file; a name made from archive, backbone and fingerprint in ``cache`` if not given.
    overwrite : bool
        Replace a cache at ``out`` that was made from something else.
    shard_bytes : int
        Features larger than this are spread over several files of about this size.
    workers, batch : int, optional
        Threads, and images in one forward pass; chosen for the machine if not given.
    max_bad : int, float or str, optional
        How many images may have no features before the extraction stops: a number, or a share such as ``"5%"`` or
        ``0.05``. No limit if not given.
    time_limit : float or str, optional
        Seconds, or a time such as ``"3h"``, after which the extraction stops so that it can be gone on with.
    check_content : bool
        Read every image's bytes even where size and modification time say that it is unchanged.
    """

    backbone: Any = "efficientnet_lite0"
    weights: str | os.PathLike[str] | None = None
    outputs: Sequence[str] = ("pooled",)
    transform: Any = None
    seed: int = 0
    labels: Any = None
    device: str = "auto"
    precision: str = "fp32"
    min_cosine: float = 0.999
    engine: str = "auto"
    storage: str = "float32"
    cache: str | os.PathLike[str] = "cache"
    out: str | os.PathLike[str] | None = None
    overwrite: bool = False
    shard_bytes: int = 4 * 2**30
    workers: int | None = None
    batch: int | None = None
    max_bad: int | float | str | None = None
    time_limit: float | str | None = None
    check_content: bool = False

    def __post_init__(self) -> None:
        if self.precision not in (*PRECISIONS, AUTO):
            raise unknown("precision", self.precision, (*PRECISIONS, AUTO))
        if self.engine not in ENGINES:
            raise unknown("engine", self.engine, ENGINES)
        if not 0 <= self.min_cosine <= 1:
            raise ConfigError(f"min_cosine is {self.min_cosine}; it must be from 0 to 1")
        if self.storage not in STORAGES:
            raise unknown("storage", self.storage, STORAGES)
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; it must be at least 1")
        if self.shard_bytes < 1:
            raise ConfigError(f"shard_bytes is {self.shard_bytes}; it must be at least 1")
        if isinstance(self.outputs, str):
            object.__setattr__(self, "outputs", (self.outputs,))
        self.bad_limit(0)
        if self.time_limit is not None:
            seconds_of(self.time_limit)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Extraction:
        """From keyword arguments; an unknown one is answered with the nearest."""
        names = [f.name for f in fields(cls)]
        for name in settings:
            if name not in names:
                raise unknown("setting", name, names)
        return cls(**settings)

    def bad_limit(self, n: int) -> int | None:
        """How many of n images may be bad."""
        value = self.max_bad
        if value is None:
            return None
        try:
            if isinstance(value, str) and value.endswith("%"):
                value = float(value[:-1]) / 100
            number = float(value)
        except ValueError:
            raise ConfigError(f"max-bad is {self.max_bad!r}; give a number or a share such as 5%") from None
        is_share = isinstance(value, float) or (isinstance(value, str) and "." in value)
        if number < 0 or (is_share and number > 1):
            raise ConfigError(f"max-bad is {self.max_bad!r}; a number is at least 0, a share at most 100%")
        return int(number * n) if is_share else int(number)
