"""Heads in the demo model's pictures: found where they were drawn, and the same head always has the same vector."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import torch

from storyloom.models.demo.faces import DemoFaces, identity
from storyloom.models.demo.model import basis
from storyloom.models.storymaker.crops import ARCFACE, choose_face
from storyloom.models.storymaker.faces import read_face
from storyloom.world.backgrounds import background
from storyloom.world.canvas import OUTLINE
from storyloom.world.draw import compose
from storyloom.world.figures import head_row
from storyloom.world.scene import ACTIONS, FURS, HATS, PLACES, PROPS, SIZE, SPECIES, TOGETHER, Figure, Scene

CAT = Figure("cat", "grey", "yellow", "blue", "crown")
FOX = Figure("fox", "red", "green", "white", "none")
RABBIT = Figure("rabbit", "white", "red", "purple", "none")


@pytest.fixture(scope="module")
def analysis():
    return DemoFaces()


def shown(scene, at=8, block=8, noise=0.0, seed=0):
    """An 8-bit picture of a scene; a single figure's head begins in this column."""
    random = np.random.default_rng(seed)
    picture = compose(background(scene.place, random), scene, [at] if len(scene.figures) == 1 else [3, 3]) / 255
    picture = np.clip(picture + noise * random.standard_normal(3) + noise * random.standard_normal(picture.shape), 0, 1)
    return np.kron((255 * picture).round().astype(np.uint8), np.ones((block, block, 1), np.uint8))


def scene(*figures, place="meadow", action="standing", prop="none"):
    return Scene(place, action, prop, figures)


@pytest.mark.parametrize("block", [2, 8, 11])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_head_is_found_where_it_is_drawn(analysis, action, block):
    found, side = analysis.find(shown(scene(CAT, action=action), 6, block))
    assert side is None
    (face,) = found
    top = head_row(action)
    assert face.box.tolist() == [6 * block, top * block, 14 * block, (top + 5) * block]


def test_two_heads_are_found_and_the_mask_chooses(analysis):
    picture = shown(scene(CAT, FOX, place="snow"))
    left, right = analysis.find(picture)[0]
    assert left.box.tolist() == [24, 72, 88, 112] and right.box.tolist() == [104, 72, 168, 112]
    alone = analysis.find(shown(scene(FOX)))[0][0]
    for half, face in ((slice(0, 96), left), (slice(96, 192), right)):
        mask = np.zeros((192, 192), np.uint8)
        mask[:, half] = 255
        part, source = read_face(picture, mask, analysis, None, None)
        assert source == "the largest inside the mask, 64 x 40 pixels, of 2 found"
        assert torch.equal(part.id_embed, analysis.id_embed(picture, face))
    assert analysis.id_embed(picture, right) @ analysis.id_embed(picture, alone) > 0.999
    assert choose_face(np.array([left.box, right.box]), None) == 0


@pytest.mark.parametrize("who", [CAT, FOX, RABBIT, replace(CAT, species="bear", hat="top hat")])
@pytest.mark.parametrize("action", ["standing", "jumping", "sleeping"])
def test_the_aligned_crop_shows_the_head_with_ears_and_hat(analysis, who, action):
    """Scaled down, the crop is the square of the picture around the head, with nothing cut off."""
    picture = shown(scene(who, action=action, place="desert"), 8, 8)
    (face,) = analysis.find(picture)[0]
    crop = analysis.crop(picture, face).astype(float)
    x, y = 8 * 8 - 12, 8 * head_row(action) - 36
    square = picture[y : y + 88, x : x + 88].astype(float)
    cells = np.linspace(0, 223, 23).round().astype(int)
    middles = (cells[:-1] + cells[1:]) // 2
    at = ((middles + 0.5) * 88 / 224).astype(int)
    assert np.abs(crop[np.ix_(middles, middles)] - square[np.ix_(at, at)]).mean() < 12
    body = (np.abs(square - square[0, 0]).sum(-1) > 0) & (np.abs(square - OUTLINE).sum(-1) > 0)
    assert not body[0].any(), "there is sky or an outline above the ears"
    assert np.allclose((face.landmarks + 0.5 - (x, y)) / 88, ARCFACE / 112, atol=1e-3)


