"""The tree of exceptions. Every message says where, what was found and what to do, in one line."""

from __future__ import annotations

from featpipe.status import Status


class FeatpipeError(Exception):
    """Anything that featpipe refuses or cannot do; the commands turn it into one line and exit code 1."""


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
        The reason, as it will stand in the cache.
    archive : str
        Where the image lies.
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
    """A file is not a featpipe cache, or of a version or content that this featpipe does not read."""


class CacheIncompleteError(CacheError):
    """Parts of a cache exist, the cache does not."""


class CacheMismatchError(CacheError):
    """A cache was made from other inputs than the ones asked for; the message lists the facts that differ."""


class ModelError(FeatpipeError):
    """A model file is damaged, or holds what may not be loaded."""


class TimeLimitError(FeatpipeError):
    """The time that was given has passed before the work was done; the same call goes on from what is finished."""
