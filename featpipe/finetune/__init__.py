"""Fine-tuning: the optional stage that goes back into the network."""

from __future__ import annotations

__all__: list[str] = []
