"""Who is seen by which rows of a UNet call, where, and by what tokens; StoryMaker's networks at a small size."""

import math
from types import SimpleNamespace

import pytest
import torch
from rounding import rounding
from torch.func import functional_call

from storyloom.attention.storymaker import ImageConditioning, RowCharacters, region_cover
from storyloom.models.storymaker.adapter import StoryMakerAdapter
from storyloom.models.storymaker.characters import CharacterFeatures, CharacterReference
from storyloom.models.storymaker.ppr import PositionalPerceiverResampler
from storyloom.models.storymaker.weights import StoryMakerWeights
from storyloom.prompts.conditioning import StoryCond, StoryRow
from storyloom.prompts.tokens import StoryTokens
from storyloom.runtime.cache import RunCache
from storyloom.runtime.call import Chunk, Conditioning, UNetCall
from storyloom.runtime.patch import nested

HEADS, WIDTH, TOKENS = 2, 8, 20
TEXT = StoryTokens(range(1, 2), (range(2, 3),), 3, 77)


def story(*frames, numbers=None):
    """A tag whose rows show these characters; the cast in the order of their appearance."""
    numbers = numbers or range(len(frames))
    rows = tuple(StoryRow(number, frame, TEXT, ()) for number, frame in zip(numbers, frames, strict=True))
    return StoryCond(rows, 77, tuple(dict.fromkeys(name for frame in frames for name in frame)))


def named(*names):
    return tuple(SimpleNamespace(name=name) for name in names)


def patch(characters, adapter=None, regions=None, **changes):
    settings = {"strength": 0.8, "face_strength": 1.0, "appearance_strength": 1.0, "start_percent": 0.0}
    settings |= {"end_percent": 1.0, "blocks": {}} | changes
    return ImageConditioning(adapter, characters, regions or (None,) * len(characters), **settings)


@pytest.mark.parametrize(
    "names, cast, played",
    [
        (("Fox", "Owl"), ("Fox", "Owl"), {"Fox": (0,), "Owl": (1,)}),
        (("owl", "FOX"), ("Fox", "Owl"), {"Owl": (0,), "Fox": (1,)}),
        (("", ""), ("Owl", "Fox"), {"Owl": (0,), "Fox": (1,)}),
        (("", "Fox"), ("Fox", "Owl", "Cat"), {"Owl": (0,), "Fox": (1,)}),
        (("Fox", "", "Fox"), ("Fox", "Owl"), {"Fox": (0, 2), "Owl": (1,)}),
        (("", "", ""), ("Fox",), {"Fox": (0,)}),
        (("", "Fox"), ("",), {"": (0, 1)}),
        (("", ""), (), {"": (0, 1)}),
    ],
)
def test_who_plays_whom(names, cast, played):
    assert patch(named(*names)).roles(story(*((name,) for name in cast))) == played


def test_a_name_of_nobody_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match='named "Wolf". Its characters are Fox, Owl. Give the character one of these'):
        patch(named("Wolf")).no_effect_reason(story(("Fox",), ("Owl",)), 2)


@pytest.mark.parametrize(
    "names, frames, seen",
    [
        (("Fox",), [("Fox",), ()], True),
        (("Owl",), [("Fox",), ()], False),
        (("", ""), [("Owl",)], True),
        (("",), [()], False),
    ],
)
def test_a_run_in_which_nobody_of_them_appears_is_hindered(names, frames, seen):
    tag = StoryCond(story(*frames).rows, 77, ("Fox", "Owl"))
    assert (patch(named(*names)).no_effect_reason(tag, len(frames)) is None) is seen
    assert patch(named(*names)).no_effect_reason(None, 3) is None


@pytest.mark.parametrize(
    "masks, numbers, fits",
    [
        (1, (0, 1), True),
        (2, (0, 1), True),
        (2, (0, 4), True),
        (5, (0, 4), True),
        (4, (0, 4), False),
        (0, (0, 1), False),
    ],
)
def test_masks_are_one_for_all_one_per_image_or_one_per_frame_of_the_story(masks, numbers, fits):
    patched = patch(named(""), regions=(torch.ones(masks, 2, 2),))
    tag = story(*[("",)] * len(numbers), numbers=numbers)
    if fits:
        assert patched.no_effect_reason(tag, len(numbers)) is None
    else:
        with pytest.raises(ValueError, match=f"A region has {masks} masks, but the batch has 2 images"):
            patched.no_effect_reason(tag, len(numbers))
    if masks == 5:
        with pytest.raises(ValueError, match="A region has 5 masks"):
            patched.no_effect_reason(None, 2)


def call_of(*conditionings, rows, images=None, **more):
    chunks = (Chunk(range(i * rows, (i + 1) * rows), c) for i, c in enumerate(conditionings))
    return UNetCall(1.0, tuple(chunks), images, **more)


