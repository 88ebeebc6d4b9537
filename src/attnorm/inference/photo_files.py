"""Photographs as files: read, filled where a mask says so, and written with everything else as it was.

Where a file is lossless, what lies outside the mask decodes to the same samples as before, bit for bit: whatever is
encoded here is decoded again and compared before anyone gets it.
"""

# H height and W width as shown (turned as EXIF says), M missing pixels.

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from attnorm.config import UserError
from attnorm.data.sources import deep_grey, deep_png, read_regular, require_pixels

# What is read and written, by Pillow's names; other formats may hold more bits than Pillow gives.
SUFFIXES = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I")
_LUMINANCE = np.array([299, 587, 114]) / 1000
_LOSSLESS_TIFF = ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "group3", "group4")
# How samples lie in a TIFF file, which is written anew; all other tags are kept.
_TIFF_STRUCTURE = {
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325),
    *(338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
}
# Tags that libtiff, which writes compressed files, gets from Pillow as it expects them. With any other the pixels are
# not compressed, and Pillow writes the file itself: in libtiff a ClipPath that is stored as a number ends the process.
_KNOWN_TO_LIBTIFF = {270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 700, 33432, 34675}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, eq=False)
class Photograph:
    """One picture from a file. A mask and `rgb` are as it is shown; `samples` are as they are stored.

    Attributes:
        path: Where it was read.
        format: A key of `SUFFIXES`.
        mode: Pillow's, for example "RGB"; of colour with 16 bits a channel "RGB;16", "RGBA;16" or "LA;16".
        samples: [rows, columns] or [rows, columns, channels], of bool, uint8, uint16 or int32.
        orientation: EXIF's, 1 to 8: how the stored rows are to be turned.
        note: What is not kept, whatever is written; empty if nothing.
    """

    path: Path
    format: str
    mode: str
    samples: np.ndarray
    orientation: int
    note: str
    _decoded: Image.Image  # palette and metadata
    _file: bytes

    @property
    def size(self) -> tuple[int, int]:
        """H and W."""
        height, width = self.samples.shape[:2]
        return (height, width) if self.orientation < 5 else (width, height)

    @property
    def is_deep(self) -> bool:
        """Whether there are 16 bits a channel."""
        return ";16" in self.mode or self.mode == "I"

    def rgb(self) -> Tensor:
        """[3, H, W], uint8, or uint16 where there are 16 bits: what a network is to see of the photograph.

        The values are the file's: an ICC profile is kept, not applied, and colours under transparent pixels count as
        they are. Grey stands for three equal channels; CMYK is converted without a profile.
        """
        x = self.samples
        match self.mode:
            case "1":
                colours = x[..., None].repeat(3, 2) * np.uint8(255)
            case "P":
                colours = self._palette()[:, :3][x]
            case "CMYK":
                colours = np.asarray(self._image(x).convert("RGB"))
            case "RGB" | "RGBA" | "RGB;16" | "RGBA;16":
                colours = x[..., :3]
            case _:
                colours = (x if x.ndim == 2 else x[..., 0])[..., None].repeat(3, 2)
        colours = colours.astype(np.uint16 if self.is_deep else np.uint8)
        return torch.from_numpy(np.ascontiguousarray(_upright(colours, self.orientation).transpose(2, 0, 1)))

    def with_hole_filled(self, rgb: Tensor, mask: Tensor) -> Photograph:
        """A copy with the colours of `rgb` ([3, H, W], of the type that `rgb()` has) where `mask` (bool [1, H, W]) is
        True. No other sample changes, and alpha changes nowhere.

        Colours become what the mode can hold: their luminance, black or white, the palette's nearest of equal alpha.
        Where a colour stands for transparency, pixels of that colour stay, and no other pixel gets it.
        """
        stored = _stored(mask[0].numpy(), self.orientation)
        samples = self.samples.copy()
        old = samples[stored]
        new = self._from_rgb(_stored(rgb.numpy().transpose(1, 2, 0), self.orientation)[stored], old)
        key = self._decoded.info.get("transparency") if self.mode in ("1", "L", "RGB", "I;16", "RGB;16") else None
        if key is not None:
            step = self._grey_step()
            key = bool(key) if self.mode == "1" else np.multiply(key, step)
            new, old = new.reshape(len(new), -1), old.reshape(len(old), -1)
            taken = (new == key).all(1)
            new[taken, -1] = (new[taken, -1] // step ^ 1) * step  # the smallest change
            new = np.where((old == key).all(1, keepdims=True), old, new)
            new = new.reshape(samples[stored].shape)
        samples[stored] = new
        return replace(self, samples=samples)

    def encoded(self, format: str) -> bytes:
        """The bytes of a file of `format`, with EXIF data, ICC profile, resolution and XMP kept.

        PNG to PNG, everything but the pixels is copied as it is. Lossless WebP is written whatever WebP was read, and
        a compression of TIFF that loses is replaced by one that does not. EXIF's thumbnail is dropped: it would still
        show what the photograph no longer does. JPEG is written with the file's own quantization tables and loses all
        the same: `largest_change` says how much.

        Raises:
            UserError: `format` cannot hold these pixels exactly (JPEG cannot hold this mode).
        """
        try:
            return self._encoded(format)
        except MemoryError:
            raise
        except Exception as error:  # of Pillow's any at all
            others = [suffix for suffix, other in ((".png", "PNG"), (".tif", "TIFF")) if self._fits(other, format)]
            remedy = f"let the output end in {' or '.join(others)}" if others else "convert it to RGB first"
            raise UserError(
                f"{self.path} with its mode {self.mode} cannot be kept in {format} exactly ({error}); {remedy}"
            ) from None

    def _encoded(self, format: str) -> bytes:
        if format == self.format == "PNG":
            data = self._png()
        elif ";16" in self.mode and self.mode not in ("I;16", "I;16B"):
            raise ValueError(f"{format} is not written with 16 bits a channel in colour")
        else:
            stream = io.BytesIO()
            self._image(self.samples).save(stream, format, **self._options(format))
            data = stream.getvalue()
        if format != "JPEG" and not self._is_held_by(data):
            raise ValueError("it comes back changed")
        return data

    def _fits(self, format: str, refused: str) -> bool:
        with contextlib.suppress(Exception):
            return format != refused and bool(self._encoded(format))
        return False

    def largest_change(self, data: bytes, mask: Tensor) -> int:
        """By how many levels the file `data` differs from this photograph, at most, where `mask` is False."""
        with Image.open(io.BytesIO(data)) as image:
            apart = np.subtract(np.asarray(image), self.samples, dtype=np.int16)
        apart[_stored(mask[0].numpy(), self.orientation)] = 0
        return int(np.abs(apart, out=apart).max())

    def _palette(self) -> np.ndarray:
        """uint8 [256, 4], red, green, blue, alpha."""
        table = np.zeros((256, 4), np.uint8)
        values = np.array(self._decoded.getpalette("RGBA"), np.uint8).reshape(-1, 4)
        table[: len(values)] = values
        key = self._decoded.info.get("transparency")
        if isinstance(key, bytes):
            table[: len(key), 3] = np.frombuffer(key, np.uint8)[:256]
        elif key is not None:
            table[key, 3] = 0
        return table

    def _from_rgb(self, colours: np.ndarray, old: np.ndarray) -> np.ndarray:
        """Colours [M, 3] as samples [M] or [M, channels]; alpha is that of the samples `old`."""
        if self.mode == "P":
            num_colours = len(self._decoded.getpalette() or ()) // 3
            return _nearest(colours, self._palette()[old, 3:], self._palette()[:num_colours])
        if self.mode == "CMYK":
            return np.asarray(Image.fromarray(colours[None]).convert("CMYK"))[0]
        new = old.copy()
        if self.mode.startswith("RGB"):
            new[:, :3] = colours
            return new
        grey = colours @ _LUMINANCE
        if self.mode == "1":
            return grey >= 128
        step = self._grey_step()
        grey = np.rint(np.rint(grey / step) * step)
        if new.ndim == 1:
            return grey.astype(new.dtype)
        new[:, 0] = grey
        return new

    def _image(self, samples: np.ndarray) -> Image.Image:
        """As Pillow has it, with this photograph's palette."""
        data = np.packbits(samples, axis=1) if self.mode == "1" else samples
        image = Image.frombytes(self.mode, samples.shape[1::-1], data.tobytes())
        if self.mode == "P":
            image.putpalette(self._decoded.palette.getdata()[1], self._decoded.palette.mode)  # type: ignore[union-attr]
        return image

    def _options(self, format: str) -> dict[str, Any]:
        """How Pillow is to write it, and what it is to keep."""
        decoded, info = self._decoded, self._decoded.info
        exif: Any = info.get("exif", b"")
        if self.format == "TIFF":
            exif = decoded.getexif()
            for tag in _TIFF_STRUCTURE & set(exif):
                del exif[tag]
        elif exif:
            exif = _without_thumbnail(exif)
        options: dict[str, Any] = {"exif": exif, "icc_profile": info.get("icc_profile")}
        if "dpi" in info:
            options["dpi"] = tuple(map(float, info["dpi"]))
        if info.get("transparency") is not None:
            options["transparency"] = info["transparency"]
        xmp = info.get("xmp")
        match format:
            case "JPEG":
                options |= {"qtables": getattr(decoded, "quantization", None), "optimize": True, "xmp": xmp or b""}
                sampling = JpegImagePlugin.get_sampling(decoded)
                options["subsampling"] = sampling if sampling >= 0 else 0
                options["progressive"] = bool(info.get("progressive"))
                options["keep_rgb"] = self.mode == "RGB" and info.get("adobe_transform") == 0
                options["extra"] = b"".join(
                    b"\xff\xed" + struct.pack(">H", len(content) + 2) + content
                    for name, content in getattr(decoded, "applist", ())
                    if name == "APP13"  # IPTC
                )
                if "comment" in info:
                    options["comment"] = info["comment"]
            case "WEBP":
                options |= {"lossless": True, "exact": True, "xmp": xmp or b""}
            case "TIFF":
                if isinstance(exif, bytes):
                    stored, exif = exif, Image.Exif()
                    if stored:
                        exif.load(stored)
                    if xmp:
                        exif[700] = xmp
                options["exif"] = exif
                kept = info.get("compression")
                if set(exif) - _KNOWN_TO_LIBTIFF:  # EXIF's own directory and GPS among them
                    kept = "raw"
                options["compression"] = kept if kept in _LOSSLESS_TIFF else "tiff_adobe_deflate"
            case "PNG" if xmp:
                text = PngImagePlugin.PngInfo()
                text.add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8", "replace"))
                options["pnginfo"] = text
        if format == "GIF" and "comment" in info:
            options["comment"] = info["comment"]
        return options

    def _is_held_by(self, data: bytes) -> bool:
        """Whether a file decodes to exactly these samples (of a palette: to these colours)."""
        try:
            other = decode_photograph(self.path, data)
        except UserError:
            return False
        # As they are shown: Pillow turns a TIFF file itself.
        ours, theirs = (_upright(part.samples, part.orientation) for part in (self, other))
        if self.mode == other.mode == "P":
            ours, theirs = self._palette()[ours], other._palette()[theirs]
        is_integer = {self.mode, other.mode} <= {"I", "I;16", "I;16B"}  # one thing to a reader
        return (is_integer or self.mode == other.mode) and np.array_equal(ours, theirs)

    def _grey_step(self) -> int:
        """Between greys: a PNG of 2 or 4 bits has few."""
        depth = self._file[24] if self.format == "PNG" and self.mode == "L" else 8
        return 255 // (2**depth - 1)

    def _png(self) -> bytes:
        """This photograph's PNG file with other pixels."""
        pixels = self._png_pixels()
        out = [_PNG_SIGNATURE]
        for name, content in _png_chunks(self._file):
            if name == b"IHDR":
                content = content[:12] + b"\0"  # not interlaced
            elif name == b"eXIf":
                content = _without_thumbnail(content)
            elif name == b"IDAT":
                content, pixels = pixels, b""
                if not content:
                    continue  # one chunk holds it all
            out += [struct.pack(">I", len(content)), name, content, struct.pack(">I", zlib.crc32(name + content))]
        return b"".join(out)

    def _png_pixels(self) -> bytes:
        """What the file's IDAT chunks are to hold, at its depth: taken from what Pillow writes of the same bytes."""
        depth, samples = self._file[24], self.samples
        if self.mode in ("RGB;16", "RGBA;16"):  # not Pillow's; each row as its difference from that above
            rows = samples.astype(">u2").reshape(len(samples), -1).view(np.uint8)
            filtered = np.diff(rows, axis=0, prepend=np.uint8(0))
            return zlib.compress(np.insert(filtered, 0, 2, axis=1).tobytes())
        if self.mode == "LA;16":  # four bytes a pixel
            image = Image.frombytes("RGBA", samples.shape[1::-1], samples.astype(">u2").tobytes())
        elif self.mode == "L" and depth < 8:  # as bits of a palette
            image = Image.frombytes("P", samples.shape[1::-1], (samples // self._grey_step()).tobytes())
        else:
            image = self._image(samples)
        stream = io.BytesIO()
        image.save(stream, "PNG", **({"bits": depth} if image.mode == "P" else {}))
        return b"".join(content for name, content in _png_chunks(stream.getvalue()) if name == b"IDAT")


def read_photograph(path: Path) -> Photograph:
    """The photograph in a file of one of the formats of `SUFFIXES`, whatever the file is called.

    Raises:
        UserError: it cannot be read, has several frames, or has pixels that would not be kept exactly.
    """
    try:
        data = read_regular(path)
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read the image {path}: {reason}; expected an image file") from None
    return decode_photograph(path, data)


def decode_photograph(path: Path, data: bytes, *, max_pixels: int | None = None) -> Photograph:
    """`read_photograph` of a file's content; `path` is what it is called in messages and by its copies.

    Args:
        max_pixels: A larger picture is refused before anything of it is decoded.
    """
    note = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large photographs are no attack
            image = Image.open(io.BytesIO(data))
            if max_pixels is not None:
                require_pixels(image, max_pixels)
            _check_kept(image)
            image.load()
        format, mode = image.format or "", image.mode
        if format == "PNG" and data[24] == 16 and data[25] != 0:
            mode = {2: "RGB;16", 4: "LA;16", 6: "RGBA;16"}[data[25]]
            samples = deep_png(data)
        else:
            samples = np.array(image)
        if mode.startswith("I"):
            grey, few = deep_grey(samples, image), int(samples.max()) <= 255
            samples = grey.astype(samples.dtype)
            if mode == "I" and format == "TIFF" and few:
                mode, samples, note = "L", (grey // 257).astype(np.uint8), "its integers are kept with 8 bits"
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes decoders fail in any way at all
        if isinstance(error, UnidentifiedImageError):
            is_heic = data[4:11] in (b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf")
            error = ValueError(f"it is {'HEIC: save it as JPEG' if is_heic else 'no image, or of an unknown kind'}")
        raise UserError(f"cannot read the image {path}: {error}; expected one of {', '.join(SUFFIXES)}") from None
    if format == "MPO":
        format, note = "JPEG", "only the first of its pictures is kept"
    return Photograph(path, format, mode, samples, _orientation(image), note, image, data)


def _orientation(image: Image.Image) -> int:
    """As EXIF says it; 1, upright, where that cannot be read."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # as of pixels, any at all
        return 1
    return orientation if orientation in range(1, 9) else 1


def _check_kept(image: ImageFile.ImageFile) -> None:
    """ValueError where Pillow would give less than the file holds."""
    if image.format not in (*SUFFIXES, "MPO"):
        raise ValueError(f"it is {image.format}")
    if image.format != "MPO" and (num_frames := getattr(image, "n_frames", 1)) > 1:
        raise ValueError(f"it has {num_frames} frames: save the one that is meant by itself")
    if image.mode not in _MODES:
        raise ValueError(f"its pixels are of mode {image.mode}: convert it to RGB")
    depth = 8
    if image.format == "TIFF":
        depth = max(getattr(image, "tag_v2", {}).get(258, (8,)))  # BitsPerSample
    elif image.format == "PPM" and image.tile[0].codec_name.startswith("ppm"):
        args = image.tile[0].args  # a mode and the largest value; of bits no value
        depth = args[1].bit_length() if isinstance(args, tuple) else 1
    if depth > 8 and not image.mode.startswith("I"):
        raise ValueError(f"it has {depth} bits a channel in colour, which are kept in PNG only: convert it to PNG")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(_PNG_SIGNATURE)
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        yield name, data[position + 8 : position + 8 + length]
        position += length + 12


def _upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Rows and columns as they are shown; the inverse of `_stored`."""
    turned = stored.swapaxes(0, 1) if orientation >= 5 else stored
    return _flipped(turned, orientation)


def _stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    flipped = _flipped(upright, orientation)
    return flipped.swapaxes(0, 1) if orientation >= 5 else flipped


def _flipped(array: np.ndarray, orientation: int) -> np.ndarray:
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return array[::down, ::across]


def _nearest(colours: np.ndarray, alpha: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """For colours [M, 3] the index of the nearest entry of the same `alpha` [M, 1]; uint8 [M]."""
    table = palette.astype(np.int64)
    wanted, inverse = np.unique(np.concatenate([colours, alpha], axis=1).astype(np.int64), axis=0, return_inverse=True)
    weights = np.array([1, 1, 1, 1000])  # no difference of colours outweighs one of alpha
    nearest = np.empty(len(wanted), np.uint8)
    for start in range(0, len(wanted), 4096):
        apart = wanted[start : start + 4096, None] - table
        nearest[start : start + 4096] = (apart**2 * weights**2).sum(2).argmin(1)
    return nearest[inverse.reshape(-1)]


def _without_thumbnail(exif: bytes) -> bytes:
    """EXIF data with the link to the second directory, and the picture that it names, set to zero; else as they are."""
    start = 6 if exif.startswith(b"Exif\0\0") else 0
    order = {b"II": "<", b"MM": ">"}.get(exif[start : start + 2])
    if order is None:
        return exif
    data = bytearray(exif)
    try:
        (first,) = struct.unpack_from(f"{order}I", data, start + 4)
        (num_entries,) = struct.unpack_from(f"{order}H", data, start + first)
        link = start + first + 2 + 12 * num_entries
        (second,) = struct.unpack_from(f"{order}I", data, link)
        if not second:
            return exif
        (num_entries,) = struct.unpack_from(f"{order}H", data, start + second)
        values = {}
        for index in range(num_entries):
            tag, _, _, value = struct.unpack_from(f"{order}HHII", data, start + second + 2 + 12 * index)
            values[tag] = value
        struct.pack_into(f"{order}I", data, link, 0)
    except struct.error:  # damaged: nobody will find a picture in it
        return exif
    begin = min(start + values.get(0x0201, 0), len(data))  # JPEGInterchangeFormat and its length
    end = min(begin + values.get(0x0202, 0), len(data))
    if 0x0201 in values:
        data[begin:end] = bytes(end - begin)
    return bytes(data)
