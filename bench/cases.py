"""What is measured: the networks and the ops, at which sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

NETWORK = "research_net"
OPS = (
    "normalize", "linear_relu", "linear_act", "mlp", "mlp_batch_norm", "batch_norm_leaky_relu",
    "batch_norm_act",
)  # fmt: skip
_LINEAR = ("linear_relu", "linear_act")
MLP = ("mlp", "mlp_batch_norm")
MODES = ("eval", "train")
DROPOUT = 0.3

Widths = tuple[int, ...]
REFERENCE: Widths = (10, 64, 32, 5)
NETWORKS: tuple[Widths, ...] = (
    REFERENCE,
    (128, 256, 256, 10),
    (784, 512, 256, 10),
    (1024, 1024, 1024, 1024),
)
_SMALL_BATCHES = (1, 32, 256, 4096, 65536)
_BATCHES = {
    NETWORKS[0]: _SMALL_BATCHES,
    NETWORKS[1]: _SMALL_BATCHES,
    NETWORKS[2]: (64, 512, 4096),
    NETWORKS[3]: (32, 256, 1024),
}


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: ``research_net`` or one of ``OPS``.
        sizes: the network's widths; rows, in_features, out_features for linear_relu and linear_act
            (with GELU); rows and widths for mlp (hidden layers with Tanh) and mlp_batch_norm (with
            BatchNorm1d, ReLU and Dropout); rows and columns for the others (batch_norm_act with
            ReLU).
        batch: rows of the input.
        mode: "eval" (forward under inference_mode) or "train" (forward and backward).
        dropout: its probability in "train", where there is a dropout.
    """

    op: str
    sizes: tuple[int, ...]
    batch: int
    mode: str
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    dropout: float = DROPOUT

    @property
    def shape(self) -> str:
        """The sizes as text: ``10,64,32,5`` or ``4096×64``."""
        return (",".join if self.op == NETWORK else "×".join)(map(str, self.sizes))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        batch = f" batch {self.batch}" if self.op == NETWORK else ""
        return f"{self.op} {self.shape}{batch} {self.mode} {self.dtype_name}"

    @property
    def widths(self) -> tuple[int, ...]:
        """Those of a network or a chain of Linear layers, the input's first."""
        return self.sizes if self.op == NETWORK else self.sizes[1:]

    @property
    def flops(self) -> float:
        """Operations of the formula, products counted as two."""
        if self.op == NETWORK or self.op in MLP:
            products = [k * n for k, n in itertools.pairwise(self.widths)]
            forward = 2.0 * self.batch * sum(products)
            # The gradient of the network's input is not asked for.
            return forward if self.mode == "eval" else 3 * forward - 2.0 * self.batch * products[0]
        if self.op in _LINEAR:
            return 2.0 * math.prod(self.sizes) * (1 if self.mode == "eval" else 3)
        return math.prod(self.sizes) * (4.0 if self.mode == "eval" else 14.0)

    @property
    def bytes(self) -> float:
        """What must cross the memory bus at least, were activations never stored.

        Statistics come before their use, so normalize and a training batch norm read their input
        twice, and input and gradient twice in backward.
        """
        itemsize = self.dtype.itemsize
        train = self.mode == "train"
        if self.op == NETWORK or self.op in MLP:
            weights = sum((k + 1) * n for k, n in itertools.pairwise(self.widths))
            ends = self.batch * (self.widths[0] + self.widths[-1])
            return float((ends + weights) * itemsize * (2 if train else 1))
        if self.op in _LINEAR:
            rows, inputs, outputs = self.sizes
            once = rows * inputs + (inputs + 1) * outputs + rows * outputs
            # Backward reads the input, the weight, the output and its gradient, writes two.
            extra = 2 * rows * (inputs + outputs) + 2 * inputs * outputs
            return float(itemsize * (once + extra * train))
        passes = 8 if train else (3 if self.op == "normalize" else 2)
        return float(math.prod(self.sizes) * itemsize * passes)


def networks(
    widths: Iterable[Widths],
    batches: Sequence[int] | None,
    dtype: torch.dtype,
    device: str,
    modes: Sequence[str] = MODES,
) -> list[Case]:
    """Return the cases of networks; their own batch sizes when ``batches`` is None."""
    found = []
    for net in widths:
        for mode in modes:
            for batch in _BATCHES.get(net, (1, 32, 256, 4096)) if batches is None else batches:
                if mode == "eval" or batch > 1:  # batch norm needs two rows to train
                    found.append(Case(NETWORK, net, batch, mode, dtype, device))
    return found


