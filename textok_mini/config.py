"""Every setting, its default, and how well the paper's value is known.

    Config().tokenizer.latent_dim  # 8
    standing(Config(), "tokenizer.latent_dim")  # "paper"
    python -m textok_mini.config imagenet256-32  # all of it as a table

Seven groups: `.data`, `.text`; `.tokenizer`, `.discriminator`, `.training`; `.dit`, `.generator`. A field's default is
the paper's value where the paper has one, and its standing is written beside it (the vocabulary of `STANDINGS`). A
preset says only where it departs from the defaults, and `standing` calls such a departure "kit".
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from textok_mini.command import Complaint

STANDINGS = {
    "paper": "the paper's abstract or the project's seed document says it",
    "derived": "computed from values of the paper",
    "second-hand": "a public reimplementation or a later paper says that the paper says it",
    "assumed": "the field's usual choice, whose is named",
    "unresolved": "sources disagree or are silent; an option",
    "kit": "this kit's own choice, for its own scale",
}


class ConfigError(Complaint):
    """A setting is unknown, of the wrong type, or impossible; the message is one line that says what to do."""


def known(default: Any, standing: str, source: str, *also: Any) -> Any:
    """A dataclass field that carries where its default comes from, and other values that come from there `also`."""
    assert standing in STANDINGS, standing
    return field(default=default, metadata={"standing": standing, "source": source, "values": (default, *also)})


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
    captions: Literal["short", "normal", "long", "no names", "no places", "no background"] = kit(
        "normal", "how much of the scene a caption tells"
    )
    shuffled: bool = kit(False, "control: every picture has another one's caption")
    captions_from: str = kit("", "a caption store, joined by file name or id; empty: the data's own captions")
    image_column: str = kit("image", "column of a hub data set")
    caption_column: str = kit("caption", "column of a hub data set")
    label_column: str = kit("label", "column of a hub data set; a missing label is -1")
    mirror: bool = kit(
        False, "mirror half of the pictures whose captions name no side and no writing; the paper is silent"
    )
    enlarge: bool = kit(False, "enlarge pictures that are smaller than image_size, rather than call them bad rows")
    skip_bad_rows: bool = kit(False, "skip and count rows that fail verification instead of stopping")

    def __post_init__(self):
        require(1 <= self.min_objects <= self.max_objects <= 4, "data.min_objects and data.max_objects", "1 to 4")
        at_least(1, self, "data", "scenes")
        at_least(8, self, "data", "objects")


@dataclass(frozen=True)
class TextConfig:
    """The frozen text encoder. How many tokens it may give is `tokenizer.max_text_tokens`."""

    encoder: str = known(
        "google/t5-v1_1-xl",
        "assumed",
        "T5-XL, XXL at 512 px, are the paper's; that it is v1.1 is not",
        "google/t5-v1_1-xxl",
    )
    dtype: Literal["bfloat16", "float32"] = kit("bfloat16", "T5 overflows in fp16 (transformers#4287)")
    cache: bool = kit(
        False, "encode every caption once, into data/text/, rather than at every step; has to fit into memory"
    )


@dataclass(frozen=True)
class TexTokConfig:
    """The tokenizer's shape. Raises ConfigError for a combination that cannot be built."""

    image_size: int = known(256, "paper", "256 and 512 px", 512)
    patch_size: int = known(8, "second-hand", "Tatiana21/TexTok: 8 at 256 px, 16 at 512 px", 16)
    num_latent_tokens: int = known(128, "paper", "N in 32, 64, 128, 256", 32, 64, 256)
    latent_dim: int = known(8, "paper", "d = 8")
    latent: Literal["plain", "noisy", "kl", "vq", "words"] = known(
        "plain", "unresolved", "plain fits MAGVIT; MAETok's table says KL; the rest are the neighbours': bottleneck.py"
    )
    latent_noise: float = kit(0.5, "`noisy`: unit-RMS latents, noise whose deviation grows to this in training")
    codebook_size: int = known(4096, "assumed", "bytedance/1d-tokenizer: TiTok's; where the latent is `vq` or `words`")
    layout: Literal["1d", "grid", "convolutions"] = known(
        "1d", "paper", "the neighbours' are grids: of a ViT's patches, or of SD-VAE's and VQGAN's convolutions"
    )
    proxy: str = kit(
        "", "TiTok's two stages: a run of layout `grid` and latent `vq`, whose codes the first stage names"
    )
    width: int = known(768, "paper", "ViT-Base")
    encoder_layers: int = known(12, "paper", "ViT-Base")
    decoder_layers: int = known(12, "paper", "ViT-Base")
    heads: int = known(12, "paper", "ViT-Base")
    mlp_ratio: int = known(4, "paper", "ViT-Base")
    text_in: Literal["both", "tokenizer", "detokenizer", "none"] = known("both", "paper", "both is the full TexTok")
    text_dim: int = known(2048, "assumed", "width of T5 v1.1-XL; v1.1-XXL has 4,096", 4096)
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
        require(self.layout == "1d" or not (self.num_registers or self.proxy), "tokenizer.layout", "1d with these")
        at_least(2, self, "tokenizer", "codebook_size")
        if self.latent in ("vq", "words"):
            at_least(1, self, "tokenizer", "num_latent_tokens")
        if self.layout == "grid":
            require(self.num_latent_tokens == self.num_patches, "tokenizer.num_latent_tokens", f"{self.num_patches}")
        if self.layout == "convolutions":
            require(self.text_in == "none", "tokenizer.text_in", "none with layout=convolutions")
            require(self.width % 32 == 0, "tokenizer.width", "a multiple of 32 with layout=convolutions")
            side, size = self.grid_side, self.image_size
            fits = side**2 == self.num_latent_tokens and size % side == 0 and (size // side).bit_count() == 1
            require(fits, "tokenizer.num_latent_tokens", f"a square of {size} / 2, 4, 8, ... with layout=convolutions")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def grid_side(self) -> int:
        return round(self.num_latent_tokens**0.5)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator's shape: a block a halving until 4 x 4 pixels are left."""

    image_size: int = known(256, "paper", "256 and 512 px; that of the tokenizer", 512)
    channels: int = known(128, "second-hand", "base width; Tatiana21/TexTok, and MAGVIT's order of size")

    def __post_init__(self):
        at_least(1, self, "discriminator", "channels")
        halvings = self.image_size.bit_length() - 3
        require(halvings > 0 and self.image_size == 4 << halvings, "discriminator.image_size", "a power of two, from 8")

    @property
    def widths(self) -> list[int]:
        """The channels after each block: 4 times the base in the last four, half as many in each block before them,
        which is 1, 2, 4, 4, 4, 4 at 256 px and .5, 1, 2, 4, 4, 4, 4 at 512 px (second-hand: Tatiana21/TexTok)."""
        blocks = self.image_size.bit_length() - 3
        return [max(1, int(self.channels * min(4, 2.0 ** (block - blocks + 6)))) for block in range(blocks)]


@dataclass(frozen=True)
class DiTConfig:
    """The generator's shape: DiT over N latent tokens of d channels, which are the tokenizer's."""

    num_latent_tokens: int = known(128, "paper", "that of the tokenizer", 32, 64, 256)
    latent_dim: int = known(8, "paper", "that of the tokenizer")
    width: int = known(1152, "paper", "DiT-XL; S, B, L have 384, 768, 1,024")
    layers: int = known(28, "paper", "DiT-XL; S, B, L have 12, 12, 24")
    heads: int = known(16, "paper", "DiT-XL; S, B, L have 6, 12, 16")
    condition: Literal["class", "text"] = known("class", "paper", "class to image, or text to image", "text")
    num_classes: int = known(1000, "paper", "ImageNet; where the condition is `class`")
    text_dim: int = known(2048, "assumed", "width of T5 v1.1-XL; where the condition is `text`", 4096)
    max_text_tokens: int = known(128, "second-hand", "that of the tokenizer")
    dropout: float = known(0.1, "assumed", "facebookresearch/DiT: conditions left out in training, for guidance")

    def __post_init__(self):
        at_least(1, self, "dit", "num_latent_tokens latent_dim width layers heads num_classes text_dim max_text_tokens")
        require(self.width % self.heads == 0, "dit.heads", f"a divisor of width={self.width}")
        require(0 <= self.dropout < 1, "dit.dropout", "in [0, 1)")


@dataclass(frozen=True)
class LoopConfig:
    """What any training is told, here with the tokenizer's values: optimiser, schedule, and what is written when."""

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
    accumulate: int = kit(1, "pieces that each process cuts its part of a batch into, where memory is short")
    compile: bool = kit(False, "torch.compile; for GPUs, where nobody here could measure it")
    precision: Literal["auto", "float32", "bfloat16"] = kit("auto", "bf16 on a GPU that has it, else float32")
    workers: int = kit(0, "processes that read and decode pictures; 0 suits prepared data")
    log_every: int = kit(50, "steps between lines of log.jsonl")
    checkpoint_every: int = kit(5_000, "steps between checkpoints, from which a killed run goes on")
    sample_every: int = kit(5_000, "steps between pictures in samples/; 0 is none")
    snapshot_every: int = kit(0, "steps between EMA weights kept in snapshots/, for curves; 0 is none")

    def check(self, group: str) -> None:
        at_least(1, self, group, "steps batch_size accumulate log_every checkpoint_every")
        at_least(0, self, group, "warmup_steps sample_every snapshot_every workers gradient_clip weight_decay")
        at_least(0, self, group, "seed final_learning_rate")
        require(self.learning_rate > 0, f"{group}.learning_rate", "above 0")
        for name in ("ema", "beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{group}.{name}", "in [0, 1)")


@dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    """The tokenizer's training: the loop, and its losses."""

    l2_weight: float = known(1.0, "second-hand", "Tatiana21/TexTok, and MAGVIT's vqgan2d")
    perceptual: Literal["none", "lpips-alex", "lpips-vgg", "resnet50-logits"] = known(
        "lpips-vgg", "unresolved", "the field's; MAGVIT uses ResNet-50 logits"
    )
    perceptual_weight: float = known(0.1, "second-hand", "Tatiana21/TexTok, and MAGVIT's vqgan2d")
    kl_weight: float = known(1e-6, "assumed", "latent diffusion; where the latent is `kl`")
    discriminator_rate: float = known(1.0, "assumed", "MAGVIT: as the tokenizer's; times that learning rate")
    adversarial_weight: float = known(0.1, "second-hand", "Tatiana21/TexTok, and MAGVIT; 0 is no GAN")
    adversarial_start: int = known(80_000, "second-hand", "the step from which the tokenizer hears the discriminator")
    adversarial_warmup: int = kit(5_000, "steps before it in which the discriminator learns, and after it of a ramp")
    r1_weight: float = known(10.0, "second-hand", "Tatiana21/TexTok, and MAGVIT; without StyleGAN's half")
    r1_every: int = known(16, "assumed", "StyleGAN2: lazy, the weight times the interval; MAGVIT penalises every step")
    lecam_weight: float = known(1e-4, "second-hand", "Tatiana21/TexTok; MAGVIT; 0 is none")
    lecam_start: int = kit(1_000, "steps of the discriminator until its means are used")
    recompute: bool = kit(False, "activations anew in the backward pass: memory of one block, a third more time")

    def __post_init__(self):
        self.check("training")
        at_least(1, self, "training", "r1_every")
        at_least(0, self, "training", "adversarial_weight adversarial_start adversarial_warmup r1_weight lecam_weight")
        at_least(0, self, "training", "l2_weight perceptual_weight kl_weight discriminator_rate")
        perceptual = self.perceptual_weight if self.perceptual != "none" else 0
        require(self.l2_weight + perceptual > 0, "training.l2_weight", "above 0 where there is no perceptual loss")


@dataclass(frozen=True)
class GeneratorConfig(LoopConfig):
    """The generator's training: the loop with the original DiT's values, and what it learns from."""

    latents: str = kit("", "a folder of latents: with it the training command trains a DiT, without it a tokenizer")
    process: Literal["diffusion", "flow"] = known("diffusion", "assumed", "facebookresearch/DiT, learned variance")
    steps: int = known(1_751_400, "paper", "350 epochs of ImageNet at batch 256")
    batch_size: int = known(256, "assumed", "facebookresearch/DiT; over all processes together")
    learning_rate: float = known(1e-4, "assumed", "facebookresearch/DiT: constant")
    warmup_steps: int = known(0, "assumed", "facebookresearch/DiT")
    final_learning_rate: float = known(1.0, "assumed", "facebookresearch/DiT: constant; a fraction of the peak")
    beta1: float = known(0.9, "assumed", "facebookresearch/DiT: AdamW")
    beta2: float = known(0.999, "assumed", "facebookresearch/DiT: AdamW")
    weight_decay: float = known(0.0, "assumed", "facebookresearch/DiT")
    ema: float = known(0.9999, "assumed", "facebookresearch/DiT")

    def __post_init__(self):
        self.check("generator")


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; written whole to its `config.json`."""

    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    tokenizer: TexTokConfig = field(default_factory=TexTokConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)

    @property
    def loop(self) -> LoopConfig:
        """That of the training that this config is of: a generator's where there are latents to learn from."""
        return self.generator if self.generator.latents else self.training

    def __post_init__(self):
        size = self.tokenizer.image_size
        if self.training.perceptual == "lpips-alex":
            require(size > 30, "tokenizer.image_size", "31 or more for AlexNet's LPIPS")
        if self.training.adversarial_weight:
            require(self.discriminator.image_size == size, "discriminator.image_size", f"tokenizer.image_size={size}")


def require(condition: bool, key: str, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {wanted}")


def at_least(least: int, config: Any, group: str, names: str) -> None:
    """`require` of several settings of one group, their names with spaces between."""
    for name in names.split():
        require(getattr(config, name) >= least, f"{group}.{name}", f"at least {least}")


def standing(config: Config, key: str) -> str:
    """How well the value of a dotted key is known: its field's standing, or 'kit' where the config departs."""
    group, name = key.split(".")
    known_of = next(f for f in dataclasses.fields(type(getattr(config, group))) if f.name == name).metadata
    return known_of["standing"] if getattr(getattr(config, group), name) in known_of["values"] else "kit"


def table(config: Config) -> str:
    """Every setting in Markdown: its value, how well that is known, and where it comes from."""
    lines = ["| setting | value | standing | source |", "|---|---|---|---|"]
    for group in dataclasses.fields(config):
        for f in dataclasses.fields(group.type):
            key, value = f"{group.name}.{f.name}", getattr(getattr(config, group.name), f.name)
            how = standing(config, key)
            source = f.metadata["source"] if how == f.metadata["standing"] else "a departure: see the preset's file"
            lines.append(f"| {key} | {value} | {how} | {source} |")
    return "\n".join(lines)


if __name__ == "__main__":  # python -m textok_mini.config PRESET_OR_FILE [key=value ...]
    try:
        from textok_mini.settings import load_config  # which imports this module

        print(table(load_config(sys.argv[1] if sys.argv[1:] else "imagenet256-128", sys.argv[2:])))
    except Complaint as error:
        sys.exit(f"error: {error}")
