"""Models + archive → predictions, one row for every sample, in the archive's order."""

from featpipe.prediction.answers import Prediction
from featpipe.prediction.asked import PredictConfig
from featpipe.prediction.files import WRITERS
from featpipe.prediction.live import stream
from featpipe.prediction.verb import StatusCounts, predict

__all__ = ["WRITERS", "PredictConfig", "Prediction", "StatusCounts", "predict", "stream"]
