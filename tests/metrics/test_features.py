"""Extractors recognise what is on photographs, equal the networks that they stand for, and read no file unseen."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from attnorm.config import ConfigError, UserError
from attnorm.metrics import features
from attnorm.metrics.features import EXTRACTORS, Extractor, InceptionExtractor, load_extractor

CPU = torch.device("cpu")
CAT, ESPRESSO = 285, 967  # among ImageNet's classes; 281 to 285 are cats


def photograph(name: str) -> Tensor:
    return torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None]


def noise(count: int, size: int = 32) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=random, dtype=torch.uint8)


@pytest.fixture(scope="module")
def efficientnet() -> Extractor:
    before = torch.get_rng_state()
    made = load_extractor("efficientnet-lite0", device=CPU)
    assert torch.equal(torch.get_rng_state(), before)  # building draws weights, which are then replaced
    return made


def test_every_extractor_says_what_it_is() -> None:
    assert set(EXTRACTORS) == {"inception", "efficientnet-lite0"}
    for name, extractor in EXTRACTORS.items():
        assert extractor.name == name and extractor.title and extractor.preprocessing
        assert len(extractor.weights_sha256) == 64
    assert [name for name, extractor in EXTRACTORS.items() if extractor.is_standard] == ["inception"]
    # torch.hub's files have the first digits of their hash in their names: the pinned ones are of these files.
    assert Path(features.INCEPTION_URL).stem.endswith("-" + InceptionExtractor.weights_sha256[:8])


def test_an_unknown_extractor_is_told_the_nearest_and_weights_belong_to_one() -> None:
    with pytest.raises(ConfigError, match="no extractor 'efficientnet'; did you mean efficientnet-lite0"):
        load_extractor("efficientnet", device=CPU)
    with pytest.raises(ConfigError, match="'x'; expected one of inception, efficientnet-lite0"):
        load_extractor("x", device=CPU)
    with pytest.raises(ConfigError, match=r"--inception-weights is for --extractor inception; got it with efficient"):
        load_extractor("efficientnet-lite0", device=CPU, inception_weights=Path("a.pth"))


# EfficientNet


def test_efficientnet_recognises_photographs(efficientnet: Extractor) -> None:
    cat, coffee = (efficientnet(photograph(name)).logits[0] for name in ("chelsea", "coffee"))
    assert (cat.argmax(), coffee.argmax()) == (CAT, ESPRESSO)
    # Recorded from this network. Red and blue in turn give other values; how pixels are scaled, see below.
    assert cat[CAT].item() == pytest.approx(10.497, abs=0.01)
    assert coffee[ESPRESSO].item() == pytest.approx(10.655, abs=0.01)
    swapped = efficientnet(photograph("coffee").flip(1)).logits[0, ESPRESSO].item()
    assert swapped == pytest.approx(9.0, abs=0.1)


def test_efficientnet_sees_images_resized_as_pillow_does_and_scaled_as_the_protocol_says(
    efficientnet: Extractor,
) -> None:
    image = photograph("chelsea")
    planes = [Image.fromarray(plane.float().numpy()) for plane in image[0]]
    resized = [np.asarray(plane.resize((224, 224), Image.Resampling.BICUBIC)) for plane in planes]
    x = (torch.from_numpy(np.stack(resized))[None].clamp(0, 255) - 127) / 128
    with torch.no_grad():
        expected = efficientnet.network(x)
    torch.testing.assert_close(efficientnet(image).logits, expected, rtol=0, atol=1e-3)


def test_logits_are_the_classifier_of_the_pooled_features(efficientnet: Extractor) -> None:
    found = efficientnet(noise(2))
    assert found.pooled.dtype == found.logits.dtype == torch.float32
    assert found.pooled.shape == (2, efficientnet.dimensions) and found.logits.shape == (2, 1000)
    classifier = efficientnet.network.classifier
    assert isinstance(classifier, nn.Linear)
    torch.testing.assert_close(found.logits, found.pooled @ classifier.weight.T + classifier.bias)
    assert not found.pooled.requires_grad and (found.pooled[0] - found.pooled[1]).abs().max() > 0.01


def test_features_of_an_image_do_not_depend_on_the_batch(efficientnet: Extractor) -> None:
    images = noise(3)
    together, alone = efficientnet(images), efficientnet(images[1:2])
    torch.testing.assert_close(alone.pooled[0], together.pooled[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(alone.logits[0], together.logits[1], rtol=0, atol=1e-4)


def test_features_are_those_of_full_float32_whatever_is_set_outside(efficientnet: Extractor) -> None:
    images = noise(1)
    expected = efficientnet(images)
    seen = []
    stem = efficientnet.network.conv_stem
    assert isinstance(stem, nn.Module)
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    hook = stem.register_forward_pre_hook(lambda *_: seen.append([flag.allow_tf32 for flag in flags]))
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = True
        with torch.autocast("cpu", torch.bfloat16):
            found = efficientnet(images)
        assert seen == [[False, False]] and all(flag.allow_tf32 for flag in flags)
    finally:
        hook.remove()
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_images_that_were_not_rounded_are_refused(efficientnet: Extractor) -> None:
    with pytest.raises(ValueError, match=r"float32 \(1, 3, 32, 32\); expected images rounded to uint8"):
        efficientnet(noise(1).float())
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 32\)"):
        efficientnet(noise(1)[:, :1])


# Inception, with weights of the test's own


class Untrained(FeatureExtractorInceptionV3):  # type: ignore[misc]
    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # type: ignore[override]
        torch.manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # otherwise the signal fades, and all images look the same


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        torch.save(Untrained("untrained", ["2048"]).state_dict(), path)
    yield path
    path.unlink()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_with_another_hash_is_refused_before_it_is_read(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UserError, match=rf"random\.pth has SHA-256 {sha256(weights)} .*expected 6726825d"):
        load_extractor("inception", device=CPU, inception_weights=weights)
    with pytest.raises(UserError, match=r"none\.pth cannot be read \(No such file"):
        load_extractor("inception", device=CPU, inception_weights=weights.with_name("none.pth"))


def test_inception_equals_torch_fidelitys_on_the_same_weights(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ["2048", "logits_unbiased"]
    oracle = FeatureExtractorInceptionV3("oracle", layers, feature_extractor_weights_path=str(weights))
    images = noise(2)
    pooled, logits = oracle(images)

    read, download = torch.load, feature_extractor_inceptionv3.load_state_dict_from_url
    settings: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *a, **kw: settings.append(kw.get("weights_only")) or read(*a, **kw))
    monkeypatch.setattr(InceptionExtractor, "weights_sha256", sha256(weights))
    extractor = load_extractor("inception", device=CPU, inception_weights=weights)
    assert settings == [True]
    assert feature_extractor_inceptionv3.load_state_dict_from_url is download

    found = extractor(images)
    assert found.pooled.shape == (2, 2048) == (2, extractor.dimensions) and found.logits.shape == (2, 1008)
    torch.testing.assert_close(found.pooled, pooled, rtol=0, atol=0)
    torch.testing.assert_close(found.logits, logits, rtol=0, atol=0)
    assert (found.pooled[0] - found.pooled[1]).abs().max() > 0.01
    alone = extractor(images[1:])
    torch.testing.assert_close(alone.pooled[0], pooled[1], rtol=0, atol=1e-4)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_even_a_file_with_the_right_hash_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, target = tmp_path / "bad.pth", tmp_path / "done"
    torch.save({"a": Malicious(target)}, file)
    monkeypatch.setattr(InceptionExtractor, "weights_sha256", sha256(file))
    with pytest.raises(UserError, match="cannot be read as weights without running what is in it"):
        load_extractor("inception", device=CPU, inception_weights=file)
    assert not target.exists()


# Getting Inception's weights


def test_offline_the_error_names_the_url_the_option_and_the_other_extractor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("ATTNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(UserError, match="no network") as caught:
        load_extractor("inception", device=CPU)
    for part in (features.INCEPTION_URL, "--inception-weights FILE", "--extractor efficientnet-lite0"):
        assert part in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_weights_are_downloaded_once_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, cache = tmp_path / "published.pth", tmp_path / "cache"
    torch.save({"weight": torch.arange(600_000.0)}, file)
    built: list[dict[str, Tensor]] = []
    monkeypatch.setenv("ATTNORM_CACHE", str(cache))
    monkeypatch.setattr(features, "INCEPTION_URL", file.as_uri())
    monkeypatch.setattr(InceptionExtractor, "weights_sha256", sha256(file))
    monkeypatch.setattr(InceptionExtractor, "_build", lambda self, state: built.append(state) or nn.Identity())
    load_extractor("inception", device=CPU)
    assert f"downloading {file.as_uri()} to {cache / file.name}, 2 MiB, once" in capsys.readouterr().err
    assert [kept.name for kept in cache.iterdir()] == [file.name]
    torch.testing.assert_close(built[0]["weight"], torch.arange(600_000.0), rtol=0, atol=0)

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("it was downloaded again"))
    load_extractor("inception", device=CPU)
    assert len(built) == 2 and capsys.readouterr().err == ""
    (cache / file.name).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"published\.pth has SHA-256 .* \(7 bytes\).*remove it and get it again"):
        load_extractor("inception", device=CPU)


def test_a_download_of_other_content_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.pth").write_text("<html>sign in first</html>")
    monkeypatch.setenv("ATTNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "INCEPTION_URL", (tmp_path / "page.pth").as_uri())
    with pytest.raises(UserError, match=r"what came from file://.*page\.pth has SHA-256 .* \(26 bytes\)"):
        load_extractor("inception", device=CPU)
    assert list((tmp_path / "cache").iterdir()) == []
