"""What a run is made of: frozen, validated dataclasses. `settings.py` reads, writes and changes them.

Standard library only, so that `attnorm --help` starts at once and a configuration can be read anywhere.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Literal, TypeVar

FORMAT_VERSION = 1

Task = Literal["class_conditional", "inpainting"]
Recipe = Literal["paper", "projected", "relativistic"]
Context = Literal["an", "self_attention", "none"]

T = TypeVar("T")


# Control characters but newline and tab, what turns the direction of writing, and halves of pairs (of bytes not UTF-8).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A name from a file, for a terminal, a page or a figure: what would steer these is shown as an escape."""

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0  # Python's way to hold a byte that is not UTF-8
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _UNPRINTABLE.sub(escape, text)


def did_you_mean(name: str, known: typing.Iterable[str], *, cutoff: float = 0.4) -> str:
    """ "did you mean X? " of the nearest of the known names, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]}? " if near else ""


class UserError(ValueError):
    """A mistake that a message can mend: the command line prints it in one line and exits with status 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(UserError):
    """A configuration that cannot be meant: the message names the key, what was got and what was expected."""


# Marks of settings. Unmarked ones must agree where a run goes on, and where runs are compared.
_ROW = {"compare": "row"}  # makes a row of a table: what is compared
_FREE = {"compare": "free"}  # changes nothing of what is learnt, or is shown beside it
_REPORTING = {"compare": "free", "resume": "free"}  # and may be another one when a run goes on


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_seed(name: str, seed: int) -> None:
    """Raises ConfigError unless 0 <= seed < 2^63; each of these means other random numbers."""
    require(0 <= seed < 2**63, f"{name} is {seed}; expected a whole number from 0 to 2^63 - 1")


@dataclass(frozen=True, kw_only=True)
class AttentiveNormConfig:
    """The options of one AttentiveNorm2d layer; see the layer for what each one does."""

    num_entities: int = 16
    # auto: the layer keeps the paper's spread of the logits by itself. None, which runs of earlier versions have:
    # 0.1 * sqrt(64 / width), the paper's 0.1 at the paper's width. See docs/paper.md, row 7.
    temperature: float | Literal["auto"] | None = "auto"
    affine: bool = True
    value_projection: bool = True
    reduction: int = 8
    statistics: Literal["weighted", "masked", "released"] = "weighted"
    moments: Literal["instance", "batch"] = "instance"
    orthogonality: Literal["cosine", "raw"] = "cosine"
    self_sampling: bool = True
    shared_sampling: bool = False
    clamp_t: bool = False
    eps: float = 1e-5
    impl: Literal["auto", "reference", "fused", "native", "triton"] = "auto"

    def __post_init__(self) -> None:
        require(self.num_entities >= 1, f"num_entities is {self.num_entities}; expected at least 1")
        require(self.reduction >= 1, f"reduction is {self.reduction}; expected at least 1")
        require(self.eps > 0, f"eps is {self.eps}; expected a positive number")
        require(
            self.temperature in (None, "auto") or float(self.temperature) > 0,
            f"temperature is {self.temperature}; expected auto, a positive number, or none for 0.1 * sqrt(64 / width)",
        )


@dataclass(frozen=True, kw_only=True)
class ClassConditionalConfig:
    """Generator and discriminator of the class-conditional task (paper, section 4)."""

    image_size: int = 128  # pixels: 32, 64, 128 or 256
    num_classes: int = 0  # 0: taken from the data set
    width: int = 64  # channels of the widest map's last block; every other width is a multiple of it
    latent_dim: int = 128
    context: Context = field(default="an", metadata=_ROW)
    # Up-blocks of G, counted from 1, that hold the context block (an or attention).
    an_blocks: tuple[int, ...] = field(default=(3,), metadata=_ROW)
    # AN in place of G's second conditional norm, or before it.
    site: Literal["replace", "insert"] = field(default="replace", metadata=_ROW)
    d_last_flat: bool = True  # keep D's last block, which does not downsample
    g_spectral_norm: bool = field(default=True, metadata=_ROW)
    d_spectral_norm: bool = field(default=True, metadata=_ROW)
    # D: projection of the label, or AC-GAN's classifier.
    head: Literal["projection", "auxiliary"] = field(default="projection", metadata=_ROW)
    an: AttentiveNormConfig = field(default_factory=AttentiveNormConfig, metadata=_ROW)
    # Channels of G's 4x4 map and after each up-block, in multiples of the width; none: SAGAN's.
    g_channels: tuple[int, ...] = ()
    latent_in_norms: bool = False  # G's conditional norms depend on the latent too, as in BigGAN
    # Of maps in G's up-blocks; bilinear: torch-mimicry's networks, whose weights `attnorm convert` reads.
    upsampling: Literal["nearest", "bilinear"] = "nearest"
    # sagan: the paper's networks. grouped: R3GAN's grouped residual blocks without normalization, of g_channels.
    architecture: Literal["sagan", "grouped"] = "sagan"

    def __post_init__(self) -> None:
        sizes = (32, 64, 128, 256)
        require(self.image_size in sizes, f"model.image_size is {self.image_size}; expected one of {sizes}")
        require(self.width >= 1, f"model.width is {self.width}; expected at least 1")
        require(self.num_classes >= 0, f"model.num_classes is {self.num_classes}; expected 0 (from the data) or more")
        require(self.latent_dim >= 1, f"model.latent_dim is {self.latent_dim}; expected at least 1")
        last = int(math.log2(self.image_size)) - 2
        require(
            not self.g_channels or (len(self.g_channels) == last + 1 and min(self.g_channels) >= 1),
            f"model.g_channels is {self.g_channels}; expected {last + 1} multiples of the width for {self.image_size} "
            "pixels, or none for SAGAN's",
        )
        require(
            self.architecture == "sagan" or bool(self.g_channels),
            "model.architecture is grouped and model.g_channels is empty; expected the widths of its stages",
        )
        for block in self.an_blocks:
            require(
                1 <= block <= last,
                f"model.an_blocks names block {block}; a {self.image_size}-pixel generator has blocks 1 to {last}",
            )

    @property
    def temperature(self) -> float | Literal["auto"]:
        """tau of Eq. 4: as set, or by the rule for None: the paper's 0.1 scaled with the width (row 7)."""
        return 0.1 * math.sqrt(64 / self.width) if self.an.temperature is None else self.an.temperature


