"""`featpipe doctor`: the installation, the machine and the caches, and every problem with its remedy."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import shutil

import pytest
import torch

from tests.support.commands import run_command


@pytest.fixture
def report(tmp_path):
    def run(folder=tmp_path, code=0):
        return json.loads(run_command("doctor", folder, "--json", code=code).stdout)

    return run


def find_result(report, name):
    return next(check["result"] for check in report["checks"] if check["name"] == name)


def test_doctor_lists_required_and_optional_packages_with_their_versions(report):
    packages = {package["name"]: package for package in report()["packages"]}
    assert packages["torch"]["version"] == importlib.metadata.version("torch")
    assert packages["torch"]["extra"] is None
    assert packages["openvino"]["extra"] == "cpu"
    assert "pytest" not in packages


def test_doctor_prints_a_table_of_80_columns_and_no_problems(tmp_path):
    lines = run_command("doctor", tmp_path).stdout.splitlines()
    assert lines[0].startswith("featpipe 0.")
    assert lines[-1] == "no problems"
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80


def test_a_package_that_is_missing_is_a_problem_only_if_it_is_required(report, monkeypatch):
    version = importlib.metadata.version

    def find_version(name):
        if name in ("openvino", "joblib"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "timm" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", find_version)
    assert report(code=1)["problems"] == [
        "joblib is not installed; pip install 'joblib>=1.4'",
        "timm 1.0 is not supported (>=1.0.15 is); pip install 'timm>=1.0.15'",
    ]


def test_a_file_system_without_locks_is_a_problem(report, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    [problem] = report(code=1)["problems"]
    assert problem == (
        f"{tmp_path}: files cannot be locked (Function not implemented); choose a --cache on another file system"
    )
    assert list(tmp_path.iterdir()) == []


def test_little_memory_and_a_full_disk_are_problems(report, tmp_path, monkeypatch):
    monkeypatch.setattr("featpipe.cli.doctor.available_bytes", lambda: 5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000))
    memory, disk, temporary = report(code=1)["problems"]
    assert memory.startswith("only 5.0 MiB of memory are available")
    assert disk == f"{tmp_path}: only 1000 bytes are free; free some space, or choose another --cache"
    assert temporary.endswith("choose another TMPDIR")


def test_a_folder_that_does_not_exist_is_not_made(report, tmp_path):
    folder = tmp_path / "new" / "cache"
    assert find_result(report(folder), "folder of caches") == f"{folder} (does not exist yet)"
    assert not folder.parent.exists()


def test_a_file_instead_of_a_folder_is_a_problem(report, tmp_path):
    path = tmp_path / "cache"
    path.write_bytes(b"")
    assert report(path, code=1)["problems"] == [f"{path}: is not a folder; choose another --cache"]


def test_a_driver_without_a_torch_that_can_use_it_is_a_problem(report, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("torch can use the GPU of this machine")
    monkeypatch.setattr("featpipe.cli.doctor._has_nvidia_driver", lambda: True)
    [problem] = report(code=1)["problems"]
    assert problem.startswith("this machine has an NVIDIA driver, but torch, which is built for ")


def test_caches_are_counted_and_damaged_ones_are_problems(report, tmp_path, make_cache):
    shutil.copy(make_cache({"ant": 20}, 0).path, tmp_path / "a.h5")
    assert find_result(report(), "caches").startswith("1: 20 rows, ")
    (tmp_path / "b.h5").write_bytes(b"not HDF5")
    [problem] = report(code=1)["problems"]
    assert problem.startswith(f"{tmp_path}/b.h5: ")
    assert find_result(report(code=1), "caches").startswith("1: 20 rows, ")
