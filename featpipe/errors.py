"""The exceptions. Every message says in one line where, what was found, what was expected and what to do."""

from __future__ import annotations

from featpipe.status import Status


class FeatpipeError(Exception):
    """Base class of the exceptions; the commands print the message in one line and exit with code 1."""


class ConfigError(FeatpipeError, ValueError):
    """An unknown name, a value out of range or an unknown key; the message names the nearest match."""


class ArchiveError(FeatpipeError):
    """An archive is missing, empty, unreadable or hostile."""


class SampleError(ArchiveError):
    """One image has no features.

    Parameters
    ----------
    message : str
    status : Status
        The reason, as it is written to the cache.
    archive : str
        Path of the archive with the image.
    sample_id : str
    """

    def __init__(self, message: str, *, status: Status, archive: str = "", sample_id: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.archive = archive
        self.sample_id = sample_id


class WeightsError(FeatpipeError):
    """Weights are missing, their digest differs, or their keys do not fit the network."""


class CacheError(FeatpipeError):
    """A cache cannot be read or written."""


class CacheFormatError(CacheError):
    """A file is not a featpipe cache, or this version of featpipe cannot read its version or contents."""


class CacheIncompleteError(CacheError):
    """There are parts of a cache, but not the cache."""


class CacheMismatchError(CacheError):
    """A cache was computed from other inputs than the requested ones; the message lists the differences."""


class ModelError(FeatpipeError):
    """A model file is damaged, or contains something that is not safe to load."""


class TimeLimitError(FeatpipeError):
    """The time limit has passed before the work was finished; the same call resumes it."""
