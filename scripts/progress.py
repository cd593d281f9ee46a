"""Progress bars for a prompt that ComfyUI runs."""

from __future__ import annotations


def title_of(node: dict) -> str:
    """Title of a node in API format."""
    return node.get("_meta", {}).get("title") or node["class_type"]


class ProgressBars:
    """A bar for each node that reports steps."""

    def __init__(self, prompt: dict):
        self.titles = {node: title_of(entry) for node, entry in prompt.items()}
        self.node = None
        self.bar = None

    def __call__(self, node: str, value: int, maximum: int) -> None:
        from tqdm import tqdm

        if node != self.node:
            self.close()
            self.node = node
            self.bar = tqdm(total=maximum, desc=f"  {self.titles.get(node, node)}", unit="step", ncols=90)
        self.bar.total = maximum
        self.bar.update(value - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
