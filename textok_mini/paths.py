"""Where things are on disk: the one place that notebooks, commands and tests ask.

papermill runs a notebook in the caller's folder and nbval in the notebook's own, so a relative path means
two different things to them; everything therefore asks here.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def project_root() -> Path:
    """The folder that holds `data/`, `runs/` and `notebooks/`: `$TEXTOK_MINI_HOME`, else the clone that this
    package was installed from (`pip install -e .`), else the current folder."""
    if home := os.environ.get("TEXTOK_MINI_HOME"):
        return Path(home).expanduser().resolve()
    clone = Path(__file__).resolve().parent.parent
    return clone if (clone / "pyproject.toml").is_file() else Path.cwd()


def data_dir() -> Path:
    """Prepared data sets, text caches and converted weights (`data/`, ignored by git)."""
    return project_root() / "data"


def weights_dir() -> Path:
    """Converted network weights, safetensors only (`data/weights/`)."""
    return data_dir() / "weights"


def resolve(path: str | Path) -> Path:
    """A user's path: absolute as it is, relative to the current folder if it exists there, else to the root."""
    path = Path(path).expanduser()
    if path.is_absolute() or path.exists():
        return path.resolve()
    return project_root() / path


@contextmanager
def beside(path: Path, alone: bool = False) -> Iterator[Path]:
    """Yields a name next to `path` to write under. Where the block ends well it is renamed to `path`, else removed, so
    what is at `path` is always whole. `alone`: nobody else writes it now (a lock is held); then the name is the same
    every time, and what a killed process left is written over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part" if alone else f".{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str, alone: bool = False) -> None:
    """A file of text, whole or not at all: `beside`."""
    with beside(path, alone) as part:
        part.write_text(text, encoding="utf-8")
