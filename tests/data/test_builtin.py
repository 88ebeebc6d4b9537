import socket

import numpy as np
import pytest
from PIL import Image

from attnorm.data import builtin
from attnorm.data.builtin import builtin_photographs
from attnorm.data.images import ImageSet, builtin_images, load_images


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the built-in data set reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return builtin_images(16)


def test_classes_and_counts(data: ImageSet) -> None:
    assert data.classes == (
        "astronaut",
        "brick",
        "cameraman",
        "cat",
        "coffee",
        "coins",
        "galaxies",
        "retina",
        "rocket",
        "tissue",
    )
    assert data.images.shape == (2560, 3, 16, 16) and data.images.dtype == np.uint8
    assert np.bincount(data.labels).tolist() == [256] * 10
    assert data.labels.dtype == np.int64
    assert data.source == "builtin" and data.skipped == ()
    assert "can only memorise" in data.note
    assert len({image.tobytes() for image in data.images}) == len(data)  # every view is another


def test_same_views_every_time(data: ImageSet) -> None:
    np.random.seed(1)  # nothing global matters
    again = load_images("builtin", 16)
    assert np.array_equal(again.images, data.images)
    assert again.fingerprint == data.fingerprint


def test_views_are_crops_of_their_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a picture whose colour is its place, every view shows a square inside the allowed bounds, mirrored or not."""
    ramp = np.zeros((200, 200, 3), np.uint8)
    ramp[..., 0] = np.arange(200)
    ramp[..., 1] = np.arange(200)[:, None]
    monkeypatch.setattr(builtin, "_open", lambda file: Image.fromarray(ramp))
    views = np.stack(builtin._views(builtin._Photograph("astronaut.png", (80, 120), (100, 90)), 40)).astype(float)
    left, right = views[:, 0, 20, 2], views[:, 0, 20, -3]
    top, bottom = views[:, 1, 2, 20], views[:, 1, -3, 20]
    side = (bottom - top) * 40 / 35
    mirrored = left > right
    assert 80 < mirrored.sum() < 176
    np.testing.assert_allclose(abs(right - left) * 40 / 35, side, atol=3)
    assert side.min() > 77 and side.max() < 123 and np.ptp(side) > 30
    offset = np.stack([(left + right) / 2 - 100, (top + bottom) / 2 - 90]) / side
    assert np.abs(offset).max() < 0.12 and np.ptp(offset, axis=1).min() > 0.15


def test_photographs_are_in_colour_and_full_size() -> None:
    photographs = builtin_photographs()
    assert sorted(photographs) == list(photographs)
    assert photographs["cat"].shape == (300, 451, 3) and photographs["retina"].shape == (1411, 1411, 3)
    red, _, blue = photographs["retina"].mean((0, 1))
    assert red > 2 * blue
    assert all(photograph.dtype == np.uint8 for photograph in photographs.values())


def test_missing_photograph_is_named() -> None:
    with pytest.raises(ValueError, match=r"nobody\.png is missing from scikit-image.*reinstall"):
        builtin._open("nobody.png")
    with pytest.raises(ValueError, match="image_size=0"):
        builtin_images(0)
