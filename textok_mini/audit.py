"""What a set of captions is like: lengths, repetition, refusals and, where the scenes are known, what is right in them.

    report = audit(CaptionStore("runs/captions").read(), scenes={"test-000000": rows.scene(0), ...})

Shares are from 0 to 1, and nan of nothing. No caption, however odd, raises anything.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from itertools import combinations

import numpy as np

from textok_mini.openmoji import PALETTE
from textok_mini.scenes import CELLS, Scene

REFUSED = re.compile(r"\W*(i('|\u2019| a)m (very )?sorry|sorry|i can(no|'|\u2019)t|i am unable|as an ai\b)", re.I)
PICTURE = r"(image|picture|photo(graph)?|scene|illustration)"
BOILERPLATE = re.compile(rf"\b(the|this) {PICTURE} (\w+ )?(shows?|depicts?|features?|is)\b", re.I)
PLACED = re.compile(rf"(?:^|,? and |, )(.{{1,60}}?) ({'|'.join(CELLS)})\b", re.I)
BACKGROUND = re.compile(r"\bon an? (\w+(?: \w+)?) background\b", re.I)
LOOKS = rf"(?:(?:large|small) )?(?:(?:{'|'.join(PALETTE)}) )?"  # what a long caption says before a name


def audit(rows: Collection[dict], scenes: dict[str, Scene] | None = None) -> dict:
    """Counts and shares over the store's rows. `scenes`: what pictures show, by file name.

    `words`: mean, min, max, histogram by tens. `repetitive`: with the same three words in a row twice. `agreement`:
    of two captions of a picture, words in both over words in either. `right`: mean of `right_attributes`."""
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
        "most_frequent": max(Counter(captions).values(), default=0) / count,
        "repetitive": mean(map(repeats, captions)),
        "empty": mean(not caption.strip() for caption in captions),
        "refused": mean(bool(REFUSED.match(caption)) for caption in captions),
        "boilerplate": mean(bool(BOILERPLATE.search(caption)) for caption in captions),
        "agreement": mean(mean(len(a & b) / max(1, len(a | b)) for a, b in some) for some in pairs),
    }
    report["words"]["histogram"] = Counter(length // 10 * 10 for length in sorted(lengths))
    if scenes is not None:
        right = [right_attributes(scenes[name], caption) for name, caption in texts if name in scenes]
        report["right"] = {kind: mean(r[kind] for r in right) for kind in ("object", "place", "background")}
    return report


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else float("nan")


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
    """Shares of the scene's objects that are named at all (`object`), and in their `place`; `background` is 0 or 1."""
    said, background = read_caption(text)
    looks = [(CELLS[o.cell], re.compile(LOOKS + re.escape(o.name), re.I)) for o in scene.objects]
    named = [[where == cell for name, where in said if look.fullmatch(name)] for cell, look in looks]
    right = {"object": mean(map(bool, named)), "place": mean(map(any, named))}
    return right | {"background": float(background == scene.background)}
