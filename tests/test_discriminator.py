"""The discriminator and what it is trained by, against counts, closed forms and a second way to compute each."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from textok_mini import discriminator
from textok_mini.config import ConfigError, DiscriminatorConfig
from textok_mini.discriminator import Discriminator, halve
from textok_mini.losses import LeCAM, adversarial, discriminator_loss, r1


def closed_form(channels: int, widths: list[int]) -> int:
    count = 3 * 9 * channels + channels
    for a, b in itertools.pairwise([channels, *widths]):
        count += (9 * a * a + a) + (9 * a * b + b) + a * b  # two convolutions, the skip without bias
    last = widths[-1]
    return count + (9 * last * last + last) + (16 * last * last + last) + (last + 1)


@pytest.mark.parametrize(
    ("size", "widths", "millions"),
    [
        (256, [128, 256, 512, 512, 512, 512], 24.19),  # FACTS: derived from the second-hand layout
        (512, [64, 128, 256, 512, 512, 512, 512], 24.23),
    ],
)
def test_published_sizes(size, widths, millions):
    config = DiscriminatorConfig(size)
    with torch.device("meta"):
        count = sum(p.numel() for p in Discriminator(config).parameters())
    assert config.widths == widths and count == closed_form(128, widths) and round(count / 1e6, 2) == millions


@pytest.mark.parametrize("size", [4, 48, 0])
def test_a_size_that_does_not_halve_to_four_is_one_line(size):
    with pytest.raises(ConfigError, match="discriminator\\.image_size must be a power of two, from 8"):
        DiscriminatorConfig(size)


def test_each_picture_is_judged_alone():
    torch.manual_seed(0)
    judge, images = Discriminator(DiscriminatorConfig(32, 8)), torch.randn(5, 3, 32, 32)
    alone = torch.cat([judge(image[None]) for image in images])
    torch.testing.assert_close(judge(images), alone, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="must be"):
        judge(images[:, :, :16])


def test_halving_keeps_what_is_flat_and_removes_what_flickers():
    flat = halve(torch.ones(1, 2, 16, 16))
    torch.testing.assert_close(flat[:, :, 1:-1, 1:-1], torch.ones(1, 2, 6, 6))
    checks = (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16)).expand(1, 2, 16, 16)
    assert halve(checks)[:, :, 1:-1, 1:-1].abs().max() < 1e-6


def by_channels(x):
    """The same filter as torch's own convolution by channels, whose derivatives torch works out."""
    taps = torch.tensor([1, 3, 3, 1], dtype=x.dtype) / 8
    return F.conv2d(x, torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4), stride=2, padding=1, groups=x.shape[1])


def test_halving_has_derivatives_of_any_order(monkeypatch):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(halve(x), by_channels(x))
    assert torch.autograd.gradcheck(lambda x: halve(x).sin(), x)
    assert torch.autograd.gradgradcheck(lambda x: halve(x).sin(), x)
    judge, images = Discriminator(DiscriminatorConfig(16, 4)), torch.randn(2, 3, 16, 16)
    ours = torch.autograd.grad(r1(judge, images), list(judge.parameters())[:-1], allow_unused=True)
    monkeypatch.setattr(discriminator, "halve", by_channels)
    theirs = torch.autograd.grad(r1(judge, images), list(judge.parameters())[:-1], allow_unused=True)
    assert sum(gradient is not None for gradient in ours) > 10
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_r1_takes_as_many_operations_for_many_channels_as_for_few():
    """torch's second derivative of a convolution by channels goes through them one by one."""
    counts = []
    for channels in (8, 32):
        judge = Discriminator(DiscriminatorConfig(16, channels))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            r1(judge, torch.randn(2, 3, 16, 16)).backward()
        counts.append(sum(row.count for row in found.key_averages()))
    assert counts[1] < 1.05 * counts[0]


def test_losses_are_cross_entropies():
    real, fake = torch.randn(7), torch.randn(7)
    both = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(discriminator_loss(real, fake), both(real, torch.ones(7)) + both(fake, torch.zeros(7)))
    torch.testing.assert_close(adversarial(fake), both(fake, torch.ones(7)))


def test_r1_of_a_quadratic_is_known_and_has_a_gradient():
    """D(x) = x' A x / 2 + b' x has the gradient A x + b for a symmetric A."""
    a, b = torch.randn(12, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    a = (a + a.T).requires_grad_(True)
    images = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    flat = images.flatten(1)
    penalty = r1(lambda x: 0.5 * ((x.flatten(1) @ a) * x.flatten(1)).sum(1) + x.flatten(1) @ b, images)
    expected = (flat @ a + b).float().square().sum(1).mean()
    torch.testing.assert_close(penalty, expected)
    assert torch.autograd.grad(penalty, a)[0].abs().sum() > 0


def test_r1_by_finite_differences():
    torch.manual_seed(0)
    judge = Discriminator(DiscriminatorConfig(8, 2)).double()
    image, step = torch.randn(1, 3, 8, 8, dtype=torch.float64), 1e-5
    slopes = []
    for direction in torch.eye(192, dtype=torch.float64).reshape(192, 1, 3, 8, 8):
        slopes.append((judge(image + step * direction) - judge(image - step * direction)) / (2 * step))
    assert r1(judge, image).item() == pytest.approx(torch.cat(slopes).square().sum().item(), rel=1e-5)


def test_lecam_against_a_few_lines_of_numpy():
    rng, lecam = np.random.default_rng(0), LeCAM(decay=0.9)
    sums = np.zeros(2)
    for step in range(1, 30):
        real, fake = rng.normal(1, 2, 6), rng.normal(-1, 2, 6)
        lecam.update(torch.tensor(real), torch.tensor(fake))
        sums = 0.9 * sums + 0.1 * np.array([real.mean(), fake.mean()])
        real_mean, fake_mean = sums / (1 - 0.9**step)
        expected = (np.maximum(real - fake_mean, 0) ** 2).mean() + (np.maximum(real_mean - fake, 0) ** 2).mean()
        logits = torch.tensor(real, requires_grad=True)
        loss = lecam.loss(logits, torch.tensor(fake))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        loss.backward()  # of logits only: the means are constants
        np.testing.assert_allclose(logits.grad, 2 * np.maximum(real - fake_mean, 0) / 6, rtol=1e-4, atol=1e-6)
