"""Token ids and windows; tests/host compares them with ComfyUI's."""

import pytest
import torch
from rounding import rounding
from torch.func import functional_call

from storyloom.standalone.text import TextEncoders, tokenize


def ids(text, key="l"):
    return [token for window in tokenize(text)[key] for token, _, _ in window]


def test_a_known_text_has_the_known_ids():
    known = [320, 736, 3240, 530, 320, 1746, 7356]
    assert ids("a red fox in a blue coat") == [49406, *known] + [49407] * 69
    assert ids("a red fox in a blue coat", "g") == [49406, *known, 49407] + [0] * 68


def test_word_ids_are_0_for_start_end_and_padding():
    (window,) = tokenize("a fox")["g"]
    assert [word for _, _, word in window] == [0, 1, 1] + [0] * 74
    assert {weight for _, weight, _ in window} == {1.0}


def test_long_text_takes_further_windows():
    windows = tokenize("fox " * 80)["l"]
    assert [len(window) for window in windows] == [77, 77]
    assert [sum(word for *_, word in window) for window in windows] == [75, 5]


def test_case_and_space_do_not_count_and_weights_are_plain_text():
    assert ids(" A  Red\tFOX ") == ids("a red fox")
    assert ids("(fox:1.2)") != ids("fox") and ids("\\(fox\\)") == ids("(fox)")


@pytest.mark.parametrize("text, windows", [("a red fox", 1), ("fox " * 80, 2)])
def test_encodings_are_of_both_encoders(small, text, windows):
    encode = TextEncoders(small.text_encoder, small.text_encoder_2, torch.device("cpu"))
    context, info = encode(tokenize(text))
    assert context.shape == (1, 77 * windows, 2048) and info["pooled_output"].shape == (1, 1280)
    tokens = torch.tensor([[token for token, _, _ in tokenize(text)["g"][0]]])
    end = tokens[0].tolist().index(49407)
    layers = {name: p.detach() for name, p in small.text_encoder_2.named_parameters() if "embedding" not in name}

    @torch.no_grad()
    def summary(*weights):
        weights = dict(zip(layers, weights, strict=True))
        last = functional_call(small.text_encoder_2, weights, (tokens,)).last_hidden_state
        return last[:, end] @ weights["text_projection.weight"].T

    expected = summary(*layers.values())
    assert (info["pooled_output"] - expected).abs().max() < rounding(summary, *layers.values())
