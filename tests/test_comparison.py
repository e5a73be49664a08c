"""Arms side by side: reconstructions against the model called by hand, captions wrong in one respect, runs followed."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from filelock import FileLock

from textok_mini import comparison, data, launch, results, weights
from textok_mini.bottleneck import latent_bits
from textok_mini.config import DataConfig
from textok_mini.data import load_data
from textok_mini.evaluation import metrics_of_all
from textok_mini.images import to_float
from textok_mini.run import TrainingError, save_weights
from textok_mini.scenes import CELLS, caption
from textok_mini.settings import config_json, load_config
from textok_mini.text import FrozenTextEncoder
from textok_mini.tokenizer import TexTok

WEIGHTS = weights.weights_dir()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXTOK_MINI_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(data, "HELD_OUT_SCENES", 30)
        yield load_data(DataConfig(scenes=16, objects=16), "test", 32)


def test_reconstruct_is_the_model_called_row_by_row(rows):
    torch.manual_seed(0)
    encoder, few = FrozenTextEncoder("minilm", 64), rows.first(5)
    model = TexTok(load_config("smoke").tokenizer).eval()
    lie = few.captions[::-1]
    for told, shown in ((few.captions, few.captions), (few.captions, lie), (lie, lie)):
        together = comparison.reconstruct(model, few, encoder, told, shown, batch_size=2)
        for i in range(5):
            with torch.no_grad():
                latents = model.encode(to_float(few.images([i])), encoder([told[i]]))
                alone = model.decode(latents, encoder([shown[i]])).clamp(-1, 1)
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_wrong_captions_are_wrong_in_one_respect_and_the_same_for_every_arm(rows):
    cells = sorted(CELLS, key=len)
    for change in ("object", "place", "background"):
        lies = comparison.other_captions(rows, f"wrong {change}")
        assert lies == comparison.other_captions(rows, f"wrong {change}")
        for right, lie in zip(rows.captions, lies, strict=True):
            assert right != lie
            grounds = [text.rsplit(" on ", 1)[1] for text in (right, lie)]
            assert (grounds[0] != grounds[1]) == (change == "background")
            places = [[c for c in cells if c in text] for text in (right, lie)]
            assert change == "place" or places[0] == places[1]
    assert comparison.other_captions(rows, "wrong picture")[0] == rows.captions[1]
    assert comparison.other_captions(rows, "normal") == rows.captions
    assert comparison.other_captions(rows, "short")[3] == caption(rows.scene(3), "short")
    assert set(comparison.other_captions(rows, "no caption")) == {""}


@pytest.mark.parametrize(("perceptual", "trunk"), [("lpips-alex", "vgg"), ("lpips-vgg", "alex")])
def test_a_lie_is_told_to_whom_it_is_said_and_graded_on_the_other_trunk(rows, tmp_path, monkeypatch, perceptual, trunk):
    monkeypatch.setattr(weights, "weights_dir", lambda: WEIGHTS)
    torch.manual_seed(0)
    config, few, encoder = load_config("smoke"), rows.first(6), FrozenTextEncoder("minilm", 64)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, perceptual=perceptual))
    model = TexTok(config.tokenizer).eval()
    save_weights(model, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config_json(config))
    lie = comparison.other_captions(few, "wrong place")
    halves = {"detokenizer": (None, lie), "tokenizer": (lie, None), "both": (lie, lie)}
    told = {"right": (None, None)} | {f"wrong place, {half}": captions for half, captions in halves.items()}
    found = comparison.evaluate(tmp_path, few, list(told)[1:])
    for condition, captions in told.items():
        pictures = comparison.reconstruct(model, few, encoder, *captions)
        expected = metrics_of_all({"": pictures}, to_float(few.images(list(range(6)))), trunk)[""]
        for name, values in expected.items():
            np.testing.assert_allclose(found[condition][name], values, rtol=1e-2, atol=1e-3)  # cached text is bf16
    means = [found[condition]["psnr"].mean() for condition in told]
    assert len(set(means)) == 4


def test_the_hubs_form_is_no_run(tmp_path):
    TexTok(load_config("smoke").tokenizer).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        comparison.load_run(tmp_path)


def test_bits_of_a_noisy_latent_against_shannon():
    c = dataclasses.replace(load_config("laptop").tokenizer, num_latent_tokens=2, latent_dim=8, latent_noise=0.5)
    assert latent_bits(c) == pytest.approx(16 * 0.5 * math.log2(5))
    assert latent_bits(dataclasses.replace(c, latent="plain")) is None
    # By simulation: h(z + noise) - h(noise) of Gaussians, from the variances that are really there.
    z, noise = torch.randn(200_000, dtype=torch.float64), 0.5 * torch.randn(200_000, dtype=torch.float64)
    simulated = 0.5 * math.log2((z + noise).var() / noise.var())
    assert latent_bits(c) == pytest.approx(16 * simulated, rel=0.02)


def test_smoothed_is_a_running_mean():
    log = [{"step": i, "loss": float(i)} for i in range(1, 8)]
    steps, means = results.smoothed(log, "loss", window=3)
    assert steps == [3, 4, 5, 6, 7] and np.allclose(means, [2, 3, 4, 5, 6])


def test_following_a_run_that_fails_ends_the_others_and_says_why(tmp_path):
    commands = {"good": ["training.steps=100000"], "bad": ["tokenizer.text_dim=7"]}
    with pytest.raises(TrainingError, match=r"training bad failed: error: .*text_dim=384"):
        launch.follow(commands, "smoke", tmp_path, every=0.2)
    with FileLock(tmp_path / "good" / ".lock", timeout=0):  # its process has let go of it
        assert not (tmp_path / "good" / "model.safetensors").exists()


def test_runs_share_the_cores_and_their_logs_are_drawn(tmp_path, monkeypatch):
    class Ended:
        returncode = 0
        poll = terminate = wait = lambda self, timeout=None: 0

    started, drawn = [], []
    monkeypatch.setattr(launch, "start", lambda *given: started.append(given) or Ended())
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text('{"step": 7}\n')
    launch.follow({"one": ["a=1"], "two": []}, "smoke", tmp_path, drawn.append, every=0)
    assert started == [(["a=1"], "smoke", tmp_path / "one", 2), ([], "smoke", tmp_path / "two", 2)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch.follow({"one": []}, "smoke", tmp_path, every=0)
    assert started[-1] == ([], "smoke", tmp_path / "one", 1)
    assert drawn[-1] == {"one": [{"step": 7}], "two": [{"step": 7}]}


def test_where_there_are_several_gpus_a_run_takes_all(small_home, tmp_path, monkeypatch):
    """Told of two GPUs that are not there, it trains as two processes on the CPU."""
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
    overrides = ["training.steps=2", "training.sample_every=0", "training.batch_size=3"]  # which two cannot share
    process = launch.start(overrides, "smoke", tmp_path / "run", 1)
    assert process.wait() and "divisible by the 2 processes" in (tmp_path / "run.err").read_text()


def test_a_half_written_log_line_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert launch.read_log(tmp_path) == [{"step": 1}, {"step": 2}]
    assert sys.executable and launch.read_log(tmp_path / "none") == []


def test_pictures_are_measured_in_parts_as_at_once(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "weights_dir", lambda: WEIGHTS)
    torch.manual_seed(0)
    save_weights(TexTok(load_config("smoke").tokenizer), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config_json(load_config("smoke")))
    whole = comparison.evaluate(tmp_path, rows.first(7), ["wrong place, detokenizer"])
    monkeypatch.setattr(comparison, "AT_ONCE", 3)
    parts = comparison.evaluate(tmp_path, rows.first(7), ["wrong place, detokenizer"])
    for condition, metrics in whole.items():
        for name, values in metrics.items():
            np.testing.assert_allclose(parts[condition][name], values, rtol=1e-4)
