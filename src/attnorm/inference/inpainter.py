"""Holes of photographs of any size, filled by one checkpoint, and what its layer saw; needs no data set."""

# S side of a training image, H height and W width of a photograph, K entities.

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.checkpoint import CheckpointError
from attnorm.config import ConfigError, UserError
from attnorm.data.images import to_float, to_uint8
from attnorm.inference.seams import without_seam
from attnorm.layers.contextual_attention import ContextualAttention
from attnorm.layers.observe import observe_layouts
from attnorm.models.inpainting import Inpainting, InpaintingGenerator, paste
from attnorm.registry import load
from attnorm.system.devices import temporary_tf32


class Matches(NamedTuple):
    """What contextual attention rebuilt a hole from, in patches of 8x8 pixels of a view: h = ceil(height / 8)."""

    patches: Tensor  # int64 [Q], those with a missing pixel, numbered row by row
    weights: Tensor  # float32 [Q, h, w], how much of each comes from which patch


class View(NamedTuple):
    """One pass of the generator over a photograph, or over a window of it. h and w are the window's sides, or smaller
    ones to which it was reduced.
    """

    box: tuple[int, int, int, int]  # first row and column, and those after the last, in the photograph's pixels
    given: Tensor  # uint8 [3, h, w], what the generator was shown; missing pixels are grey
    filled: Tensor  # uint8 [3, h, w], the same with the hole filled, as the generator made it
    layout: Tensor | None  # [K, ceil(h / 4), ceil(w / 4)] of the refinement stage's AN; None unless asked for
    matches: Matches | None  # of its contextual attention, likewise


class Filled(NamedTuple):
    """A photograph without its holes."""

    image: Tensor  # [3, H, W] of the type that was given; outside the mask its very values
    views: list[View]  # in the order in which they were filled


