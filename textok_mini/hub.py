"""Loading from the Hugging Face hub, with one clear line where there is no network.

Left alone, the hub's client retries for half a minute and then prints a page (see transformers' OSError). Here
what is on disk is taken from disk; if it is not there, one short question tells whether the hub can be reached.
"""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, try_to_load_from_cache

from textok_mini.command import first_line


def hub_reachable(seconds: float = 5.0) -> bool:
    """Whether the hub answers at all; asks once, and not in offline mode."""
    if not constants.HF_HUB_OFFLINE:
        with contextlib.suppress(Exception):  # any failure of any HTTP client means the same here
            get_session().head(constants.ENDPOINT, timeout=seconds)
            return True
    return False


def from_hub(cls: Any, name: str, what: str, **kwargs: Any) -> Any:
    """`cls.from_pretrained(name)`, from disk where possible. Raises OSError with one line that names `what`."""
    looks_local = os.path.sep in name and (Path(name).is_absolute() or name.startswith("."))
    if looks_local and not Path(name).exists():
        raise OSError(f"{what} {name!r}: there is no such folder")
    try:
        return cls.from_pretrained(name, local_files_only=True, **kwargs)
    except (OSError, ValueError) as error:
        if Path(name).exists():
            raise OSError(f"{what} {name!r} cannot be read: {first_line(error)}") from error
    if not hub_reachable():
        missing = f"{what} {name!r} is not on this disk and {constants.ENDPOINT} cannot be reached"
        raise OSError(f"{missing}: name a local folder, or connect once so that it is downloaded")
    try:
        return cls.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise OSError(f"{what} {name!r} cannot be had from the hub: {first_line(error)}") from error


def revision(name: str, wanted: str | None = None) -> str:
    """Which weights `name` stands for: a hash of a folder's files, or the commit of a hub's model that `from_hub` has
    loaded, whose cache keeps a commit's files in a folder of its name."""
    if not Path(name).is_dir():
        return Path(try_to_load_from_cache(name, "config.json", revision=wanted)).parent.name
    total = hashlib.sha256()
    for path in sorted(Path(name).glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:10]
