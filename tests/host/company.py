"""What other packs do around a UNet call, as functions of MODEL: ten lines in place of each pack."""

from math import lcm

import torch


def attention_couple(regions, masks):
    """A function of MODEL that gives parts of the image texts of their own, inside the UNet's cross-attention.

    regions: a context [1 or images, T, D] for each region. masks: [1 + regions, height, width], of the sampler's
    positive first, then of every region; their sum need not be 1. As Attention Couple does it: the positive's rows are
    repeated, once per region, with another context in each repeat, and the outputs are added up by the masks.
    """

    def spread(q, context, value, options):
        chunks = len(options["cond_or_uncond"])
        rows = q.shape[0] // chunks
        length = lcm(*(text.shape[1] for text in (context, *regions)))
        queries, contexts = [], []
        for kind, query, own in zip(options["cond_or_uncond"], q.chunk(chunks), context.chunk(chunks), strict=True):
            texts = [own] if kind == 1 else [own, *regions]
            queries += [query] * len(texts)
            contexts += [_filled(text.to(context), rows, length) for text in texts]
        contexts = torch.cat(contexts)
        return torch.cat(queries), contexts, contexts

    def joined(out, options):
        kinds = options["cond_or_uncond"]
        rows = out.shape[0] // sum(1 if kind == 1 else 1 + len(regions) for kind in kinds)
        weights = _weights(masks, options["activations_shape"][-2:], out)
        parts, start = [], 0
        for kind in kinds:
            count = 1 if kind == 1 else 1 + len(regions)
            own = out[start : start + count * rows].unflatten(0, (count, rows))
            parts.append(own[0] if kind == 1 else (own * weights).sum(0))
            start += count * rows
        return torch.cat(parts)

    def patch(model):
        model = model.clone()
        model.set_model_attn2_patch(spread)
        model.set_model_attn2_output_patch(joined)
        return model

    return patch


def tiled(tile_batch=3):
    """A function of MODEL that calls the UNet with 2 x 2 overlapping tiles, `tile_batch` of them at once.

    As Tiled Diffusion (MultiDiffusion) does it: a call's rows are all rows of the host's call for the first tile, then
    all of them for the second, and so on; contexts are repeated with them, and nothing else is changed. Where tiles
    overlap, the mean counts.
    """

    def wrapper(apply_model, args):
        x, boxes = args["input"], _boxes(*args["input"].shape[-2:])
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for start in range(0, len(boxes), tile_batch):
            now = boxes[start : start + tile_batch]
            tiles = torch.cat([x[box] for box in now])
            c = {name: _repeated(value, x.shape[0], len(now)) for name, value in args["c"].items()}
            out = apply_model(tiles, _repeated(args["timestep"], x.shape[0], len(now)), **c)
            for box, tile in zip(now, out.chunk(len(now)), strict=True):
                total[box] += tile
                count[box] += 1
        return total / count

    return _wrapping(wrapper)


def row_by_row(model):
    """MODEL whose UNet is called with one row after another, with the options of the whole call in each."""

    def wrapper(apply_model, args):
        rows = args["input"].shape[0]
        outs = []
        for row in range(rows):
            c = {name: _row(value, rows, row) for name, value in args["c"].items()}
            outs.append(apply_model(args["input"][row : row + 1], _row(args["timestep"], rows, row), **c))
        return torch.cat(outs)

    return _wrapping(wrapper)(model)


def passed_through(model):
    """MODEL with a function around the UNet's calls that changes nothing."""
    return _wrapping(lambda apply_model, args: apply_model(args["input"], args["timestep"], **args["c"]))(model)


def deep_cache(interval=2, kept=3):
    """A function of MODEL that runs the UNet's blocks by itself, and reuses deep features between full evaluations.

    As DeepCache does it: the model's own call is never made. One in `interval` evaluations runs all blocks, and the
    others only the first `kept` input and the last `kept` output blocks. Counting begins anew when the noise level
    rises. Without a ControlNet.
    """

    def patch(model):
        network, state = model.model, {"sigma": -1.0, "evaluations": {}, "deep": {}}

        def wrapper(apply_model, args):
            sigma, c = float(args["timestep"].max()), args["c"]
            if sigma > state["sigma"]:
                state["evaluations"], state["deep"] = {}, {}
            state["sigma"] = sigma
            key = (tuple(args["cond_or_uncond"]), args["input"].shape)
            number = state["evaluations"].get(key, 0)
            state["evaluations"][key] = number + 1
            deep = state["deep"].get(key) if number % interval else None
            out, state["deep"][key] = _evaluated(network, args["input"], args["timestep"], c, kept, deep)
            return out

        return _wrapping(wrapper)(model)

    return patch


