"""Training a tokenizer: one loop, on one process or many, that can be killed at any moment.

    train(load_config("laptop"), "runs/textok")

A run is its folder (`run.py`). Exact resume rests on one rule: nothing random has a state (`schedule.py`), so a
checkpoint is weights, optimiser, step and how long the log was.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from textok_mini.config import Config
from textok_mini.data import as_batch, load_data, mirrored
from textok_mini.device import tune_cpu
from textok_mini.figures import save_image_grid
from textok_mini.gan import GAN
from textok_mini.losses import perceptual_loss, tokenizer_loss
from textok_mini.paths import beside
from textok_mini.run import Run, TrainingError, check_folder, save_weights
from textok_mini.schedule import BatchOrder, adamw, generator_of, learning_rate, step_noise, warmed_up_ema
from textok_mini.settings import config_json
from textok_mini.text import CachedText, FrozenTextEncoder
from textok_mini.tokenizer import TexTok


def train(config: Config, output_dir: str | Path) -> Path:
    """Train TexTok as `config` says into `output_dir`; returns the path of the EMA weights.

    Does nothing if the run is finished, goes on from its last checkpoint if it was killed. Raises TrainingError if
    the folder holds another config's run, if another process trains in it, or if the loss is no longer a number.
    """
    output_dir, t, c = Path(output_dir), config.training, config.tokenizer
    tune_cpu(c.num_patches + c.num_latent_tokens + c.max_text_tokens, exact=t.precision == "float32")
    accelerator = Accelerator(mixed_precision=precision(t.precision), cpu=not torch.accelerator.is_available())
    check_folder(config, output_dir)
    finished = output_dir / "model.safetensors"
    if finished.exists():
        accelerator.print(f"{output_dir}: finished, nothing to do")
        return finished
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / ".lock")
    if accelerator.is_main_process:
        try:
            lock.acquire(timeout=0)  # the kernel lets go of it when the process dies, however it dies
        except Timeout:
            raise TrainingError(f"{output_dir}: another process is training here; wait for it") from None

    with accelerator.main_process_first():  # one process prepares data and text, the others find them
        rows = load_data(config.data, "train", config.tokenizer.image_size)
        text = text_encoder(config, rows.captions, accelerator.device)
    world, rank = accelerator.num_processes, accelerator.process_index
    if t.batch_size % (world * t.accumulate) or t.batch_size > len(rows):
        raise TrainingError(
            f"training.batch_size={t.batch_size} must be divisible by the {world} processes times training.accumulate="
            f"{t.accumulate} and at most {len(rows)}, the number of rows"
        )

    if accelerator.is_main_process:  # only now: a run that never began must not keep the folder to itself
        with beside(output_dir / "config.json") as part:
            part.write_text(config_json(config), encoding="utf-8")
    torch.manual_seed(t.seed)
    model = TexTok(config.tokenizer).to(accelerator.device)
    ema = AveragedModel(model, multi_avg_fn=warmed_up_ema(t.ema))
    optimizer = adamw(model, t)
    perceptual, weights = perceptual_loss(t.perceptual), {"l2": t.l2_weight}
    weights |= {perceptual.name: t.perceptual_weight} if perceptual else {}
    weights |= {"kl": t.kl_weight} if c.latent == "kl" else {}
    gan = GAN(config, accelerator) if t.adversarial_weight else None
    parts = {"model": model, "ema": ema, "optimizer": optimizer} | ({"gan": gan} if gan else {})
    run = Run(output_dir, parts, main=accelerator.is_main_process)
    start = run.resume(accelerator.device)
    model.encoder.checkpointing = model.decoder.checkpointing = t.recompute
    # `stepped` is `model`, in DDP where there are ranks. Compiled outside of DDP, as torch advises.
    stepped, optimizer = accelerator.prepare(model, optimizer)
    stepped = torch.compile(stepped, dynamic=True) if t.compile else stepped
    samples = Samples(config, text, accelerator.device) if accelerator.is_main_process and t.sample_every else None

    batches = DataLoader(
        rows,
        batch_sampler=BatchOrder(len(rows), t, start, rank, world),
        collate_fn=as_batch,
        num_workers=t.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    bar = tqdm(total=t.steps, initial=start, desc=output_dir.name, unit="step", disable=not run.main, mininterval=2)
    for step, batch in enumerate(batches, start + 1):
        images = to_float(batch["image"].to(accelerator.device))
        if config.data.mirror:
            images = mirrored(
                images, batch["caption"], torch.rand(t.batch_size, generator=generator_of(t, step, 1))[rank::world]
            )
        cut = getattr(text, "cut", 0)
        tokens = text(batch["caption"]).to(accelerator.device) if text else None
        noise = step_noise(config, step)[rank::world].to(accelerator.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, t)
        words = tokens.chunk(t.accumulate) if tokens else [None] * t.accumulate
        pieces = list(zip(images.chunk(t.accumulate), words, noise.chunk(t.accumulate), strict=True))
        charge = partial(tokenizer_charge, weights=weights, perceptual=perceptual, gan=gan, step=step)
        reconstruction, loss, losses = forward_backward(accelerator, stepped, pieces, charge)
        if isinstance(text, FrozenTextEncoder):
            losses["captions_cut"] = torch.tensor((text.cut - cut) / len(batch["caption"]), device=accelerator.device)
        norm = accelerator.clip_grad_norm_(stepped.parameters(), t.gradient_clip or math.inf)
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            bar.close()
            raise TrainingError(
                f"step {step}: the loss is {loss.item()} and the gradient's norm {norm.item()}; rows "
                f"{', '.join(batch['id'])}; last good checkpoint: {run.last_checkpoint()}; lower training.learning_rate"
            )
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        if gan:
            losses |= gan.learn(images, reconstruction, step, learning_rate(step, t))

        if step % t.log_every == 0 or step in (1, t.steps):
            means = {name: accelerator.reduce(part, "mean").item() for name, part in {"loss": loss, **losses}.items()}
            run.log({"step": step, **means, "gradient_norm": norm.item(), "learning_rate": learning_rate(step, t)})
            bar.set_postfix({k: f"{v:.4f}" for k, v in means.items()}, refresh=False)
        if samples and (step % t.sample_every == 0 or step == t.steps):
            samples.draw(ema.module, output_dir / "samples" / f"step-{step:07d}.png", step)
        if run.main and t.snapshot_every and step % t.snapshot_every == 0:
            save_weights(ema.module, output_dir / "snapshots" / f"step-{step:07d}.safetensors")
        if step % t.checkpoint_every == 0 or step == t.steps:
            run.checkpoint(step)
        bar.update()
    bar.close()
    if run.main:
        save_weights(ema.module, finished)
    accelerator.wait_for_everyone()
    return finished


def tokenizer_charge(
    reconstruction: Tensor, images: Tensor, kl: Tensor, weights: dict, perceptual: Any, gan: GAN | None, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the tokenizer is charged for a reconstruction, and its unweighted parts by name."""
    loss, parts = tokenizer_loss(reconstruction, images, weights, perceptual, kl)
    if gan:
        charged, heard = gan.charge(reconstruction, step)
        loss, parts = loss + charged, parts | heard
    return loss, parts


