"""A module that keeps something for its next call and nothing of it in copies, files or scripts."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn


class CachingModule(nn.Module):
    """Keeps ``_cache`` in its ``__dict__`` and out of ``copy.deepcopy``, pickle and torch.save."""

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_cache", None)
        return state

    def __prepare_scriptable__(self) -> NoReturn:
        """Torch calls this before it compiles a module to TorchScript.

        Raises:
            RuntimeError: always; the message says what to do instead.
        """
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: TorchScript does not know the "
            "fused ops. Use torch.export.export(model, inputs), or script the plain network: "
            "torch.jit.script(fused_mlp.unfuse(copy.deepcopy(model)))"
        )
