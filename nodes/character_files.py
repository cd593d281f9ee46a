"""Existing characters: blending two, saving and loading."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..models.storymaker import characters
from .folders import files_in, register
from .ranges import in_range
from .types import Character as CharacterType

FOLDER, SUFFIXES = "storyloom_characters", (characters.SUFFIX,)

# Characters are saved to the output folder, which is also searched when loading, as for the models that ComfyUI saves.
register(FOLDER, SUFFIXES, FOLDER, os.path.join(folder_paths.get_output_directory(), FOLDER))


def character_output() -> io.Output:
    return CharacterType.Output(
        "character", display_name="CHARACTER", tooltip="For Apply StoryMaker and the other character nodes."
    )


def preview_output() -> io.Output:
    return io.Image.Output(
        "preview", display_name="preview", tooltip="What the adapter sees: the face, then the character on white."
    )


class BlendCharacters(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_BlendCharacters",
            display_name="Blend characters",
            category="StoryLoom/character",
            description=(
                "Blends two characters into one. Also combines several images of one person; blends can be blended "
                "again."
            ),
            search_aliases=["mix faces", "mix characters", "interpolate", "morph", "StoryMaker"],
            inputs=[
                CharacterType.Input("first", tooltip="The character at ratio 0."),
                CharacterType.Input("second", tooltip="The character at ratio 1."),
                io.Float.Input(
                    "ratio",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the second character: 0 is only the first, 0.5 an equal mix, 1 only the second.",
                ),
                io.String.Input("name", default="", tooltip="The blend's name in the story script. Empty: no name."),
            ],
            outputs=[character_output(), preview_output()],
        )

    @classmethod
    @in_range
    def execute(cls, first, second, ratio, name) -> io.NodeOutput:
        character = characters.blend(first, second, ratio, name.strip())
        return io.NodeOutput(character, character.picture[None].clone())


class SaveCharacter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_SaveCharacter",
            display_name="Save character",
            category="StoryLoom/character",
            description=(
                "Saves a character (about 3 MB per image) to output/storyloom_characters. Load character then loads it "
                "in later sessions, without the image and the encoders."
            ),
            search_aliases=["export character", "save embeds", "store character", "StoryMaker"],
            is_output_node=True,
            inputs=[
                CharacterType.Input("character", tooltip="The character to save."),
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip="File name without folder or extension. Empty: the character's own name.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="On: replaces a file of that name. Off: keeps it and appends the next free number to the "
                    "new name.",
                ),
            ],
            outputs=[
                io.String.Output("file", display_name="file", tooltip="The file name, as listed by Load character.")
            ],
        )

    @classmethod
    def validate_inputs(cls, file_name=None):
        try:
            return not file_name or bool(characters.file_stem(file_name))
        except ValueError as error:
            return str(error)

    @classmethod
    def execute(cls, character, file_name, overwrite) -> io.NodeOutput:
        folder = Path(folder_paths.get_output_directory(), FOLDER)
        path = folder / (characters.file_stem(file_name or character.name) + characters.SUFFIX)
        folder.mkdir(parents=True, exist_ok=True)
        path = path if overwrite else characters.free_path(path)
        characters.save_character(path, character)
        return io.NodeOutput(path.name)


class LoadCharacter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_LoadCharacter",
            display_name="Load character",
            category="StoryLoom/character",
            description=(
                "Loads a character that was saved with Save character, from output/storyloom_characters or "
                "models/storyloom_characters. Press R to see new files."
            ),
            search_aliases=["import character", "load embeds", "saved character", "StoryMaker"],
            inputs=[
                io.Combo.Input("file", options=files_in(FOLDER, SUFFIXES), tooltip="The character's file."),
            ],
            outputs=[character_output(), preview_output()],
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        status = os.stat(folder_paths.get_full_path_or_raise(FOLDER, file))
        return status.st_mtime_ns, status.st_size, status.st_ino

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        character = characters.load_character(Path(folder_paths.get_full_path_or_raise(FOLDER, file)))
        return io.NodeOutput(character, character.picture[None].clone())
