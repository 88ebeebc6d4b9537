"""Holes of photographs filled by a checkpoint: any size, windows, and the command line around it."""

# S side of a training image (32 here), H height and W width of a photograph.

from __future__ import annotations

import io
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.measure import label, regionprops
from torch import Tensor

from attnorm import cli
from attnorm.checkpoint import CheckpointError, Header, save_checkpoint
from attnorm.config import ConfigError, UserError
from attnorm.data.images import to_float, to_uint8
from attnorm.inference import Inpainter, Sampler
from attnorm.presets import PRESETS
from attnorm.settings import override
from attnorm.training.inpainting import InpaintingTask
from tests.conftest import contents, look_at

S = 32


def make_checkpoint(path: Path, *settings: str) -> Path:
    """An inpainting generator that nobody trained, whose layer and stages all show."""
    config = override(PRESETS["inpaint-smoke"][1], settings)
    torch.manual_seed(0)
    task = InpaintingTask(config, torch.device("cpu"))
    for network in (task.generator, task.average.network):
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("context.rho"):
                    parameter.fill_(0.7)
                elif name.endswith("bias"):
                    parameter.uniform_(-0.3, 0.3)
    save_checkpoint(path, task.state.tensors(), Header(config, (), 640, 1.0))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("inpainter") / "an.safetensors")