_OP_SIZES: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "quick": {
        "normalize": ((100, 10), (10_000, 10), (1_000_000, 10)),
        "linear_relu": ((256, 256, 256), (4096, 64, 64)),
        "linear_act": ((256, 256, 256), (4096, 64, 64)),
        "mlp": ((32, 4, 64, 64, 2), (4096, 4, 64, 64, 2)),
        "mlp_batch_norm": ((32, 10, 64, 32, 5), (4096, 10, 64, 32, 5)),
        "batch_norm_leaky_relu": ((256, 32), (65536, 32), (4096, 256)),
        "batch_norm_act": ((256, 32), (65536, 32)),
    },
    "docs": {
        "normalize": tuple((10**n, 10) for n in range(2, 7)),
        "linear_relu": (*((2**n,) * 3 for n in (4, 6, 8, 10, 11)), (512, 4096, 4096),
                        (65536, 64, 64)),
        "linear_act": ((64,) * 3, (256,) * 3, (1024,) * 3, (65536, 64, 64)),
        "mlp": (*((n, 4, 64, 64, 2) for n in (1, 32, 256, 4096)), (32, 17, 256, 256, 6),
                (4096, 17, 256, 256, 6)),
        "mlp_batch_norm": (*((n, 10, 64, 32, 5) for n in (32, 256, 4096)), (32, 32, 256, 256, 2),
                           (4096, 32, 256, 256, 2)),
        "batch_norm_leaky_relu": ((32, 8), (32, 4096), (1024, 64), (1024, 1024), (65536, 32),
                                  (65536, 512), (1_000_000, 8), (1_000_000, 64)),
        "batch_norm_act": ((1024, 64), (65536, 32)),
    },
    "full": {
        "normalize": tuple((10**n, 10) for n in range(2, 8)),
        "linear_relu": (*((2**n,) * 3 for n in range(4, 13)), (65536, 64, 64)),
        "linear_act": (*((2**n,) * 3 for n in range(4, 13)), (65536, 64, 64)),
        "mlp": tuple((n, w, 64, 64, w) for n in (1, 32, 256, 4096, 65536) for w in (4, 64)),
        "mlp_batch_norm": tuple((n, 10, 64, 32, 5) for n in (2, 32, 256, 4096, 65536)),
        "batch_norm_leaky_relu": tuple(
            (rows, columns)
            for rows in (32, 1024, 32768, 1_000_000)
            for columns in (8, 64, 512, 4096)
            if rows * columns <= 2**27
        ),
        "batch_norm_act": ((32, 64), (1024, 64), (32768, 64), (1024, 4096)),
    },
    "smoke": {
        "normalize": ((20, 10),),
        "linear_relu": ((8, 6, 5),),
        "linear_act": ((8, 6, 5),),
        "mlp": ((8, 6, 5, 4),),
        "mlp_batch_norm": ((8, 6, 5, 4),),
        "batch_norm_leaky_relu": ((16, 4),),
        "batch_norm_act": ((16, 4),),
    },
}  # fmt: skip


def ops(sweep: str, dtype: torch.dtype, device: str, modes: Sequence[str] = MODES) -> list[Case]:
    """Return the cases of the ops on their own.

    Args:
        sweep: "quick", "docs", "full" or "smoke".
    """
    # Eager takes seconds a step at the largest: they are measured in float32 alone.
    most = 10**8 if dtype.itemsize < 4 else math.inf
    return [
        Case(op, sizes, sizes[0], mode, dtype, device)
        for op, choices in _OP_SIZES[sweep].items()
        for mode in modes
        for sizes in choices
        if sizes[0] * sizes[1] < most
    ]


def sweep(name: str, dtype: torch.dtype, device: str) -> list[Case]:
    """Return all cases of a named sweep: "quick", "docs", "full" or "smoke"."""
    if name == "smoke":
        found = networks([REFERENCE], (1, 8), dtype, device)
    elif name == "quick":
        found = networks([REFERENCE], None, dtype, device)
    else:
        found = networks(NETWORKS, None, dtype, device)
    return found + ops(name, dtype, device)
