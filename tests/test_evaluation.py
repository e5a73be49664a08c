"""The figures against their definitions: closed forms, scipy, and a second implementation where needed."""

import json

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from scipy.signal import convolve2d
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from textok_mini import evaluation
from textok_mini.evaluation import (
    LITE0,
    EfficientNetLite0,
    against_reference,
    clip_score,
    distances,
    frechet,
    generation_metrics,
    inception_weights,
    metrics_of_all,
    psnr,
    ssim,
)
from textok_mini.images import to_uint8
from textok_mini.intervals import Interval, bootstrap_mean, paired_bootstrap, seeds_interval
from textok_mini.losses import LPIPS


def blobs(count: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures in [-1, 1]: noise at 6 x 6 pixels, enlarged."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * 2 - 1
    return F.interpolate(coarse, (side, side), mode="bilinear")


# --- per image ---


def test_psnr_closed_form():
    original = torch.zeros(3, 3, 8, 8)
    wrong_by = torch.tensor([0.2, 0.02, 1.0]).view(3, 1, 1, 1)
    # range 2, error e everywhere: 20 log10(2 / e)
    torch.testing.assert_close(psnr(original + wrong_by, original), 20 * torch.log10(2 / wrong_by.flatten()))


def test_psnr_clips_and_is_infinite_for_identical_images():
    image = torch.ones(1, 3, 8, 8)
    assert psnr(image + 0.5, image).item() == float("inf")


def test_ssim_is_the_definition():
    """Wang et al. (2004), eq. 13, by valid convolution in fp64."""
    x = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(x, x) / x.sum() ** 2
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2

    def mean(channel):
        return convolve2d(channel, window, mode="valid")

    def one_channel(a, b):
        mu_a, mu_b = mean(a), mean(b)
        var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
        top = (2 * mu_a * mu_b + c1) * (2 * cov + c2)
        return (top / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).mean()

    original = blobs(2)
    noisy = (original + 0.2 * torch.randn(original.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    expected = [
        np.mean([one_channel(a, b) for a, b in zip(x, y, strict=True)])
        for x, y in zip(noisy.double().numpy(), original.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(ssim(noisy, original).numpy(), expected, atol=2e-5)
    assert ssim(original, original).tolist() == pytest.approx([1, 1])


def test_metrics_are_per_image_in_order_whatever_the_batches():
    original = blobs(5)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(1))
    noisy = original + noise * torch.tensor([0.05, 0.1, 0.2, 0.4, 0.8]).view(5, 1, 1, 1)
    metrics = metrics_of_all({"noisy": noisy}, original, lpips_trunk="alex", batch_size=2)["noisy"]
    assert {name: values.shape for name, values in metrics.items()} == {"psnr": (5,), "ssim": (5,), "lpips": (5,)}
    assert (np.diff(metrics["psnr"]) < 0).all() and (np.diff(metrics["ssim"]) < 0).all()
    with torch.no_grad():
        expected = LPIPS("alex")(noisy.clamp(-1, 1), original)
    np.testing.assert_allclose(metrics["lpips"], expected, rtol=1e-4)
    with pytest.raises(ValueError, match="originals"):
        metrics_of_all({"noisy": noisy[:2]}, original)


def test_to_uint8_rounds_to_nearest_and_clips():
    assert to_uint8(torch.tensor([-3.0, -1.0, -0.003, 0.005, 1.0, 3.0])).tolist() == [0, 0, 127, 128, 255, 255]


# --- per set of images ---


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return to_uint8(blobs(48, seed=0))


@pytest.fixture(scope="module")
def features():
    network = EfficientNetLite0(LITE0, ["pooled"]).eval()
    with torch.no_grad():
        return lambda images: network(images)[0].double().numpy()


def noisy(images: torch.Tensor, strength: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    return (images + strength * 255 * noise).clamp(0, 255).round().to(torch.uint8)


def test_distances_equal_the_formulas_on_the_same_features(real, features):
    fake = noisy(real, 0.1)
    found = distances(real, fake)
    x, y = features(real), features(fake)

    # |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2))
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.svdvals((x - x.mean(0)) @ (y - y.mean(0)).T).sum() / (len(x) - 1)  # tr (S S')^(1/2), low rank
    frechet = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sx) + np.trace(sy) - 2 * root
    assert found["frechet_efficientnet_lite0"] == pytest.approx(frechet, rel=1e-3)

    # mean of k over distinct pairs of x, of y, less twice the mean over all pairs of both
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def distinct(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    mmd = distinct(kernel(x, x)) + distinct(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert found["kernel_efficientnet_lite0"] == pytest.approx(mmd, rel=1e-3)
    assert set(found) == {"frechet_efficientnet_lite0", "kernel_efficientnet_lite0"}


def test_distances_grow_with_damage(real):
    weak, strong = distances(real, noisy(real, 0.05)), distances(real, noisy(real, 0.2))
    for name in weak:
        assert 0 < weak[name] < strong[name]


def test_kernel_distance_of_two_halves_straddles_zero_and_frechet_does_not(features):
    """Over random splits of one set, torch-fidelity's own estimators: one has mean 0, the other is biased."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    x = torch.from_numpy(features(to_uint8(blobs(96, seed=3)))).float()
    rng, kernel, frechet = np.random.default_rng(0), [], []
    for _ in range(40):
        order = rng.permutation(len(x))
        a, b = x[order[:48]], x[order[48:]]
        result = kid_features_to_metric(a, b, kid_subset_size=48, kid_subsets=1, verbose=False)
        kernel.append(result["kernel_inception_distance_mean"])
        small = [fid_features_to_statistics(half[:, :40]) for half in (a, b)]
        frechet.append(fid_statistics_to_metric(*small, verbose=False)["frechet_inception_distance"])
    assert min(kernel) < 0 < max(kernel)
    assert abs(np.mean(kernel)) < 0.5 * np.std(kernel)
    assert min(frechet) > 0


def test_distances_refuse_what_they_cannot_measure(real):
    with pytest.raises(ValueError, match="to_uint8"):
        distances(real.float(), real)
    with pytest.raises(ValueError, match="no extractor 'vgg'"):
        distances(real, real, extractor="vgg")


def test_inception_needs_its_own_weights(tmp_path, monkeypatch, real):
    with pytest.raises(OSError, match="is not a file"):
        distances(real, real, extractor="inception", weights_path=tmp_path / "absent.pth")
    other = tmp_path / "other.pth"
    other.write_bytes(b"something else")
    with pytest.raises(OSError, match="not FID's Inception"):
        inception_weights(other)

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(evaluation.torch.hub, "download_url_to_file", offline)
    with pytest.raises(OSError, match="rFID needs Inception's weights: no network") as error:
        inception_weights()
    assert "\n" not in str(error.value)


# --- how sure ---


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, size=2_000)
    interval = bootstrap_mean(values)
    low, high = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.01)
    assert bootstrap_mean(values) == interval and bootstrap_mean(values, seed=1) != interval


def test_bootstrap_agrees_with_scipy_on_skewed_values():
    values = np.random.default_rng(1).exponential(size=200)
    interval = bootstrap_mean(values)
    rng = np.random.default_rng(5)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=rng)
    limits = theirs.confidence_interval
    assert (interval.low, interval.high) == pytest.approx((limits.low, limits.high), abs=0.01)


def test_pairing_removes_the_difficulty_of_images():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(20, 5, size=500)
    a, b = difficulty + 0.5 + rng.normal(0, 0.1, 500), difficulty + rng.normal(0, 0.1, 500)
    paired = paired_bootstrap(a, b)
    assert paired.low < 0.5 < paired.high and paired.high - paired.low < 0.03
    assert bootstrap_mean(a).high - bootstrap_mean(a).low > 0.5
    with pytest.raises(ValueError, match="pair"):
        paired_bootstrap(a, b[:-1])


def test_seeds_interval_is_students_t():
    values = [0.84, 0.78, 0.80, 0.83, 0.79]
    interval = seeds_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.mean == pytest.approx(0.808)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("inf")], [1.0, float("nan")]])
def test_an_interval_needs_two_finite_values(values):
    for function in (bootstrap_mean, seeds_interval):
        with pytest.raises(ValueError, match="two or more finite"):
            function(values)


def test_an_interval_prints_itself():
    interval = Interval(0.808, 0.776, 0.84)
    assert str(interval) == f"{interval}" == "+0.81 [+0.78, +0.84]"
    assert f"{interval:.1f}" == "0.8 [0.8, 0.8]"


# --- generated pictures ---


def test_frechet_of_two_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    mu, nu, s, t = rng.normal(size=(2, 5)).tolist() + rng.uniform(0.5, 2, (2, 5)).tolist()
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    one, two = ({"mu": np.array(m), "sigma": basis @ np.diag(v) ** 2 @ basis.T} for m, v in ((mu, s), (nu, t)))
    expected = sum((a - b) ** 2 for a, b in zip([*mu, *s], [*nu, *t], strict=True))
    assert frechet(one, two) == pytest.approx(expected, rel=1e-6)


def test_precision_and_recall_are_the_shares_near_three_neighbours(real, features):
    fake = noisy(real, 0.15)
    found = generation_metrics(real, fake)
    x, y = features(real), features(fake)

    def share(points, of):
        gaps = np.linalg.norm(of[:, None] - of[None], axis=2)
        radius = np.sort(gaps, axis=1)[:, 3]  # the third neighbour; the nearest is itself
        return (np.linalg.norm(points[:, None] - of[None], axis=2) <= radius).any(1).mean()

    assert found["precision"] == pytest.approx(share(y, x), abs=1e-6)
    assert found["recall"] == pytest.approx(share(x, y), abs=1e-6)
    assert distances(real, fake).items() <= found.items()


def test_against_reference_is_each_measure_by_itself(tmp_path, monkeypatch, real):
    """Inception's place is taken by 12 pixels and logits of 4 classes, whose measures are closed forms."""
    monkeypatch.setattr(evaluation, "inception_weights", lambda path: tmp_path)
    pixels = lambda images: images[:, :, 4:12:4, 4:12:4].flatten(1).float() / 255  # noqa: E731

    def extractor(images):
        which = images[:, 0, 0, 0].long() % 4
        return pixels(images), 50.0 * F.one_hot(which, 4)

    monkeypatch.setattr(evaluation, "create_feature_extractor", lambda *_, **__: extractor)
    fake = noisy(real, 0.15)
    classes = fake[:, 0, 0, 0].numpy() % 4
    x, y = pixels(real).double().numpy(), pixels(fake).double().numpy()
    statistics = {"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)}
    np.savez(tmp_path / "all.npz", arr_0=real.permute(0, 2, 3, 1).numpy(), **statistics)
    found = against_reference(fake, tmp_path / "all.npz")
    root = linalg.sqrtm(np.cov(y, rowvar=False) @ statistics["sigma"]).real
    trace = np.trace(np.cov(y, rowvar=False) + statistics["sigma"] - 2 * root)
    assert found["fid"] == pytest.approx(((x.mean(0) - y.mean(0)) ** 2).sum() + trace, abs=1e-5)
    # Sure of one class each, so a part's score is e to the entropy of its classes; ten parts in random order.
    order, score = np.random.RandomState(2020).permutation(len(fake)), []
    for part in range(10):
        share = np.bincount(classes[order][part * 48 // 10 : (part + 1) * 48 // 10]) / len(
            range(part * 48 // 10, (part + 1) * 48 // 10)
        )
        score.append(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))
    assert found["inception_score"] == pytest.approx(np.mean(score), abs=1e-6)
    gaps = np.linalg.norm(x[:, None] - x[None], axis=2)
    radius = np.sort(gaps, axis=1)[:, 3]
    near = (np.linalg.norm(y[:, None] - x[None], axis=2) <= radius).any(1).mean()
    assert found["precision"] == pytest.approx(near, abs=0.01) and 0 < found["recall"] <= 1


def test_a_file_of_pictures_is_measured_by_one_command(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "fake.npz", np.zeros((6, 8, 8, 3), np.uint8), np.array([0, 0, 0, 4, 4, 4]))
    measure = lambda images, reference: {"fid": float(len(images)), "side": images.shape[3]}  # noqa: E731
    monkeypatch.setattr(evaluation, "against_reference", measure)
    assert evaluation.main([f"{tmp_path / 'fake.npz'}", "there.npz"]) == 0
    assert json.loads(capsys.readouterr().out) == {"pictures": 6, "a class": [3, 3], "fid": 6.0, "side": 8}
    assert evaluation.main([str(tmp_path / "none.npz"), "there.npz"]) == 2 and "none.npz" in capsys.readouterr().err


def test_a_reference_must_be_one(tmp_path):
    np.savez(tmp_path / "arr.npz", np.zeros(3))
    with pytest.raises(OSError, match=r"an \.npz with mu, sigma and arr_0"):
        against_reference(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), tmp_path / "arr.npz")


def test_clip_score_is_a_hundred_cosines(tmp_path):
    """A real tiny CLIP, its two halves called by hand."""
    words = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", "a", "cat", "dog"])}
    tokenizer = Tokenizer(models.WordLevel({**words, "<unk>": 5}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing("<|startoftext|> $A <|endoftext|>", special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|endoftext|>")
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = small | dict(vocab_size=6, eos_token_id=1, bos_token_id=0, pad_token_id=1)
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=small | dict(image_size=32, patch_size=8), projection_dim=8)
    )
    model.save_pretrained(tmp_path)
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), fast)
    processor.save_pretrained(tmp_path)
    images, captions = to_uint8(blobs(3)), ["a cat", "a dog", "dog"]
    found = clip_score(images, captions, str(tmp_path))
    for image, caption, score in zip(images, captions, found, strict=True):
        inputs = processor(text=[caption], images=[image], return_tensors="pt")
        with torch.no_grad():
            one = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
            two = model.text_projection(model.text_model(inputs["input_ids"]).pooler_output)
        assert score == pytest.approx(max(0, 100 * F.cosine_similarity(one, two).item()), abs=1e-3)
    with pytest.raises(OSError, match="CLIP 'nobody/clip'"):
        clip_score(images, captions, "nobody/clip")