@pytest.fixture(scope="module")
def inpainter(file: Path) -> Inpainter:
    """It pastes what the network made as it is; that seams are taken out otherwise is held by test_seams.py."""
    return Inpainter(file, device="cpu", seams=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a layout."""
    return make_checkpoint(tmp_path_factory.mktemp("inpainter") / "none.safetensors", "model.context=none")


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width)).astype(np.uint8))


def holes(height: int, width: int, *boxes: tuple[int, int, int, int]) -> Tensor:
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    for top, left, bottom, right in boxes:
        mask[:, top:bottom, left:right] = True
    return mask


@torch.no_grad()
def generated(inpainter: Inpainter, image: Tensor, mask: Tensor) -> Tensor:
    """What the generator itself makes of a uint8 image whose sides are multiples of 8."""
    return to_uint8(inpainter.model(to_float(image)[None], mask[None]).refined[0])


# The whole picture


def test_a_picture_is_filled_in_its_hole_and_stays_elsewhere(inpainter: Inpainter) -> None:
    image, mask = noise(40, 48), holes(40, 48, (8, 10, 25, 30))
    filled = inpainter.fill(image, mask)
    assert torch.equal(filled.image, torch.where(mask, generated(inpainter, image, mask), image))
    assert (filled.image != image)[mask.expand_as(image)].float().mean() > 0.9
    (view,) = filled.views
    assert view.box == (0, 0, 40, 48) and torch.equal(view.filled, filled.image) and view.layout is None
    assert torch.equal(view.given, image.masked_fill(mask, 128))


def test_what_the_hole_holds_has_no_influence(inpainter: Inpainter) -> None:
    for size, box in ((41, (8, 10, 25, 30)), (150, (20, 10, 120, 110))):  # as it is, and reduced
        mask = holes(size, size, box)
        first = noise(size, size)
        second = torch.where(mask, noise(size, size, seed=1), first)
        assert torch.equal(inpainter.fill(first, mask).image, inpainter.fill(second, mask).image)


def test_filling_is_deterministic_and_draws_nothing(file: Path, inpainter: Inpainter) -> None:
    image, mask = noise(45, 33), holes(45, 33, (8, 10, 25, 30))
    before = torch.get_rng_state()
    first = inpainter.fill(image, mask).image
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(first, inpainter.fill(image, mask, with_layouts=True).image)
    assert torch.equal(first, Inpainter(file, device="cpu", seams=True).fill(image, mask).image)
    assert not torch.equal(first, Inpainter(file, ema=False, device="cpu", max_pixels=0).fill(image, ~mask).image)


@pytest.mark.parametrize(("height", "width"), [(35, 37), (1, 5), (9, 1), (8, 8)])
def test_any_size_is_reflected_to_multiples_of_8_and_cut_again(inpainter: Inpainter, height: int, width: int) -> None:
    """Against NumPy's padding, which reflects as often as needed."""
    image, mask = noise(height, width), holes(height, width, (0, 0, (height + 1) // 2, (width + 1) // 2))
    padding = ((0, 0), (0, -height % 8), (0, -width % 8))
    padded, hole = (torch.from_numpy(np.pad(part.numpy(), padding, mode="reflect")) for part in (image, mask))
    expected = generated(inpainter, padded, hole)[:, :height, :width]
    outputs = inpainter.outputs(to_float(image)[None], mask[None])
    assert outputs.coarse.shape == outputs.refined.shape == (1, 3, height, width)
    assert torch.equal(to_uint8(outputs.refined[0]), expected)
    assert torch.equal(inpainter.fill(image, mask).image, torch.where(mask, expected, image))


def test_sixteen_bits_are_filled_with_sixteen(inpainter: Inpainter) -> None:
    image, mask = noise(32, 40), holes(32, 40, (8, 10, 25, 30))
    deep = (image.to(torch.int32) * 257).to(torch.uint16)
    filled = inpainter.fill(deep, mask).image
    assert filled.dtype == torch.uint16
    hidden = mask.expand_as(image)
    assert torch.equal(filled.int()[~hidden], deep.int()[~hidden])
    coarse = inpainter.fill(image, mask).image.float()
    assert (filled.float() / 257 - coarse).abs()[hidden].max() < 0.51
    assert (filled.int() % 257 != 0)[hidden].float().mean() > 0.5  # finer than eight bits


def test_layouts_are_of_the_refinement_stage_without_the_padding(inpainter: Inpainter) -> None:
    image, mask = noise(38, 45), holes(38, 45, (8, 10, 25, 30))
    (view,) = inpainter.fill(image, mask, with_layouts=True).views
    assert view.layout is not None and view.layout.shape == (4, 10, 12)
    torch.testing.assert_close(view.layout.sum(0), torch.ones(10, 12))
    seen: list[Tensor] = []
    layer = inpainter.model.context
    handle = layer.register_forward_hook(lambda layer, inputs, _: seen.append(layer.layout(inputs[0]).detach()))
    inpainter.fill(image, mask)
    handle.remove()
    assert seen[0].shape == (1, 4, 10, 12)
    torch.testing.assert_close(view.layout, seen[0][0])


def test_matches_are_the_weights_of_the_holes_patches(tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path / "attention.safetensors", "model.context=contextual")
    attention = Inpainter(file, device="cpu")
    image, mask = noise(38, 45), holes(38, 45, (8, 10, 25, 30))
    filled = attention.fill(image, mask, with_matches=True)
    assert torch.equal(filled.image, attention.fill(image, mask).image)
    matches = filled.views[0].matches
    assert matches is not None and matches.patches.tolist() == [7, 8, 9, 13, 14, 15, 19, 20, 21]  # of 5 rows of 6
    # Each of them or a neighbour of it is missing but in the last column: all comes from there.
    assert matches.weights.shape == (9, 5, 6) and (matches.weights[..., :5] == 0).all()
    assert (matches.weights[..., 5] > 0).all() and (matches.weights.sum((1, 2)) <= 1 + 1e-6).all()
    assert matches.weights[:, :, 5].std(0).max() > 1e-4  # each patch has its own
    with pytest.raises(ConfigError, match="no contextual attention"):
        Inpainter(make_checkpoint(tmp_path / "an.safetensors"), device="cpu").fill(image, mask, with_matches=True)


# Windows


def test_a_picture_at_the_limit_is_seen_whole_and_one_beyond_it_is_not(inpainter: Inpainter) -> None:
    assert inpainter.max_pixels == 4 * S * S
    box = (30, 12, 40, 22)
    (view,) = inpainter.fill(noise(64, 64), holes(64, 64, box)).views
    assert view.box == (0, 0, 64, 64)
    (view,) = inpainter.fill(noise(64, 65), holes(64, 65, box)).views
    assert view.box == (19, 1, 19 + S, 1 + S)


def test_a_window_is_the_generator_on_that_part(inpainter: Inpainter) -> None:
    image, mask = noise(100, 90), holes(100, 90, (50, 40, 75, 60))  # 25 x 20, so the window has 56 x 40
    filled = inpainter.fill(image, mask)
    assert [view.box for view in filled.views] == [(34, 30, 90, 70)]
    part = (slice(None), slice(34, 90), slice(30, 70))
    expected = image.clone()
    expected[part] = torch.where(mask[part], generated(inpainter, image[part], mask[part]), image[part])
    assert torch.equal(filled.image, expected)


@pytest.mark.parametrize("box", [(0, 0, 6, 6), (94, 134, 100, 140), (0, 70, 4, 90), (80, 3, 100, 139)])
def test_windows_lie_in_the_picture_around_their_hole(inpainter: Inpainter, box: tuple[int, int, int, int]) -> None:
    ((window, own),) = inpainter._windows(holes(100, 140, box)[0].numpy())
    top, left, bottom, right = window
    assert 0 <= top <= box[0] < box[2] <= bottom <= 100 and 0 <= left <= box[1] < box[3] <= right <= 140
    assert bottom - top >= S and right - left >= S
    for size, start, stop, length in ((100, top, bottom, box[2] - box[0]), (140, left, right, box[3] - box[1])):
        assert stop - start == size or ((stop - start) % 8 == 0 and stop - start >= 2 * length)
    assert torch.equal(own, holes(100, 140, box)[:, top:bottom, left:right])


def test_a_later_window_sees_what_an_earlier_one_filled_and_masks_what_none_has(inpainter: Inpainter) -> None:
    """Two holes whose common window is too large, and whose own windows overlap."""
    mask = holes(120, 120, (30, 30, 60, 60), (62, 62, 90, 90))
    image = noise(120, 120)
    (first, own), (second, _) = inpainter._windows(mask[0].numpy())
    parts = [(slice(None), slice(a, c), slice(b, d)) for a, b, c, d in (first, second)]
    expected, missing = image.clone(), mask.clone()
    made = generated(inpainter, expected[parts[0]], missing[parts[0]])
    assert (missing[parts[0]] & ~own).any()  # a part of the other hole is in sight
    expected[parts[0]] = torch.where(own, made, expected[parts[0]])
    missing[parts[0]] &= ~own
    made = generated(inpainter, expected[parts[1]], missing[parts[1]])
    expected[parts[1]] = torch.where(missing[parts[1]], made, expected[parts[1]])
    filled = inpainter.fill(image, mask)
    assert torch.equal(filled.image, expected)
    assert (filled.views[0].given == 128).all(0).sum() > own.sum()


def test_a_window_too_large_is_reduced_filled_and_enlarged(inpainter: Inpainter) -> None:
    """The picture has 128 x 128 pixels, four times the limit: so everything is halved."""
    image, mask = noise(128, 128), holes(128, 128, (20, 31, 100, 105))
    filled = inpainter.fill(image, mask)
    (view,) = filled.views
    assert view.box == (0, 0, 128, 128) and view.given.shape == (3, 64, 64)
    small_mask = holes(64, 64, (10, 15, 50, 53))  # a pixel is missing if one of its four is
    small = F.avg_pool2d(to_float(image)[None], 2)
    with torch.no_grad():
        made = inpainter.model(small.masked_fill(small_mask, 0), small_mask[None]).refined
    expected = to_uint8(F.interpolate(made, (128, 128), mode="bicubic")[0])
    assert torch.equal(filled.image, torch.where(mask, expected, image))
    assert torch.equal(view.given, to_uint8(small[0]).masked_fill(small_mask, 128))


@torch.no_grad()
def filled_one_by_one(inpainter: Inpainter, image: Tensor, mask: Tensor) -> Tensor:
    """Every window at its full size, in their order; each missing pixel in one of them."""
    image, missing = image.clone(), mask.clone()
    for (top, left, bottom, right), own in inpainter._windows(mask[0].numpy()):
        assert (bottom - top) * (right - left) <= inpainter.max_pixels
        part = (slice(None), slice(top, bottom), slice(left, right))
        assert not missing[part].all()
        made = to_uint8(inpainter.outputs(to_float(image[part])[None], missing[part][None]).refined[0])
        image[part] = torch.where(own, made, image[part])
        missing[part] ^= own
    assert not missing.any()
    return image


@pytest.mark.parametrize(("bar", "gap"), [(1, 7), (20, 4)], ids=["thin", "thick"])
def test_a_hole_that_would_hide_all_when_reduced_is_filled_by_pieces(inpainter: Inpainter, bar: int, gap: int) -> None:
    """A fence over 120 x 120 pixels, of which 64 x 64 are seen at once: connected, and no smaller pixel is known."""
    is_bar = torch.arange(120) % (bar + gap) >= gap
    mask = (is_bar[:, None] | is_bar)[None]
    image = noise(120, 120)
    filled = inpainter.fill(image, mask).image
    assert torch.equal(filled, filled_one_by_one(inpainter, image, mask))
    assert torch.equal(filled[:, ~mask[0]], image[:, ~mask[0]])
    other = inpainter.fill(255 - image, mask).image
    assert (filled != other)[:, mask[0]].float().mean() > 0.5  # the picture has a say


def test_a_scratch_is_filled_at_full_size_and_a_hole_as_thick_as_those_of_training_is_reduced(
    inpainter: Inpainter,
) -> None:
    image = noise(40, 300)
    for height, is_cut in ((S // 2 - 1, True), (S // 2, False)):
        mask = holes(40, 300, (10, 5, 10 + height, 295))
        views = inpainter.fill(image, mask).views
        assert (len(views) > 1) == is_cut == all(view.given.shape[1] == view.box[2] - view.box[0] for view in views)


def test_a_window_of_which_nothing_is_known_is_refused(inpainter: Inpainter) -> None:
    mask = ~holes(128, 128, (127, 127, 128, 128))
    with pytest.raises(UserError, match=r"nothing is known of a window of .*; a --max-pixels of more than 4096 would"):
        inpainter.fill(noise(128, 128), mask)


def test_specks_share_windows_with_room_for_the_largest(inpainter: Inpainter) -> None:
    """Against the rule, hole by hole, in plain Python."""
    generator = np.random.default_rng(0)
    mask = np.zeros((150, 170), bool)
    for row, column, height, width in zip(*generator.integers((0, 0, 1, 1), (140, 160, 9, 9), (120, 4)).T, strict=True):
        mask[row : row + height, column : column + width] = True
    labels = label(mask, connectivity=2)
    groups: list[list[tuple[int, int, int, int]]] = []

    def window(boxes: list[tuple[int, int, int, int]]) -> list[tuple[int, int]]:
        out = []
        for axis, size in enumerate(mask.shape):
            start, stop = min(box[axis] for box in boxes), max(box[axis + 2] for box in boxes)
            room = max(S // 4, *(box[axis + 2] - box[axis] for box in boxes))
            side = min(math.ceil(max(stop - start + room, S) / 8) * 8, size)
            begin = min(max((start + stop - side) // 2, 0), size - side)
            out.append((begin, begin + side))
        return out

    for box in sorted(region.bbox for region in regionprops(labels)):
        for group in groups:
            (top, bottom), (left, right) = window([*group, box])
            if (bottom - top) * (right - left) <= inpainter.max_pixels:
                group.append(box)
                break
        else:
            groups.append([box])
    found = inpainter._windows(mask)
    assert [((a, c), (b, d)) for (a, b, c, d), _ in found] == [tuple(window(group)) for group in groups]
    assert 8 < len(groups) < labels.max() / 4
    total = np.zeros(mask.shape, int)
    for (top, left, bottom, right), own in found:
        total[top:bottom, left:right] += own[0].numpy()
    assert np.array_equal(total, mask)


def test_progress_counts_the_windows(inpainter: Inpainter) -> None:
    told: list[tuple[int, int]] = []
    mask = holes(200, 200, (5, 5, 15, 15), (150, 5, 160, 15), (5, 150, 15, 160))
    inpainter.fill(noise(200, 200), mask, progress=lambda *numbers: told.append(numbers))
    assert told == [(1, 3), (2, 3), (3, 3)]


# Mistakes


def test_masks_that_cannot_be_meant_are_refused(inpainter: Inpainter, plain: Path) -> None:
    image = noise(40, 48)
    for mask in (holes(40, 48), ~holes(40, 48)):
        with pytest.raises(UserError, match="of nothing or of everything"):
            inpainter.fill(image, mask)
    with pytest.raises(UserError, match=r"the image is \[3, 40, 48\], its mask \[1, 48, 40\]"):
        inpainter.fill(image, holes(48, 40, (0, 0, 5, 5)))
    with pytest.raises(ConfigError, match="no layout to see"):
        Inpainter(plain, device="cpu").fill(image, holes(40, 48, (0, 0, 5, 5)), with_layouts=True)


def test_models_and_limits_that_do_not_fit_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_pixels is 1023; expected 0, or at least the 1024"):
        Inpainter(file, device="cpu", max_pixels=1023)
    with pytest.raises(CheckpointError, match="was trained for inpainting; expected a class-conditional generator"):
        Sampler(file, device="cpu")
    with pytest.raises(CheckpointError, match="was trained for class_conditional; expected an inpainting generator"):
        Inpainter("cifar10-an", device="cpu")  # which comes with the package


# The command line


def save(path: Path, pixels: Tensor, **options: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    array = pixels.numpy().astype(np.uint8)
    Image.fromarray(array[0] * 255 if len(array) == 1 else array.transpose(1, 2, 0)).save(path, **options)
    return path


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    return save(tmp_path / "in/x.png", noise(40, 48))


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    return save(tmp_path / "in/mask.png", holes(40, 48, (8, 10, 25, 30)))


@pytest.fixture
def inpaint(file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command with a model that has a layout; what it says on the standard output."""

    def inpaint(*arguments: object) -> str:
        capsys.readouterr()
        cli.main(["inpaint", str(file), *map(str, arguments), "--device", "cpu"])
        return capsys.readouterr().out

    return inpaint


def test_one_photograph_is_filled(
    inpaint: Callable[..., str], inpainter: Inpainter, photograph: Path, mask: Path
) -> None:
    out = photograph.parent / "new/x.png"
    assert inpaint(photograph, mask, "--out", out) == f"{out}: 17.7% of 48x40 pixels filled in one window\n"
    expected = Inpainter(inpainter.path, device="cpu").fill(noise(40, 48), holes(40, 48, (8, 10, 25, 30))).image
    assert np.array_equal(look_at(out), expected.permute(1, 2, 0).numpy())
    before = out.read_bytes()
    inpaint(photograph, mask, "--out", out, "--overwrite")
    assert out.read_bytes() == before


def test_the_polarity_and_threshold_of_a_mask_can_be_told(inpaint: Callable[..., str], photograph: Path) -> None:
    grey = torch.zeros(40, 48, dtype=torch.uint8)
    grey[:20], grey[:10] = 127, 128
    mask, out, before = photograph.parent / "grey.png", photograph.parent / "out.png", look_at(photograph)
    Image.fromarray(grey.numpy()).save(mask)
    for options, changed in (([], slice(0, 10)), (["--threshold", "127", "--invert"], slice(20, 40))):
        inpaint(photograph, mask, "--out", out, "--overwrite", *options)
        assert np.array_equal(np.flatnonzero((look_at(out) != before).any((1, 2))), np.arange(40)[changed])


def test_a_jpeg_says_what_it_loses_unless_a_png_is_asked_for(
    inpaint: Callable[..., str], mask: Path, tmp_path: Path
) -> None:
    source = save(tmp_path / "in/x.jpg", noise(40, 48), quality=70)
    said = inpaint(source, mask, "--out", tmp_path / "x.jpg")
    change = re.search(r"JPEG was encoded anew, which changed the other pixels by up to (\d+) of 255", said)
    apart = np.abs(look_at(tmp_path / "x.jpg").astype(int) - look_at(source))[look_at(mask) == 0].max()
    assert change and int(change[1]) == apart > 0
    assert "JPEG" not in inpaint(source, mask, "--out", tmp_path / "x.png")
    assert np.array_equal(look_at(tmp_path / "x.png")[look_at(mask) == 0], look_at(source)[look_at(mask) == 0])


def test_the_layout_is_drawn(
    inpaint: Callable[..., str], plain: Path, photograph: Path, mask: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    said = inpaint(photograph, mask, "--out", tmp_path / "x.png", "--layout", tmp_path / "layout.png")
    assert said.endswith(f"\n{tmp_path / 'layout.png'}\n")
    drawn = look_at(tmp_path / "layout.png")
    assert drawn.std() > 1 and drawn.shape[1] > 5 * drawn.shape[0]  # given, filled, argmax and four entities
    message = refused(["inpaint", plain, photograph, mask, "--out", tmp_path / "y.png", "--layout", tmp_path / "z.png"])
    assert "no AttentiveNorm2d (its context block is none), so there is no layout" in message
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["layout.png", "x.png"]


def test_nothing_is_written_for_a_mistake(
    file: Path, photograph: Path, mask: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = photograph.parent
    (folder / "there.png").write_text("mine", encoding="utf-8")
    (folder / "hard.png").hardlink_to(photograph)
    before = contents(tmp_path)
    out = tmp_path / "out.png"
    for arguments, remedy in (
        ((file, photograph, mask, "--out", folder / "there.png"), "already there; choose another --out"),
        ((file, photograph, mask, "--out", photograph, "--overwrite"), "is what is read"),
        ((file, photograph, mask, "--out", out, "--layout", folder / "../out.png"), "--out and --layout are both"),
        ((file, photograph, mask, "--out", out, "--layout", photograph, "--overwrite"), "choose another --layout"),
        ((file, photograph, mask, "--out", folder / "hard.png", "--overwrite"), "hard.png is what is read"),
        ((file, photograph, mask, "--out", "/dev/null", "--overwrite"), "is a pipe or a device"),
        ((file, photograph, mask, "--out", folder, "--overwrite"), "is a folder; expected a picture's name"),
        ((file, photograph, mask, "--out", out, "--layout", folder / "there.png"), "already there"),
        ((file, photograph, mask, "--out", out, "--lossless"), "let --out end in .png"),
        ((file, photograph, "--out", out), "expected IMAGE and MASK, or --images DIR"),
        ((file, photograph, mask, "--masks", folder, "--out", out), "expected IMAGE and MASK, or --images DIR"),
        ((file, "--images", folder, "--out", out), "--images takes --masks beside it"),
    ):
        assert remedy in refused(["inpaint", *arguments, "--device", "cpu"])
    assert contents(tmp_path) == before


# Folders


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three images with masks, one of them a JPEG, and one of each that is left over."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    for seed, name in enumerate(("a.png", "b.jpg", "c.bmp", "lone.png")):
        save(images / name, noise(33, 41, seed))
    for number, name in enumerate(("a.png", "b.png", "c.gif", "odd.png")):
        save(masks / name, holes(33, 41, (4, 5 + number, 20, 25)))
    return images, masks


def test_a_folder_is_filled_by_stem(
    inpaint: Callable[..., str], folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, masks = folders
    out, noted = tmp_path / "out", io.StringIO()
    monkeypatch.setattr(sys, "stderr", noted)
    said = inpaint("--images", images, "--masks", masks, "--out", out)
    assert sorted(contents(out)) == ["a.png", "b.jpg", "c.bmp", "inpaint.json"]
    assert f"left out, as this image has no mask: {images / 'lone.png'}" in noted.getvalue()
    assert f"left out, as this mask has no image: {masks / 'odd.png'}" in noted.getvalue()
    assert [line.split(":")[0] for line in said.splitlines()] == [str(out / n) for n in ("a.png", "b.jpg", "c.bmp")]
    for name, its_mask in (("a.png", "a.png"), ("c.bmp", "c.gif")):
        changed = (look_at(out / name) != look_at(images / name)).any(2)
        assert np.array_equal(changed, look_at(masks / its_mask) > 0)
    inpaint(images / "a.png", masks / "a.png", "--out", tmp_path / "alone.png")
    assert np.array_equal(look_at(tmp_path / "alone.png"), look_at(out / "a.png"))


def test_names_that_are_no_text_are_filled_too(
    inpaint: Callable[..., str], photograph: Path, mask: Path, tmp_path: Path
) -> None:
    name = os.fsdecode(b"na\xefve.png")
    for folder, source in (("images", photograph), ("masks", mask)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(source.read_bytes())
    said = inpaint("--images", tmp_path / "images", "--masks", tmp_path / "masks", "--out", tmp_path / "out")
    assert "na\\xefve.png: 17.7% of 48x40 pixels filled" in said
    assert (tmp_path / "out" / name).is_file()


def test_one_mask_may_serve_all_and_nothing_need_be_lost(
    inpaint: Callable[..., str], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    images, masks = folders
    Image.fromarray(noise(33, 41, 9).permute(1, 2, 0).numpy()).convert("CMYK").save(images / "d.jpeg")
    out = tmp_path / "out"
    inpaint("--images", images, "--masks", masks / "b.png", "--out", out, "--lossless")
    assert sorted(contents(out)) == ["a.png", "b.png", "c.bmp", "d.tif", "inpaint.json", "lone.png"]
    known = look_at(masks / "b.png") == 0
    for source, result in (("b.jpg", "b.png"), ("d.jpeg", "d.tif"), ("lone.png", "lone.png")):
        assert np.array_equal(look_at(out / result)[known], look_at(images / source)[known])


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    inpaint: Callable[..., str], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    images, masks = folders
    before = contents(tmp_path)
    lines = inpaint("--images", images, "--masks", masks, "--out", tmp_path / "out", "--dry-run").splitlines()
    assert lines[0] == (
        f"{images / 'a.png'} + {masks / 'a.png'} -> {tmp_path / 'out/a.png'}: 23.7% of 41x33 pixels to fill"
    )
    assert len(lines) == 3 and lines[1].endswith("to fill, as JPEG, which loses")
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry", [True, False], ids=["dry", "real"])
def test_what_cannot_be_filled_is_named_and_the_rest_is_filled(
    file: Path, folders: tuple[Path, Path], tmp_path: Path, refused: Callable[..., str], dry: bool
) -> None:
    images, masks = folders
    save(masks / "a.png", holes(33, 41))
    (images / "c.bmp").write_bytes(b"no picture")
    out = tmp_path / "out"
    command = ["inpaint", file, "--images", images, "--masks", masks, "--out", out, "--device", "cpu"]
    message = refused([*command, *(["--dry-run"] if dry else [])], is_silent=False)
    assert "not filled: by the mask" in message and f"not filled: cannot read the image {images}" in message
    assert f"attnorm: 2 of 3 images {'would not be' if dry else 'were not'} filled" in message
    assert sorted(contents(out)) == ([] if dry else ["b.jpg", "inpaint.json"])


def test_folders_that_cannot_be_meant_are_refused(
    file: Path, folders: tuple[Path, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    images, masks = folders
    save(images / "a.jpg", noise(33, 41, 8))
    (tmp_path / "file").touch()
    link, out = tmp_path / "link", tmp_path / "out"
    link.symlink_to(masks)
    before = contents(tmp_path)
    for arguments, remedy in (
        (("--images", images, "--masks", masks, "--out", images, "--overwrite"), "choose another --out"),
        (("--images", images, "--masks", masks / "a.png", "--out", masks, "--overwrite"), "a.png is what is read"),
        (("--images", images, "--masks", masks, "--out", link, "--overwrite"), "link is what is read"),
        (("--images", images, "--masks", masks, "--out", tmp_path / "file"), "is no folder"),
        (("--images", images, "--masks", masks, "--out", out, "--lossless"), "a.jpg is; rename one of them"),
        (("--images", images, "--masks", masks, "--out", out, "--layout", out), "neither IMAGE and MASK nor --layout"),
    ):
        assert remedy in refused(["inpaint", file, *arguments])
    assert contents(tmp_path) == before and not out.exists()


def test_a_folder_goes_on_with_what_is_missing(
    inpaint: Callable[..., str], file: Path, folders: tuple[Path, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    images, masks = folders
    out = tmp_path / "out"
    command = ("--images", images, "--masks", masks, "--out", out)
    inpaint(*command)
    whole = contents(out)
    (out / "b.jpg").unlink()
    (out / "a.png").write_bytes(b"as it was left")
    assert [line.split(":")[0] for line in inpaint(*command).splitlines()] == [str(out / "b.jpg")]
    assert contents(out) == whole | {"a.png": b"as it was left"}
    assert inpaint(*command, "--dry-run") == ""
    other = refused(["inpaint", file, *command, "--threshold", "9"])
    assert "was filled with threshold None, and now it is 9; choose" in other
    inpaint(*command, "--overwrite")
    assert contents(out) == whole
    (out / "inpaint.json").unlink()
    assert "already there; choose another --out" in refused(["inpaint", file, *command])
