"""The script that judges generators by a classifier: its distance, and its accuracy on what is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

SCRIPT = Path(__file__).parents[1] / "scripts" / "classifier.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("classifier_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("count", [40, 2000])  # by both ways to the trace of the root
def test_the_frechet_distance_is_that_of_gaussians(script: Any, count: int) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(count, 5)), generator.normal(1, 2, size=(count + 1, 5))
    first, second = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert script.frechet(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-8)


def test_accuracy_is_the_share_of_images_whose_class_wins(script: Any) -> None:
    from attnorm.data.images import ImageSet

    torch.manual_seed(0)
    classifier = script.Classifier(4).eval()
    images = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8)
    _, found = script.look(classifier, images)
    labels = found.numpy().copy()
    labels[:3] = (labels[:3] + 1) % 4
    data = ImageSet(images.numpy(), labels, ("a", "b", "c", "d"), "by hand", "")
    assert script.accuracy_on(classifier, data) == pytest.approx(0.7)
