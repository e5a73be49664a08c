"""The audit of captions, against numbers counted by hand."""

import dataclasses
import json
import math

import datasets
import numpy as np
import pytest

from textok_mini.audit import audit, read_caption, right_attributes
from textok_mini.openmoji import drawings
from textok_mini.scenes import CELLS, SPLITS, World, caption, wrong

ROWS = [
    ("a.png", 0, "The image shows a dog on a mat"),  # 8 words
    ("a.png", 1, "a dog on a mat"),  # 5; shares a, dog, on, mat of the, image, shows, a, dog, on, mat
    ("b.png", 0, "red red red red"),  # 4; "red red red" twice
    ("b.png", 1, "I'm sorry, I cannot describe this."),  # 6; no word in common with the other
    ("c.png", 0, "a dog on a mat"),
    ("c.png", 1, None),
    ("d.png", 0, "  "),  # 0
    ("e.png", 0, " ".join(str(i) for i in range(25))),
]


def rows() -> list[dict]:
    return [{"file_name": name, "number": number, "caption": text} for name, number, text in ROWS]


def test_counts_and_shares_counted_by_hand():
    report = audit(rows())
    assert report["count"] == 7 and report["errors"] == 1 and "right" not in report
    assert report["words"]["mean"] == pytest.approx((8 + 5 + 4 + 6 + 5 + 0 + 25) / 7)
    assert report["words"]["min"] == 0 and report["words"]["max"] == 25
    assert report["words"]["histogram"] == {0: 6, 20: 1} and list(report["words"]["histogram"]) == [0, 20]
    assert report["distinct"] == pytest.approx(6 / 7)
    for kind in ("repetitive", "empty", "refused", "boilerplate"):
        assert report[kind] == pytest.approx(1 / 7), kind
    assert report["agreement"] == pytest.approx((4 / 7 + 0) / 2)
    assert report["chance"] == 0  # a and red; red and a; a and nothing; nothing and numbers
    assert audit(rows()[:1] + rows()[4:5])["chance"] == pytest.approx(4 / 7)
    json.dumps(report)


def test_a_data_set_is_as_good_as_a_list_and_nothing_is_no_error():
    assert audit(datasets.Dataset.from_list(rows())) == audit(rows())
    nothing = audit([], scenes={})
    assert nothing["count"] == 0 and math.isnan(nothing["distinct"]) and math.isnan(nothing["right"]["place"])


@pytest.mark.parametrize(
    "text, kinds",
    [
        ("I cannot see the picture.", {"refused"}),
        ("Sorry, but I can\u2019t help with that", {"refused"}),
        ("As an AI, I see nothing", {"refused"}),
        ("This photograph clearly depicts two cats", {"boilerplate"}),
        ("In this image, we can see a dog", {"boilerplate"}),
        ("An image of a dog", {"boilerplate"}),
        ("The image captures a dog", {"boilerplate"}),
        ("I'm not able to see it", {"refused"}),
        ("Unfortunately, I cannot help", {"refused"}),
        ("The picture is hanging on a wall", set()),
        ("Sorry state of a barn", set()),
        ("A sign says I am hungry", set()),
        ("A dog looks at a picture", set()),
        ("In can of soup", set()),
    ],
)
def test_refusals_and_boilerplate(text, kinds):
    report = audit([{"file_name": "a", "caption": text}])
    assert {kind for kind in ("refused", "boilerplate") if report[kind]} == kinds


def test_a_caption_is_read():
    text = "a red apple top left and an elephant bottom right on a sky blue background"
    assert read_caption(text) == ([("red apple", "top left"), ("elephant", "bottom right")], "sky blue")
    assert read_caption(
        "hammer and wrench top left, bread top right and a top hat bottom left on a red background"
    ) == ([("hammer and wrench", "top left"), ("bread", "top right"), ("top hat", "bottom left")], "red")
    for text in ("", "a dog", "top left", "on a background", "\x00\u202e" * 50, ", " * 20_000 + "top left"):
        said, background = read_caption(text)
        assert len(said) <= 1 and background == ""


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level", ["normal", "long"])
def test_every_true_caption_is_all_right(split, level):
    world = World(seed=3, objects=800, min_objects=1, max_objects=4)
    for index in range(150):
        scene = world.scene(split, index)
        text = caption(scene, level)
        assert right_attributes(scene, text) == {"object": 1, "place": 1, "background": 1}, text
        assert right_attributes(scene, text.upper() + ".") == {"object": 1, "place": 1, "background": 1}


def test_wrong_captions_are_wrong_in_their_one_attribute():
    world, rng = World(seed=1), np.random.default_rng(0)
    for index in range(60):
        scene = world.scene("test", index)
        count = len(scene.objects)
        said = caption(wrong(scene, "object", rng, world.pool("test")))
        share = pytest.approx((count - 1) / count)
        assert right_attributes(scene, said) == {"object": share, "place": share, "background": 1}
        said = caption(wrong(scene, "background", rng, ()))
        assert right_attributes(scene, said) == {"object": 1, "place": 1, "background": 0}
        moved = wrong(scene, "place", rng, ())
        stay = sum(a.cell == b.cell for a, b in zip(scene.objects, moved.objects, strict=True))
        assert right_attributes(scene, caption(moved)) == {"object": 1, "place": stay / count, "background": 1}


def test_what_is_not_there_is_wrong_too():
    scene = World(seed=1, min_objects=2, max_objects=2).scene("test", 0)
    free = [cell for i, cell in enumerate(CELLS) if i not in [o.cell for o in scene.objects]]
    more = f"a zebra {free[0]}, a zebra {free[1]}, {caption(scene)}"
    assert right_attributes(scene, more) == {"object": 0.5, "place": 0.5, "background": 1}


def test_a_name_is_no_part_of_another_name():
    scene = World(seed=0, min_objects=1, max_objects=1).scene("test", 0)
    dog = next(d.key for d in drawings().values() if d.name == "dog")
    scene = dataclasses.replace(scene, objects=(dataclasses.replace(scene.objects[0], key=dog, cell=0),))
    for said, right in (("a hot dog", 0), ("a large brown dog", 1), ("a dog", 1), ("dogs", 0), ("a small dog", 1)):
        text = f"{said} {CELLS[0]} on a {scene.background} background"
        assert right_attributes(scene, text) == {"object": right, "place": right, "background": 1}, said
    report = audit([{"file_name": "a", "caption": "a dog top right"}], {"a": scene, "b": scene})
    assert report["right"] == {"object": 1, "place": 0, "background": 0}
