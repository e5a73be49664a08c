"""Where things are on disk: the one place that notebooks, commands and tests ask.

papermill runs a notebook in the caller's folder and nbval in the notebook's own, so a relative path means
two different things to them; everything therefore asks here.
"""

import os
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
