"""From a network to something faster that gives the same answers, or the reason why not.

Whatever is made here is compared with the network itself before it is used; where it cannot be made, or answers
otherwise, the network is called as it is.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn

from featpipe.backbones import Backbone, example_batch
from featpipe.data import get_modality
from featpipe.errors import ConfigError
from featpipe.inference.runner import EagerRunner, Runner, to_network_input

__all__ = [
    "OPENVINO_PRECISIONS",
    "FusedRunner",
    "export_graph",
    "has_openvino",
    "make_fused_runner",
    "make_openvino_runner",
]

MAX_RELATIVE_DISTANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3}
"""From the network's own answers, relative to their length. A wrong graph is wrong by about 1; sums in another order
cost half precision up to a tenth, on made-up images."""

OPENVINO_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class FusedRunner(EagerRunner):
    """Runs a graph of fused operations in place of the network."""

    name = "torch, fused"

    def __init__(self, eager: EagerRunner, module: torch.fx.GraphModule) -> None:
        super().__init__(eager.backbone, eager.batch, eager.dtype)
        self._module = module

    def compute(self, images: Tensor) -> Mapping[str, Tensor]:
        names = [output.name for output in self.backbone.outputs]
        return dict(zip(names, self._module(images), strict=True))


def make_fused_runner(fp32_backbone: Backbone, eager: EagerRunner) -> FusedRunner | None:
    """The network with its convolutions fused; None where that cannot be done.

    Parameters
    ----------
    fp32_backbone : Backbone
        In float32.
    eager : EagerRunner
        The same in the wanted precision.
    """
    if eager.dtype == torch.float16 or not torch.backends.mkldnn.is_available():
        return None
    # A user's own network may stop the exporter with anything, and the operators are torch's private ones.
    with contextlib.suppress(Exception):
        from featpipe.inference.fusion import fuse_convolutions

        network = fp32_backbone.network
        weights = dict(network.named_parameters()) | dict(network.named_buffers())
        runner = FusedRunner(eager, fuse_convolutions(export_graph(eager.backbone, eager.batch), weights, eager.dtype))
        if _matches_eager(runner, eager):
            return runner
    return None


def has_openvino() -> bool:
    """Whether the extra ``featpipe[cpu]`` is installed."""
    return find_spec("openvino") is not None


def make_openvino_runner(
    fp32_backbone: Backbone, precision: str, eager: EagerRunner, *, required: bool
) -> Runner | None:
    """The network in OpenVINO; None where that cannot be done and was not asked for.

    Raises
    ------
    ConfigError
        If it was asked for and cannot be done.
    """
    try:
        if precision not in OPENVINO_PRECISIONS:
            raise ConfigError(f"engine 'openvino' computes in {', '.join(OPENVINO_PRECISIONS)}, not in {precision}")
        if not has_openvino():
            raise ConfigError("engine 'openvino' is not installed; pip install 'featpipe[cpu]'")
        from featpipe.inference.openvino import OpenVinoRunner

        runner = OpenVinoRunner(
            export_graph(fp32_backbone, eager.batch), fp32_backbone, eager.batch, OPENVINO_PRECISIONS[precision]
        )
        if not _matches_eager(runner, eager):
            raise ConfigError("OpenVINO's answers are not those of the network")
        return runner
    except Exception as error:  # an exporter and a converter, on anybody's network
        if not required:
            return None
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{fp32_backbone.name}: OpenVINO cannot run this network ({reason}); pass --engine torch"
        ) from error


def _matches_eager(runner: Runner, eager: EagerRunner) -> bool:
    """Whether two engines give the same embeddings of made-up images, to what their precision rounds to."""
    transform = eager.backbone.transform
    items = get_modality(transform.modality).make_probes()[:2]
    images = transform.collate([transform.prepare(item) for item in items])
    actual, expected = runner.submit(images)(), eager.submit(images)()
    for name, value in expected.items():
        a, b = (array.reshape(len(images), -1).astype(np.float64) for array in (actual[name], value))
        distance = np.linalg.norm(a - b, axis=1)
        if a.shape != b.shape or not (distance <= MAX_RELATIVE_DISTANCE[eager.dtype] * np.linalg.norm(b, axis=1)).all():
            return False
    return True


class _TupleOutputs(nn.Module):
    """The backbone with its outputs as a plain tuple."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.network = backbone.network
        self._embed = backbone.embed

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._embed(images, run_to_end=True).values())


def export_graph(backbone: Backbone, batch: int) -> torch.export.ExportedProgram:
    """Follow one forward pass, without values.

    Parameters
    ----------
    backbone : Backbone
        On a CPU. It is copied: a network may keep something of the pass.
    batch : int
        Images, for ever: the graph holds for no other number.

    Raises
    ------
    Exception
        Whatever the exporter raises for a network that decides by values, computes outside of torch, or uses what it
        does not know. Such a network can only be called.

    Notes
    -----
    The outputs' order is that of ``backbone.outputs``.
    """
    backbone_copy = replace(backbone, network=copy.deepcopy(backbone.network))
    reference = next((p for p in backbone_copy.network.parameters() if p.is_floating_point()), torch.zeros(()))
    images = to_network_input(example_batch(backbone.transform, batch, reference.dtype), reference.dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own future
        return torch.export.export(_TupleOutputs(backbone_copy).eval(), (images,), strict=False)
