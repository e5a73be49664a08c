import pytest
import torch
from transformers import AutoModel, AutoTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from textok_mini import text
from textok_mini.text import CachedText, FrozenTextEncoder, encoder_path

CAPTIONS = ["a dog", "a red apple bottom right and a bus top left on a sky blue background", "glasses"]


@pytest.fixture(scope="module")
def minilm():
    return FrozenTextEncoder("minilm", max_tokens=64)


def test_embeddings_are_transformers_own(minilm):
    """Caption by caption, without padding, through transformers alone."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(encoder_path("minilm")),
        AutoModel.from_pretrained(encoder_path("minilm")),
    )
    text = minilm(CAPTIONS)
    assert text.embeddings.shape[1] == text.mask.sum(1).max()  # trimmed to the longest
    for i, caption in enumerate(CAPTIONS):
        with torch.no_grad():
            expected = model.eval()(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(text.embeddings[i][text.mask[i]], expected, atol=1e-4, rtol=1e-4)
        assert (text.embeddings[i][~text.mask[i]] == 0).all()


def test_frozen(minilm):
    assert not any(p.requires_grad for p in minilm.model.parameters())
    assert not minilm.model.training and not minilm(CAPTIONS).embeddings.requires_grad
    assert not isinstance(minilm, torch.nn.Module)  # as an attribute of a model it would be saved with it


def test_each_distinct_caption_is_read_once_beside_others_of_its_length(minilm, monkeypatch):
    monkeypatch.setattr(text, "BUCKET", 2)
    shapes, real = [], minilm.model.forward
    monkeypatch.setattr(minilm.model, "forward", lambda **x: shapes.append(tuple(x["input_ids"].shape)) or real(**x))
    captions = ["word " * n for n in (3, 30, 4, 31)] + ["a dog"]
    batch = minilm(captions + captions[::-1])
    assert shapes == [(2, 5), (2, 32), (1, 33)]
    for a, b in zip(range(5), range(9, 4, -1), strict=True):
        assert torch.equal(batch.embeddings[a], batch.embeddings[b]) and torch.equal(batch.mask[a], batch.mask[b])


def test_other_weights_under_the_same_name_are_another_cache(tiny_t5, tmp_path):
    first = CachedText(FrozenTextEncoder(tiny_t5, 16), CAPTIONS, tmp_path)(CAPTIONS)
    model = T5EncoderModel.from_pretrained(tiny_t5)
    model.shared.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(tiny_t5).save_pretrained(tmp_path / "t5")
    before = FrozenTextEncoder(str(tmp_path / "t5"), 16)
    other = CachedText(before, CAPTIONS, tmp_path)(CAPTIONS)
    T5EncoderModel.from_pretrained(tiny_t5).save_pretrained(tmp_path / "t5")
    after = FrozenTextEncoder(str(tmp_path / "t5"), 16)
    assert before.name == after.name and before.revision != after.revision
    assert not torch.equal(other.embeddings, first.embeddings)
    assert torch.equal(CachedText(after, CAPTIONS, tmp_path)(CAPTIONS).embeddings, first.embeddings)


def test_long_captions_are_cut_and_counted(tmp_path):
    encoder = FrozenTextEncoder("minilm", max_tokens=8)
    captions = ["word " * 50, "a dog", "word " * 6]  # the last just fits, with the two tokens that frame it
    text = encoder(captions)
    assert text.mask.sum(1).tolist() == [8, 4, 8] and encoder.cut == 1
    for _ in range(2):  # made, and read again
        assert CachedText(encoder, captions, tmp_path).cut == 1


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory):
    """A real T5 v1.1 in small, made from nothing: no network and no file needed."""
    folder = tmp_path_factory.mktemp("t5")
    T5Tokenizer(extra_ids=0).train_new_from_iterator(CAPTIONS, vocab_size=200).save_pretrained(folder)
    config = T5Config(
        vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder)
    return str(folder)


def test_t5_goes_through_its_encoder(tiny_t5):
    encoder = FrozenTextEncoder(tiny_t5, max_tokens=16, dtype=torch.bfloat16)
    assert isinstance(encoder.model, T5EncoderModel) and encoder.width == 32
    assert next(encoder.model.parameters()).dtype == torch.bfloat16
    text = encoder(CAPTIONS)
    assert text.embeddings.dtype == torch.float32 and text.embeddings.isfinite().all()


def test_t5_in_fp16_is_refused(tiny_t5):
    with pytest.raises(ValueError, match="float16"):
        FrozenTextEncoder(tiny_t5, dtype=torch.float16)


def test_missing_encoder_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr("textok_mini.hub.hub_reachable", lambda: False)
    for name, message in (("google/t5-v1_1-xl", "cannot be reached"), (str(tmp_path / "none"), "no such folder")):
        with pytest.raises(OSError, match=message) as error:
            FrozenTextEncoder(name)
        assert "\n" not in str(error.value) and name in str(error.value)


def test_cache_gives_the_encoders_tokens_to_bf16(minilm, tmp_path):
    cached = CachedText(minilm, CAPTIONS, tmp_path)
    for captions in (CAPTIONS[::-1], [CAPTIONS[0], "a caption that it never saw"]):
        ours, theirs = cached(captions), minilm(captions)
        assert torch.equal(ours.mask, theirs.mask)
        torch.testing.assert_close(ours.embeddings, theirs.embeddings, atol=1e-2, rtol=1e-2)


def test_cache_is_read_again_and_never_for_other_settings(minilm, tmp_path, monkeypatch):
    CachedText(minilm, CAPTIONS, tmp_path)
    stamp = [p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")]
    with monkeypatch.context() as patch:
        patch.setattr(FrozenTextEncoder, "__call__", lambda *_: pytest.fail("read again, not encoded"))
        CachedText(minilm, CAPTIONS[::-1], tmp_path)
    assert [p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")] == stamp
    CachedText(FrozenTextEncoder("minilm", max_tokens=5), CAPTIONS, tmp_path)
    CachedText(minilm, CAPTIONS[:2], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