def test_rows_are_grouped_by_how_many_are_in_them():
    tag = story(("Fox",), (), ("Owl", "Fox"), ("Owl",))
    chunks = (Conditioning(None, 77, False), Conditioning(tag, 77, area=(2, 2, 0, 4)))
    one, two = patch(named("Fox", "Owl"))._groups(call_of(*chunks, rows=4, story=tag))
    area = (2, 2, 0, 4)
    assert one.rows.tolist() == [0, 3, 4, 7] and two.rows.tolist() == [2, 6]
    fox, owl = (0,), (1,)
    assert [(cast.characters, cast.positive, cast.area) for cast in one.shown] == [
        (fox, False, None),
        (owl, False, None),
        (fox, True, area),
        (owl, True, area),
    ]
    assert two.shown == (RowCharacters((0, 1), (0, 0), False, None), RowCharacters((0, 1), (0, 0), True, area))


def test_without_a_story_everybody_is_everywhere():
    (group,) = patch(named("Fox", ""))._groups(call_of(Conditioning(None, 77), rows=3))
    assert group.rows == slice(0, 3) and {cast.characters for cast in group.shown} == {(0, 1)}


@pytest.mark.parametrize(
    "count, places, expected", [(5, None, [0, 3, 4]), (3, None, [0, 1, 2]), (5, (0, 2), [0, 4]), (1, None, [0, 0, 0])]
)
def test_a_mask_is_that_of_the_frame_or_of_the_place_in_the_batch(count, places, expected):
    tag = story(("",), ("",), ("",), numbers=(0, 3, 4))
    patched = patch(named(""), regions=(torch.ones(count, 2, 2),))
    (group,) = patched._groups(call_of(Conditioning(tag, 77), rows=len(expected), images=places))
    assert [cast.masks for cast in group.shown] == [(number,) for number in expected]


@pytest.mark.parametrize("area", [None, (4, 6, 2, 1)])
def test_a_region_covers_the_mean_of_its_cells(area):
    mask = torch.rand(16, 24, generator=torch.Generator().manual_seed(0))
    grid = (4, 4) if area is None else (2, 3)

    def cells(mask):
        latents = mask.unflatten(0, (8, 2)).unflatten(2, (8, 3)).mean((1, 3))
        if area is not None:
            latents = latents[2:6, 1:7]
        return latents.unflatten(0, (grid[0], 2)).unflatten(2, (grid[1], 2)).mean((1, 3))

    assert off(region_cover(mask, (8, 8), area, grid), cells(mask)) < rounding(cells, mask)


def test_a_region_is_within_0_and_1():
    mask = torch.tensor([[-1.0, 0.25], [3.0, 1.0]])
    assert torch.equal(region_cover(mask, (2, 2), None, (2, 2)), torch.tensor([[0.0, 0.25], [1.0, 1.0]]))


def off(a, b):
    return (a.double() - b.double()).abs().max().item()


def attend(q, k, v, heads, mask=None, options=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT / math.sqrt(q.shape[-1]) + (0 if mask is None else mask)
    return (torch.softmax(logits, dim=-1) @ v).transpose(1, 2).flatten(2)


class Chain:
    """The host's attention at one layer."""

    def __init__(self, grid=(2, 3), layer=("middle", 0), index=1):
        self.options = {"block": layer, "block_index": index, "activations_shape": [1, 4, *grid]}

    def __call__(self, q, k, v, heads):
        return attend(q, k, v, heads)

    plain = staticmethod(attend)


class Pictures:
    """An adapter whose keys and values are numbers that tell of whom and for what they are; it notes every question."""

    def __init__(self):
        self.calls = []

    def tokens(self, characters, face_strength, appearance_strength, device):
        names = [character.name for character in characters]
        self.calls.append(("tokens", *names))
        number = sum(map(len, names)) + face_strength + 10 * appearance_strength
        return tuple(torch.full((1, TOKENS * (1 + len(names)), 1), value) for value in (number, -number))

    def keys_values(self, layer, tokens):
        self.calls.append(("keys", *layer, float(tokens[0, 0, 0])))
        places = torch.arange(tokens.shape[1] * WIDTH, dtype=torch.float32).view(1, -1, WIDTH)
        return torch.sin(places * tokens[0, 0, 0]), torch.cos(places + tokens[0, 0, 0])


def qkv(rows):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, n, WIDTH, generator=generator, dtype=torch.float64) for n in (6, 5, 5)]


