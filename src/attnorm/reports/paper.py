"""All that the paper prints in its tables, and which row of ours each line is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from attnorm.evaluation.classes import TABLE_2_CLASSES


class PrintedRow(NamedTuple):
    """One line of Table 1 or 4."""

    label: str  # as printed
    row: str  # by which presets.ROWS calls it
    values: Mapping[str, str]  # as printed, by the table's columns; "/" for none


class PrintedClass(NamedTuple):
    """One line of Table 2: intra-FID of one class of ImageNet."""

    name: str
    values: Mapping[str, str]  # as printed, by the names in presets.ROWS

    @property
    def label(self) -> int:
        """Among ImageNet's 1,000, by WordNet number."""
        return TABLE_2_CLASSES[self.name.casefold()][0]

    @property
    def wordnet(self) -> str:
        """What its folder is called in ImageNet."""
        return TABLE_2_CLASSES[self.name.casefold()][1]


class PrintedInpainter(NamedTuple):
    """One line of Table 3."""

    label: str
    context: str  # of our configuration
    values: Mapping[str, float]  # by metric; MAE of values in [-1, 1], see docs/paper.md, row 19


# ImageNet, 128 pixels. Iterations are thousands.
TABLE_1_COLUMNS = {"iterations": "Itr x1K", "fid": "FID", "intra_fid": "intra FID", "is": "IS"}
TABLE_1 = (
    PrintedRow("AC-GAN [27]", "acgan", {"iterations": "/", "fid": "/", "intra_fid": "260.0", "is": "28.5"}),
    PrintedRow("SN-GAN [26]", "sngan", {"iterations": "1000", "fid": "27.62", "intra_fid": "92.4", "is": "36.80"}),
    PrintedRow("SN-GAN* [39]", "sngan-star", {"iterations": "1000", "fid": "22.96", "intra_fid": "/", "is": "42.87"}),
    PrintedRow("SA-GAN [39]", "sagan", {"iterations": "1000", "fid": "18.65", "intra_fid": "83.7", "is": "52.52"}),
    PrintedRow("Ours", "an", {"iterations": "880", "fid": "17.84", "intra_fid": "83.40", "is": "46.57"}),
)

TABLE_2_COLUMNS = {"sngan": "SN-GAN [26]", "sagan": "SA-GAN [39]", "an": "Ours"}
TABLE_2 = (
    PrintedClass("stone wall", {"sngan": "49.3", "sagan": "57.5", "an": "34.16"}),
    PrintedClass("geyser", {"sngan": "19.5", "sagan": "21.6", "an": "13.97"}),
    PrintedClass("valley", {"sngan": "26.0", "sagan": "39.7", "an": "22.90"}),
    PrintedClass("coral fungus", {"sngan": "37.2", "sagan": "38.0", "an": "24.02"}),
    PrintedClass("indigo bunting", {"sngan": "66.8", "sagan": "53.0", "an": "42.54"}),  # "Indigo hunting"
    PrintedClass("redshank", {"sngan": "60.1", "sagan": "48.9", "an": "39.06"}),
    PrintedClass("Saint Bernard", {"sngan": "55.3", "sagan": "35.7", "an": "39.36"}),
    PrintedClass("tiger cat", {"sngan": "90.2", "sagan": "88.1", "an": "66.65"}),
)

# Paris StreetView at 256 pixels; the paper names neither masks nor definitions. See docs/paper.md, row 19.
TABLE_3 = (
    PrintedInpainter("CA [38]", "contextual", {"psnr": 23.78, "ssim": 0.8406, "mae": 0.0338}),
    PrintedInpainter("Ours", "an", {"psnr": 25.09, "ssim": 0.8541, "mae": 0.0334}),
)

TABLE_4_COLUMNS = {"is": "IS", "fid": "FID"}
TABLE_4 = (
    PrintedRow("AN w BN", "an-bn", {"is": "43.92", "fid": "19.59"}),
    PrintedRow("AN w/o orthogonal reg", "an-no-orth", {"is": "45.99", "fid": "18.07"}),
    PrintedRow("AN w/o SSR", "an-no-ssr", {"is": "37.86", "fid": "23.58"}),
    PrintedRow("AN (n = 8)", "an-n8", {"is": "45.51", "fid": "19.01"}),
    PrintedRow("AN (n = 16)", "an", {"is": "46.57", "fid": "17.84"}),
    PrintedRow("AN (n = 32)", "an-n32", {"is": "47.14", "fid": "17.75"}),
)

# Milliseconds at batch 1, 32 channels; PyTorch 1.1.0, "1 TiTAN 2080 GPU"; None where its memory ran out.
TABLE_5: dict[str, dict[int, float | None]] = {
    "AN": {128: 0.73, 256: 2.24, 512: 9.46, 1024: 37.68},
    "Self-attention": {128: 5.21, 256: 79.42, 512: None, 1024: None},
}

# The classes that Figures 7 and 8 show, by their numbers among ImageNet's 1,000: alp, agaric, drilling platform and
# schooner; from Blenheim spaniel over indigo bunting to schooner.
NUM_IMAGENET_CLASSES = 1000
FIGURE_7_CLASSES = (970, 992, 540, 780)
FIGURE_8_CLASSES = (156, 14, 780)
