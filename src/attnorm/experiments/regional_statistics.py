"""What is a context block worth where the answer lies elsewhere in the image, among pixels of the same kind?

The task. An image is a grid of cells. Each cell has one of K textures, which are the same in all images; in an image
each texture has one random colour and contrast. In some of the cells colour and contrast are hidden, while the texture
is seen everywhere: what is missing there is a statistic of the region of the same texture, elsewhere. Cells of that
texture whose colour is seen are at least `distance` cells away, beyond the reach of the convolutions.

The network. Two 3x3 convolutions, one context block, two 3x3 convolutions; the arms differ in the block alone, and
networks of one seed start with the same weights around it and see the same images.

Each arm has the learning rate that was best for it at the base setting, on a seed and images of their own. Every
training is a line of DIR/trainings.jsonl, written when it is done; what is there is not done again. Folders of
different arms become one when their lines do.
"""

# N images, K textures, G cells a side, S pixels a side, C channels of the block.

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from attnorm import __version__
from attnorm.benchmark.timing import peak_bytes
from attnorm.experiments.pre_norm_attention import PreNormAttention
from attnorm.experiments.protocol import TRAININGS, keep_protocol, require_known, require_own_place
from attnorm.experiments.regional_images import CELL, Examples, Setting, as_picture, draw_examples, hidden_error
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.layers.gate import new_gate
from attnorm.layers.linear_attention import LinearAttention2d
from attnorm.layers.region_norm import RegionNorm2d
from attnorm.layers.self_attention import SelfAttention2d
from attnorm.ops.soft_layout import effective_entities, entity_usage, layout_entropy
from attnorm.system.files import append_lines, file_lock, read_lines, write_atomically, write_json
from attnorm.system.provenance import commit, processor

CHANNELS = 32  # C
REACH = 4  # pixels: of the four 3x3 convolutions together
TRAINED_AT = 64  # S
GATE_LR_SCALE = 100  # how many times as fast the scalar that opens a block learns: see docs/paper.md, row 9
ORTHOGONALITY_WEIGHT = 1e-3  # of Eq. 1, where there is AN
NUM_PICTURES = 4
LEARNING_RATES = (2e-3, 5e-3, 1e-2)  # of Adam; each arm has the best of them
TUNING_SEED, TEST_SEED = 2**30, 2**31  # beyond those of the trainings

# The arms


