"""Run a graph with OpenVINO, the fastest backend on most CPUs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import openvino
import torch
from torch import Tensor

from featpipe.backbones import Backbone
from featpipe.inference.devices import available_cores
from featpipe.inference.runner import Embeddings, pad_batch, to_network_input


class OpenVinoRunner:
    """Runs a graph with OpenVINO; each calling thread has its own inference request and stream.

    Parameters
    ----------
    program : ExportedProgram
        Result of :func:`featpipe.inference.optimize.export_graph`, in float32.
    backbone : Backbone
        Backbone of the graph; provides the transform and the names of the outputs.
    batch : int
        The fixed batch size of the graph.
    precision : {"f32", "bf16"}
    """

    def __init__(self, program: torch.export.ExportedProgram, backbone: Backbone, batch: int, precision: str) -> None:
        self.name = f"OpenVINO {openvino.__version__.split('-')[0]}"
        self.batch = batch
        self._output_names = [output.name for output in backbone.outputs]
        self._normalize = backbone.transform.normalize
        self._precision = precision
        self._compile_lock = threading.Lock()
        self._compiled_models: dict[int, Any] = {}
        self._thread_local = threading.local()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation warnings of the converter
            self._model = openvino.convert_model(program)

    def enter_stream(self, streams: int) -> None:
        self._thread_local.request = self._compile(streams).create_infer_request()

    def submit(self, images: Tensor) -> Callable[[], Embeddings]:
        if not hasattr(self._thread_local, "request"):
            self.enter_stream(1)
        request = self._thread_local.request
        inputs = to_network_input(pad_batch(self._normalize(images), self.batch), torch.float32).contiguous()
        request.infer([inputs.numpy()], share_inputs=True)
        embeddings = {
            name: np.array(request.get_output_tensor(index).data[: len(images)], np.float32)
            for index, name in enumerate(self._output_names)
        }
        return lambda: embeddings

    def _compile(self, streams: int) -> Any:
        """Compile the network for this number of parallel streams, on all cores together."""
        with self._compile_lock:
            if streams not in self._compiled_models:
                settings = {
                    "INFERENCE_PRECISION_HINT": self._precision,
                    "NUM_STREAMS": streams,
                    "INFERENCE_NUM_THREADS": max(streams, available_cores()),
                    "ENABLE_CPU_PINNING": False,
                }
                self._compiled_models[streams] = _get_core().compile_model(self._model, "CPU", settings)
            return self._compiled_models[streams]


@cache
def _get_core() -> openvino.Core:
    """The OpenVINO core of this process; it is never destroyed.

    A core installs an alternate signal stack in its thread and frees that stack when it is destroyed, even if another
    thread or a later core still uses it. The next Ctrl-C would then be a segmentation fault.
    """
    return openvino.Core()
