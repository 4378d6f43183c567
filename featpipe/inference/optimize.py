"""Optimize a network for CPU inference: fused convolutions or OpenVINO.

Every optimized network is compared with the original before it is used. If the optimization fails or the embeddings
differ, the original network is used.
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

MAX_RELATIVE_DISTANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3}
"""Maximum distance to the network's embeddings, relative to their norm. A wrong graph has an error of about 1; another
summation order changes half-precision embeddings of synthetic images by up to 0.1."""

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
    """Make a runner with fused convolutions; None if fusion fails or changes the embeddings.

    Parameters
    ----------
    fp32_backbone : Backbone
        In float32.
    eager : EagerRunner
        Runner of the same backbone in the target precision.
    """
    if eager.dtype == torch.float16 or not torch.backends.mkldnn.is_available():
        return None
    # A custom network may raise anything in the exporter, and the operators are private to torch.
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
    """Make a runner with OpenVINO; None if that fails and is not required.

    Raises
    ------
    ConfigError
        If it fails and ``required`` is true.
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
            raise ConfigError(
                f"{fp32_backbone.name}: the embeddings of OpenVINO differ from those of torch; pass --engine torch"
            )
        return runner
    except Exception as error:  # exporter and converter may raise anything for a custom network
        if not required:
            return None
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{fp32_backbone.name}: OpenVINO cannot run this network ({reason}); pass --engine torch"
        ) from error


def _matches_eager(runner: Runner, eager: EagerRunner) -> bool:
    """Whether two runners give the same embeddings of synthetic images, within the rounding of the precision."""
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
    """A module that returns the outputs of a backbone as a tuple."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.network = backbone.network
        self._embed = backbone.embed

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._embed(images, run_to_end=True).values())


def export_graph(backbone: Backbone, batch: int) -> torch.export.ExportedProgram:
    """Export the graph of one forward pass.

    Parameters
    ----------
    backbone : Backbone
        On a CPU. It is copied, because a forward pass may change the state of the network.
    batch : int
        The fixed batch size of the graph.

    Raises
    ------
    Exception
        Any exception of the exporter for a network with data-dependent control flow, computation outside of torch or
        unsupported operations. Such a network can only run eagerly.

    Notes
    -----
    The outputs are in the order of ``backbone.outputs``.
    """
    backbone_copy = replace(backbone, network=copy.deepcopy(backbone.network))
    reference = next((p for p in backbone_copy.network.parameters() if p.is_floating_point()), torch.zeros(()))
    images = to_network_input(example_batch(backbone.transform, batch, reference.dtype), reference.dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings of the exporter
        return torch.export.export(_TupleOutputs(backbone_copy).eval(), (images,), strict=False)
