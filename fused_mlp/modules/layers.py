"""Single layers: Linear+ReLU+Dropout, BatchNorm1d+LeakyReLU, and normalization by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .. import functional
from ..activations import RELU
from ..ops import nested
from ..ops.fit import Fit
from . import attempt, tracing
from .cache import CachingModule
from .norm import norm_state


class LinearReLU(CachingModule):
    """``nn.Linear``, ``nn.ReLU`` and ``nn.Dropout`` in one module.

    Parameters, their names and their initial values under ``torch.manual_seed`` are those of
    ``nn.Linear``.

    Args:
        in_features: size of the last dimension of the input, of shape (*, in_features).
        out_features: size of the last dimension of the output.
        bias: whether to add a learned bias.
        dropout: probability of an element to be zeroed in training.
        device, dtype: of the parameters.

    Raises:
        ValueError: unless 0 <= dropout <= 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {dropout}")
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.dropout = dropout
        self.weight = linear.weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)

    def reset_parameters(self) -> None:
        """Draw new initial values, as ``nn.Linear`` does."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            p = self.dropout if self.training else 0.0
            output = None
            if tracing.ops_allowed(input):
                output = tracing.linear_act(self, ("relu", {}, p), input)
            return self._plain(input) if output is None else output
        fit = self.__dict__.get("_cache")
        if fit is None:
            fit = self.__dict__["_cache"] = Fit(feature_dim=-1)
        parameters = self._parameters
        if "weight" in parameters and "bias" in parameters:
            output = attempt.linear_act(
                fit, input, parameters["weight"], parameters["bias"], RELU, 0.0,
                self.dropout if self.training else 0.0,
            )  # fmt: skip
            if output is not None:
                return output
        return self._plain(input)

    def _plain(self, input: Tensor) -> Tensor:
        hidden = F.relu(F.linear(input, self.weight, self.bias))
        return F.dropout(hidden, self.dropout, self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dropout={self.dropout}"
        )


class BatchNormLeakyReLU(CachingModule, _NormBase):
    """``nn.BatchNorm1d`` and ``nn.LeakyReLU`` in one module.

    Parameters, buffers and their names are those of ``nn.BatchNorm1d``. It is not a subclass of
    it, since ``nn.SyncBatchNorm.convert_sync_batchnorm`` would drop the activation.

    Args:
        num_features: number of channels C of the input, of shape (N, C) or (N, C, L).
        eps, momentum, affine, track_running_stats: as in ``nn.BatchNorm1d``.
        negative_slope: as in ``nn.LeakyReLU``.
        device, dtype: of parameters and buffers.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        negative_slope: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.negative_slope = negative_slope

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            output = None
            if tracing.ops_allowed(input):
                behind = ("leaky_relu", {"negative_slope": self.negative_slope}, 0.0)
                output = tracing.batch_norm_act(self, behind, input)
            return self._plain(input) if output is None else output
        fits = self.__dict__.get("_cache")
        if fits is None:
            fits = self.__dict__["_cache"] = attempt.two_fits()
        try:
            state = norm_state(self.__dict__)
        except KeyError:
            return self._plain(input)
        output = attempt.batch_norm_leaky_relu(fits, input, state, self.negative_slope)
        return self._plain(input) if output is None else output

    def _plain(self, input: Tensor) -> Tensor:
        try:
            output = nn.BatchNorm1d.forward(self, input)  # type: ignore[arg-type]
        except RuntimeError as error:
            nested.explain(type(self).__name__, input, error)
            raise
        return F.leaky_relu(output, self.negative_slope)

    def _check_input_dim(self, input: Tensor) -> None:
        nn.BatchNorm1d._check_input_dim(self, input)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_slope={self.negative_slope}"


class Normalize(CachingModule):
    """Standardise: ``(input - input.mean(dim)) / (input.std(dim, correction) + eps)``.

    Args:
        dim: what to standardise over: None for the whole tensor, 0 for the columns of a table,
            or any dimensions as :func:`torch.std` takes them.
        correction: what is taken off the count in the variance.
        eps: added to the standard deviation, so that constant data gives 0 in place of NaN.
    """

    def __init__(
        self, dim: int | Sequence[int] | None = None, correction: float = 1, eps: float = 0.0
    ) -> None:
        super().__init__()
        self.dim = dim if dim is None or isinstance(dim, int) else tuple(dim)
        self.correction = correction
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        return functional.normalize(input, self.dim, correction=self.correction, eps=self.eps)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, correction={self.correction}, eps={self.eps}"
