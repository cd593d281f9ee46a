"""Link types of the pack."""

from comfy_api.latest import io

Story = io.Custom("STORYLOOM_STORY")

Plan = io.Custom("STORYLOOM_PLAN")
"""A `prompts.batches.BatchPlan`."""

FaceAnalysis = io.Custom("STORYLOOM_FACE_ANALYSIS")
"""A `models.storymaker.faces.FaceAnalysis`."""

Similarity = io.Custom("STORYLOOM_SIMILARITY")
"""A `measures.encoders.Encoder`."""

Measures = io.Custom("STORYLOOM_MEASURES")
"""A `measures.consistency.Consistency`."""

Character = io.Custom("STORYLOOM_CHARACTER")
"""A `models.storymaker.characters.CharacterReference`."""

StoryMaker = io.Custom("STORYLOOM_STORYMAKER")
"""A `nodes.storymaker_patcher.StoryMaker`."""
