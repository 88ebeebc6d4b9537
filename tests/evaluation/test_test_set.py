"""A manifest says which pixels and which masks, and nothing is measured on others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attnorm.checkpoint import CheckpointError
from attnorm.config import ConfigError, DataConfig, UserError
from attnorm.data.images import ImageSet, load_images
from attnorm.data.masks import centre_mask, rectangle_mask
from attnorm.evaluation.test_set import Manifest, Masks, make_manifest, read_examples, read_manifest
from tests.conftest import draw_photographs


def freeze(
    folder: Path, data: Path | str, *, masks: Masks = "rectangle", every: int = 3, seed: int = 4
) -> tuple[Manifest, ImageSet]:
    source = DataConfig(source=str(data), stored_size=40)
    images = load_images(str(data), 40)
    made = make_manifest(folder, images, source, image_size=32, masks=masks, seed=seed, every=every)
    return made, images


def test_a_manifest_names_every_third_image_with_its_pixels_and_mask(tmp_path: Path) -> None:
    data = draw_photographs(tmp_path / "data", 9)
    (data / "4b.png").write_bytes(b"no picture")  # is not among the images, so it does not count
    made, images = freeze(tmp_path / "manifest", data)
    assert read_manifest(tmp_path / "manifest") == made
    assert [entry.file for entry in made.entries] == ["2.png", "5.png", "8.png"]
    read = read_examples(made, images)
    for number, (entry, pixels, mask) in enumerate(zip(made.entries, *read, strict=True)):
        with Image.open(data / entry.file) as file:
            centre = np.asarray(file)[4:36, 4:36].transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels.numpy(), centre)
        assert entry.sha256 == hashlib.sha256(np.ascontiguousarray(centre).tobytes()).hexdigest()
        assert torch.equal(mask, rectangle_mask(32, seed=4, index=number).mask)
        with Image.open(tmp_path / "manifest" / entry.mask) as file:
            np.testing.assert_array_equal(np.asarray(file), 255 * mask[0].numpy())


def test_images_in_class_folders_and_built_in_ones_have_names_too(tmp_path: Path) -> None:
    for name in ("roof", "door"):
        draw_photographs(tmp_path / "data" / name, 3)
    made, _ = freeze(tmp_path / "manifest", tmp_path / "data", every=2)
    assert [entry.file for entry in made.entries] == ["door/1.png", "roof/0.png", "roof/2.png"]
    made, images = freeze(tmp_path / "all", tmp_path / "data", masks="centre", every=1)
    read = read_examples(made, images)
    assert len(read.images) == 6 and torch.equal(read.masks, centre_mask(32).mask.expand(6, -1, -1, -1))
    images, source = load_images("builtin", 32), DataConfig(source="builtin")
    made = make_manifest(tmp_path / "builtin", images, source, image_size=32, masks="centre", seed=0, every=700)
    assert [entry.file for entry in made.entries] == ["cameraman/187", "coins/119", "rocket/51"]  # 699, ... of 256 each
    assert images.classes[2] == "cameraman" and len(read_examples(made, images).images) == 3


def test_a_changed_image_is_found(tmp_path: Path) -> None:
    data = draw_photographs(tmp_path / "data", 9)
    made, _ = freeze(tmp_path / "manifest", data)
    with Image.open(data / "5.png") as file:
        pixels = np.array(file)
    pixels[20, 20, 1] ^= 1
    Image.fromarray(pixels).save(data / "5.png")
    with pytest.raises(UserError, match=r"do not match the manifest: 5\.png has other pixels\. Name the data"):
        read_examples(made, load_images(str(data), 40))
    pixels[20, 20, 1] ^= 1
    pixels[0, 0] ^= 255  # outside the centre square that is measured
    Image.fromarray(pixels).save(data / "5.png")
    read_examples(made, load_images(str(data), 40))


def test_a_missing_image_is_found_and_a_moved_folder_is_none(tmp_path: Path) -> None:
    data = draw_photographs(tmp_path / "data", 9)
    made, _ = freeze(tmp_path / "manifest", data)
    moved = data.rename(tmp_path / "elsewhere")
    read_examples(made, load_images(str(moved), 40))
    (moved / "8.png").unlink()
    with pytest.raises(UserError, match=r"8\.png is not there"):
        read_examples(made, load_images(str(moved), 40))


def test_a_changed_mask_is_found(tmp_path: Path) -> None:
    made, images = freeze(tmp_path / "manifest", draw_photographs(tmp_path / "data", 9))
    file = tmp_path / "manifest" / made.entries[1].mask
    pixels = np.zeros((32, 32), np.uint8)
    for change in (rectangle_mask(32, seed=5, index=1).mask[0].numpy(), pixels, pixels[:16]):
        Image.fromarray(change.astype(np.uint8) * 255).save(file)
        with pytest.raises(UserError, match=r"masks/00001\.png is another mask"):
            read_examples(made, images)
    file.unlink()
    with pytest.raises(UserError, match="there is no mask"):
        read_examples(made, images)


def test_masks_that_leave_nothing_to_measure_are_refused(tmp_path: Path) -> None:
    made, images = freeze(tmp_path / "manifest", draw_photographs(tmp_path / "data", 9))
    file, record = tmp_path / "manifest" / made.entries[0].mask, tmp_path / "manifest/manifest.json"
    corner = np.zeros((32, 32), np.uint8)
    corner[:5] = 1
    for pixels in (corner, np.ones_like(corner)):
        Image.fromarray(pixels * 255).save(file)
        values = json.loads(record.read_text())
        values["entries"][0]["mask_sha256"] = hashlib.sha256(pixels.tobytes()).hexdigest()
        record.write_text(json.dumps(values))
        with pytest.raises(UserError, match="leaves nothing to measure"):
            read_examples(read_manifest(tmp_path / "manifest"), images)


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json; `attnorm manifest` makes one"):
        read_manifest(tmp_path)
    for text in ("{", "[]", "{}", '{"format_version": 1, "data": {}, "entries": [{"file": "a"}]}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(CheckpointError, match="format 99"):
        read_manifest(tmp_path)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    data = draw_photographs(tmp_path / "data", 5)
    for every, message in ((3, "every 3th is 1; expected at least 2"), (0, "every is 0"), (9, "is 0; expected")):
        with pytest.raises(ConfigError, match=message):
            freeze(tmp_path / "manifest", data, every=every)
    assert not (tmp_path / "manifest").exists()
