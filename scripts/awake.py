"""Which temperature wakes AN? Trains small presets with every alternative and looks at each site.

    python scripts/awake.py --out awake --data demo=builtin small32-an=CIFAR10/train inpaint64-an=church224/train

One training is one line of OUT/trials.jsonl; the same command goes on where it stopped, and writes OUT/table.md. It is
an experiment, not part of the package: the alternatives to temperature="auto" live here alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import attnorm.models.class_conditional
import attnorm.models.inpainting
from attnorm import AttentiveNorm2d, entity_usage, layout_entropy, observe_layouts
from attnorm.cli.terminal import read_images
from attnorm.config import Config
from attnorm.data.images import to_uint8
from attnorm.data.stream import Stream
from attnorm.layers.attentive_norm import MOMENTUM, SPREAD
from attnorm.metrics.features import load_extractor
from attnorm.metrics.generative import Gaussian, frechet_distance
from attnorm.ops.regional_norm import regional_norm
from attnorm.ops.soft_layout import effective_entities, soft_layout
from attnorm.presets import PRESETS
from attnorm.reports.render import Document, Section, Table, to_markdown
from attnorm.settings import override
from attnorm.system.devices import find_precision, no_autocast
from attnorm.system.randomness import seed_step
from attnorm.training import trainer

ALTERNATIVES = {
    "fixed": "tau = 0.1 * sqrt(paper's width / width)",
    "learnt": "the same, learnt: exp of a parameter",
    "first": "tau set once, on the first training batch, to a spread of 1.6",
    "running": "tau from the running spread of the logits",
    "global": "features centred a channel and scaled by one running deviation",
    "channel": "features centred and scaled a channel by running moments (what the layer does)",
    "pixel": "features of each pixel scaled to an RMS of 1",
    "instance": "features standardized a channel in each image",
}
STEPS = 500
NUM_FAKES = 1_000
CPU = torch.device("cpu")


class Alternative(AttentiveNorm2d):
    """AN whose logits see the features as `name` says; everything else is the layer's, in its plain form."""

    name = "channel"

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **{**options, "impl": "auto"})
        self.fixed_temperature = 0.1 if options["temperature"] == "auto" else options["temperature"]
        self.register_buffer("feature_moments", torch.zeros(2, num_features))
        self.register_buffer("seen", torch.zeros(()))
        if self.name == "learnt":
            self.log_tau = nn.Parameter(torch.tensor(math.log(self.fixed_temperature)))

    def layout(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        if self.name == "channel":
            return super().layout(x, generator=generator)
        with no_autocast(x):
            features, tau = self._as_logits_see(x.float())
            _, filters, offset = self._logits(features, generator)  # of temperature 1
            return soft_layout(features, tau * filters, tau * offset)

    def forward(self, x: Tensor, *, return_layout: bool = False, generator: torch.Generator | None = None) -> Any:
        if self.name == "channel":
            return super().forward(x, return_layout=return_layout, generator=generator)
        with no_autocast(x):
            if self.training:
                self._observe(x.float())
            layout = self.layout(x, generator=generator)
        value = x if self.value is None else self.value(x)
        with no_autocast(x):
            x_bar = regional_norm(value, layout, self.weight, self.bias, eps=self.eps)
            return (self.rho * x_bar + x).to(x.dtype)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if self.name in ("first", "running"):
            spread = torch.einsum("kc,nchw->nkhw", self.entities.weight[:, :, 0, 0], x).var(1, correction=0).mean()
            new = spread.expand_as(self.feature_moments)
        else:
            new = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        self.seen += 1
        least = 0.0 if self.name == "first" else MOMENTUM
        self.feature_moments.lerp_(new, float(self.seen == 1) if least == 0 else max(1 / self.seen.item(), least))

    def _as_logits_see(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        by_channels = SPREAD / math.sqrt(self.num_features)
        match self.name:
            case "fixed":
                return x, self.fixed_temperature
            case "learnt":
                return x, self.log_tau.exp()
            case "first" | "running":
                return x, SPREAD / self.feature_moments[0, 0].clone().sqrt() if self.seen else self.fixed_temperature
            case "global":
                mean, square = self.feature_moments.clone()
                deviation = (square - mean.square()).mean().add(1e-12).sqrt() if self.seen else torch.ones(())
                return (x - mean[:, None, None]) / deviation, by_channels
            case "pixel":
                return x * (x.square().mean(1, keepdim=True) + 1e-12).rsqrt(), by_channels
            case "instance":
                var, mean = torch.var_mean(x, (2, 3), keepdim=True, correction=0)
                return (x - mean) * (var + 1e-12).rsqrt(), by_channels
        raise ValueError(self.name)


@torch.no_grad()
def look(config: Config, task: Any, stream: Stream) -> dict[str, dict[str, float]]:
    """Entropy, entities in use, rho and spread at every site, on the batch that is next, in evaluation mode."""
    state, found = task.state, {}
    seed_step(0, state.images_seen)
    batch = stream.batch(task.position(state.images_seen))
    for name, network in state.networks.items():
        if name == "critic":
            continue
        with observe_layouts(network.eval()) as seen:
            if config.task == "inpainting":
                network(batch.images, task._holes_of(batch).masks)
            elif name == "generator":
                network(torch.randn(len(batch.labels), config.model.latent_dim), batch.labels)
            else:
                network(batch.images, batch.labels)
        network.train()
        for site, (_, layout) in seen.items():
            logits = layout.clamp_min(torch.finfo(layout.dtype).tiny).log()
            found[f"{name}.{site}"] = {
                "entropy": layout_entropy(layout).item(),
                "usage": effective_entities(entity_usage(layout).tolist()),
                "rho": network.get_submodule(site).rho.item(),
                "spread": logits.std(1, correction=0).square().mean().sqrt().item(),
            }
    return found


def features_of(images: Tensor, extractor: Any) -> Tensor:
    return torch.cat([extractor(some).pooled for some in images.split(50)])


@torch.no_grad()
def score(config: Config, task: Any, images: Any, real: Path) -> float:
    """Of the averaged generator, less is better: in inpainting the validation L1 in the hole, else the Fréchet distance
    of 1,000 images on EfficientNet-Lite0's features.
    """
    if config.task == "inpainting":
        return task.validate(task.state.images_seen)["validation/hole_l1"]
    extractor = load_extractor("efficientnet-lite0", device=CPU)
    if not real.exists():
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:3_000].numpy()
        save_file({"pooled": features_of(images.batch(chosen)[0], extractor)}, real)
    torch.manual_seed(7)
    labels = torch.arange(50) % config.model.num_classes
    network = task.average.network
    fakes = [to_uint8(network(torch.randn(50, config.model.latent_dim), labels)) for _ in range(NUM_FAKES // 50)]
    kept = load_file(real)["pooled"]
    fake = features_of(torch.cat(fakes), extractor)
    return float(frechet_distance(Gaussian.from_features(kept), Gaussian.from_features(fake)))


def trial(preset: str, source: str, alternative: str, seed: int, more: list[str], real: Path) -> dict[str, Any]:
    Alternative.name = alternative
    for module in (attnorm.models.class_conditional, attnorm.models.inpainting):
        module.AttentiveNorm2d = Alternative  # type: ignore[attr-defined]
    tau = "auto" if alternative == "channel" else "none"
    settings = [f"data.source={source}", f"run.seed={seed}", f"model.an.temperature={tau}", *more]
    config = override(PRESETS[preset][1], settings)
    images = read_images(config)
    config = trainer.resolve(config, images)
    torch.manual_seed(seed)
    task = trainer.make_task(config, images, CPU)
    for network in [*task.state.networks.values(), *(average.network for average in task.state.averages.values())]:
        for module in network.modules():
            if isinstance(module, Alternative) and alternative != "channel":
                module.temperature = 1.0
    stream, state, begun = Stream(config, images, CPU), task.state, time.perf_counter()
    precision = find_precision(config.run.precision, CPU)
    for _ in range(STEPS):
        seed_step(seed, state.images_seen)
        for index, phase in enumerate(task.phases(state.images_seen)):
            batch = stream.batch(task.position(state.images_seen) + index * config.run.batch_size)
            trainer.run_phase(phase, state, batch, precision=precision)
        state.finish_step(config.run.batch_size)
    return {
        "preset": preset,
        "alternative": alternative,
        "seed": seed,
        "sites": look(config, task, stream),
        "score": score(config, task, images, real),
        "seconds": round(time.perf_counter() - begun, 1),
        "precision": precision,
    }


def table(trials: list[dict[str, Any]]) -> str:
    """Means over seeds, with the smallest and the largest."""

    def cell(values: list[float], digits: int) -> str:
        mean = f"{sum(values) / len(values):.{digits}f}"
        return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"

    header = ("tau", "seeds", "score", "entropy", "in use, of 16", "abs(rho)", "spread")
    tables = []
    for preset in dict.fromkeys(each["preset"] for each in trials):
        mine = [each for each in trials if each["preset"] == preset]
        groups = {name: [each for each in mine if each["alternative"] == name] for name in ALTERNATIVES}
        for site in mine[0]["sites"]:
            rows = []
            for name, group in groups.items():
                if group:
                    score = cell([each["score"] for each in group], 4 if preset.startswith("in") else 1)
                    seen = [
                        cell([abs(each["sites"][site][key]) for each in group], digits)
                        for key, digits in (("entropy", 2), ("usage", 1), ("rho", 3), ("spread", 2))
                    ]
                    rows.append((name, str(len(group)), score, *seen))
            tables.append(Table(f"{preset}, {site}", header, tuple(rows)))
    return to_markdown(Document("Which temperature wakes AN", (Section("", tables=tuple(tables)),)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True, metavar="PRESET=SOURCE")
    parser.add_argument("--alternatives", nargs="+", choices=list(ALTERNATIVES), default=list(ALTERNATIVES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="as in attnorm train; another OUT")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "trials.jsonl"
    trials = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(each["preset"], each["alternative"], each["seed"]) for each in trials}
    sources = dict(pair.split("=", 1) for pair in arguments.data)
    wanted = [
        (preset, alternative, seed)
        for seed in range(arguments.seeds)
        for preset in sources
        for alternative in arguments.alternatives
    ]
    for number, key in enumerate(wanted, start=1):
        if key in done:
            continue
        print(f"{number} of {len(wanted)}: {key}", flush=True)
        preset, alternative, seed = key
        trials.append(
            trial(
                preset, sources[preset], alternative, seed, arguments.set, arguments.out / f"{preset}-real.safetensors"
            )
        )
        with file.open("a") as lines:
            lines.write(json.dumps(trials[-1]) + "\n")
        (arguments.out / "table.md").write_text(table(trials))


if __name__ == "__main__":
    main()
