"""Scores of tiny generators: their values from the definitions, what is kept and what is measured again, processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnorm import cli
from attnorm.checkpoint import CheckpointError, Header, save_checkpoint
from attnorm.config import ConfigError
from attnorm.data.images import ImageSet, fingerprint, load_images
from attnorm.evaluation import generators
from attnorm.evaluation.classes import TABLE_2_CLASSES, fake_labels, find_classes
from attnorm.evaluation.feature_stats import METRICS, RealFeatures, find_metrics
from attnorm.evaluation.generators import evaluate_generator
from attnorm.evaluation.protocol import scores_file
from attnorm.inference import Sampler
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.metrics import features
from attnorm.metrics.features import Extractor, Features
from attnorm.metrics.generative import (
    Gaussian,
    frechet_distance,
    frechet_interval,
    inception_score,
    kernel_distance,
    precision_recall,
    score_interval,
)
from attnorm.models.class_conditional import Generator
from attnorm.ops.soft_layout import entity_usage, layout_entropy
from attnorm.presets import PRESETS
from attnorm.run_directory import RunDirectory
from attnorm.settings import override
from attnorm.system.files import read_lines
from tests.conftest import draw_photographs, run_together
from tests.evaluation.conftest import CLASSES, TinyExtractor, make_images


class StandardExtractor(TinyExtractor):
    name, is_standard = "standard", True


class Refusing(TinyExtractor):
    def __call__(self, images: Tensor) -> Features:
        raise AssertionError("features were made of images, though nothing was to be measured")


def make_run(path: Path, images: ImageSet, *settings: str, images_seen: int = 8) -> Path:
    """A run with random weights; a further checkpoint where there is one already."""
    tiny = ["model.width=2", "model.latent_dim=4", f"model.num_classes={len(images.classes)}", "run.seed=3"]
    config = override(PRESETS["smoke"][1], [*tiny, *settings])
    torch.manual_seed(images_seen)
    model = Generator(config.model)
    for module in model.modules():
        if isinstance(module, AttentiveNorm2d):
            module.rho.data.fill_(1.0)
    run = RunDirectory(path)
    if not run.exists():
        run.create(config, {"source": images.source, "fingerprint": images.fingerprint})
    tensors = {f"ema.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(run.checkpoint_file(images_seen), tensors, Header(config, images.classes, images_seen, 1.5))
    return path


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return make_images()


@pytest.fixture
def run(images: ImageSet, tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "an", images)


def measured(run: Path, images: ImageSet, *metrics: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Lines by their metrics."""
    extractor = settings.pop("extractor", None) or TinyExtractor()
    defaults = {"num": 40, "fakes_per_class": 15, "batch_size": 7, "device": "cpu", "cache_dir": run.parent / "kept"}
    settings = defaults | settings
    scores = evaluate_generator(run, images, extractor, metrics=metrics, **settings)
    return {score.metric: json.loads(json.dumps(score.to_dict())) for score in scores}


def made(run: Path, labels: list[int], first_seed: int) -> Features:
    """Features of images made all at once."""
    seeds = list(range(first_seed, first_seed + len(labels)))
    return TinyExtractor()(Sampler(run, device="cpu").sample(seeds, labels).images)


def real(images: ImageSet, which: np.ndarray | slice = slice(None)) -> Tensor:
    return TinyExtractor()(torch.from_numpy(images.images[which])).pooled


def distance_of(fakes: Features, reals: Tensor) -> float:
    return frechet_distance(Gaussian.from_features(fakes.pooled), Gaussian.from_features(reals))


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-4)  # a batch rounds otherwise than an image alone: a grey level here and there


# Values


