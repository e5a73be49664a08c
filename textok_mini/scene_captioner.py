"""A small captioner of scenes, trained here: it stands in for the large ones where no hub can be reached.

    python -m textok_mini.scene_captioner output_dir=runs/captioner [data.world_seed=0 steps=3000 image_size=32 ...]

A ViT looks, a GPT-2 with cross-attention writes; `Captioner` loads it like any other, and it errs like any other.
Scenes follow from their index, so those from `skip` on are new to a tokenizer that trains on the first `skip`.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers as hf
from tqdm import trange

from textok_mini.captioner import accelerator
from textok_mini.captions import command
from textok_mini.config import DataConfig
from textok_mini.data import DataError, world_of
from textok_mini.device import tune_cpu
from textok_mini.paths import resolve
from textok_mini.scenes import caption, render

SPECIAL = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}


@dataclass(frozen=True)
class Settings:
    output_dir: str = "runs/captioner"
    data: DataConfig = field(default_factory=DataConfig)
    image_size: int = 32
    steps: int = 3_000
    batch_size: int = 64
    lr: float = 1e-3  # at its peak
    width: int = 128
    layers: int = 4  # in each half
    skip: int = 30_000
    rows: int = 30_000
    seed: int = 0


def build(captions: list[str], image_size: int, width: int, layers: int) -> tuple:
    """An untrained captioner that can write the words of `captions`, its tokenizer and its image processor."""
    words = [*SPECIAL.values(), *sorted({word for text in captions for word in text.split()})]
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "[UNK]"}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        print(json.dumps({"model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}), file=file, flush=True)
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file=file.name, **SPECIAL)
    heads, ends = max(1, width // 32), {"bos_token_id": 1, "eos_token_id": 2}  # SPECIAL comes first
    look = {"model_type": "vit", "image_size": image_size, "patch_size": 4, "hidden_size": width}
    look |= {"intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    write = {"model_type": "gpt2", "vocab_size": len(words), "n_positions": 128, "n_embd": width, "n_layer": layers}
    write |= {"n_head": heads, "add_cross_attention": True, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, **ends}
    pair = hf.VisionEncoderDecoderConfig(encoder=look, decoder=write, decoder_start_token_id=1, pad_token_id=0, **ends)
    return hf.VisionEncoderDecoderModel(pair), tokenizer, hf.ViTImageProcessor(size=image_size)


def train(c: Settings) -> None:
    """Trains a captioner into `output_dir`; a finished one is left alone. Raises DataError."""
    folder = resolve(c.output_dir)
    if (folder / "config.json").exists():
        return print(f"{folder}: finished, nothing to do")
    if folder.exists():
        raise DataError(f"{folder} is there but holds no captioner: choose another output_dir")
    tune_cpu((c.image_size // 4) ** 2)
    scenes = [world_of(c.data).scene("train", c.skip + i) for i in trange(c.rows, desc="scenes", disable=None)]
    pixels = torch.from_numpy(np.stack([render(scene, c.image_size) for scene in scenes])).permute(0, 3, 1, 2)
    captions = [caption(scene, c.data.captions) for scene in scenes]
    torch.manual_seed(c.seed)
    model, tokenizer, images = build(captions, c.image_size, c.width, c.layers)
    torch.nn.init.normal_(model.encoder.embeddings.position_embeddings, std=0.5)  # from ViT's 0.02 places come late
    ids = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in captions]
    labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.to(device := accelerator()).parameters(), c.lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, c.lr, max(20, c.steps), pct_start=0.1)
    for _ in (bar := trange(c.steps, desc=folder.name, unit="step", mininterval=2)):
        rows = torch.randint(c.rows, (c.batch_size,))
        loss = model(pixel_values=pixels[rows].to(device) / 127.5 - 1, labels=labels[rows].to(device)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    beside = folder.with_name(f"{folder.name}.part")
    for part in (model, tokenizer, images):
        part.save_pretrained(beside)
    (beside / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\nIt has seen nothing but OpenMoji's drawings.\n")
    beside.rename(folder)


if __name__ == "__main__":
    sys.exit(command(Settings, train, sys.argv[1:]))
