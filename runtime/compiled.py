"""A compiled UNet that keeps the patches of a run: attention is one operation, which the compiler does not look into.

ComfyUI compiles without guards on transformer_options, where patches stand, so its own compiled UNet would never call
ours. Here the network is compiled once more, for runs with a patch, by a backend of its own, so that neither takes
what was compiled for the other. It gets the same options at every call, with all guards: in every attention layer an
operator (torch.library) that says which layer it is. When it runs it finds the options of the call at hand and
attends as these say. Nothing of them is in the graph. The whole network is one graph or not compiled at all, for a
layer that was compiled by itself would say the name of another.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .chain import HostAttend

SLOTS = ("attn1", "attn2")
BACKENDS = ("inductor", "eager")
"""Those that run an operator at every call. Recorded CUDA graphs play the first call again."""

BLOCKS = (("middle", 0), *((part, number) for part in ("input", "output") for number in range(100)))
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, str slot, str part, int block, int layer, int heads, int width, "
    "ScalarType? precision, SymInt[] grid, int number) -> Tensor"
)
_now: ContextVar[tuple[dict[str, Any], HostAttend]] = ContextVar("options of the UNet call at hand, and the host's")


def can_compile(settings: Mapping[str, Any] | None) -> bool:
    """Whether these settings of ComfyUI's for torch.compile are ones that patches live through."""
    known = settings is not None and settings.get("backend") in BACKENDS and settings.get("mode") in (None, "default")
    return known and set(settings.get("options") or ()) <= {"guard_filter_fn"}


def _attend(q, k, v, slot, part, block, layer, heads, width, precision, grid, number) -> Tensor:
    """Attention of one layer in the call at hand: what stands in its options, or the host's own."""
    told, host = _now.get()
    here = {key: value for key, value in told.items() if key not in ("patches", "patches_replace")}
    here |= {"block": (part, block), "block_index": layer, "n_heads": heads, "dim_head": width}
    here |= {"attn_precision": precision, "activations_shape": list(grid), "transformer_index": number}
    there = told["patches_replace"].get(slot, {})
    patch = there.get((part, block, layer), there.get((part, block)))
    out = host(q, k, v, heads, None, here) if patch is None else patch(q, k, v, here)
    inputs = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    return out.clone() if out.untyped_storage().data_ptr() in inputs else out.contiguous()


@cache
def _replacements() -> dict[str, dict[tuple[str, int], Callable]]:
    """Replacements for all layers, always the same: they call the operator."""
    name = f"{re.sub(r'[^a-zA-Z0-9]', '_', __name__)}::attend"
    operator = torch.library.custom_op(name, _attend, mutates_args=(), schema=SCHEMA)
    operator.register_fake(lambda q, *_: q.new_empty(q.shape))
    call = operator._opoverload

    def at(slot: str) -> Callable:
        def attend(q: Tensor, k: Tensor, v: Tensor, here: dict[str, Any]) -> Tensor:
            layer = (*here["block"], here["block_index"], here["n_heads"], here["dim_head"], here["attn_precision"])
            return call(q, k, v, slot, *layer, here["activations_shape"], here["transformer_index"])

        return attend

    return {slot: dict.fromkeys(BLOCKS, at(slot)) for slot in SLOTS}


@cache
def _backend(name: str) -> Callable:
    """A backend of our own, one object for all runs: dynamo keeps what each backend has made apart."""
    return lambda graph, inputs: torch._dynamo.lookup_backend(name)(graph, inputs)


class CompiledUNet(nn.Module):
    """Stands in for a host's UNet during a call. What cannot be compiled runs as the network itself, with a warning."""

    def __init__(self, unet: nn.Module, host: HostAttend, settings: Mapping[str, Any]):
        super().__init__()
        compiled = torch.compile(
            unet, backend=_backend(settings["backend"]), fullgraph=True, dynamic=settings.get("dynamic")
        )
        self.__dict__.update(unet=unet, host=host, compiled=compiled, hindered=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["unet"], name)

    def forward(self, x: Tensor, *args: Any, transformer_options: dict[str, Any], **kwargs: Any) -> Tensor:
        hindrance = "" if self.hindered else _hindrance(transformer_options)
        if hindrance is None:
            told = {**transformer_options, "original_shape": list(x.shape)}
            token = _now.set((told, self.host))
            try:
                return self.compiled(x, *args, transformer_options={"patches_replace": _replacements()}, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                hindrance = str(error).strip().partition("\n")[0]
            finally:
                _now.reset(token)
        if not self.hindered:
            self.__dict__["hindered"] = True
            logging.warning("The torch.compile node is left out of this run, which is slower: %s", hindrance)
        return self.unet(x, *args, transformer_options=transformer_options, **kwargs)


def _hindrance(options: Mapping[str, Any]) -> str | None:
    """What else stands in these options that the network looks at, None if there is nothing."""
    others = [name for name, patches in options.get("patches", {}).items() if patches]
    others += [slot for slot, there in options["patches_replace"].items() if there and slot not in SLOTS]
    others += ["diffusion_model"] * any(options.get("wrappers", {}).get("diffusion_model", {}).values())
    if not others:
        return None
    return f"a compiled UNet would not notice its patches of the kind {', '.join(others)}."
