"""Buffers that no file holds, of a model that was built on the meta device.

Rotary frequencies, causal masks and position numbers are computed in a constructor; on the meta
device that leaves no values.  Hugging Face models compute them again in `_init_weights(module)`.
"""

import torch
from torch import Tensor, nn


def _initializer(model: nn.Module, path: str) -> nn.Module | None:
    """The innermost module around this path that can initialise its parts."""
    parts = path.split(".")
    for length in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:length]))
        if callable(getattr(module, "_init_weights", None)):
            return module
    return None


def restore_buffers(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Values for every meta buffer that no state dict holds; the model is not changed.

    Raises:
        ValueError: a buffer whose values nothing computes, or a tensor on the meta device that is
            neither parameter nor buffer.
    """
    for path, module in model.named_modules():
        loose = [n for n, v in vars(module).items() if isinstance(v, Tensor) and v.is_meta]
        if loose:
            raise ValueError(
                f"{path or type(model).__name__}: {loose} are on the meta device and no buffers; "
                "build the model with its buffers on a real device"
            )
    restored: dict[str, Tensor] = {}
    for path, module in list(model.named_modules()):
        buffers = {own: module._buffers.get(own)
                   for own in sorted(module._non_persistent_buffers_set)}  # fmt: skip
        metas = {own: b for own, b in buffers.items() if b is not None and b.is_meta}
        if not metas:
            continue
        owner = _initializer(model, path)
        filled: list[dict[str, Tensor | None]] = []
        # over two different fillings: values that are equal after both were computed
        for filling in (0, 1):
            try:
                for own, meta in metas.items():
                    module._buffers[own] = torch.full_like(meta, filling, device=device)
                if owner is not None:
                    with torch.no_grad():
                        owner._init_weights(module)  # type: ignore[operator]
                filled.append({own: module._buffers[own] for own in metas})
            finally:
                module._buffers.update(metas)
        for own in metas:
            name = f"{path}.{own}" if path else own
            first, second = (found[own] for found in filled)
            if first is None or second is None or not torch.equal(first, second):
                raise ValueError(
                    f"{name}: a buffer that no checkpoint holds and nothing computes again; build "
                    "the model with this buffer on a real device"
                )
            restored[name] = first
    return restored
