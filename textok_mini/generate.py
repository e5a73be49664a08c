"""From a trained tokenizer to generated pictures, and what they are like, by one command.

    python -m textok_mini.generate laptop tokenizer=runs/textok output_dir=runs/generated
        [unseen=15 sample.each=50 sample.guidance=1.5 key.subkey=value ...]

Latents, a DiT, pictures, and `results.json`: distances to held-out pictures, and of scenes what is shown as asked. Each
step is its own command too (`latents`, `train`, `sample`), for many machines; this one runs whatever is not done yet.
A class's pictures are drawn with its `unseen` captions that no training has seen, in turn.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from textok_mini import latents, sample
from textok_mini.attributes import AttributeReader
from textok_mini.command import command
from textok_mini.comparison import reconstruct
from textok_mini.config import require
from textok_mini.data import load_data
from textok_mini.evaluation import generation_metrics
from textok_mini.images import to_uint8
from textok_mini.latents import Latents
from textok_mini.own_data import METADATA
from textok_mini.paths import resolve, write_text
from textok_mini.sample import Painter
from textok_mini.settings import apply_overrides, from_dict, load_config
from textok_mini.training import train


@dataclass(frozen=True)
class Settings:
    tokenizer: str = ""  # a run's folder
    output_dir: str = ""  # the folder to fill
    unseen: int = 15  # captions of each class that no training has seen

    def __post_init__(self):
        for name in ("tokenizer", "output_dir"):
            require(getattr(self, name) != "", name, f"a folder, as in {name}=runs/{name}")
        require(self.unseen > 0, "unseen", "above 0")


def generate(preset: str, c: Settings, settings: Sequence[str], samples: Sequence[str]) -> dict:
    """Fills `output_dir` and returns its results. The DiT has the tokenizer's latents and the data's classes;
    `settings` are of its training, `samples` of `sample`."""
    folder = resolve(c.output_dir)
    places = [f"dit={folder / 'dit'}", f"output={folder / 'pictures'}", f"tokenizer={c.tokenizer}"]
    load_config(preset, settings)  # a wrong setting is said before anything is made
    how = from_dict(sample.Settings, apply_overrides({}, [*places, *samples], short={}))
    wanted = latents.Settings(c.tokenizer, str(folder / "latents"), captions=min(c.unseen, how.each))
    latents.encode(wanted)
    rows = Latents(folder / "latents")
    (count, channels), classes = rows.shape, max(1, len(rows.space.meta["label_names"]))
    of_data = [f"dit.num_latent_tokens={count}", f"dit.latent_dim={channels}", f"dit.num_classes={classes}"]
    train(load_config(preset, [*of_data, *settings, f"generator.latents={folder / 'latents'}"]), folder / "dit")
    sample.sample(how)
    results = measure(folder / "pictures", Painter(how.dit, c.tokenizer), rows, how)
    write_text(folder / "results.json", json.dumps(results, indent=1))
    return results


def measure(pictures: Path, painter: Painter, rows: Latents, how: sample.Settings) -> dict:
    """Generated pictures against held-out ones: distances, precision and recall, and those of `seen`; of scenes the
    shares that show what was asked, beside those of real pictures, of real ones drawn again, and of `controls`."""
    said = [json.loads(line) for line in (pictures / METADATA).read_text(encoding="utf-8").splitlines()]
    theirs = painter.theirs
    images = torch.from_numpy(np.stack([np.asarray(Image.open(pictures / line["file_name"])) for line in said]))
    images, size = images.permute(0, 3, 1, 2).contiguous(), theirs.tokenizer.image_size
    test = load_data(theirs.data, "test", size)
    real = test.images(list(range(len(test))))
    results = {"pictures": len(said), "distances": generation_metrics(real, images)}
    names, captions = rows.space.meta["label_names"], [line["caption"] for line in said]
    labels = [names.index(line["label"]) if "label" in line else -1 for line in said]
    if painter.narrator and not painter.reader:
        drawn = seen(painter, rows, labels, captions, how)
        results["distances"] |= {f"{k}, seen captions": v for k, v in generation_metrics(real, drawn).items()}
    if test.world is not None:
        reader = AttributeReader.of(theirs.data, size)
        again = to_uint8(reconstruct(painter.tokenizer, test, painter.narrator))
        asked, own = (labels, captions), (test.labels.tolist(), test.captions)
        sets = {"generated": (images, *asked), "real": (real, *own), "drawn again": (again, *own)}
        sets |= {name: (them, *asked) for name, them in controls(painter, rows, labels, captions).items()}
        scores = {name: reader.score(*given) for name, given in sets.items()}
        results["shown"] = {of: {n: float(np.nanmean(v)) for n, v in found.items()} for of, found in scores.items()}
    return results


def seen(
    painter: Painter, rows: Latents, labels: Sequence[int], captions: Sequence[str], how: sample.Settings
) -> Tensor:
    """The same latent tokens as the pictures', decoded with captions of their classes that training has seen, as many
    of a class as there are unseen ones in `captions`, uint8."""
    turns = {}
    for label in set(labels):
        count = len({text for text, of in zip(captions, labels, strict=True) if of == label})
        known = dict.fromkeys(rows.captions[row] for row in (rows.labels == label).nonzero().flatten())
        turns[label] = itertools.cycle(itertools.islice(known, count))
    told, parts = [next(turns[label]) for label in labels], []
    for start in range(0, len(labels), how.batch_size):
        numbers = range(len(labels))[start : start + how.batch_size]
        x = painter.latents([labels[i] for i in numbers], numbers, **how.drawing)
        parts.append(to_uint8(painter.decode(x, [told[i] for i in numbers])))
    return torch.cat(parts)


def controls(painter: Painter, rows: Latents, labels: Sequence[int], captions: Sequence[str]) -> dict[str, Tensor]:
    """What the captions bring about without a generator, uint8: drawn with random latent tokens, and with those of
    another picture of the same class."""
    places = {label: itertools.cycle((rows.labels == label).nonzero().flatten().tolist()) for label in set(labels)}
    latents = {
        "random latent tokens": torch.randn(len(labels), *rows.shape, generator=torch.Generator().manual_seed(0)),
        "another's of its class": rows.__getitems__([next(places[label]) for label in labels])["latents"],
    }
    parts = [slice(i, i + 100) for i in range(0, len(labels), 100)]
    return {
        name: torch.cat([to_uint8(painter.decode(x[p], captions[p])) for p in parts]) for name, x in latents.items()
    }


@command(__doc__)
def main(arguments: list[str]) -> None:
    preset, *settings = arguments
    own, samples = {f.name for f in fields(Settings)}, [s for s in settings if s.startswith("sample.")]
    mine = [s for s in settings if s.partition("=")[0] in own]
    rest = [s for s in settings if s not in samples + mine]
    c = from_dict(Settings, apply_overrides({}, mine, short={}))
    print(json.dumps(generate(preset, c, rest, [s.removeprefix("sample.") for s in samples]), indent=1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
