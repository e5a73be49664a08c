"""What a batch costs before the network sees it: pictures prepared or decoded, captions read, bucketed or cached.

python benchmarks/loading.py [image_size]

256 rows of scenes. "Decoded" is the same pictures as PNG files in a folder, read row by row; "buckets" are captions of
like length together, as the encoder does by itself; "as they come" are batches of 32 in their own order.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from _paired import in_turn, table
from PIL import Image

from textok_mini.config import DataConfig
from textok_mini.data import load_data
from textok_mini.device import tune_cpu
from textok_mini.text import BUCKET, CachedText, FrozenTextEncoder

ROWS = 256


def as_folder(rows, folder: Path) -> None:
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as out:
        for i, caption in enumerate(rows.captions):
            Image.fromarray(rows[i]["image"].permute(1, 2, 0).numpy()).save(folder / f"{i:04}.png")
            out.write(json.dumps({"file_name": f"{i:04}.png", "caption": caption, "split": "train"}) + "\n")


def main(image_size: str = "32") -> None:
    size = int(image_size)
    tune_cpu(BUCKET)
    with contextlib.redirect_stdout(sys.stderr):  # what it says of its work is no result
        rows = load_data(DataConfig(source="openmoji-scenes", scenes=ROWS), "train", size)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    captions = [rows.captions[i] for i in order]
    with tempfile.TemporaryDirectory() as folder:
        as_folder(rows, Path(folder))
        with contextlib.redirect_stdout(sys.stderr):
            decoded = load_data(DataConfig(source=folder), "train", size)
        known = [i % len(decoded) for i in order]  # its own test split is held back
        print(f"pictures of {size} px")
        arms = {"prepared, memory-mapped": lambda: rows.images(order), "decoded": lambda: decoded.images(known)}
        table(in_turn(arms), "prepared, memory-mapped", ROWS)
        encoder = FrozenTextEncoder("minilm", 64)
        cached = CachedText(encoder, captions, Path(folder))
        parts = [captions[i : i + BUCKET] for i in range(0, ROWS, BUCKET)]
        print("captions, MiniLM")
        arms = {"encoded as they come": lambda: [encoder(part) for part in parts]}
        arms |= {"encoded in buckets": lambda: encoder(captions), "from the cache": lambda: cached(captions)}
        table(in_turn(arms, rounds=5, warmup=1), "encoded in buckets", ROWS)


if __name__ == "__main__":
    main(*sys.argv[1:])
