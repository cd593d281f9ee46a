"""The string that names attention blocks."""

import re

import pytest

from storyloom.runtime.blocks import check_blocks, choose_blocks

SDXL = {("input", 4): 2, ("input", 5): 2, ("input", 7): 10, ("input", 8): 10, ("middle", 0): 10}
SDXL |= {("output", n): 10 if n < 3 else 2 for n in range(6)}
NO_MIDDLE = {key: depth for key, depth in SDXL.items() if key[0] != "middle"}
OUTPUT = {key: None for key in SDXL if key[0] == "output"}


@pytest.mark.parametrize(
    "text, chosen",
    [
        ("all", dict.fromkeys(SDXL)),
        ("ALL", dict.fromkeys(SDXL)),
        ("output", OUTPUT),
        (" Output ", OUTPUT),
        ("middle", {("middle", 0): None}),
        ("middle 0", {("middle", 0): None}),
        ("input 4", {("input", 4): None}),
        ("input 4-5, middle", {("input", 4): None, ("input", 5): None, ("middle", 0): None}),
        ("input 0-4", {("input", 4): None}),
        ("input 4 - 5", {("input", 4): None, ("input", 5): None}),
        ("output 0.1", {("output", 0): (1,)}),
        ("output 0-2.0-3", {("output", n): (0, 1, 2, 3) for n in range(3)}),
        ("output 2-3.0-3", {("output", 2): (0, 1, 2, 3), ("output", 3): (0, 1)}),
        ("output 0.1, output 0.3-4", {("output", 0): (1, 3, 4)}),
        ("output 0.3, output 0.1, output 0.3", {("output", 0): (1, 3)}),
        ("output 0.1, output 0", {("output", 0): None}),
        ("output 0, output 0.1", {("output", 0): None}),
        ("all, output 0.1", dict.fromkeys(SDXL)),
        ("middle 0.9", {("middle", 0): (9,)}),
    ],
)
def test_a_string_names_blocks_and_layers(text, chosen):
    check_blocks(text)
    assert dict(choose_blocks(text, SDXL)) == chosen


@pytest.mark.parametrize(
    "text, choice",
    [
        ("", ""),
        ("output,", ""),
        ("outputs", "outputs"),
        ("output4", "output4"),
        ("input, up 3", "up 3"),
        ("output 1.2.3", "output 1.2.3"),
        ("output -1", "output -1"),
        ("output .1", "output .1"),
        ("output 1-", "output 1-"),
        ("all 3", "all 3"),
        ("output 0;1", "output 0;1"),
    ],
)
def test_what_is_no_block_is_shown_with_an_example(text, choice):
    for check in (check_blocks, lambda blocks: choose_blocks(blocks, SDXL)):
        with pytest.raises(ValueError) as error:
            check(text)
        message = str(error.value)
        assert message.startswith(f'Blocks "{text}": "{choice}" is not a block.')
        assert '"output 0-2.0-3"' in message


@pytest.mark.parametrize("text", ["output 3-1", "output 0.4-2", "middle, input 5-4.1"])
def test_a_range_that_counts_backwards_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(f'Blocks "{text}"') + ".*counts backwards"):
        check_blocks(text)


@pytest.mark.parametrize("text, choice", [("input 0-3", "input 0-3"), ("all, output 6", "output 6"), ("middle 1",) * 2])
def test_a_block_that_is_not_there_is_refused_with_what_is(text, choice):
    check_blocks(text)
    with pytest.raises(ValueError) as error:
        choose_blocks(text, SDXL)
    message = str(error.value)
    assert f'Blocks "{text}": "{choice}" has no attention in this model' in message
    assert "input 4, 5, 7, 8; middle 0; output 0, 1, 2, 3, 4, 5" in message


def test_a_layer_that_is_not_there_is_refused_with_what_is():
    with pytest.raises(ValueError) as error:
        choose_blocks("output 3.2-9", SDXL)
    assert 'Blocks "output 3.2-9"' in str(error.value)
    assert "output 3 has layers 0 to 1" in str(error.value)


def test_all_is_every_block_of_a_model_without_a_middle():
    """SSD-1B has no attention in its middle block."""
    assert dict(choose_blocks("all", NO_MIDDLE)) == dict.fromkeys(NO_MIDDLE)
    with pytest.raises(ValueError, match='"middle" has no attention'):
        choose_blocks("middle", NO_MIDDLE)