@dataclass(frozen=True, kw_only=True)
class ProjectedConfig:
    """The recipe "projected": discriminators on features of a fixed network (Sauer et al., 2021)."""

    feature_size: int = 64  # pixels to which images are enlarged for the fixed network
    width: int = 64  # channels of the largest mixed map; the deeper ones have 2, 4 and 8 times as many
    # What discriminators see of real and generated images (Zhao et al., 2020), in this order.
    augmentations: tuple[Literal["color", "translation", "cutout"], ...] = ("color", "translation", "cutout")

    def __post_init__(self) -> None:
        require(self.feature_size >= 32, f"projected.feature_size is {self.feature_size}; expected at least 32")
        require(self.width >= 1, f"projected.width is {self.width}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class RelativisticConfig:
    """The recipe "relativistic": R3GAN (Huang et al., 2024).

    What is called last is reached from the first value, of `optim` or here, along half a cosine in `schedule_images`.
    """

    schedule_images: int = 20_000_000
    last_lr: float = 0.25  # of g_lr and d_lr, as a share of these
    last_beta2: float = 0.99
    gamma: float = 0.05  # of R1 and R2
    last_gamma: float = 0.005
    last_ema_half_life: int = 5_000_000  # images, from 0
    # What the discriminator sees of an image, each of which is changed with a probability from 0 on.
    augmentations: tuple[Literal["color", "translation", "cutout"], ...] = ("color", "translation", "cutout")
    last_augmented: float = 0.55
    context_in_discriminator: bool = False  # the context block in D too, where the map has the same size

    def __post_init__(self) -> None:
        for name in ("schedule_images", "last_ema_half_life"):
            require(getattr(self, name) >= 1, f"relativistic.{name} is {getattr(self, name)}; expected at least 1")
        for name in ("gamma", "last_gamma"):
            require(getattr(self, name) >= 0, f"relativistic.{name} is {getattr(self, name)}; expected 0 or more")
        for name, low, high in (("last_lr", 0, math.inf), ("last_beta2", 0, 1), ("last_augmented", 0, 1)):
            value = getattr(self, name)
            require(low <= value <= high, f"relativistic.{name} is {value}; expected {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class InpaintingConfig:
    """Two-stage generator and critic of the inpainting task (paper, section 4; docs/paper.md, rows 3 and 7)."""

    image_size: int = 256  # side of a training square in pixels: a multiple of 8, at least 32; inference takes any
    width: int = 32  # channels of the first convolution; every other width is a multiple of it
    # In the refinement stage.
    context: Literal["an", "an-wide", "contextual", "self_attention", "region", "none"] = field(
        default="an", metadata=_ROW
    )
    an: AttentiveNormConfig = field(default_factory=lambda: AttentiveNormConfig(affine=False), metadata=_ROW)
    # Details of DeepFill v1 as it was released for TensorFlow or ported to PyTorch, for weights that `attnorm convert`
    # reads; none: ours (docs/migration.md).
    contextual_release: Literal["none", "tensorflow", "pytorch"] = "none"

    def __post_init__(self) -> None:
        require(
            self.image_size >= 32 and self.image_size % 8 == 0,
            f"model.image_size is {self.image_size}; expected a multiple of 8, at least 32",
        )
        require(self.width >= 1, f"model.width is {self.width}; expected at least 1")
        require(
            self.contextual_release == "none" or self.context == "contextual",
            f"model.contextual_release is {self.contextual_release}, with context {self.context}; expected none, "
            "or context contextual",
        )

    @property
    def temperature(self) -> float | Literal["auto"]:
        """tau of Eq. 4: as set, or by the rule for None: the paper's 0.1 scaled with the width (row 7)."""
        return 0.1 * math.sqrt(32 / self.width) if self.an.temperature is None else self.an.temperature


@dataclass(frozen=True, kw_only=True)
class InpaintingTaskConfig:
    """Masks, losses (Eq. 9 and 10) and phases of the inpainting task; docs/paper.md, rows 17 and 18."""

    masks: Literal["rectangle", "free-form", "mixed"] = "rectangle"  # mixed: one of each in turn
    reconstruction_weight: float = 1.2  # lambda_rec of Eq. 9, on the mean L1 of both stages
    # A missing pixel counts so many times in it as a known one, which is pasted over in the end. The paper's: 1; of
    # partial convolutions (Liu et al., ECCV 2018): 6.
    hole_weight: float = 1.0
    adversarial_weight: float = 1e-3  # lambda_adv of Eq. 9, from the second phase on
    gradient_penalty_weight: float = 10.0  # lambda_gp of Eq. 10
    gp_mask: bool = False  # penalise the gradient inside the hole only
    # The first phase, reconstruction alone, lasts so many images; 0: until the validation L1 has not fallen by the
    # share `min_improvement` for `patience` validations.
    switch_images: int = 0
    patience: int = 5
    min_improvement: float = 0.01
    validation_images: int = 200  # at most so many of the held-out images, spread evenly

    def __post_init__(self) -> None:
        for name in ("reconstruction_weight", "hole_weight", "gradient_penalty_weight", "adversarial_weight"):
            value = getattr(self, name)
            require(value >= 0, f"inpainting.{name} is {value}; expected 0 or more")
        require(self.switch_images >= 0, f"inpainting.switch_images is {self.switch_images}; expected 0 or more")
        for name in ("patience", "validation_images"):
            require(getattr(self, name) >= 1, f"inpainting.{name} is {getattr(self, name)}; expected at least 1")
        require(
            0 <= self.min_improvement < 1,
            f"inpainting.min_improvement is {self.min_improvement}; expected a share, 0 <= min_improvement < 1",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    source: str = field(default="", metadata=_REPORTING)  # "builtin", a folder, a zip, shards, CIFAR-10's files
    # square: the centre square of each image. street-view: Paris StreetView's originals, whose width is kept too.
    fit: Literal["square", "street-view"] = "square"
    # Height in pixels at which images are kept; training cuts random squares of model.image_size. 0: model.image_size.
    stored_size: int = 0
    flip: bool = False  # mirror half of the training images
    held_out_every: int = 0  # 10: the tenth, twentieth, ... image by name is never trained on; 0: all are

    def __post_init__(self) -> None:
        require(self.stored_size >= 0, f"data.stored_size is {self.stored_size}; expected 0 (as the model) or more")
        require(
            self.held_out_every == 0 or self.held_out_every >= 2,
            f"data.held_out_every is {self.held_out_every}; expected 0 (none) or at least 2",
        )


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """Adam with two time scales (paper, section 5.1), and the losses' weights."""

    g_lr: float = 1e-4
    d_lr: float = 4e-4
    beta1: float = 0.0
    beta2: float = 0.999
    d_steps: int = 1  # discriminator updates per generator update
    orthogonality_weight: float = field(default=1e-3, metadata=_ROW)  # lambda_o of Eq. 1
    # The gate of a context block (rho of AN, that of attention) learns so many times as fast: docs/paper.md, row 9.
    gate_lr_scale: float = 1.0
    classifier_weight: float = 1.0  # of AC-GAN's cross-entropy
    ema_decay: float = 0.999  # per generator step, reached gradually from 0

    def __post_init__(self) -> None:
        for name in ("g_lr", "d_lr", "gate_lr_scale"):
            require(getattr(self, name) > 0, f"optim.{name} is {getattr(self, name)}; expected a positive number")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name} is {value}; expected 0 <= {name} < 1")
        require(self.d_steps >= 1, f"optim.d_steps is {self.d_steps}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The clock is images: a step adds `batch_size` to it, whatever the number of discriminator steps."""

    seed: int = field(default=0, metadata=_FREE)
    batch_size: int = 64
    # What the networks begin with: those of a run directory or a checkpoint, or the name of a model; "": the seed's.
    start_from: str = ""
    duration_images: int = field(default=6_400_000, metadata=_REPORTING)
    # Stop cleanly after so many minutes of training; 0: no limit.
    max_minutes: float = field(default=0.0, metadata=_REPORTING)
    log_every_images: int = field(default=3_200, metadata=_REPORTING)
    layout_every_images: int = field(default=16_000, metadata=_REPORTING)  # entropy and usage of the layouts
    # On the held-out images, where the task uses them.
    validate_every_images: int = field(default=16_000, metadata=_FREE)
    grid_every_images: int = field(default=64_000, metadata=_REPORTING)
    checkpoint_every_images: int = field(default=64_000, metadata=_REPORTING)
    keep_checkpoints: int = field(default=2, metadata=_REPORTING)
    device: str = field(default="auto", metadata=_REPORTING)  # auto, cpu, cuda, cuda:1, mps
    # bfloat16: autocast, weights stay float32; auto: that, where the processor multiplies it natively.
    precision: Literal["float32", "bfloat16", "auto"] = field(default="float32", metadata=_FREE)
    # NVIDIA's shorter mantissa in float32 convolutions and matrix products.
    tf32: bool = field(default=False, metadata=_FREE)
    channels_last: bool = field(default=False, metadata=_FREE)
    fused_adam: bool = field(default=True, metadata=_FREE)  # all weights in one pass; False: one after another
    foreach_ema: bool = field(default=True, metadata=_FREE)  # of the average, likewise
    # The paper's D sees real and generated images in one pass, not in two: so do the running moments of AN in it.
    joint_pass: bool = field(default=True, metadata=_FREE)
    # Doubling and halving a map is part of the convolution beside it; False: a step of its own.
    fused_resampling: bool = field(default=True, metadata=_FREE)
    # torch.compile of the networks that are differentiated once: of all but critics under a gradient penalty.
    compile: bool = field(default=False, metadata=_FREE)
    prefetch: bool = field(default=True, metadata=_REPORTING)  # a thread makes the next batch while a step runs
    # A batch is made in so many parts, one after another, in every process: the gradient is the whole batch's, with the
    # memory of a part. Batch norm and AN's running moments see a part at a time.
    accumulate: int = field(default=1, metadata=_REPORTING)
    # How many processes share the moments of batch norm: 0: all, as one process would have them; 1: each has its own.
    batch_norm_group: int = 0
    # The project on Weights & Biases that the run is sent to as well; "": nothing leaves the machine.
    wandb: str = field(default="", metadata=_REPORTING)

    def __post_init__(self) -> None:
        size = self.batch_norm_group
        require(size >= 0, f"run.batch_norm_group is {size}; expected 0 (all processes) or more")
        kinds = [f"{kind}_every_images" for kind in ("log", "layout", "grid", "checkpoint", "validate")]
        for name in ("accumulate", "batch_size", "duration_images", "keep_checkpoints", *kinds):
            require(getattr(self, name) >= 1, f"run.{name} is {getattr(self, name)}; expected at least 1")
        require(self.max_minutes >= 0, f"run.max_minutes is {self.max_minutes}; expected 0 (no limit) or more")
        require_seed("run.seed", self.seed)


MODELS: dict[Task, type[ClassConditionalConfig | InpaintingConfig]] = {
    "class_conditional": ClassConditionalConfig,
    "inpainting": InpaintingConfig,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run, resolved: what `--dry-run` prints and what the run directory keeps."""

    preset: str = field(default="", metadata=_FREE)
    # Of the tables: which presets it is one of, and which row of them; "" where these are other settings than theirs.
    family: str = field(default="", metadata=_REPORTING)
    row: str = field(default="", metadata=_REPORTING)
    task: Task = "class_conditional"
    model: ClassConditionalConfig | InpaintingConfig = field(default_factory=ClassConditionalConfig)  # the task's
    recipe: Recipe = "paper"  # of the class-conditional task: what judges, and by which losses
    inpainting: InpaintingTaskConfig | None = None  # that task's own settings
    projected: ProjectedConfig | None = None  # that recipe's
    relativistic: RelativisticConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimiserConfig = field(default_factory=OptimiserConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(
            isinstance(self.model, MODELS[self.task]) and (self.inpainting is not None) == (self.task == "inpainting"),
            f"task is {self.task}, but the other settings are not; choose a preset of that task",
        )
        require(
            (self.projected is not None) == (self.recipe == "projected")
            and (self.relativistic is not None) == (self.recipe == "relativistic")
            and (self.recipe == "paper" or self.task == "class_conditional"),
            f"recipe is {self.recipe}, but the other settings are not; choose a preset of that recipe",
        )
        require(
            self.data.stored_size == 0 or self.data.stored_size >= self.model.image_size,
            f"data.stored_size is {self.data.stored_size}; expected 0 or at least model.image_size "
            f"({self.model.image_size}), of which squares are cut from it",
        )
