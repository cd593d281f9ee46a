"""StoryMaker's networks as they are trained: the token network, and a processor for each attention layer of a UNet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...models.storymaker.ppr import TOKENS, PositionalPerceiverResampler
from ...models.storymaker.weights import ADAPTER, PROJECTION, Key, StoryMakerWeights
from ...standalone.layers import transformers
from .batch import Batch, per_character, places
from .drops import Dropped
from .ip_adapter import Taken, copy_weights
from .processors import Attend, StoryMakerProcessor, attend


class TrainedAdapter(nn.Module):
    """All that learns: `ppr`, and `processors`, one for each attention layer in the file's order.

    unet: a `diffusers.UNet2DConditionModel`, which gives the sizes and is not changed before `install`; ppr: the token
    network, whose width may differ from the text's; rank: of the LoRA. Parameters have the device and dtype of ppr; on
    a real device they are initialised from the seed, those of ppr too.
    """

    def __init__(
        self,
        unet: nn.Module,
        ppr: PositionalPerceiverResampler,
        rank: int = 128,
        seed: int = 0,
        attend: Attend = attend,
    ):
        super().__init__()
        self.ppr = ppr
        self.names = list(unet.attn_processors)
        """diffusers' names of the processors, in the file's order."""
        keys: dict[int, Key] = {}
        for each in transformers(unet):
            for j, block in enumerate(each.blocks):
                keys.setdefault(id(block), (*each.block, j))
        self.keys = [keys[id(unet.get_submodule(name.rsplit(".", 2)[0]))] for name in self.names]
        """Block and index of each layer in ComfyUI's numbering. A block that is repeated counts as its first."""
        where = {"device": ppr.bg_embed.device, "dtype": ppr.bg_embed.dtype}
        self.processors = nn.ModuleList()
        for name in self.names:
            layer = unet.get_submodule(name.removesuffix(".processor"))
            image_width = ppr.bg_embed.shape[-1] if layer.is_cross_attention else None
            sizes = layer.to_q.out_features, layer.to_k.in_features, rank, image_width
            self.processors.append(StoryMakerProcessor(*sizes, attend, **where))
        if where["device"].type != "meta":
            initialise(self, unet, torch.Generator().manual_seed(seed))

    def install(self, unet: nn.Module) -> None:
        """Freeze a UNet, and let these processors compute its attention. They become submodules of the UNet.

        Move or cast the UNet before: later, that would cast what is trained.
        """
        unet.requires_grad_(False)
        unet.set_attn_processor(dict(zip(self.names, self.processors, strict=True)))
        self.requires_grad_(True)

    def tokens(self, batch: Batch, dropped: Dropped) -> tuple[Tensor, Tensor]:
        """Image tokens [B, 20 * (1 + largest count), W], and booleans of that length [B, ...], False where absent.

        A picture's tokens are the background's and those of its own characters, in order; absent ones are zeros. A
        picture whose references are dropped gets the tokens of zero features.
        """
        own = places(batch.counts)
        device, dtype = batch.face.device, batch.face.dtype
        seen = (~per_character(dropped.picture, batch.counts)).to(device, dtype)
        tokens = self.ppr.character_tokens(
            batch.id_embeds.to(dtype) * seen[:, None],
            batch.character * seen[:, None, None],
            batch.face * seen[:, None, None],
            dropped.face.to(device),
            dropped.appearance.to(device),
            positions=[position for _, position in own],
        )
        most = max(batch.counts)
        background, absent = self.ppr.bg_embed.to(tokens), tokens.new_zeros(1, *tokens.shape[1:])
        rows = [
            torch.cat([background, *of_picture.split(1), *[absent] * (most - len(of_picture))]).flatten(0, 1)
            for of_picture in tokens.split(list(batch.counts))
        ]
        lengths = torch.tensor([TOKENS * (1 + count) for count in batch.counts], device=device)
        keep = torch.arange(TOKENS * (1 + most), device=device) < lengths[:, None]
        return torch.stack(rows), keep

    def state(
        self, dtype: torch.dtype | None = None, values: Mapping[str, Tensor] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """The two parts of StoryMaker's file with its names.

        dtype: default the parameters' own; values: others in place of the parameters, such as their moving averages.
        """
        parts: dict[str, dict[str, Tensor]] = {PROJECTION: {}, ADAPTER: {}}
        for name, parameter in self.named_parameters():
            module, _, inside = name.partition(".")
            tensor = (values[name] if values else parameter).detach()
            parts[PROJECTION if module == "ppr" else ADAPTER][inside] = tensor.to(dtype or tensor.dtype).contiguous()
        return parts

    def load(self, weights: StoryMakerWeights) -> None:
        """Take the values of StoryMaker's file. Raises ValueError if it lacks a part, RuntimeError for other shapes."""
        if weights.missing:
            raise ValueError(weights.missing)
        tensors = {}
        for number, (name, key) in enumerate(zip(self.names, self.keys, strict=True)):
            own = f"{name}."
            tensors |= {
                f"{number}.{inside}": weights.lora[own + inside]
                for inside, _ in self.processors[number].named_parameters()
                if "_lora." in inside
            }
            if self.processors[number].cross:
                k, v = weights.image_kv[key]
                tensors |= {f"{number}.to_k_ip.weight": k, f"{number}.to_v_ip.weight": v}
        self.ppr.load_state_dict(weights.ppr)
        self.processors.load_state_dict(tensors)

    def from_ip_adapter(self, plus: Mapping[str, Any] | None = None, faceid: Mapping[str, Any] | None = None) -> Taken:
        """Start from IP-Adapter's tensors, see `ip_adapter.copy_weights`; the rest stays. Returns what was found."""
        return copy_weights(self.ppr, self.processors, plus, faceid)


def initialise(adapter: TrainedAdapter, unet: nn.Module, generator: torch.Generator) -> None:
    """Values from which training starts without a file, drawn on the CPU.

    The LoRA and the token network's last layer start at 0. The image tokens' keys and values start as the text's where
    the widths agree, because the UNet can read those.
    """

    def draw(parameter: Tensor, scale: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)

    with torch.no_grad():
        for name, parameter in adapter.ppr.named_parameters():
            if name in ("pos_embed", "bg_embed") or name.endswith("latents"):
                draw(parameter, parameter.shape[-1] ** -0.5)
            elif parameter.ndim == 2:
                draw(parameter, parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.zero_()
        adapter.ppr.norm_out.weight.zero_()
        for name, processor in zip(adapter.names, adapter.processors, strict=True):
            layer = unet.get_submodule(name.removesuffix(".processor"))
            for inside, parameter in processor.named_parameters():
                base = getattr(layer, inside[:4]).weight if "_ip." in inside else None
                if base is not None and base.shape == parameter.shape and not base.is_meta:
                    parameter.copy_(base)
                elif inside.endswith("up.weight"):
                    parameter.zero_()
                else:
                    draw(parameter, 1 / parameter.shape[0] if "_lora." in inside else 1 / math.sqrt(parameter.shape[1]))
