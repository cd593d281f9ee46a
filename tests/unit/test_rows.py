"""How rows are grouped and named, and the draws that a device is given once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from storyloom.attention.sampled_tokens import SampledTokens, copied
from storyloom.runtime.rows import assembled, counted_up, grouped, named_rows

CPU = torch.device("cpu")
ASCENDING = some.lists(some.integers(0, 40), min_size=1, unique=True).map(sorted)


@given(ASCENDING)
def test_rows_name_the_same_as_their_numbers(numbers):
    x = torch.arange(41)
    rows = named_rows(numbers, CPU)
    assert x[rows].tolist() == numbers == counted_up(numbers, CPU).tolist()
    assert isinstance(rows, slice) is (numbers == list(range(numbers[0], numbers[-1] + 1)))


def test_rows_are_on_the_device_that_is_asked_for():
    rows = named_rows([0, 2], torch.device("meta"))
    assert rows.device.type == "meta" and rows.dtype == torch.long and rows.shape == (2,)


def test_groups_are_in_the_order_of_their_first_members():
    assert grouped(range(7), key=lambda n: n % 3) == {0: [0, 3, 6], 1: [1, 4], 2: [2, 5]}
    assert list(grouped("cabac", key=str)) == ["c", "a", "b"] and grouped((), key=str) == {}


def test_rows_are_assembled_from_their_parts():
    like, odd = torch.zeros(4, 2), torch.tensor([1, 3])
    out = assembled(like, [(odd, torch.ones(2, 2)), (slice(0, 1), torch.full((1, 2), 2.0)), (slice(2, 3), like[:1])])
    assert out[:, 0].tolist() == [2, 1, 0, 1]


def test_a_row_without_a_value_is_an_error():
    with pytest.raises(ValueError, match="computed for 2 of 3 rows"):
        assembled(torch.zeros(3, 2), [(slice(0, 2), torch.ones(2, 2))])


@pytest.fixture
def calls():
    return []


@pytest.fixture
def drawn(calls):
    def draw(step, image):
        calls.append((step, image))
        return torch.arange(image) + 100 * step

    return SampledTokens(draw, CPU)


def as_lists(tokens):
    return {image: part.tolist() for image, part in tokens.items()}


def test_tokens_of_a_step_are_drawn_once_for_every_image(drawn, calls):
    assert as_lists(drawn.of(1, [2, 0, 2])) == {2: [100, 101], 0: []}
    assert as_lists(drawn.of(1, [0, 1])) == {2: [100, 101], 0: [], 1: [100]}
    assert calls == [(1, 2), (1, 0), (1, 1)]


def test_another_step_draws_again_and_forgets(drawn, calls):
    drawn.of(1, [1, 2])
    assert as_lists(drawn.of(2, [1])) == {1: [200]}
    assert calls == [(1, 1), (1, 2), (2, 1)]


def test_a_step_that_is_prepared_draws_for_the_images_of_the_last_one(drawn, calls):
    drawn.of(1, [1, 2])
    drawn.renew(2)
    drawn.renew(2)
    assert calls[2:] == [(2, 1), (2, 2)]
    assert as_lists(drawn.of(2, [1, 2])) == {1: [200], 2: [200, 201]} and len(calls) == 4


def test_nothing_to_prepare_draws_nothing(drawn, calls):
    drawn.renew(1)
    assert calls == [] and as_lists(drawn.of(1, [1])) == {1: [100]}


def test_many_parts_are_copied_in_one_piece():
    parts = [torch.arange(n) for n in (3, 0, 2)]
    there = copied(parts, torch.device("meta"))
    assert [part.shape for part in there] == [(3,), (0,), (2,)] and all(part.device.type == "meta" for part in there)
    assert all(torch.equal(a, b) for a, b in zip(copied(parts, CPU), parts, strict=True))
    assert len({part.untyped_storage().data_ptr() for part in copied(parts, CPU)}) == 1
