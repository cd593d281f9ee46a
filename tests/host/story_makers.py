"""StoryMaker for the tiny SDXL, and the reference that it is compared with."""

from functools import cache

import torch
from story_graphs import LAYERS, call, images_of
from tiny_models import SDXL
from torch.nn.functional import adaptive_avg_pool2d

APPLY = {
    "token_strength": 0.8,
    "lora_strength": 0.8,
    "face_strength": 1.0,
    "appearance_strength": 1.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
}
FACE, IMAGE, CONTEXT, RANK, TOKENS = 32, 64, SDXL["context_dim"], 3, 20
"""Widths of a face vector, of a picture's features and of the tokens; rank of the LoRA; tokens of a character."""

NAMES = {
    ("input", 4): "down_blocks.1.attentions.0",
    ("input", 5): "down_blocks.1.attentions.1",
    ("input", 7): "down_blocks.2.attentions.0",
    ("input", 8): "down_blocks.2.attentions.1",
    ("middle", 0): "mid_block.attentions.0",
    **{("output", number): f"up_blocks.0.attentions.{number}" for number in range(3)},
    **{("output", number): f"up_blocks.1.attentions.{number - 3}" for number in range(3, 6)},
}
"""What diffusers calls the blocks of SDXL that have attention."""


def width_of(part, number):
    return 32 if number in {"input": (4, 5), "middle": (), "output": (3, 4, 5)}[part] else 64


def layers():
    return [(*block, index) for block, depth in LAYERS.items() for index in range(depth)]


