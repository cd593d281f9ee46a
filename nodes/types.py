"""Link types of the pack."""

from comfy_api.latest import io

Story = io.Custom("STORYLOOM_STORY")

Plan = io.Custom("STORYLOOM_PLAN")
"""A `prompts.batches.BatchPlan`."""
