"""What a reconstruction is charged for: l2, LPIPS or an ImageNet network's logits, KL, and what a GAN adds.

    perceptual = LPIPS("alex")
    total, parts = tokenizer_loss(reconstruction, images, {"l2": 1.0, "lpips": 0.1}, perceptual)

l2 keeps colours and places right, but its best guess under doubt is a blur. LPIPS compares activations of an ImageNet
network instead of pixels, which is closer to what people see. Both are computed in fp32 whatever autocast says: they
are small differences of large numbers. A figure flatters whoever was trained on it: AlexNet trains, VGG16 reports.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Literal

import lpips
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_weight, resnet50

from textok_mini.weights import load_trunk

Trunk = Literal["alex", "vgg"]
SMALLEST_SIDE = {"alex": 31, "vgg": 16}  # below it a pooling layer of the trunk has nothing left to pool


def l2(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared error over all pixels and channels of images in [-1, 1], a scalar in fp32."""
    return F.mse_loss(reconstruction.float(), images.float())


class Reaching(nn.Conv2d):
    """A convolution without the rows and columns of its kernel that meet nothing but padding: on a map of one place, to
    which AlexNet brings a picture of 32 pixels, all but the centre. Same values (gain: `benchmarks/choices.py`)."""

    def forward(self, x: Tensor) -> Tensor:
        idle = max(0, self.padding[0] + 1 - max(x.shape[-2:]))
        met = slice(idle, self.kernel_size[0] - idle)
        return F.conv2d(x, self.weight[..., met, met], self.bias, self.stride, self.padding[0] - idle)


class LPIPS:
    """Learned perceptual distance (Zhang et al., 2018; v0.1): two `(B, 3, H, W)` in [-1, 1] to `(B,)`.

    The trunk comes from `textok_mini.weights`, the linear heads from the `lpips` package. Deliberately no `nn.Module`:
    as an attribute of a model it enters neither `state_dict` nor parameters, and no `.train()` can wake its dropout.
    Follows its input's device. Only the first argument receives a gradient. Raises ValueError for an unknown trunk,
    images that are not RGB batches of one shape or too small, FileNotFoundError for weights that were not fetched."""

    name = "lpips"

    def __init__(self, trunk: Trunk = "alex"):
        if trunk not in SMALLEST_SIDE:
            raise ValueError(f"LPIPS has no trunk {trunk!r}: choose from {', '.join(SMALLEST_SIDE)}")
        self.trunk, tensors = trunk, load_trunk(trunk)
        # The package draws random trunk weights first (ours replace them): fork, or building a loss would
        # shift every random number that a training draws after it. It also warns of old arguments.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.network = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
        # `slice2.3.weight` there is `features.3.weight` in torchvision: same layers, cut into five slices.
        names = self.network.net.state_dict()
        self.network.net.load_state_dict({name: tensors[f"features.{name.split('.', 1)[1]}"] for name in names})
        for layer in self.network.net.modules():
            layer.__class__ = Reaching if isinstance(layer, nn.Conv2d) else layer.__class__
        self.network.eval().requires_grad_(False)

    def __call__(self, reconstruction: Tensor, images: Tensor, known: list[Tensor] | None = None) -> Tensor:
        """The distances (B,). `known`: `features(images)`, for images that are compared more than once."""
        shapes, smallest = (tuple(reconstruction.shape), tuple(images.shape)), SMALLEST_SIDE[self.trunk]
        if shapes[0] != shapes[1] or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"LPIPS wants two batches (B, 3, H, W), not {shapes[0]} and {shapes[1]}")
        if min(images.shape[-2:]) < smallest:
            raise ValueError(f"LPIPS-{self.trunk} needs images of {smallest} pixels a side or more, not {shapes[1]}")
        with torch.autocast(images.device.type, enabled=False):
            # Frozen weights and a detached target: autograd records the reconstruction's side only.
            theirs = known or self.features(images.detach())
            squares = [(a - b).square() for a, b in zip(self.features(reconstruction), theirs, strict=True)]
            layers = [head(square).mean((2, 3)) for head, square in zip(self.network.lins, squares, strict=True)]
            return sum(layers).flatten()

    def features(self, images: Tensor) -> list[Tensor]:
        """Five layers' activations, each place's channels of unit length: [(B, C, h, w), ...]."""
        self.network.to(images.device)
        layers = self.network.net(self.network.scaling_layer(images.float()))
        return [lpips.normalize_tensor(layer) for layer in layers]


