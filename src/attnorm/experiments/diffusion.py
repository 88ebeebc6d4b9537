"""What is a context block worth in a diffusion model that was not made for it?

A small U-Net in the preconditioning of Karras et al. (2022, "EDM") learns to take noise from images of 32 pixels. At
its maps of 16 pixels one block is inserted after a residual block on the way down and one on the way up, by
`attnorm.insert_after`, as anyone would put AN into a network that is not theirs. The arms differ in the block alone:
all start as the same function (at first no block adds anything) and see the same images, noises and levels of noise.
Two arms say what of AN it is: one entity, which leaves instance norm, and attention as diffusion models have it.

The score is the loss of the averaged weights on held-out images, each with the same noises at the same levels for every
arm and seed. Every training is a line of DIR/trainings.jsonl, written when it is done; what is there is not done again.
"""

# N images, C channels, B levels of noise.

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from attnorm import __version__
from attnorm.config import ConfigError
from attnorm.data.images import ImageSet, held_out_indices, shuffled_indices, to_float, trained_indices
from attnorm.experiments.pre_norm_attention import PreNormAttention
from attnorm.experiments.protocol import TRAININGS, keep_protocol, kept_protocol, require_known, require_own_place
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.layers.diagnose import diagnose
from attnorm.layers.linear_attention import LinearAttention2d
from attnorm.layers.replace import insert_after
from attnorm.layers.self_attention import SelfAttention2d
from attnorm.system.devices import find_precision
from attnorm.system.files import append_lines, file_lock, read_lines
from attnorm.system.provenance import commit, processor

IMAGE_SIZE = 32  # pixels
SIGMA_DATA = 0.5  # of pixels in [-1, 1]
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2  # of the levels that are trained on
HELD_OUT_EVERY = 10
TEST_SEED = 2**31
SITES = ("down.1", "up.1")
ORTHOGONALITY_WEIGHT = 1e-3  # of Eq. 1, where there is AN
CPU = torch.device("cpu")

ARMS: dict[str, tuple[str, Callable[[int], nn.Module] | None]] = {
    "none": ("none", None),
    "linear_attention": ("linear attention", LinearAttention2d),
    "self_attention": ("self-attention (SAGAN)", SelfAttention2d),
    "pre_norm_attention": (
        "self-attention (pre-norm)",
        lambda num_features: PreNormAttention(num_features, is_identity=True),
    ),
    "an_one": ("AN of one entity: instance norm", lambda num_features: AttentiveNorm2d(num_features, 1)),
    "an": ("AN", AttentiveNorm2d),
}


@dataclass(frozen=True)
class Scale:
    """How long everything takes."""

    steps: int
    batch_size: int
    width: int
    seeds: int
    lr: float
    ema_decay: float
    test_images: int
    test_levels: int
    curve_every: int  # steps between scores


SCALES = {
    "full": Scale(2_000, 32, 32, 5, 2e-3, 0.995, 256, 8, 500),
    "short": Scale(1_000, 16, 32, 5, 2e-3, 0.99, 256, 8, 250),
    "smoke": Scale(4, 4, 8, 2, 2e-3, 0.9, 4, 2, 2),
}


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution; scale and shift by the level of noise between the two."""

    def __init__(self, in_channels: int, out_channels: int, embedding: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.norm1, self.norm2 = nn.GroupNorm(8, in_channels), nn.GroupNorm(8, out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.level = nn.Linear(embedding, 2 * out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[N, in, H, W] and [N, E] -> [N, out, H, W]."""
        scale, shift = self.level(embedding)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        out: Tensor = self.skip(x) + h
        return out


