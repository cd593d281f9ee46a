"""A device that refuses float64, as Apple's and some of Intel's do, on a machine that has none."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
"""A device type that every build of torch knows and that nothing is computed on."""


class There(torch.Tensor):
    """A tensor that says it is on DEVICE. `inner` holds its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError("this device does not support float64")
        there = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=DEVICE, strides=inner.stride()
        )
        there.inner = inner
        return there

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _called(function, args, kwargs or {})


class Operations(TorchDispatchMode):
    """While it is entered, what an operation puts on DEVICE is There."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _called(function, args, kwargs or {})


class Creation(TorchFunctionMode):
    """While it is entered, what is made of numbers for DEVICE is There."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            return There(function(*args, **{**kwargs, "device": "cpu"}).clone())
        return function(*args, **kwargs)


@contextmanager
def a_device_without_float64():
    with Operations(), Creation():
        yield


def there(tensor):
    """A copy of a tensor on the device."""
    return There(tensor.detach().clone())


def _called(function, args, kwargs):
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    target = kwargs.get("device")
    stays = any(isinstance(each, There) for each in tensors) if target is None else torch.device(target) == DEVICE
    plain = {**kwargs} if target is None else {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(_inner, args), **tree_map(_inner, plain))
    if function._schema.name.endswith("_"):  # in place
        return args[0]
    return tree_map(lambda each: There(each) if isinstance(each, torch.Tensor) else each, result) if stays else result


def _inner(value):
    return value.inner if isinstance(value, There) else value
