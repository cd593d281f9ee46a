"""Trains StoryMaker on real data, and prepares that data: `python -m storyloom.training.storymaker --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> None:
    """Run a command. Ends with a sentence and code 1 if a file or the data cannot be used."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        if words[:1] == ["prepare"]:
            from .prepare import prepare

            prepare(words[1:])
        elif words[:1] == ["pack"]:
            from .prepare import pack

            pack(words[1:])
        else:
            from .arguments import parser

            arguments = parser().parse_args(words)
            from .run import Run

            Run(arguments).train()
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
