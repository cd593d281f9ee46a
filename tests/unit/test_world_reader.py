"""The reader recovers every attribute of a drawn scene, through noise like that of a small model's samples."""

import itertools

import numpy as np
import pytest

from storyloom.world.canvas import EMPTY
from storyloom.world.draw import HALF, SHIFTS, compose, draw
from storyloom.world.reader import MARKED, Reader, accuracy, confusion, tables
from storyloom.world.scene import (
    ACTIONS,
    CLOTHES,
    FURS,
    HATS,
    LOOKS,
    PLACES,
    PROPS,
    SIZE,
    SPECIES,
    TOGETHER,
    Figure,
    Scene,
)


def any_scene(random, count):
    """A random scene; all values of an attribute are equally likely."""
    figures = tuple(Figure(*(str(random.choice(v)) for v in (SPECIES, *LOOKS.values()))) for _ in range(count))
    actions, props = (ACTIONS, PROPS) if count == 1 else (TOGETHER, PROPS[:1])
    return Scene(str(random.choice(PLACES)), str(random.choice(actions)), str(random.choice(props)), figures)


def blurred(picture):
    """Mean over 3x3 pixels."""
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    return sum(padded[y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)) / 9


def noisy(picture, random, noise=0.08):
    return np.clip(picture + noise * random.standard_normal(picture.shape), 0, 1)


def sampled(picture, random):
    """A slight blur, a slight tint of the whole picture, and noise."""
    return noisy(0.9 * picture + 0.1 * blurred(picture) + random.uniform(-0.03, 0.03, 3), random)


def read_back(count, pictures, change):
    """Pairs of true and read scenes, and the readings' errors."""
    random = np.random.default_rng(count)
    scenes = [any_scene(random, count) for _ in range(pictures)]
    readings = Reader().read_all([change(draw(scene, random) / 255, random) for scene in scenes])
    return [(scene, reading.scene) for scene, reading in zip(scenes, readings, strict=True)], readings


@pytest.mark.parametrize("count", [1, 2])
def test_a_drawn_scene_is_read_without_a_mistake_and_explained_completely(count):
    pairs, readings = read_back(count, 30, lambda picture, _: picture)
    assert all(true == read for true, read in pairs)
    assert all(0 <= reading.error < 1e-3 for reading in readings)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("change", [noisy, sampled, lambda p, r: noisy(p, r, 0.15)], ids=["noisy", "sampled", "worse"])
def test_every_attribute_is_read_through_noise(count, change):
    pairs, _ = read_back(count, 25, change)
    assert min(accuracy(confusion(pairs)).values()) >= 0.98


def test_the_error_is_the_noise_that_was_added():
    _, readings = read_back(1, 10, noisy)
    assert np.mean([reading.error for reading in readings]) == pytest.approx(3 * 0.08**2, rel=0.2)


def test_garbage_has_a_high_error():
    random = np.random.default_rng(0)
    _, readings = read_back(1, 10, sampled)
    good = max(reading.error for reading in readings)
    scenes = [draw(any_scene(random, 1), random) / 255 for _ in range(10)]
    garbage = [random.random((SIZE, SIZE, 3)), np.full((SIZE, SIZE, 3), 0.5), np.zeros((SIZE, SIZE, 3))]
    mixed = [(one + other) / 2 for one, other in zip(scenes, scenes[1:], strict=False)]
    assert min(reading.error for reading in Reader().read_all([*garbage, *mixed])) > 1.8 * good


@pytest.mark.parametrize("factor", [1, 2, 8])
def test_large_pixels_are_read_as_small_ones(factor):
    random = np.random.default_rng(3)
    scene = any_scene(random, 1)
    small = draw(scene, random) / 255
    large = small.repeat(factor, 0).repeat(factor, 1)
    assert Reader().read(large) == Reader().read(small)
    assert Reader().read(large.astype(np.float32)).scene == scene


