"""The losses against the formula of LPIPS written a second time, finite differences, and known values."""

from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file
from skimage.data import astronaut
from skimage.transform import resize
from torch.nn import functional as F

from textok_mini.losses import LPIPS, SMALLEST_SIDE, l2, perceptual_loss, tokenizer_loss
from textok_mini.weights import trunk_file

# The trunks once more: (kernel, stride, padding) of each convolution; the order of c(onvolution with ReLU),
# M(ax pool), and "." where LPIPS looks.
CONV = {"vgg": [(3, 1, 1)] * 13, "alex": [(11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1)]}
PLAN = {"vgg": "cc. M cc. M ccc. M ccc. M ccc.", "alex": "c. M c. M c. c. c."}
POOL = {"vgg": (2, 2), "alex": (3, 2)}


@pytest.fixture(scope="module", params=["alex", "vgg"])
def metric(request):
    return LPIPS(request.param)


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """Two crops of a photograph, (2, 3, 64, 64) in [-1, 1]."""
    picture = resize(astronaut()[:256, 128:384], (64, 128), anti_aliasing=True)
    picture = torch.from_numpy(picture).float().permute(2, 0, 1) * 2 - 1
    return torch.stack([picture[:, :, :64], picture[:, :, 64:]])


def lpips_by_the_formula(trunk: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sum over layers of the mean over places of sum_c w_c (a_c / |a| - b_c / |b|)^2, written in fp64."""
    tensors = {name: value.double() for name, value in load_file(trunk_file(trunk)).items()}
    indices = sorted({int(name.split(".")[1]) for name in tensors})
    heads_file = Path(lpips.__file__).parent / f"weights/v0.1/{trunk}.pth"
    heads = torch.load(heads_file, map_location="cpu", weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)

    def taps(x):
        x, found, layer = (x.double() - shift) / scale, [], 0
        for step in PLAN[trunk].replace(" ", ""):
            if step == "c":
                _, stride, padding = CONV[trunk][layer]
                name = f"features.{indices[layer]}"
                x = F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], stride, padding).clamp(min=0)
                layer += 1
            elif step == "M":
                x = F.max_pool2d(x, *POOL[trunk])
            else:
                found.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    total = 0
    for number, (u, v) in enumerate(zip(taps(a), taps(b), strict=True)):
        weight = heads[f"lin{number}.model.1.weight"].double().view(1, -1, 1, 1)
        total = total + ((u - v) ** 2 * weight).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (32, 32)])  # AlexNet's last maps: 3 x 3, 1 x 3, one place
def test_lpips_equals_the_formula(metric, photo, size):
    torch.manual_seed(0)
    photo = photo[:, :, : size[0], : size[1]]
    other = (photo.flip(0) + 0.1 * torch.randn_like(photo)).clamp(-1, 1)
    ours = metric(photo, other)
    assert ours.shape == (2,)
    torch.testing.assert_close(ours.double(), lpips_by_the_formula(metric.trunk, photo, other), rtol=1e-4, atol=1e-6)


def test_lpips_orders_damage_sensibly(metric, photo):
    torch.manual_seed(0)
    noise = torch.randn_like(photo)
    distances = [metric(photo + strength * noise, photo).mean().item() for strength in (0.0, 0.05, 0.2)]
    unrelated = metric(photo.flip(0), photo).mean().item()
    assert distances[0] == 0
    assert 0.005 < distances[1] < distances[2]
    assert 0.2 < unrelated < 1


def test_lpips_gradient_against_finite_differences(metric, photo):
    target, x = photo[:1, :, :32, :32], photo[1:, :, :32, :32].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(metric(x, target).sum(), x)
    direction, step = gradient / gradient.norm(), 0.02
    with torch.no_grad():
        ahead, behind = (lpips_by_the_formula(metric.trunk, x + s * direction, target) for s in (step, -step))
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_only_the_reconstruction_gets_a_gradient(metric, photo):
    x, target = photo.clone().requires_grad_(), photo.flip(0).clone().requires_grad_()
    metric(x, target).sum().backward()
    assert x.grad.abs().sum() > 0 and target.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in metric.network.parameters())


def test_lpips_stays_out_of_a_model(metric):
    model = torch.nn.Linear(2, 2)
    model.perceptual = metric
    model.train()
    assert set(model.state_dict()) == {"weight", "bias"} and len(list(model.parameters())) == 2
    assert not any(module.training for module in metric.network.modules())


def test_building_lpips_leaves_the_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    LPIPS("alex")
    assert torch.equal(torch.rand(3), expected)


def test_losses_are_fp32_under_autocast(metric, photo):
    expected = metric(photo.flip(0), photo)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metric(photo.flip(0), photo), expected)
        total, parts = tokenizer_loss(photo.flip(0).bfloat16(), photo, {"l2": 1.0, "lpips": 0.1}, metric)
    assert {total.dtype, *(part.dtype for part in parts.values())} == {torch.float32}


@pytest.mark.parametrize("trunk", SMALLEST_SIDE)
def test_small_images_are_refused_and_the_smallest_pass(trunk):
    metric, side = LPIPS(trunk), SMALLEST_SIDE[trunk]
    assert metric(torch.zeros(1, 3, side, side), torch.ones(1, 3, side, side)).item() > 0
    for too_small in (8, side - 1):
        image = torch.zeros(1, 3, too_small, too_small)
        with pytest.raises(ValueError, match=f"needs images of {side} pixels"):
            metric(image, image)


def test_wrong_shapes_and_trunks_are_refused(metric):
    with pytest.raises(ValueError, match="two batches"):
        metric(torch.zeros(2, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no trunk 'resnet'"):
        LPIPS("resnet")


def test_missing_weights_are_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TEXTOK_MINI_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"run `python -m textok_mini.weights`") as error:
        LPIPS("alex")
    assert "\n" not in str(error.value)


def test_tokenizer_loss_is_the_weighted_sum_of_its_parts(metric, photo):
    x = photo.flip(0).clone().requires_grad_()
    total, parts = tokenizer_loss(x, photo, {"l2": 2.0, "lpips": 0.5}, metric)
    assert parts["l2"].item() == pytest.approx(np.mean((photo.numpy() - photo.flip(0).numpy()) ** 2), rel=1e-5)
    assert total.item() == pytest.approx(2.0 * parts["l2"].item() + 0.5 * parts["lpips"].item(), rel=1e-6)
    assert total.requires_grad and not any(part.requires_grad for part in parts.values())


def test_tokenizer_loss_computes_only_what_counts(photo):
    total, parts = tokenizer_loss(photo.flip(0), photo, {"l2": 1.0, "lpips": 0.0})
    assert set(parts) == {"l2"} and total == l2(photo.flip(0), photo)
    with pytest.raises(ValueError, match="no loss lpips here: there are l2, kl"):
        tokenizer_loss(photo, photo, {"lpips": 1.0})
    with pytest.raises(ValueError, match="weight 0"):
        tokenizer_loss(photo, photo, {"l2": 0.0})


def test_resnet_logits_are_torchvisions(photo, monkeypatch):
    """With random weights in place of the pretrained ones, which would be fetched; preprocessing is torchvision's."""
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    state = torchvision.models.resnet50().state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **kwargs: state)
    random = torch.get_rng_state()
    metric = perceptual_loss("resnet50-logits")
    assert torch.equal(random, torch.get_rng_state())  # building a loss changes no number that training draws
    x = F.interpolate(photo, 224).clamp(-1, 1)
    network = torchvision.models.resnet50().eval()
    network.load_state_dict(state)
    preset = weights.transforms(crop_size=224, resize_size=224)
    with torch.no_grad():
        ours, theirs = metric.logits(x), network(preset((x + 1) / 2))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    other = x.flip(3).requires_grad_()
    metric(other, x).sum().backward()
    assert metric(x, x).abs().max() == 0 and other.grad.abs().sum() > 0
    _, parts = tokenizer_loss(x.flip(3), x, {"l2": 1.0, "logits": 0.1}, metric)
    assert set(parts) == {"l2", "logits"}
