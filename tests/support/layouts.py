"""The same values in memory in other ways: transposed, sliced, repeated, misaligned."""

from __future__ import annotations

from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "columns", "gap", "steps", "offset", "expanded")


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """Return ``tensor`` with other strides; "expanded" repeats its first row with stride 0."""
    shape = tensor.shape
    if layout == "contiguous" or tensor.dim() == 0:
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return tensor[:1].expand(shape)
    if layout == "columns":  # every third column of something wider
        view = tensor.new_full((*shape[:-1], 3 * shape[-1] + 2), 7.0)[
            ..., 1 : 1 + 3 * shape[-1] : 3
        ]
    elif layout == "gap":  # unit stride, but more between the rows than their width
        view = tensor.new_full((*shape[:-1], shape[-1] + 3), 7.0)[..., 2 : 2 + shape[-1]]
    elif layout == "steps":  # every second row
        view = tensor.new_full((2 * shape[0], *shape[1:]), 7.0)[::2]
    elif layout == "offset":  # contiguous, but one element behind an aligned address
        view = tensor.new_empty(tensor.numel() + 1)[1:].view(shape)
    else:
        raise ValueError(layout)
    return view.copy_(tensor)
