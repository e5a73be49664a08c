"""Training a tokenizer: one loop, on one process or many, that can be killed at any moment.

    train(load_config("laptop"), "runs/textok")

A run is its folder: `config.json` (the whole config; `TexTok.from_pretrained` reads it too), `log.jsonl` (losses, no
times, so that two runs can be compared byte by byte), `timing.jsonl`, `samples/`, `snapshots/` (EMA weights on the
way), `checkpoint/` (the last two states), and, written last, `model.safetensors` (EMA weights).

Exact resume rests on one rule: nothing random has a state. The order of rows follows from (seed, epoch), the
noise of a step from (seed, step), so a checkpoint is weights, optimiser, step and how long the log was.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from textok_mini.config import Config, TrainingConfig
from textok_mini.data import as_batch, load_data, mirrored
from textok_mini.device import tune_cpu
from textok_mini.figures import save_image_grid
from textok_mini.gan import GAN
from textok_mini.hub import first_line
from textok_mini.losses import perceptual_loss, tokenizer_loss
from textok_mini.paths import beside
from textok_mini.settings import config_json, from_dict, to_dict
from textok_mini.text import CachedText, FrozenTextEncoder
from textok_mini.tokenizer import TexTok


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message is one line that says what to do."""


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


class BatchOrder:
    """The rows of each step from `start` on, as lists of indices: a permutation an epoch, from (seed, epoch).

    The order of global batches is the same for any number of processes; rank r takes every world-th row from r.
    """

    def __init__(self, rows: int, t: TrainingConfig, start: int = 0, rank: int = 0, world: int = 1):
        self.rows, self.t, self.start, self.rank, self.world = rows, t, start, rank, world

    def __len__(self) -> int:
        return self.t.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch, size = self.rows // self.t.batch_size, self.t.batch_size
        order, of_epoch = None, -1
        for step in range(self.start, self.t.steps):
            epoch, index = divmod(step, per_epoch)
            if epoch != of_epoch:
                order, of_epoch = np.random.default_rng((self.t.seed, epoch)).permutation(self.rows), epoch
            yield order[index * size : (index + 1) * size][self.rank :: self.world].tolist()


class Run:
    """What one run keeps on disk: the log, the timing and the checkpoints."""

    def __init__(self, folder: Path, parts: dict[str, Any], main: bool):
        self.folder, self.parts, self.main = folder, parts, main
        self.log_path, self.timing_path = folder / "log.jsonl", folder / "timing.jsonl"
        self.checkpoints = [folder / "checkpoint" / "last.pt", folder / "checkpoint" / "previous.pt"]
        self.seconds, self.since = 0.0, time.perf_counter()

    def resume(self, device: torch.device) -> int:
        """Restore the last checkpoint that can be read, cut the logs back to it, and return its step (0 if none)."""
        state = {"step": 0, "log_bytes": 0, "timing_bytes": 0, "seconds": 0.0}
        for path in filter(Path.exists, self.checkpoints):
            try:
                state = torch.load(path, map_location=device, weights_only=True)
            except Exception as error:  # a damaged file fails in more ways than one
                print(f"{path}: cannot be read ({first_line(error)}), going back to the one before", file=sys.stderr)
                continue
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            break
        self.seconds, self.since = state["seconds"], time.perf_counter()
        if self.main:
            for path, size in ((self.log_path, "log_bytes"), (self.timing_path, "timing_bytes")):
                path.touch()
                os.truncate(path, state[size])
        return state["step"]

    def checkpoint(self, step: int) -> None:
        """Write the state beside and rename it, so that a kill leaves either the old one or the new one."""
        if not self.main:
            return
        last, previous = self.checkpoints
        append(self.timing_path, {"step": step, "seconds": round(self.elapsed(), 3)})
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": step, "seconds": self.elapsed()}
        state |= {"log_bytes": self.log_path.stat().st_size, "timing_bytes": self.timing_path.stat().st_size}
        with beside(last, alone=True) as part:
            torch.save(state, part)
            if last.exists():
                os.replace(last, previous)

    def log(self, line: dict[str, Any]) -> None:
        if self.main:
            append(self.log_path, line)

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds + time.perf_counter() - self.since

    def last_checkpoint(self) -> str:
        return str(next((p for p in self.checkpoints if p.exists()), "none yet"))


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


def check_folder(config: Config, folder: Path) -> None:
    """Raises TrainingError if `folder` holds a run of another config, naming the settings that differ."""
    path = folder / "config.json"
    if not path.exists():
        return
    # Through `from_dict`: a setting that is younger than the run had its default there.
    there, ours = to_dict(from_dict(Config, json.loads(path.read_text(encoding="utf-8")))), to_dict(config)
    differ = [f"{group}.{name}" for group in ours for name in ours[group] if there[group][name] != ours[group][name]]
    if differ:
        raise TrainingError(
            f"{path}: another run's config, it differs in {', '.join(differ)}; choose another output_dir, "
            "or delete this one"
        )


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


def adamw(model: nn.Module, t: TrainingConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on biases, norms, learned tokens and positions."""
    matrices = [p for m in model.modules() if isinstance(m, nn.Linear) for p in [m.weight]]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": t.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=t.learning_rate, betas=(t.beta1, t.beta2), fused=True)


def learning_rate(step: int, t: TrainingConfig) -> float:
    """Linear warm-up to the peak, then a cosine to `final_learning_rate` times the peak at the last step."""
    if step <= t.warmup_steps:
        return t.learning_rate * step / t.warmup_steps
    done = (step - t.warmup_steps) / max(1, t.steps - t.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return t.learning_rate * (t.final_learning_rate + (1 - t.final_learning_rate) * cosine)


def warmed_up_ema(decay: float) -> Any:
    """EMA whose decay grows as (1 + n) / (10 + n) up to `decay`, so that short runs forget their first weights."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = float(updates)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update


def generator_of(t: TrainingConfig, *which: int) -> torch.Generator:
    """The chances of a step (and of one kind of them): they follow from the seed and have no state of their own."""
    seed = np.random.SeedSequence((t.seed, *which)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def step_noise(config: Config, step: int) -> Tensor:
    """The latents' noise of a step, (batch_size, N, d), from (seed, step): the same for any number of processes.

    For `noisy` latents its deviation grows from 0 to 1 over the run: a rate that is limited from the start keeps a
    tokenizer without text from learning to use its latents at all (measured: together with small latent tokens it
    shortens the plateau)."""
    generator, c = generator_of(config.training, step), config.tokenizer
    noise = torch.randn(config.training.batch_size, c.num_latent_tokens, c.latent_dim, generator=generator)
    return noise * (min(1.0, step / config.training.steps) if c.latent == "noisy" else 1.0)


def precision(setting: str) -> str:
    """Accelerate's name for it. bf16 pays on a GPU that has it; on a CPU it was measured slower."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bf16" if setting == "bfloat16" or (setting == "auto" and bf16) else "no"


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels to [-1, 1]."""
    return images.float() / 127.5 - 1


def save_weights(model: nn.Module, path: Path) -> None:
    with beside(path) as part:
        save_file(model.state_dict(), part)


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
