"""Pictures to captions, by transformers or by vLLM.

    captioner = Captioner("Qwen/Qwen3-VL-2B-Instruct", temperature=0.7)
    captioner.generate([picture], ["cats/1.jpg"], [0])  # ["A grey cat sleeps on ..."]; number 0 is greedy

Captions 1, 2, ... of a picture are samples. Their noise follows from the seed, the picture's name, the caption's number
and the step, and so from no batch and no order: captions don't change when a run is cut into shards or goes on later.
"""

import importlib
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import transformers as hf
from huggingface_hub import ModelCard
from PIL import Image

from textok_mini.device import best
from textok_mini.hub import from_hub, hub_reachable
from textok_mini.own_data import digest

MODEL = "Qwen/Qwen3-VL-2B-Instruct"  # Apache 2.0: its captions may train anything; small; pictures of any size
PROMPT = """Describe this picture in one long factual caption: the main objects first, then their attributes, where \
they are, and the background. Say only what can be seen, and do not begin with "The image shows"."""
hf.logging.disable_progress_bar()  # it would run into the captions' own
APACHE = ("Qwen/Qwen3-VL-", "HuggingFaceTB/SmolVLM", "OpenGVLab/InternVL3_5-")  # families whose licence is known


class Captioner:
    """RGB pictures to captions by transformers: a chat model, or an encoder-decoder, which reads no prompt.

    words: what `trim` will leave; twice as many tokens are written. temperature: of all captions but number 0; at 0
    they are greedy too. revision: of a hub's model. bf16, on a CPU fp32, where batches change nothing; bf16 rounds by
    batch. Raises OSError, in one line, for a model that cannot be had."""

    def __init__(self, model=MODEL, prompt=PROMPT, words=75, temperature=0.0, seed=0, revision=None, device=None):
        self.prompt, self.temperature, self.seed = prompt, temperature, seed
        self.device = torch.device(device) if device else best()
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        load = partial(from_hub, name=str(model), what="captioner", revision=revision)
        self.model = load(hf.AutoModelForImageTextToText, dtype=self.dtype, use_safetensors=True).to(self.device).eval()
        self.chats = self.model.config.model_type != "vision-encoder-decoder"
        self.processor = load(hf.AutoProcessor if self.chats else hf.AutoImageProcessor)
        self.tokenizer = self.processor.tokenizer if self.chats else load(hf.AutoTokenizer)
        if self.chats and not self.processor.chat_template:
            raise OSError(f"captioner {model!r} has no chat template: name an instruction-tuned model")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        room = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", 1 << 20)
        self.greedy = dict(
            max_new_tokens=min(2 * words, room - 1), do_sample=False, num_beams=1, repetition_penalty=1.0
        )
        self.greedy |= dict(pad_token_id=self.tokenizer.pad_token_id, temperature=None, top_p=None, top_k=None)

    @torch.inference_mode()
    def generate(self, pictures: Sequence[Image.Image], names: Sequence[str], numbers: Sequence[int]) -> list[str]:
        """Of one batch: caption `numbers[i]` of `pictures[i]`, which is called `names[i]`, as the model writes it."""
        if self.chats:  # padded on the left, so that a caption begins where its prompt ends
            how = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
            how["processor_kwargs"] = {"padding": True, "padding_side": "left"}
            inputs = self.processor.apply_chat_template([self.talk(picture) for picture in pictures], **how)
        else:
            inputs = self.processor(list(pictures), return_tensors="pt")
        read = inputs["input_ids"].shape[1] if self.chats else 0
        keys = [(self.seed, *key) if key[1] else None for key in zip(names, numbers, strict=True)]
        noise = [GumbelMax(keys, self.temperature)]
        written = self.model.generate(**inputs.to(self.device, self.dtype), **self.greedy, logits_processor=noise)
        return self.tokenizer.batch_decode(written[:, read:], skip_special_tokens=True)

    def talk(self, picture: Image.Image, kind: str = "image") -> list[dict]:
        return [{"role": "user", "content": [{"type": kind, kind: picture}, {"type": "text", "text": self.prompt}]}]


class GumbelMax(hf.LogitsProcessor):
    """Scores / temperature + Gumbel noise, whose largest is a sample of softmax(scores / temperature).

    Row i's noise follows from `keys[i]` and the step; a row with None stays greedy."""

    def __init__(self, keys: list[tuple | None], temperature: float):
        self.keys, self.temperature, self.step = keys, temperature, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores, generator = scores.float().clone(), torch.Generator(scores.device)
        for row, key in zip(scores, self.keys, strict=True):
            if key and self.temperature:
                generator.manual_seed(int(digest([*key, self.step]), 16))
                row.div_(self.temperature).sub_(torch.empty_like(row).exponential_(generator=generator).log_())
        self.step += 1
        return scores


class VLLMCaptioner(Captioner):
    """The same by vLLM, with samples of its own. It follows vLLM's documentation and is tested with a stand-in for
    the package; it was not run with a real model here."""

    def __init__(self, model=MODEL, prompt=PROMPT, words=75, temperature=0.0, seed=0, revision=None):
        vllm, self.dtype, self.prompt = importlib.import_module("vllm"), "auto", prompt
        self.model, self.temperature, self.seed = vllm.LLM(model=str(model), revision=revision), temperature, seed
        self.sampling = partial(vllm.SamplingParams, max_tokens=2 * words)

    def generate(self, pictures: Sequence[Image.Image], names: Sequence[str], numbers: Sequence[int]) -> list[str]:
        seeds = [int(digest([self.seed, *key]), 16) for key in zip(names, numbers, strict=True)]
        heats = [self.temperature * (number > 0) for number in numbers]
        sampling = [self.sampling(temperature=heat, seed=seed) for heat, seed in zip(heats, seeds, strict=True)]
        talks = [self.talk(picture, "image_pil") for picture in pictures]
        return [answer.outputs[0].text for answer in self.model.chat(talks, sampling, use_tqdm=False)]


def trim(caption: str, words: int) -> str:
    """At most `words` words: up to the last sentence's end among them, if that leaves a third of them ("St." is no
    sentence), else all of them."""
    head = re.match(rf"(?:\S+\s+){{0,{words - 1}}}\S*", caption := caption.strip())[0]
    ends = [match.end() for match in re.finditer(r"[.!?\u2026][\"')\]\u201d\u2019]*(?!\S)", head)]
    return head[: ends[-1]] if ends and head != caption and 3 * ends[-1] >= len(head) else head


def licence(model: str) -> str:
    """Of a known family, else what the model's card says, else "unknown"."""
    if model.startswith(APACHE):
        return "apache-2.0"
    card = Path(model, "README.md")
    with suppress(Exception):  # no card, or no network
        return ModelCard.load(card if card.is_file() or not hub_reachable() else model).data.license or "unknown"
    return "unknown"
