"""Photographs as files: every mode and format, metadata, and that nothing outside the mask changes."""

# H height and W width as shown.

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile, ImageOps
from torch import Tensor

from attnorm.config import UserError
from attnorm.data.masks import read_mask
from attnorm.inference.photo_files import Photograph, read_photograph
from attnorm.inference.photo_pairs import output_format, pair_files, read_with_mask

HEIGHT, WIDTH = 11, 14
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape: int, most: int = 256, seed: int = 0) -> np.ndarray:
    dtype = np.uint8 if most <= 256 else np.uint16
    return np.random.default_rng(seed).integers(0, most, shape).astype(dtype)


def picture(mode: str) -> Image.Image:
    """Noise in a mode of Pillow's."""
    channels = {"LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1)
    pixels = noise(HEIGHT, WIDTH, channels)
    match mode:
        case "1":
            return Image.fromarray(pixels[..., 0] > 127)
        case "P":
            image = Image.fromarray(pixels[..., 0] % 40).convert("P")
            image.putpalette(noise(120, seed=1).tobytes())
            return image
        case "I;16":
            return Image.fromarray(noise(HEIGHT, WIDTH, most=65536))
        case "I":
            return Image.fromarray(noise(HEIGHT, WIDTH, most=65536).astype(np.int32))
    return Image.frombytes(mode, (WIDTH, HEIGHT), pixels.tobytes())


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(rows: np.ndarray, width: int, depth: int, colour_type: int, *extra: bytes) -> bytes:
    """A PNG file of rows of packed bytes, without filters."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *extra, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def unpack_png(data: bytes) -> dict[bytes, bytes]:
    position, chunks = 8, {}
    while position < len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        content = data[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", data, position + 8 + length)[0] == zlib.crc32(name + content)
        chunks[name] = chunks.get(name, b"") + content
        position += length + 12
    return chunks


def hole(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, 2:7, 3:9] = True
    mask[:, 0, 0] = True
    return mask


MISSING = hole()[0].numpy()


def filled(photograph: Photograph, mask: Tensor, seed: int = 7) -> Photograph:
    old = photograph.rgb()
    most = 65536 if old.dtype == torch.uint16 else 256
    return photograph.with_hole_filled(torch.from_numpy(noise(*old.shape, most=most, seed=seed)), mask)


def decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


FILES = [
    ("1", "PNG", {}),
    ("1", "TIFF", {"compression": "group4"}),
    ("L", "TIFF", {"compression": "tiff_lzw"}),
    ("L", "BMP", {}),
    ("LA", "TIFF", {}),
    ("P", "PNG", {"transparency": 3}),
    ("P", "PNG", {"transparency": bytes([0, 90, 255, 255] * 10)}),
    ("P", "GIF", {"transparency": 3}),
    ("P", "TIFF", {}),
    ("RGB", "PNG", {}),
    ("RGB", "TIFF", {"compression": "jpeg"}),
    ("RGB", "BMP", {}),
    ("RGB", "PPM", {}),
    ("RGB", "WEBP", {"quality": 50}),
    ("RGBA", "PNG", {}),
    ("RGBA", "TIFF", {"compression": "tiff_adobe_deflate"}),
    ("RGBA", "WEBP", {"lossless": True, "exact": True}),
    ("CMYK", "TIFF", {}),
    ("I;16", "PNG", {}),
    ("I;16", "TIFF", {}),
    ("I", "PPM", {}),
    ("I", "TIFF", {}),
]


@pytest.mark.parametrize(("mode", "format", "options"), FILES, ids=lambda value: str(value)[:24])
def test_outside_the_mask_every_sample_stays(mode: str, format: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Seen through Pillow, before and after; and inside the hole it is another picture, with the same alpha."""
    path = tmp_path / "photograph"  # what it is called does not matter
    picture(mode).save(path, format, **options)
    before = decode(path.read_bytes())
    photograph = read_photograph(path)
    after = decode(filled(photograph, hole()).encoded(format))
    assert (after.format, after.mode, after.size) == (format, before.mode, before.size)
    colours = "RGBA" if mode in ("P", "LA") else None
    old, new = (np.asarray(image.convert(colours) if colours else image) for image in (before, after))
    np.testing.assert_array_equal(new[~MISSING], old[~MISSING])
    assert (new[MISSING] != old[MISSING]).reshape(MISSING.sum(), -1).any(1).mean() > 0.3
    if "A" in (colours or mode):
        np.testing.assert_array_equal(new[..., -1], old[..., -1])


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 2)], ids=["RGB", "RGBA", "LA"])
def test_sixteen_bits_of_colour_stay_sixteen(colour_type: int, channels: int, tmp_path: Path) -> None:
    samples, path = noise(HEIGHT, WIDTH, channels, most=65536), tmp_path / "x.png"
    path.write_bytes(png(samples.astype(">u2").reshape(HEIGHT, -1), WIDTH, 16, colour_type))
    photograph = read_photograph(path)
    rgb = photograph.rgb()
    assert rgb.dtype == torch.uint16 and rgb.shape == (3, HEIGHT, WIDTH)
    expected = samples[..., :3] if channels > 2 else samples[..., :1].repeat(3, 2)
    np.testing.assert_array_equal(rgb.numpy(), expected.transpose(2, 0, 1))
    data = filled(photograph, hole()).encoded("PNG")
    assert unpack_png(data)[b"IHDR"] == unpack_png(path.read_bytes())[b"IHDR"]
    again = tmp_path / "again.png"
    again.write_bytes(data)
    new = read_photograph(again).samples
    np.testing.assert_array_equal(new[~MISSING], samples[~MISSING])
    assert (new[MISSING] != samples[MISSING]).mean() > 0.4
    if channels != 3:
        np.testing.assert_array_equal(new[..., -1], samples[..., -1])


