"""The paper's tables from hand-written scores: which cell a number stands in, what may share a column, what it says."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnorm.checkpoint import CheckpointError, Header, save_checkpoint
from attnorm.config import Config, ConfigError
from attnorm.models.class_conditional import describe
from attnorm.presets import FAMILIES, PRESETS, ROWS
from attnorm.reports.paper import TABLE_1, TABLE_2, TABLE_4, TABLE_5
from attnorm.reports.render import NOT_RUN, Table
from attnorm.reports.report import Report, build_report, to_dict
from attnorm.reports.runs import columns, read_run, row_of
from attnorm.reports.tables import _agrees
from attnorm.run_directory import RunDirectory
from attnorm.settings import override

CLASSES = ("cat", "dog", "owl")
BENCH = Path(__file__).parents[2] / "docs/results/bench/cpu-float32.json"


def line(metric: str, value: float, **changes: Any) -> dict[str, Any]:
    """A score as `attnorm evaluate` writes it, by the standard extractor unless changed."""
    names = {
        "frechet": ("FID", "fid5k_train_inception"),
        "intra-frechet": ("intra-FID", "intra500_train_inception[all]"),
        "is1": ("IS", "is5k_s1_inception"),
        "is10": ("IS", "is5k_s10_inception"),
        "kid": ("KID", "kid5k_train_inception"),
        "layout": ("layout", "layout500"),
    }
    name, protocol = names[metric]
    extractor = {"name": "inception", "title": "Inception (2015)", "weights_sha256": "ab" * 32, "preprocessing": "299"}
    data = {"source": "/home/someone/data/animals/train", "fingerprint": "cd" * 32, "image_size": 32}
    about = {"num_fakes": 5000, "num_reals": 9000, "seed": 0, "subset": False, "weights": "ema", "device": "cpu"}
    about |= {"images_seen": 640, "training_seconds": 90.0, "checkpoint": "checkpoints/000000640.safetensors"}
    about |= {
        "metric": metric,
        "name": name,
        "protocol": protocol,
        "value": value,
        "extractor": extractor,
        "data": data,
    }
    return about | {"checkpoint_sha256": "ef" * 32, "commit": "0123456789abcdef", **changes}


def make_run(
    path: Path,
    row: str,
    *settings: str,
    seed: int = 0,
    lines: tuple[Mapping[str, Any], ...] = (),
    logged: tuple[Mapping[str, Any], ...] = (),
    images_seen: int = 640,
    classes: tuple[str, ...] = CLASSES,
    has_checkpoint: bool = True,
) -> Path:
    """A run directory whose checkpoint has a header alone: tables need no weights."""
    tiny = ("model.image_size=32", "model.width=2", "model.latent_dim=4", "run.batch_size=64")
    config = override(ROWS[row][1](Config()), [*tiny, f"model.num_classes={len(classes)}", f"run.seed={seed}"])
    config = override(config, settings)
    run = RunDirectory(path)
    run.create(config, {"source": "/data/animals/train", "fingerprint": "cd" * 32, "classes": list(classes)})
    if has_checkpoint:
        header = Header(config, classes, images_seen, 90.0, "")
        save_checkpoint(run.checkpoint_file(images_seen), {"ema.x": torch.zeros(1)}, header)
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in logged), encoding="utf-8")
    (path / "evaluation").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in lines)
    (path / "evaluation/metrics.jsonl").write_text(text, encoding="utf-8")
    return path


def section(report: Report, start: str) -> Any:
    (found,) = [section for section in report.sections if section.title.startswith(start)]
    return found


def cells(table: Table, run: str) -> dict[str, str]:
    """The row of a run, by the headings."""
    (row,) = [row for row in table.rows if run in row]
    assert len(row) == len(table.header) == len(set(table.header))
    return dict(zip(table.header, row, strict=True))


# Tables 1 and 4


def test_each_seed_has_a_row_with_the_measured_beside_the_printed(tmp_path: Path) -> None:
    interval = {"low": 11.9, "high": 12.81, "interval": "95%, bootstrap"}
    lines = (line("frechet", 12.3, **interval), line("intra-frechet", 80.111, values={"cat": 1.0}))
    lines += (line("is1", 7.5, low=7.4, high=7.65), line("is10", 7.25, spread=0.125))
    first = make_run(tmp_path / "an-s0", "an", lines=lines)
    second = make_run(tmp_path / "an-s1", "an", seed=1, lines=(line("frechet", 13.0),))
    (table,) = section(build_report([first, second]), "Table 1").tables
    _, g_parameters, d_parameters = describe(RunDirectory(first).read()[0].model, 3)
    row = cells(table, "an-s0")
    assert row == {
        "Model": "Ours",
        "run": "an-s0",
        "seed": "0",
        "Itr x1K, paper": "880",
        "FID, paper": "17.84",
        "FID, fid5k_train_inception": "12.30 [11.90, 12.81]",
        "intra FID, paper": "83.40",
        "intra-FID, intra500_train_inception[all]": "80.11",
        "IS, paper": "46.57",
        "IS, is5k_s1_inception": "7.50 [7.40, 7.65]",
        "IS, is5k_s10_inception": "7.25 ± 0.12",
        "G / D parameters": f"{g_parameters:,} / {d_parameters:,}",
        "s a step": "9",
        "device": "not recorded",
        "batch": "64",
        "steps": "10",
        "images seen": "640",
    }
    row = cells(table, "an-s1")
    assert (row["Model"], row["seed"], row["FID, fid5k_train_inception"]) == ("Ours", "1", "13.00")
    assert row["IS, is5k_s1_inception"] == "-" and row["FID, paper"] == ""  # printed once, by the first seed
    assert [row[0] for row in table.rows] == [*(printed.label for printed in TABLE_1), "Ours"]
    assert [row[1] for row in table.rows[:4]] == [NOT_RUN] * 4
    assert table.rows[0][3:] == ("/", "/", "", "260.0", "", "28.5", *[""] * 8)


def test_rows_and_tables_that_were_not_run_are_shown_as_such() -> None:
    report = build_report([])
    assert [section.title.partition(".")[0] for section in report.sections] == [f"Table {i}" for i in range(1, 6)]
    one, two, three, four, five = report.tables
    assert [(row[0], row[1], row[4], row[6]) for row in one.rows][1] == ("SN-GAN [26]", NOT_RUN, "27.62", "36.80")
    assert [row[1] for row in one.rows] == [NOT_RUN] * 5 and [row[1] for row in four.rows] == [NOT_RUN] * 6
    assert [row[-1] for row in two.rows] == [NOT_RUN] * 8
    assert [row[:3] for row in three.rows] == [("CA [38]", NOT_RUN, "23.78"), ("Ours", NOT_RUN, "25.09")]
    assert five.rows[1] == ("AN", "here", *[NOT_RUN] * 4)
    assert [section.title[:7] for section in build_report([], tables=(4,)).sections] == ["Table 4"]
    with pytest.raises(ConfigError, match="there is no table 6"):
        build_report([], tables=(6,))


def test_the_ablation_has_table_1s_rows_below_it_and_what_the_paper_has_not(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "star", "sngan-star", lines=(line("frechet", 20.0),)),
        make_run(tmp_path / "n4", "an", "model.an.num_entities=4"),
        make_run(tmp_path / "ssr", "an-no-ssr", lines=(line("frechet", 23.0),)),
    ]
    table = section(build_report(runs), "Table 4").tables[0]
    variant = "an with model.an.num_entities=4: not in the paper"
    assert [row[0] for row in table.rows] == [*(row.label for row in TABLE_4), "SN-GAN* [39] (Table 1)", variant]
    assert [row[1] for row in table.rows] == [NOT_RUN, NOT_RUN, "ssr", NOT_RUN, NOT_RUN, NOT_RUN, "star", "n4"]
    assert cells(table, "star")["FID, paper"] == "22.96"
    assert (cells(table, "n4")["FID, paper"], cells(table, "n4")["FID, fid5k_train_inception"]) == ("-", "-")


def test_a_preset_is_its_row_however_it_is_called() -> None:
    for family, row in itertools.product(FAMILIES, ROWS):
        config = PRESETS[f"{family}-{row}"][1]
        assert row_of(config) == row == row_of(replace(config, family="", row=""))  # as earlier versions wrote it
    assert row_of(override(config, ["preset=mine", "run.seed=7", "model.an.impl=reference"])) == row


@pytest.mark.parametrize(
    ("preset", "setting", "row"),
    [
        ("cifar10-an", "model.an.num_entities=8", "an-n8"),
        ("cifar10-an", "model.an.num_entities=5", ""),
        ("cifar10-an", "model.an.temperature=0.3", ""),
        ("cifar10-an", "model.an.temperature=0.1", "an"),  # what the rule gives at this width
        ("cifar10-an", "optim.orthogonality_weight=0", "an-no-orth"),
        ("cifar10-an", "model.context=none", "sngan-star"),
        ("cifar10-sngan", "model.an.num_entities=5", "sngan"),  # which it has no use for
    ],
)
def test_a_changed_setting_makes_another_row_whatever_the_name_says(preset: str, setting: str, row: str) -> None:
    assert row_of(override(PRESETS[preset][1], [setting])) == row


# What may share a column or a table


@pytest.mark.parametrize(
    ("change", "heading"),
    [
        ({"protocol": "fid2k_train_inception", "num_fakes": 2000}, "FID, fid2k_train_inception"),
        ({"name": "Fréchet distance (lite)", "protocol": "fd_lite"}, "Fréchet distance, fd_lite"),
        ({"num_reals": 8000}, "FID, fid5k_train_inception, 8,000 real"),
        ({"num_fakes": 4000}, "FID, fid5k_train_inception, 4,000 generated"),
        ({"weights": "raw"}, "FID, fid5k_train_inception, raw weights"),
        ({"extractor": {"weights_sha256": "12" * 32}}, "FID, fid5k_train_inception, extractor 12121212"),
        ({"data": {"fingerprint": "34" * 32, "image_size": 32}}, "FID, fid5k_train_inception, data 34343434"),
    ],
)
def test_scores_that_were_measured_otherwise_have_a_column_of_their_own(
    tmp_path: Path, change: dict[str, Any], heading: str
) -> None:
    runs = [
        make_run(tmp_path / "a", "an", lines=(line("frechet", 10.0),)),
        make_run(tmp_path / "b", "sagan", lines=(line("frechet", 20.0, **change),)),
    ]
    table = section(build_report(runs), "Table 1").tables[0]
    assert cells(table, "b")[heading] == "20.00" and cells(table, "a")[heading] == "-"
    (other,) = [name for name in table.header if cells(table, "a")[name] == "10.00"]
    assert other.startswith("FID, fid5k_train_inception") and cells(table, "b")[other] == "-"


def test_a_subset_estimate_is_marked_stands_last_and_is_read_no_meaning_into(tmp_path: Path) -> None:
    subset = {"subset": True, "protocol": "fid5k_train_subset1k_inception"}
    runs = [
        make_run(tmp_path / f"{row}{seed}", row, seed=seed, lines=(line("frechet", value, **subset),))
        for row, value in (("an", 1.0), ("sagan", 9.0))
        for seed in (0, 1)
    ]
    with (runs[0] / "evaluation/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line("frechet", 2.0)) + "\n")
    report = build_report(runs)
    table = section(report, "Table 1").tables[0]
    measured = [name for name in table.header if "fid5k" in name]
    full, estimated = "FID, fid5k_train_inception", "FID, fid5k_train_subset1k_inception, estimated from a subset"
    assert measured == [full, estimated]
    assert report.seed_comparisons == ()


def test_other_training_configurations_have_tables_of_their_own_that_say_what_differs(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", "an"),
        make_run(tmp_path / "b", "sagan", "run.device=cpu", "run.log_every_images=64", seed=3),
        make_run(tmp_path / "c", "an", "optim.g_lr=0.5"),
    ]
    first, second = section(build_report(runs), "Table 1").tables
    title = "32 pixels, width 2, batch 64, on animals/train, optim.g_lr"
    assert (first.title, second.title) == (f"{title} 0.0001", f"{title} 0.5")
    assert cells(first, "a")["device"] == "not recorded" and cells(first, "b")["device"] == "cpu"
    assert all("c" not in row for row in first.rows) and cells(second, "c")["Model"] == "Ours"


def test_configurations_whose_difference_is_long_are_both_shown(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, "an", f"run.start_from=runs/cifar10-{name}") for name in ("none", "an")]
    tables = section(build_report(runs), "Table 1").tables
    assert [table.title.rpartition(" ")[2] for table in tables] == ["runs/cifar10-none", "runs/cifar10-an"]
    assert [cells(table, name)["Model"] for table, name in zip(tables, ("none", "an"), strict=True)] == ["Ours"] * 2


def test_what_another_recipe_trains_is_no_row_of_the_paper(tmp_path: Path) -> None:
    """Seeds of its arms are compared by their names, though projected-none has the settings of SN-GAN."""
    runs = []
    for name, context in (("AN", "an"), ("none", "none")):
        config = PRESETS[f"cifar10-projected-{context}"][1]
        for seed in (0, 1):
            path = tmp_path / f"{name}-{seed}"
            made = override(config, ["model.num_classes=3", f"run.seed={seed}"])
            run = RunDirectory(path)
            run.create(made, {"source": "/data/x", "fingerprint": "cd" * 32, "classes": list(CLASSES)})
            save_checkpoint(run.checkpoint_file(640), {"ema.x": torch.zeros(1)}, Header(made, CLASSES, 640, 90.0, ""))
            (path / "evaluation").mkdir()
            score = line("frechet", 10.0 + 3 * (name == "none") + seed / 8)
            (path / "evaluation/metrics.jsonl").write_text(json.dumps(score) + "\n", encoding="utf-8")
            runs.append(path)
    report = build_report(runs)
    (table,) = section(report, "Which rows differ").tables
    assert table.title.startswith("recipe projected, 32 pixels") and len(report.seed_comparisons) == 1
    assert {report.seed_comparisons[0].first, report.seed_comparisons[0].second} == {
        "Attentive Normalization",
        "no context block",
    }
    assert all("Ours" not in row for row in section(report, "Table 1").tables[0].rows if "AN-0" in row)


def test_only_the_papers_data_and_protocol_are_said_to_compare(tmp_path: Path) -> None:
    classes = tuple(f"n{i:08d}" for i in range(1000))
    whole = {"num_fakes": 50_000, "num_reals": 1_281_167, "protocol": "fid50k_train_inception"}
    whole["data"] = {"fingerprint": "0", "image_size": 128}  # type: ignore[assignment]
    nothing = "which they do for nothing here."
    for name, change, said in (
        ("a", whole, "so for fid50k_train_inception."),
        ("b", {**whole, "name": "Fréchet distance (lite)"}, nothing),
        ("c", {**whole, "num_reals": 50_000}, nothing),
    ):
        score = line("frechet", 9.0, **change)
        run = make_run(tmp_path / name, "an", "model.image_size=128", classes=classes, lines=(score,))
        (text,) = section(build_report([run]), "Table 1").paragraphs
        assert text.endswith(said)


# Which checkpoint


def test_the_latest_scored_checkpoint_is_shown_and_an_earlier_better_one_is_named(tmp_path: Path) -> None:
    lines = (
        line("frechet", 5.0, images_seen=320),
        line("frechet", 8.0, images_seen=640),
        line("frechet", 7.0, images_seen=640),  # measured again: the last counts
        line("frechet", 99.0, images_seen=640, seed=5),  # other draws: the first seed counts
        line("is1", 3.0, images_seen=320),
    )
    run = make_run(tmp_path / "run", "an", images_seen=1280, lines=lines)
    with (run / "evaluation/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"metric": "frechet", "val')  # a line that is being written
    table = section(build_report([run]), "Table 1").tables[0]
    row = cells(table, "run")
    assert row["FID, fid5k_train_inception"] == "7.00" and row["steps"] == "10" and row["images seen"] == "640"
    assert "IS, is5k_s1_inception" not in table.header  # it is of another checkpoint
    assert table.notes == (
        "run was scored after 640 images; it has seen 1,280 since.",
        "run: its best FID (fid5k_train_inception) was 5.00 after 320 images; the table shows the last.",
    )


def test_scores_of_a_checkpoint_that_was_trained_anew_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "an")
    file = run / "evaluation/metrics.jsonl"
    own = hashlib.sha256((run / "checkpoints/000000640.safetensors").read_bytes()).hexdigest()
    old = {"date": "2020-01-01T00:00:00+00:00"}  # before the file was written, as after copying a run too
    gone = "checkpoints/000000320.safetensors"  # no longer kept: nothing speaks against it
    lines = (line("frechet", 5.0, **old), line("is1", 3.0, **old, checkpoint_sha256=own))
    lines += (line("kid", 0.5, images_seen=320, checkpoint=gone),)
    file.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    (found,) = build_report([run]).runs
    assert [score.metric for score in found.scores] == ["is1", "kid"]
    assert found.note == "run: scores of checkpoints that have been trained anew are left out; measure again."
    file.write_text(json.dumps(line("frechet", 5.0, date="2100-01-01T00:00:00+00:00")) + "\n", encoding="utf-8")
    (found,) = build_report([run]).runs
    assert [score.metric for score in found.scores] == ["frechet"] and not found.note


def test_a_score_without_real_images_does_not_displace_a_distance(tmp_path: Path) -> None:
    lines = (line("frechet", 5.0, images_seen=320, device="a GPU"), line("is1", 4.0), line("kid", 1.0, device="cpu"))
    lines[2]["images_seen"] = 320
    report = build_report([make_run(tmp_path / "run", "an", lines=lines)])
    row = cells(section(report, "Table 1").tables[0], "run")
    assert row["FID, fid5k_train_inception"] == "5.00" and row["images seen"] == "320"
    about = cells(section(report, "Runs").tables[0], "run")
    assert about["measured on"] == "a GPU, cpu" and about["s a step"] == row["s a step"] != "-"


def test_rows_at_unlike_training_or_precision_are_told_apart(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", "an", lines=(line("frechet", 1.0),)),
        make_run(tmp_path / "b", "sagan", "run.precision=bfloat16", images_seen=1280),
    ]
    table = section(build_report(runs), "Table 1").tables[0]
    assert table.notes == (
        "The rows have seen unlike numbers of images: their scores do not compare at equal training.",
        "The runs differ in run.precision too: bfloat16: b; float32: a.",
    )


def test_a_run_that_failed_or_has_nothing_yet_says_so(tmp_path: Path) -> None:
    failed = make_run(tmp_path / "failed", "an", has_checkpoint=False)
    begun = make_run(tmp_path / "begun", "sagan", has_checkpoint=False)
    table = section(build_report([failed, begun], failed={failed: "a loss was not finite"}), "Table 1").tables[0]
    assert cells(table, "failed: a loss was not finite")["Model"] == "Ours"
    row = cells(table, "begun: no checkpoint yet")
    assert (row["s a step"], row["steps"], row["images seen"]) == ("-", "0", "0")


# Table 2 and layouts


def test_table_2_finds_its_classes_by_name_by_wordnet_and_by_number(tmp_path: Path) -> None:
    by_number = tuple(sorted(str(i) for i in range(1000)))  # as folders are: "10" before "2"
    runs = [
        make_run(tmp_path / "a", "an", lines=(line("intra-frechet", 5.0, values={"Stone_Wall": 4.0, "dog": 6.0}),)),
        make_run(tmp_path / "b", "sagan", lines=(line("intra-frechet", 7.0, values={"n09288635": 7.0}),)),
    ]
    (table,) = section(build_report(runs), "Table 2").tables
    assert table.rows[0][:4] == ("stone wall (825)", "49.3", "57.5", "34.16")
    assert [row[0].partition(" (")[0] for row in table.rows[:8]] == [row.name for row in TABLE_2]
    measured = {row[0]: row[4:] for row in table.rows}
    assert measured["stone wall (825)"] == ("4.00", NOT_RUN) and measured["geyser (974)"] == (NOT_RUN, "7.00")
    assert measured["dog"] == ("6.00", "-")
    assert measured["mean over the classes measured"] == ("5.00 (2 classes)", "7.00 (1 classes)")
    assert table.header[4] == "AN (n = 16), a: intra-FID, intra500_train_inception[all]"

    values = {name: float(name) for name in by_number}
    run = make_run(tmp_path / "c", "an", classes=by_number, lines=(line("intra-frechet", 5.0, values=values),))
    (table,) = section(build_report([run]), "Table 2").tables
    assert [row[-1] for row in table.rows[:8]] == [f"{row.label}.00" for row in TABLE_2] and len(table.rows) == 9
    assert table.notes == ("992 other classes were measured; their values are in report.json.",)


def test_layouts_are_evaluations_last_or_else_trainings_last(tmp_path: Path) -> None:
    seen = {"usage": [0.5, 0.5, 0.0, 0.0], "site": "blocks.2.an", "num_fakes": 500}
    logged = [
        {"images_seen": seen, "layout/generator.x/entropy": entropy, "layout/generator.x/usage": [1.0, 0.0]}
        for seen, entropy in ((0, 0.9), (640, 0.8))
    ]
    lines = (line("layout", 0.7, **seen), line("layout", 0.1, **{**seen, "images_seen": 320}))
    lines += (line("layout", 0.2, **seen, weights="raw"), line("layout", 0.3, **seen, seed=5))
    runs = [
        make_run(tmp_path / "with", "an", lines=lines, logged=tuple(logged)),
        make_run(tmp_path / "without", "an-no-ssr", logged=tuple(logged)),
    ]
    report = section(build_report(runs), "Table 4")
    (table,) = [table for table in report.tables if table.title.startswith("Layouts")]
    assert [row[1:] for row in table.rows] == [
        ("with", "0", "blocks.2.an", "0.700", "2.0 of 4", "0.50", "640 images", "evaluate, 500 images"),
        ("without", "0", "generator.x", "0.800", "1.0 of 2", "1.00", "640 images", "training's log, one batch"),
    ]


# Rows against rows


def scored(folder: Path, row: str, values: list[float], half: float | None, **settings: Any) -> list[Path]:
    """A run for each value, with an interval of half that width."""
    runs = []
    for seed, value in enumerate(values):
        interval = {} if half is None else {"low": value - half, "high": value + half}
        run = make_run(
            folder / f"{row}-{seed}", row, seed=seed, lines=(line("frechet", value, **interval),), **settings
        )
        runs.append(run)
    return runs


def test_every_two_rows_of_several_seeds_are_compared_and_the_undecided_ones_say_how_many_would_do(
    tmp_path: Path,
) -> None:
    """The distances of docs/results/table4-small."""
    runs = scored(tmp_path, "an", [90.66, 95.44, 84.86], 0.7)
    runs += scored(tmp_path, "sngan-star", [96.89, 102.52, 105.25], 0.7)
    runs += scored(tmp_path, "sagan", [97.50, 77.97, 85.04], None)
    report = build_report(runs)
    (table,) = section(report, "Which rows differ").tables
    an, star, sagan = "AN (n = 16)", "SN-GAN* [39]", "SA-GAN [39]"
    assert {row[1:3] for row in table.rows} == {("FID, fid5k_train_inception", "3 each")}
    assert [(row[0], *row[3:]) for row in table.rows] == [
        (f"{star} - {sagan}", "101.55 and 86.84", "+14.72 [-6.28, +35.71]", "undecided", "6"),
        (f"{star} - {an}", "101.55 and 90.32", "+11.23 [+0.13, +22.33]", f"{an} is better (lower)", "-"),
        (f"{sagan} - {an}", "86.84 and 90.32", "-3.48 [-23.87, +16.90]", "undecided", "83"),
    ]
    assert "here 3." in section(report, "Which rows differ").paragraphs[0]
    plain = json.loads(json.dumps(to_dict(report)["seed_comparisons"], allow_nan=False))
    assert [(c["is_decided"], c["seeds_needed"]) for c in plain] == [(False, 6), (True, None), (False, 83)]
    assert plain[2]["values"] == [[97.50, 77.97, 85.04], [90.66, 95.44, 84.86]]


def test_two_runs_of_a_seed_are_no_seeds(tmp_path: Path) -> None:
    """Told apart by the images they have seen, they are rows; not told apart, they are left out."""
    runs = scored(tmp_path / "short", "an", [10.0, 11.0], None)
    runs += scored(tmp_path / "long", "an", [50.0, 51.0], None, images_seen=1280)
    for path in runs[2:]:
        file = path / "evaluation/metrics.jsonl"
        file.write_text(file.read_text().replace('"images_seen": 640', '"images_seen": 1280'), encoding="utf-8")
    found = build_report(runs).seed_comparisons
    assert [(one.first, one.second, one.values) for one in found] == [
        ("AN (n = 16), 640 images", "AN (n = 16), 1,280 images", ((10.0, 11.0), (50.0, 51.0)))
    ]
    again = scored(tmp_path / "again", "an", [12.0], None)
    assert build_report([*runs[:2], *again]).seed_comparisons == ()


def test_of_a_score_that_should_be_high_the_higher_row_is_better(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{row}-{seed}", row, seed=seed, lines=(line("is1", value + 0.1 * seed),))
        for row, value in (("an", 8.0), ("sngan-star", 5.0))
        for seed in (0, 1)
    ]
    (table,) = section(build_report(runs), "Which rows differ").tables
    assert table.rows[0][-2:] == ("AN (n = 16) is better (higher)", "-")


def test_one_seed_is_no_comparison(tmp_path: Path) -> None:
    one = [*scored(tmp_path / "x", "an", [1.0, 2.0], None), *scored(tmp_path / "x", "sagan", [9.0], None)]
    same_seed = make_run(tmp_path / "again", "sagan", lines=(line("frechet", 9.5),))
    report = build_report([*one, same_seed])  # twice the same seed is one seed
    assert report.seed_comparisons == () and not any(s.title == "Which rows differ" for s in report.sections)


# Tables 3 and 5


def means(psnr: float, ssim: float, mae: float) -> dict[str, float]:
    scores = {f"{name}_pasted": value for name, value in (("psnr", psnr), ("ssim", ssim), ("mae", mae))}
    return scores | {"psnr_hole": psnr - 6, "ssim_hole": ssim - 0.3, "mae_hole": 4 * mae}


def model(context: str, scores: dict[str, float]) -> dict[str, Any]:
    about = {"seed": 0, "parameters": 12345, "images_seen": 640, "device": "cpu"}
    if context == "an":  # results from before a batch was recorded have no cost a step
        about |= {"batch_size": 16, "training_seconds": 100.0}
    return {**about, "context": context, "means": scores}


def write_scores(folder: Path) -> Path:
    """A scores.json as `attnorm evaluate` of inpainters writes it."""

    def difference(score: str, mean: float, is_supported: bool) -> dict[str, Any]:
        names = {"first": "mine", "second": "theirs", "score": score}
        return {**names, "mean": mean, "low": mean - 0.1, "high": mean + 0.1, "is_supported": is_supported}

    folder.mkdir()
    values = {
        "manifest": {"images": 100, "source": "/data/street", "image_size": 256, "masks": "centre", "sha256": "9" * 64},
        "models": {
            "mine": model("an", means(26.123, 0.87654, 0.01234)),
            "theirs": model("contextual", means(25.0, 0.85, 0.02)),
            "plain": model("none", means(24.0, 0.84, 0.03)),
        },
        "floors": {"mean fill": {"device": "cpu", "means": means(15.0, 0.7, 0.05)}},
        "differences": [
            difference("psnr_pasted", 1.123, True),
            difference("mae_pasted", -0.00766, True),
            difference("ssim_pasted", 0.026, False),
            difference("psnr_hole", 1.0, True),
        ],
        "bootstrap": {"resamples": 10_000, "confidence": 0.95, "seed": 0},
    }
    (folder / "scores.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_table_3_sets_inpainters_beside_the_printed_rows(tmp_path: Path) -> None:
    report = build_report([], inpainting=[write_scores(tmp_path / "scores")])
    table, differences = section(report, "Table 3").tables
    assert table.title == "scores: 100 images of data/street at 256 pixels, centre masks, manifest 999999999999"
    assert [row[:2] for row in table.rows] == [
        ("CA [38]", "theirs"),
        ("Ours", "mine"),
        ("context none: not in the paper", "plain"),
        ("mean fill: a baseline", "-"),
    ]
    row = cells(table, "mine")
    assert (row["PSNR, dB, paper"], row["PSNR, dB, whole image"]) == ("25.09", "26.12")
    assert (row["SSIM, paper"], row["SSIM, whole image"]) == ("0.8541", "0.8765")
    assert (row["MAE, paper"], row["MAE x2, whole image"], row["MAE, whole image"]) == ("0.0334", "0.0247", "0.0123")
    assert (row["PSNR, dB, hole"], row["parameters"], row["images seen"]) == ("20.12", "12,345", "640")
    assert (row["s a step"], cells(table, "plain")["s a step"]) == ("2.5", "")
    ((pair, psnr, _, mae, reading),) = differences.rows
    assert (pair, psnr, mae) == ("mine - theirs", "+1.12 [+1.02, +1.22]", "-0.0077 [-0.1077, +0.0923]")
    assert reading == "PSNR: mine is better; SSIM: undecided; MAE: undecided"


def test_inpainters_of_several_seeds_are_compared_by_preset_and_score(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "scores")
    values = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    for seed in (1, 2):
        values["models"][f"mine-{seed}"] = model("an", means(26.123 + seed, 0.87654, 0.01234)) | {"seed": seed}
        values["models"][f"plain-{seed}"] = model("none", means(24.0, 0.84, 0.03)) | {"seed": seed}
    (folder / "scores.json").write_text(json.dumps(values), encoding="utf-8")
    report = build_report([], inpainting=[folder])
    (table,) = section(report, "Which rows differ").tables
    assert table.title == "scores" and [row[:3] for row in table.rows] == [
        ("context an - context none", f"{score}, whole image", "3 each, paired")
        for score in ("PSNR, dB", "SSIM", "MAE")
    ]
    # 3.123 +- 4.30265 sqrt(1 / 3); the other two do not vary.
    assert [row[4:6] for row in table.rows] == [
        ("+3.12 [+0.64, +5.61]", "context an is better (higher)"),
        ("+0.0365 [+0.0365, +0.0365]", "context an is better (higher)"),
        ("-0.0177 [-0.0177, -0.0177]", "context an is better (lower)"),
    ]
    assert build_report([], inpainting=[folder], tables=(5,)).seed_comparisons == ()


def test_inpainters_of_one_preset_and_seed_are_no_row_together(tmp_path: Path) -> None:
    """Two recipes of a preset, told by settings, or by the images seen where these are not known: a row each."""
    folder = write_scores(tmp_path / "scores")
    values = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    values["models"] = {
        f"{kind}-{seed}": model("an", means(value + seed / 8, 0.8, 0.01)) | {"seed": seed, "images_seen": images}
        for kind, value, images in (("short", 20.0, 64), ("long", 30.0, 640), ("longer lr", 31.0, 640))
        for seed in (0, 1)
    }
    settings = {"short": "aaaaaaa", "long": "bbbbbbb", "longer lr": "ccccccc"}
    said = {name: one | {"settings": settings[name.rpartition("-")[0]]} for name, one in values["models"].items()}
    (folder / "scores.json").write_text(json.dumps(values | {"models": said}), encoding="utf-8")
    rows = {one.first for one in build_report([], inpainting=[folder]).seed_comparisons}
    assert rows == {"context an, settings aaaaaa", "context an, settings bbbbbb"}  # c is second to both
    for name, expected in (("all", []), ("longer lr", ["context an, 64 images - context an, 640 images"])):
        values["models"] = {key: kept for key, kept in values["models"].items() if not key.startswith(name)}
        (folder / "scores.json").write_text(json.dumps(values), encoding="utf-8")
        found = build_report([], inpainting=[folder]).seed_comparisons
        assert [f"{one.first} - {one.second}" for one in found if one.score.startswith("PSNR")] == expected
    assert found[0].values == ((20.0, 20.125), (30.0, 30.125))


def test_inpainters_whose_seams_were_taken_out_are_said_to_be_that(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "scores")
    pasted = section(build_report([], inpainting=[folder]), "Table 3").tables[0].title
    values = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    for one in values["models"].values():
        one["seams"] = "none"
    (folder / "scores.json").write_text(json.dumps(values), encoding="utf-8")
    assert section(build_report([], inpainting=[folder]), "Table 3").tables[0].title == f"{pasted}, seams taken out"


def test_table_5_has_the_times_of_a_benchmark_beside_the_papers() -> None:
    (table,) = section(build_report([], benches=[BENCH]), "Table 5").tables
    rows = {row[:2]: row[2:] for row in table.rows}
    assert rows["AN", "paper"] == ("0.73", "2.24", "9.46", "37.68") == tuple(map(str, TABLE_5["AN"].values()))
    assert rows["AN", "an-native"] == ("2.52", "5.38", "29.8", "160")
    assert rows["Self-attention", "paper"] == ("5.21", "79.42", "-", "-")
    assert rows["Self-attention", "self_attention"] == ("67.9", "744", "missing", "missing")
    assert "self_attention at 512 x 512: missing: 1.1e+12 operations forward" in table.notes[0]


# What is written, and what is refused


def test_the_plain_data_hold_scores_and_nobodys_folders(tmp_path: Path) -> None:
    run = make_run(tmp_path / "an-s0", "an", lines=(line("frechet", 12.3),))
    inpainting = write_scores(tmp_path / "scores")
    values = json.loads(json.dumps(to_dict(build_report([run], [inpainting], [BENCH])), allow_nan=False))
    (found,) = values["runs"]
    assert (found["name"], found["row"], found["seed"], found["seconds"]) == ("an-s0", "an", 0, 90.0)
    assert found["scores"][0]["value"] == 12.3 and found["scores"][0]["data"]["source"] == "animals/train"
    assert values["inpainting"]["scores"]["mine"]["psnr_pasted"] == 26.123
    assert values["printed"]["table_4"][-1]["values"] == {"is": "47.14", "fid": "17.75"}
    assert str(tmp_path) not in json.dumps(values) and "/home/someone" not in json.dumps(values)


def test_what_cannot_be_reported_on_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "an")
    RunDirectory(tmp_path / "inpainter").create(PRESETS["inpaint-smoke"][1], {})
    for runs, more, message in (
        ([run, run], {}, "named twice"),
        ([RunDirectory(run).checkpoints()[0]], {}, "is a file; expected a run directory"),
        ([tmp_path / "nothing"], {}, "is not a run directory"),
        ([], {"inpainting": [run]}, r"holds no scores\.json"),
        ([], {"benches": [run]}, r"cannot be read as a bench\.json"),
        ([tmp_path / "inpainter"], {}, "trained for inpainting; expected class-conditional runs"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=message):
            build_report(runs, **more)
    (run / "evaluation/metrics.jsonl").write_text('{"metric": "frechet"}\n', encoding="utf-8")
    with pytest.raises(CheckpointError, match="a line that is no score: value is missing"):
        build_report([run])


def test_a_subset_estimate_at_a_later_checkpoint_does_not_hide_a_full_score(tmp_path: Path) -> None:
    quick = {"images_seen": 640, "subset": True, "protocol": "fid5k_train_subset1k_inception"}
    lines = (line("frechet", 5.0, images_seen=320), line("frechet", 4.0, **quick), line("is1", 3.0, images_seen=640))
    assert read_run("a", make_run(tmp_path / "a", "an", lines=lines), "").scored_at == 320
    assert read_run("b", make_run(tmp_path / "b", "an", lines=lines[1:]), "").scored_at == 640  # for want of others


@pytest.mark.parametrize(
    ("protocol", "num_reals", "agrees"),
    [
        ("intra5k_train_inception[all]", 1_281_167, True),
        ("intra5k_train_inception[table2]", 10_400, True),
        ("intra50_train_inception[all]", 1_281_167, False),  # trap 1: the number of generated images decides
        ("intra5k_other_inception[all]", 1_281_167, False),
        ("intra5k_train_inception[table2]", 400, False),
    ],
)
def test_intra_fid_stands_beside_the_papers_by_its_protocol_alone(
    tmp_path: Path, protocol: str, num_reals: int, agrees: bool
) -> None:
    data = {"source": "x", "fingerprint": "cd" * 32, "image_size": 128}
    score = line("intra-frechet", 80.0, protocol=protocol, num_reals=num_reals, data=data)
    classes = tuple(f"n{number:08d}" for number in range(1000))
    run = read_run("a", make_run(tmp_path / "a", "an", "model.image_size=128", lines=(score,), classes=classes), "")
    (column,) = columns([run], ["intra-frechet"])
    assert _agrees(run, column) is agrees
