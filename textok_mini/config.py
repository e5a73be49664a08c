"""Settings: dataclasses, named presets, and how well each value of the paper is known.

    config = load_config("laptop", ["training.steps=500", "seed=3"])

Four groups, `.data`, `.text`, `.tokenizer` and `.training`. A field's default is the paper's value where the
paper has one, and its standing is written beside it (the vocabulary of `STANDINGS`); a preset says only where
it departs from the defaults, and `standing()` calls such a departure "kit". Whatever comes from a user (YAML,
`key=value`, JSON) passes through `from_dict`, which refuses unknown keys and wrong types by name.
"""

import contextlib
import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

STANDINGS = {
    "paper": "the paper's abstract or the project's seed document says it",
    "derived": "computed from values of the paper",
    "second-hand": "a public reimplementation or a later paper says that the paper says it",
    "assumed": "the field's usual choice, whose is named",
    "unresolved": "sources disagree or are silent; an option",
    "kit": "this kit's own choice, for its own scale",
}


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, or impossible; the message is one line that says what to do."""


def known(default: Any, standing: str, source: str) -> Any:
    """A dataclass field that carries where its default comes from."""
    assert standing in STANDINGS, standing
    return field(default=default, metadata={"standing": standing, "source": source})


def kit(default: Any, reason: str) -> Any:
    """A field that the paper has no value for."""
    return known(default, "kit", reason)


@dataclass(frozen=True)
class DataConfig:
    """Which pictures and captions. The settings of the scenes world are ignored by folders and hub sets."""

    source: str = kit("openmoji-scenes", "`openmoji-scenes`, `openmoji`, a folder, or a hub data set's id")
    scenes: int = kit(30_000, "training scenes; more cost only disk and a minute")
    objects: int = kit(128, "distinct objects: few, and words carry what is where; many, mostly where")
    min_objects: int = kit(2, "objects a scene, at least")
    max_objects: int = kit(3, "objects a scene, at most")
    world_seed: int = kit(0, "which world: objects, splits and scenes all follow from it")
    captions: Literal["short", "normal", "long"] = kit("normal", "how much of the scene a caption tells")
    captions_from: str = kit("", "a caption store, joined by file name or id; empty: the data's own captions")
    image_column: str = kit("image", "column of a hub data set")
    caption_column: str = kit("caption", "column of a hub data set")
    label_column: str = kit("label", "column of a hub data set; a missing label is -1")
    skip_bad_rows: bool = kit(False, "skip and count rows that fail verification instead of stopping")

    def __post_init__(self):
        require(1 <= self.min_objects <= self.max_objects <= 4, "data.min_objects and data.max_objects", "1 to 4")
        at_least(1, self, "data", "scenes")
        at_least(8, self, "data", "objects")


@dataclass(frozen=True)
class TextConfig:
    """The frozen text encoder. How many tokens it may give is `tokenizer.max_text_tokens`."""

    encoder: str = known("google/t5-v1_1-xl", "assumed", "T5-XL at 256 px is the paper's; that it is v1.1 is not")
    dtype: Literal["bfloat16", "float32"] = kit("bfloat16", "T5 overflows in fp16 (transformers#4287)")
    cache: bool = kit(False, "encode every caption once, into data/text/, rather than at every step")


@dataclass(frozen=True)
class TexTokConfig:
    """The tokenizer's shape. Raises ConfigError for a combination that cannot be built."""

    image_size: int = known(256, "paper", "256 and 512 px")
    patch_size: int = known(8, "second-hand", "Tatiana21/TexTok: 8 at 256 px, 16 at 512 px")
    num_latent_tokens: int = known(128, "paper", "N in 32, 64, 128, 256")
    latent_dim: int = known(8, "paper", "d = 8")
    latent: Literal["plain", "noisy"] = known("plain", "unresolved", "plain fits MAGVIT; MAETok's table says KL")
    latent_noise: float = kit(0.5, "`noisy`: unit-RMS latents, noise whose deviation grows to this in training")
    width: int = known(768, "paper", "ViT-Base")
    encoder_layers: int = known(12, "paper", "ViT-Base")
    decoder_layers: int = known(12, "paper", "ViT-Base")
    heads: int = known(12, "paper", "ViT-Base")
    mlp_ratio: int = known(4, "paper", "ViT-Base")
    text_in: Literal["both", "tokenizer", "detokenizer", "none"] = known("both", "paper", "both is the full TexTok")
    text_dim: int = known(2048, "assumed", "width of T5 v1.1-XL; v1.1-XXL has 4,096")
    max_text_tokens: int = known(128, "second-hand", "pranoyr/TexTok, unconfirmed")
    num_registers: int = kit(0, "control: this many learned tokens stand where text tokens would")

    def __post_init__(self):
        at_least(1, self, "tokenizer", "image_size patch_size latent_dim width encoder_layers decoder_layers heads")
        at_least(1, self, "tokenizer", "mlp_ratio text_dim max_text_tokens")
        at_least(0, self, "tokenizer", "num_latent_tokens latent_noise num_registers")
        if self.text_in not in ("both", "detokenizer"):
            least = "at least 1 unless text reaches the detokenizer (text_in: both or detokenizer)"
            require(self.num_latent_tokens > 0, "tokenizer.num_latent_tokens", least)
        for part, whole in (("patch_size", "image_size"), ("heads", "width")):
            divisor, size = getattr(self, part), getattr(self, whole)
            require(size % divisor == 0, f"tokenizer.{part}", f"a divisor of {whole}={size}, not {divisor}")
        require(not self.num_registers or self.text_in == "none", "tokenizer.num_registers", "0 unless text_in is none")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TrainingConfig:
    """One training run: optimiser, schedule, losses, and what is written when."""

    seed: int = kit(0, "initial weights, order of rows, noise")
    steps: int = known(1_351_080, "second-hand", "270 epochs of ImageNet (1,281,167 pictures) at batch 256")
    batch_size: int = known(256, "assumed", "MAGVIT; over all processes together")
    learning_rate: float = known(1e-4, "second-hand", "peak; MAGVIT's too")
    warmup_steps: int = known(5_004, "assumed", "MAGVIT: one epoch")
    final_learning_rate: float = known(0.0, "assumed", "MAGVIT: cosine to zero; a fraction of the peak")
    beta1: float = known(0.0, "assumed", "MAGVIT: Adam(0, 0.99)")
    beta2: float = known(0.99, "assumed", "MAGVIT: Adam(0, 0.99)")
    weight_decay: float = known(0.0, "assumed", "MAGVIT")
    gradient_clip: float = kit(1.0, "largest norm of the gradient; 0 is off")
    ema: float = known(0.999, "second-hand", "Tatiana21/TexTok, and MAGVIT")
    l2_weight: float = known(1.0, "second-hand", "Tatiana21/TexTok, and MAGVIT's vqgan2d")
    perceptual: Literal["none", "lpips-alex", "lpips-vgg"] = known(
        "lpips-vgg", "unresolved", "the field's; MAGVIT uses ResNet-50 logits"
    )
    perceptual_weight: float = known(0.1, "second-hand", "Tatiana21/TexTok, and MAGVIT's vqgan2d")
    precision: Literal["auto", "float32", "bfloat16"] = kit("auto", "bf16 on a GPU that has it, else float32")
    workers: int = kit(0, "processes that read and decode pictures; 0 suits prepared data")
    log_every: int = kit(50, "steps between lines of log.jsonl")
    checkpoint_every: int = kit(5_000, "steps between checkpoints, from which a killed run goes on")
    sample_every: int = kit(5_000, "steps between pictures in samples/; 0 is none")
    snapshot_every: int = kit(0, "steps between EMA weights kept in snapshots/, for curves; 0 is none")

    def __post_init__(self):
        at_least(1, self, "training", "steps batch_size log_every checkpoint_every")
        at_least(0, self, "training", "warmup_steps sample_every snapshot_every workers gradient_clip weight_decay")
        at_least(0, self, "training", "seed final_learning_rate l2_weight perceptual_weight")
        perceptual = self.perceptual_weight if self.perceptual != "none" else 0
        require(self.l2_weight + perceptual > 0, "training.l2_weight", "above 0 where there is no perceptual loss")
        require(self.learning_rate > 0, "training.learning_rate", "above 0")
        for name in ("ema", "beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"training.{name}", "in [0, 1)")


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; written whole to its `config.json`."""

    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    tokenizer: TexTokConfig = field(default_factory=TexTokConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self):
        if self.training.perceptual == "lpips-alex":
            require(self.tokenizer.image_size > 30, "tokenizer.image_size", "31 or more for AlexNet's LPIPS")


def merge(base: dict, extra: dict) -> dict:
    """`extra` over `base`, group by group; neither is changed."""
    both = dict(base)
    for key, value in extra.items():
        both[key] = merge(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}


def preset(name: str) -> Config:
    """The settings of `presets/NAME.yaml`: `laptop` (minutes on two cores) or `smoke` (seconds, for tests)."""
    return from_dict(Config, read_settings(preset_file(name)))


def load_config(preset_or_file: str, overrides: Sequence[str] = ()) -> Config:
    """A preset's name or a YAML file (`preset: NAME` and any groups), then overrides like `training.steps=500`.

    Raises ConfigError for anything unknown, of the wrong type, or impossible."""
    path = Path(preset_or_file)
    path = path if path.suffix in (".yaml", ".yml", ".json") else preset_file(preset_or_file)
    return from_dict(Config, apply_overrides(read_settings(path), overrides))


def preset_file(name: str) -> Path:
    if name not in PRESETS:
        there = ", ".join(PRESETS)
        raise ConfigError(f"{name!r} is neither a preset ({there}) nor a .yaml file{nearest(name, PRESETS)}")
    return PRESETS[name]


def read_settings(path: Path) -> dict:
    """A YAML file's settings, over those of the preset that it names."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings; write groups like `training:` with keys under them")
    base = values.pop("preset", None)
    return merge(read_settings(preset_file(base)), values) if base is not None else values


SHORT_FORMS = {"data": "data.source", "seed": "training.seed"}


class Typed(str):
    """What was typed after `key=`: a text as it is for a field of text, YAML for any other."""


def apply_overrides(values: dict, overrides: Sequence[str], short: Mapping[str, str] = SHORT_FORMS) -> dict:
    """`key=value` strings over nested settings; `short` forms stand for dotted keys."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not KEY=VALUE, as in training.steps=500")
        value = parsed(Typed(text)) if text.startswith("{") else Typed(text)
        for part in reversed(short.get(key, key).split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def parsed(value: Any) -> Any:
    try:
        return yaml.safe_load(value) if isinstance(value, Typed) else value
    except yaml.YAMLError:
        return str(value)


def from_dict(cls: type, values: dict, prefix: str = "") -> Any:
    """A config dataclass from nested plain values; raises ConfigError on unknown keys and wrong types."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'config'} must be a group of settings, not {values!r}")
    built = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"unknown setting {prefix}{key}{nearest(key, fields, prefix)}")
        kind = fields[key].type
        nested = dataclasses.is_dataclass(kind)
        built[key] = from_dict(kind, value, f"{prefix}{key}.") if nested else convert(kind, value, prefix + key)
    return cls(**built)


def convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as `kind`: int, float, bool, str or a Literal. Numbers are never rounded, truth never guessed."""
    if kind is str and isinstance(value, Typed):
        return str(value)
    value = parsed(value)
    if get_origin(kind) is Literal:
        options = get_args(kind)
        if value not in options:
            raise ConfigError(f"{key} must be one of {', '.join(options)}, not {value!r}{nearest(value, options)}")
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and (number or isinstance(value, str)):  # YAML reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            if math.isfinite(float(value)):
                return float(value)
    if kind is str and number:
        return str(value)
    if kind is not float and isinstance(value, kind) and (number or kind is not int):
        return value
    raise ConfigError(f"{key} must be {kind.__name__}, not {value!r}")


def nearest(key: Any, valid: Any, prefix: str = "") -> str:
    """'; did you mean X?' where something valid is close enough, also a key of another group."""
    close = difflib.get_close_matches(str(key), list(valid), n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    if list(valid) != list(PRESETS):
        dotted = [f"{g.name}.{f.name}" for g in dataclasses.fields(Config) for f in dataclasses.fields(g.type)]
        close = [d for d in dotted if d.split(".")[1] == key]
        close = close or difflib.get_close_matches(prefix + str(key), dotted, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def require(condition: bool, key: str, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {wanted}")


def at_least(least: int, config: Any, group: str, names: str) -> None:
    """`require` of several settings of one group, their names with spaces between."""
    for name in names.split():
        require(getattr(config, name) >= least, f"{group}.{name}", f"at least {least}")


to_dict = dataclasses.asdict  # nested plain values, ready for JSON; `from_dict` reads them back


def config_json(config: Any) -> str:
    return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"


def standing(config: Config, key: str) -> str:
    """How well the value of a dotted key is known: its field's standing, or 'kit' where the config departs."""
    group, name = key.split(".")
    meta = next(f for f in dataclasses.fields(type(getattr(config, group))) if f.name == name)
    return meta.metadata["standing"] if getattr(getattr(config, group), name) == meta.default else "kit"