@pytest.mark.parametrize(("depth", "colour_type"), [(1, 0), (2, 0), (2, 3), (4, 3)])
def test_png_of_few_bits_keeps_its_depth(depth: int, colour_type: int, tmp_path: Path) -> None:
    levels = noise(HEIGHT, WIDTH, most=2**depth)
    bits = np.unpackbits(levels[..., None], axis=2)[..., 8 - depth :].reshape(HEIGHT, -1)
    extra = [chunk(b"PLTE", noise(3 * 2**depth, seed=3).tobytes())] if colour_type == 3 else []
    path = tmp_path / "x.png"
    path.write_bytes(png(np.packbits(bits, axis=1), WIDTH, depth, colour_type, *extra))
    data = filled(read_photograph(path), hole()).encoded("PNG")
    assert unpack_png(data)[b"IHDR"] == unpack_png(path.read_bytes())[b"IHDR"]
    old, new = (np.asarray(decode(file).convert("RGB")) for file in (path.read_bytes(), data))
    np.testing.assert_array_equal(new[~MISSING], old[~MISSING])
    assert (new[MISSING] != old[MISSING]).any()


def test_all_but_the_pixels_of_a_png_is_copied(tmp_path: Path) -> None:
    extra = [
        chunk(b"gAMA", struct.pack(">I", 45455)),
        chunk(b"iCCP", b"mine\0\0" + zlib.compress(ICC)),
        chunk(b"pHYs", struct.pack(">IIB", 11811, 5905, 1)),
        chunk(b"tEXt", b"Comment\0a cat"),
        chunk(b"tIME", bytes([7, 228, 1, 2, 3, 4, 5])),
        chunk(b"prVt", b"private"),
    ]
    path = tmp_path / "x.png"
    path.write_bytes(png(noise(HEIGHT, WIDTH * 3), WIDTH, 8, 2, *extra))
    ours, theirs = unpack_png(filled(read_photograph(path), hole()).encoded("PNG")), unpack_png(path.read_bytes())
    assert ours.pop(b"IDAT") != theirs.pop(b"IDAT")
    assert list(ours.items()) == list(theirs.items())


def test_interlaced_pngs_are_written_plain(tmp_path: Path) -> None:
    """One pixel, so that the first pass of seven is all that there is."""
    path = tmp_path / "x.png"
    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 1)
    body = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0abc")), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    data = read_photograph(path).encoded("PNG")
    assert unpack_png(data)[b"IHDR"] == header[:-1] + b"\0"
    assert decode(data).getpixel((0, 0)) == tuple(b"abc")


