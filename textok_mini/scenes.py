"""The default world, `openmoji-scenes`: endless small pictures whose captions say what is where.

A scene is a few OpenMoji drawings in the cells of a 2 x 2 layout on a coloured background. It is drawn in numbers
that know no resolution, so `render` shows the same scene at any size; it follows from (seed, split, index) alone, so
anyone's scene 17 is everyone's; and since it is known exactly, `caption` is right and `wrong` wrong in one respect.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from textok_mini.openmoji import CATEGORIES, WORDS, Drawing, colours, drawings, rasterise, scene_drawings, svg_body

SPLITS = ("train", "test", "zero-shot")
LEVELS = ("short", "normal", "long")
DROPPED = ("no names", "no places", "no background")  # controls: normal but for these words
CHANGES = ("object", "place", "background")
CELLS = ("top left", "top right", "bottom left", "bottom right")

BACKGROUNDS = {name: tuple(rgb) for name, rgb in WORDS["backgrounds"].items()}
NO_ARTICLE, SINGULAR = set(WORDS["no_article"]), set(WORDS["singular"])
BACKGROUND_JITTER = 6  # to either side, in each of red, green and blue

# In picture widths. A drawing fills about four fifths of its own square, the largest half of the picture.
LARGEST = (0.56, 0.64)
OTHERS = (0.42, 0.52)
SMALL = 0.47  # below it a long caption says "small"
TILT = 15  # degrees to either side
JITTER = 0.03  # of an object's centre to either side, across and down

HELD_OUT_OBJECTS = 200  # of the zero-shot split
HELD_OUT_COMBINATIONS = 1 / 8  # of (objects, places, background), kept for the test split


@dataclass(frozen=True)
class SceneObject:
    """One drawing in a scene. Lengths are in picture widths."""

    key: str
    cell: int  # 0..3, see `CELLS`
    scale: float  # the side of its square
    tilt: int  # degrees clockwise
    mirrored: bool
    dx: float  # off the cell's centre
    dy: float

    name = property(lambda self: drawings()[self.key].name)
    category = property(lambda self: drawings()[self.key].category)


@dataclass(frozen=True)
class Scene:
    """Objects, the largest first and named first, and a background: its name and its exact colour, 0..255."""

    objects: tuple[SceneObject, ...]
    background: str
    rgb: tuple[int, int, int]

    def to_json(self) -> str:
        """One compact line; `from_json` gives back an equal scene."""
        objects = [[o.key, o.cell, o.scale, o.tilt, int(o.mirrored), o.dx, o.dy] for o in self.objects]
        return json.dumps({"background": [self.background, *self.rgb], "objects": objects}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Scene":
        values = json.loads(text)
        background, *rgb = values["background"]
        objects = (SceneObject(*o[:4], bool(o[4]), *o[5:]) for o in values["objects"])
        return Scene(tuple(objects), background, tuple(rgb))


@dataclass(frozen=True)
class World:
    """All scenes of one seed. `objects` is how many distinct drawings its training scenes use.

    The zero-shot split has drawings of its own, the same whatever `objects` is. The test split has training's drawings
    in combinations (who, where, on which background) that training never shows, however many scenes are drawn.
    Raises ValueError for numbers that no world has."""

    seed: int = 0
    objects: int = 128
    min_objects: int = 2
    max_objects: int = 3

    def __post_init__(self):
        most = len(scene_drawings()) - HELD_OUT_OBJECTS
        if not 8 <= self.objects <= most:
            raise ValueError(f"objects must be 8 to {most}, not {self.objects}")
        if not 1 <= self.min_objects <= self.max_objects <= len(CELLS):
            found = f"{self.min_objects} and {self.max_objects}"
            raise ValueError(f"1 <= min_objects <= max_objects <= {len(CELLS)} must hold, not {found}")
        if self.seed < 0:
            raise ValueError(f"world_seed must be at least 0, not {self.seed}")

    def pool(self, split: str) -> tuple[Drawing, ...]:
        """The drawings that a split's scenes are made of: the first of the world's own order are held out."""
        every = scene_drawings()
        order = np.random.default_rng([self.seed, 0]).permutation(len(every))
        held_out, rest = order[:HELD_OUT_OBJECTS], order[HELD_OUT_OBJECTS:][: self.objects]
        return tuple(every[i] for i in (held_out if split == "zero-shot" else rest))

    def scene(self, split: str, index: int) -> Scene:
        """Scene `index` (0, 1, ...) of a split, always the same one."""
        rng = np.random.default_rng([self.seed, 1 + SPLITS.index(split), index])
        pool = self.pool(split)
        while True:
            scene = draw_scene(rng, pool, int(rng.integers(self.min_objects, self.max_objects + 1)))
            # A property of the combination, not of a list: no seed and no number of scenes moves one into training.
            combination = json.dumps([scene.background, sorted((o.key, o.cell) for o in scene.objects)])
            held_out = hashlib.sha256(combination.encode()).digest()[0] < 256 * HELD_OUT_COMBINATIONS
            if split == "zero-shot" or held_out == (split == "test"):
                return scene


def draw_scene(rng: np.random.Generator, pool: Sequence[Drawing], count: int) -> Scene:
    """A scene of `count` different drawings of `pool`, in different cells."""
    chosen = [pool[i] for i in rng.choice(len(pool), count, replace=False)]
    cells = rng.choice(len(CELLS), count, replace=False)
    objects = [
        SceneObject(
            key=drawing.key,
            cell=int(cell),
            scale=round(float(rng.uniform(*(OTHERS if place else LARGEST))), 3),
            tilt=int(rng.integers(-TILT, TILT + 1)),
            mirrored=bool(rng.integers(2)) and drawing.mirrorable,
            dx=round(float(rng.uniform(-JITTER, JITTER)), 3),
            dy=round(float(rng.uniform(-JITTER, JITTER)), 3),
        )
        for place, (drawing, cell) in enumerate(zip(chosen, cells, strict=True))
    ]
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(tuple(objects), background, jittered(background, rng))


def jittered(background: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """An exact colour for a background's name."""
    offset = rng.integers(-BACKGROUND_JITTER, BACKGROUND_JITTER + 1, 3)
    return tuple(int(value) for value in np.clip(BACKGROUNDS[background] + offset, 0, 255))


