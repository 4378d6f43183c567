"""A backbone as one graph of operators, from its images to its outputs, for a fixed size of batch."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from featpipe.backbone import Backbone

__all__ = ["export_graph"]


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
    images = torch.zeros(batch, 3, *backbone.transform.size, dtype=reference.dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own future
        return torch.export.export(_TupleOutputs(backbone_copy).eval(), (images,), strict=False)
