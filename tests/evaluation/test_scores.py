"""A score on disk: as it was written, as earlier versions wrote it, and as nobody can have meant it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attnorm.checkpoint import CheckpointError
from attnorm.evaluation.scores import Score, UsedData, UsedExtractor, read_scores, score_from_dict, write_scores
from attnorm.system.files import read_lines, write_lines


def test_a_score_is_read_as_it_was_written_and_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    extractor, data = UsedExtractor(name="inception", weights_sha256="ab"), UsedData(source="x", read_at=(32, 32))
    measured = {"value": 12.36, "low": 11.0, "high": 13.0, "values": {"cat": 1.0}}
    score = Score(metric="frechet", name="FID", protocol="fid64", extractor=extractor, data=data, **measured)
    file = tmp_path / "new" / "metrics.jsonl"
    write_scores(file, [score])
    assert read_scores(file) == [score]
    (line,) = read_lines(file)
    assert line["data"]["read_at"] == [32, 32] and line["values"] == {"cat": 1.0}
    assert not line.keys() & {"spread", "usage", "site", "density", "subsets"}
    assert score.text == "12.36 [11.00, 13.00]"


def test_a_new_measurement_replaces_the_old_one_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    first, other = Score(metric="kid", value=1.0), Score(metric="kid", value=2.0, seed=1)
    write_scores(file, [first, other])
    again = Score(metric="kid", value=3.0, date="later", seconds=4.0, device="elsewhere")
    write_scores(file, [again])
    assert read_scores(file) == [other, again]


def test_a_torn_last_line_harms_nothing(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    first, second = Score(metric="kid", value=1.0), Score(metric="is1", value=2.0)
    write_scores(file, [first])
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"metric": "is1", "val')
    assert read_scores(file) == [first]
    write_scores(file, [second])
    assert read_scores(file) == [first, second]


def test_lines_of_earlier_versions_are_read_whatever_they_lack() -> None:
    old = {"metric": "is1", "name": "IS", "protocol": "is5k", "value": 2, "extractor": None, "num_reals": None, "x": 1}
    assert score_from_dict(old) == Score(metric="is1", name="IS", protocol="is5k", value=2.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"value": "low"},
        {"value": float("nan")},
        {"data": {"fingerprint": 3}},
        {"extractor": {"weights_sha256": 3}},
        {"num_fakes": "10"},
        {"values": {"cat": "x"}},
        {"usage": [0.5, None], "metric": "layout", "site": "a"},
        {"site": None, "metric": "layout", "usage": [0.5]},
    ],
    ids=str,
)
def test_a_score_that_was_edited_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = tmp_path / "metrics.jsonl"
    score = {"metric": "is1", "name": "IS", "protocol": "is5k", "value": 2.5, "images_seen": 8}
    write_lines(file, [score])
    (read,) = read_scores(file)
    assert (read.metric, read.value, read.images_seen, read.weights, read.low) == ("is1", 2.5, 8, "ema", None)
    write_lines(file, [score, score | changes], allow_nan=True)
    with pytest.raises(CheckpointError, match=rf"a line that is no score: {next(iter(changes))}"):
        read_scores(file)
