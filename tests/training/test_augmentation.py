"""Differentiable augmentation, against its definitions pixel by pixel."""

from typing import Any

import pytest
import torch

from attnorm.training.augmentation import AUGMENTATIONS, augment


def images() -> torch.Tensor:
    return torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_colour_is_brightness_then_saturation_then_contrast() -> None:
    torch.manual_seed(3)
    got = AUGMENTATIONS["color"](images())
    torch.manual_seed(3)
    draws = torch.rand(64, 3)
    for image, seen, brightness, saturation, contrast in zip(images(), got, *draws.T, strict=True):
        x = image + brightness - 0.5
        grey = x.mean(0)
        x = grey + (x - grey) * 2 * saturation
        x = x.mean() + (x - x.mean()) * (0.5 + contrast)
        torch.testing.assert_close(seen, x)


def test_translation_moves_by_at_most_an_eighth_and_brings_in_zeros() -> None:
    moved = AUGMENTATIONS["translation"](images())
    shifts = set()
    for image, seen in zip(images(), moved, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        found = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if torch.equal(padded[:, row : row + 16, column : column + 16], seen)
        ]
        assert len(found) == 1
        shifts |= set(found)
    assert len(shifts) > 15  # of 25, each image its own


def test_cutout_takes_a_square_of_half_the_side() -> None:
    ones = torch.ones(400, 3, 16, 16)
    seen = AUGMENTATIONS["cutout"](ones)
    rows, columns = (seen == 0).all(1).any(2), (seen == 0).all(1).any(1)
    for image, hole_rows, hole_columns in zip(seen, rows, columns, strict=True):
        assert torch.equal((image == 0).all(0), hole_rows[:, None] & hole_columns)
        assert 4 <= hole_rows.sum() <= 8 and 4 <= hole_columns.sum() <= 8  # half of it may lie outside
        assert (image == 0).any(0).sum() == (image == 0).all(0).sum()
    assert rows.sum(1).max() == columns.sum(1).max() == 8
    assert rows.any(0).all() and columns.any(0).all()  # anywhere


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_gradients_go_through(name: Any) -> None:
    def seen(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return augment(x, [name])

    x = images()[:2, :, :4, :4].double().requires_grad_()
    assert torch.autograd.gradcheck(seen, x)
