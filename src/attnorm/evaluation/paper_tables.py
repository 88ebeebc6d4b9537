"""What the paper prints in Tables 1, 2 and 4, and which row of ours each line is.

Table 3 stands beside the scores of inpainters (`evaluation.inpainting.TABLE_3`), Table 5 beside the benchmark
(`bench.PAPER_TABLE_5`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class PrintedRow(NamedTuple):
    """One line of Table 1 or 4."""

    label: str  # as printed
    row: str  # by which presets.ROWS calls it
    values: Mapping[str, str]  # as printed, by the table's columns; "/" for none


class PrintedClass(NamedTuple):
    """One line of Table 2: intra-FID of one class of ImageNet."""

    name: str
    label: int  # among the 1,000, by WordNet number
    wordnet: str  # what its folder is called in ImageNet
    values: Mapping[str, str]  # as printed, by the names in presets.ROWS


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
    PrintedClass("stone wall", 825, "n04326547", {"sngan": "49.3", "sagan": "57.5", "an": "34.16"}),
    PrintedClass("geyser", 974, "n09288635", {"sngan": "19.5", "sagan": "21.6", "an": "13.97"}),
    PrintedClass("valley", 979, "n09468604", {"sngan": "26.0", "sagan": "39.7", "an": "22.90"}),
    PrintedClass("coral fungus", 991, "n12985857", {"sngan": "37.2", "sagan": "38.0", "an": "24.02"}),
    PrintedClass(
        "indigo bunting", 14, "n01537544", {"sngan": "66.8", "sagan": "53.0", "an": "42.54"}
    ),  # "Indigo hunting"
    PrintedClass("redshank", 141, "n02028035", {"sngan": "60.1", "sagan": "48.9", "an": "39.06"}),
    PrintedClass("Saint Bernard", 247, "n02109525", {"sngan": "55.3", "sagan": "35.7", "an": "39.36"}),
    PrintedClass("tiger cat", 282, "n02123159", {"sngan": "90.2", "sagan": "88.1", "an": "66.65"}),
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

# The classes that Figures 7 and 8 show, by their numbers among ImageNet's 1,000: alp, agaric, drilling platform and
# schooner; from Blenheim spaniel over indigo bunting to schooner.
NUM_IMAGENET_CLASSES = 1000
FIGURE_7_CLASSES = (970, 992, 540, 780)
FIGURE_8_CLASSES = (156, 14, 780)
