"""The reader of attributes: what is asked is parsed from captions that scenes word, and real scenes are read right."""

import numpy as np
import pytest

from textok_mini.attributes import ATTRIBUTES, AttributeReader, attributes
from textok_mini.config import DataConfig
from textok_mini.data import load_data
from textok_mini.scenes import CELLS


@pytest.fixture(scope="module")
def rows(small_home):
    one = dict(scenes=512, objects=8, min_objects=1, max_objects=1)
    return [load_data(DataConfig(**one), split, 32) for split in ("train", "test")]


def test_what_is_asked_is_what_the_scene_has(rows):
    test = rows[1]
    asked = attributes(test.labels.tolist(), test.captions)
    for i in range(len(test)):
        scene = test.scene(i)
        truth = (int(test.labels[i]), scene.objects[0].name, CELLS[scene.objects[0].cell], scene.background)
        assert tuple(asked[name][i] for name in ATTRIBUTES) == truth
    nothing = attributes([-1], ["a picture"])
    assert nothing == {"class": [-1], "object": [None], "place": [None], "background": [None]}


def test_a_reader_learns_real_scenes_and_is_not_fooled(rows):
    train, test = rows
    reader = AttributeReader.learn(train, steps=150)
    images, labels = test.images(list(range(len(test)))), test.labels.tolist()
    found = reader.score(images, labels, test.captions)
    assert all(np.mean(found[name]) > 0.8 for name in ("place", "background")) and np.mean(found["object"]) > 0.5
    shuffled = reader.score(images.roll(1, 0), labels, test.captions)
    assert all(np.mean(shuffled[name]) < np.mean(found[name]) - 0.2 for name in ATTRIBUTES)
    unsaid = reader.score(images[:2], [0, 0], ["a picture", "a unicorn top left on a plaid background"])
    assert {name: np.isnan(hits).all() for name, hits in unsaid.items()} == {
        "class": False, "object": True, "place": False, "background": True
    }  # fmt: skip


def test_pictures_whose_captions_are_no_scenes_are_judged_by_their_class(rows, monkeypatch):
    train = rows[0]
    monkeypatch.setattr(train, "captions", ["a picture"] * len(train))
    reader = AttributeReader.learn(train, steps=40)
    assert all(p.isfinite().all() for p in reader.parameters())
    found = reader.score(train.images([0, 1]), train.labels[:2].tolist(), train.captions[:2])
    assert set(found["class"]) <= {0, 1} and np.isnan(found["object"]).all()
