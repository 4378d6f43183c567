"""Durable files: atomic writes, hashing, model files and the staging area of unfinished work."""

from __future__ import annotations

from featpipe.storage.atomic import (
    TEMPORARY_NAME,
    atomic_write,
    check_writable,
    fsync_directory,
    make_temporary_path,
    make_writable_folder,
)
from featpipe.storage.bundle import (
    HEAD_MEMBER,
    REPLAY_MEMORY_MEMBER,
    TRAINED_ON_MEMBER,
    UNCERTAINTY_MEMBER,
    WEIGHTS_MEMBER,
    ModelBundle,
    convert_bundle_errors,
    is_model_file,
)
from featpipe.storage.hashing import compute_fingerprint, describe_differences, digest, digest_arrays
from featpipe.storage.outputs import claim_folder, find_writer, is_same_file, make_receipt_path, record_output
from featpipe.storage.provenance import RACY_NANOSECONDS, Receipt, RecordStore, hash_file
from featpipe.storage.staging import PART_FILE_NAME, Part, StagingArea, lock_file
from featpipe.storage.string_column import StringColumn

__all__ = [
    "HEAD_MEMBER",
    "PART_FILE_NAME",
    "RACY_NANOSECONDS",
    "REPLAY_MEMORY_MEMBER",
    "TEMPORARY_NAME",
    "TRAINED_ON_MEMBER",
    "UNCERTAINTY_MEMBER",
    "WEIGHTS_MEMBER",
    "ModelBundle",
    "Part",
    "Receipt",
    "RecordStore",
    "StagingArea",
    "StringColumn",
    "atomic_write",
    "check_writable",
    "claim_folder",
    "compute_fingerprint",
    "convert_bundle_errors",
    "describe_differences",
    "digest",
    "digest_arrays",
    "find_writer",
    "fsync_directory",
    "hash_file",
    "is_model_file",
    "is_same_file",
    "lock_file",
    "make_receipt_path",
    "make_temporary_path",
    "make_writable_folder",
    "record_output",
]