class Residual(nn.Module):
    """x + gate * block(x), the gate 0 at first: how AN stands in a network, for a norm that is published bare."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.gate = block, new_gate()

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        out: Tensor = x + self.gate * self.block(x, *mask)
        return out


class Arm(NamedTuple):
    """A block, and how its network is trained."""

    title: str
    build: Callable[[Setting], nn.Module]
    sees_mask: bool = False


def _an(temperature: float | Literal["auto"]) -> Callable[[Setting], nn.Module]:
    return lambda setting: AttentiveNorm2d(CHANNELS, setting.num_entities, temperature=temperature)


ARMS = {
    "none": Arm("none", lambda setting: nn.Identity()),
    "instance_norm": Arm("instance norm", lambda setting: Residual(nn.InstanceNorm2d(CHANNELS, affine=True))),
    "squeeze_excitation": Arm("squeeze-excitation", lambda setting: SqueezeExcitation(CHANNELS, CHANNELS // 4)),
    "region_learned": Arm("region norm, learned", lambda setting: Residual(RegionNorm2d(CHANNELS, regions="learned"))),
    "region_mask": Arm("region norm, known mask", lambda setting: Residual(RegionNorm2d(CHANNELS)), sees_mask=True),
    "linear_attention": Arm("linear attention", lambda setting: LinearAttention2d(CHANNELS)),
    "self_attention": Arm("self-attention (SAGAN)", lambda setting: SelfAttention2d(CHANNELS)),
    "pre_norm_attention": Arm("self-attention (pre-norm)", lambda setting: PreNormAttention(CHANNELS)),
    "an_fixed": Arm("AN, tau 0.1", _an(0.1)),
    "an": Arm("AN", _an("auto")),
}


class Network(nn.Module):
    """Two 3x3 convolutions, the block, two 3x3 convolutions."""

    def __init__(self, arm: Arm, setting: Setting) -> None:
        super().__init__()

        def convolutions(*channels: int) -> Iterator[nn.Module]:
            for width, following in itertools.pairwise(channels):
                yield nn.Conv2d(width, following, 3, padding=1)
                yield nn.ReLU()

        self.before = nn.Sequential(*list(convolutions(3 + 1 + CELL**2 + 1, CHANNELS, CHANNELS))[:-1])
        self.after = nn.Sequential(nn.ReLU(), *list(convolutions(CHANNELS, CHANNELS, 3))[:-1])
        self.block = arm.build(setting)  # last, so that its random numbers come after those of what surrounds it
        self.sees_mask = arm.sees_mask

    def forward(self, shown: Tensor) -> Tensor:
        """[N, 21, S, S] -> [N, 3, S, S]."""
        h = self.before(shown)
        out: Tensor = self.after(self.block(h, shown[:, -1:]) if self.sees_mask else self.block(h))
        return out


# One training


@dataclass(frozen=True)
class Scale:
    """How long everything takes."""

    steps: int
    batch_size: int
    seeds: int
    test_images: dict[int, int]  # by their size; beyond TRAINED_AT at the base setting alone
    settings: tuple[Setting, ...]  # the base first
    cost_sizes: tuple[int, ...]
    cost_seconds: float  # of timing, a block and size


BASE = Setting()
SWEEPS: dict[str, tuple[Setting, ...]] = {
    "num_textures": tuple(replace(BASE, num_textures=count) for count in (2, 4, 8, 16, 32, 64)),
    "distance": tuple(replace(BASE, distance=distance) for distance in (1, 3, 6)),
    "num_entities": tuple(replace(BASE, num_entities=count) for count in (4, 8, 16, 32, 64)),
}
SCALES = {
    "full": Scale(
        steps=600,
        batch_size=4,
        seeds=5,
        test_images={64: 64, 128: 16, 256: 4, 512: 1},
        settings=tuple(dict.fromkeys([BASE, *(setting for sweep in SWEEPS.values() for setting in sweep)])),
        cost_sizes=(64, 128, 256, 512),
        cost_seconds=2.0,
    ),
    # In the 600 steps of `full` nothing is learnt where textures are as many as entities, or more.
    "long": Scale(
        steps=3_000,
        batch_size=4,
        seeds=3,
        test_images={64: 64},
        settings=(BASE, *(setting for setting in SWEEPS["num_textures"] if setting.num_textures >= BASE.num_entities)),
        cost_sizes=(64,),
        cost_seconds=2.0,
    ),
    "smoke": Scale(
        steps=3,
        batch_size=1,
        seeds=2,
        test_images={64: 2, 128: 1},
        settings=(BASE, replace(BASE, num_textures=4), replace(BASE, num_entities=4)),
        cost_sizes=(16, 32),
        cost_seconds=0.001,
    ),
}


class Job(NamedTuple):
    """One training."""

    arm: str
    setting: Setting
    seed: int
    lr: float = 0.0  # 0: the arm's best; a tuning is of another

    def __str__(self) -> str:
        if self.lr:
            return f"tuning {self.arm}, learning rate {self.lr:g}"
        return f"{self.arm}, {self.setting.name}, seed {self.seed}"


def jobs(scale: Scale, arms: Sequence[str]) -> list[Job]:
    """Learning rates first, then a seed after the other, the base setting first; where n alone is another, only AN."""
    tuning = [Job(arm, BASE, TUNING_SEED, lr) for arm in arms for lr in LEARNING_RATES]
    return tuning + [
        Job(arm, setting, seed)
        for seed in range(scale.seeds)
        for setting in scale.settings
        for arm in arms
        if setting.num_entities == BASE.num_entities or arm == "an"
    ]


def train(job: Job, scale: Scale, lr: float) -> tuple[Network, dict[str, Any]]:
    """A trained network, in evaluation mode, and what is to be said of its training."""
    arm = ARMS[job.arm]
    torch.manual_seed(job.seed)
    network = Network(arm, job.setting).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(job.seed)
    optimiser = torch.optim.Adam(_groups(network, lr), betas=(0.9, 0.99))
    warm_up, decay_from = max(scale.steps // 30, 1), 0.7 * scale.steps

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, 1, max((scale.steps - step) / (scale.steps - decay_from), 0))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    losses = []
    started = time.process_time()
    for _ in range(scale.steps):
        examples = draw_examples(scale.batch_size, TRAINED_AT, job.setting, generator)
        predicted = network(examples.shown.contiguous(memory_format=torch.channels_last))
        error = hidden_error(predicted, examples)
        # What is seen is to be predicted too: so the path of the colours through the network is learnt at once.
        loss = error + (predicted - examples.images).abs().mean()
        if isinstance(network.block, AttentiveNorm2d):
            loss = loss + ORTHOGONALITY_WEIGHT * network.block.orthogonality_penalty()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(error.detach())
    parts = torch.stack(losses).chunk(10)
    curve = [part.mean().item() for part in parts]
    return network.eval(), {
        "error_while_training": curve,
        "cpu_seconds": time.process_time() - started,
        "lr": lr,
    }


def _groups(network: Network, lr: float) -> list[dict[str, Any]]:
    """Of the optimizer: the gate of the block, where it has one, has a learning rate of its own."""
    gates = [gate for name, gate in network.block.named_parameters() if name in ("rho", "gate")]
    others = [parameter for parameter in network.parameters() if all(parameter is not gate for gate in gates)]
    return [{"params": others, "lr": lr}, {"params": gates, "lr": GATE_LR_SCALE * lr}][: 2 if gates else 1]


def images_for_testing(setting: Setting, size: int, num: int, seed: int = TEST_SEED) -> Iterator[Examples]:
    """The same for all arms and seeds of training, one at a time."""
    generator = torch.Generator().manual_seed(seed + size)
    for _ in range(num):
        yield draw_examples(1, size, setting, generator)


@torch.no_grad()
def evaluate(network: Network, setting: Setting, num_images: dict[int, int], seed: int = TEST_SEED) -> dict[str, Any]:
    """Errors by image size, and what AN saw at the size of the training."""
    errors: dict[str, float] = {}
    layouts = []
    for size, num in num_images.items():
        if size != TRAINED_AT and setting != BASE:
            continue
        of_images = []
        for examples in images_for_testing(setting, size, num, seed):
            shown = examples.shown.contiguous(memory_format=torch.channels_last)
            of_images.append(hidden_error(network(shown), examples).item())
            if isinstance(network.block, AttentiveNorm2d) and size == TRAINED_AT:
                layouts.append(network.block.layout(network.before(shown)))
        errors[str(size)] = sum(of_images) / len(of_images)
    if not layouts:
        return {"errors": errors}
    assert isinstance(network.block, AttentiveNorm2d)
    layout = torch.cat(layouts)
    usage = entity_usage(layout)
    return {
        "errors": errors,
        "entropy": layout_entropy(layout).item(),
        "entities_in_use": effective_entities(usage.tolist()),
        "rho": network.block.rho.item(),
    }


def cost(arm: str, size: int, seconds: float) -> dict[str, Any]:
    """The block alone, forward, in evaluation mode, on one feature map of `size` pixels a side: milliseconds (median),
    runs, and the most bytes held beyond weights and input.
    """
    torch.manual_seed(0)
    block = ARMS[arm].build(BASE).eval()
    x = torch.randn(1, CHANNELS, size, size).contiguous(memory_format=torch.channels_last)
    arguments = (x, torch.zeros(1, 1, size, size)) if ARMS[arm].sees_mask else (x,)
    times: list[float] = []
    with torch.inference_mode():
        peak = peak_bytes(lambda: block(*arguments))
        end = time.perf_counter() + seconds  # and not a sum of times, which the block that is none would not reach
        while len(times) < 3 or time.perf_counter() < end:
            started = time.perf_counter()
            block(*arguments)
            times.append(time.perf_counter() - started)
    return {"milliseconds": 1000 * statistics.median(times), "runs": len(times), "peak_bytes": peak}


# All of them


Progress = Callable[[int, int, str, float], None]  # done, in all, what is next, seconds left (0: not known yet)


def run(
    out: Path,
    write_report: Callable[[Path], list[Path]],
    *,
    scale: str = "full",
    arms: Sequence[str] = (),
    progress: Progress = lambda done, total, name, left: None,
) -> list[Path]:
    """Trains and times what `out` does not hold yet, and writes the report after each seed; returns what it wrote.

    Args:
        out: trainings.jsonl, cost/*.json, one a block, predictions/*.png, and the report.
        write_report: What writes the report of `out` (`write_report` of regional_report), and returns the files.
        scale: A name in SCALES.
        arms: Names in ARMS; none for all.

    Raises:
        ConfigError: an unknown name, a folder of another scale, or another process at work in `out`.
    """
    require_known(scale, arms, scales=SCALES, all_arms=ARMS)
    require_own_place(out)
    found = SCALES[scale]
    wanted = [name for name in ARMS if name in arms or not arms]
    with file_lock(out):
        for folder in ("cost", "predictions"):
            (out / folder).mkdir(exist_ok=True)
        keep_protocol(out, _about(scale))
        rows = read_lines(out / TRAININGS)
        done = {_job_of(row) for row in rows}
        todo = [job for job in jobs(found, wanted) if job not in done]
        total, taken = len(jobs(found, wanted)), _seconds_taken(rows)
        for i, job in enumerate(todo):
            left = sum(taken.get(later.arm, taken.get("", 0.0)) for later in todo[i:])
            progress(total - len(todo) + i, total, str(job), left)
            started = time.monotonic()
            network, training = train(job, found, job.lr or best_learning_rate(out, job.arm))
            if job.lr:
                tested = evaluate(network, BASE, {TRAINED_AT: found.test_images[TRAINED_AT]}, TUNING_SEED)
            else:
                tested = evaluate(network, job.setting, found.test_images)
            if job.setting == BASE and job.seed == 0:
                _save_predictions(network, out / "predictions" / f"{job.arm}.png")
            seconds = time.monotonic() - started
            taken[job.arm] = taken[""] = seconds
            result = {
                **{"arm": job.arm, "setting": asdict(job.setting), "seed": job.seed},
                "is_tuning": bool(job.lr),
                **training,
                **tested,
                "parameters": sum(parameter.numel() for parameter in network.block.parameters()),
                "seconds": seconds,
                "commit": commit(),
            }
            append_lines(out / TRAININGS, [result])
            if i + 1 < len(todo) and todo[i + 1].seed != job.seed:
                write_report(out)
        for arm in wanted:
            if not (out / "cost" / f"{arm}.json").exists():
                progress(total, total, f"cost of {arm}", 0.0)
                cells = {str(size): cost(arm, size, found.cost_seconds) for size in found.cost_sizes}
                write_json(out / "cost" / f"{arm}.json", cells)
        return write_report(out)


def _about(scale: str) -> dict[str, Any]:
    found = SCALES[scale]
    return {
        "protocol": {
            "scale": scale,
            "steps": found.steps,
            "batch_size": found.batch_size,
            "seeds": found.seeds,
            "test_images": {str(size): num for size, num in found.test_images.items()},
            "learning_rates": list(LEARNING_RATES),
            "channels": CHANNELS,
            "cell": CELL,
            "reach": REACH,
            "gate_lr_scale": GATE_LR_SCALE,
            "orthogonality_weight": ORTHOGONALITY_WEIGHT,
        },
        "commit": commit(),
        "attnorm": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }


def _job_of(row: Mapping[str, Any]) -> Job:
    return Job(row["arm"], Setting(**row["setting"]), row["seed"], row["lr"] if row["is_tuning"] else 0.0)


def _seconds_taken(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of a training, by arm, from those that were done; "" for any."""
    taken: dict[str, float] = {}
    for row in rows:
        taken[row["arm"]] = taken[""] = row["seconds"]
    return taken


def read_results(out: Path, *, tuning: bool = False) -> list[dict[str, Any]]:
    """What trainings said of themselves: those that are measured, or those that chose the learning rates."""
    return [row for row in read_lines(out / TRAININGS) if row["is_tuning"] == tuning]


def best_learning_rate(out: Path, arm: str) -> float:
    """Of the tuning's."""
    rows = [row for row in read_results(out, tuning=True) if row["arm"] == arm]
    return float(min(rows, key=lambda row: row["errors"][str(TRAINED_AT)])["lr"])


def example_images() -> Examples:
    """The test images whose predictions are kept: of the base setting, at the size of the training."""
    parts = list(images_for_testing(BASE, TRAINED_AT, NUM_PICTURES))
    return Examples(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@torch.no_grad()
def _save_predictions(network: Network, path: Path) -> None:
    """Side by side, the predictions in the hidden cells and the truth around them."""
    examples = example_images()
    predicted = torch.where(examples.hidden, network(examples.shown), examples.images)
    strip = as_picture(torch.cat(list(predicted), 2))
    write_atomically(path, lambda temporary: Image.fromarray(strip).save(temporary, format="PNG"))