class UNet(nn.Module):
    """F of EDM: one residual block a size and direction, at 32, 16 and 8 pixels for images of 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths, embedding = (width, 2 * width, 2 * width), 4 * width
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(100), width // 2)))
        self.embed = nn.Sequential(nn.Linear(2 * (width // 2), embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(
            ResidualBlock(before, after, embedding) for before, after in zip((width, *widths[:-1]), widths, strict=True)
        )
        self.middle = ResidualBlock(widths[-1], widths[-1], embedding)
        self.up = nn.ModuleList(
            ResidualBlock(below + here, here, embedding)
            for below, here in zip((*widths[1:], widths[-1]), widths, strict=True)
        )
        self.norm, self.last = nn.GroupNorm(8, width), nn.Conv2d(width, 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """[N, 3, S, S] and c_noise [N] -> [N, 3, S, S]."""
        angles = level[:, None] * self.frequencies
        embedding = F.silu(self.embed(torch.cat([angles.sin(), angles.cos()], 1)))
        h, skips = self.first(x), []
        for i, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if i else h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for i in reversed(range(len(skips))):
            h = self.up[i](torch.cat([h, skips[i]], 1), embedding)
            h = F.interpolate(h, scale_factor=2.0) if i else h
        out: Tensor = self.last(F.silu(self.norm(h)))
        return out


def make_network(arm: str, width: int, seed: int) -> UNet:
    """The U-Net of `seed` with the arm's block at SITES; without the blocks, the weights are the same for all arms."""
    torch.manual_seed(seed)
    network = UNet(width)
    block = ARMS[arm][1]
    if block is not None:
        for site in SITES:
            insert_after(network, site, block)
    return network.to(memory_format=torch.channels_last)


