"""The one door for data: pictures with captions, whatever they come from.

    rows = load_data("openmoji-scenes", "train", image_size=32)  # or "openmoji", a folder, a hub data set
    rows[0]  # {"image": uint8 (3, 32, 32), "caption": "a dog top left ...", "label": 1, "id": "train-000000"}

The kit's own two data sets are rendered by code on first use, or by

    python -m textok_mini.data prepare data=openmoji-scenes image_size=32 data.world_seed=1

and lie under `data/` as memory-mapped arrow files. Anyone's own pictures are checked row by row before the first use
(`own_data`), because a bad row met in the third hour of a run costs three hours.
"""

import ctypes
import dataclasses
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from filelock import FileLock
from pyarrow.ipc import new_stream
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from textok_mini.caption_store import CaptionStore, read_captions
from textok_mini.command import Help, command
from textok_mini.config import DataConfig
from textok_mini.openmoji import ATTRIBUTION, CATEGORIES, colours, drawings, rasterise, svg_body
from textok_mini.own_data import (
    HUB_ID,
    DataError,
    check_folder,
    check_hub,
    decode,
    digest,
    fit,
    is_for_test,
    known_split,
)
from textok_mini.paths import beside, data_dir, resolve
from textok_mini.scenes import DROPPED, LEVELS, SPLITS, Scene, World, caption, class_label, render, with_article, wrong
from textok_mini.settings import apply_overrides, from_dict, parsed

# Raise it whenever a prepared picture or caption would change: prepared data is kept by it.
GENERATOR = {"openmoji-scenes": 1, "openmoji": 2}
HELD_OUT_SCENES = 2_000  # of the test split, and of the zero-shot split
MADE = {"openmoji-scenes": SPLITS, "openmoji": ("train", "test")}
CAPTION_COLUMN = {"short": "caption_short", "normal": "caption", "long": "caption_long"}
FEATURES = datasets.Features(
    {"image": datasets.Value("binary")}
    | {name: datasets.Value("string") for name in (*CAPTION_COLUMN.values(), "id", "scene")}
    | {"label": datasets.ClassLabel(names=list(CATEGORIES))}
)


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class CaptionedImages(Dataset):
    """One split as a map-style torch dataset; made by `load_data`.

    `rows[i]` is `{"image": uint8 (3, H, W), "caption": str, "label": int, "id": str}`. Several rows at once, as a
    DataLoader with `collate_fn=as_batch` asks for them, are one dict: `image` (B, 3, H, W), `label` (B,), lists."""

    table: datasets.Dataset  # its column `image` holds the pictures; scenes have `scene` too
    ids: list[str]
    captions: list[str]
    labels: torch.Tensor  # int64: an index in `label_names`, or -1 for none
    label_names: list[str]
    image_size: int
    split: str
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)  # bad rows by kind
    world: World | None = None  # of scenes
    credit: str = ""  # to be shown wherever the pictures are

    def __post_init__(self):
        self.labels = torch.as_tensor(self.labels, dtype=torch.int64)
        self.pictures = self.table.select_columns("image").with_format("arrow")
        self.scenes = self.table.select_columns("scene") if "scene" in self.table.column_names else None

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, row: int) -> dict:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        first = {key: values[0] for key, values in self.__getitems__([row % len(self)]).items()}
        return first | {"label": int(first["label"])}

    def __getitems__(self, rows: list[int]) -> dict:
        rows = [int(row) for row in rows]
        captions, ids = [self.captions[row] for row in rows], [self.ids[row] for row in rows]
        return {"image": self.images(rows), "caption": captions, "label": self.labels[rows], "id": ids}

    def first(self, count: int) -> "CaptionedImages":
        """The first `count` rows, or all if there are fewer."""
        return self.take(range(min(count, len(self))))

    def take(self, rows: Sequence[int]) -> "CaptionedImages":
        """Some rows, in this order."""
        lists = {name: [getattr(self, name)[row] for row in rows] for name in ("ids", "captions", "labels")}
        return dataclasses.replace(self, table=self.table.select(rows), **lists)

    def images(self, rows: list[int]) -> torch.Tensor:
        """Pictures of some rows, uint8 (B, 3, H, W)."""
        stored = self.pictures[rows]["image"].to_pylist()
        if isinstance(stored[0], bytes):  # prepared: H * W * 3 bytes a picture
            images = np.frombuffer(b"".join(stored), np.uint8).reshape(-1, self.image_size, self.image_size, 3)
        else:
            images = np.stack([fit(decode(picture), self.image_size) for picture in stored])
        # In numpy, not torch: a copy this small is not worth waking torch's threads in every data worker.
        return torch.from_numpy(rearrange(images, "b h w c -> b c h w").copy())

    def scene(self, row: int) -> Scene:
        """What row `row` shows; only for `openmoji-scenes`."""
        return Scene.from_json(self.scenes[row]["scene"])

    def wrong(self, row: int, change: str, rng: np.random.Generator) -> Scene:
        """The row's scene with one thing changed (`scenes.wrong`), among the objects of this split."""
        return wrong(self.scene(row), change, rng, self.world.pool(self.split))


