"""What a reconstruction is charged for: l2 and LPIPS.

    perceptual = LPIPS("alex")
    total, parts = tokenizer_loss(model(images, text), images, {"l2": 1.0, "lpips": 0.1}, perceptual)

l2 keeps colours and places right, but its best guess under doubt is a blur. LPIPS compares activations of an
ImageNet network instead of pixels, which is closer to what people see. Both are computed in fp32 whatever
autocast says: they are small differences of large numbers. Never train and report with one trunk: a figure
flatters whoever was trained on it, so here AlexNet's trains and VGG16's reports.
"""

import warnings
from collections.abc import Mapping
from typing import Literal

import lpips
import torch
from torch import Tensor
from torch.nn import functional as F

from textok_mini.weights import load_trunk

Trunk = Literal["alex", "vgg"]

# Below these sizes a pooling layer of the trunk has nothing left to pool.
SMALLEST_SIDE = {"alex": 31, "vgg": 16}


def l2(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared error over all pixels and channels of images in [-1, 1], a scalar in fp32."""
    return F.mse_loss(reconstruction.float(), images.float())


class LPIPS:
    """Learned perceptual distance (Zhang et al., 2018; v0.1): two `(B, 3, H, W)` in [-1, 1] to `(B,)`.

    The trunk comes from `textok_mini.weights`, the linear heads from the `lpips` package. Deliberately not an
    `nn.Module`: kept as an attribute of a model it enters neither its `state_dict` nor its parameters, and no
    `.train()` can wake its dropout. Follows its input's device. Only the first argument receives a gradient.

    Raises ValueError for an unknown trunk, FileNotFoundError for weights that were not fetched.
    """

    def __init__(self, trunk: Trunk = "alex"):
        if trunk not in SMALLEST_SIDE:
            raise ValueError(f"LPIPS has no trunk {trunk!r}: choose from {', '.join(SMALLEST_SIDE)}")
        self.trunk = trunk
        tensors = load_trunk(trunk)
        # The package draws random trunk weights first (ours replace them): fork, or building a loss would
        # shift every random number that a training draws after it. It also warns of old arguments.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.network = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
        # `slice2.3.weight` there is `features.3.weight` in torchvision: same layers, cut into five slices.
        names = self.network.net.state_dict()
        self.network.net.load_state_dict({name: tensors[f"features.{name.split('.', 1)[1]}"] for name in names})
        self.network.eval().requires_grad_(False)

    def __call__(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Distance of each pair, images in [-1, 1]; 0 for identical ones.

        Raises ValueError for images that are not RGB batches of one shape, or too small for the trunk."""
        if reconstruction.shape != images.shape or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"LPIPS wants two batches (B, 3, H, W), not {(*reconstruction.shape,)} and {(*images.shape,)}"
            )
        if min(images.shape[-2:]) < SMALLEST_SIDE[self.trunk]:
            raise ValueError(
                f"LPIPS-{self.trunk} needs images of {SMALLEST_SIDE[self.trunk]} pixels a side or more, "
                f"not {images.shape[-2]} x {images.shape[-1]}"
            )
        self.network.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            # Frozen weights and a detached target: autograd records the reconstruction's side only.
            return self.network(reconstruction.float(), images.detach().float()).flatten()


def tokenizer_loss(
    reconstruction: Tensor, images: Tensor, weights: Mapping[str, float], perceptual: LPIPS | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum that is minimised, and each part by name, unweighted and detached, for the log.

    `weights` names the parts, `l2` and `lpips`; a part whose weight is 0 is not computed. All scalars, fp32.
    Raises ValueError for a name it does not know, for weights all 0, and for `lpips` without `perceptual`."""
    if unknown := set(weights) - {"l2", "lpips"}:
        raise ValueError(f"unknown loss {', '.join(sorted(unknown))}: the losses are l2 and lpips")
    if not any(weights.values()):
        raise ValueError("every loss has weight 0: there is nothing to learn")
    if weights.get("lpips") and perceptual is None:
        raise ValueError("a weight for lpips needs `perceptual=LPIPS(...)`")

    parts = {}
    if weights.get("l2"):
        parts["l2"] = l2(reconstruction, images)
    if weights.get("lpips"):
        parts["lpips"] = perceptual(reconstruction, images).mean()
    # L = w_l2 * |x - x'|^2 + w_lpips * LPIPS(x, x')
    total = sum(weights[name] * part for name, part in parts.items())
    return total, {name: part.detach() for name, part in parts.items()}
