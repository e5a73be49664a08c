import dataclasses

import numpy as np
import pytest
import torch

from textok_mini.config import TexTokConfig
from textok_mini.settings import load_config
from textok_mini.text import TextTokens
from textok_mini.tokenizer import TexTok, patchify, unpatchify

SMALL = dataclasses.replace(load_config("smoke").tokenizer, latent="plain", encoder_layers=2, decoder_layers=2)


def model_and_inputs(batch=3, tokens=11, seed=0, **changes):
    torch.manual_seed(seed)
    config = dataclasses.replace(SMALL, **changes)
    model = TexTok(config).eval()
    images = torch.rand(batch, 3, config.image_size, config.image_size) * 2 - 1
    text = TextTokens(torch.randn(batch, tokens, config.text_dim), torch.ones(batch, tokens, dtype=torch.bool))
    return model, images, text


def parameters_by_formula(c: TexTokConfig) -> int:
    """Counted from the layout, not from the model: weights and biases of each part."""
    w = c.width
    linear = lambda i, o: i * o + o  # noqa: E731
    block = 2 * 2 * w + linear(w, 3 * w) + linear(w, w) + linear(w, c.mlp_ratio * w) + linear(c.mlp_ratio * w, w)
    stacks = (c.encoder_layers + c.decoder_layers) * block + 2 * 2 * w
    patches = linear(3 * c.patch_size**2, w) + linear(w, 3 * c.patch_size**2)
    latents = linear(w, c.latent_dim) + linear(c.latent_dim, w)
    # positions in both halves, and learned tokens where the input has none: latents here, patches there
    learned = (3 * c.num_patches + 3 * c.num_latent_tokens) * w
    text = linear(c.text_dim, w) + c.max_text_tokens * w
    halves = {"both": 2, "none": 0}.get(c.text_in, 1)
    return stacks + patches + latents + learned + halves * text + 2 * c.num_registers * w


@pytest.mark.parametrize("text_in", ["both", "tokenizer", "detokenizer", "none"])
def test_parameter_count_is_the_layouts(text_in):
    for config in (SMALL, load_config("laptop").tokenizer, TexTokConfig()):
        config = dataclasses.replace(config, text_in=text_in)
        with torch.device("meta"):
            model = TexTok(config)
        assert sum(p.numel() for p in model.parameters()) == parameters_by_formula(config)
        assert any("text" in name for name, _ in model.named_parameters()) == (text_in != "none")


def test_full_size_counts_are_the_known_ones():
    # FACTS: 176.7M at 256 px with T5-XL, about 180.7M at 512 px with T5-XXL (both at N = 256).
    for changes, millions in (
        (dict(num_latent_tokens=256), 176.7),
        (dict(num_latent_tokens=256, image_size=512, patch_size=16, text_dim=4096), 180.7),
    ):
        with torch.device("meta"):
            model = TexTok(TexTokConfig(**changes))
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_shapes():
    model, images, text = model_and_inputs()
    latents = model.encode(images, text)
    assert latents.shape == (3, SMALL.num_latent_tokens, SMALL.latent_dim)
    assert model.decode(latents, text).shape == images.shape
    assert torch.equal(model(images, text)[0], model.decode(latents, text))


def test_patchify_against_slices_and_back():
    images = torch.randn(2, 3, 32, 32)
    patches = patchify(images, 8)
    by_hand = images[1, :, 8:16, 24:32]  # row 1, column 3 of 4 x 4
    assert torch.equal(patches[1, 1 * 4 + 3], by_hand.permute(1, 2, 0).reshape(-1))
    assert torch.equal(unpatchify(patches, 8), images)


def test_padding_changes_nothing():
    """The same caption in 11, 20 and 64 slots gives the same latents and pictures, whatever stands in the slots."""
    model, images, text = model_and_inputs()
    latents = model.encode(images, text)
    for slots in (20, 64):
        padded = text.pad_to(slots)
        padded.embeddings[:, 11:] = 1e3
        torch.testing.assert_close(model.encode(images, padded), latents, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.decode(latents, padded), model.decode(latents, text), atol=1e-5, rtol=0)