def forward_backward(accelerator: Accelerator, stepped: nn.Module, pieces: list, charge: Callable) -> tuple:
    """The batch, piece by piece where memory is short: gradients add up to those of the whole, and travel between
    processes with the last piece only. Returns the reconstruction, the loss and its parts, all without gradient."""
    drawn, losses = [], []
    for i, (images, tokens, noise) in enumerate(pieces):
        with accelerator.no_sync(stepped) if i + 1 < len(pieces) else nullcontext():
            with accelerator.autocast():
                reconstruction, kl = stepped(images, tokens, noise)
            loss, parts = charge(reconstruction, images, kl)
            accelerator.backward(loss / len(pieces))
        drawn.append(reconstruction.detach())
        losses.append({"loss": loss.detach(), **parts})
    means = {name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]}
    return torch.cat(drawn), means.pop("loss"), means


class Samples:
    """Originals over reconstructions of the same few test rows, drawn by the EMA weights during training."""

    def __init__(self, config: Config, text: Any, device: torch.device, count: int = 8):
        rows = load_data(config.data, "test", config.tokenizer.image_size)
        batch = rows.__getitems__(list(range(min(count, len(rows)))))
        self.images = to_float(batch["image"].to(device))
        self.text = text(batch["caption"]).to(device) if text else None
        self.captions = batch["caption"]

    @torch.no_grad()
    def draw(self, model: TexTok, path: Path, step: int) -> None:
        path.parent.mkdir(exist_ok=True)
        save_image_grid([self.images, model(self.images, self.text)[0]], path)


def text_encoder(config: Config, captions: list[str], device: torch.device) -> Any:
    """The captions' way to text tokens, or None for a config that reads no text."""
    c = config.tokenizer
    if c.text_in == "none":
        return None
    encoder = FrozenTextEncoder(config.text.encoder, c.max_text_tokens, getattr(torch, config.text.dtype), device)
    if encoder.width != c.text_dim:
        raise TrainingError(
            f"tokenizer.text_dim={c.text_dim}, but {config.text.encoder} gives {encoder.width}: "
            f"set tokenizer.text_dim={encoder.width}"
        )
    if not config.text.cache:
        return encoder
    cached = CachedText(encoder, captions)
    if cached.cut:
        print(f"{cached.cut:,} of {len(cached.spans):,} captions were cut at {c.max_text_tokens} tokens", flush=True)
    return cached


def precision(setting: str) -> str:
    """Accelerate's name for it. bf16 pays on a GPU that has it; on a CPU it was measured slower."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bf16" if setting == "bfloat16" or (setting == "auto" and bf16) else "no"


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels to [-1, 1]."""
    return images.float() / 127.5 - 1
