"""The attention below a patch: which of another node's replacements record what they are called with."""

from functools import partial, wraps

import pytest
import torch

from storyloom.runtime.chain import Chain, records

LISTED = []


def plain(q, k, v, options):
    part = q * 1.0
    part += k.mean()
    return part


def scaled(gain):
    return lambda q, k, v, options: gain * q


def in_a_variable():
    kept = None

    def attention(q, k, v, options):
        nonlocal kept
        kept = k
        return q

    return attention


def in_a_list(q, k, v, options):
    LISTED.append(k)
    return q


def in_a_dict(kept, q, k, v, options):
    kept[options["block"]] = k
    return q


def inserted(q, k, v, options):
    LISTED.insert(0, k)
    return q


def around(function):
    @wraps(function)
    def outer(*given):
        return function(*given)

    return outer


class Network(torch.nn.Module):
    def forward(self, q, k, v, options):
        self.keys = k
        return q


class Delegating:
    def __call__(self, q, k, v, options):
        return self.attend(q, k)

    def attend(self, q, k):
        self.keys = k
        return q


class InAnAttribute:
    keys = None

    def __call__(self, q, k, v, options):
        self.keys = k
        return q


@pytest.mark.parametrize(
    "replacement, recorded",
    [
        (plain, False),
        (scaled(0.5), False),
        (partial(plain), False),
        (torch.nn.functional.scaled_dot_product_attention, False),
        (in_a_variable(), True),
        (in_a_list, True),
        (partial(in_a_dict, {}), True),
        (InAnAttribute(), True),
        (InAnAttribute().__call__, True),
        (inserted, True),
        (around(plain), False),
        (around(in_a_list), True),
        ((lambda inner: lambda *given: inner(*given))(in_a_list), True),
        (Network(), True),
        (Delegating(), True),
    ],
)
def test_a_replacement_that_records_is_known_by_its_code(replacement, recorded):
    assert records(replacement) is recorded


def test_a_recorder_is_called_once_more_with_the_tokens_of_the_layer():
    recorder, (q, k, v) = InAnAttribute(), torch.zeros(3, 1, 2, 4).unbind()
    chain = Chain({}, None, recorder)
    chain(q, torch.cat([k, k], dim=1), torch.cat([v, v], dim=1), heads=1)
    assert recorder.keys.shape[1] == 4
    chain.settle(q, k, v)
    assert recorder.keys is k


def test_without_a_replacement_nothing_is_called():
    Chain({}, None, None).settle(None, None, None)
