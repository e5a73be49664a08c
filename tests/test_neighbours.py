"""The neighbours: each differs from TexTok in what it should, and is trained by the same loop."""

import dataclasses
import json
import math

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch.nn import functional as F

from textok_mini import data, hub
from textok_mini.bottleneck import COMMITMENT, PATIENCE, Bottleneck, latent_bits
from textok_mini.config import ConfigError, TexTokConfig
from textok_mini.neighbours import ConvolutionalTokenizer, TwoStage, published, tokenizer_of
from textok_mini.run import TrainingError, load_run
from textok_mini.settings import load_config
from textok_mini.text import FrozenTextEncoder
from textok_mini.training import train

SMALL = dataclasses.replace(load_config("smoke").tokenizer, num_latent_tokens=16, text_in="none", codebook_size=64)
FEW = ["data.scenes=40", "training.steps=4", "training.sample_every=0", "tokenizer.num_latent_tokens=16"]
PLAIN = ["tokenizer.text_in=none", "tokenizer.codebook_size=64"]
ARMS = {
    "titok": ["tokenizer.latent=vq"],
    "words": ["tokenizer.latent=words", "tokenizer.latent_dim=384"],
    "grid-vq": ["tokenizer.layout=grid", "tokenizer.latent=vq"],
    "sd-vae": ["tokenizer.layout=convolutions", "tokenizer.latent=kl"],
    "vqgan": ["tokenizer.layout=convolutions", "tokenizer.latent=vq"],
}


def made(**changes) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return tokenizer_of(dataclasses.replace(SMALL, **changes)), torch.rand(3, 3, 32, 32) * 2 - 1


# --- codes ---


def test_a_code_is_the_nearest_by_euclid_and_of_unit_power():
    bottleneck, x = Bottleneck(dataclasses.replace(SMALL, latent="vq")), torch.randn(5, 16, 8)
    z, _ = bottleneck(x)
    codes = bottleneck.codebook * math.sqrt(8) / bottleneck.codebook.norm(dim=1, keepdim=True)
    tokens = x * math.sqrt(8) / x.norm(dim=-1, keepdim=True)
    nearest = torch.cdist(tokens, codes.expand(5, -1, -1)).argmin(-1)
    torch.testing.assert_close(z, codes[nearest], atol=1e-4, rtol=1e-4)
    assert torch.equal(bottleneck.nearest(z), nearest)  # a code's nearest is itself