def smoothed_energy(*blocks):
    """A function of MODEL that evaluates the positive once more, with blurred queries in these blocks, as SEG does."""

    def blurred(q, k, v, options):
        from comfy.ldm.modules.attention import attention_basic

        return attention_basic(q.mean(1, keepdim=True).expand_as(q), k, v, options["n_heads"])

    def patch(model):
        import comfy.model_patcher
        import comfy.samplers

        def after(args):
            options = args["model_options"].copy()
            for block in blocks:
                options = comfy.model_patcher.set_model_options_patch_replace(options, blurred, "attn1", *block)
            inputs = [args["cond"]], args["input"], args["sigma"], options
            (extra,) = comfy.samplers.calc_cond_batch(args["model"], *inputs)
            return args["denoised"] + 3.0 * (args["cond_denoised"] - extra)

        model = model.clone()
        model.set_model_sampler_post_cfg_function(after)
        return model

    return patch


def _evaluated(model, x, sigma, c, kept, deep):
    """The denoised latents and the features below the last `kept` output blocks. deep: such features, or None."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed
    from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

    unet, dtype, sampling = model.diffusion_model, model.get_dtype_inference(), model.model_sampling
    options = {**c.get("transformer_options", {}), "original_shape": list(x.shape), "transformer_index": 0}
    patches = options.get("patches", {})
    steps = sampling.timestep(sigma).to(dtype)
    emb = unet.time_embed(timestep_embedding(steps, unet.model_channels).to(dtype))
    if c.get("y") is not None:
        emb = emb + unet.label_emb(c["y"].to(dtype))
    h, context, skips = sampling.calculate_input(sigma, x).to(dtype), c["c_crossattn"].to(dtype), []
    for number, block in enumerate(unet.input_blocks):
        if deep is None or number < kept:
            options["block"] = ("input", number)
            h = forward_timestep_embed(block, h, emb, context, options)
            skips.append(h)
    if deep is None:
        options["block"] = ("middle", 0)
        h = forward_timestep_embed(unet.middle_block, h, emb, context, options)
    for number, block in enumerate(unet.output_blocks):
        if number == len(unet.output_blocks) - kept:
            deep = h = h if deep is None else deep
        elif deep is not None and number < len(unet.output_blocks) - kept:
            continue
        options["block"] = ("output", number)
        skip = skips.pop()
        for patch in patches.get("output_block_patch", ()):
            h, skip = patch(h, skip, options)
        size = skips[-1].shape if skips else None
        h = forward_timestep_embed(block, torch.cat([h, skip], dim=1), emb, context, options, size)
    return sampling.calculate_denoised(sigma, unet.out(h).to(x.dtype), x), deep


def _wrapping(wrapper):
    def patch(model):
        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return model

    return patch


def _boxes(height, width):
    """Indices of 2 x 2 tiles that overlap by half of their side."""
    sides = [[slice(0, -(-side * 3 // 4)), slice(side - -(-side * 3 // 4), side)] for side in (height, width)]
    return [(..., rows, columns) for rows in sides[0] for columns in sides[1]]


def _repeated(value, rows, times):
    """A call's input for `times` tiles."""
    per_row = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == rows
    return torch.cat([value] * times) if per_row else value


def _row(value, rows, row):
    """A call's input for one row."""
    return value[row : row + 1] if isinstance(value, torch.Tensor) and value.shape[0] == rows else value


def _filled(context, rows, length):
    """A context repeated to so many rows and columns."""
    return context.repeat(rows // context.shape[0], length // context.shape[1], 1)


def _weights(masks, size, out):
    """Share of every region in every token of a layer, [1 + regions, 1, tokens, 1]."""
    fitted = torch.nn.functional.interpolate(masks[None].to(out), size=tuple(size), mode="bilinear")[0]
    return (fitted / fitted.sum(0)).flatten(1)[:, None, :, None]
