"""The identity of a backbone, stored by an earlier load and available without the network.

A command whose results are up to date needs only the identity of the backbone, not the network. With a stored identity
it imports neither torch nor timm and contacts no server. An identity is stored only if files and installed packages
determine it: never for custom code, and never for a file that changed just before it was read. A stored identity is
valid only while its inputs are unchanged: the request, the size, times and inode of every weights file, the version and
location of every package, the code of featpipe, and the environment variables that locate the weights caches.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featpipe.backbones.registry import PACKAGED_BACKBONES, find_weights_file
from featpipe.errors import WeightsError
from featpipe.storage import RACY_NANOSECONDS, atomic_write, compute_fingerprint

if TYPE_CHECKING:
    from featpipe.backbones.backbone import Backbone

STORE_FORMAT = "featpipe-backbones/1"
MAX_STORE_BYTES = 2**22
MAX_ENTRIES = 64
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".model")
PACKAGES = ("featpipe", "torch", "torchvision", "timm", "huggingface-hub", "safetensors", "numpy")
CACHE_VARIABLES = ("HOME", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


@dataclass(frozen=True)
class BackboneIdentity:
    """The properties of a backbone that a command without a forward pass needs.

    Attributes
    ----------
    name : str
    request : mapping
        Equal to ``Backbone.request``.
    facts : mapping
        Equal to ``Backbone.to_dict()``.
    """

    name: str
    request: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Output name → shape for one image."""
        return {name: tuple(output["shape"]) for name, output in self.facts["outputs"].items()}

    def to_dict(self) -> dict[str, Any]:
        return dict(self.facts)


@dataclass(frozen=True)
class BackboneRequest:
    """The arguments of :func:`featpipe.backbones.load` that determine a stored identity."""

    name: str
    weights: str | os.PathLike[str] | None
    outputs: Sequence[str]
    seed: int

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the request and of the environment that determines its result."""
        weights = resolve_weights(self.weights)
        is_model_file = Path(self.name).suffix == ".model"
        environment = {
            "python": sys.version,
            "packages": {package: _describe_package(package) for package in PACKAGES},
            "code": [_stamp(path) for path in sorted(Path(__file__).parent.rglob("*.py"))],
            "variables": {name: os.environ.get(name) for name in CACHE_VARIABLES},
        }
        if self.name in PACKAGED_BACKBONES and weights is None:
            environment["packaged"] = str(find_weights_file(self.name))
        return compute_fingerprint(
            [
                os.path.abspath(self.name) if is_model_file else self.name,
                str(weights.absolute()) if isinstance(weights, Path) else weights,
                list(self.outputs),
                self.seed,
                environment,
            ]
        )


class IdentityStore:
    """Stored identities, in a hidden file in the folder of the caches.

    Parameters
    ----------
    folder : Path
        Folder of the caches.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".backbones.json"

    def find(self, request: BackboneRequest) -> BackboneIdentity | None:
        """Look up the identity of a request; None if it is missing or its inputs have changed."""
        try:
            entry = self._read()[request.fingerprint]
            if entry["files"] != [_stamp(Path(stamp[0])) for stamp in entry["files"]]:
                return None
            if entry["check"] != _checksum(entry):
                return None
            return BackboneIdentity(entry["name"], entry["request"], entry["facts"])
        except (OSError, LookupError, TypeError, ValueError, WeightsError):
            return None

    def write(self, request: BackboneRequest, backbone: Backbone, load_start_ns: int) -> None:
        """Store the identity of a loaded backbone; do nothing if the same request may give another result next time.

        Parameters
        ----------
        request : BackboneRequest
        backbone : Backbone
        load_start_ns : int
            Start time of the load. The identity is not stored if a file changed after it or shortly before.
        """
        if backbone.weight_files is None:
            return
        with suppress(OSError, WeightsError):  # a failure only makes the next start slower
            stamps = [_stamp(path) for path in backbone.weight_files]
            if any(max(stamp[2], stamp[3]) > load_start_ns - RACY_NANOSECONDS for stamp in stamps):
                return
            entry: dict[str, Any] = {
                "name": backbone.name,
                "request": dict(backbone.request),
                "facts": backbone.to_dict(),
                "files": stamps,
            }
            entries = self._read()
            fingerprint = request.fingerprint
            entries.pop(fingerprint, None)
            recent = dict(list(entries.items())[-MAX_ENTRIES + 1 :])
            document = {"format": STORE_FORMAT, "entries": {**recent, fingerprint: entry | {"check": _checksum(entry)}}}
            with atomic_write(self.path, text=True) as file:
                json.dump(document, file, indent=1)

    def _read(self) -> dict[str, Any]:
        try:
            with open(self.path, "rb") as file:
                document = json.loads(file.read(MAX_STORE_BYTES))
            entries = document["entries"] if document["format"] == STORE_FORMAT else {}
            return entries if isinstance(entries, dict) else {}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return {}


def resolve_weights(weights: str | os.PathLike[str] | None) -> str | Path | None:
    """Convert a file name to a path; published names, ``none`` and None are returned unchanged."""
    if weights is None or isinstance(weights, Path):
        return weights
    text = os.fspath(weights)
    if Path(text).suffix in WEIGHT_SUFFIXES or "/" in text or Path(text).is_file():
        return Path(text).expanduser()
    return text


def _checksum(entry: Mapping[str, Any]) -> str:
    return compute_fingerprint({key: value for key, value in entry.items() if key != "check"})


def _stamp(path: Path) -> list[Any]:
    """File metadata that changes with the file's bytes, even if a program sets the modification time."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _describe_package(package: str) -> Iterable[Any] | None:
    try:
        package_version = version(package)
    except PackageNotFoundError:
        return None
    spec = find_spec(package.replace("-", "_"))  # finds the package without importing it
    return [package_version] if spec is None or spec.origin is None else [package_version, _stamp(Path(spec.origin))]