def weights_of(host, dtype=torch.float64, seed=1):
    """StoryMaker's weights for the tiny SDXL."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    lora, image_kv = {}, {}
    for part, number, index in layers():
        width = width_of(part, number)
        image_kv[part, number, index] = random(width, CONTEXT), random(width, CONTEXT)
        for attention, source in (("attn1", width), ("attn2", CONTEXT)):
            for target in ("q", "k", "v", "out"):
                inside = source if target in "kv" else width
                name = f"{NAMES[part, number]}.transformer_blocks.{index}.{attention}.processor.to_{target}_lora"
                lora |= {f"{name}.down.weight": random(RANK, inside), f"{name}.up.weight": random(width, RANK)}
    network = host.pack("models.storymaker.ppr").PositionalPerceiverResampler(
        width=CONTEXT, image_width=IMAGE, id_width=FACE, depth=1, device="meta"
    )
    ppr = {name: random(*tensor.shape) for name, tensor in network.state_dict().items()}
    return host.pack("models.storymaker.weights").StoryMakerWeights(ppr, lora, image_kv)


def remembered(network):
    """The network, whose two halves compute the same question once: they are most of a small sampling run's time."""

    def once(resampler):
        compute, known = resampler.forward, {}

        def forward(*inputs):
            key = tuple((tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for tensor in inputs)
            if key not in known:
                known[key] = compute(*inputs)
            return known[key].clone()

        resampler.forward = forward

    once(network.perceiver_resampler)
    once(network.resample)
    return network


def maker_of(host, weights):
    """What Load StoryMaker adapter gives for weights that never change, so that its network remembers."""
    made = host.pack("nodes.storymaker_patcher").storymaker_of(weights)
    remembered(made.adapter.ppr)
    return made


def someone(host, seed, name="", image=IMAGE, **flags):
    """A character of random features."""
    characters, generator = host.pack("models.storymaker.characters"), torch.Generator().manual_seed(seed)
    vector = torch.nn.functional.normalize(torch.randn(FACE, generator=generator), dim=0)
    face, whole = torch.randn(2, 5, image, generator=generator)
    has = {"has_face": True, "has_character": True} | flags
    features = characters.CharacterFeatures(vector, face, whole, **has)
    return characters.CharacterReference(name, ((features, 1.0),), torch.zeros(8, 8, 3))


def apply(graph, host, model, maker, *characters, regions=(), **changes):
    """Apply StoryMaker with these characters, which are values as the adapter is."""
    inputs = {f"character_{number}": value for number, value in enumerate(characters, start=1)}
    inputs |= {f"region_{number}": value for number, value in enumerate(regions, start=1) if value is not None}
    inputs["storymaker"] = maker
    links = {name: call(graph, host, lambda _, value=value: value, "") for name, value in inputs.items()}
    return graph.add("StoryLoom_ApplyStoryMaker", model=model, **links, **APPLY | changes)()


class Reference:
    """StoryMaker by another road: replacements of the host's own kind over raw matrices, and edited weights."""

    def __init__(self, host, weights):
        self.weights = weights
        self.network = host.pack("models.storymaker.ppr").PositionalPerceiverResampler(
            width=CONTEXT, image_width=IMAGE, id_width=FACE, depth=1, device="meta"
        )
        self.network.load_state_dict({name: value.double() for name, value in weights.ppr.items()}, assign=True)
        remembered(self.network)
        self.tokens = cache(self._tokens)

    def _tokens(self, characters, positive):
        """Tokens [1, M, context] of characters, each of one picture."""
        if not positive:
            return self.network.unconditional(len(characters))
        features = [character.parts[0][0] for character in characters]
        inputs = (torch.stack([getattr(each, name) for each in features]) for name in ("id_embed", "character", "face"))
        return self.network(*(features.double() for features in inputs))

    def looks(self, casts, positive=(0,), strength=0.8, regions=None, text=None):
        """A function of MODEL that adds attention to the pictures in every layer.

        casts: the characters in each image, or in all; positive: the guider's numbers of what asks for the picture;
        regions: function of a layer's (height, width) that gives [characters, height, width], one for all images or one
        of each; text: the attention that is added to.
        """

        def attention(q, k, v, options):
            from comfy.ldm.modules.attention import attention_basic

            heads, rows = options["n_heads"], q.shape[0] // len(options["cond_or_uncond"])
            plain = text or (lambda q, k, v, options: attention_basic(q, k, v, options["n_heads"]))
            out, numbers = plain(q, k, v, options).clone(), images_of(options, rows)
            to_k, to_v = self.weights.image_kv[(*options["block"], options["block_index"])]
            for place, kind in enumerate(options["cond_or_uncond"]):
                for row, number in enumerate(numbers):
                    shown = casts[number] if isinstance(casts, list) else casts
                    if shown:
                        at = slice(place * rows + row, place * rows + row + 1)
                        tokens = self.tokens(shown, kind in positive)
                        bias = None
                        if regions is not None:
                            masks = regions(tuple(options["activations_shape"][-2:]), number).flatten(1).T
                            masks = masks.repeat_interleave(TOKENS, dim=1)
                            bias = torch.cat([torch.ones(len(masks), TOKENS), masks], dim=1).double().log()[None]
                        seen = attention_basic(
                            q[at], tokens @ to_k.double().T, tokens @ to_v.double().T, heads, mask=bias
                        )
                        out[at] += strength * seen
            return out

        def patch(model):
            model = model.clone()
            for part, number in LAYERS:
                model.set_model_attn2_replace(attention, part, number)
            return model

        return patch

    def edits(self, strength=0.8):
        """A function of MODEL that gives a tiny SDXL with StoryMaker's changes in its weights."""

        def edited(model):
            from tiny_models import tiny_model

            other = tiny_model("SDXL", SDXL, torch.float64)
            unet, model = other.model.diffusion_model, model.clone()
            for part, number, index in layers():
                block = unet.middle_block if part == "middle" else getattr(unet, f"{part}_blocks")[number]
                for attention in ("attn1", "attn2"):
                    layer = getattr(block[1].transformer_blocks[index], attention)
                    name = f"{NAMES[part, number]}.transformer_blocks.{index}.{attention}.processor"
                    targets = {"q": layer.to_q, "k": layer.to_k, "v": layer.to_v, "out": layer.to_out[0]}
                    for target, linear in targets.items():
                        up, down = (self.weights.lora[f"{name}.to_{target}_lora.{h}.weight"] for h in ("up", "down"))
                        linear.weight.data = linear.weight + strength * (up.double() @ down.double())
            other.model_options = model.model_options
            return other

        return edited

    def all_of(self, casts, **settings):
        """Both at the published strengths."""
        looks, edits = self.looks(casts, **settings), self.edits()
        return lambda model: looks(edits(model))


def pooled(mask, size):
    """A mask's mean over the cells of the latents, then of a layer: (height, width) -> [height, width]."""
    at_latents = adaptive_avg_pool2d(mask[None], size)
    return lambda grid: adaptive_avg_pool2d(at_latents, grid)[0]


def loaded_for(maker):
    """ComfyUI's entries of loaded models that are this adapter. Entries of models that are gone may lie among them."""
    import comfy.model_management

    entries = [(entry, entry.model) for entry in comfy.model_management.current_loaded_models]
    return [entry for entry, patcher in entries if patcher is not None and patcher.model is maker.adapter]
