"""The GPU, if there is one: what runs on it, and how precisely."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ROOM = 1.3  # times its weights, that a model needs to run


def the_device(wanted: str | torch.device | None = None) -> str:
    """``wanted``, or the GPU if there is one."""
    return str(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


def placed(model: nn.Module, device: str | None = None) -> nn.Module:
    """The model, moved to the device; left where it is if a GPU has no room for it (a model read at half
    depth by ``lib.activations.harvest`` takes half of it)."""
    device = the_device(device)
    if device.startswith("cuda") and next(model.parameters()).device.type == "cpu":
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if torch.cuda.mem_get_info(device)[0] < ROOM * size:
            return model
    return model.to(device)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may take products of float32 in TF32: rounded to 10 bits, 8 times as fast. Harmless where
    bfloat16's 7 bits are accepted anyway: around models in bfloat16, and in training with that precision.
    Features are encoded in float32: whether one fires at its threshold is decided there."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def to_host(tensor: Tensor) -> Tensor:
    """On the CPU, by way of memory that a GPU copies to at full speed."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
