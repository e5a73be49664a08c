"""From a trained tokenizer to generated pictures, and what they are like, by one command.

    python -m textok_mini.generate laptop tokenizer=runs/textok output_dir=runs/generated [each=50 key.subkey=value ...]

Latents, a DiT, pictures, and `results.json`: distances to held-out pictures, and of scenes what is shown as asked. Each
step is its own command too (`latents`, `train`, `sample`), for many machines; this one runs whatever is not done yet.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from textok_mini import latents, sample
from textok_mini.attributes import AttributeReader
from textok_mini.comparison import load_run
from textok_mini.config import ConfigError
from textok_mini.data import load_data
from textok_mini.evaluation import generation_metrics
from textok_mini.latents import Latents
from textok_mini.own_data import METADATA, DataError
from textok_mini.paths import beside, resolve
from textok_mini.run import TrainingError
from textok_mini.settings import load_config
from textok_mini.train import complain
from textok_mini.training import train

OF_SAMPLES = {f.name for f in fields(sample.Settings)} - {"dit", "output", "shard", "seed"}


def generate(preset: str, tokenizer: str, output_dir: Path, settings: list[str], samples: dict) -> dict:
    """Fills `output_dir` and returns its results. The DiT has the tokenizer's latents and the data's classes."""
    folder = output_dir / "latents"
    latents.encode(latents.Settings(tokenizer=tokenizer, latents=str(folder), captions=min(30, samples["each"])))
    rows = Latents(folder)
    (count, channels), classes = rows.shape, max(1, len(rows.space.meta["label_names"]))
    of_data = [f"dit.num_latent_tokens={count}", f"dit.latent_dim={channels}", f"dit.num_classes={classes}"]
    config = load_config(preset, [*of_data, *settings, f"generator.latents={folder}"])
    train(config, output_dir / "dit")
    pictures = output_dir / "pictures"
    sample.sample(sample.Settings(dit=str(output_dir / "dit"), output=str(pictures), tokenizer=tokenizer, **samples))
    results = measure(pictures, rows)
    with beside(output_dir / "results.json") as part:
        part.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def measure(pictures: Path, rows: Latents) -> dict:
    """Generated pictures against held-out ones: distances, precision and recall; of scenes the shares that show what
    was asked, beside real pictures' own."""
    said = [json.loads(line) for line in (pictures / METADATA).read_text(encoding="utf-8").splitlines()]
    _, theirs = load_run(resolve(rows.space.meta["tokenizer"]))
    images = torch.from_numpy(np.stack([np.asarray(Image.open(pictures / line["file_name"])) for line in said]))
    images, size = images.permute(0, 3, 1, 2).contiguous(), theirs.tokenizer.image_size
    test = load_data(theirs.data, "test", size)
    real = test.images(list(range(len(test))))
    results = {"pictures": len(said), "distances": generation_metrics(real, images)}
    if test.world is not None:
        reader = AttributeReader.of(theirs.data, size)
        names = rows.space.meta["label_names"]
        labels, captions = [names.index(line["label"]) for line in said], [line["caption"] for line in said]
        scores = {"generated": reader.score(images, labels, captions)}
        scores["real"] = reader.score(real, test.labels.tolist(), test.captions)
        results["shown"] = {of: {n: float(np.nanmean(v)) for n, v in found.items()} for of, found in scores.items()}
    return results


def main(arguments: list[str]) -> int:
    """0, or 2 for one clear line about what to change."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    preset, *settings = arguments
    given = dict(s.split("=", 1) for s in settings if "=" in s)
    try:
        for name in ("tokenizer", "output_dir"):
            if name not in given:
                raise ConfigError(f"{name} must be a folder, as in {name}=runs/{name}")
        samples = {key: json.loads(value) for key, value in given.items() if key in OF_SAMPLES - {"tokenizer"}}
        rest = [s for s in settings if s.partition("=")[0] not in {*OF_SAMPLES, "output_dir"}]
        results = generate(preset, given["tokenizer"], resolve(given["output_dir"]), rest, {"each": 50} | samples)
    except (ConfigError, DataError, TrainingError, OSError) as error:
        return complain(error)
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
