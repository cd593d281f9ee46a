"""Model files that the templates use: file names and download addresses."""

CHECKPOINT = "sd_xl_base_1.0.safetensors"
CHECKPOINT_URL = f"https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/{CHECKPOINT}"
ADAPTER, ADAPTER_PAGE = "mask.bin", "https://huggingface.co/RED-AIGC/StoryMaker"
ENCODER = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
ENCODER_URL = "https://huggingface.co/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors"
PHOTOMAKER, PHOTOMAKER_PAGE = "photomaker-v1.bin", "https://huggingface.co/TencentARC/PhotoMaker"
POSE_NET = "controlnet-openpose-sdxl-1.0.safetensors"
POSE_NET_URL = (
    "https://huggingface.co/xinsir/controlnet-openpose-sdxl-1.0/resolve/main/diffusion_pytorch_model.safetensors"
)


def model_property(name: str, url: str, directory: str) -> dict:
    """Property of a loader node from which the browser interface offers to download a missing file."""
    return {"models": [{"name": name, "url": url, "directory": directory}]}
