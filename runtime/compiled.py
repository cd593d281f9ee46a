"""A compiled UNet that keeps the patches of a run: attention is one operator, opaque to the compiler.

ComfyUI compiles without guards on transformer_options, which hold the patches, so its own compiled UNet would never
call ours. Here the network is compiled once more, for runs with a patch, by a separate backend object, so that neither
reuses the other's code. It gets the same options in every call, with all guards: in every attention layer an operator
(torch.library) with the position of that layer. When the operator runs, it looks up the options of the current call and
attends accordingly; the graph contains none of them. The whole network is one graph or not compiled at all, because a
layer compiled by itself would be reused for another with the wrong position.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .chain import HostAttend

SLOTS = ("attn1", "attn2")
BACKENDS = ("inductor", "eager")
"""Backends that run an operator in every call. Recorded CUDA graphs replay the first call."""

BLOCKS = (("middle", 0), *((part, number) for part in ("input", "output") for number in range(100)))
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, str slot, str part, int block, int layer, int heads, int width, "
    "ScalarType? precision, SymInt[] grid, int number) -> Tensor"
)
_now: ContextVar[tuple[dict[str, Any], HostAttend]] = ContextVar("options of the UNet call at hand, and the host's")


def compilable(settings: Mapping[str, Any] | None) -> bool:
    """Whether patches work with these ComfyUI settings for torch.compile."""
    known = settings is not None and settings.get("backend") in BACKENDS and settings.get("mode") in (None, "default")
    return known and set(settings.get("options") or ()) <= {"guard_filter_fn"}


def _attend(q, k, v, slot, part, block, layer, heads, width, precision, grid, number) -> Tensor:
    """Attention of one layer in the current call: the replacement in its options, or the host's own."""
    options, host = _now.get()
    here = {key: value for key, value in options.items() if key not in ("patches", "patches_replace")}
    here |= {"block": (part, block), "block_index": layer, "n_heads": heads, "dim_head": width}
    here |= {"attn_precision": precision, "activations_shape": list(grid), "transformer_index": number}
    replacements = options["patches_replace"].get(slot, {})
    patch = replacements.get((part, block, layer), replacements.get((part, block)))
    out = host(q, k, v, heads, None, here) if patch is None else patch(q, k, v, here)
    inputs = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    return out.clone() if out.untyped_storage().data_ptr() in inputs else out.contiguous()


@cache
def _replacements() -> dict[str, dict[tuple[str, int], Callable]]:
    """Replacements for all layers that call the operator; always the same objects."""
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
    """A separate backend, one object for all runs: dynamo keeps the code of each backend apart."""
    return lambda graph, inputs: torch._dynamo.lookup_backend(name)(graph, inputs)


class CompiledUNet(nn.Module):
    """Replaces a host's UNet during a call. What cannot be compiled runs uncompiled, with a warning."""

    def __init__(self, unet: nn.Module, host: HostAttend, settings: Mapping[str, Any]):
        super().__init__()
        settings = {"backend": _backend(settings["backend"]), "dynamic": settings.get("dynamic")}
        compiler = partial(torch.compile, fullgraph=True, **settings)
        self.__dict__.update(unet=unet, host=host, compiled=compiler(unet), failed=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["unet"], name)

    def forward(self, x: Tensor, *args: Any, transformer_options: dict[str, Any], **kwargs: Any) -> Tensor:
        reason = "" if self.failed else _why_not_compiled(transformer_options)
        if reason is None:
            options = {**transformer_options, "original_shape": list(x.shape)}
            token = _now.set((options, self.host))
            try:
                return self.compiled(x, *args, transformer_options={"patches_replace": _replacements()}, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                reason = str(error).strip().partition("\n")[0]
            finally:
                _now.reset(token)
        if not self.failed:
            self.__dict__["failed"] = True
            logging.warning("The torch.compile node is left out of this run, which is slower: %s", reason)
        return self.unet(x, *args, transformer_options=transformer_options, **kwargs)


def _why_not_compiled(options: Mapping[str, Any]) -> str | None:
    """Why a call with these options cannot run compiled, None when it can."""
    others = [name for name, patches in options.get("patches", {}).items() if patches]
    others += [slot for slot, there in options["patches_replace"].items() if there and slot not in SLOTS]
    others += ["diffusion_model"] * any(options.get("wrappers", {}).get("diffusion_model", {}).values())
    if not others:
        return None
    return f"a compiled UNet would ignore its patches of the kind {', '.join(others)}."