def test_filters_make_smooth_pngs_small(tmp_path: Path) -> None:
    across = np.add.outer(np.arange(300) * 3, np.arange(200) * 5).astype(np.uint8)
    Image.fromarray(np.stack([across, across + 9, across.T[:1].repeat(300, 0)[:, :200]], 2)).save(tmp_path / "x.png")
    photograph = read_photograph(tmp_path / "x.png")
    data = photograph.encoded("PNG")
    np.testing.assert_array_equal(np.asarray(decode(data)), photograph.samples)  # rows beyond one part, too
    assert len(data) < photograph.samples.size / 20


# Metadata


def exif(orientation: int = 1) -> Image.Exif:
    out = Image.Exif()
    out[0x0112], out[0x010F], out[0x013B] = orientation, "A camera", "Someone"
    out.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    whole = Image.Exif()
    whole.load(out.tobytes())
    return whole


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("to", ["the same", "PNG", "TIFF"])
def test_metadata_are_kept(format: str, to: str, tmp_path: Path) -> None:
    to = format if to == "the same" else to
    path = tmp_path / "x"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">mine</x:xmpmeta>'
    options = {"exif": exif(), "icc_profile": ICC, "dpi": (300, 150)}
    if format in ("JPEG", "WEBP"):
        options["xmp"] = xmp
    picture("RGB").save(path, format, **options)
    before, after = (decode(data) for data in (path.read_bytes(), filled(read_photograph(path), hole()).encoded(to)))
    assert after.format == to
    ours, theirs = after.getexif(), before.getexif()
    assert (ours[0x010F], ours[0x013B]) == ("A camera", "Someone") == (theirs[0x010F], theirs[0x013B])
    assert ours.get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05"
    assert after.info["icc_profile"] == ICC
    if format != "WEBP":  # which has no place for it
        assert tuple(map(float, after.info["dpi"])) == pytest.approx((300, 150), rel=1e-3)
    if "xmp" in options:
        assert (after.info.get("xmp") or after.info["XML:com.adobe.xmp"].encode()) == xmp


