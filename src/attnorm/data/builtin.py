"""The built-in data set: many views of ten photographs that scikit-image ships, so that a first run downloads nothing.

It shows that training works. With one photograph a class, there is nothing to learn but the photographs.
"""

from dataclasses import dataclass
from importlib import resources

import numpy as np
from PIL import Image

from attnorm.data.decode_cache import Decoded, fingerprint

_VIEWS = 256  # a class
_SEED = 2020
_JITTER = 0.1  # how far a subject may be off its view's centre, in sides of the view
NOTE = (
    f"Each class is {_VIEWS} views (crops at several scales and places) of one single photograph: "
    "a generator can only memorise them, and scores on them say nothing about variety."
)


@dataclass(frozen=True)
class _Photograph:
    """Where to look in a photograph, in its pixels."""

    file: str
    sides: tuple[int, int]  # smallest and largest view
    subject: tuple[int, int] | None = None  # (x, y) of its centre; None where any place will do
    may_mirror: bool = True


# Origins and terms are as scikit-image's documentation of its `data` module states them.
_PHOTOGRAPHS = {
    # Eileen Collins, NASA Great Images; public domain.
    "astronaut": _Photograph("astronaut.png", (240, 310), (225, 130)),
    # A brick wall, CC0Textures "Bricks25"; CC0.
    "brick": _Photograph("brick.png", (200, 300)),
    # A man with a camera, by Lav Varshney; CC0.
    "cameraman": _Photograph("camera.png", (280, 340), (235, 165)),
    # Chelsea the cat, by Stefan van der Walt; CC0.
    "cat": _Photograph("chelsea.png", (230, 280), (230, 140)),
    # A cup of coffee, by Rachel Michetti, courtesy of Pikolo Espresso Bar; CC0.
    "coffee": _Photograph("coffee.png", (320, 390), (275, 195)),
    # Greek coins from Pompeii, Brooklyn Museum Collection; no known copyright restrictions. Their heads look one way.
    "coins": _Photograph("coins.png", (110, 150), may_mirror=False),
    # The Hubble eXtreme Deep Field, NASA; public domain.
    "galaxies": _Photograph("hubble_deep_field.jpg", (200, 320)),
    # The fundus of a left eye, by Mikael Häggström, Wikimedia Commons; CC0.
    "retina": _Photograph("retina.jpg", (1200, 1400), (705, 705)),
    # A Falcon 9 with DSCOVR before its launch, by SpaceX; public domain.
    "rocket": _Photograph("rocket.jpg", (270, 340), (320, 265)),
    # Stained glands of the colon, Center for Microscopy and Molecular Imaging; no known copyright restrictions.
    "tissue": _Photograph("ihc.png", (180, 280)),
}


def builtin_photographs() -> dict[str, np.ndarray]:
    """The photographs in full: class name to uint8 [H, W, 3] (RGB), each of its own size.

    Raises:
        ValueError: If the installed scikit-image lacks one of them; nothing is ever downloaded.
    """
    return {name: np.array(_open(photograph.file)) for name, photograph in _PHOTOGRAPHS.items()}


def builtin_views(image_size: int) -> Decoded:
    """Square views of `image_size` pixels: the same 256 of each photograph every time.

    Raises:
        ValueError: If `image_size` is not positive or the installed scikit-image lacks a photograph.
    """
    if image_size < 1:
        raise ValueError(f"got image_size={image_size}, expected at least 1 pixel")
    classes = tuple(sorted(_PHOTOGRAPHS))
    images = np.stack([view for name in classes for view in _views(_PHOTOGRAPHS[name], image_size)])
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), _VIEWS)
    return Decoded(images, labels, classes, (), fingerprint(images, labels, classes))


def _views(photograph: _Photograph, image_size: int) -> list[np.ndarray]:
    image = _open(photograph.file)
    smallest, largest = photograph.sides
    # Averaging once what every view would shrink threefold and more spares most of the time and none of the sharpness.
    factor = max(1, smallest // (3 * image_size))
    reduced = image.reduce(factor)
    # Four uniform numbers a view from the raw stream, which NumPy keeps the same in every version.
    raw = np.random.PCG64([_SEED, *photograph.file.encode()]).random_raw(4 * _VIEWS)
    views = []
    for scale, across, down, mirror in (raw / 2.0**64).reshape(_VIEWS, 4):
        side = smallest + (largest - smallest) * scale
        room = np.array(image.size) - side
        place = np.array([across, down])
        if photograph.subject is None:
            corner = place * room
        else:
            corner = np.array(photograph.subject) + (2 * place - 1) * _JITTER * side - side / 2
        left, top = np.clip(corner, 0, room)
        box = (left / factor, top / factor, (left + side) / factor, (top + side) / factor)
        view = reduced.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box)
        if photograph.may_mirror and mirror < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        views.append(np.asarray(view).transpose(2, 0, 1))
    return views


def _open(file: str) -> Image.Image:
    # By its path and not by skimage.data's functions, which download what they do not find.
    try:
        with resources.files("skimage").joinpath("data", file).open("rb") as stream, Image.open(stream) as image:
            return image.convert("RGB")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError(
            f"the built-in photograph {file} is missing from scikit-image ({error}); "
            "reinstall it (pip install --force-reinstall scikit-image) or train on a folder of images"
        ) from error
