"""Train a small classifier on a class-folder data set, or score a generator with one that was trained.

    python scripts/classifier.py train --data cifar10/train --held-out cifar10/test --out classifier.safetensors
    python scripts/classifier.py score RUN --classifier classifier.safetensors --held-out cifar10/test --num 2000
    python scripts/classifier.py nearest RUN --classifier classifier.safetensors --data cifar10/train --out nearest.png

It is a judge that has nothing to do with the networks that generators are trained against: its accuracy on generated
images of a class says whether they show that class, beside its accuracy on held-out photographs, and the Fréchet
distance on its 256 features is what short trials are compared by. `nearest` shows beside samples the training images
that are nearest to them, by its features and by pixels: whether a generator remembers. A ResNet of nine
convolutions for 32 pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attnorm.data.images import ImageSet, load_images, shuffled_indices, to_float
from attnorm.system.devices import find_precision
from attnorm.system.randomness import seed_step, seed_weights

SIDE, WIDTHS, BATCH = 32, (32, 64, 128, 256), 128


class Classifier(nn.Module):
    """Pre-activation residual blocks (He et al., 2016), a stage a width, each but the first halving the map."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        before = WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            self.blocks.append(_Block(before, width, stride=2 if stage else 1))
            before = width
        self.norm = nn.BatchNorm2d(before)
        self.linear = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, 32, 32] in [-1, 1] -> features [N, 256] and logits [N, Y]."""
        h = self.stem(images)
        for block in self.blocks:
            h = block(h)
        features = F.relu(self.norm(h)).mean((2, 3))
        return features, self.linear(features)


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 or before != after else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(h))))


@torch.no_grad()
def look(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features float64 [N, 256] and the winning class [N] of uint8 images."""
    parts = [classifier(to_float(part).to(memory_format=torch.channels_last)) for part in images.split(200)]
    features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    return features.double(), logits.argmax(1)


def train(data: ImageSet, held_out: ImageSet, out: Path, epochs: int, seed: int) -> None:
    seed_weights(seed)
    classifier = Classifier(len(data.classes)).to(memory_format=torch.channels_last)
    steps = epochs * len(data) // BATCH
    optimiser = torch.optim.SGD(classifier.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, total_steps=steps, pct_start=0.2)
    is_short = find_precision("auto", torch.device("cpu")) == "bfloat16"
    begin = time.perf_counter()
    for step in range(steps):
        seed_step(seed, step)
        pixels, labels = data.batch(shuffled_indices(len(data), step * BATCH, BATCH, seed=seed))
        images = F.pad(to_float(pixels), (4, 4, 4, 4), mode="reflect")
        top, left = torch.randint(9, (2,)).tolist()  # one cut a batch: it is cheap, and there are many batches
        images = images[:, :, top : top + SIDE, left : left + SIDE]
        images = torch.where((torch.rand(BATCH) < 0.5)[:, None, None, None], images.flip(3), images)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_short):
            _, logits = classifier(images.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            print(
                f"step {step + 1} of {steps}, loss {loss.item():.3f}, {time.perf_counter() - begin:.0f} s", flush=True
            )
    classifier.eval()
    accuracy = accuracy_on(classifier, held_out)
    about = {
        "classes": list(data.classes),
        "held_out_accuracy": accuracy,
        "epochs": epochs,
        "seed": seed,
        "data": data.fingerprint,
        "held_out": held_out.fingerprint,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(plain, out, {"classifier": json.dumps(about)})
    print(json.dumps(about))


def accuracy_on(classifier: Classifier, data: ImageSet) -> float:
    _, found = look(classifier, torch.from_numpy(np.ascontiguousarray(data.images)))
    return (found.numpy() == data.labels).mean().item()


def load(path: Path) -> tuple[Classifier, dict]:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["classifier"])
        classifier = Classifier(len(about["classes"]))
        classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return classifier.to(memory_format=torch.channels_last).eval(), about


def frechet(a: Tensor, b: Tensor) -> float:
    """Between Gaussians of the features' moments; the trace of the root by singular values of centred factors."""
    centred = [(part - part.mean(0)) / math.sqrt(len(part) - 1) for part in (a, b)]
    root = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() if len(a) * len(b) < 1e6 else _root(*centred)
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + centred[0].square().sum() + centred[1].square().sum() - 2 * root).item()


