"""What a set of captions is like: lengths, repetition, refusals and, where the scenes are known, what is right in them.

    report = audit(CaptionStore("runs/captions").read(), scenes={"test-000000": rows.scene(0), ...})

Shares are from 0 to 1, and nan of nothing. No caption, however odd, raises anything.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from itertools import combinations, pairwise

import numpy as np

from textok_mini.openmoji import PALETTE
from textok_mini.scenes import CELLS, Scene

AM = r"i('|\u2019| a)m"
UNABLE = rf"i can(no|'|\u2019)t\b|{AM} (unable|not able)|as an ai\b"
REFUSED = re.compile(rf"\W*(unfortunately, )?(({AM} )?(very )?sorry[,.!]|{UNABLE})", re.I)
PICTURE = r"(image|picture|photo(graph)?|scene|illustration)"
SHOWS = r"(shows|depicts|features|captures|displays|presents|portrays|illustrates|contains|is of)"
BOILERPLATE = re.compile(rf"\b(the|this) {PICTURE} (\w+ )?{SHOWS}\b|^\W*(in )?(an?|the|this) {PICTURE}( of\b|,)", re.I)
PLACED = re.compile(rf"(?:^|,? and |, )(.{{1,60}}?) ({'|'.join(CELLS)})\b", re.I)
BACKGROUND = re.compile(r"\bon an? (\w+(?: \w+)?) background\b", re.I)
LOOKS = rf"(?:(?:large|small) )?(?:(?:{'|'.join(PALETTE)}) )?"  # what a long caption says before a name


def audit(rows: Collection[dict], scenes: dict[str, Scene] | None = None) -> dict:
    """Counts and shares over the store's rows. `scenes`: what pictures show, by file name.

    `words`: mean, min, max, histogram by tens. `repetitive`: with the same three words in a row twice. `agreement`:
    of two captions of a picture, words in both over words in either; `chance`: the same of two pictures' first ones.
    `right`: mean of `right_attributes`."""
    texts = [(row["file_name"], row["caption"]) for row in rows if row["caption"] is not None]
    captions, by_picture = [caption for _, caption in texts], defaultdict(list)
    for name, caption in texts:
        by_picture[name].append(set(re.findall(r"\w+", caption.casefold())))
    lengths, count = [len(caption.split()) for caption in captions], len(captions) or float("nan")
    pairs = [list(combinations(sets, 2)) for sets in by_picture.values() if len(sets) > 1]
    report = {
        "count": len(captions),
        "errors": len(rows) - len(captions),
        "words": {"mean": mean(lengths), "min": min(lengths, default=0), "max": max(lengths, default=0)},
        "distinct": len(set(captions)) / count,
        "repetitive": mean(map(repeats, captions)),
        "empty": mean(not caption.strip() for caption in captions),
        "refused": mean(bool(REFUSED.match(caption)) for caption in captions),
        "boilerplate": mean(bool(BOILERPLATE.search(caption)) for caption in captions),
        "agreement": mean(mean(alike(a, b) for a, b in some) for some in pairs),
        "chance": mean(alike(a[0], b[0]) for a, b in pairwise(by_picture.values())),
    }
    report["words"]["histogram"] = Counter(length // 10 * 10 for length in sorted(lengths))
    if scenes is not None:
        right = [right_attributes(scenes[name], caption) for name, caption in texts if name in scenes]
        report["right"] = {kind: mean(r[kind] for r in right) for kind in ("object", "place", "background")}
    return report


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else float("nan")


def alike(a: set, b: set) -> float:
    return len(a & b) / max(1, len(a | b))


def repeats(caption: str) -> bool:
    words = caption.casefold().split()
    return len(set(zip(words, words[1:], words[2:], strict=False))) < len(words) - 2


def read_caption(text: str) -> tuple[list[tuple[str, str]], str]:
    """What a scene's caption says: [("red apple", "top left"), ...] and "sky blue"; empty where it says nothing so."""
    text = " ".join(text.split())
    placed = [(re.sub("^(an?|the) ", "", name, flags=re.I), cell.lower()) for name, cell in PLACED.findall(text)]
    background = BACKGROUND.search(text)
    return placed, background[1].lower() if background else ""


def right_attributes(scene: Scene, text: str) -> dict[str, float]:
    """`object`: of the objects named and those there are, whichever are more, the share that is right; `place`: and is
    said to be where it is. `background`: 0 or 1. For captions as `scenes` words them; sizes and colours don't count."""
    said, background = read_caption(text)
    looks = [(CELLS[o.cell], re.compile(LOOKS + re.escape(o.name), re.I)) for o in scene.objects]
    named = [[where == cell for name, where in said if look.fullmatch(name)] for cell, look in looks]
    most = max(len(said), len(looks))  # an object that is not there is as wrong as one left out
    right = {"object": sum(map(bool, named)) / most, "place": sum(map(any, named)) / most}
    return right | {"background": float(background == scene.background)}
