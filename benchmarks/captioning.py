"""What batches and their order give a captioner: a small Qwen3-VL with random weights and pictures of mixed sizes.

python benchmarks/captioning.py [folder of a chat model]
"""

import sys
import tempfile

import numpy as np
import torch
import transformers as hf
from _paired import in_turn, table
from PIL import Image

from textok_mini.captioner import Captioner

TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def small_model(folder: str) -> str:
    """The default captioner's architecture with 3M weights, which say nothing but cost what they cost."""
    tokenizer = hf.Qwen2Tokenizer().train_new_from_iterator(["describe this picture"] * 9, 320)
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    start, stop, image, video = tokenizer.convert_tokens_to_ids(special)
    looks = hf.Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 32**2, "longest_edge": 512**2})
    hf.Qwen3VLProcessor(looks, tokenizer, hf.Qwen3VLVideoProcessor(), TEMPLATE).save_pretrained(folder)
    rope = {"rope_type": "default", "mrope_section": [8, 4, 4], "rope_theta": 10_000.0}
    text = dict(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=4, head_dim=32)
    text |= dict(num_attention_heads=8, num_key_value_heads=2, rope_parameters=rope)
    vision = dict(depth=4, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=256, patch_size=16)
    vision |= dict(deepstack_visual_indexes=[1])
    ids = dict(image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=stop)
    model = hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    model.generation_config.eos_token_id = None  # all captions of a length
    model.save_pretrained(folder)
    return folder


torch.manual_seed(0)
captioner = Captioner(sys.argv[1] if sys.argv[1:] else small_model(tempfile.mkdtemp()), words=12)
sides = np.random.default_rng(0).integers(2, 16, (32, 2)) * 32  # 64 to 480 pixels
pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (*s, 3), np.uint8)) for i, s in enumerate(sides)]
by_size = sorted(pictures, key=lambda picture: picture.width * picture.height)


def run(batch_size: int, order: list) -> None:
    for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        captioner.generate(batch, ["a"] * len(batch), [0] * len(batch))


ways = {"one by one": (1, pictures), "batches of 8, as they come": (8, pictures), "batches of 8, by size": (8, by_size)}
calls = {name: lambda way=way: run(*way) for name, way in ways.items()}
table(in_turn(calls, rounds=5, warmup=1), "batches of 8, as they come", len(pictures))
