"""The backbone, and a check that it is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featpipe.backbones.outputs import Output, Recorder
from featpipe.backbones.transforms import SampleTransform
from featpipe.data import DEFAULT_MODALITY, get_modality
from featpipe.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen, headless network with its weights, transform and named outputs.

    Attributes
    ----------
    name : str
        Name that :func:`featpipe.backbones.load` accepts.
    source : {"packaged", "torchvision", "timm", "user"}
    network : Module
        Headless, in eval mode, without gradients.
    transform : SampleTransform
        For an image: uint8 (3, H, W) → float32 (3, h, w).
    outputs : tuple of Output
    digest : str
        SHA-256 of the headless network's state: names, dtypes, shapes and bytes. It does not depend on the format of
        the weights file.
    origin : str
        Source of the weights: a published name, a file, or none. Not part of the identity.
    code : mapping
        Identity of a custom network beyond its weights; empty for library networks.
    weight_files : tuple of Path, optional
        All files that determine the weights; None if they are unknown or custom code determines them.
    request : mapping
        The arguments of :func:`featpipe.backbones.load` that load it again: name, weights, outputs, seed.
    """

    name: str
    source: str
    network: nn.Module
    transform: SampleTransform
    outputs: tuple[Output, ...]
    digest: str
    origin: str
    code: Mapping[str, str]
    request: Mapping[str, Any] = field(default_factory=dict)
    weight_files: tuple[Path, ...] | None = None

    @property
    def modality(self) -> str:
        """The modality of the samples that it embeds, a key of `featpipe.data.MODALITIES`."""
        return self.transform.modality

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Output name → shape for one image: (d,), (t, d) or (c, h, w)."""
        return {output.name: output.shape for output in self.outputs}

    @property
    def width(self) -> int:
        """Dimension of the first output; the number of channels for feature maps and tokens."""
        shape = self.outputs[0].shape
        return shape[-1] if len(shape) == 2 else shape[0]

    def to_dict(self) -> dict[str, Any]:
        """The identity: backbones with equal dictionaries give equal embeddings."""
        identity: dict[str, Any] = {
            "name": self.name,
            "source": self.source,
            "weights": self.digest,
            "transform": self.transform.to_dict(),
            "outputs": {output.name: output.to_dict() for output in self.outputs},
        }
        if isinstance(transform_input := getattr(self.network, "transform_input", None), bool):
            # GoogLeNet and Inception normalise again inside if their weights require it.
            identity["transform_input"] = transform_input
        if self.modality != DEFAULT_MODALITY:
            identity["modality"] = self.modality
        return {**identity, "code": dict(self.code)} if self.code else identity

    def embed(self, images: Tensor, *, run_to_end: bool = False) -> dict[str, Tensor]:
        """Compute all outputs in one forward pass, which stops at the last module that is needed.

        Thread-safe: several threads may embed with one network at the same time.

        Parameters
        ----------
        images : Tensor of shape (b, 3, h, w)
            Transformed, on the network's device and in its dtype.
        run_to_end : bool
            Run the whole network: an exporter cannot trace the early exit.

        Returns
        -------
        dict from output name to Tensor of shape (b, *shape)
        """
        values = Recorder(self.outputs, run_to_end=run_to_end).run(self.network, images)
        return {output.name: values[output.name] for output in self.outputs}


def prove_frozen(backbone: Backbone, *, tolerance: float = 1e-4) -> None:
    """Check with a few synthetic images that an embedding depends only on its image.

    Parameters
    ----------
    backbone : Backbone
    tolerance : float
        Maximum distance between two embeddings of the same image, relative to their norm. It cannot be 0, because the
        summation order depends on the batch size; half precision needs 100 times the default.

    Raises
    ------
    ConfigError
        If a module is in training mode, a parameter requires a gradient, two passes differ, an embedding depends on
        the other images of the batch, or a forward pass changes the network.
    """
    error_prefix = f"backbone {backbone.name!r} is not frozen"
    for name, module in backbone.network.named_modules():
        if module.training:
            raise ConfigError(
                f"{error_prefix}: module {name or '(the network itself)'!r} stays in training mode after eval()"
            )
    for name, parameter in backbone.network.named_parameters():
        if parameter.requires_grad:
            raise ConfigError(f"{error_prefix}: parameter {name!r} requires a gradient")
    tensors_before = {name: value.clone() for name, value in _named_tensors(backbone.network).items()}
    with torch.inference_mode():
        images = _make_probe_batch(backbone)
        batched, repeated = backbone.embed(images), backbone.embed(images)
        single_passes = [backbone.embed(image[None]) for image in images]
    for name, value in _named_tensors(backbone.network).items():
        if name not in tensors_before or not _is_equal(value, tensors_before[name]):
            raise ConfigError(f"{error_prefix}: a forward pass changes {name!r}")
    for name, value in batched.items():
        if not value.isfinite().all():
            raise ConfigError(f"backbone {backbone.name!r}: output {name!r} is not finite; its weights are damaged")
        _check_close(value, repeated[name], tolerance, f"{error_prefix}: output {name!r} differs between two passes")
        unbatched = torch.cat([embeddings[name] for embeddings in single_passes])
        _check_close(
            value, unbatched, tolerance, f"{error_prefix}: output {name!r} of an image depends on its neighbours"
        )


def _check_close(a: Tensor, b: Tensor, tolerance: float, problem: str) -> None:
    a, b = (value.cpu().double().flatten(1) for value in (a, b))
    distance = (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    if distance.max() > tolerance:
        raise ConfigError(
            f"{problem}, by {distance.max():.1e} relative to its norm, expected at most {tolerance:.0e}; "
            "use a network whose eval() mode is deterministic"
        )


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _named_tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict([*network.named_parameters(), *network.named_buffers()])


def _make_probe_batch(backbone: Backbone) -> Tensor:
    transform = backbone.transform
    probes = torch.stack([transform(item) for item in get_modality(transform.modality).make_probes()])
    reference = next((p for p in backbone.network.parameters() if p.is_floating_point()), torch.zeros(()))
    return probes.to(reference.device, reference.dtype if probes.is_floating_point() else probes.dtype)