def test_every_score_is_that_of_its_definition_whatever_the_batches(run: Path, images: ImageSet) -> None:
    lines = measured(run, images, "frechet", "is", "kid", "precision-recall", seed=5)
    fakes, reals = made(run, [i % 3 for i in range(40)], 50_000_000), real(images)
    assert lines["frechet"]["value"] == near(distance_of(fakes, reals))
    assert lines["is1"]["value"] == near(inception_score(fakes.logits, 1)[0])
    ten, spread = inception_score(fakes.logits, 10)
    assert lines["is10"]["value"] == near(ten) and lines["is10"]["spread"] == pytest.approx(spread, rel=1e-2)
    few = reals[np.unique(np.linspace(0, 59, 40).astype(np.int64))]  # as many real ones as generated ones
    assert lines["kid"]["value"] == near(kernel_distance(fakes.pooled, few, seed=5)[0])
    assert lines["kid"]["protocol"] == "kernel40_train_40reals_tiny" and lines["kid"]["subset_size"] == 40
    assert "spread" not in lines["kid"]  # of subsets that are all images
    assert lines["recall"]["protocol"] == "pr40_k3_train_40reals_tiny" and lines["recall"]["num_reals"] == 40
    expected = precision_recall(few, fakes.pooled)
    assert (lines["precision"]["value"], lines["recall"]["value"]) == (expected.precision, expected.recall)
    assert (lines["precision"]["density"], lines["recall"]["coverage"]) == (expected.density, expected.coverage)
    assert {line["num_reals"] for line in lines.values()} == {60, 0, 40}
    for batch_size in (1, 40):
        again = measured(run, images, "frechet", batch_size=batch_size, seed=5, overwrite=True)
        assert again["frechet"]["value"] == near(lines["frechet"]["value"])


