"""The number format in which training computes."""

from __future__ import annotations

import torch


def working_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies in it, otherwise float32: emulation is 10 to 30 times slower."""
    if device.type != "cpu":
        return torch.bfloat16
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32