def denoising_loss(network: nn.Module, images: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """EDM's weighted loss of each image, [N]: mean over pixels of |F - target|^2, which is 1 for F = 0 at any level.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) is to be the image; the weight is 1 / c_out^2.

    Args:
        images: y, [N, 3, S, S] in [-1, 1].
        noise: Standard normal, of that shape.
        sigma: Its standard deviation in x = y + sigma noise, [N], positive.
    """
    s = sigma[:, None, None, None]
    total = s.square() + SIGMA_DATA**2
    c_skip, c_out, c_in = SIGMA_DATA**2 / total, s * SIGMA_DATA / total.sqrt(), total.rsqrt()
    x = images + s * noise
    target = (images - c_skip * x) / c_out
    predicted = network(c_in * x, sigma.log() / 4)
    return (predicted.float() - target).square().mean((1, 2, 3))


def levels(num: int) -> Tensor:
    """Quantiles of the levels that are trained on, in the middle of `num` equal shares, [num]."""
    shares = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    return (LOG_SIGMA_MEAN + LOG_SIGMA_STD * torch.special.ndtri(shares)).exp().float()


@torch.no_grad()
def score(network: nn.Module, images: Tensor, num_levels: int, precision: str) -> list[float]:
    """The loss at each level, a mean over the held-out images; noises are the same at every call."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    found = []
    for sigma in levels(num_levels):
        losses = []
        for part in images.split(64):
            noise = torch.randn(part.shape, generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                losses.append(denoising_loss(network, part, noise, sigma.expand(len(part))))
        found.append(torch.cat(losses).mean().item())
    return found


def train(arm: str, seed: int, scale: Scale, data: ImageSet, precision: str) -> dict[str, Any]:
    """One training; what is to be said of it."""
    network = make_network(arm, scale.width, seed)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(scale.ema_decay), use_buffers=True).eval()
    optimiser = torch.optim.Adam(network.parameters(), lr=scale.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 100, 1))
    held_out = held_out_indices(len(data), HELD_OUT_EVERY)
    seen = trained_indices(len(data), HELD_OUT_EVERY)
    tested = to_float(data.batch(held_out[: scale.test_images])[0]).contiguous(memory_format=torch.channels_last)
    blocks = [module for module in network.modules() if isinstance(module, AttentiveNorm2d)]
    curve, cpu_seconds = [], 0.0
    for step in range(scale.steps):
        generator = torch.Generator().manual_seed((seed << 32) + step)  # an arm that draws by itself disturbs no other
        places = shuffled_indices(len(seen), step * scale.batch_size, scale.batch_size, seed=seed)
        images = to_float(data.batch(seen[places])[0])
        flipped = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        images = images.contiguous(memory_format=torch.channels_last)
        sigma = (LOG_SIGMA_MEAN + LOG_SIGMA_STD * torch.randn(len(images), generator=generator)).exp()
        noise = torch.randn(images.shape, generator=generator)
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = denoising_loss(network, images, noise, sigma).mean()
        for block in blocks:
            loss = loss + ORTHOGONALITY_WEIGHT * block.orthogonality_penalty()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        cpu_seconds += time.process_time() - started
        average.update_parameters(network)
        if (step + 1) % scale.curve_every == 0 or step + 1 == scale.steps:
            of_levels = score(average, tested, scale.test_levels, precision)
            curve.append([step + 1, sum(of_levels) / len(of_levels)])
    result: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "score": curve[-1][1],
        "of_levels": of_levels,
        "curve": curve,
        "milliseconds_a_step": 1000 * cpu_seconds / scale.steps,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "precision": precision,
        "commit": commit(),
    }
    if blocks:
        sigma = levels(scale.test_levels)[scale.test_levels // 2].expand(len(tested))
        noise = torch.randn(tested.shape, generator=torch.Generator().manual_seed(TEST_SEED))
        result["sites"] = [
            {"site": line.site, "entropy": line.entropy, "rho": line.rho, "change": line.change}
            for line in diagnose(_Denoiser(average), tested, noise, sigma)
        ]
    return result


class _Denoiser(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return denoising_loss(self.network, images, noise, sigma)


Progress = Callable[[int, int, str, float], None]  # done, in all, what is next, seconds left (0: not known yet)


def run(
    out: Path,
    data: ImageSet,
    write_report: Callable[[Path], list[Path]],
    *,
    scale: str = "full",
    arms: Sequence[str] = (),
    progress: Progress = lambda done, total, name, left: None,
) -> list[Path]:
    """Trains what `out` does not hold yet, and writes the report after each seed; returns what it wrote.

    Args:
        out: trainings.jsonl, and the report.
        data: Images of 32 pixels; every tenth is held out.
        write_report: What writes the report of `out` (`write_report` of diffusion_report), and returns the files.
        scale: A name in SCALES.
        arms: Names in ARMS; none for all.

    Raises:
        ConfigError: an unknown name, a folder of another scale or of other data, or another process at work in `out`.
    """
    require_known(scale, arms, scales=SCALES, all_arms=ARMS)
    require_own_place(out)
    found = SCALES[scale]
    if len(held_out_indices(len(data), HELD_OUT_EVERY)) < found.test_images:
        raise ConfigError(
            f"got {len(data):,} images; expected {HELD_OUT_EVERY * found.test_images:,}: a tenth is held out"
        )
    jobs = [(arm, seed) for seed in range(found.seeds) for arm in ARMS if arm in arms or not arms]
    # What began in one precision goes on in it: another processor may have units for another.
    precision = kept_protocol(out).get("precision") or find_precision("auto", CPU)
    protocol = {**vars(found), "scale": scale, "data": data.fingerprint, "precision": precision}
    with file_lock(out):
        versions = {"attnorm": __version__, "torch": torch.__version__, "processor": processor()}
        threads = torch.get_num_threads()
        keep_protocol(out, {"protocol": protocol, "source": data.source, "threads": threads, **versions})
        done = {(row["arm"], row["seed"]) for row in read_lines(out / TRAININGS)}
        todo = [job for job in jobs if job not in done]
        took = 0.0
        for i, (arm, seed) in enumerate(todo):
            progress(len(jobs) - len(todo) + i, len(jobs), f"{arm}, seed {seed}", took * (len(todo) - i))
            started = time.monotonic()
            append_lines(out / TRAININGS, [train(arm, seed, found, data, precision)])
            took = time.monotonic() - started
            if i + 1 < len(todo) and todo[i + 1][1] != seed:
                write_report(out)
        return write_report(out)
