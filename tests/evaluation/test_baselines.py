"""What mean fill and Telea's method put into a hole, and that they touch nothing else."""

from __future__ import annotations

import torch

from attnorm.data.masks import centre_mask, free_form_mask
from attnorm.evaluation.baselines import mean_fill, telea_fill


def test_mean_fill_takes_the_mean_of_what_is_known() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[0, 0], images[0, 1, :4] = 10, 200
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    masks[:, :, 2:4] = True
    images[0, :, 2:4] = 255  # what is missing has no part in it
    filled = mean_fill(images, masks)
    assert filled[0, :, 2].unique(dim=1).flatten().tolist() == [10, round(200 * 2 / 6), 0]
    assert torch.equal(filled.masked_fill(masks, 7), images.masked_fill(masks, 7))


def test_telea_goes_on_with_what_stands_at_the_holes_edge() -> None:
    """A hole between two grounds, far from where they meet, is of the one that it lies in; no colour is another's."""
    images = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    images[:, 0], images[:, 1, :20], images[:, 2, 20:] = 50, 100, 200
    masks = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    masks[..., 4:12, 10:20] = masks[..., 30:36, 20:30] = True
    torch.testing.assert_close(telea_fill(images.masked_fill(masks, 255), masks), images, rtol=0, atol=2)
    plain = torch.full((1, 3, 25, 25), 200, dtype=torch.uint8)
    points = torch.zeros(1, 1, 25, 25, dtype=torch.bool)
    points[..., [0, 0, 1, 23, 24], [0, 24, 1, 12, 24]] = True
    torch.testing.assert_close(telea_fill(plain.masked_fill(points, 0), points), plain, rtol=0, atol=2)  # in corners


def test_telea_keeps_what_is_known_and_ignores_what_the_hole_held() -> None:
    images = torch.randint(0, 256, (3, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    masks = torch.stack([centre_mask(24).mask, free_form_mask(24, seed=0, index=0).mask, centre_mask(24).mask])
    filled = telea_fill(images, masks)
    assert torch.equal(filled.masked_fill(masks, 0), images.masked_fill(masks, 0))
    assert torch.equal(telea_fill(images.masked_fill(masks, 9), masks), filled)
    for i in range(3):  # as if alone
        assert torch.equal(telea_fill(images[i : i + 1], masks[i : i + 1])[0], filled[i])