# A mirror makes such captions false. Crops are never random here: a caption may name what was cut away.
SIDED = re.compile(
    r"\b(left|right|east|west|(counter|anti)?-?clockwise|clock|text|writing|written|words?|letters?|letter|numbers?|digits?|"
    r"signs?|labels?|logos?|titles?|reads|reading|says|saying|maps?|flags?)\b",
    re.I,
)


def mirrored(images: torch.Tensor, captions: Sequence[str], lots: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W), in a mirror where `lots` (B,), uniform in [0, 1), is below a half and the caption allows."""
    chosen = (lots < 0.5) & torch.tensor([not SIDED.search(caption) for caption in captions])
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(-1), images)


as_batch = dict  # the `collate_fn` of a DataLoader over `CaptionedImages`, whose batches are one dict already


def load_data(source: str | DataConfig, split: str = "train", image_size: int = 32) -> CaptionedImages:
    """One split of `openmoji-scenes`, `openmoji`, a folder in imagefolder form, or a hub data set.

    A str is short for `DataConfig(source=...)`. Pictures are `image_size` pixels square. Raises DataError."""
    config = DataConfig(source=source) if isinstance(source, str) else source
    if not isinstance(image_size, int) or image_size < 8:
        raise DataError(f"image_size must be a whole number, at least 8, not {image_size!r}")
    if config.source in MADE:
        known_split(split, MADE[config.source], config.source)
        table = datasets.Dataset.from_file(str(prepare(config, image_size, [split]) / f"{split}.arrow"))
        stored = CAPTION_COLUMN.get(config.captions, "caption")
        captions, labels, ids = (table[name][:] for name in (stored, "label", "id"))
        if config.captions in DROPPED:
            if config.source != "openmoji-scenes":
                raise DataError(f"data.captions={config.captions!r} is for openmoji-scenes, not {config.source}")
            captions = [caption(Scene.from_json(scene), config.captions) for scene in table["scene"][:]]
        found = dict(table=table, ids=ids, captions=captions, labels=labels, label_names=list(CATEGORIES))
        found["world"] = world_of(config) if config.source == "openmoji-scenes" else None
        found["credit"] = f"Drawings: {ATTRIBUTION}"
        if config.captions_from:
            found["captions"] = stored_captions(config.captions_from, ids, found["world"])
    elif resolve(config.source).is_dir():
        store, root = config.captions_from, resolve(config.source)
        stored = read_captions(resolve(store), pictures=root) if store else None
        found = check_folder(root, config, split, image_size, stored)
    elif re.fullmatch(HUB_ID, config.source):
        stored = read_captions(resolve(config.captions_from)) if config.captions_from else None
        found = check_hub(config, split, image_size, stored)
    else:
        kinds = f"neither {' nor '.join(MADE)}, nor a folder, nor a hub id like OWNER/NAME"
        raise DataError(f"there is no data {config.source!r}: it is {kinds}")
    if config.shuffled:
        order = np.random.default_rng((config.world_seed, len(found["captions"]))).permutation(len(found["captions"]))
        found["captions"] = [found["captions"][i] for i in order]
    return CaptionedImages(**found, image_size=image_size, split=split)


def stored_captions(store: str, ids: list[str], world: World | None) -> list[str]:
    """A caption store's captions of the pictures `ids`. Raises DataError for another world's store or a lack."""
    settings, stored = CaptionStore(resolve(store)).settings, read_captions(resolve(store))
    for name, value in vars(world).items() if world else ():  # another world has scenes of the same ids
        name = "world_seed" if name == "seed" else name
        if settings.get(name) != value:
            raise DataError(f"{store} captions scenes with {name}={settings.get(name)}, these have {value}")
    if lacking := [name for name in ids if name not in stored]:
        how = "python -m textok_mini.captions goes on where it was"
        raise DataError(f"{store} lacks captions of {len(lacking):,} pictures, the first is {lacking[0]}; {how}")
    return [stored[name] for name in ids]


def world_of(config: DataConfig) -> World:
    try:
        return World(config.world_seed, config.objects, config.min_objects, config.max_objects)
    except ValueError as error:
        raise DataError(f"{config.source}: {error}") from error


def draw_rows(world: World, split: str, image_size: int, indices: Iterable[int]) -> Iterator[dict]:
    for index in indices:
        scene = world.scene(split, index)
        captions = {CAPTION_COLUMN[level]: caption(scene, level) for level in LEVELS}
        row = {"image": render(scene, image_size).tobytes(), "label": class_label(scene), "scene": scene.to_json()}
        yield captions | row | {"id": f"{split}-{index:06d}"}


def scene_rows(config: DataConfig, split: str, image_size: int) -> Iterator[dict]:
    """The rows of one split of `openmoji-scenes`, in order, drawn by a process a core where processes start at once."""
    draw = partial(draw_rows, world_of(config), split, image_size)
    indices = range(config.scenes if split == "train" else HELD_OUT_SCENES)
    # Linux forks; elsewhere a process imports all anew, and a script without a main guard would start itself again.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if (workers := min(cores, len(indices) // 500)) < 2:
        return draw(indices)
    # torch's loader keeps the order and says so when a worker dies. It draws seeds: its own.
    how = dict(num_workers=workers, multiprocessing_context="fork", generator=torch.Generator())
    # Its worker would wait for ever where its process was killed; Linux ends it (1: PR_SET_PDEATHSIG).
    how["worker_init_fn"] = lambda _: ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    return itertools.chain.from_iterable(DataLoader(indices, 100, collate_fn=lambda some: list(draw(some)), **how))


def picture_rows(config: DataConfig, split: str, image_size: int) -> Iterator[dict]:
    """The rows of one split of `openmoji`: named pictures on white, a tenth of the motifs for testing."""
    for drawing in drawings().values():
        if is_for_test(drawing.motif) != (split == "test"):
            continue
        body = f'<rect width="72" height="72" fill="#fff"/>{svg_body(drawing.key)}'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{body}</svg>'
        short = with_article(drawing.name)
        normal = f"{short}, {drawing.category.lower()}, {' and '.join(colours(drawing.key))}"
        captions = {"caption_short": short, "caption": normal, "caption_long": f"{normal} on a white background"}
        row = {"image": rasterise(svg, image_size)[:, :, :3].tobytes(), "label": CATEGORIES.index(drawing.category)}
        yield captions | row | {"id": drawing.key, "scene": ""}


def prepare(config: DataConfig, image_size: int, splits: Iterable[str] | None = None) -> Path:
    """Renders the splits that are not there yet (all by default); returns their folder.

    Its name depends on all that pictures and captions depend on. A second process waits instead of working too."""
    settings = dict(
        source=config.source, image_size=image_size, generator=GENERATOR[config.source], drawings=ATTRIBUTION
    )
    rows_of = scene_rows if config.source == "openmoji-scenes" else picture_rows
    if rows_of is scene_rows:
        settings |= dataclasses.asdict(world_of(config)) | {"scenes": config.scenes}
    folder, schema = data_dir() / f"{config.source}-{image_size}px-{digest(settings)}", FEATURES.arrow_schema
    for split in splits or MADE[config.source]:
        if (file := folder / f"{split}.arrow").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if file.is_file():  # another process made it while this one waited
                continue
            (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
            print(f"preparing {config.source} {split} at {image_size} px, once ...", flush=True)
            # disable=None: a bar on a terminal, none in a log file
            rows = iter(tqdm(rows_of(config, split, image_size), split, unit=" rows", disable=None))
            with beside(file, alone=True) as part, pa.OSFile(str(part), "wb") as out, new_stream(out, schema) as stream:
                while batch := list(itertools.islice(rows, 1_000)):
                    stream.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    return folder


@command(__doc__)
def main(arguments: list[str]) -> None:
    """Makes or checks every split of a source and says what is there."""
    if arguments[0] != "prepare":
        raise Help
    values = apply_overrides({}, arguments[1:])
    image_size = parsed(values.pop("image_size", 32))
    config = from_dict(DataConfig, values.pop("data", {}), "data.")
    if values:
        raise DataError(f"unknown setting {next(iter(values))!r}: prepare takes data=SOURCE, data.KEY and image_size")
    for split in MADE.get(config.source, ("train", "test")):
        rows = load_data(config, split, image_size)
        print(f"{config.source} {split}: {len(rows):,} pictures of {image_size} px")
        print(f"  for example: {rows.captions[0]}")
    if config.source in MADE:
        print(f"  in {prepare(config, image_size)}\n  drawings: {ATTRIBUTION}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
