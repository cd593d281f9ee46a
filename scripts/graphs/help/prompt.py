"""A prompt in API format, built node by node, and stories drawn in it by the demo model."""

from __future__ import annotations

from collections.abc import Callable

from ..model import WIDGETS, Node, inputs_of, value_of
from ..parts import DEMO_SETTINGS, DEMO_SIZE

Link = Callable[..., list]
"""Number of an output, 0 if none is given -> link to it in API format."""


class Graph(dict):
    """A prompt in API format. shown: name -> the node that shows these pictures."""

    def __init__(self, schemas: dict):
        super().__init__()
        self.schemas = schemas
        self.shown: dict[str, str] = {}

    def add(self, kind: str, **inputs) -> Link:
        """Add a node, with defaults for the other widgets. Returns a function: number of an output -> link to it.

        A node that the graph already has, with the same inputs, is not added again, so nothing is drawn twice.
        """
        schema = self.schemas[kind]
        added = Node(kind, (0, 0), (0, 0), inputs)
        values = {
            name: value_of(added, name, options)
            for name, type_, options in inputs_of(schema)
            if name in inputs or type_ in WIDGETS
        }
        entry = {"class_type": kind, "inputs": values, "_meta": {"title": schema["display_name"]}}
        key = next((key for key, node in self.items() if node == entry), str(len(self) + 1))
        self[key] = entry
        return lambda output=0: [key, output]

    def show(self, name: str, images: list) -> None:
        """Show these pictures under a name."""
        self.shown[name], _ = self.add("PreviewImage", images=images)()


class DemoModel:
    """The demo model in a graph, which draws stories."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.loader = graph.add("StoryLoom_DemoModel")

    def model(self, *patches: tuple[str, dict]) -> list:
        """The demo model with these nodes on it."""
        model = self.loader(0)
        for kind, settings in patches:
            model = self.graph.add(kind, model=model, **settings)()
        return model

    def sample(self, model: list, positive: list, latent: list, negative: list | None = None) -> list:
        zeros = negative or self.graph.add("ConditioningZeroOut", conditioning=positive)()
        links = {"model": model, "positive": positive, "negative": zeros, "latent_image": latent}
        latents = self.graph.add("KSampler", seed=7, cfg=5.0, sampler_name="euler", **links, **DEMO_SETTINGS)
        return self.graph.add("VAEDecode", samples=latents(), vae=self.loader(2))()

    def latent(self, story: list, shared: bool = True) -> list:
        size = dict.fromkeys(("width", "height"), DEMO_SIZE)
        return self.graph.add("StoryLoom_EmptyLatent", story=story, shared_noise=shared, **size)()

    def draw(
        self,
        name: str,
        script: dict,
        *patches: tuple[str, dict],
        encode: str = "EncodeOnePrompt",
        shared: bool = True,
        **text: object,
    ) -> tuple[list, list]:
        """Show a story under this name. text: settings of the encode node. Returns links to frames and story."""
        story = self.graph.add("StoryLoom_Script", **script)()
        positive = self.graph.add(f"StoryLoom_{encode}", clip=self.loader(1), story=story, **text)()
        frames = self.sample(self.model(*patches), positive, self.latent(story, shared))
        self.graph.show(name, frames)
        return frames, story
