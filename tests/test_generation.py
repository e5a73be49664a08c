"""DiT and the two processes, against published counts, closed forms and diffusers."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_ddpm
from torch.nn import functional as F

from textok_mini.config import DiTConfig
from textok_mini.diffusion import Diffusion, Flow, Steps, guided, noise_of
from textok_mini.dit import DiT, frequencies
from textok_mini.generator import sample_latents
from textok_mini.settings import load_config
from textok_mini.text import TextTokens

SMALL = DiTConfig(num_latent_tokens=4, latent_dim=8, width=32, layers=2, heads=2, num_classes=8)


def perturbed(config: DiTConfig) -> DiT:
    """At its start a DiT is the identity: random weights everywhere make it depend on all it is told."""
    torch.manual_seed(0)
    model = DiT(config).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


# The /2 models at 256 px, 256 tokens of 16 numbers: millions of the DiT paper's table 1; XL by its own code too.
@pytest.mark.parametrize(
    ("width", "layers", "heads", "published"),
    [(384, 12, 6, 33), (768, 12, 12, 130), (1024, 24, 16, 458), (1152, 28, 16, 675)],
)
def test_published_counts(width, layers, heads, published):
    with torch.device("meta"):
        model = DiT(DiTConfig(256, 16, width, layers, heads))
    count = sum(p.numel() for p in model.parameters())
    w = width
    closed = layers * (18 * w * w + 15 * w) + 2 * w * w + 2 * w + (w + 1) * 32  # blocks, last norm, output
    closed += (256 * w + w) + (w * w + w) + 1001 * w + 17 * w + 256 * w  # time, classes, input, positions
    assert count == closed and int(count / 1e6) in (published, published - 1)
    assert width != 1152 or count == 675_129_632


def test_at_the_start_it_is_the_identity_and_says_nothing():
    model = DiT(SMALL)
    x = torch.randn(3, 4, 8)
    assert (model(x, torch.tensor([0, 5, 999]), torch.tensor([0, 1, 8])) == 0).all()
    inside = model.token_in(x) + model.positions
    assert torch.equal(model.blocks[0](inside, torch.randn(3, 32)), inside)


def test_it_depends_on_all_that_it_is_told():
    model, x = perturbed(SMALL), torch.randn(1, 4, 8)
    time, label = torch.tensor([500]), torch.tensor([3])
    out = model(x, time, label)
    assert out.shape == (1, 4, 16)
    for other in (model(x, time + 100, label), model(x, time, label + 1), model(x.flip(1), time, label)):
        assert (other - out).abs().max() > 1e-3
    assert not torch.allclose(model(x.flip(1), time, label).flip(1), out)  # positions tell the tokens apart
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, 8\)"):
        model(x[:, :3], time, label)


def test_frequencies_are_cosines_and_sines():
    row = frequencies(torch.tensor([7]))[0].double()
    rates = 10_000 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(row, np.concatenate([np.cos(7 * rates), np.sin(7 * rates)]), atol=1e-5)


def test_a_gaussian_is_sampled_as_the_closed_form_says():
    """For x of variance s^2 the best guess of the noise is known, so the sampler must give that variance back."""
    process, s = Diffusion(), 0.5
    noise = noise_of(0, range(4_000), 0, (1, 2))

    def best(x, t):
        kept = Diffusion.of(process.kept, t, x)
        guess = (1 - kept).sqrt() * x / (kept * s * s + 1 - kept)
        return torch.cat([guess, -torch.ones_like(guess)], dim=-1)

    x = process.sample(best, noise, lambda step: noise_of(0, range(4_000), step, (1, 2)), steps=250)
    assert x.std().item() == pytest.approx(s, rel=0.03) and abs(x.mean().item()) < 0.02

    def velocity(x, t):
        t = (t / 1_000)[:, None, None]
        return (t - (1 - t) * s * s) / ((1 - t) ** 2 * s * s + t**2) * x

    x = Flow().sample(velocity, noise, steps=200)
    assert x.std().item() == pytest.approx(s, rel=0.03)


def test_sampling_in_tf32_leaves_what_comes_after_in_fp32(monkeypatch):
    """A grid that draws and then trains must not train in TF32; also where drawing was cut short."""
    now, seen = torch.backends.cuda.matmul, []

    def passing(self, x, t, condition):
        seen.append(now.fp32_precision)
        if len(seen) > 3:
            raise KeyboardInterrupt
        return torch.cat([x, x], dim=-1)

    monkeypatch.setattr(DiT, "forward", passing)
    model, before, label = DiT(load_config("smoke").dit), now.fp32_precision, torch.zeros(1, dtype=torch.long)
    sample_latents(model, Flow(), label, label, [0], steps=3)
    assert seen == ["tf32"] * 3 and now.fp32_precision == before != "tf32"
    with pytest.raises(KeyboardInterrupt):
        sample_latents(model, Flow(), label, label, [0], steps=3)
    assert now.fp32_precision == before


def test_the_bound_is_a_kl_of_gaussians():
    process, (x, noise) = Diffusion(), torch.randn(2, 5, 4, 8)
    t = torch.tensor([1, 10, 200, 600, 999])
    between = torch.rand(5, 4, 8) * 2 - 1
    guess = noise + 0.1 * torch.randn_like(noise)
    _, parts = process.loss(lambda *_: torch.cat([guess, between], dim=-1), x, t, noise)
    steps, x_t = Steps(process, range(1_000)), process.noisy(x, t, noise)
    real, real_log = steps.posterior(x, x_t, t)
    ours, _ = steps.posterior(steps.origin(x_t, guess, t), x_t, t)
    one = torch.distributions.Normal(real, (0.5 * real_log).exp().expand_as(real))
    two = torch.distributions.Normal(ours, (0.5 * steps.log_variance(between, t)).exp())
    expected = torch.distributions.kl_divergence(one, two).mean() / math.log(2)
    assert parts["bound"].item() == pytest.approx(expected.item(), rel=1e-3)


def test_guidance_touches_every_channel_of_the_noise_and_no_variance():
    model, labels = perturbed(SMALL), torch.tensor([1, 2])
    x, t = torch.randn(2, 4, 8), torch.tensor([500, 500])
    known, plain = model(x, t, labels), model(x, t, torch.tensor([8, 8]))
    nothing = torch.tensor([8, 8])
    out = guided(model, labels, nothing, scale=3.0)(x, t)
    torch.testing.assert_close(out[..., :8], plain[..., :8] + 3 * (known[..., :8] - plain[..., :8]))
    assert torch.equal(out[..., 8:], known[..., 8:])
    assert torch.equal(guided(model, labels, nothing, 3.0, (0, 400))(x, t), known)
    assert torch.equal(guided(model, labels, nothing, 1.0)(x, t), known)


def test_a_picture_is_the_same_in_any_batch():
    model, process = perturbed(SMALL), Diffusion()

    def draw(pictures):
        labels = torch.tensor([p % 8 for p in pictures])
        fresh = lambda step: noise_of(3, pictures, step, (4, 8))  # noqa: E731
        return process.sample(guided(model, labels, torch.full_like(labels, 8), 2.0), fresh(1_000), fresh, steps=10)

    whole, parts = draw(range(5)), torch.cat([draw([0, 1]), draw([2]), draw([3, 4])])
    torch.testing.assert_close(whole, parts, atol=1e-3, rtol=1e-3)  # of values up to 50
    assert dataclasses.asdict(SMALL)["num_classes"] == 8


def test_diffusion_is_diffusers(monkeypatch):
    """Same model output, same noise: the same 250-step sample as its DDPM scheduler with a learned variance."""
    process, shape = Diffusion(), (3, 4, 8)
    weights = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)) / 3

    def predict(x, t):
        near = (1 - Diffusion.of(process.kept, t, x)).sqrt() * x  # right for x of unit variance, so nothing explodes
        return F.pad(near, (0, 8)) + 0.3 * torch.tanh(x @ weights + (t / 1_000)[:, None, None])

    fresh = lambda step: noise_of(5, range(3), step, shape[1:])  # noqa: E731
    ours = process.sample(predict, fresh(250), fresh, steps=250)
    theirs = DDPMScheduler(1_000, 1e-4, 0.02, "linear", variance_type="learned_range", clip_sample=False)
    times = [round(i * 999 / 249) for i in range(250)]
    theirs.set_timesteps(timesteps=times[::-1])
    x = fresh(250)
    for step, time in zip(reversed(range(250)), times[::-1], strict=True):
        drawn = fresh(step).transpose(1, 2)  # theirs has channels first
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, drawn=drawn, **kwargs: drawn)
        out = predict(x, torch.full((3,), time)).transpose(1, 2)
        x = theirs.step(out, time, x.transpose(1, 2)).prev_sample.transpose(1, 2)
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=0)
    x, noise, t = torch.randn(shape), torch.randn(shape), torch.tensor([0, 400, 999])
    torch.testing.assert_close(process.noisy(x, t, noise), theirs.add_noise(x, noise, t), atol=1e-5, rtol=0)


def test_flow_is_diffusers():
    weights = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)) / 3

    def predict(x, t):
        return torch.tanh(x @ weights + (t / 1_000)[:, None, None])

    noise = noise_of(5, range(3), 0, (4, 8))
    ours = Flow().sample(predict, noise, steps=40)
    theirs, x = FlowMatchEulerDiscreteScheduler(1_000), noise
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 40, 40))
    for time in theirs.timesteps:
        x = theirs.step(predict(x, time.expand(3))[..., :8], time, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=0)
    x, t = torch.randn(3, 4, 8), theirs.timesteps[[3, 10, 30]]
    torch.testing.assert_close(Flow().noisy(x, t / 1_000, noise), theirs.scale_noise(x, t, noise), atol=1e-5, rtol=0)


def test_text_is_read_past_its_padding_and_by_every_token():
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, condition="text", text_dim=12, max_text_tokens=9)
    model = perturbed(config)
    x, t = torch.randn(2, 4, 8), torch.tensor([100, 900])
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    text = TextTokens(torch.randn(2, 5, 12), mask)
    out = model(x, t, text)
    torch.testing.assert_close(model(x, t, text.pad_to(9)), out, atol=1e-5, rtol=1e-4)
    short = TextTokens(text.embeddings[1:, :2], mask[1:, :2])
    torch.testing.assert_close(model(x[1:], t[1:], short), out[1:], atol=1e-5, rtol=1e-4)
    other = text.embeddings.clone()
    other[0, 4] += 1  # one word of the first
    changed = (model(x, t, TextTokens(other, mask)) - out).abs().amax(-1)
    assert (changed[0] > 1e-4).all() and (changed[1] == 0).all()
    fresh = DiT(config)
    inside = fresh.token_in(x) + fresh.positions
    assert torch.equal(fresh.blocks[0](inside, torch.randn(2, 32), TextTokens(torch.randn(2, 5, 32), mask)), inside)
