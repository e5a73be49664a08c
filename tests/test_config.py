import json

import pytest

from textok_mini.config import STANDINGS, Config, ConfigError, TexTokConfig, standing
from textok_mini.settings import PRESETS, config_json, from_dict, load_config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stps=4", "did you mean training.steps?"),
        ("traning.steps=4", "did you mean training?"),
        ("steps=4", "did you mean training.steps?"),
        ("image_size=64", "did you mean tokenizer.image_size?"),
        ("training.steps=abc", "training.steps must be int"),
        ("training.steps=1.5", "training.steps must be int"),
        ("training.steps=true", "training.steps must be int"),
        ("training.learning_rate=nan", "training.learning_rate must be float"),
        ("training.l2_weight=.inf", "training.l2_weight must be float"),
        ("training=4", "training must be a group of settings"),
        ("tokenizer.text_in=bth", "did you mean both?"),
        ("tokenizer.num_latent_tokens=-1", "tokenizer.num_latent_tokens must be at least 0"),
        ("tokenizer.latent_noise=-1", "tokenizer.latent_noise must be at least 0"),
        ("tokenizer.max_text_tokens=0", "tokenizer.max_text_tokens must be at least 1"),
        ("tokenizer.image_size=24", "tokenizer.image_size must be 31 or more for AlexNet's LPIPS"),
        ("training.l2_weight=-1", "training.l2_weight must be at least 0"),
        ("training.seed=-1", "training.seed must be at least 0"),
        ("tokenizer.patch_size=7", "a divisor of image_size=32"),
        ("tokenizer.heads=3", "a divisor of width=128"),
        ("data.max_objects=5", "data.min_objects and data.max_objects"),
        ("training.steps", "is not KEY=VALUE"),
    ],
)
def test_bad_setting_is_one_clear_line(override, message):
    with pytest.raises(ConfigError) as error:
        load_config("laptop", [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_latents_need_text_in_the_detokenizer():
    for text_in in ("both", "detokenizer"):
        assert TexTokConfig(num_latent_tokens=0, text_in=text_in).num_latent_tokens == 0
    for text_in in ("none", "tokenizer"):
        with pytest.raises(ConfigError, match="num_latent_tokens"):
            TexTokConfig(num_latent_tokens=0, text_in=text_in)


def test_overrides_reach_their_field_and_nothing_else():
    config = load_config("laptop", ["training.learning_rate=1e-4", "seed=3", "data=some/folder"])
    assert (config.training.learning_rate, config.training.seed, config.data.source) == (1e-4, 3, "some/folder")
    assert config.tokenizer == load_config("laptop").tokenizer


def test_a_text_stays_as_it_was_typed_and_all_else_is_yaml():
    for text in ("0123", "2024-01-01", "a: b", "null", "1e3", "~/pictures", "{x"):
        config = load_config("laptop", [f"data={text}", "training.learning_rate=1e-3", "text.cache=false"])
        assert config.data.source == text and type(config.data.source) is str
    assert (config.training.learning_rate, config.text.cache) == (1e-3, False)
    assert load_config("laptop", ["training={steps: 5}", "training.seed=2"]).training.steps == 5


def test_a_yaml_file_builds_on_a_preset_and_names_itself_in_errors(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: smoke\ntraining:\n  steps: 7\n  learning_rate: 1e-3\n")
    config = load_config(str(path), ["training.seed=2"])
    assert (config.training.steps, config.training.learning_rate, config.training.seed) == (7, 1e-3, 2)
    assert config.tokenizer == load_config("smoke").tokenizer
    path.write_text("training: [")
    with pytest.raises(ConfigError, match=r"mine\.yaml: not valid YAML"):
        load_config(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="did you mean laptop"):
        load_config("labtop")


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    assert from_dict(Config, json.loads(config_json(load_config(name)))) == load_config(name)


def test_every_value_has_a_standing_and_departures_are_the_kits_own():
    laptop, paper = load_config("laptop"), Config()
    assert standing(paper, "tokenizer.latent_dim") == "paper"
    assert standing(paper, "training.perceptual_weight") == "second-hand"
    assert standing(laptop, "tokenizer.latent_dim") == "paper"  # not departed from
    assert standing(laptop, "tokenizer.width") == "kit"
    for group in ("data", "text", "tokenizer", "training"):
        for name in vars(getattr(paper, group)):
            assert standing(paper, f"{group}.{name}") in STANDINGS


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_generator_fits_its_tokenizer(name):
    config = load_config(name)
    for shared in ("num_latent_tokens", "latent_dim", "text_dim", "max_text_tokens"):
        assert getattr(config.dit, shared) == getattr(config.tokenizer, shared), shared


def test_the_paper_size_generator_is_dit_xl_at_the_originals_settings():
    config = load_config("imagenet256-32")
    g = config.generator
    assert (config.dit.width, config.dit.layers, config.dit.heads, config.dit.num_classes) == (1152, 28, 16, 1000)
    assert (g.batch_size, g.learning_rate, g.beta1, g.beta2, g.ema, g.weight_decay) == (
        256,
        1e-4,
        0.9,
        0.999,
        0.9999,
        0,
    )
    assert g.steps == 350 * (1_281_167 // 256) and standing(config, "generator.steps") == "paper"
    assert standing(config, "dit.width") == "paper" and standing(load_config("laptop"), "dit.width") == "kit"
