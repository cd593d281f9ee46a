"""Training data of the story world in StoryMaker's published form: pictures, colour masks, captions, face features."""

import json

import numpy as np
import torch
from PIL import Image

from storyloom.training.storymaker.data.references import TEMPLATE, masked_crop
from storyloom.world.backgrounds import background
from storyloom.world.canvas import EMPTY
from storyloom.world.draw import SHIFTS, compose
from storyloom.world.scene import ACTIONS, LOOKS, PLACES, PROPS, SIZE, SPECIES, TOGETHER, Figure, Scene

ENLARGED = 12
"""Pixels per pixel of the world, so that a picture has 288."""
COUNTS = (1,) * 12 + (2,) * 6 + (3,) * 2


def drawn(seed, persons):
    """A picture [H, W, 3], a mask [H, W] for each person and a caption. Three persons stand in two pictures."""
    random = np.random.default_rng([seed, persons])
    if persons == 3:
        (left, first, one), (right, others, two) = drawn(seed, 1), drawn(seed, 2)
        masks = [np.hstack([first[0], np.zeros_like(first[0])])]
        masks += [np.hstack([np.zeros_like(mask), mask]) for mask in others]
        return np.hstack([left, right]), masks, f"{one}, and {two}"
    looks = [{look: str(random.choice(values)) for look, values in LOOKS.items()} for _ in range(persons)]
    figures = tuple(Figure(str(random.choice(SPECIES)), **each) for each in looks)
    action, prop = (str(random.choice(each)) for each in ((ACTIONS, PROPS) if persons == 1 else (TOGETHER, ("none",))))
    scene = Scene(str(random.choice(PLACES)), action, prop, figures)
    shifts = [int(random.choice(SHIFTS[persons])) for _ in figures]
    shown = compose(np.full((SIZE, SIZE, 3), EMPTY, np.int16), scene, shifts)[..., 0] != EMPTY
    columns = np.arange(SIZE) * persons // SIZE
    masks = [np.where(shown & (columns == number), 255, 0).astype(np.uint8) for number in range(persons)]
    picture = compose(background(scene.place, random), scene, shifts).astype(np.uint8)
    names = " and ".join(f"a {figure.fur} {figure.species}" for figure in figures)
    return enlarged(picture), [enlarged(mask) for mask in masks], f"{names}, {scene.place}, {action}"


def enlarged(picture):
    return picture.repeat(ENLARGED, 0).repeat(ENLARGED, 1)


def face_of(seed, crop):
    """Face features: a random vector, and landmarks in the upper half of a crop."""
    height, width = crop.shape[:2]
    vector = torch.nn.functional.normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(seed)))
    points = (TEMPLATE / 112 * 0.5 + (0.25, 0.05)) * (width, height)
    return {"id": vector, "kps": torch.tensor(points, dtype=torch.float32)}


def write_data(folder, counts=COUNTS, poses=False):
    """Write a picture for each number of persons; returns the list."""
    groups = {"1": [], "2": [], "3": []}
    for name in ("images", "masks", "poses"):
        (folder / name).mkdir(parents=True)
    for seed, persons in enumerate(counts):
        picture, masks, caption = drawn(seed, persons)
        image, mask, pose = (f"{kind}/{seed:02d}.png" for kind in ("images", "masks", "poses"))
        colours = np.zeros_like(picture)
        for number, each in enumerate(masks):
            colours[..., 2 - number] = each
        Image.fromarray(picture).save(folder / image)
        Image.fromarray(colours).save(folder / mask)
        Image.fromarray(255 - colours).save(folder / pose)
        faces = folder / "faces" / f"{seed:02d}"
        faces.mkdir(parents=True)
        for number, each in enumerate(masks):
            torch.save(face_of(100 * seed + number, masked_crop(picture, each)), faces / f"{number}.bin")
        groups[str(persons)].append([image, pose if poses else "", mask, caption, persons, f"faces/{seed:02d}"])
    (folder / "data.json").write_text(json.dumps(groups))
    return groups
