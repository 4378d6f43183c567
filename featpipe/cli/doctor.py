"""``featpipe doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from packaging.requirements import Requirement

import featpipe
from featpipe.cli.options import JSON_OPTION, add_options
from featpipe.cli.terminal import print_json
from featpipe.errors import CacheError, FeatpipeError
from featpipe.runtime import available_bytes, format_size, format_table, printable
from featpipe.storage import lock_file, make_temporary_path

MIN_FREE_DISK_BYTES = 1 << 30  # a cache of 200,000 embeddings of width 1280 in float32 takes as much
MIN_FREE_MEMORY_BYTES = 2 << 30  # torch and a large network take about as much


@click.command()
@click.argument("folder", default="cache", metavar="[DIR]")
@add_options(JSON_OPTION)
def doctor(folder: str, as_json: bool) -> None:
    """Check the installation, this machine and the caches in DIR, by default `cache`.

    Shows the versions of packages, devices, memory, disk space, file locks and caches, then every problem with its
    remedy. The exit code is 1 if there is a problem. Nothing is downloaded and no network is loaded.

    \b
    Example:
      featpipe doctor
    """
    packages = list_packages()
    checks = [check_cores(), check_memory(), *check_devices(), *check_folder(Path(folder)), *check_caches(Path(folder))]
    problems = [
        problem for problem in [item.problem for item in packages] + [item.problem for item in checks] if problem
    ]
    versions = {
        "featpipe": featpipe.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }
    if as_json:
        print_json(
            {
                **versions,
                "packages": [asdict(package) for package in packages],
                "checks": [asdict(check) for check in checks],
                "problems": problems,
            }
        )
    else:
        click.echo("featpipe {featpipe}, Python {python}, {platform} ({machine})\n".format(**versions))
        click.echo(format_table([package.to_row() for package in packages], ["package", "version", "required by"]))
        click.echo()
        click.echo(format_table([[check.name, printable(check.result)] for check in checks], ["check", "result"]))
        click.echo()
        click.echo("\n".join(f"problem: {printable(problem)}" for problem in problems) or "no problems")
    if problems:
        raise FeatpipeError(
            f"doctor: {len(problems)} problem{'s' * (len(problems) > 1)}; the output names the remedies"
        )


@dataclass(frozen=True)
class Package:
    """A package that featpipe depends on.

    Attributes
    ----------
    name : str
    version : str or None
        The installed version.
    required : str
        The versions that featpipe supports, such as ``>=2.11``.
    extra : str or None
        The extra of featpipe that installs it; None if featpipe does not work without it.
    problem : str
        What is wrong and what to do; empty if nothing is.
    """

    name: str
    version: str | None
    required: str
    extra: str | None = None
    problem: str = ""

    def to_row(self) -> list[str]:
        extra = "every command" if self.extra is None else f"featpipe[{self.extra}]"
        return [self.name, self.version or "not installed", extra]


@dataclass(frozen=True)
class Check:
    """The result of a check of the machine.

    Attributes
    ----------
    name : str
    result : str
    problem : str
        What is wrong and what to do; empty if nothing is.
    """

    name: str
    result: str
    problem: str = ""


def list_packages() -> list[Package]:
    """The packages that featpipe and its extras require, with their installed versions."""
    extras = [
        extra for extra in importlib.metadata.metadata("featpipe").get_all("Provides-Extra") or [] if extra != "test"
    ]
    packages: dict[str, Package] = {}
    for requirement in map(Requirement, importlib.metadata.requires("featpipe") or ()):
        for extra in (None, *extras):
            is_required = requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""})
            if is_required and requirement.name not in (*packages, "featpipe"):
                packages[requirement.name] = _inspect_package(requirement, extra)
    return sorted(packages.values(), key=lambda package: (package.extra or "", package.name))


def _inspect_package(requirement: Requirement, extra: str | None) -> Package:
    name, versions = requirement.name, str(requirement.specifier)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        problem = "" if extra else f"{name} is not installed; pip install '{name}{versions}'"
        return Package(name, None, versions, extra, problem)
    problem = ""
    if not requirement.specifier.contains(version, prereleases=True):
        problem = f"{name} {version} is not supported ({versions} is); pip install '{name}{versions}'"
    return Package(name, version, versions, extra, problem)


def check_cores() -> Check:
    """Cores that this process may use."""
    from featpipe.inference import available_cores

    usable, total = available_cores(), os.cpu_count() or 1
    return Check("CPU cores", f"{usable} of {total}" if usable != total else str(total))


def check_memory() -> Check:
    """Memory that is available to this process."""
    available = available_bytes()
    problem = ""
    if available < MIN_FREE_MEMORY_BYTES:
        problem = f"only {format_size(available)} of memory are available; end other programs, or raise the limit"
    return Check("memory", f"{format_size(available)} available", problem)


def check_devices() -> Iterator[Check]:
    """The devices that torch can use, and the engine that computes on the CPU."""
    try:
        from featpipe.inference import candidate_precisions, has_openvino, inspect_cuda, resolve_devices

        cuda, devices = inspect_cuda(), resolve_devices()
    except (ImportError, OSError) as error:  # of a broken installation, such as a missing shared library
        yield Check("devices", "unknown", f"torch cannot be imported ({error}); install torch again")
        return
    for name, nbytes in cuda.memory_by_device.items():
        yield Check("GPU", f"{name}, {format_size(nbytes)}")
    problem = ""
    if not cuda.memory_by_device and _has_nvidia_driver():
        build = f"CUDA {cuda.build}" if cuda.build else "CPUs alone"
        problem = (
            f"this machine has an NVIDIA driver, but torch, which is built for {build}, cannot use a GPU; "
            "install the build of torch for this driver (`nvidia-smi` shows its CUDA version)"
        )
    yield Check("--device auto", ", ".join(map(str, devices)), problem)
    if devices[0].type == "cpu":
        yield Check("--engine auto", "openvino" if has_openvino() else "torch")
    yield Check("--precision auto", " or ".join(("fp32", *candidate_precisions(devices[0]))))


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def check_folder(folder: Path) -> Iterator[Check]:
    """Whether caches can be written to a folder, and the space on its disk and on that of temporary files."""
    parent = folder.absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    problem = ""
    if not parent.is_dir():
        problem = f"{parent}: is not a folder; choose another --cache"
    elif not os.access(parent, os.W_OK | os.X_OK):
        problem = f"{parent}: may not be written; choose another --cache"
    result = f"{parent}" if parent == folder.absolute() else f"{folder.absolute()} (does not exist yet)"
    yield Check("folder of caches", result, problem)
    if problem:
        return
    yield _check_disk("its disk", parent, "--cache")
    yield _check_locks(parent)
    yield _check_disk("temporary files", Path(tempfile.gettempdir()), "TMPDIR")


def _check_disk(name: str, folder: Path, option: str) -> Check:
    free = shutil.disk_usage(folder).free
    problem = ""
    if free < MIN_FREE_DISK_BYTES:
        problem = f"{folder}: only {format_size(free)} are free; free some space, or choose another {option}"
    return Check(name, f"{format_size(free)} free in {folder}", problem)


def _check_locks(folder: Path) -> Check:
    path = make_temporary_path(folder)
    try:
        with lock_file(path):
            return Check("file locks", "work")
    except (OSError, CacheError) as error:
        reason = getattr(error, "strerror", None) or error
        problem = f"{folder}: files cannot be locked ({reason}); choose a --cache on another file system"
        return Check("file locks", "do not work", problem)
    finally:
        path.unlink(missing_ok=True)


def check_caches(folder: Path) -> Iterator[Check]:
    """The caches in a folder, and unfinished work."""
    from featpipe.cache import FeatureCache
    from featpipe.maintenance import clean

    if not folder.is_dir():
        return
    n_caches = n_rows = nbytes = 0
    damaged: list[str] = []
    for path in sorted(folder.glob("*.h5")):
        try:
            cache = FeatureCache(path)
        except FeatpipeError as error:
            damaged.append(str(error))
            continue
        n_caches, n_rows, nbytes = n_caches + 1, n_rows + len(cache), nbytes + cache.file_bytes
    yield Check("caches", f"{n_caches:,}: {n_rows:,} rows, {format_size(nbytes)}")
    for error_text in damaged:
        yield Check("damaged cache", error_text.partition(":")[0], error_text)
    abandoned = clean(folder)
    if abandoned:
        size = format_size(sum(item.nbytes for item in abandoned))
        yield Check("unfinished work", f"{size} that no process uses; `featpipe clean {folder}` removes it")