def test_iptc_and_comment_of_a_jpeg_are_kept(tmp_path: Path) -> None:
    iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x0a\x1c\x02\x05\x00\x05title"
    segment = b"\xff\xed" + struct.pack(">H", len(iptc) + 2) + iptc
    picture("RGB").save(tmp_path / "x.jpg", comment=b"mine", extra=segment)
    data = read_photograph(tmp_path / "x.jpg").encoded("JPEG")
    assert segment in data and decode(data).info["comment"] == b"mine"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_thumbnail_inside_exif_is_dropped(format: str, tmp_path: Path) -> None:
    """It would still show what was taken away; the rest of EXIF stays, byte for byte."""
    stream = io.BytesIO()
    picture("RGB").save(stream, "JPEG")
    thumbnail = stream.getvalue()
    first = struct.pack("<HHHII", 1, 0x010F, 2, 4, int.from_bytes(b"cam\0", "little")) + struct.pack("<I", 26)
    second = struct.pack("<HHHIIHHIII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(thumbnail), 0)
    data = b"II*\0" + struct.pack("<I", 8) + first + second
    assert len(data) == 56
    picture("RGB").save(tmp_path / "x", format, exif=b"Exif\0\0" + data + thumbnail)
    assert thumbnail in (tmp_path / "x").read_bytes()
    after = read_photograph(tmp_path / "x").encoded(format)
    assert thumbnail not in after and thumbnail[20:200] not in after
    kept = decode(after)
    assert kept.getexif()[0x010F] == "cam" and not kept.getexif().get_ifd(1)
    assert kept.info["exif"].removeprefix(b"Exif\0\0")[:22] == data[:22]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_turned_photographs_are_seen_upright_and_stay_as_stored(orientation: int, format: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    options = {"lossless": True} if format == "WEBP" else {}
    picture("RGB").save(path, format, exif=exif(orientation), **options)
    before = decode(path.read_bytes())
    upright = np.asarray(ImageOps.exif_transpose(before))
    photograph = read_photograph(path)
    assert photograph.size == upright.shape[:2]
    np.testing.assert_array_equal(photograph.rgb().permute(1, 2, 0).numpy(), upright)
    mask = hole(*photograph.size)
    for to in {"PNG", "TIFF", format} - {"JPEG"}:
        after = decode(filled(photograph, mask).encoded(to))
        if to != "TIFF":  # which Pillow turns by itself
            assert after.size == before.size and after.getexif()[0x0112] == orientation
        shown = np.asarray(ImageOps.exif_transpose(after))
        expected = np.where(mask[0, :, :, None], filled(photograph, mask).rgb().permute(1, 2, 0).numpy(), upright)
        np.testing.assert_array_equal(shown, expected)
        assert (shown != upright)[mask[0].numpy()].mean() > 0.9


# Colours


def test_colours_become_what_the_mode_can_hold(tmp_path: Path) -> None:
    colour = torch.tensor([200, 30, 90], dtype=torch.uint8)[:, None, None].expand(3, HEIGHT, WIDTH)
    grey = round(0.299 * 200 + 0.587 * 30 + 0.114 * 90)
    deep = round(257 * (0.299 * 200 + 0.587 * 30 + 0.114 * 90))
    of_grey = {"L": [grey], "LA": [grey], "1": [grey >= 128], "I;16": [deep]}
    of_colour = {"RGB": [200, 30, 90], "RGBA": [200, 30, 90], "CMYK": [55, 225, 165, 0]}
    for mode, expected in (of_grey | of_colour).items():
        picture(mode).save(tmp_path / "x.tif")
        photograph = read_photograph(tmp_path / "x.tif")
        given = colour.to(torch.int32) * 257 if mode == "I;16" else colour
        samples = photograph.with_hole_filled(given.to(photograph.rgb().dtype), hole()).samples
        assert np.atleast_1d(samples[3, 4])[: len(expected)].tolist() == expected


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "raw"])
def test_a_tag_of_another_type_than_libtiff_expects_is_kept_and_harms_nothing(compression: str, tmp_path: Path) -> None:
    """A ClipPath that is a number: libtiff takes it for an address. So in a process of its own."""
    exif = Image.Exif()
    exif[343], exif[270] = 420, "a church"
    picture("RGB").save(tmp_path / "plain.tif", exif=exif, compression="raw")
    script = f"""
from pathlib import Path
import torch
from PIL import Image
from attnorm.inference.photo_files import read_photograph
photograph = read_photograph(Path({str(tmp_path / "plain.tif")!r}))
photograph._decoded.info["compression"] = {compression!r}
Path({str(tmp_path / "out.tif")!r}).write_bytes(photograph.encoded("TIFF"))
with Image.open({str(tmp_path / "out.tif")!r}) as image:
    assert image.getexif()[343] == 420 and image.getexif()[270] == "a church"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_exif_that_cannot_be_read_leaves_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    picture("RGB").save(path, exif=b"Exif\0\0garbage!")
    assert read_photograph(path).orientation == 1
    np.testing.assert_array_equal(read_photograph(path).samples, np.asarray(picture("RGB")))
    assert read_mask(path).shape == (1, HEIGHT, WIDTH)


@pytest.mark.parametrize("error", [TypeError, struct.error, IndexError, AttributeError])
def test_whatever_a_damaged_file_makes_a_decoder_raise_is_a_mistake_of_one_line(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error("inside the decoder")

    path = tmp_path / "photo.png"
    picture("RGB").save(path)
    photograph = read_photograph(path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    for read in (read_photograph, read_mask):
        with pytest.raises(UserError, match=r"cannot read the .* inside the decoder; expected"):
            read(path)
    monkeypatch.setattr(Photograph, "_png", fail)
    with pytest.raises(UserError, match="inside the decoder"):
        photograph.encoded("PNG")


def test_an_index_beyond_the_palette_is_no_fault(tmp_path: Path) -> None:
    indices = np.full((HEIGHT, WIDTH), 200, np.uint8)
    path = tmp_path / "few.png"
    path.write_bytes(png(indices, WIDTH, 8, 3, chunk(b"PLTE", bytes([0, 0, 0, 255, 255, 255]))))
    photograph = read_photograph(path)
    mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    mask[0, 2, 3] = True
    filled = photograph.with_hole_filled(torch.full((3, HEIGHT, WIDTH), 250, dtype=torch.uint8), mask)
    assert filled.samples[2, 3] == 1 and (filled.samples == 200).sum() == HEIGHT * WIDTH - 1


def test_the_nearest_colour_of_a_palette_with_the_same_alpha_is_taken(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 250, 0, 0, 0, 250, 0, 255, 0, 0])
    image.putdata([1, 2])
    image.save(tmp_path / "x.png", transparency=bytes([255, 255, 0, 0]))
    photograph = read_photograph(tmp_path / "x.png")
    rgb = torch.tensor([255, 1, 0], dtype=torch.uint8)[:, None, None].expand(3, 1, 2)
    # The pixel that is opaque takes the opaque red (1), the transparent one the transparent red (3).
    assert photograph.with_hole_filled(rgb, torch.ones(1, 1, 2, dtype=torch.bool)).samples.tolist() == [[1, 3]]


def test_a_colour_that_stands_for_transparency_stays_where_it_is(tmp_path: Path) -> None:
    pixels = np.array([[[9, 8, 7], [1, 2, 3], [1, 2, 3], [5, 5, 5]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", transparency=(9, 8, 7))
    rgb = torch.tensor([[[50, 9, 60, 0]], [[50, 8, 60, 0]], [[50, 7, 60, 0]]], dtype=torch.uint8)
    mask = torch.tensor([[[True, True, True, False]]])
    data = read_photograph(tmp_path / "x.png").with_hole_filled(rgb, mask).encoded("PNG")
    after = np.asarray(decode(data).convert("RGBA")).tolist()
    assert after == [[[9, 8, 7, 0], [9, 8, 6, 255], [60, 60, 60, 255], [5, 5, 5, 255]]]


@pytest.mark.parametrize(
    ("depth", "colour_type", "samples", "key", "expected"),
    [
        (2, 0, [0b00011011], [1], [0, 85, 0, 255]),
        (16, 2, [9, 9, 9, 8, 8, 8, 7, 7, 7], [8] * 3, [8, 8, 9, 8, 8, 8, 8, 8, 9]),
    ],
    ids=["2-bit", "16-bit"],
)
def test_the_transparent_colour_has_the_depth_of_its_file(
    depth: int, colour_type: int, samples: list[int], key: list[int], expected: list[int], tmp_path: Path
) -> None:
    """All pixels but the last become the colour of the transparent one, or what is next to it."""
    rows = np.array([samples], np.uint8 if depth < 8 else ">u2").view(np.uint8)
    width, colour, dtype = (4, 85, torch.uint8) if depth < 8 else (3, 8, torch.uint16)
    transparent = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    (tmp_path / "x.png").write_bytes(png(rows, width, depth, colour_type, transparent))
    photograph = read_photograph(tmp_path / "x.png")
    rgb = torch.full((3, 1, width), colour, dtype=dtype)
    mask = torch.ones(1, 1, width, dtype=torch.bool)
    mask[..., 3:] = False
    assert photograph.with_hole_filled(rgb, mask).samples.reshape(-1).tolist() == expected


@pytest.mark.parametrize("white", [0, 1], ids=["white-is-zero", "black-is-zero"])
def test_deep_grey_of_a_tiff_is_seen_and_kept_as_it_is_shown(white: int, tmp_path: Path) -> None:
    grey = noise(HEIGHT, WIDTH, most=65536)
    Image.fromarray(grey).save(tmp_path / "x.tif", tiffinfo={262: white})
    data = bytearray((tmp_path / "x.tif").read_bytes())
    at = data.index(struct.pack("<HHI", 262, 3, 1)) + 8  # Pillow writes 1 whatever is asked for
    data[at] = white
    (tmp_path / "x.tif").write_bytes(data)
    shown = grey if white else 65535 - grey
    photograph = read_photograph(tmp_path / "x.tif")
    np.testing.assert_array_equal(photograph.rgb()[0].numpy(), shown)
    again = decode(filled(photograph, hole()).encoded("TIFF"))
    assert again.tag_v2[262] == 1  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.asarray(again)[~MISSING], shown[~MISSING])


def test_integers_of_32_bits_up_to_255_are_eight_bits(tmp_path: Path) -> None:
    grey = noise(HEIGHT, WIDTH).astype(np.int32)
    Image.fromarray(grey).save(tmp_path / "x.tif")
    photograph = read_photograph(tmp_path / "x.tif")
    assert photograph.rgb().dtype == torch.uint8 and photograph.note == "its integers are kept with 8 bits"
    np.testing.assert_array_equal(photograph.rgb()[2].numpy(), grey)
    again = np.asarray(decode(filled(photograph, hole()).encoded("TIFF")))
    np.testing.assert_array_equal(again[~MISSING], grey[~MISSING])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"P1\n3 1\n1 0 1\n", [0, 255, 0]),
        (b"P2\n3 1\n15\n0 3 15\n", [0, 51, 255]),
        (b"P2\n3 1\n1000\n0 200 1000\n", [0, 13107, 65535]),
        (b"P3\n1 1\n255\n7 7 7\n", [7]),
        (b"P4\n3 1\n\xa0", [0, 255, 0]),
        (b"P5\n3 1\n255\n\x00\x07\xff", [0, 7, 255]),
        (b"P5\n2 1\n65535\n\x00\x07\xff\xff", [7, 65535]),
        (b"P6\n1 1\n255\n\x07\x07\x07", [7]),
    ],
    ids=lambda value: value[:2].decode() if isinstance(value, bytes) else "",
)
def test_the_netpbm_family_is_read(data: bytes, expected: list[int], tmp_path: Path) -> None:
    (tmp_path / "x.pnm").write_bytes(data)
    photograph = read_photograph(tmp_path / "x.pnm")
    assert photograph.rgb().reshape(3, -1).tolist() == [expected] * 3
    assert photograph.encoded("PPM")


# JPEG


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_keeps_its_tables_and_says_what_it_changes(mode: str, tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(64) * 2, np.arange(48)).astype(np.uint8)
    channels = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    image = Image.frombytes(mode, (48, 64), np.stack([smooth + 20 * i for i in range(channels)], 2).tobytes())
    image.save(tmp_path / "x.jpg", quality=83, subsampling=0)
    before = decode((tmp_path / "x.jpg").read_bytes())
    photograph = read_photograph(tmp_path / "x.jpg")
    mask = hole(64, 48)
    result = filled(photograph, mask)
    data = result.encoded("JPEG")
    after = decode(data)
    assert after.mode == mode and after.quantization == before.quantization
    apart = np.abs(np.asarray(after).astype(int) - np.asarray(before))
    assert result.largest_change(data, mask) == apart[~mask[0].numpy()].max() > 0
    assert apart[16:, 16:].max() <= 2  # blocks beside the hole's change by rounding only
    lossless = decode(result.encoded("TIFF"))
    np.testing.assert_array_equal(np.asarray(lossless)[~mask[0].numpy()], np.asarray(before)[~mask[0].numpy()])


def test_a_format_that_is_advised_is_one_that_holds_it(tmp_path: Path) -> None:
    picture("CMYK").save(tmp_path / "x.jpg")
    (tmp_path / "x.png").write_bytes(png(noise(HEIGHT, WIDTH * 6), WIDTH, 16, 2))
    for name, other, advice in (("x.jpg", "PNG", "tif"), ("x.png", "TIFF", "png")):
        with pytest.raises(
            UserError, match=rf"cannot be kept in {other} exactly .*; let the output end in \.{advice}$"
        ):
            read_photograph(tmp_path / name).encoded(other)


def test_what_comes_back_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held by decoding what was encoded: here by an encoder that loses."""
    picture("RGB").save(tmp_path / "x.webp", lossless=True)
    photograph = read_photograph(tmp_path / "x.webp")
    assert photograph.encoded("WEBP")
    monkeypatch.setattr(Photograph, "_options", lambda self, format: {"quality": 60})
    with pytest.raises(UserError, match=r"cannot be kept in WEBP exactly \(it comes back changed\).*\.png or \.tif"):
        photograph.encoded("WEBP")