def render(scene: Scene, image_size: int) -> np.ndarray:
    """The scene as uint8 (image_size, image_size, 3): one SVG in a view box of 100 x 100, antialiased."""
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">']
    parts.append('<rect width="100" height="100" fill="#{:02x}{:02x}{:02x}"/>'.format(*scene.rgb))
    for o in scene.objects:
        edge = 44 * o.scale  # a drawing's square may be cut by this little: its rim is empty
        x = min(max(25 + 50 * (o.cell % 2) + 100 * o.dx, edge), 100 - edge)
        y = min(max(25 + 50 * (o.cell // 2) + 100 * o.dy, edge), 100 - edge)
        scale = 100 * o.scale / 72  # drawings come in a box of 72 x 72
        flip = -scale if o.mirrored else scale
        # Read from the right: centre the drawing at 0, scale and mirror, tilt, move to its place.
        move = f"translate({x:.4f} {y:.4f}) rotate({o.tilt}) scale({flip:.5f} {scale:.5f}) translate(-36 -36)"
        parts.append(f'<g transform="{move}">{svg_body(o.key)}</g>')
    return np.ascontiguousarray(rasterise("".join(parts) + "</svg>", image_size)[:, :, :3])


def class_label(scene: Scene) -> int:
    """Index in `CATEGORIES` of the largest object's category."""
    return CATEGORIES.index(scene.objects[0].category)


def with_article(name: str, phrase: str = "") -> str:
    """The name as a caption uses it: "a dog", "an owl", "glasses", or "bread"; or a phrase that ends in it."""
    phrase = phrase or name
    head = re.split(r" (?:with|in|over|of|on|at|showing|lifting|behind|and|without) ", name)[0]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is")) and head not in SINGULAR
    if plural or name in NO_ARTICLE or head.split()[0] == "people":
        return phrase
    vowel_sound = re.match(r"(?!e[uw])[aeioAEIO]|u(?!ni|ti)|x-|hour", phrase)
    return f"{'an' if vowel_sound else 'a'} {phrase}"


def described(o: SceneObject) -> str:
    """Size and colour before the name, as in "a large brown dog", unless the name says a colour itself."""
    size = "large" if o.scale >= LARGEST[0] else "small" if o.scale < SMALL else ""
    colour = "" if set(o.name.split()) & {*WORDS["palette"], "grey"} else colours(o.key)[0]
    return with_article(o.name, " ".join(word for word in (size, colour, o.name) if word))


def caption(scene: Scene, level: str = "normal") -> str:
    """What the scene shows, in English. `short`: the largest object; `normal`: all objects, their places and
    the background; `long`: sizes and colours too; those of `DROPPED`: normal, without some words."""
    if level not in LEVELS + DROPPED:
        raise ValueError(f"caption level must be one of {', '.join(LEVELS + DROPPED)}, not {level!r}")
    if level == "short":
        return with_article(scene.objects[0].name)
    names = [described(o) if level == "long" else with_article(o.name) for o in scene.objects]
    if level == "no names":
        names = ["something"] * len(names)
    if level != "no places":
        names = [f"{name} {CELLS[o.cell]}" for name, o in zip(names, scene.objects, strict=True)]
    *others, last = names
    listed = f"{', '.join(others)} and {last}" if others else last
    return listed if level == "no background" else f"{listed} on {with_article(scene.background + ' background')}"


def wrong(scene: Scene, change: str, rng: np.random.Generator, pool: Sequence[Drawing]) -> Scene:
    """The scene with exactly one thing changed, so that its normal caption is wrong in one attribute.

    `object`: the first-named object becomes another drawing of `pool`; only this changes the short caption. `place`:
    one object moves to a free cell, or two change places. `background`: another background. All else stays, but that
    a drawing which must not be mirrored is not."""
    if change == "object":
        others = [drawing for drawing in pool if drawing.key not in [o.key for o in scene.objects]]
        drawing = others[rng.integers(len(others))]
        first, *rest = scene.objects
        first = replace(first, key=drawing.key, mirrored=first.mirrored and drawing.mirrorable)
        return replace(scene, objects=(first, *rest))
    if change == "place":
        old = scene.objects[rng.integers(len(scene.objects))].cell
        new = int(rng.choice([cell for cell in range(len(CELLS)) if cell != old]))
        swap = {old: new, new: old}
        return replace(scene, objects=tuple(replace(o, cell=swap.get(o.cell, o.cell)) for o in scene.objects))
    if change == "background":
        background = str(rng.choice([name for name in BACKGROUNDS if name != scene.background]))
        return replace(scene, background=background, rgb=jittered(background, rng))
    raise ValueError(f"change must be one of {', '.join(CHANGES)}, not {change!r}")
