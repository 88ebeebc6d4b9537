"""Mean fill, and Telea's method against a literal reference and what its front must do."""

from __future__ import annotations

import math

import numpy as np
import torch

from attnorm.data.masks import centre_mask, free_form_mask
from attnorm.evaluation import baselines
from attnorm.evaluation.baselines import mean_fill, telea, telea_fill


def test_mean_fill_takes_the_mean_of_what_is_known() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[0, 0], images[0, 1, :4] = 10, 200
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    masks[:, :, 2:4] = True
    images[0, :, 2:4] = 255  # what is missing has no part in it
    filled = mean_fill(images, masks)
    assert filled[0, :, 2].unique(dim=1).flatten().tolist() == [10, round(200 * 2 / 6), 0]
    assert torch.equal(filled.masked_fill(masks, 7), images.masked_fill(masks, 7))


def test_the_front_arrives_at_a_straight_edge_as_far_as_it_is_away() -> None:
    hole = np.zeros((20, 20), bool)
    hole[8:] = True
    times, order = baselines._arrival_times(hole, 3)
    np.testing.assert_allclose(times[7:], np.repeat(np.arange(13)[:, None], 20, 1))
    np.testing.assert_allclose(times[4:8], np.repeat(np.arange(-3, 1)[:, None], 20, 1))
    assert sorted(order) == [(row, column) for row in range(8, 20) for column in range(20)]
    assert [row for row, _ in order] == sorted(row for row, _ in order)


def test_the_front_around_a_point_is_nearly_a_circle() -> None:
    hole = np.ones((41, 41), bool)
    hole[20, 20] = False
    front = ~hole
    times, _ = baselines._march(front, hole, math.inf)
    rows, columns = np.mgrid[-20:21, -20:21]
    distances = np.hypot(rows, columns)
    assert np.abs(times - distances)[distances <= 20].max() < 1.5  # the scheme is of the first order
    np.testing.assert_allclose(times, times.T)
    np.testing.assert_allclose(times[20, 20:], np.arange(21))


def literal_telea(planes: np.ndarray, hole: np.ndarray, radius: int) -> np.ndarray:
    """Pixel by pixel, neighbour by neighbour, as the docstring says it; the order is the front's."""
    height, width = hole.shape
    times, order = baselines._arrival_times(hole, radius)
    known, image = ~hole, planes.astype(float)

    def is_known(row: int, column: int) -> bool:
        return 0 <= row < height and 0 <= column < width and bool(known[row, column])

    def derivative(plane: np.ndarray, row: int, column: int, down: int, right: int) -> float:
        sides = [
            sign * (plane[row + sign * down, column + sign * right] - plane[row, column])
            for sign in (1, -1)
            if is_known(row + sign * down, column + sign * right)
        ]
        return sum(sides) / max(len(sides), 1)

    def time(row: int, column: int) -> float:
        return times[row, column] if 0 <= row < height and 0 <= column < width else math.inf

    def slope(row: int, column: int, down: int, right: int) -> float:
        sides = [
            sign * (time(row + sign * down, column + sign * right) - times[row, column])
            for sign in (1, -1)
            if math.isfinite(time(row + sign * down, column + sign * right))
        ]
        return sum(sides) / max(len(sides), 1)

    for row, column in order:
        normal = slope(row, column, 1, 0), slope(row, column, 0, 1)
        values = []
        for plane in image:
            total = weights = step_down = step_right = 0.0
            for r in range(row - radius, row + radius + 1):
                for c in range(column - radius, column + radius + 1):
                    down, right = row - r, column - c
                    if not is_known(r, c) or down**2 + right**2 > radius**2:
                        continue
                    length = math.hypot(down, right)
                    along = max(abs(down * normal[0] + right * normal[1]) / length, 1e-6)
                    weight = along / length**2 / (1 + abs(times[row, column] - times[r, c]))
                    total += weight * plane[r, c]
                    weights += weight
                    step_down += weight * derivative(plane, r, c, 1, 0) * down
                    step_right += weight * derivative(plane, r, c, 0, 1) * right
            step_down, step_right = step_down / weights, step_right / weights
            extra = (step_down + step_right) / max(math.hypot(step_down, step_right), 1)
            values.append(min(max(total / weights + extra, 0), 255))
        image[:, row, column] = values
        known[row, column] = True
    return np.rint(image).astype(np.uint8)


def test_telea_equals_its_literal_reference() -> None:
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:18, :18]
    planes = np.stack([8 * rows + 3 * columns, random.integers(0, 256, (18, 18))]).clip(0, 255).astype(np.uint8)
    for index in range(2):
        hole = free_form_mask(18, seed=0, index=index).mask[0].numpy()
        np.testing.assert_array_equal(telea(planes, hole, 3), literal_telea(planes, hole, 3))


def test_telea_keeps_what_is_known_and_ignores_what_the_hole_held() -> None:
    images = torch.randint(0, 256, (3, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    masks = torch.stack([centre_mask(24).mask, free_form_mask(24, seed=0, index=0).mask, centre_mask(24).mask])
    filled = telea_fill(images, masks)
    assert torch.equal(filled.masked_fill(masks, 0), images.masked_fill(masks, 0))
    assert torch.equal(telea_fill(images.masked_fill(masks, 9), masks), filled)
    for i in range(3):  # those that share a mask, as if alone
        assert torch.equal(telea_fill(images[i : i + 1], masks[i : i + 1])[0], filled[i])