# Mistakes


def save_mask(path: Path, mask: np.ndarray) -> Path:
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return path


def test_a_mask_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    picture("RGB").save(tmp_path / "x.png")
    picture("RGB").save(tmp_path / "turned.jpg", exif=exif(6))
    full = np.ones((HEIGHT, WIDTH), bool)
    masks = {
        name: save_mask(tmp_path / f"{name}.png", mask)
        for name, mask in {"empty": ~full, "full": full, "lying": full.T, "fine": MISSING}.items()
    }
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    for image, mask, message in (
        ("x.png", masks["empty"], r"empty\.png nothing of .*x\.png is missing: its pixels are all of grey 0; expected"),
        ("x.png", masks["full"], r"full\.png all of .*x\.png is missing: its pixels are all of grey 255; expected"),
        ("x.png", masks["lying"], r"mask .*lying\.png has 11x14 pixels, but .*x\.png has 14x11; expected equal sizes"),
        ("turned.jpg", masks["fine"], r"has 14x11 .* has 11x14, turned as its EXIF data say \(orientation 6\)"),
        ("x.png", tmp_path / "text.png", r"cannot read the mask"),
        ("x.png", tmp_path / "none.png", r"there is no mask"),
        ("none.png", masks["fine"], r"there is no image .*none\.png"),
        ("text.png", masks["fine"], r"cannot read the image .*text\.png: it is no image"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_with_mask(tmp_path / image, mask)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("greys", "threshold", "advice"),
    [
        ((3, 5, 9), None, (9, "T 9 or less")),
        ((200, 210, 255), None, (201, "T more than 200")),
        ((3, 9, 9), 10, (9, "T 9 or less")),
    ],
)
def test_the_advice_on_a_mask_is_its_remedy(
    greys: tuple[int, ...], threshold: int | None, advice: tuple[int, str], tmp_path: Path
) -> None:
    picture("RGB").save(tmp_path / "x.png")
    mask = np.tile(np.array(greys, np.uint8), HEIGHT * WIDTH)[: HEIGHT * WIDTH].reshape(HEIGHT, WIDTH)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = tmp_path / "x.png", tmp_path / "mask.png"
    for invert in (False, True):
        message = f"from {min(greys)} to {max(greys)} of 255; say --threshold T, with {advice[1]}"
        with pytest.raises(UserError, match=message):
            read_with_mask(*files, threshold=threshold, invert=invert)
        _, missing = read_with_mask(*files, threshold=advice[0], invert=invert)
        assert np.array_equal(missing[0], (mask >= advice[0]) != invert)


def test_files_that_would_not_be_kept_are_refused(tmp_path: Path) -> None:
    picture("RGB").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    frames = [picture("P"), Image.fromarray(noise(HEIGHT, WIDTH, seed=5))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    picture("RGB").save(tmp_path / "pages.tif", save_all=True, append_images=[picture("RGB")])
    picture("L").convert("F").save(tmp_path / "float.tif")
    Image.new("LAB", (4, 4)).save(tmp_path / "lab.tif")
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "wide.tif")
    picture("RGB").save(tmp_path / "x.jp2")
    (tmp_path / "deep.ppm").write_bytes(b"P6\n2 2\n65535\n" + noise(12, most=65536).astype(">u2").tobytes())
    (tmp_path / "deep.tif").write_bytes(deep_tiff())
    (tmp_path / "telephone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in {
        "cut.png": r"cut\.png: .*(truncated|broken)",
        "moving.gif": "it has 2 frames",
        "pages.tif": "it has 2 frames",
        "float.tif": "mode F: convert it to RGB",
        "lab.tif": "mode LAB: convert it to RGB",
        "wide.tif": "integer pixels from 70000 to 70000, whose range is not known",
        "pipe.png": "not a regular file",
        "x.jp2": "it is JPEG2000; expected one of PNG, JPEG",
        "deep.ppm": "16 bits a channel in colour, which are kept in PNG only",
        "deep.tif": "16 bits a channel in colour, which are kept in PNG only",
        "telephone.jpg": r"it is HEIC: save it as JPEG; expected one of PNG",
        "folder.png": "cannot read the image",
    }.items():
        with pytest.raises(UserError, match=message):
            read_photograph(tmp_path / name)


def deep_tiff() -> bytes:
    """2x2 RGB pixels of 16 bits, uncompressed."""
    # tag, type, count, value
    fields = "256 3 1 2, 257 3 1 2, 258 3 3 8, 259 3 1 1, 262 3 1 2, 273 4 1 14, 277 3 1 3, 279 4 1 24"
    entries = [struct.pack("<HHII", *map(int, field.split())) for field in fields.split(",")]
    data = b"II*\0" + struct.pack("<I", 38) + struct.pack("<HHH", 16, 16, 16) + bytes(range(24))
    return data + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def test_the_name_of_the_output_says_how_it_is_written(tmp_path: Path) -> None:
    picture("RGB").save(tmp_path / "x.jpg")
    photograph = read_photograph(tmp_path / "x.jpg")
    for name, format in {"a.jpg": "JPEG", "a.JPEG": "JPEG", "a.png": "PNG", "a.tiff": "TIFF"}.items():
        assert output_format(photograph, Path(name)) == format
    for name in ("a.webp", "a", "a.txt"):
        with pytest.raises(UserError, match=r"x\.jpg is JPEG; expected a name in \.jpg, .*\.png, \.tif"):
            output_format(photograph, Path(name))


# Folders


def test_images_are_paired_with_masks_of_their_stem(tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder, names in ((images, "b.jpg a.PNG c.tif lone.png notes.txt .hidden.png"), (masks, "a.png b.gif odd.bmp")):
        folder.mkdir()
        for name in names.split():
            (folder / name).touch()
    (masks / "c.png").touch()
    (images / "deeper").mkdir()
    found = pair_files(images, masks)
    expected = {"a.PNG": "a.png", "b.jpg": "b.gif", "c.tif": "c.png"}
    assert found.pairs == [(images / image, masks / mask) for image, mask in expected.items()]
    assert found.images_left == [images / "lone.png"] and found.masks_left == [masks / "odd.bmp"]
    one = pair_files(images, masks / "a.png")
    assert [mask.name for _, mask in one.pairs] == ["a.png"] * 4 and not one.images_left and not one.masks_left


def test_names_are_paired_however_unicode_spells_them(tmp_path: Path) -> None:
    """As macOS and others write the same name; where both spellings are there, each has its own."""
    composed, apart = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    images, masks = tmp_path / "images", tmp_path / "masks"
    for path in (images / apart, masks / composed):
        path.parent.mkdir()
        path.touch()
    assert pair_files(images, masks).pairs == [(images / apart, masks / composed)]
    (masks / apart).touch()
    assert pair_files(images, masks).pairs == [(images / apart, masks / apart)]


def test_folders_that_cannot_be_paired_are_refused(tmp_path: Path) -> None:
    images, masks, empty = (tmp_path / name for name in ("images", "masks", "empty"))
    for folder in (images, masks, empty):
        folder.mkdir()
    (images / "a.png").touch()
    (masks / "b.png").touch()
    for arguments, message in (
        ((images, masks), r"no mask in .*masks has the name of an image in .*images; expected for example a\.png"),
        ((images, empty), r"empty holds no image"),
        ((empty, masks), r"empty holds no image"),
        ((tmp_path / "none", masks), r"--images is .*none, which is not a folder"),
        ((images, tmp_path / "none"), r"--masks is .*none, which is not a folder"),
        ((images, images), r"expected a folder for each"),
    ):
        with pytest.raises(UserError, match=message):
            pair_files(*arguments)
    for name in ("a.png", "a.gif"):
        (masks / name).touch()
    with pytest.raises(UserError, match=r"a\.png has several masks in .*: a\.gif and a\.png; expected one"):
        pair_files(images, masks)
