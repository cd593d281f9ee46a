"""The nodes of the pack: schemas and thin execute methods, one file per menu group."""

from comfy_api.latest import ComfyExtension, io

from .attention import IPCA, ConsistentSelfAttention, StoryFreeU
from .batches import JoinBatches, SplitBatches
from .character_files import BlendCharacters, LoadCharacter, SaveCharacter
from .characters import Character, LoadFaceAnalysis
from .comparison import Compare
from .conditioning import EncodeOnePrompt, EncodePerFrame
from .consistency import StoryConsistency
from .demo import DemoModel, DemoStoryMaker
from .page import Page
from .routes import register
from .save_page import SavePage
from .similarity import DemoSimilarity, LoadOpenCLIP
from .story import EmptyLatent, Script
from .storymaker import ApplyStoryMaker, LoadStoryMaker


class StoryLoomExtension(ComfyExtension):
    async def on_load(self) -> None:
        register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            Script,
            EncodeOnePrompt,
            EncodePerFrame,
            EmptyLatent,
            IPCA,
            ConsistentSelfAttention,
            StoryFreeU,
            SplitBatches,
            JoinBatches,
            Page,
            SavePage,
            DemoModel,
            LoadFaceAnalysis,
            Character,
            BlendCharacters,
            SaveCharacter,
            LoadCharacter,
            LoadStoryMaker,
            ApplyStoryMaker,
            DemoStoryMaker,
            LoadOpenCLIP,
            StoryConsistency,
            Compare,
            DemoSimilarity,
        ]