class ResNetLogits:
    """MAGVIT's perceptual loss: the mean squared difference of a ResNet-50's ImageNet logits, `(B,)`, for two
    `(B, 3, H, W)` in [-1, 1], resized to its 224 pixels. torchvision's weights (100 MB, their hash checked) are fetched
    at first; like `LPIPS` it is no Module and never trained."""

    name = "logits"

    def __init__(self):
        weights = get_weight("ResNet50_Weights.IMAGENET1K_V1")
        with torch.random.fork_rng(devices=[]):
            self.network = resnet50()
        self.network.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
        self.network.eval().requires_grad_(False)
        transform = weights.transforms()
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (transform.mean, transform.std))

    def __call__(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return (self.logits(reconstruction) - self.logits(images.detach())).square().mean(1)

    def logits(self, images: Tensor) -> Tensor:
        self.network.to(images.device)
        images = F.interpolate((images.float() + 1) / 2, 224, mode="bilinear", antialias=True)
        return self.network((images - self.mean.to(images.device)) / self.std.to(images.device))


def perceptual_loss(name: str) -> LPIPS | ResNetLogits | None:
    """What `training.perceptual` names; None for `none`."""
    if name == "none":
        return None
    return ResNetLogits() if name == "resnet50-logits" else LPIPS(name.removeprefix("lpips-"))


def tokenizer_loss(
    reconstruction: Tensor,
    images: Tensor,
    weights: Mapping[str, float],
    perceptual: LPIPS | ResNetLogits | None = None,
    own: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum that is minimised, and each part by name, unweighted and detached, for the log.

    `weights` names the parts, `l2`, `perceptual.name`, and `kl` or `codes` for the bottleneck's `own`; a part of weight
    0 is not computed. All are fp32 scalars. Raises ValueError for a name it does not know, and for weights all 0."""
    losses = {"l2": lambda: l2(reconstruction, images), "kl": lambda: own, "codes": lambda: own}
    if perceptual:
        losses[perceptual.name] = lambda: perceptual(reconstruction, images).mean()
    weights = {name: weight for name, weight in weights.items() if weight}
    if unknown := weights.keys() - losses.keys():
        raise ValueError(f"no loss {', '.join(sorted(unknown))} here: there are {', '.join(losses)}")
    if not weights:
        raise ValueError("every loss has weight 0: there is nothing to learn")
    parts = {name: losses[name]() for name in weights}
    # L = w_l2 * |x - x'|^2 + w_perceptual * LPIPS(x, x') + w_kl * KL
    total = sum(weights[name] * part for name, part in parts.items())
    return total, {name: part.detach() for name, part in parts.items()}


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logistic: what the discriminator is charged for logits (B,) of real pictures and of reconstructions."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def adversarial(fake: Tensor) -> Tensor:
    """Non-saturating (Goodfellow et al., 2014): what the tokenizer is charged for reconstructions with logits (B,).

    Its gradient is largest where the discriminator is sure, which is where the tokenizer has most to learn."""
    return F.softplus(-fake.float()).mean()


def r1(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Mean over real pictures of |dD/dx|^2, without a half (Mescheder et al., 2018, have gamma / 2): weight 10 here is
    MAGVIT's 10 and StyleGAN2's gamma of 20."""
    images = images.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()


class LeCAM:
    """Keeps logits near the other side's past mean (Tseng et al., 2021), as google/lecam-gan defines it: of each
    picture, and with means whose start at 0 is corrected for (MAGVIT's is of the batch's mean, uncorrected).

    `loss(real, fake)` for logits (B,), after `update(real, fake)` of the same step. Where there are several processes,
    `update` takes the means over all of them. Two sums and a count are its whole state."""

    def __init__(self, decay: float = 0.99):
        self.decay, self.state = decay, torch.zeros(3, dtype=torch.float64)  # real, fake, updates

    def update(self, real: Tensor, fake: Tensor) -> None:
        means = torch.stack([real.detach().double().mean(), fake.detach().double().mean()]).to(self.state.device)
        self.state[:2].lerp_(means, 1 - self.decay)
        self.state[2] += 1

    def loss(self, real: Tensor, fake: Tensor) -> Tensor:
        real_mean, fake_mean = self.state[:2] / (1 - self.decay ** self.state[2])
        return F.relu(real.float() - fake_mean).square().mean() + F.relu(real_mean - fake.float()).square().mean()