def test_large_pixels_are_averaged():
    random = np.random.default_rng(4)
    large = (draw(any_scene(random, 1), random) / 255).repeat(8, 0).repeat(8, 1)
    assert Reader().read(large + 0.2 * random.standard_normal(large.shape)).error < 3 * 0.2**2 / 8**2 * 1.2


def test_a_picture_is_not_changed_by_reading():
    picture = np.random.default_rng(0).random((48, 48, 3))
    before = picture.copy()
    Reader().read(picture)
    assert np.array_equal(picture, before)


@pytest.mark.parametrize("shape", [(24, 24), (24, 48, 3), (25, 25, 3), (24, 24, 4), (3, 24, 24), (0, 0, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="multiple of 24"):
        Reader().read(np.zeros(shape))


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="divide by 255"):
        Reader().read(np.zeros((24, 24, 3), np.uint8))


def test_pictures_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        Reader().read(np.full((24, 24, 3), np.nan))


def test_nothing_that_is_drawn_has_a_marked_colour():
    """The reader distinguishes the parts of a figure by these colours."""
    marked = np.array((FURS[MARKED.fur], CLOTHES[MARKED.shirt], CLOTHES[MARKED.trousers])) / 255
    for poses, pixels in ((tables().one, SIZE * SIZE), (tables().left, SIZE * HALF), (tables().right, SIZE * HALF)):
        flat = np.concatenate([flat for flat, _ in poses.fixed])
        fixed = tables().colours[np.unique(flat // pixels)]
        assert np.abs(fixed[:, None] - marked).max(-1).min() > 1 / 255


def test_a_figure_drawn_in_the_middle_and_moved_is_the_figure_drawn_there():
    empty = np.full((SIZE, SIZE, 3), EMPTY, np.int16)
    middle = SHIFTS[1][len(SHIFTS[1]) // 2]
    for action, prop, species, hat in itertools.product(ACTIONS, PROPS, SPECIES, HATS[1:3]):
        scene = Scene("meadow", action, prop, (Figure(species, "red", "blue", "green", hat),))
        first, central, last = (compose(empty, scene, [at]) for at in (SHIFTS[1][0], middle, SHIFTS[1][-1]))
        left, right = middle - SHIFTS[1][0], SHIFTS[1][-1] - middle
        assert (first[:, : SIZE - left] == central[:, left:]).all() and (first[:, SIZE - left :] == EMPTY).all()
        assert (last[:, right:] == central[:, : SIZE - right]).all() and (last[:, :right] == EMPTY).all()


def test_the_tables_are_built_once():
    assert Reader()._tables is tables() is Reader()._tables


def test_confusion_counts_true_against_read():
    fox = Figure("fox", "red", "blue", "green", "none")
    cat = Figure("cat", "red", "white", "green", "cap")
    true = Scene("beach", "running", "none", (fox,))
    counts = confusion([(true, true), (true, Scene("snow", "running", "book", (cat,)))])
    labels, places = counts["place"]
    assert places[labels.index("beach"), labels.index("beach")] == 1
    assert places[labels.index("beach"), labels.index("snow")] == 1
    assert places.sum() == 2 and places.dtype.kind == "i"
    labels, species = counts["species"]
    assert species[labels.index("fox"), labels.index("cat")] == 1 and species.sum() == 2
    shares = accuracy(counts)
    assert shares["place"] == shares["hat"] == shares["prop"] == 0.5
    assert shares["action"] == shares["fur"] == shares["figures"] == 1


def test_confusion_compares_figures_only_where_their_number_is_right():
    fox = Figure("fox", "red", "blue", "green", "none")
    counts = confusion([(Scene("beach", "sitting", "none", (fox, fox)), Scene("beach", "sitting", "none", (fox,)))])
    assert counts["figures"][1].tolist() == [[0, 0], [1, 0]]
    assert counts["species"][1].sum() == 0 and np.isnan(accuracy(counts)["species"])
