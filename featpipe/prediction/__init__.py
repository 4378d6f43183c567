"""Models + archive → predictions, one row for every sample, in the archive's order."""

from __future__ import annotations

from featpipe.prediction.config import PredictConfig, PredictOptions
from featpipe.prediction.predict import StatusCounts, predict
from featpipe.prediction.rows import Prediction
from featpipe.prediction.stream import stream
from featpipe.prediction.writers import WRITERS

__all__ = ["WRITERS", "PredictConfig", "PredictOptions", "Prediction", "StatusCounts", "predict", "stream"]