def test_straight_through_and_the_two_halves_of_the_own_loss():
    bottleneck = Bottleneck(dataclasses.replace(SMALL, latent="vq"))
    x = torch.randn(2, 16, 8, requires_grad=True)
    z, own = bottleneck(x)
    # What reaches z arrives at the normalised token as it is, past the choice of a code.
    weights = torch.randn_like(z)
    (arrived,) = torch.autograd.grad((z * weights).sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad((F.rms_norm(x, (8,)) * weights).sum(), x)
    torch.testing.assert_close(arrived, expected)
    distance = (F.rms_norm(x, (8,)) - z).square().mean()
    torch.testing.assert_close(own, (1 + COMMITMENT) * distance / 8)
    own.backward()
    used = bottleneck.nearest(F.rms_norm(x, (8,))).unique()
    moved = bottleneck.codebook.grad.abs().sum(1).nonzero().flatten()
    assert torch.equal(moved, used)  # only the codes that were chosen


def test_idle_codes_begin_anew_where_the_tokens_are():
    bottleneck = Bottleneck(dataclasses.replace(SMALL, latent="vq")).train()
    start, x = bottleneck.codebook.detach().clone(), torch.randn(1, 1, 8) + 0.01 * torch.randn(4, 16, 8)
    for bottleneck.hardness in [0.5] * PATIENCE:  # tokens that lie close together choose few codes
        bottleneck(x)
    assert torch.equal(bottleneck.codebook, start) and len(bottleneck.nearest(F.rms_norm(x, (8,))).unique()) < 8
    bottleneck(x)
    half, _ = bottleneck(x)
    bottleneck.eval().hardness = 1.0
    z, _ = bottleneck(x)
    torch.testing.assert_close(half, (F.rms_norm(x, (8,)) + z) / 2)  # half of the way to its code
    assert len(bottleneck.nearest(z).unique()) > 32  # of 64
    bottleneck.train()
    kept = bottleneck.codebook.detach().clone()
    for _ in range(PATIENCE + 1):
        bottleneck(torch.randn(1, 16, 8).expand(4, -1, -1))
    assert torch.equal(bottleneck.codebook, kept)  # in the second half of a training nothing begins anew


def test_a_codebook_changes_no_other_weight():
    vq, noisy = (made(latent=latent)[0].state_dict() for latent in ("vq", "noisy"))
    assert vq.keys() - noisy.keys() == {"bottleneck.codebook", "bottleneck.idle"}
    assert all(torch.equal(vq[name], noisy[name]) for name in noisy)


def test_bits_of_codes():
    assert latent_bits(dataclasses.replace(SMALL, latent="vq", codebook_size=4096)) == 16 * 12
    assert latent_bits(dataclasses.replace(SMALL, latent="plain")) is None


def test_words_are_the_encoders_own_rows():
    encoder = FrozenTextEncoder("minilm")
    words = encoder.word_embeddings(100)
    named = {word: i for word, i in encoder.tokenizer.get_vocab().items() if word.isalpha() and len(word) > 1}
    first = sorted(named, key=named.get)[:100]
    assert first[:4] == ["the", "of", "and", "in"]  # the vocabulary begins with the commonest
    table = encoder.model.state_dict()["embeddings.word_embeddings.weight"]
    assert torch.equal(words, table[[named[word] for word in first]])
    with pytest.raises(ValueError, match="not codebook_size=99999"):
        encoder.word_embeddings(99_999)


def test_an_untrained_encoder_is_another_one_but_always_the_same():
    trained, random, again = (FrozenTextEncoder(name) for name in ("minilm", "random:minilm", "random:minilm"))
    told = [encoder(["a red apple"]).embeddings for encoder in (trained, random, again)]
    assert torch.equal(told[1], told[2]) and not torch.allclose(told[0], told[1], atol=0.1)
    assert random.revision != trained.revision  # or the two would share a cache


# --- grids ---


def test_a_grid_has_no_tokens_of_its_own():
    model, images = made(layout="grid", latent="plain")
    assert not [name for name in model.state_dict() if "latent_tokens" in name or "patch_tokens" in name]
    assert model.encode(images).shape == (3, 16, 8) and model.decode(model.encode(images)).shape == images.shape
    # Told apart by where they are: two latent tokens that change places make another picture.
    z = model.encode(images)
    assert not torch.allclose(model.decode(z), model.decode(z.roll(1, dims=1)), atol=1e-3)


def test_convolutions_are_diffusers_sd_vae():
    model, images = made(layout="convolutions", latent="kl")
    assert isinstance(model, ConvolutionalTokenizer) and model.encode(images).shape == (3, 16, 8)
    kinds = {
        name: (f"{kind}2D",) * 4
        for name, kind in (("down_block_types", "DownEncoderBlock"), ("up_block_types", "UpDecoderBlock"))
    }
    theirs = AutoencoderKL(
        block_out_channels=(8, 8, 8, 32), latent_channels=8, norm_num_groups=8, use_quant_conv=False,
        use_post_quant_conv=False, **kinds,
    )  # fmt: skip
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("bottleneck")})
    posterior = theirs.encode(images).latent_dist
    torch.testing.assert_close(model.encode(images), posterior.mean.flatten(2).transpose(1, 2))
    torch.testing.assert_close(model.decode(model.encode(images)), theirs.decode(posterior.mean).sample)
    torch.testing.assert_close(model(images)[1], posterior.kl().mean())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"layout": "grid", "num_latent_tokens": 4}, "num_latent_tokens"),
        ({"layout": "convolutions", "num_latent_tokens": 8}, "num_latent_tokens"),
        ({"layout": "convolutions", "text_in": "both"}, "text_in"),
        ({"layout": "grid", "proxy": "runs/x"}, "layout"),
        ({"codebook_size": 1, "latent": "vq"}, "codebook_size"),
        ({"num_latent_tokens": 0, "latent": "vq", "text_in": "both"}, "num_latent_tokens"),
    ],
)
def test_what_cannot_be_built_is_named(changes, key):
    with pytest.raises(ConfigError, match=rf"tokenizer\.{key} must be"):
        TexTokConfig(**(vars(SMALL) | changes))


