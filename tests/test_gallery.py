"""The weights that come with the kit draw what they are told: judged by where paint is, and by no network."""

import json

import numpy as np
import pytest

from textok_mini.audit import read_caption
from textok_mini.paths import project_root
from textok_mini.sample import Painter
from textok_mini.scenes import BACKGROUNDS

GALLERY = project_root() / "reference" / "gallery"


def look(image: np.ndarray) -> tuple[str, str]:
    """The corner where (3, H, W) in [-1, 1] differs most from its own ground, and the name of the ground's colour."""
    ground = np.median(image.reshape(3, -1), axis=1)
    apart = np.abs(image - ground[:, None, None]).sum(0) ** 2
    y, x = (np.average(np.arange(len(apart)), weights=apart.sum(axis)) for axis in (1, 0))
    corner = f"{'top' if y < len(apart) / 2 else 'bottom'} {'left' if x < len(apart) / 2 else 'right'}"
    colour = (ground + 1) * 127.5
    return corner, min(BACKGROUNDS, key=lambda name: np.abs(np.array(BACKGROUNDS[name]) - colour).sum())


@pytest.fixture(scope="module")
def told() -> list[tuple[str, str]]:
    lists = json.loads((GALLERY / "latents" / "captions.json").read_text())
    return [(name, caption) for name, captions in lists.items() for caption in captions[:5]]


def test_told_a_class_each_thing_stands_where_its_caption_says(told):
    painter = Painter(GALLERY / "class")
    names = painter.space.meta["label_names"]
    captions = [caption for _, caption in told]
    images = painter.paint([names.index(name) for name, _ in told], captions, steps=20).numpy()
    right = [look(image)[0] == read_caption(caption)[0][0][1] for image, caption in zip(images, captions, strict=True)]
    assert np.mean(right) > 0.9
    by_class = np.array([image.mean((1, 2)) for image in images]).reshape(len(names), 5, 3)
    assert by_class.std(1).mean() > 0.05  # the same class from other noise is another picture


def test_told_a_text_the_ground_has_the_colour_asked_for_too(told):
    captions = [caption for _, caption in told]
    images = Painter(GALLERY / "text").paint(captions, steps=20).numpy()
    asked = [(read_caption(caption)[0][0][1], read_caption(caption)[1]) for caption in captions]
    right = np.array([np.array(look(image)) == want for image, want in zip(images, asked, strict=True)])
    assert (right.mean(0) > 0.9).all()


def test_all_of_it_is_small():
    assert sum(file.stat().st_size for file in GALLERY.rglob("*") if file.suffix not in (".npy", ".parquet")) < 20e6