class Inpainter:
    """Fills the holes of photographs of any size with one inpainting generator. Nothing is drawn at random.

    A picture of at most `max_pixels` is seen whole. Of a larger one, each hole is filled by itself, in a window that
    shows it as training did: twice as high and as wide as the hole (a training hole has half the side of its square),
    at least S, moved into the picture. Holes whose common window (around all of them, with room for the largest) has at
    most `max_pixels` are filled together; the others one after another in reading order, so that a later one sees an
    earlier one filled. A window of more than `max_pixels`, because of a large hole, is reduced to them, and what was
    filled enlarged again; but a wide hole that is thin (a fence, a scratch) is cut into pieces, which are holes by
    themselves. There are no tiles: the statistics of AN, and attention, are of a whole window. What the network made is
    shifted smoothly to meet the known pixels around it (`seams.py`), unless `seams` leaves it as it is.

    Args:
        path: A run directory (its latest checkpoint is taken), a checkpoint file, a folder of
            `save_pretrained`, or the name of a model that comes with the package.
        ema: Use the average of the weights over training; False for the raw weights.
        device: "auto" takes a GPU where there is one.
        max_pixels: The largest area that is seen at once, at least S * S; 0: 4 * S * S, twice the training side.
        seams: Paste what the network made as it is, as the paper does, with a seam where it does not fit.

    Raises:
        CheckpointError: there is nothing to load, or not for inpainting.
        ConfigError: max_pixels is too small.
    """

    def __init__(
        self, path: Path | str, *, ema: bool = True, device: str = "auto", max_pixels: int = 0, seams: bool = False
    ) -> None:
        loaded = load(path, ema=ema, device=device)
        if not isinstance(loaded.model, InpaintingGenerator):
            raise CheckpointError(
                f"{loaded.path} was trained for {loaded.header.config.task}; expected an inpainting generator"
            )
        self.model: InpaintingGenerator = loaded.model
        self.header, self.path = loaded.header, loaded.path
        self.device = next(self.model.parameters()).device
        self.image_size = loaded.header.config.model.image_size
        least = self.image_size**2
        if max_pixels and max_pixels < least:
            raise ConfigError(f"max_pixels is {max_pixels}; expected 0, or at least the {least} of a training image")
        self.max_pixels, self.seams = max_pixels or 4 * least, seams
        self.tf32 = self.header.config.run.tf32  # as in training; on NVIDIA's GPUs

    @property
    def has_layout(self) -> bool:
        """Whether the context block is AN, so that there is a layout to see."""
        return self.header.config.model.context in ("an", "an-wide")

    @property
    def has_matches(self) -> bool:
        """Whether it is contextual attention, so that each hole has been rebuilt from known patches."""
        return isinstance(self.model.context, ContextualAttention)

    @torch.no_grad()
    def outputs(self, images: Tensor, masks: Tensor) -> Inpainting:
        """What the generator makes of whole images of any size, not pasted: padded to multiples of 8 and cut again.

        Args:
            images: [N, 3, H, W] in [-1, 1].
            masks: bool [N, 1, H, W], True = missing.
        """
        height, width = images.shape[2:]
        rows, columns = _reflected(height), _reflected(width)  # a missing pixel's reflection is missing too
        padded = [part[:, :, rows][..., columns].to(self.device) for part in (images, masks)]
        with temporary_tf32(self.tf32):
            return Inpainting(*(part[..., :height, :width].cpu() for part in self.model(*padded)))

    def fill(
        self,
        image: Tensor,
        mask: Tensor,
        *,
        with_layouts: bool = False,
        with_matches: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Filled:
        """Fills what is missing.

        Args:
            image: [3, H, W], uint8 or uint16; what it holds in the hole has no influence.
            mask: bool [1, H, W], True = missing.
            with_layouts: Keep the layouts as well; ConfigError where the model has none.
            with_matches: Keep the matches of contextual attention; ConfigError where the model has none.
            progress: Called with (done, total) after each window.

        Raises:
            UserError: the mask is of another size, of nothing, or of everything, or hides all of a window.
        """
        if image.ndim != 3 or mask.shape != (1, *image.shape[1:]):
            raise UserError(f"the image is {list(image.shape)}, its mask {list(mask.shape)}; expected [1, H, W] of it")
        if not mask.any() or mask.all():
            raise UserError("the mask is of nothing or of everything; expected some missing and some known pixels")
        if with_layouts and not self.has_layout:
            raise ConfigError(
                f"{self.path} has no AttentiveNorm2d (its context block is {self.header.config.model.context}), "
                "so there is no layout to see; take a model with context an or an-wide"
            )
        if with_matches and not self.has_matches:
            raise ConfigError(f"{self.path} has no contextual attention, so there are no matches to see")
        result, missing, views = image.clone(), mask.clone(), []
        windows = self._windows(mask[0].numpy())
        for (top, left, bottom, right), own in windows:
            part = (slice(None), slice(top, bottom), slice(left, right))
            view, filled = self._fill_window(
                result[part], missing[part], with_layouts=with_layouts, with_matches=with_matches
            )
            result[part] = torch.where(own, filled, result[part])
            missing[part] &= ~own
            views.append(View((top, left, bottom, right), *view))
            if progress:
                progress(len(views), len(windows))
        return Filled(result, views)

    def _fill_window(
        self, image: Tensor, mask: Tensor, *, with_layouts: bool, with_matches: bool
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None, Matches | None], Tensor]:
        """A view's parts, and the image that was made, of the size and type of `image`."""
        shown, hole = _to_float(image)[None].masked_fill(mask, 0), mask[None]
        height, width = image.shape[1:]
        if (height, width) != (sides := self._seen(height, width)):
            shown, hole = _reduce(shown, hole, *sides)
        if hole.all():
            raise UserError(
                f"nothing is known of a window of {width}x{height} pixels around a hole, seen with "
                f"{sides[1]}x{sides[0]}; a --max-pixels of more than {self.max_pixels} would show more"
            )
        layout, matches = None, None
        if with_layouts:
            with observe_layouts(self.model) as seen:
                made = self.outputs(shown, hole).refined
            height, width = (math.ceil(side / 4) for side in shown.shape[2:])
            layout = next(iter(seen.values())).layout[0, :, :height, :width].cpu()
        elif with_matches:
            with _weights_of(self.model.context) as weights:
                made = self.outputs(shown, hole).refined
            matches = _matches(weights[0], hole)
        else:
            made = self.outputs(shown, hole).refined
        view = to_uint8(shown)[0], to_uint8(paste(shown, made, hole))[0], layout, matches
        if made.shape[2:] != image.shape[1:]:
            made = F.interpolate(made, image.shape[1:], mode="bicubic")
        made = made[0] if self.seams else without_seam(made[0], _to_float(image), mask)
        return view, _from_float(made, image.dtype)

    def _windows(self, mask: np.ndarray) -> list[tuple[tuple[int, int, int, int], Tensor]]:
        """Boxes of bool [H, W], and which of their missing pixels (bool [1, h, w]) are to be filled there."""
        if mask.size <= self.max_pixels:
            return [((0, 0, *mask.shape), torch.from_numpy(mask)[None])]
        from scipy.ndimage import find_objects
        from skimage.measure import label  # costs most of a second

        numbers = label(mask, connectivity=2)
        self._cut_thin_holes(mask, numbers)
        holes = [(place, number) for number, place in enumerate(find_objects(numbers), 1) if place]
        holes.sort(key=lambda hole: (hole[0][0].start, hole[0][1].start))
        starts = np.array([[axis.start for axis in place] for place, _ in holes])
        stops = np.array([[axis.stop for axis in place] for place, _ in holes])
        out = []
        for members in self._groups(starts, stops, mask.shape):
            start, stop = starts[members].min(0), stops[members].max(0)
            window = self._window(start, stop, (stops - starts)[members].max(0), mask.shape)
            top, left, bottom, right = window
            own = np.zeros((bottom - top, right - left), bool)
            inner = tuple(slice(*ends) for ends in zip(start - window[:2], stop - window[:2], strict=True))
            outer = tuple(slice(*ends) for ends in zip(start, stop, strict=True))
            own[inner] = np.isin(numbers[outer], [holes[member][1] for member in members])
            out.append((window, torch.from_numpy(own)[None]))
        return out

    def _cut_thin_holes(self, mask: np.ndarray, numbers: np.ndarray) -> None:
        """Gives every square of S // 2 pixels of a wide thin hole (a fence, a scratch) a number of its own in `numbers`
        [H, W], so that it need not be reduced: it has known pixels beside it everywhere, and they would be lost.

        Thin: nowhere as thick as the holes of training; or less than half of what is known around it would be seen.
        """
        from scipy.ndimage import find_objects, minimum_filter

        side = self.image_size // 2
        thick: set[int] | None = None
        for number, place in enumerate(find_objects(numbers), 1):
            start, stop = (np.array([getattr(axis, end) for axis in place]) for end in ("start", "stop"))
            top, left, bottom, right = self._window(start, stop, stop - start, mask.shape)
            if (bottom - top) * (right - left) <= self.max_pixels:
                continue
            if thick is None:
                thick = set(numbers[minimum_filter(mask, side, mode="constant")].tolist())
            if number in thick:
                hidden = torch.from_numpy(mask[None, top:bottom, left:right])
                reduced = _reduce_mask(hidden, *self._seen(*hidden.shape[1:]))
                if 2 * (~reduced).float().mean() >= (~hidden).float().mean():
                    continue
            own = numbers[place] == number
            rows, columns = np.nonzero(own)
            _, squares = np.unique(rows // side * own.shape[1] + columns // side, return_inverse=True)
            numbers[place][own] = numbers.max() + 1 + squares

    def _groups(self, starts: np.ndarray, stops: np.ndarray, shape: tuple[int, ...]) -> list[list[int]]:
        """Holes (their first pixels and those after their last, int [M, 2], in reading order) that share a window: each
        joins the first of the earlier groups whose window has room for it.
        """
        groups: list[list[int]] = []
        first, last, largest = starts.copy(), stops.copy(), stops - starts  # a row a group, as far as there are any
        num_closed, reach = 0, self.max_pixels // min(self.image_size, shape[1])  # no window is higher
        for hole, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            while num_closed < len(groups) and first[num_closed, 0] + reach < start[0]:
                num_closed += 1
            part = slice(num_closed, len(groups))
            union = np.minimum(first[part], start), np.maximum(last[part], stop)
            sides = self._sides(union[1] - union[0], np.maximum(largest[part], stop - start), shape)
            fitting = np.flatnonzero(sides.prod(1) <= self.max_pixels)
            if len(fitting):
                group = num_closed + fitting[0]
                groups[group].append(hole)
                first[group], last[group] = union[0][fitting[0]], union[1][fitting[0]]
                largest[group] = np.maximum(largest[group], stop - start)
            else:
                group = len(groups)
                groups.append([hole])
                first[group], last[group], largest[group] = start, stop, stop - start
        return groups

    def _sides(self, extent: np.ndarray, largest: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Sides of a window around holes: beyond their common box half of the largest hole on every side, at least
        S / 8; at least S, and a multiple of 8, as far as the picture goes. Of one hole: twice its sides.
        """
        sides = np.maximum(extent + np.maximum(largest, self.image_size // 4), self.image_size)
        return np.minimum(-(-sides // 8) * 8, shape)

    def _window(
        self, start: np.ndarray, stop: np.ndarray, largest: np.ndarray, shape: tuple[int, ...]
    ) -> tuple[int, int, int, int]:
        """Around a box, moved into the picture."""
        sides = self._sides(stop - start, largest, shape)
        begin = np.clip((start + stop - sides) // 2, 0, shape - sides)
        (top, left), (bottom, right) = begin.tolist(), (begin + sides).tolist()
        return top, left, bottom, right

    def _seen(self, height: int, width: int) -> tuple[int, int]:
        """The sides to which a window is reduced for its area."""
        area = height * width
        if area <= self.max_pixels:
            return height, width
        scale = math.sqrt(self.max_pixels / area)
        return max(int(height * scale) // 8 * 8, 8), max(int(width * scale) // 8 * 8, 8)


def _reflected(size: int) -> Tensor:
    """Indices 0 .. size - 1, and on from there to and fro, up to the next multiple of 8; int64."""
    period = max(2 * (size - 1), 1)
    steps = torch.arange(math.ceil(size / 8) * 8) % period
    return torch.minimum(steps, period - steps) if size > 1 else torch.zeros_like(steps)


def _reduce(image: Tensor, mask: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Averages over areas, [N, C, height, width]: missing where a pixel of the area is, else of known pixels alone."""
    missing = _reduce_mask(mask, height, width)
    return F.adaptive_avg_pool2d(image, (height, width)).masked_fill(missing, 0), missing


def _reduce_mask(mask: Tensor, height: int, width: int) -> Tensor:
    return F.adaptive_max_pool2d(mask.float(), (height, width)) > 0


def _to_float(image: Tensor) -> Tensor:
    return image.float() / 32767.5 - 1 if image.dtype == torch.uint16 else to_float(image)


def _from_float(image: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint16:
        return ((image + 1) * 32767.5).round().clamp(0, 65535).to(dtype)
    return to_uint8(image)


@contextlib.contextmanager
def _weights_of(attention: nn.Module) -> Iterator[list[Tensor]]:
    """Those of every pass of contextual attention in the block, [N, P, P]."""
    assert isinstance(attention, ContextualAttention)
    found: list[Tensor] = []
    hook = attention.register_forward_hook(lambda layer, given, _: found.append(attention.weights(*given)))
    try:
        yield found
    finally:
        hook.remove()


def _matches(weights: Tensor, hole: Tensor) -> Matches:
    """Of a view's hole, bool [1, 1, h, w], and of the [1, P, P] weights of its patches."""
    missing = F.max_pool2d(hole[0].float(), 8, ceil_mode=True)[0]
    patches = missing.flatten().nonzero()[:, 0]
    return Matches(patches, weights[0].cpu()[patches].unflatten(1, missing.shape))
