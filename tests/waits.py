"""What a card would be waited for: copies from the CPU, answers that the CPU wants, indices made of Python numbers."""

import os
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACK = Path(__file__).resolve().parents[1]

COPIES, INDEXING = {"_to_copy", "copy_"}, {"index", "index_put", "index_put_"}
ANSWERS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_consecutive"}
"""Operations whose result the CPU has to know before it goes on."""


class Waits(TorchDispatchMode):
    """Keeps the names of PyTorch's operations that make the CPU and a card wait for each other.

    card: type of the device that stands for one. With "meta" copies to it are seen, and nobody can read its numbers;
    with "cpu" they cannot be told from others. Indices that are lists become tensors unseen: see PackWaits.
    """

    def __init__(self, card):
        super().__init__()
        self.card, self.recorded = card, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = {x.device.type for x in (*given, *tree_leaves(out)) if isinstance(x, Tensor)}
        copied = len(there) > 1 and (name in COPIES or any(x.ndim and x.device.type == "cpu" for x in given))
        masked = name in INDEXING and any(x.dtype == torch.bool for x in given[1:])
        if copied or masked or name == "lift_fresh" or (name in ANSWERS and self.card in there):
            self.recorded.append(str(func))
        return out


FACTORIES = {getattr(torch, name) for name in ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "zeros")}
FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}
READ = {getattr(Tensor, name) for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__")}
READ |= {getattr(Tensor, name) for name in ("__int__", "__index__")}
INDEXED = {Tensor.__getitem__, Tensor.__setitem__}


class PackWaits(TorchFunctionMode):
    """The same by what code in a folder, the pack's without its tests, asks of PyTorch; on any device.

    A tensor that is made without the device of another one would be made on the CPU, also where there is a card.
    """

    def __init__(self, folder=PACK):
        super().__init__()
        self.folder, self.recorded = folder, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waited_for(func, args, kwargs):
            frame = _caller()
            if _is_in(self.folder, frame.f_code.co_filename):
                self.recorded.append(f"{func.__name__} in {frame.f_code.co_name}, line {frame.f_lineno}")
        return func(*args, **kwargs)


def _waited_for(func, args, kwargs):
    if func in FACTORIES:
        return not isinstance(kwargs.get("device"), torch.device)
    if func in FROM_PYTHON:
        return not isinstance(args[0], Tensor)
    if func in INDEXED:
        parts = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(p, list) or (isinstance(p, Tensor) and p.dtype == torch.bool) for p in parts)
    return func in READ


def _caller():
    """The frame outside PyTorch from which a function was called."""
    frame = sys._getframe(2)
    while "torch" in Path(frame.f_code.co_filename).parts:
        frame = frame.f_back
    return frame


@cache
def _is_in(folder, file):
    path = Path(os.path.realpath(file))
    return path.is_relative_to(folder) and (folder != PACK or path.relative_to(PACK).parts[0] not in ("tests", ".venv"))