def test_every_row_looks_at_its_own_cast_inside_their_regions():
    tag, adapter = story(("Fox",), (), ("Fox", "Rabbit")), Pictures()
    region = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(1))
    patched = patch(
        named("Fox", "Rabbit"), adapter, (None, region), strength=0.5, face_strength=0.5, appearance_strength=2.0
    )
    call = call_of(Conditioning(None, 77, False), Conditioning(tag, 77), rows=3, story=tag, size=(2, 3))
    q, k, v = qkv(6)
    out = patched.attend(q, k, v, HEADS, call, Chain())

    def written(region):
        rows = attend(q, k, v, HEADS)
        for row, names in enumerate([("Fox",), (), ("Fox", "Rabbit")] * 2):
            if names:
                tokens = Pictures().tokens(named(*names), 0.5, 2.0, None)[0 if row > 2 else 1]
                keys, values = (x.double() for x in Pictures().keys_values((), tokens))
                bias = torch.zeros(6, keys.shape[1], dtype=torch.float64)
                if len(names) == 2:
                    bias[:, 2 * TOKENS :] = region[2].flatten().log()[:, None]
                rows[row] += 0.5 * attend(q[row : row + 1], keys, values, HEADS, mask=bias)[0]
        return rows

    bound = rounding(written, region)
    for row, expected in enumerate(written(region)):
        assert off(out[row], expected) < bound, row
    assert out.dtype == torch.float64


def test_prompts_for_two_parts_of_a_picture_have_their_own_parts_of_a_region():
    region = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(2))
    patched, areas = patch(named("Fox"), regions=(region,)), ((2, 3, 0, 0), (2, 3, 2, 1))
    call = call_of(*(Conditioning(None, 77, area=area) for area in areas), rows=1, size=(4, 4))
    (group,) = patched._groups(call)
    mask = patched._mask(group, call, qkv(2)[0], 2 * TOKENS, Chain((2, 3)).options)
    first, second = mask.exp()[:, 0, :, TOKENS:]
    bound = rounding(lambda region: region.log().exp(), region)
    assert off(first, region[0, :2, :3].reshape(6, 1).expand(6, TOKENS)) < bound
    assert off(second, region[0, 2:, 1:].reshape(6, 1).expand(6, TOKENS)) < bound


def test_tokens_are_made_once_in_a_run_and_keys_once_for_every_layer():
    adapter, kept = Pictures(), RunCache()
    patched = patch(named("Fox"), adapter)
    for layer in (0, 1, 0):
        call = call_of(Conditioning(None, 77, False), Conditioning(None, 77), rows=2, cache=kept)
        patched.attend(*qkv(4), HEADS, call, Chain(index=layer))
    assert adapter.calls.count(("tokens", "Fox")) == 1 and len(adapter.calls) == 1 + 2 * 2
    assert {entry[3] for entry in adapter.calls[1:]} == {0, 1}
    patch(named("Fox"), adapter).attend(*qkv(4), HEADS, call, Chain())
    assert adapter.calls.count(("tokens", "Fox")) == 2, "another node's strengths may be others"


def test_a_region_is_measured_once_in_a_run_for_every_size_of_layer(monkeypatch):
    patched, kept, sizes = patch(named("Fox"), Pictures(), (torch.rand(1, 4, 6),)), RunCache(), []

    def counted(mask, size, area, grid):
        sizes.append(grid)
        return region_cover(mask, size, area, grid)

    monkeypatch.setattr("storyloom.attention.storymaker.region_cover", counted)
    for grid in ((2, 3), (2, 3), (3, 2)):
        call = call_of(Conditioning(None, 77, False), Conditioning(None, 77), rows=1, size=(4, 6), cache=kept)
        for index in (0, 1):
            patched.attend(*qkv(2), HEADS, call, Chain(grid, index=index))
    assert sizes == [(2, 3)] * 2 + [(3, 2)] * 2, "once for either of the two rows"


def test_a_call_with_nobody_in_it_asks_nothing():
    tag, adapter = story((), ()), Pictures()
    tensors = qkv(2)
    out = patch(named("Fox"), adapter).attend(*tensors, HEADS, call_of(Conditioning(tag, 77), rows=2), Chain())
    assert torch.equal(out, attend(*tensors, HEADS)) and adapter.calls == []


class Settings:
    def __init__(self, name, adds=False, with_name=None):
        self.name, self.adds, self.with_name = name, adds, with_name

    def combine(self, other):
        return Settings(f"{self.name}{other.name}", self.adds) if other.name == self.with_name else None


def test_what_adds_goes_around_what_changes_keys_and_what_combines_is_one():
    plus, first, second, more = Settings("+", True), Settings("a", with_name="b"), Settings("b"), Settings("-", True)
    chain = nested([plus, first, more, second])
    assert [patch.name for patch in chain] == ["ab", "+", "-"]
    assert nested([]) == ()


KEY, OTHER = ("input", 4, 0), ("middle", 0, 1)


