"""What several tests share."""

import pytest

from textok_mini import data
from textok_mini.paths import weights_dir

WEIGHTS = weights_dir()  # of the clone, before a test moves the root


@pytest.fixture(scope="module")
def small_home(tmp_path_factory):
    """A project root of its own, away from the clone's data/ and runs/, with held-out splits of 24 scenes."""
    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    (home / "data" / "weights").symlink_to(WEIGHTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXTOK_MINI_HOME", str(home))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(data, "HELD_OUT_SCENES", 24)
        yield home