def scenes(who, random, count):
    """Scenes with this figure in other clothes, places, actions, props and positions, sometimes beside another."""
    for _ in range(count):
        dressed = replace(
            who, shirt=str(random.choice(["red", "white"])), trousers=str(random.choice(["blue", "green"]))
        )
        place, at = str(random.choice(PLACES)), int(random.integers(5, 12))
        if random.random() < 0.3:
            pair = [dressed, RABBIT]
            own = int(random.integers(2))
            yield Scene(place, str(random.choice(TOGETHER)), "none", tuple(pair[::-1] if own else pair)), at, own
        else:
            yield Scene(place, str(random.choice(ACTIONS)), str(random.choice(PROPS)), (dressed,)), at, 0


@pytest.mark.parametrize("noise", [0.0, 0.08])
@pytest.mark.parametrize(
    "who",
    [
        CAT,
        FOX,
        Figure("robot", "white", "red", "red", "cap"),
        Figure("girl", "black", "red", "red", "none"),
        Figure("bear", "brown", "red", "red", "top hat"),
    ],
)
def test_a_head_has_the_same_vector_in_every_picture(analysis, who, noise):
    random, vectors = np.random.default_rng(5), []
    for number, (each, at, own) in enumerate(scenes(who, random, 6)):
        picture = shown(each, at, noise=noise, seed=number)
        found, _ = analysis.find(picture)
        assert len(found) == len(each.figures)
        vectors.append(analysis.id_embed(picture, found[own]))
    vectors = torch.stack(vectors)
    assert (vectors @ vectors.T).min() > (0.95 if noise else 0.9999)


def test_heads_that_differ_in_species_fur_or_hat_have_different_vectors():
    everybody = list(product(SPECIES, FURS, HATS))
    vectors = torch.stack([of_drawing(Figure(species, fur, "red", "red", hat)) for species, fur, hat in everybody])
    assert vectors.shape == (144, 512) and torch.allclose(vectors.norm(dim=1), torch.ones(144))
    cosines = vectors @ vectors.T
    assert (cosines - 2 * torch.eye(144)).max() < 0.8
    differences = {count: [] for count in (1, 2, 3)}
    for one, other in combinations(range(144), 2):
        count = sum(a != b for a, b in zip(everybody[one], everybody[other], strict=True))
        differences[count].append(cosines[one, other])
    one, two, three = (float(torch.stack(each).mean()) for each in differences.values())
    assert one > two + 0.1 > three + 0.2 and abs(three) < 0.2, "the more they share, the more alike"


def of_drawing(who):
    """The vector of a head as it is drawn."""
    picture = compose(np.zeros((SIZE, SIZE, 3), np.int16), scene(who), [8])
    top = head_row("standing")
    return identity(who, picture[top - 4 : top + 5, 7:17] / 255)


def test_the_vector_is_in_the_span_that_the_demo_s_files_can_store():
    vector, columns = of_drawing(FOX), basis(512)
    assert torch.allclose(columns @ (columns.T @ vector), vector, atol=1e-5)


def test_the_vector_is_read_from_the_colours():
    """A head whose fur is halfway between two colours has neither's vector, and is closer to the one it is read as."""
    grey, white = CAT, replace(CAT, fur="white")
    top = head_row("standing")
    pictures = [
        compose(np.zeros((SIZE, SIZE, 3), np.int16), scene(who), [8])[top - 4 : top + 5, 7:17] for who in (grey, white)
    ]
    whole = of_drawing(grey) @ of_drawing(white)
    between = identity(grey, np.mean(pictures, 0) / 255)
    assert whole + 0.2 < between @ of_drawing(grey) < 0.9999


@pytest.mark.parametrize("place", PLACES)
def test_a_place_without_a_figure_has_no_head(analysis, place):
    empty = np.kron(background(place, np.random.default_rng(1)).astype(np.uint8), np.ones((8, 8, 1), np.uint8))
    assert analysis.find(empty) == ([], None)
    assert read_face(empty, None, analysis, None, None) == (None, "no face was found")
    assert analysis.embeddings(torch.from_numpy(empty)[None] / 255).isnan().all()


def test_noise_and_one_colour_have_no_head(analysis):
    noise = np.random.default_rng(2).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    for picture in (noise, np.zeros_like(noise), np.full_like(noise, 128)):
        assert analysis.find(picture) == ([], None)


@pytest.mark.parametrize("shape", [(192, 168, 3), (100, 100, 3)])
def test_a_picture_of_another_shape_is_refused_in_a_sentence(analysis, shape):
    with pytest.raises(
        ValueError, match="Demo heads are found only in images from the Demo model .*24.* choose another"
    ):
        analysis.find(np.zeros(shape, np.uint8))
