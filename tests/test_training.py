"""The loop: schedules against closed forms, resume against a run that was never killed, failures as one line."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from textok_mini import recipe, schedule
from textok_mini.config import ConfigError, TrainingConfig
from textok_mini.run import TrainingError
from textok_mini.schedule import BatchOrder, learning_rate, warmed_up_ema
from textok_mini.settings import load_config
from textok_mini.tokenizer import TexTok
from textok_mini.training import train

KILLS = int(os.environ.get("TEXTOK_MINI_KILLS", "3"))


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """One small world for all runs here, away from the real data/."""
    folder = tmp_path_factory.mktemp("home")
    weights = folder / "data" / "weights"
    weights.parent.mkdir(parents=True)
    from textok_mini.paths import weights_dir

    weights.symlink_to(weights_dir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXTOK_MINI_HOME", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


def smoke(*overrides):
    return load_config("smoke", ["data.scenes=64", *overrides])


def command(folder, *overrides):
    arguments = [sys.executable, "-m", "textok_mini.train", "smoke", "data.scenes=64", *overrides]
    return [*arguments, f"output_dir={folder}"]


def contents(folder):
    """What must be the same for two runs: weights and log, byte for byte."""
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "log.jsonl", "config.json")}


def test_killed_at_random_moments_it_ends_as_if_it_never_was(tmp_path):
    long = ("training.steps=400", "training.checkpoint_every=7", "training.sample_every=0")
    subprocess.run(command(tmp_path / "whole", *long), check=True, capture_output=True)
    rng, kills = random.Random(KILLS), 0
    while kills < KILLS:
        before = size(tmp_path / "killed" / "log.jsonl")
        process = subprocess.Popen(
            command(tmp_path / "killed", *long), stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and size(tmp_path / "killed" / "log.jsonl") <= before:
            time.sleep(0.01)  # imports take most of a short run; a kill should meet the loop
        time.sleep(rng.uniform(0, 3.0 / KILLS))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= min(2, KILLS), "the run ended before it could be killed"
    subprocess.run(command(tmp_path / "killed", *long), check=True, capture_output=True)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
    print(f"{kills} kills, bit-identical")


@pytest.mark.parametrize("share", [2 / 3, 0])
def test_a_damaged_checkpoint_is_left_for_the_one_before(tmp_path, capsys, share):
    train(smoke(), tmp_path / "whole")
    train(smoke(), tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").unlink()
    last = tmp_path / "damaged" / "checkpoint" / "last.pt"
    last.write_bytes(last.read_bytes()[: int(share * last.stat().st_size)])
    train(smoke(), tmp_path / "damaged")
    assert "last.pt: cannot be read" in capsys.readouterr().err
    assert contents(tmp_path / "whole") == contents(tmp_path / "damaged")


def size(path):
    return path.stat().st_size if path.exists() else 0


def test_a_finished_run_is_left_alone_and_another_config_is_refused(tmp_path):
    train(smoke(), tmp_path / "run")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    train(smoke(), tmp_path / "run")
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(TrainingError, match=r"differs in training\.seed, training\.learning_rate"):
        train(smoke("seed=1", "training.learning_rate=1e-4"), tmp_path / "run")
    written = {p.name for p in (tmp_path / "run").iterdir()} - {".lock"}
    assert written == {
        "checkpoint",
        "config.json",
        "log.jsonl",
        "model.safetensors",
        "samples",
        "snapshots",
        "timing.jsonl",
    }
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 13))
    assert set(log[0]) == {"step", "loss", "l2", "lpips", "gradient_norm", "learning_rate"}
    assert log[0]["loss"] == pytest.approx(log[0]["l2"] + 0.1 * log[0]["lpips"], rel=1e-5)
    model = TexTok.from_pretrained(tmp_path / "run")
    assert model.config == smoke().tokenizer


def test_one_step_is_torchs_adamw(tmp_path, monkeypatch):
    """The whole first step again by hand: data order, noise, loss, clipping, AdamW, EMA's first copy."""
    settings = ("training.steps=1", "training.warmup_steps=0", "training.perceptual=none", "training.gradient_clip=0")
    config = smoke(*settings, "tokenizer.text_in=none", "training.learning_rate=1e-3")
    train(config, tmp_path)
    rows = recipe.load_data(config.data, "train", 32)
    order = np.random.default_rng((0, 0)).permutation(64)[:16]
    images = torch.stack([rows[i]["image"] for i in order]).float() / 127.5 - 1
    torch.manual_seed(0)
    model = TexTok(config.tokenizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    noise = schedule.step_noise(config, 1)
    latents = model.encode(images) + config.tokenizer.latent_noise * noise
    (model.decode(latents) - images).square().mean().backward()
    after = load_file(tmp_path / "model.safetensors")
    # The cosine ends at 0, which is where step 1 of 1 is; below, Adam's first m / sqrt(v) is the gradient's sign.
    assert learning_rate(1, config.training) == pytest.approx(0.0)
    assert all(torch.equal(after[n], before[n]) for n in before)
    twice = smoke(
        *settings, "tokenizer.text_in=none", "training.learning_rate=1e-3", "training.final_learning_rate=1.0"
    )
    train(twice, tmp_path / "constant")
    after = load_file(tmp_path / "constant" / "model.safetensors")
    for name, p in model.named_parameters():
        moved = p.grad.abs() > 1e-5
        expected = before[name] - 1e-3 * (
            p.grad.sign() + twice.training.weight_decay * before[name] * (name.endswith("weight") and p.ndim == 2)
        )
        torch.testing.assert_close(after[name][moved], expected[moved], atol=2e-5, rtol=0)


def test_the_latents_noise_grows_to_its_full_deviation_at_the_last_step():
    config = smoke("training.steps=10", "training.batch_size=64", "tokenizer.num_latent_tokens=64")
    deviations = [schedule.step_noise(config, step).std().item() for step in (1, 5, 10, 11)]
    assert deviations == pytest.approx([0.1, 0.5, 1.0, 1.0], rel=0.02)  # of 32,768 draws: its own deviation is 0.4%


def test_rows_come_in_epochs_and_ranks_share_the_global_batches():
    t = dataclasses.replace(TrainingConfig(), steps=10, batch_size=8, seed=3)
    whole = list(BatchOrder(35, t))
    assert len(whole) == 10 and all(len({row for batch in whole[e : e + 4] for row in batch}) == 32 for e in (0, 4))
    assert list(BatchOrder(35, t, start=6)) == whole[6:]
    ranks = [list(BatchOrder(35, t, rank=r, world=2)) for r in (0, 1)]
    for step, batch in enumerate(whole):
        assert sorted(ranks[0][step] + ranks[1][step]) == sorted(batch) and len(ranks[0][step]) == 4


def test_learning_rate_and_ema_against_closed_forms():
    t = dataclasses.replace(TrainingConfig(), steps=110, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    assert [learning_rate(s, t) for s in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(60, t) == pytest.approx(0.55) and learning_rate(110, t) == pytest.approx(0.1)
    assert learning_rate(35, t) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    average, update = [torch.zeros(1)], warmed_up_ema(0.9)
    expected = 0.0
    for n in range(1, 200):
        value = math.sin(n)
        update(average, [torch.tensor([value])], torch.tensor(n))
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert average[0].item() == pytest.approx(expected, abs=1e-5)


def test_a_loss_that_is_no_number_names_step_rows_and_checkpoint(tmp_path, monkeypatch):
    def poisoned(*arguments):
        loss, parts = original(*arguments)
        poisoned.calls += 1
        return (loss * float("nan") if poisoned.calls == 6 else loss), parts

    original, poisoned.calls = recipe.tokenizer_loss, 0
    monkeypatch.setattr(recipe, "tokenizer_loss", poisoned)
    with pytest.raises(TrainingError, match=r"step 6: the loss is nan.*rows train-\d+, .*last\.pt") as error:
        train(smoke(), tmp_path)
    assert "\n" not in str(error.value)
    state = torch.load(tmp_path / "checkpoint" / "last.pt", weights_only=True)
    assert state["step"] == 4 and not (tmp_path / "model.safetensors").exists()
    assert all(v.isfinite().all() for v in state["model"].values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=65", "training.batch_size=65"),
        ("tokenizer.text_dim=100", "set tokenizer.text_dim=384"),
        ("data=no/such-folder/here", "there is no data"),
        ("training.stps=1", "did you mean training.steps?"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(tmp_path, override, message):
    done = subprocess.run(command(tmp_path / "run", override), capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


GAN = ("discriminator.image_size=32", "discriminator.channels=4", "training.adversarial_weight=0.1")
GAN += ("training.adversarial_warmup=3", "training.lecam_start=2", "training.r1_every=2", "training.log_every=1")


def test_until_the_gan_starts_the_tokenizer_learns_as_without_it(tmp_path):
    train(smoke(), tmp_path / "without")
    train(smoke(*GAN, "training.adversarial_start=12"), tmp_path / "with")
    assert (tmp_path / "with" / "model.safetensors").read_bytes() == (
        tmp_path / "without" / "model.safetensors"
    ).read_bytes()
    log = [json.loads(line) for line in (tmp_path / "with" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "discriminator" in line] == [10, 11, 12]
    assert not any("adversarial" in line for line in log)


def test_with_a_gan_a_killed_run_ends_as_if_it_never_was(tmp_path, monkeypatch):
    config = smoke(*GAN, "training.adversarial_start=5")
    train(config, tmp_path / "whole")
    calls, loss = iter(range(100)), recipe.tokenizer_loss

    def killed(*given):
        if next(calls) == 9:  # in step 10; the last checkpoint is of step 8
            raise KeyboardInterrupt
        return loss(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recipe, "tokenizer_loss", killed)
        train(config, tmp_path / "killed")
    train(config, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "adversarial" in line] == list(range(6, 13))  # after the start, a ramp
    assert [line["step"] for line in log if "lecam" in line] == list(range(5, 13))
    first = next(line for line in log if "adversarial" in line)
    expected = first["l2"] + 0.1 * first["lpips"] + 0.1 / 3 * first["adversarial"]  # a third up the ramp
    assert first["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gan", [(), (*GAN, "training.adversarial_start=5")], ids=["plain", "gan"])
def test_a_batch_in_pieces_learns_as_a_whole_one(tmp_path, gan):
    settings = ("training.learning_rate=1e-4", "training.sample_every=0", *gan)
    train(smoke(*settings), tmp_path / "whole")
    train(smoke(*settings, "training.accumulate=4"), tmp_path / "pieces")
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "pieces")]
    for a, b in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert a.pop("gradient_norm") == pytest.approx(b.pop("gradient_norm"), rel=1e-3)
        assert a == pytest.approx(b, rel=0, abs=1e-5), a["step"]
    with pytest.raises(TrainingError, match=r"must be divisible by the 1 processes times training\.accumulate=3"):
        train(smoke(*settings, "training.accumulate=3"), tmp_path / "three")


def test_recomputed_activations_change_nothing(tmp_path):
    train(smoke(), tmp_path / "kept")
    train(smoke("training.recompute=true"), tmp_path / "again")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("kept", "again")]
    assert weights[0] == weights[1]


def test_a_discriminator_of_another_size_is_one_line():
    with pytest.raises(ConfigError, match=r"discriminator\.image_size must be tokenizer\.image_size=32"):
        smoke("training.adversarial_weight=0.1")


@pytest.mark.parametrize("gan", [(), (*GAN, "training.adversarial_start=5")], ids=["plain", "gan"])
def test_two_processes_learn_as_one(tmp_path, gan):
    """Half of each batch to each process, gradients and LeCAM's means over both: the losses of one process. Two that
    were killed at step 40 end as they would have; one process that goes on in their place, as one would have."""
    settings = ("training.steps=50", "training.log_every=1", "training.sample_every=0", "training.batch_size=16", *gan)
    settings += ("training.checkpoint_every=20",)
    settings += ("training.learning_rate=1e-4",)  # the paper's; a larger one amplifies the rounding of the last bit

    def two(folder):
        python, *rest = command(folder, *settings)
        distributed = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *rest]
        done = subprocess.run(distributed, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    train(smoke(*settings), tmp_path / "one")
    two(tmp_path / "two")
    for name in ("killed", "moved"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / "checkpoint" / "last.pt").unlink()  # what is left is step 40
    two(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "two")
    train(smoke(*settings), tmp_path / "moved")
    one, both, moved = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two", "moved")
    )
    for a, *others in zip(one, both, moved, strict=True):
        norm = a.pop("gradient_norm")
        for b in others:
            assert b.pop("gradient_norm") == pytest.approx(norm, rel=1e-3)
            assert b == pytest.approx(a, rel=0, abs=1e-5), a["step"]