def test_a_row_does_not_depend_on_its_batch():
    model, images, text = model_and_inputs()
    mask = text.mask.clone()
    mask[0, 5:] = False
    alone = TextTokens(text.embeddings[:1, :5], mask[:1, :5])
    together = model.encode(images, TextTokens(text.embeddings, mask))
    torch.testing.assert_close(together[:1], model.encode(images[:1], alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text_in", "encoder_reads", "decoder_reads"),
    [("both", True, True), ("tokenizer", True, False), ("detokenizer", False, True), ("none", False, False)],
)
def test_text_reaches_just_the_halves_it_should(text_in, encoder_reads, decoder_reads):
    model, images, text = model_and_inputs(text_in=text_in)
    other = TextTokens(torch.randn_like(text.embeddings), text.mask)
    latents = model.encode(images, text)
    assert torch.equal(latents, model.encode(images, other)) != encoder_reads
    assert torch.equal(model.decode(latents, text), model.decode(latents, other)) != decoder_reads
    if encoder_reads or decoder_reads:
        with pytest.raises(ValueError, match="reads text"):
            model(images, None)
    else:
        assert torch.equal(model(images, None)[0], model(images, text)[0])


def test_arms_of_one_seed_start_from_the_same_shared_weights():
    both, twin = model_and_inputs(seed=5)[0], model_and_inputs(seed=5, text_in="none")[0]
    registers = model_and_inputs(seed=5, text_in="none", num_registers=7)[0]
    ours = dict(both.named_parameters())
    assert len(list(twin.named_parameters())) > 40
    for arm in (twin, registers):
        for name, parameter in arm.named_parameters():
            assert "registers" in name or torch.equal(parameter, ours[name]), name


def test_noisy_latents_have_unit_power_and_noise_only_where_it_is_given():
    model, images, text = model_and_inputs(latent="noisy")
    latents = model.encode(images, text)
    torch.testing.assert_close(latents.square().mean(-1), torch.ones(latents.shape[:2]), atol=1e-3, rtol=0)
    noise = torch.randn_like(latents)
    by_hand = model.decode(latents + model.config.latent_noise * noise, text)
    assert torch.equal(model(images, text, noise)[0], by_hand)
    assert not torch.equal(model(images, text)[0], by_hand)


def test_kl_is_torchs_own_and_the_sample_has_the_posteriors_deviation():
    model, images, text = model_and_inputs(latent="kl")
    mean, log_variance = model.bottleneck.posterior(model.read(images, text))
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    noise = torch.randn_like(mean)
    reconstruction, kl = model(images, text, noise)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(posterior, standard).sum((1, 2)).mean())
    torch.testing.assert_close(reconstruction, model.decode(mean + posterior.stddev * noise, text))
    assert torch.equal(model(images, text)[0], model.decode(model.encode(images, text), text))
    assert model_and_inputs(latent="plain")[0](images, text, noise)[1] == 0


def test_words_alone_can_be_decoded():
    model, images, text = model_and_inputs(num_latent_tokens=0)
    assert model.encode(images, text).shape == (3, 0, SMALL.latent_dim)
    assert model(images, text)[0].shape == images.shape
    model(images, text)[0].square().mean().backward()  # what stays without a gradient asks for none, or DDP would wait
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_the_trained_parts_all_get_a_gradient():
    model, images, text = model_and_inputs()
    model(images, text)[0].square().mean().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unused == []


def test_wrong_shapes_are_named():
    model, images, text = model_and_inputs()
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 32, 32\)"):
        model.encode(images[..., :16], text)
    with pytest.raises(ValueError, match=r"latents must be \(B, 2, 8\)"):
        model.decode(torch.zeros(3, 4, 8), text)
    with pytest.raises(ValueError, match="positions for 64"):
        model.encode(images, text.pad_to(65))


def test_saved_and_loaded_strictly(tmp_path):
    model, images, text = model_and_inputs()
    model.save_pretrained(tmp_path)
    loaded = TexTok.from_pretrained(tmp_path).eval()
    assert loaded.config == model.config
    assert torch.equal(loaded(images, text)[0], model(images, text)[0])
    twin = TexTok(dataclasses.replace(SMALL, text_in="none"))
    from safetensors.torch import save_file

    save_file(twin.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="text"):
        TexTok.from_pretrained(tmp_path)


def test_attention_and_block_against_torchs_own_layer():
    """Our block is torch's pre-norm TransformerEncoderLayer, weight for weight."""
    from textok_mini.vit import Block

    torch.manual_seed(0)
    ours = Block(width=32, heads=4).eval()
    theirs = torch.nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    names = {
        "norm1": "norm1", "norm2": "norm2", "attention.qkv.weight": "self_attn.in_proj_weight",
        "attention.qkv.bias": "self_attn.in_proj_bias", "attention.out": "self_attn.out_proj",
        "mlp.0": "linear1", "mlp.2": "linear2",
    }  # fmt: skip
    state = {}
    for name, value in ours.state_dict().items():
        old = next(k for k in names if name.startswith(k))
        state[name.replace(old, names[old])] = value
    theirs.load_state_dict(state)
    x = torch.randn(2, 9, 32)
    mask = torch.from_numpy(np.arange(9) < np.array([[9], [6]]))
    expected = theirs(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, mask)[mask], expected[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x, mask, keep=4), ours(x, mask)[:, :4], atol=1e-5, rtol=1e-5)