@pytest.mark.parametrize("num", [12, 40], ids=["few", "many"])
def test_the_distance_is_right_for_few_and_for_many_images(
    run: Path, images: ImageSet, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = distance_of(made(run, [i % 3 for i in range(num)], 0), real(images))
    if num > TinyExtractor.dimensions:  # then nothing but moments is kept
        monkeypatch.setattr(Gaussian, "from_features", None)
    assert measured(run, images, "frechet", num=num)["frechet"]["value"] == near(expected)


def test_intra_class_distances_are_those_of_each_class_alone(run: Path, images: ImageSet) -> None:
    line = measured(run, images, "intra-frechet", seed=2)["intra-frechet"]
    for label, name in enumerate(CLASSES):
        fakes = made(run, [label] * 15, 20_000_000 + 15 * label)
        assert line["values"][name] == near(distance_of(fakes, real(images, images.labels == label)))
    assert line["value"] == pytest.approx(sum(line["values"].values()) / 3)
    assert (line["protocol"], line["num_fakes"], line["num_reals"]) == ("intra-frechet15_train_tiny[all]", 45, 60)

    some = measured(run, images, "intra-frechet", seed=2, classes=["dog", "0"])["intra-frechet"]
    assert some["values"] == {name: near(line["values"][name]) for name in ("dog", "bird")}
    assert some["protocol"] == "intra-frechet15_train_tiny[2,0]" and some["num_reals"] == 40


def test_intervals_are_the_bootstrap_of_the_same_images(run: Path, images: ImageSet) -> None:
    lines = measured(run, images, "frechet", "is", intervals=True, seed=1, batch_size=40)
    fakes, reals = made(run, [i % 3 for i in range(40)], 10_000_000), Gaussian.from_features(real(images))
    value = lines["frechet"]["value"]
    intervals = {
        "frechet": frechet_interval(fakes.pooled, reals, value, resamples=100, seed=1),
        "is1": score_interval(fakes.logits, resamples=1000, seed=1),
    }
    for metric, interval in intervals.items():
        line = lines[metric]
        # The bias is a small difference of numbers of the value's size, and rounded as they are.
        expected = pytest.approx(list(interval), abs=1e-6 * line["value"])
        assert [line[key] for key in ("low", "high", "bias")] == expected
        assert line["low"] < line["value"] < line["high"]
    assert lines["frechet"]["interval"] == (
        "95%, bootstrap over generated images, 100 resamples, about their mean, seed 1"
    )


def test_layouts_are_those_of_all_images_together(run: Path, images: ImageSet) -> None:
    line = measured(run, images, "layout", num=20)["layout"]
    seen = Sampler(run, device="cpu").sample(range(20), [i % 3 for i in range(20)], with_layouts=True).layouts
    ((site, observation),) = seen.items()
    assert (line["site"], line["protocol"], line.get("extractor")) == (site, "layout20", None)
    assert line["value"] == pytest.approx(layout_entropy(observation.layout).item())
    usage = entity_usage(observation.layout).tolist()
    assert line["usage"] == pytest.approx(usage, abs=1e-4)
    entropy = -sum(share * math.log(share) for share in usage if share)
    assert line["entities_in_use"] == pytest.approx(math.exp(entropy), rel=1e-3)


def test_a_generator_without_layers_has_no_layouts(images: ImageSet, tmp_path: Path) -> None:
    run = make_run(tmp_path / "none", images, "model.context=none")
    assert measured(run, images, "layout") == {}
    assert list(measured(run, images, "frechet", "layout")) == ["frechet"]


# Which images


def test_labels_go_round_where_classes_are_equal_and_follow_the_data_where_not() -> None:
    assert fake_labels(7, np.array([5, 5, 5])).tolist() == [0, 1, 2, 0, 1, 2, 0]
    labels = fake_labels(10, np.array([30, 50, 20, 0]))
    assert labels.tolist() == [1, 0, 2, 1, 0, 1, 1, 2, 0, 1]  # spread, so that splits are alike
    # 2.1, 4.9 and 0 images: the largest remainder is rounded up
    assert np.bincount(fake_labels(7, np.array([3, 7, 0])), minlength=3).tolist() == [2, 5, 0]
    for num in (1, 9, 64, 1001):
        assert len(fake_labels(num, np.array([7, 1, 13, 4]))) == num


def test_unequal_classes_are_generated_in_proportion(tmp_path: Path) -> None:
    images = make_images((30, 10, 20))
    run = make_run(tmp_path / "run", images)
    line = measured(run, images, "frechet", num=12)["frechet"]
    assert line["labels"] == "all 3 classes in proportion to their real images"
    labels = fake_labels(12, np.array([30, 10, 20])).tolist()
    assert sorted(labels) == [0] * 6 + [1] * 2 + [2] * 4
    assert line["value"] == near(distance_of(made(run, labels, 0), real(images)))


def test_held_out_images_are_left_out_of_the_training_data_and_only_there(images: ImageSet, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images, "data.held_out_every=5")
    line = measured(run, images, "frechet")["frechet"]
    assert (line["num_reals"], line["data"]["split"], line["data"]["held_out_every"]) == (48, "train", 5)
    kept = np.delete(np.arange(60), np.arange(4, 60, 5))
    assert line["value"] == near(distance_of(made(run, [i % 3 for i in range(40)], 0), real(images, kept)))

    other = make_images((9, 9, 9))
    line = measured(run, other, "frechet")["frechet"]
    assert (line["num_reals"], line["data"]["split"]) == (27, "other")
    assert line["protocol"] == "frechet40_other_tiny"


def test_larger_images_are_cut_at_their_centre(run: Path, images: ImageSet) -> None:
    wide = np.pad(images.images, ((0, 0), (0, 0), (2, 2), (4, 4)))
    padded = dataclasses.replace(images, images=wide, fingerprint=fingerprint(wide, images.labels, CLASSES))
    assert measured(run, padded, "frechet")["frechet"]["value"] == measured(run, images, "frechet")["frechet"]["value"]


def test_a_subset_says_that_it_is_one(run: Path, images: ImageSet) -> None:
    lines = measured(run, images, "frechet", "is", "intra-frechet", subset=6)
    assert lines["frechet"]["subset"] and lines["intra-frechet"]["subset"] and not lines["is1"]["subset"]
    assert lines["frechet"]["protocol"] == "frechet40_train_subset6_tiny" and lines["frechet"]["num_reals"] == 6
    assert lines["intra-frechet"]["protocol"] == "intra-frechet15_train_subset6_tiny[all]"
    assert lines["intra-frechet"]["num_reals"] == 18
    reals = real(images, np.linspace(0, 59, 6).astype(np.int64))
    assert lines["frechet"]["value"] == near(distance_of(made(run, [i % 3 for i in range(40)], 0), reals))
    whole = measured(run, images, "frechet", subset=60)["frechet"]
    assert not whole["subset"] and whole["protocol"] == "frechet40_train_tiny"


# Names


def test_only_the_standard_extractor_has_the_published_names(run: Path, images: ImageSet) -> None:
    everything = ("frechet", "intra-frechet", "is", "kid", "precision-recall")
    names = {line["metric"]: line["name"] for line in measured(run, images, *everything).values()}
    titles = {"frechet": "Fréchet distance", "intra-frechet": "intra-class Fréchet distance", "kid": "kernel distance"}
    titles |= {"is1": "classifier score", "is10": "classifier score", "precision": "precision", "recall": "recall"}
    assert names == {metric: f"{title} (tiny)" for metric, title in titles.items()}
    lines = measured(run, images, "fid", "intra-fid", "is", "kid", extractor=StandardExtractor(), num=1100)
    assert {line["protocol"]: line["name"] for line in lines.values()} == {
        **{"fid1.1k_train_standard": "FID", "intra15_train_standard[all]": "intra-FID"},
        **{"is1.1k_s1_standard": "IS", "is1.1k_s10_standard": "IS", "kid1.1k_train_standard": "KID"},
    }
    with pytest.raises(ConfigError, match=r"fid, but with the extractor tiny it is none.*say frechet"):
        find_metrics(["fid"], TinyExtractor)
    with pytest.raises(ConfigError, match=r"no metric 'frechett'; did you mean frechet"):
        find_metrics(["frechett"], TinyExtractor)
    assert find_metrics(["layout", "is", "fid", "is"], StandardExtractor) == ("frechet", "is", "layout")


def test_the_classes_of_table_2_are_found_by_either_name_or_by_number() -> None:
    def found(classes: Iterable[str]) -> list[str]:
        known = SimpleNamespace(classes=tuple(sorted(classes)), path="x")
        labels, name = find_classes(["table2"], known)  # type: ignore[arg-type]
        assert name == "table2"
        return [known.classes[label] for label in labels]

    wordnet = [wordnet for _, wordnet in TABLE_2_CLASSES.values()]
    assert found(["n00000001", *wordnet]) == wordnet and wordnet[0] == "n04326547"  # the stone wall, the table's first
    names = [name.replace(" ", "_").title() for name in TABLE_2_CLASSES]
    assert found(names) == names
    of_folders = map(str, range(1000))  # "10" before "2"
    assert found(of_folders) == ["825", "974", "979", "991", "14", "141", "247", "282"]
    for others, among in (([f"class {i}" for i in range(1000)], 1000), (CLASSES, 3)):
        with pytest.raises(
            ConfigError, match=rf"lacks the class 'stone wall' \(n04326547\) of Table 2 among its {among}"
        ):
            found(others)


def test_a_line_says_how_it_came_about(run: Path, images: ImageSet) -> None:
    line = measured(run, images, "frechet", seed=4)["frechet"]
    checkpoint = run / "checkpoints" / "000000008.safetensors"
    about = {"run": "an", "preset": "smoke", "run_seed": 3, "context": "an", "width": 2, "weights": "ema"}
    about |= {"checkpoint": "checkpoints/000000008.safetensors", "images_seen": 8, "training_seconds": 1.5}
    about |= {"checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(), "num_fakes": 40, "seed": 4}
    about |= {"torch": torch.__version__, "device": "cpu", "processes": 1}
    about["labels"] = "all 3 classes in turn, as the data have as many of each"
    about["extractor"] = {"name": "tiny", "title": "Tiny", "weights_sha256": "0" * 64, "preprocessing": "mean over 4x4"}
    about["data"] = {"source": "photographs", "fingerprint": images.fingerprint, "split": "train", "held_out_every": 0}
    about["data"] |= {"fit": "square", "read_at": [32, 32], "image_size": 32, "note": "of no variety"}
    assert {key: line[key] for key in about} == about
    assert line["seconds"] > 0 and line["date"].endswith("+00:00")
    root = Path(__file__).parents[2]
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    head = git.stdout.strip() if (root / ".git").exists() else ""
    assert line["commit"] in (head, f"{head}-dirty")
    assert read_lines(scores_file(run)) == [line]


# What is kept


def test_what_is_made_of_real_images_is_kept_by_content(
    run: Path, images: ImageSet, caplog: pytest.LogCaptureFixture
) -> None:
    first = measured(run, images, "frechet", "intra-frechet", "kid")
    extractor = TinyExtractor()
    again = measured(run, images, "frechet", "intra-frechet", "kid", overwrite=True, extractor=extractor)
    assert extractor.num_seen == 40 + 45  # generated ones alone
    assert [again[metric]["value"] for metric in again] == [first[metric]["value"] for metric in first]

    (file,) = (run.parent / "kept").glob("gaussian-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    for damaged in (bytes(content), b"short"):
        file.write_bytes(damaged)
        extractor = TinyExtractor()
        again = measured(run, images, "frechet", overwrite=True, extractor=extractor)
        assert extractor.num_seen == 40 + 60
        # Fakes were kept for kid then, and are streamed now: their sums have another order.
        assert again["frechet"]["value"] == pytest.approx(first["frechet"]["value"], rel=1e-9)
        assert "is damaged" in caplog.text
        caplog.clear()


def test_a_key_changes_with_all_that_matters_and_with_nothing_else(images: ImageSet, tmp_path: Path) -> None:
    def key(images: ImageSet, extractor: Extractor | None = None, which: int = 60, side: int = 32) -> str:
        given = extractor or TinyExtractor()
        reals = RealFeatures(images, side, given, batch_size=7, folder=tmp_path, progress=lambda *_: None)
        return reals.key("gaussian", np.arange(which))

    pixels = images.images.copy()
    pixels[0, 0, 0, 0] ^= 1
    changed = dataclasses.replace(images, images=pixels, fingerprint=fingerprint(pixels, images.labels, CLASSES))
    other_weights, other_size = TinyExtractor(), TinyExtractor()
    other_weights.weights_sha256 = "1" * 64  # type: ignore[misc]
    other_size.preprocessing = "mean over 8x8"  # type: ignore[misc]
    assert key(dataclasses.replace(images, source="elsewhere")) == key(images)
    others = [key(images, extractor) for extractor in (StandardExtractor(), other_weights, other_size)]
    keys = [key(images), key(changed), key(images, which=59), key(images, side=16), *others]
    assert len(set(keys)) == len(keys)


def test_a_cache_that_cannot_be_written_costs_time_only(
    run: Path, images: ImageSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    line = measured(run, images, "frechet", cache_dir=tmp_path / "file" / "below")["frechet"]
    assert line["value"] > 0 and "features of real images cannot be kept" in caplog.text
    line = measured(run, images, "intra-frechet", cache_dir=tmp_path / "file" / "below")["intra-frechet"]
    assert min(line["values"].values()) > 0 and "the distance of a class cannot be kept" in caplog.text


def test_what_is_measured_is_not_measured_again(run: Path, images: ImageSet) -> None:
    lines = measured(run, images, *METRICS)
    first, file = list(lines.values()), scores_file(run)
    content = file.read_bytes()
    assert measured(run, images, *METRICS, extractor=Refusing()) == lines and file.read_bytes() == content
    assert list(lines) == ["frechet", "intra-frechet", "is1", "is10", "kid", "precision", "recall", "layout"]

    for other in ({"seed": 1}, {"num": 41}, {"subset": 30}, {"extractor": StandardExtractor()}):
        assert measured(run, images, "frechet", **other)["frechet"] not in first
    make_run(run, images, images_seen=16)
    assert measured(run, images, "frechet")["frechet"]["checkpoint"] == "checkpoints/000000016.safetensors"

    # An interval is more than there was; the score without it would be less.
    lines = measured(run, images, "frechet", intervals=True)
    assert "interval" in lines["frechet"]
    assert measured(run, images, "frechet", extractor=Refusing()) == lines
    values = [line for line in read_lines(file) if line["images_seen"] == 16]
    assert values == [lines["frechet"]]  # in place of the one without


def test_an_interrupted_measurement_keeps_what_it_had(
    run: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generators._Evaluation, "intra", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(run, images, "frechet", "intra-frechet")
    assert [line["metric"] for line in read_lines(scores_file(run))] == ["frechet"]


def test_intra_class_distances_go_on_where_they_were_interrupted(
    run: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, made_before = generators._Evaluation.distance_of_class, []

    def two_alone(self: Any, label: int, name: str) -> float:
        if len(made_before) == 2:
            raise KeyboardInterrupt
        made_before.append(label)
        return whole(self, label, name)

    monkeypatch.setattr(generators._Evaluation, "distance_of_class", two_alone)
    with pytest.raises(KeyboardInterrupt):
        measured(run, images, "intra-frechet")
    monkeypatch.undo()
    (kept, *_) = (run.parent / "kept").glob("intra-*.json")
    kept.write_text('{"value": 12', encoding="utf-8")  # as a fault of the disk might leave it
    extractor = TinyExtractor()
    line = measured(run, images, "intra-frechet", extractor=extractor)["intra-frechet"]
    assert extractor.num_seen == 20 + 2 * 15  # the third class, and the generated images of the damaged one
    again = measured(run, images, "intra-frechet", overwrite=True)["intra-frechet"]
    assert again["values"] == line["values"] and made_before == [0, 1]


# Processes

HELPER = """
import json, sys
sys.path.insert(0, {folder!r})
import conftest as tests
from pathlib import Path
from attnorm.system.process_group import process_group
from attnorm.evaluation.feature_stats import METRICS
from attnorm.evaluation.generators import evaluate_generator
extractor = tests.TinyExtractor()
with process_group() as group:  # one group, as the command line has it: a second could meet the remains of the first
    lines = evaluate_generator(Path({run!r}), tests.make_images(), extractor, metrics=METRICS, num=40,
        fakes_per_class=15, batch_size=7, intervals=True, device="cpu", out=Path({out!r}), cache_dir=Path({cache!r}))
    assert group.text_of_first(f"Fréchet of {{group.rank}}") == "Fréchet of 0"
print("LINES" + json.dumps([[line.to_dict() for line in lines], extractor.num_seen]))
"""


def test_several_processes_share_the_work_and_say_the_same(run: Path, images: ImageSet, tmp_path: Path) -> None:
    count = 2
    alone = measured(run, images, *METRICS, intervals=True)
    out, kept = tmp_path / "out", tmp_path / "kept"
    code = HELPER.format(folder=str(Path(__file__).parent), run=str(run), out=str(out), cache=str(kept))
    results = [json.loads(said.partition("LINES")[2]) for said in run_together("-c", code, count=count)]
    lines = {line["metric"]: line for line in results[0][0]}
    assert all(lines == [] for lines, _ in results[1:])
    assert read_lines(out / "metrics.jsonl") and len(read_lines(out / "metrics.jsonl")) == len(alone)
    assert all(seen > 0 for _, seen in results)
    assert sum(seen for _, seen in results) == 40 + 60 + 40 + 45 + 60  # no image twice
    for metric, line in alone.items():
        numbers = ("value", "spread", "low", "high", "density", "coverage", "entities_in_use")
        for key in numbers:
            if key in line:
                assert lines[metric][key] == pytest.approx(line[key], rel=1e-6, abs=1e-9), (metric, key)
        assert lines[metric].get("values", {}) == pytest.approx(line.get("values", {}), rel=1e-6)
        assert lines[metric]["processes"] == count and lines[metric]["protocol"] == line["protocol"]


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num": 9}, "--num is 9; expected at least 10"),
        ({"fakes_per_class": 1}, "--fakes-per-class is 1"),
        ({"subset": 3}, "--subset is 3; expected 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"seed": 2**63}, f"--seed is {2**63}; expected a whole number from 0 to 2^63 - 1"),
        ({"metrics": []}, "no metric was named"),
        ({"images": make_images((1, 30, 30))}, "has 1 real images of 'bird'; expected at least 2"),
        ({"images": make_images((20, 20))}, "has not the classes of"),
        ({"images": make_images((1, 1, 1)), "metrics": ["is"]}, "has 3 images to measure against"),
        ({"images": make_images(size=16)}, "was read at 16x16 pixels, less than the 32"),
    ],
)
def test_what_cannot_be_measured_is_told_before_any_work(
    run: Path, images: ImageSet, settings: dict[str, Any], message: str
) -> None:
    values = {"metrics": ["is", "intra-frechet"], "images": images, "batch_size": 7, **settings}
    given, metrics = values.pop("images"), values.pop("metrics")
    with pytest.raises(ConfigError) as caught:
        evaluate_generator(run, given, Refusing(), metrics=metrics, device="cpu", **values)
    assert message in str(caught.value)
    assert not (run / "evaluation").exists()


def test_other_data_need_not_have_the_classes(run: Path) -> None:
    line = measured(run, make_images((20, 30)), "frechet")["frechet"]
    assert (line["labels"], line["data"]["split"]) == ("all 3 classes in turn", "other")


def test_an_unknown_class_and_a_file_without_a_run_are_told(run: Path, images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="knows no class 'cats'; did you mean cat"):
        measured(run, images, "intra-frechet", classes=["cats"])
    file = tmp_path / "alone.safetensors"
    file.write_bytes((run / "checkpoints" / "000000008.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="is in no run directory, where its scores would go; name a folder with --o"):
        measured(file, images, "frechet")
    line = measured(file, images, "frechet", out=tmp_path / "scores")["frechet"]
    assert (line["run"], line["checkpoint"]) == ("alone", "alone.safetensors")
    assert read_lines(tmp_path / "scores" / "metrics.jsonl") == [line]


# The command line


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name in CLASSES:
        draw_photographs(folder / name, 20, 32)
    return folder


@pytest.fixture(scope="module")
def two_checkpoints(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = load_images(str(photographs), 32)
    run = make_run(tmp_path_factory.mktemp("runs") / "run", images, f"data.source={photographs}")
    return make_run(run, images, f"data.source={photographs}", images_seen=16)


LITE = ["--extractor", "efficientnet-lite0", "--device", "cpu"]


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the extractor that is asked for."""
    monkeypatch.setattr(features, "load_extractor", lambda name, **_: TinyExtractor())


@pytest.mark.usefixtures("cheap")
def test_the_command_line_measures_tells_and_goes_on(two_checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(two_checkpoints), *LITE, "--num", "16", "--subset", "20"]
    cli.main(command)
    said = capsys.readouterr()
    file = two_checkpoints / "evaluation" / "metrics.jsonl"
    lines = read_lines(file)
    assert [line["metric"] for line in lines] == ["layout", "is1", "is10", "frechet"]  # the quick ones first
    assert lines[3]["protocol"] == "frechet16_train_subset20_tiny"
    assert said.out.splitlines()[-1] == str(file) and said.out.splitlines()[0].startswith("run, 16 images seen, ema")
    assert f"{lines[3]['value']:.5g}" in said.out and "already measured" not in said.out
    assert "Fréchet distance (tiny)" in said.out and "FID" not in said.out
    assert "estimated from a subset of 20 real images" in said.err

    cli.main([*command, "--metrics", "frechet,layout", "--checkpoints", "all"])
    out = capsys.readouterr().out
    assert out.count("already measured") == 2  # of the latest checkpoint; the one before is new
    assert [line["images_seen"] for line in read_lines(file)] == [16] * 4 + [8] * 2


def test_mistakes_on_the_command_line_are_told_in_one_line(
    two_checkpoints: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    inpainting, run = tmp_path / "inpainting.safetensors", two_checkpoints
    save_checkpoint(inpainting, {"ema.weight": torch.zeros(1)}, Header(PRESETS["inpaint-smoke"][1], ("all",), 8, 1.0))
    for arguments, message in (
        ([run, *LITE, "--metrics", "fid"], "--metrics names fid, but with the extractor efficientnet-lite0"),
        ([run, *LITE, "--inception-weights", tmp_path], "--inception-weights is for --extractor inception"),
        ([run, "--extractor", "inceptoin"], "there is no extractor 'inceptoin'; did you mean inception?"),
        ([run, "--inception-weights", tmp_path / "none.pth"], "none.pth cannot be read"),
        ([], "evaluate generators | inpainters | images"),
        (["generators"], "no run was named"),
        ([tmp_path / "none"], "does not exist"),
        ([run, inpainting, "--num", "16"], "`attnorm evaluate inpainters` measures it"),
        # As it was before there were three.
        ([run, "--no-floors"], "`attnorm evaluate generators` measures it"),
        ([run, "--manifest", tmp_path], "`attnorm evaluate generators` measures it"),
        ([run, "--cost=64"], "`attnorm evaluate generators` measures it"),
        (["inpainters", inpainting, "--manifest", tmp_path], "--out is missing"),
    ):
        assert message in refused(["evaluate", *arguments])


@pytest.mark.usefixtures("cheap")
def test_data_that_changed_since_the_training_are_not_taken_for_its_own(
    photographs: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    images = dataclasses.replace(load_images(str(photographs), 32), fingerprint="of other pixels")
    run = make_run(tmp_path / "changed", images, f"data.source={photographs}")
    command = ["evaluate", str(run), *LITE, "--metrics", "is", "--num", "10"]
    assert "is not what" in (said := refused(command)) and "any more" in said
    cli.main([*command, "--data", str(photographs)])
    assert {line["data"]["split"] for line in read_lines(scores_file(run))} == {"other"}
    moved = make_run(tmp_path / "moved", images, f"data.source={tmp_path / 'nowhere'}")
    said = refused(["evaluate", str(moved), *LITE, "--metrics", "is", "--num", "10"])
    assert "nowhere does not exist" in said and "moved's data are now, --data SRC says" in said
