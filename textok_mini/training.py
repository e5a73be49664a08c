"""Training: one loop, on one process or many, that can be killed at any moment.

    train(load_config("laptop"), "runs/textok")

What a step is, the recipe says (`recipe.py`); a run is its folder (`run.py`). Exact resume rests on one rule: nothing
random has a state (`schedule.py`), so a checkpoint is weights, optimiser, step and how long the log was.
"""

import math
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from textok_mini.config import Config
from textok_mini.data import as_batch
from textok_mini.device import tune_cpu
from textok_mini.generator import GeneratorRecipe
from textok_mini.paths import write_text
from textok_mini.recipe import TokenizerRecipe
from textok_mini.run import Run, TrainingError, check_folder, save_weights
from textok_mini.schedule import BatchOrder, adamw, learning_rate, warmed_up_ema
from textok_mini.settings import config_json


def train(config: Config, output_dir: str | Path) -> Path:
    """Train TexTok as `config` says into `output_dir`; returns the path of the EMA weights.

    Does nothing if the run is finished, goes on from its last checkpoint if it was killed. Raises TrainingError if
    the folder holds another config's run, if another process trains in it, or if the loss is no longer a number.
    """
    output_dir, t, c = Path(output_dir), config.loop, config.tokenizer
    tune_cpu(c.num_patches + c.num_latent_tokens + c.max_text_tokens, exact=t.precision == "float32")
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # while one process looks through all pictures
    # A stage of two leaves out parameters of the other.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=bool(c.proxy))
    accelerator = Accelerator(
        mixed_precision=precision(t.precision),
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[patience, ddp],
    )
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

    recipe = (GeneratorRecipe if config.generator.latents else TokenizerRecipe)(config, accelerator)
    world = accelerator.num_processes
    rows, model = recipe.rows, recipe.model
    if t.batch_size % (world * t.accumulate) or t.batch_size > len(rows):
        raise TrainingError(
            f"training.batch_size={t.batch_size} must be divisible by the {world} processes times training.accumulate="
            f"{t.accumulate} and at most {len(rows)}, the number of rows"
        )
    if accelerator.is_main_process:  # only now: a run that never began must not keep the folder to itself
        write_text(output_dir / "config.json", config_json(config))
    ema, optimizer = AveragedModel(model, multi_avg_fn=warmed_up_ema(t.ema)), adamw(model, t)
    parts = {"model": model, "ema": ema, "optimizer": optimizer} | recipe.parts
    run = Run(output_dir, parts, main=accelerator.is_main_process)
    start = run.resume(accelerator.device)
    # `stepped` is `model`, in DDP where there are ranks. Compiled outside of DDP, as torch advises.
    stepped, optimizer = accelerator.prepare(model, optimizer)
    stepped = torch.compile(stepped, dynamic=True) if t.compile else stepped

    batches = DataLoader(
        rows,
        batch_sampler=BatchOrder(len(rows), t, start, accelerator.process_index, world),
        collate_fn=as_batch,
        num_workers=t.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    bar = tqdm(total=t.steps, initial=start, desc=output_dir.name, unit="step", disable=not run.main, mininterval=2)
    for step, batch in enumerate(batches, start + 1):
        rate = learning_rate(step, t)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = forward_backward(accelerator, stepped, recipe, batch, step)
        norm = accelerator.clip_grad_norm_(stepped.parameters(), t.gradient_clip or math.inf)
        if not torch.isfinite(losses["loss"]) or not torch.isfinite(norm):
            bar.close()
            last = next((path for path in run.checkpoints if path.exists()), "none yet")
            raise TrainingError(
                f"step {step}: the loss is {losses['loss'].item()} and the gradient's norm {norm.item()}; rows "
                f"{', '.join(batch['id'])}; last good checkpoint: {last}; lower the learning rate"
            )
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        losses |= recipe.after(step, rate)

        if step % t.log_every == 0 or step in (1, t.steps):
            means = {name: accelerator.reduce(part, "mean").item() for name, part in losses.items()}
            run.log({"step": step, **means, "gradient_norm": norm.item(), "learning_rate": rate})
            bar.set_postfix({k: f"{v:.4f}" for k, v in means.items()}, refresh=False)
        if run.main and t.sample_every and (step % t.sample_every == 0 or step == t.steps):
            recipe.draw(ema.module, output_dir / "samples" / f"step-{step:07d}.png")
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


def forward_backward(
    accelerator: Accelerator, stepped: nn.Module, recipe: TokenizerRecipe, batch: dict, step: int
) -> dict[str, Tensor]:
    """The batch, piece by piece where memory is short: gradients add up to those of the whole, and travel between
    processes with the last piece only. Returns the loss and its parts by name, without gradient."""
    pieces, losses = recipe.pieces(batch, step), []
    for i, piece in enumerate(pieces):
        with accelerator.no_sync(stepped) if i + 1 < len(pieces) else nullcontext():
            loss, parts = recipe.loss(stepped, piece, step)
            accelerator.backward(loss / len(pieces))
        losses.append({"loss": loss.detach(), **parts})
    return {name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]}


def precision(setting: str) -> str:
    """Accelerate's name for it. bf16 pays on a GPU that has it; on a CPU it was measured slower."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bf16" if setting == "bfloat16" or (setting == "auto" and bf16) else "no"