# --- published weights ---


def test_published_weights_from_a_folder(tmp_path):
    small = dict(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for name, made in (("sd-vae", AutoencoderKL(**small, **kinds)), ("vqgan", VQModel(**small, **kinds))):
        made.eval().save_pretrained(tmp_path / name)
        with torch.no_grad():
            whole = made(images).sample.clamp(-1, 1)  # its own forward pass, which quantises in between
        torch.testing.assert_close(published(name, images, str(tmp_path / name)), whole)


def test_published_weights_that_cannot_be_had_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    with pytest.raises(OSError, match=r"published sd-vae 'stabilityai/sd-vae-ft-mse' is not on this disk"):
        published("sd-vae", torch.zeros(1, 3, 16, 16))
    with pytest.raises(OSError, match="there is no such folder"):
        published("vqgan", torch.zeros(1, 3, 16, 16), str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no published 'titok'"):
        published("titok", torch.zeros(1, 3, 16, 16))


# --- two stages ---


def test_each_of_the_two_stages_teaches_its_own_half():
    model, images = made(latent="vq", proxy="a run")
    assert isinstance(model, TwoStage)
    taught = {}
    for model.stage in (1, 2):
        model.zero_grad()
        drawn, own = model(images)
        (own if model.stage == 1 else drawn.square().mean()).backward()
        taught[model.stage] = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"latent_out.weight", "bottleneck.codebook", "patch_out.weight"} <= taught[1]
    assert not [name for name in taught[1] if name.startswith("proxy.")]
    assert not [name for name in taught[2] if name.startswith(("encoder", "latent_out", "bottleneck", "proxy.encoder"))]
    assert {"patch_out.weight", "proxy.patch_out.weight"} <= taught[2]


def test_the_first_stage_is_charged_for_the_proxys_codes():
    model, images = made(latent="vq", proxy="a run")
    own = model.bottleneck(model.read(images))[1]
    codes = model.proxy.bottleneck.nearest(model.proxy.encode(images))
    names = model.names(model.encode(images), None).log_softmax(-1)
    charged = -names.gather(-1, codes[..., None]).mean()
    torch.testing.assert_close(model(images)[1], own + charged)


# --- the same loop ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "HELD_OUT_SCENES", 12)
        for name, settings in ARMS.items():
            train(load_config("smoke", [*FEW, *PLAIN, *settings]), folder / name)
        proxy = [f"tokenizer.proxy={folder / 'grid-vq'}", "tokenizer.latent=vq"]
        train(load_config("smoke", [*FEW, *PLAIN, *proxy]), folder / "two-stages")
    return folder


@pytest.mark.parametrize("name", [*ARMS, "two-stages"])
def test_trained_saved_and_loaded(runs, name):
    model, config = load_run(runs / name)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert model.decode(model.encode(images)).shape == images.shape
    first, *_, last = [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
    assert math.isfinite(last["loss"]) and ("codes" in first) == (config.tokenizer.latent in ("vq", "words"))
    assert name != "two-stages" or ("l2" not in first and "l2" in last)


def test_a_proxy_of_another_shape_is_one_line(runs, tmp_path):
    settings = [*FEW, *PLAIN, "tokenizer.latent=vq", f"tokenizer.proxy={runs / 'titok'}"]
    with pytest.raises(TrainingError, match=r"tokenizer\.proxy=.* must be a run of the same shape"):
        train(load_config("smoke", settings), tmp_path / "x")


def test_words_stay_what_they_were(runs):
    model, _ = load_run(runs / "words")
    torch.testing.assert_close(model.bottleneck.codebook.data, FrozenTextEncoder("minilm").word_embeddings(64))
    moved, start = load_run(runs / "titok")[0], tokenizer_of(load_run(runs / "titok")[1].tokenizer)
    assert moved.bottleneck.codebook.shape == start.bottleneck.codebook.shape


def test_words_of_another_width_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="latent_dim must be 384"):
        train(load_config("smoke", [*FEW, *PLAIN, "tokenizer.latent=words"]), tmp_path / "x")
