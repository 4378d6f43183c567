"""A small fully connected network: trained as torch tensors, used as numpy arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf, expit

if TYPE_CHECKING:
    import torch

__all__ = ["ACTIVATIONS", "WEIGHT_INITIALIZERS", "Network", "NetworkArchitecture", "forward"]

LayerWeights = tuple[list[NDArray[Any]], list[NDArray[Any]]]

# By the names that torch.nn.functional gives them, with its constants.
ACTIVATIONS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, x * x.dtype.type(0.01)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "gelu": lambda x: x * x.dtype.type(0.5) * (1 + erf(x * x.dtype.type(math.sqrt(0.5)))),
    "silu": lambda x: x * expit(x),
    "tanh": np.tanh,
    "sigmoid": expit,
}
WEIGHT_INITIALIZERS = ("he", "glorot")


def forward(X: NDArray[Any], coefs: Sequence[NDArray[Any]], intercepts: Sequence[NDArray[Any]], activation: str) -> Any:
    """Scores of shape (m, outputs), each layer in the type of its weights."""
    for coef, intercept in zip(coefs[:-1], intercepts[:-1], strict=True):
        X = ACTIVATIONS[activation](X.astype(coef.dtype, copy=False) @ coef + intercept)
    return X.astype(coefs[-1].dtype, copy=False) @ coefs[-1] + intercepts[-1]


@dataclass(frozen=True)
class NetworkArchitecture:
    """What a network is before it has weights.

    Attributes
    ----------
    widths : tuple of int
        Of the input, the hidden layers and the output.
    activation : str
        One of ``ACTIVATIONS``, after every layer but the last.
    dropout : float
        Share of hidden units that are silenced in a step.
    initial_weights : {"he", "glorot"}
        Uniform, of He et al. 2015 for hidden layers and zeros for the last, so that training starts at no opinion; or
        of Glorot and Bengio 2010 for all, as Keras does. Intercepts start at zero.
    """

    widths: tuple[int, ...]
    activation: str = "relu"
    dropout: float = 0.0
    initial_weights: str = "he"

    @property
    def multiplications_per_row(self) -> int:
        """Multiplications for one row."""
        return sum(fan_in * fan_out for fan_in, fan_out in pairwise(self.widths))

    def init_bound(self, layer: int) -> float:
        """Initial weights of a layer are uniform between minus this and this."""
        if self.initial_weights == "glorot":
            return math.sqrt(6 / (self.widths[layer] + self.widths[layer + 1]))
        return 0.0 if layer == len(self.widths) - 2 else math.sqrt(6 / self.widths[layer])


class Network:
    """Layer i: ``x @ weights[i] + biases[i]``, then the activation, but for the last.

    Parameters
    ----------
    shape : Shape
    dtype : torch.dtype
    generator : torch.Generator
        For the initial weights and for dropout.
    """

    def __init__(self, architecture: NetworkArchitecture, dtype: torch.dtype, generator: torch.Generator) -> None:
        import torch
        from torch.nn import functional

        self.architecture, self.generator = architecture, generator
        self.activation = getattr(functional, architecture.activation)
        self.weights = []
        for layer, (fan_in, fan_out) in enumerate(pairwise(architecture.widths)):
            bound = architecture.init_bound(layer)
            weight = torch.empty(fan_in, fan_out, dtype=dtype).uniform_(-bound, bound, generator=generator)
            # Columns in one piece each: products for ten classes, and gradients like this, take a quarter of the time.
            self.weights.append(weight.t().contiguous().t())
        self.biases = [torch.zeros(width, dtype=dtype) for width in architecture.widths[1:]]
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [*self.weights, *self.biases]

    def __call__(self, x: torch.Tensor, *, training: bool = False) -> torch.Tensor:
        """Scores of shape (b, outputs) of rows of shape (b, d)."""
        import torch

        keep_probability = 1 - self.architecture.dropout
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = self.activation(torch.addmm(bias, x, weight))
            if training and keep_probability < 1:
                # torch's own dropout draws from the global generator.
                x = x * torch.empty_like(x).bernoulli_(keep_probability, generator=self.generator).div_(
                    keep_probability
                )
        return torch.addmm(self.biases[-1], x, self.weights[-1])

    def copy_weights(self) -> LayerWeights:
        return (
            [weight.detach().numpy().copy() for weight in self.weights],
            [bias.detach().numpy().copy() for bias in self.biases],
        )
