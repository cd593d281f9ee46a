"""StoryLoom for ComfyUI: the same character, frame after frame, with any SDXL checkpoint."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI when it loads the pack. Nothing of the pack is imported before."""
    from .nodes import StoryLoomExtension

    return StoryLoomExtension()
