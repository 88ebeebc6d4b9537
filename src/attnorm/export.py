"""Trained generators as files for other runtimes: ONNX, and torch.export's programs.

Such a file needs neither attnorm nor torch's Python: sizes are free, what it wants and gives is written inside.
"""

# N images, Z latent dimension, Y classes, H height and W width.

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attnorm import hub
from attnorm.config import UserError
from attnorm.layers.contextual_attention import ContextualAttention
from attnorm.models.class_conditional import Generator
from attnorm.models.inpainting import InpaintingGenerator, paste
from attnorm.registry import Loaded
from attnorm.system.files import write_atomically

Format = Literal["onnx", "torch-export"]

LEAST_SIDE = 8  # pixels of an image with a hole; contextual attention, which compares patches, needs one more
TOLERANCE = 1e-4  # of pixels in [-1, 1]: how far the file's pictures may be from the network's


class ExportError(UserError):
    """The file could not be written, or does not compute what the network does."""


class ClassConditionalProgram(nn.Module):
    """z [N, Z] from N(0, I) and a mixture of classes [N, Y] (rows sum to 1) -> images [N, 3, S, S] in [-1, 1]."""

    inputs, outputs = ("z", "classes"), ("images",)

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        images: Tensor = self.generator(z, classes)
        return images

    def example(self, num: int = 2, side: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(num)
        mixture = torch.eye(self.generator.num_classes)[torch.arange(num) % self.generator.num_classes]
        return torch.randn(num, self.generator.latent_dim, generator=generator), mixture

    def dynamic_shapes(self) -> dict[str, Any]:
        batch = torch.export.Dim("batch")
        return {"z": {0: batch}, "classes": {0: batch}}


class InpaintingProgram(nn.Module):
    """image [N, 3, H, W] in [-1, 1] and mask [N, 1, H, W] (0: known, else: missing) -> the image with its hole filled,
    and what the network made of the whole of it, which whoever takes seams out compares with what is known.

    Outside the mask every value of the first is the image's. Sides are at least `least_side` and need not be multiples
    of 8: within, the image goes on as its reflection.
    """

    inputs, outputs = ("image", "mask"), ("filled", "refined")

    def __init__(self, generator: InpaintingGenerator) -> None:
        super().__init__()
        self.generator = generator
        self.least_side = LEAST_SIDE + isinstance(generator.context, ContextualAttention)

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        height, width = image.shape[2:]
        rows, columns = _reflected(height, image), _reflected(width, image)
        padded = (part[:, :, rows][:, :, :, columns] for part in (image, mask))
        refined = self.generator(*padded).refined
        # By indices: of a slice torch.export cannot tell that it is as long as it says.
        rows, columns = (torch.arange(side, device=image.device) for side in (height, width))
        refined = refined[:, :, rows][:, :, :, columns]
        return paste(image, refined, mask), refined

    def example(self, num: int = 2, side: int = 43) -> tuple[Tensor, ...]:
        image = 2 * torch.rand(num, 3, side, side + 10, generator=torch.Generator().manual_seed(side)) - 1
        mask = torch.zeros(num, 1, side, side + 10)
        mask[:, :, side // 4 : side // 2, side // 3 : side // 3 * 2] = 1
        return image, mask

    def dynamic_shapes(self) -> dict[str, Any]:
        batch, height, width = (
            torch.export.Dim("batch"),
            torch.export.Dim("height", min=self.least_side, max=2**14),
            torch.export.Dim("width", min=self.least_side, max=2**14),
        )
        return {name: {0: batch, 2: height, 3: width} for name in self.inputs}


def _reflected(side: int, like: Tensor) -> Tensor:
    """Indices 0 .. side - 1 and back from there, up to the next multiple of 8, int64; `side` is at least 8."""
    steps = torch.arange((side + 7) // 8 * 8, device=like.device)
    return torch.minimum(steps, 2 * (side - 1) - steps)


def as_program(model: Generator | InpaintingGenerator) -> ClassConditionalProgram | InpaintingProgram:
    """A copy of the network, in evaluation mode on the CPU, that runtimes can be handed; spectral norm is worked in."""
    model = copy.deepcopy(model).float().cpu().eval()
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)
    if isinstance(model, InpaintingGenerator):
        return InpaintingProgram(model).eval()
    return ClassConditionalProgram(model).eval()


def export(loaded: Loaded, out: Path, format: Format = "onnx") -> float:
    """Writes the generator as `out` and returns how far its pictures are from the network's, at most.

    Args:
        loaded: From `attnorm.load`.
        out: The file; by custom .onnx or .pt2.
        format: "onnx" (onnxruntime, in browsers too), or "torch-export" (`torch.export.load`).

    Raises:
        ExportError: a package is missing, the network cannot be exported, or the file computes something else.
    """
    if format not in get_args(Format):
        raise ExportError(f"got the format {format!r}; expected {' or '.join(get_args(Format))}")
    program = as_program(loaded.model)
    metadata = hub.describe(loaded.header)
    if isinstance(program, InpaintingProgram):
        metadata["least_side"] = str(program.least_side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters', about their own insides
        try:
            with torch.no_grad():
                exported = torch.export.export(program, program.example(), dynamic_shapes=program.dynamic_shapes())
                if format == "onnx":
                    return _write_onnx(program, exported, metadata, out)
        except ImportError as error:
            raise ExportError(f"{error.name} is not installed; ONNX needs: pip install 'attnorm[export]'") from error
    files = {"attnorm.json": json.dumps(metadata)}
    difference = _difference(program, exported.module())
    write_atomically(out, lambda temporary: torch.export.save(exported, temporary, extra_files=files))
    return difference


def _write_onnx(program: Any, exported: torch.export.ExportedProgram, metadata: dict[str, str], out: Path) -> float:
    import onnxruntime

    folding = logging.getLogger("onnxscript.optimizer._constant_folding")
    folding.addFilter(_is_news)
    try:
        made = torch.onnx.export(
            exported,
            (),
            input_names=list(program.inputs),
            output_names=list(program.outputs),
            dynamo=True,
            verbose=False,
        )
    finally:
        folding.removeFilter(_is_news)
    assert made is not None
    made.model.metadata_props.update(metadata)
    difference = 0.0

    def write(temporary: Path) -> None:
        nonlocal difference
        made.save(str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            feed = {name: part.numpy() for name, part in zip(program.inputs, inputs, strict=True)}
            return tuple(torch.from_numpy(part) for part in session.run(None, feed))

        difference = _difference(program, run)

    write_atomically(out, write)
    return difference


def _is_news(record: logging.LogRecord) -> bool:
    # The sort of the layer's variances, which are constants, is left to the runtime: no loss, and nothing to be done.
    return record.getMessage() != "Skipping constant folding for op TopK with multiple outputs."


def _difference(program: Any, run: Any) -> float:
    """The largest between the pictures of the network and of `run`, on one image and on three, of other sizes."""
    far = []
    with torch.no_grad():
        for num, side in ((1, 61), (3, 32)):
            inputs = program.example(num, side)
            results = program(*inputs), run(*inputs)
            pairs = zip(*(result if isinstance(result, tuple) else (result,) for result in results), strict=True)
            far += [(ours - theirs).abs().max() for ours, theirs in pairs]
    largest = torch.stack(far).max().item()  # NaN where one is, as of Python's max it would not be
    if not largest <= TOLERANCE:
        raise ExportError(f"the exported pictures are {largest:.2g} from the network's; expected at most {TOLERANCE:g}")
    return largest
