"""Captions on disk: a folder of parquet files that several processes may fill at once and that no kill can spoil.

    store = CaptionStore.open("runs/captions", settings, pictures=30_000)
    store.add(store.bucket_of("cats/1.jpg"), rows)  # a row is a dict of `COLUMNS`
    store.read()  # datasets.Dataset, by file_name and number
    read_captions("runs/captions")  # {"cats/1.jpg": "a grey cat asleep on ...", ...}

A picture's rows live in the bucket that its name's hash picks, a file a bucket. A file is read, extended, written
beside and renamed under a lock that dies with its process, so a row is there once or not at all.
"""

import hashlib
import json
import math
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from textok_mini.own_data import DataError
from textok_mini.paths import beside, write_text

PICTURES_A_BUCKET = 256
FEWEST_BUCKETS = 16  # so that several machines find work to share, and a folder may grow
COLUMNS = pa.schema(
    {"file_name": pa.large_string(), "number": pa.int32()}  # number: 0, 1, ... where a picture has several captions
    | {"caption": pa.large_string(), "error": pa.large_string()}  # one of both is null
    | {"bytes": pa.int64()}  # of the picture's file: another size is another picture; null for made scenes
    | {name: pa.string() for name in ("model", "revision", "prompt_hash")}
    | {"seed": pa.int64(), "settings": pa.string(), "licence": pa.string()}  # settings: JSON
    | {"words": pa.int32(), "seconds": pa.float64(), "created": pa.string()}  # created: UTC, ISO 8601
)


class CaptionStore:
    """An existing store; `open` makes one. `settings` are those it was made with, `buckets` how many it has."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.settings = json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
            self.buckets: int = self.settings["buckets"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.folder} is no caption store: its settings.json is lost or damaged") from error

    @classmethod
    def open(cls, folder: str | Path, settings: dict, pictures: int) -> "CaptionStore":
        """The store of `folder`, made for about `pictures` pictures if it is not there.

        `settings`: plain values, all that its captions depend on. Raises DataError if it was made with others."""
        folder, path = Path(folder), Path(folder) / "settings.json"
        (folder / ".locks").mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".locks" / "settings"):
            if not path.exists():
                made = settings | {"buckets": max(FEWEST_BUCKETS, math.ceil(pictures / PICTURES_A_BUCKET))}
                write_text(path, json.dumps(made, indent=2) + "\n", alone=True)
        store, ours = cls(folder), json.loads(json.dumps(settings))
        names = sorted((ours.keys() | store.settings.keys()) - {"buckets", "licence"})  # these change no caption
        if differ := ", ".join(name for name in names if ours.get(name) != store.settings.get(name)):
            raise DataError(f"{folder}: made with another {differ}; captions never mix silently: choose another store")
        return store

    def bucket_of(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(storable(name).encode()).digest()) % self.buckets

    def path(self, bucket: int) -> Path:
        return self.folder / f"bucket-{bucket:05d}.parquet"

    def table(self, bucket: int) -> pa.Table:
        if not (path := self.path(bucket)).exists():
            return COLUMNS.empty_table()
        with path.open("rb") as file:  # opened once: meanwhile another process may put a longer file in its place
            return pq.ParquetFile(file).read()

    def rows(self, bucket: int) -> list[dict]:
        return self.table(bucket).to_pylist()

    def add(self, bucket: int, rows: list[dict]) -> None:
        """Adds rows to their bucket. Of two with the same (file_name, number, bytes) the first stays, but an error
        gives way to a caption; a picture of another size takes its predecessor's place."""
        if not rows:
            return
        path = self.path(bucket)
        (self.folder / ".locks").mkdir(exist_ok=True)
        with FileLock(self.folder / ".locks" / path.stem):
            every = {}
            for row in self.rows(bucket) + [{k: storable(v) for k, v in row.items()} for row in rows]:
                old = every.setdefault(key := (row["file_name"], row["number"]), row)
                if old["caption"] is None or old.get("bytes") != row.get("bytes"):
                    every[key] = row
            table = pa.Table.from_pylist([every[key] for key in sorted(every)], COLUMNS)
            with beside(path, alone=True) as part:
                pq.write_table(table, part, compression="zstd")

    def read(self) -> datasets.Dataset:
        """Every row of every bucket, sorted by file_name and number."""
        table = pa.concat_tables([self.table(bucket) for bucket in range(self.buckets)])
        return datasets.Dataset(table.sort_by([("file_name", "ascending"), ("number", "ascending")]))


def read_captions(folder: str | Path, number: int = 0, pictures: Path | None = None) -> dict[str, str]:
    """Caption `number` of each picture by its file name, for a join. Absent are pictures with an error and, in the
    folder `pictures`, files of another size than the one that was captioned."""
    rows = CaptionStore(folder).read().select_columns(["file_name", "number", "caption", "bytes"]).to_list()
    rows = [row for row in rows if row["number"] == number and row["caption"] is not None]
    if pictures:
        rows = [
            row
            for row in rows
            if (file := pictures / row["file_name"]).is_file() and file.stat().st_size == row["bytes"]
        ]
    return {row["file_name"]: row["caption"] for row in rows}


def storable(value):
    """Text as parquet can hold it: halves of a surrogate pair are joined, a lone half becomes U+FFFD."""
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if type(value) is str else value
