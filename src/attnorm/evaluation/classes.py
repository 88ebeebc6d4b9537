"""Which classes are measured, and how many images of each are generated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnorm.config import ConfigError
from attnorm.inference import Sampler

# By name: ImageNet's number of each, and WordNet's, by which its folders are called.
TABLE_2_CLASSES = {
    "stone wall": (825, "n04326547"),
    "geyser": (974, "n09288635"),
    "valley": (979, "n09468604"),
    "coral fungus": (991, "n12985857"),
    "indigo bunting": (14, "n01537544"),
    "redshank": (141, "n02028035"),
    "saint bernard": (247, "n02109525"),
    "tiger cat": (282, "n02123159"),
}


def find_classes(names: Sequence[str], sampler: Sampler) -> tuple[list[int], str]:
    """Labels of the classes named (by name or number, or all of Table 2 by "table2"; none: all), and what a protocol
    calls them.
    """
    if not names:
        return list(range(len(sampler.classes))), "all"
    if list(names) == ["table2"]:
        return [_table_2_label(name, sampler) for name in TABLE_2_CLASSES], "table2"
    labels = list(dict.fromkeys(sampler.class_index(name) for name in names))
    return labels, ",".join(map(str, labels))


def _table_2_label(name: str, sampler: Sampler) -> int:
    """By WordNet's number, by name, or by ImageNet's number as a name: classes are in the order of their names."""
    number, wordnet = TABLE_2_CLASSES[name]
    plain = [known.casefold().replace("_", " ").replace("-", " ") for known in sampler.classes]
    for label, known in enumerate(plain):
        if known.startswith(wordnet) or known in (name, str(number)):
            return label
    raise ConfigError(
        f"{sampler.path} lacks the class {name!r} ({wordnet}) of Table 2 among its {len(plain)}; name others with "
        "--classes"
    )


def fake_labels(num: int, counts: np.ndarray) -> np.ndarray:
    """Labels of the generated images, int64 [num]: in turn where the data have as many of every class, else in
    proportion to its images (largest remainders), each class spread evenly over the numbers.

    Args:
        counts: Real images of each class.
    """
    if (counts == counts[0]).all():
        return np.arange(num) % len(counts)
    quotas, remainders = np.divmod(num * counts.astype(np.int64), counts.sum())
    quotas[np.argsort(-remainders, kind="stable")[: num - quotas.sum()]] += 1
    labels = np.repeat(np.arange(len(counts)), quotas)
    places = np.concatenate([(np.arange(quota) + 0.5) / max(quota, 1) for quota in quotas])
    return labels[np.argsort(places, kind="stable")]