def _root(a: Tensor, b: Tensor) -> Tensor:
    """sum of singular values of A B^T, from the eigenvalues of (A^T A)^(1/2) (B^T B) (A^T A)^(1/2)."""
    values, vectors = torch.linalg.eigh(a.T @ a)
    half = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return torch.linalg.eigvalsh(half @ (b.T @ b) @ half).clamp_min(0).sqrt().sum()


def score(run: Path, classifier: Classifier, about: dict, real: Tensor, num: int) -> dict:
    """Of the averaged generator: as many images of each class, seeds from 0 on; `real` are features of real images."""
    from attnorm.inference import Sampler

    sampler = Sampler(run)
    if list(sampler.classes) != about["classes"]:
        raise SystemExit(f"{run} has classes {sampler.classes}; the classifier {about['classes']}")
    labels = [index % len(sampler.classes) for index in range(num)]
    images = torch.cat(list(sampler.batches(range(num), labels)))
    features, found = look(classifier, images)
    right = found == torch.tensor(labels)
    of_class = {
        name: right[torch.tensor(labels) == index].double().mean().item() for index, name in enumerate(about["classes"])
    }
    return {
        "run": str(run),
        "images_seen": sampler.header.images_seen,
        "seconds": sampler.header.seconds,
        "num": num,
        "accuracy": right.double().mean().item(),
        "accuracy_of_class": of_class,
        "held_out_accuracy": about["held_out_accuracy"],
        "frechet_classifier": frechet(features, real),
    }


def nearest(run: Path, classifier: Classifier, data: ImageSet, out: Path, num: int = 10) -> dict:
    """Draws a sample of each class, and of the training images the two nearest by features and the two by pixels.

    Returns the median, over 10 `num` samples, of the distance to the nearest training image by pixels (root mean square
    of 0 to 255), beside the same of training images to the others.
    """
    from attnorm.inference import Sampler
    from attnorm.reports.figures import images_figure, save_figure

    sampler = Sampler(run)
    count = len(sampler.classes)
    labels = [index % count for index in range(10 * num)]
    made = torch.cat(list(sampler.batches(range(10 * num), labels)))
    real = torch.from_numpy(np.ascontiguousarray(data.images))
    own = real[torch.linspace(0, len(real) - 1, 10 * num).long()]
    features, _ = look(classifier, real)
    by_features = torch.cdist(look(classifier, made)[0], features).topk(2, largest=False).indices
    pixels = real.flatten(1).float()
    apart = torch.cdist(made.flatten(1).float(), pixels).topk(2, largest=False)
    apart_real = torch.cdist(own.flatten(1).float(), pixels).topk(2, largest=False)
    rows = [[made[i], *real[by_features[i]], *real[apart.indices[i]]] for i in range(num)]
    save_figure(images_figure(rows, [sampler.classes[label] for label in labels[:num]]), out)
    scale = pixels.shape[1] ** 0.5
    return {
        "rms_to_nearest": (apart.values[:, 0].median() / scale).item(),
        "rms_of_real_to_nearest_other": (apart_real.values[:, 1].median() / scale).item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    training, scoring = commands.add_parser("train"), commands.add_parser("score")
    remembering = commands.add_parser("nearest")
    remembering.add_argument("run", type=Path)
    remembering.add_argument("--classifier", type=Path, required=True)
    remembering.add_argument("--data", required=True)
    remembering.add_argument("--out", type=Path, required=True)
    training.add_argument("--data", required=True)
    training.add_argument("--epochs", type=int, default=8)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--out", type=Path, required=True)
    scoring.add_argument("runs", type=Path, nargs="+")
    scoring.add_argument("--classifier", type=Path, required=True)
    scoring.add_argument("--num", type=int, default=2000)
    for command in (training, scoring):
        command.add_argument("--held-out", required=True)
    arguments = parser.parse_args()
    if arguments.command == "nearest":
        classifier, _ = load(arguments.classifier)
        print(json.dumps(nearest(arguments.run, classifier, load_images(arguments.data, SIDE), arguments.out)))
        return
    held_out = load_images(arguments.held_out, SIDE)
    if arguments.command == "train":
        train(load_images(arguments.data, SIDE), held_out, arguments.out, arguments.epochs, arguments.seed)
        return
    classifier, about = load(arguments.classifier)
    real, _ = look(classifier, torch.from_numpy(np.ascontiguousarray(held_out.images)))
    for run in arguments.runs:
        print(json.dumps(score(run, classifier, about, real, arguments.num)), flush=True)


if __name__ == "__main__":
    main()
