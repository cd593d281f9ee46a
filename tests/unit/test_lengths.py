"""Prompts of different length in one conditioning."""

import math
import re

import pytest

from storyloom.prompts import lengths
from storyloom.prompts.lengths import Length, check_lengths


def prompts(*chunks):
    return [Length(frame, 75 * number - 5, 77 * number) for frame, number in enumerate(chunks)]


@pytest.mark.parametrize("chunks", [(1, 2, 3, 4), (1,), (24, 12, 8, 1), (5, 4), (7, 3), (11, 1, 1)])
def test_prompts_with_a_short_common_context_are_accepted(chunks):
    check_lengths(prompts(*chunks))


@pytest.mark.parametrize("chunks", [(3, 4, 5, 7), (25,), (5, 6), (8, 7, 1), tuple(range(1, 20))])
def test_other_prompts_are_refused_and_shortening_the_named_ones_helps(chunks):
    with pytest.raises(ValueError, match="chunks of 75 tokens") as refused:
        check_lengths(prompts(*chunks))
    message = str(refused.value)
    assert f"need {math.lcm(*chunks) * 77} rows of text" in message and "at most 1848 are possible" in message
    named = {int(number) - 1 for number in re.findall(r"frame (\d+) \(", message)}
    assert len(named) <= 6 and all(f"({75 * chunks[frame] - 5} tokens)" in message for frame in named)
    check_lengths(prompts(*(4 if number > 4 else number for number in chunks)))
    more = sum(number > 4 for number in chunks) - len(named)
    assert (f"and {more} more" in message) == (more > 0)


def test_tokens_that_are_short_enough_fit_even_if_every_word_moves_to_the_next_chunk():
    """ComfyUI splits a word only from 8 tokens on, so up to 6 places of a chunk stay empty."""
    assert lengths.SHORT_ENOUGH <= 75 * lengths.ALWAYS_FITS - 6 * (lengths.ALWAYS_FITS - 1)
    assert math.lcm(*range(1, lengths.ALWAYS_FITS + 1)) * lengths.ROWS <= lengths.MOST