@pytest.fixture(scope="module")
def adapter():
    generator = torch.Generator().manual_seed(0)
    network = PositionalPerceiverResampler(width=64, image_width=64, id_width=16, depth=2)
    ppr = {name: torch.randn(value.shape, generator=generator) / 4 for name, value in network.state_dict().items()}
    image_kv = {key: tuple(torch.randn(2, width, 64, generator=generator)) for key, width in ((KEY, 8), (OTHER, 12))}
    return StoryMakerAdapter(StoryMakerWeights(ppr, {}, image_kv))


def features(seed, has_face=True, has_character=True):
    generator = torch.Generator().manual_seed(seed)
    face, whole = torch.randn(2, 5, 64, generator=generator)
    return CharacterFeatures(torch.randn(16, generator=generator), face, whole, has_face, has_character)


def character(*parts):
    shares = [1 / len(parts)] * len(parts) if isinstance(parts[0], CharacterFeatures) else None
    return CharacterReference("", tuple(zip(parts, shares, strict=True)) if shares else parts, torch.zeros(1, 1, 3))


def tokens(adapter, *characters, face=1.0, appearance=1.0):
    return adapter.tokens(characters, face, appearance, torch.device("cpu"))


def bound_of_tokens(adapter, *given):
    """What rounding may do to any token: features and the network's weights moved by one unit in the last place."""
    names, values = zip(*adapter.ppr.state_dict().items(), strict=True)

    def reference(*numbers):
        weights = dict(zip(names, numbers[len(given) :], strict=True))
        return functional_call(adapter.ppr, weights, numbers[: len(given)])

    return rounding(reference, *given, *values)


def stacked(people):
    return [torch.stack([getattr(each, name) for each in people]) for name in ("id_embed", "character", "face")]


def test_tokens_are_those_of_the_network_with_everybody_in_its_place(adapter):
    people = [features(1), features(2), features(3)]
    positive, negative = tokens(adapter, *map(character, people), face=0.5, appearance=0.25)
    given = stacked(people)
    assert off(positive, adapter.ppr(*given, 0.5, 0.25)) < bound_of_tokens(adapter, *given)
    assert torch.equal(negative, adapter.ppr.unconditional(3))
    assert positive.shape == negative.shape == (1, 80, 64) and positive.dtype == torch.float32


def test_a_blend_is_the_mean_of_tokens_by_shares(adapter):
    one, other = features(1), features(2, has_face=False)
    mixed = character((one, 0.75), (other, 0.25))
    alone = [tokens(adapter, character(each))[0][:, 20:] for each in (one, other)]
    blended, _ = tokens(adapter, mixed)
    bound = bound_of_tokens(adapter, *stacked([one, other]))
    assert off(blended[:, 20:], 0.75 * alone[0] + 0.25 * alone[1]) < bound
    assert torch.equal(blended[:, :20], adapter.ppr.bg_embed)


@pytest.mark.parametrize("flag, strength", [("has_face", "face"), ("has_character", "appearance")])
def test_a_half_that_a_character_lacks_is_left_out_as_with_strength_0(adapter, flag, strength):
    lacking, _ = tokens(adapter, character(features(1, **{flag: False})))
    off, _ = tokens(adapter, character(features(1)), **{strength: 0.0})
    on, _ = tokens(adapter, character(features(1)))
    assert torch.equal(lacking, off) and not torch.allclose(lacking, on, atol=1e-2)


def test_keys_and_values_are_products_with_the_layers_matrices(adapter):
    given = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    for key, width in ((KEY, 8), (OTHER, 12)):
        for part, which in zip(adapter.keys_values(key, given), "kv", strict=True):
            matrix = adapter.state_dict()[f"projections.{'_'.join(map(str, key))}_{which}.weight"]
            bound = rounding(lambda given, matrix: given @ matrix.T, given, matrix)
            assert part.shape == (1, 40, width) and off(part, given @ matrix.T) < bound
    assert adapter.widths == {KEY: 8, OTHER: 12} and adapter.context == 64


@pytest.mark.parametrize("count", [0, 4])
def test_1_to_3_characters_fit_into_a_picture(adapter, count):
    with pytest.raises(ValueError, match=f"StoryMaker supports 1 to 3 characters per image, got {count}"):
        tokens(adapter, *[character(features(1))] * count)


@pytest.mark.parametrize("name, shape", [("id_embed", (15,)), ("face", (5, 63)), ("character", (5, 63))])
def test_features_of_other_widths_are_refused(adapter, name, shape):
    adapter.check_characters([character(features(1))])
    wrong = {key: getattr(features(1), key) for key in ("id_embed", "face", "character")}
    wrong = CharacterFeatures(**wrong | {name: torch.zeros(shape)}, has_face=True, has_character=True)
    with pytest.raises(ValueError, match="this adapter needs 16 and 64: make the character again with"):
        adapter.check_characters([character(features(1)), character(features(2), wrong)])
