"""Settings of every stage and their validation."""

from __future__ import annotations

from featpipe.config.overrides import parse_settings
from featpipe.config.stages import AUTO, ENGINES, PRECISIONS, STORAGES, TASKS, ExtractionConfig, FineTuneConfig, Task
from featpipe.config.validation import (
    check_bool,
    check_choice,
    check_integer,
    check_names,
    check_number,
    convert_value,
    describe_type,
    get_field_types,
    is_sequence_type,
    matches_type,
    unknown_name_error,
)

__all__ = [
    "AUTO",
    "ENGINES",
    "PRECISIONS",
    "STORAGES",
    "TASKS",
    "ExtractionConfig",
    "FineTuneConfig",
    "Task",
    "check_bool",
    "check_choice",
    "check_integer",
    "check_names",
    "check_number",
    "convert_value",
    "describe_type",
    "get_field_types",
    "is_sequence_type",
    "matches_type",
    "parse_settings",
    "unknown_name_error",
]
