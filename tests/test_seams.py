"""What is made of a hole meets the known pixels at its edge, and is otherwise the network's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import spsolve
from torch import Tensor

from attnorm import cli
from attnorm.data.images import to_float, to_uint8
from attnorm.data.masks import free_form_mask, rectangle_mask
from attnorm.inference import Inpainter
from attnorm.inference.seams import LARGE, without_seam
from tests.test_inpainter import holes, make_checkpoint, noise, save

LEVEL = 1 / 127.5  # a grey level


def exact_membrane(error: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Solves Laplace's equation in the hole (bool [H, W]) directly, from `error` [C, H, W] beside it."""
    rows, columns = np.nonzero(hole)
    number = np.full(hole.shape, -1)
    number[rows, columns] = np.arange(len(rows))
    degrees, known, links = np.zeros(len(rows)), np.zeros((len(rows), len(error))), []
    for down, along in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        y, x = rows + down, columns + along
        (inside,) = np.nonzero((y >= 0) & (y < hole.shape[0]) & (x >= 0) & (x < hole.shape[1]))
        degrees[inside] += 1
        other = number[y[inside], x[inside]]
        links.append(np.stack([inside[other >= 0], other[other >= 0]]))
        beside = inside[other < 0]
        known[beside] += error[:, y[beside], x[beside]].T
    pairs = np.concatenate([*links, np.stack([np.arange(len(rows))] * 2)], 1)
    values = np.concatenate([np.full(pairs.shape[1] - len(rows), -1.0), degrees])
    solution = np.zeros_like(error)
    solution[:, rows, columns] = spsolve(coo_matrix((values, pairs)).tocsc(), known).T
    return solution


def smooth(height: int, width: int) -> Tensor:
    """[3, H, W] in about [-1, 1]: some waves, and some noise."""
    generator = torch.Generator().manual_seed(0)
    waves = F.interpolate(torch.randn(1, 3, 4, 4, generator=generator), (height, width), mode="bicubic")[0]
    return 0.3 * waves + 0.05 * torch.randn(3, height, width, generator=generator)


@pytest.mark.parametrize("kind", ["rectangle", "strokes", "at the border", "two holes", "one pixel"])
def test_the_change_is_the_harmonic_continuation_of_the_error_beside_the_hole(kind: str) -> None:
    known, made = smooth(96, 96), torch.zeros(3, 96, 96)
    match kind:
        case "rectangle":
            hole = rectangle_mask(96, seed=0, index=1)[0].bool()
        case "strokes":
            hole = free_form_mask(96, seed=0, index=1)[0].bool()
        case "at the border":
            hole = holes(96, 96, (0, 60, 41, 96))
        case "two holes":
            hole = holes(96, 96, (3, 5, 30, 21), (50, 70, 90, 80))
        case _:
            hole = holes(96, 96, (40, 41, 41, 42))
    result = without_seam(made, known.masked_fill(hole, torch.nan), hole)
    expected = torch.from_numpy(exact_membrane((known - made).double().numpy(), hole[0].numpy()))
    assert (result - expected)[:, hole[0]].abs().max() < 2 * LEVEL < expected.abs().max()
    assert torch.equal(result[:, ~hole[0]], made[:, ~hole[0]])


def test_what_is_off_by_a_constant_is_set_right_and_what_fits_stays() -> None:
    known, hole = smooth(80, 70), holes(80, 70, (20, 15, 60, 58))
    assert (without_seam(known - 0.25, known, hole) - known)[:, hole[0]].abs().max() < 1e-5
    assert torch.equal(without_seam(known, known, hole), known)
    nothing = torch.zeros_like(hole)
    assert torch.equal(without_seam(known - 0.25, known, nothing), known - 0.25)


def test_a_large_hole_with_fewer_sweeps_has_no_seam_either() -> None:
    side = 700
    hole = holes(side, side, (40, 50, 640, 650))
    assert hole.sum() > LARGE
    ramp = torch.linspace(-0.5, 0.5, side).expand(3, side, side)
    result = without_seam(torch.zeros_like(ramp), ramp, hole)  # a ramp is harmonic
    assert (result - ramp)[:, hole[0]].abs().max() < 2 * LEVEL


def test_photographs_are_filled_without_seams_unless_they_are_asked_for(tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path / "an.safetensors")
    image, mask = noise(60, 64), holes(60, 64, (11, 20, 37, 52))
    plain, tool = Inpainter(file, device="cpu", seams=True), Inpainter(file, device="cpu")
    made = plain.outputs(to_float(image)[None], mask[None]).refined[0]
    expected = torch.where(mask, to_uint8(without_seam(made, to_float(image), mask)), image)
    assert torch.equal(tool.fill(image, mask).image, expected)
    assert not torch.equal(plain.fill(image, mask).image, expected)
    photograph, hole = save(tmp_path / "photo.png", image), save(tmp_path / "hole.png", mask)
    for options, inpainter in (([], tool), (["--seams"], plain)):
        out = tmp_path / "filled.png"
        cli.main(["inpaint", str(file), str(photograph), str(hole), "--out", str(out), "--overwrite", *options])
        np.testing.assert_array_equal(np.asarray(Image.open(out)).transpose(2, 0, 1), inpainter.fill(image, mask).image)
