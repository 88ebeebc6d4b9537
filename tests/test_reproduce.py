"""A table from one command: which runs, at what cost, made once, and what happens where one fails or is stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from attnorm import cli
from attnorm.benchmark import run as bench_run
from attnorm.benchmark.cases import CASES, IMPLEMENTATIONS
from attnorm.benchmark.results import BenchReport
from attnorm.checkpoint import Header, save_checkpoint
from attnorm.config import ConfigError
from attnorm.data.images import ImageSet, load_images
from attnorm.evaluation.protocol import scores_file
from attnorm.metrics import features
from attnorm.presets import PRESETS
from attnorm.reproduce import estimate as estimation
from attnorm.reproduce import execute as execution
from attnorm.reproduce import plan as planning
from attnorm.reproduce.estimate import Estimate, Timings, estimate
from attnorm.reproduce.execute import Result, execute
from attnorm.reproduce.plan import SCALES, TABLE_ROWS, Plan, is_trained, make_plan, read_failed, require_own
from attnorm.run_directory import RunDirectory
from attnorm.settings import override
from attnorm.system.files import file_lock, read_lines
from attnorm.training.trainer import Outcome, TrainingError
from tests.conftest import draw_photographs
from tests.evaluation.conftest import CPU, TinyExtractor

TINY = ("model.width=2", "model.latent_dim=4", "run.batch_size=4", "run.duration_images=8", "run.device=cpu")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight smooth pictures of 40 pixels."""
    folder = tmp_path_factory.mktemp("data") / "photographs"
    for name in ("bird", "cat", "dog"):
        draw_photographs(folder / name, 8)
    return folder


@pytest.fixture(scope="module")
def images(photographs: Path) -> ImageSet:
    return load_images(str(photographs), 32)


def plan_of(out: Path, data: Path, *, table: Any = "table4", rows: Any = ("an", "sngan-star"), **more: Any) -> Plan:
    more = {"seeds": 1, "num": 12, "settings": TINY, **more}
    return make_plan(table, "smoke", out, data=str(data), rows=rows, **more)


# The plan


def test_a_plan_has_all_rows_of_one_seed_before_the_next(tmp_path: Path) -> None:
    plan = make_plan("table1", "small", tmp_path, data="DATA", settings=["run.seed=5"])
    rows = ["acgan", "sngan", "sngan-star", "sagan", "an"]
    assert [job.name for job in plan.jobs] == [f"{row}-s{seed}" for seed in (5, 6) for row in rows]
    for job in plan.jobs:
        seed = int(job.name[-1])
        expected = override(PRESETS[f"small32-{job.row}"][1], [f"run.seed={seed}", "data.source=DATA"])
        assert job.config == expected and job.path == tmp_path / "runs" / job.name
    assert (plan.extractor, plan.num, plan.scale.intervals) == ("efficientnet-lite0", 5000, True)


@pytest.mark.parametrize("table", ["table1", "table2", "table3", "table4"])
def test_every_scale_has_the_rows_of_every_table(table: Any, tmp_path: Path) -> None:
    generators = {"paper": "paper-imagenet128", "small": "small32", "smoke": "smoke"}
    inpainters = {"paper": "paper-streetview256", "small": "inpaint64", "smoke": "inpaint-smoke"}
    for scale in SCALES:
        jobs = make_plan(table, scale, tmp_path, data="DATA", seeds=1).jobs
        assert tuple(job.row for job in jobs) == TABLE_ROWS[table]
        family = (inpainters if table == "table3" else generators)[scale]
        assert [job.config.preset for job in jobs] == [f"{family}-{row}" for row in TABLE_ROWS[table]]


def test_the_papers_scale_has_the_papers_counts(tmp_path: Path) -> None:
    plan = make_plan("table2", "paper", tmp_path, data="DATA")
    assert (plan.extractor, plan.num, plan.scale.fakes_per_class, plan.scale.subset) == ("inception", 50_000, 5_000, 0)
    assert plan.classes == ("table2",) and make_plan("table2", "small", tmp_path, data="DATA").classes == ()
    plan = make_plan("table1", "paper", tmp_path, data="DATA", extractor="efficientnet-lite0", num=1000, device="cpu")
    assert (plan.extractor, plan.num, plan.device, plan.classes) == ("efficientnet-lite0", 1000, "cpu", ())
    assert {job.config.run.device for job in plan.jobs} == {"cpu"}


def test_smoke_alone_has_data_of_its_own(tmp_path: Path) -> None:
    assert make_plan("table3", "smoke", tmp_path).jobs[0].config.data.source == "builtin"
    for scale in ("small", "paper"):
        with pytest.raises(ConfigError, match="--data is missing: the scale"):
            make_plan("table3", scale, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("table4 --scale smoke --rows an,sngan-stra", "there is no row 'sngan-stra'; did you mean sngan-star?"),
        ("table3 --scale smoke --rows sagan", "there is no row 'sagan'; did you mean an? expected some of an, context"),
        ("table4 --scale smoke --rows an,an", "--rows names a row twice"),
        ("table4 --scale smoke --seeds -1", "--seeds is -1, --num 0; expected at least 1 and 10, or 0"),
        ("table4 --scale smoke --num 9", "--num 9; expected at least 1 and 10, or 0 for as many"),
        ("table4 --scale smoke --inception-weights w.pth", "--inception-weights is for --extractor inception"),
        ("table3 --scale smoke --extractor inception", "--extractor and --num are for generated images"),
        ("table3 --scale smoke --inception-weights w.pth", "--inception-weights is for generated images"),
        ("table2 --scale smoke --num 50", "table2 takes 16 images of each class at the scale smoke"),
        ("table5 --scale smoke --rows an", "table5 times layers alone"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(
    arguments: str, message: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    assert message in refused(["reproduce", *arguments.split(), "--out", str(out)])
    assert not out.exists()


# What is there already


def test_runs_of_other_settings_data_or_presets_are_refused(photographs: Path, tmp_path: Path) -> None:
    images = load_images(str(photographs), 32)
    plan = plan_of(tmp_path / "out", photographs)
    require_own(plan, images)
    job = plan.jobs[0]
    RunDirectory(job.path).create(
        override(job.config, ["model.num_classes=3"]), {"source": "s", "fingerprint": images.fingerprint}
    )
    require_own(plan, images)
    # Without a checkpoint there is nothing to lose.
    require_own(plan_of(tmp_path / "out", photographs, settings=(*TINY, "optim.g_lr=0.5")), images)
    RunDirectory(job.path).checkpoint_file(8).touch()
    require_own(plan_of(tmp_path / "out", photographs, settings=(*TINY, "run.duration_images=80")), images)
    with pytest.raises(ConfigError, match=r"optim.g_lr was 0\.0001, now 0\.5"):
        require_own(plan_of(tmp_path / "out", photographs, settings=(*TINY, "optim.g_lr=0.5")), images)
    with pytest.raises(ConfigError, match="was trained on other data"):
        require_own(plan, replace(images, fingerprint="another"))
    other = plan_of(tmp_path / "out", photographs, table="table3", rows=("an",), num=0, settings=())
    with pytest.raises(ConfigError, match="is a run of smoke-an, not of inpaint-smoke-an"):
        require_own(other, images)


def test_a_folder_with_other_things_is_refused(photographs: Path, images: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not empty and holds no table of ours"):
        require_own(plan_of(tmp_path, photographs), images)
    with pytest.raises(ConfigError, match=r"letters.txt is a file; expected a folder"):
        require_own(plan_of(tmp_path / "letters.txt", photographs), images)
    (tmp_path / "estimate.json").write_text("{}")
    require_own(plan_of(tmp_path, photographs), images)


# The estimate


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what an image is found to take, instead of timing it."""

    def timed(*, run: dict[str, float], score: dict[str, float] | None = None) -> None:
        monkeypatch.setattr(estimation, "_time_run", lambda *_: run)
        monkeypatch.setattr(estimation, "_time_scores", lambda *_: score)

    return timed


def test_the_estimate_is_what_is_left_times_what_an_image_takes(
    images: ImageSet, photographs: Path, tmp_path: Path, timed: Callable[..., None]
) -> None:
    timed(run={"step": 0.5, "sample": 0.25}, score={"feature": 2.0, "distance": 7.0, "interval": 100.0})
    plan = plan_of(tmp_path, photographs, seeds=2, settings=(*TINY, "run.duration_images=80"))
    run = RunDirectory(plan.jobs[0].path)
    run.create(plan.jobs[0].config, {})
    save_checkpoint(run.checkpoint_file(20), {}, Header(plan.jobs[0].config, (), 20, 1.0))
    left = estimate(plan, images, TinyExtractor())
    assert left.training == {"an-s0": 30.0, "sngan-star-s0": 40.0, "an-s1": 40.0, "sngan-star-s1": 40.0}
    # 12 images, sampled and seen; one distance; no intervals at this scale; 12 images for the layouts.
    assert set(left.measuring.values()) == {12 * 2.25 + 7 + 12 * 0.25}
    assert left.once == 24 * 2.0  # all real images, fewer than the subset
    assert left.total == 150 + 4 * 37 + 48


def test_intra_class_distances_and_intervals_are_counted(
    images: ImageSet, photographs: Path, tmp_path: Path, timed: Callable[..., None]
) -> None:
    timed(run={"step": 1.0, "sample": 1.0}, score={"feature": 1.0, "distance": 1.0, "interval": 1.0})
    left = estimate(plan_of(tmp_path, photographs, table="table2", rows=("an",), num=0), images, TinyExtractor())
    assert left.measuring == {"an-s0": 3 * (16 * 2 + 1)} and left.once == 24
    plan = make_plan("table4", "small", tmp_path, data=str(photographs), rows=("an",), seeds=1, num=20)
    left = estimate(plan, images, TinyExtractor())
    assert left.measuring == {"an-s0": 20 * 2 + 1 + 100 + 20}
    assert left.training == {"an-s0": plan.jobs[0].config.run.duration_images}


def test_both_phases_of_inpainting_are_counted(photographs: Path, tmp_path: Path, timed: Callable[..., None]) -> None:
    timed(run={"first": 1.0, "step": 10.0})
    images = load_images(str(photographs), 40)
    plan = make_plan("table3", "smoke", tmp_path, data=str(photographs), seeds=1, rows=("an",))
    assert estimate(plan, images, None).training == {"an-s0": 80 * 1 + 80 * 10}
    run = RunDirectory(plan.jobs[0].path)
    run.create(plan.jobs[0].config, {})
    for seen, expected in ((40, 40 + 800), (120, 400), (160, 0)):
        save_checkpoint(run.checkpoint_file(seen), {}, Header(plan.jobs[0].config, (), seen, 1.0))
        assert estimate(plan, images, None).total == expected
    plan = make_plan("table3", "paper", tmp_path, data=str(photographs), seeds=1, rows=("none",))
    left = estimate(plan, images, None)
    assert left.total == 150_000 * 16 * 10 and any("first phase" in note for note in left.notes)


def test_an_image_is_timed_once_for_each_kind_of_step(
    images: ImageSet, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []

    def count(config: Any, *_: object) -> dict[str, float]:
        widths.append(config.model.width)
        return {"step": 1.0, "sample": 1.0}

    monkeypatch.setattr(estimation, "_time_run", count)
    for _ in range(2):
        left = estimate(plan_of(tmp_path, photographs, seeds=3), images, None)
    assert widths == [2, 2] and any("its weights are not at hand" in note for note in left.notes)
    estimate(plan_of(tmp_path, photographs, settings=(*TINY, "run.duration_images=800")), images, None)
    assert widths == [2, 2]
    estimate(plan_of(tmp_path, photographs, settings=(*TINY, "model.width=3")), images, None)
    assert widths == [2, 2, 3, 3]
    (tmp_path / "estimate.json").write_text('{"seconds"')
    with pytest.raises(ConfigError, match=r"estimate.json cannot be read .* remove it"):
        Timings(tmp_path / "estimate.json", CPU)


def test_steps_samples_and_scores_are_really_timed(images: ImageSet, photographs: Path, tmp_path: Path) -> None:
    """A duration cannot be known; that it is one, and that what was timed leaves no trace, can."""
    settings = (*TINY, "run.duration_images=80")
    plan = plan_of(tmp_path, photographs, table="table1", rows=("acgan",), settings=settings)
    extractor = TinyExtractor()
    left = estimate(plan, images, extractor)
    assert 0 < left.training["acgan-s0"] < 600 and 0 < left.measuring["acgan-s0"] < 600 and left.once > 0
    assert extractor.num_seen > 0 and [path.name for path in tmp_path.iterdir()] == ["estimate.json"]

    plan = plan_of(tmp_path, photographs, table="table3", rows=("contextual",), num=0, settings=TINY[2:3])
    pace = estimation._time_run(plan.jobs[0].config, load_images(str(photographs), 40), CPU)
    assert pace.keys() == {"first", "step"} and 0 < pace["first"] < pace["step"]  # five updates of the critic more


# The doing


def done(plan: Plan, images: ImageSet, left: Estimate | None = None) -> Result:
    """Quietly, and without asking how long it would take."""
    left = left or Estimate({job.name: 0.0 for job in plan.jobs}, {}, 0.0, ())
    return execute(plan, images, TinyExtractor(), left, console=Console(quiet=True))


def test_a_second_call_trains_and_measures_nothing(
    images: ImageSet, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, extractor = plan_of(tmp_path, photographs), TinyExtractor()
    left = estimate(plan, images, extractor)
    result = execute(plan, images, extractor, left, console=Console(quiet=True))
    assert result.scored == [tmp_path / "runs" / name for name in ("an-s0", "sngan-star-s0")] and not result.failed
    assert all(map(is_trained, plan.jobs))
    scores = {path.name: read_lines(scores_file(path)) for path in result.scored}
    assert [row["metric"] for row in scores["sngan-star-s0"]] == ["is1", "is10", "frechet"]
    assert [row["metric"] for row in scores["an-s0"]] == ["layout", "is1", "is10", "frechet"]
    for row in (*scores["an-s0"], *scores["sngan-star-s0"]):
        assert row["num_fakes"] == 12 and row["images_seen"] == 8 and row["run_seed"] == 0

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(execution, "train", never)
    seen = extractor.num_seen
    require_own(plan, images)
    plan = replace(plan, extractor="tiny")  # what the scores' lines say
    left = estimate(plan, images, extractor)
    assert left.total == 0
    again = execute(plan, images, extractor, left, console=Console(quiet=True))
    assert again == result and extractor.num_seen == seen
    assert {path.name: read_lines(scores_file(path)) for path in again.scored} == scores


def test_a_run_goes_on_where_it_stopped(images: ImageSet, photographs: Path, tmp_path: Path) -> None:
    half = plan_of(tmp_path, photographs, rows=("an",), settings=(*TINY, "run.duration_images=4"))
    done(half, images)
    whole = plan_of(tmp_path, photographs, rows=("an",), seeds=2)
    assert [is_trained(job) for job in whole.jobs] == [False, False]
    done(whole, images)
    assert [is_trained(job) for job in whole.jobs] == [True, True]
    seen = [row["images_seen"] for row in read_lines(scores_file(whole.jobs[0].path)) if row["metric"] == "frechet"]
    assert seen == [4, 8]


def test_every_checkpoint_can_be_measured_for_curves(images: ImageSet, photographs: Path, tmp_path: Path) -> None:
    settings = (*TINY, "run.checkpoint_every_images=4")
    plan = plan_of(tmp_path, photographs, rows=("an",), settings=settings)
    done(plan, images)
    file = scores_file(plan.jobs[0].path)
    assert {row["images_seen"] for row in read_lines(file)} == {8}
    plan = plan_of(tmp_path, photographs, rows=("an",), settings=settings, all_checkpoints=True)
    done(plan, images)
    assert [(row["metric"], row["checkpoint"]) for row in read_lines(file) if row["images_seen"] == 4] == [
        ("frechet", "checkpoints/000000004.safetensors")
    ]
    with pytest.raises(ConfigError, match="--checkpoints is for the Fréchet distance over all classes, which table2"):
        plan_of(tmp_path, photographs, table="table2", num=0, all_checkpoints=True)


def test_a_run_whose_time_is_up_is_done(images: ImageSet, photographs: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, photographs, rows=("sngan-star",), settings=(*TINY, "run.max_minutes=0.00001"))
    done(plan, images, Estimate({"sngan-star-s0": 1.0}, {}, 0.0, ()))
    (job,) = plan.jobs
    assert 0 < planning.images_seen(job) < 8 and is_trained(job)
    assert estimate(plan, images, None).training == {job.name: 0}
    longer = replace(job, config=override(job.config, ["run.max_minutes=0"]))
    assert not is_trained(longer)


def test_one_table_is_made_by_one_process_at_a_time(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(features, "EXTRACTORS", {"efficientnet-lite0": TinyExtractor})
    out.mkdir()
    with file_lock(out):
        assert f"another process is at work in {out}" in refused(command(photographs, out), is_silent=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "`attnorm reproduce` was started in 2 processes" in refused(command(photographs, out))
    assert not (out / "runs").exists()


def test_a_run_that_collapses_is_recorded_and_the_others_go_on(
    images: ImageSet, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = execution.train, []

    def collapse(config: Any, images: ImageSet, out: Path, **more: Any) -> Outcome:
        tried.append(out.name)
        outcome = real(config, images, out, **more)
        if out.name == "an-s0":
            raise TrainingError("a loss was not finite at step 2")
        return outcome

    monkeypatch.setattr(execution, "train", collapse)
    plan = plan_of(tmp_path, photographs)
    result = done(plan, images)
    assert tried == ["an-s0", "sngan-star-s0"] and [path.name for path in result.scored] == ["sngan-star-s0"]
    assert result.failed == read_failed(plan) == {"an-s0": "a loss was not finite at step 2"}

    again = done(plan, images)
    assert tried == ["an-s0", "sngan-star-s0"] and again == result
    shutil.rmtree(tmp_path / "runs" / "an-s0")
    assert read_failed(plan) == {}
    done(plan, images)
    assert tried == ["an-s0", "sngan-star-s0", "an-s0"]


def test_a_stop_ends_the_whole_with_status_130(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    begun = []

    def stop(config: Any, images: ImageSet, out: Path, **_: Any) -> Outcome:
        begun.append(out.name)
        return Outcome("interrupted", 4, out)

    monkeypatch.setattr(execution, "train", stop)
    monkeypatch.setattr(features, "load_extractor", lambda name, **_: TinyExtractor())
    arguments = command(photographs, tmp_path)
    said = refused(arguments, code=130, is_silent=False)
    assert begun == ["an-s0"] and said.endswith("The same command goes on from here.")


def command(photographs: Path, out: Path, *more: str) -> list[str]:
    options = ["--scale", "smoke", "--rows", "an,sngan-star", "--seeds", "1", "--num", "12", *more]
    return ["reproduce", "table4", *options, "--data", str(photographs), "--out", str(out), "--set", *TINY]


def test_a_dry_run_says_what_there_is_to_do_and_how_long_it_takes(
    photographs: Path, tmp_path: Path, timed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    timed(run={"step": 1000.0, "sample": 0.0}, score={"feature": 0.0, "distance": 0.0, "interval": 0.0})
    monkeypatch.setattr(features, "_download", lambda *_: pytest.fail("a download was begun"))
    cli.main(command(photographs, tmp_path, "--dry-run", "--extractor", "inception"))
    assert "features of inception are not counted" in capsys.readouterr().out
    monkeypatch.setattr(features, "load_extractor", lambda name, **_: TinyExtractor())
    cli.main(command(photographs, tmp_path, "--dry-run"))
    said = capsys.readouterr().out
    for part in ("an-s0", "smoke-sngan-star", "2 x 4 images", "not begun", "2.2 h", "about 4.4 h left on cpu"):
        assert part in said
    assert "12 generated images a score" in said and "an estimate" in said
    assert [path.name for path in tmp_path.iterdir()] == ["estimate.json"]


def test_the_smallest_scale_makes_the_readmes_table_whole_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the built-in data, as by `attnorm reproduce table4 --scale smoke`."""
    monkeypatch.setattr(features, "load_extractor", lambda name, **_: TinyExtractor())
    monkeypatch.setattr("attnorm.reports.report.draw_pictures", lambda *_, **__: [])  # they take most of the time
    out = tmp_path / "reproduced"
    command = ["reproduce", "table4", "--scale", "smoke", "--out", str(out), "--num", "12", "--set", *TINY]
    cli.main(command)
    said = capsys.readouterr()
    assert "2,560 images of 10 classes from builtin" in said.err and "can only memorise" in said.err
    for name in ("report.md", "report.html", "report.json"):
        assert str(out / name) in said.out and (out / name).is_file()
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    text = (out / "report.md").read_text(encoding="utf-8")
    (rows,) = (section["tables"][0]["rows"] for section in report["sections"] if section["title"].startswith("Table 4"))
    assert [row[1] for row in rows] == [f"{row}-s0" for row in TABLE_ROWS["table4"]]
    for run in report["runs"]:
        metrics = {score["metric"]: score["value"] for score in run["scores"]}
        assert run["images_seen"] == 8 and metrics.keys() == {"frechet", "is1", "is10"} and len(run["layouts"]) == 1
        assert f"{metrics['frechet']:.2f}" in text, run["name"]
    assert "## Table 4" in text and "## Table 1" not in text
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}

    monkeypatch.setattr(execution, "train", lambda *_, **__: pytest.fail("trained again"))
    cli.main([*command[:2], "--extractor", "tiny", *command[2:]])
    assert "nothing is left to train or to measure" in capsys.readouterr().out
    assert (out / "report.md").read_text(encoding="utf-8") == text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before and len(before) == 6


@pytest.mark.usefixtures("few_pictures")
def test_what_failed_is_in_the_report_and_in_the_status(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    def collapse(config: Any, images: ImageSet, out: Path, **_: Any) -> Outcome:
        RunDirectory(out).create(config, {"source": "", "classes": list(images.classes), "fingerprint": "x"})
        raise TrainingError("a loss was not finite at step 2")

    monkeypatch.setattr(execution, "train", collapse)
    monkeypatch.setattr(features, "load_extractor", lambda name, **_: TinyExtractor())
    said = refused(command(photographs, tmp_path), code=1, is_silent=False)
    assert "failed: an-s0: a loss was not finite at step 2" in said
    assert "a loss was not finite at step 2" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_table_3_from_the_command_line(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two arms of two steps, one in each phase."""
    settings = ("run.batch_size=2", "run.duration_images=4", "inpainting.switch_images=2", "model.width=2")
    arguments = ["reproduce", "table3", "--scale", "smoke", "--rows", "an,contextual"]  # one seed at this scale
    arguments += ["--data", str(photographs), "--out", str(tmp_path / "out"), "--device", "cpu", "--set"]
    arguments += [*settings, "data.held_out_every=2"]
    cli.main(arguments)
    out = tmp_path / "out"
    written = {path.name for path in out.iterdir()}
    assert written >= {"scores.json", "scores.md", "scores.csv", "image-grid.png", "report.md"}
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores["models"]) == ["an-s0", "contextual-s0"] and scores["manifest"]["images"] == 3
    assert scores["manifest"]["masks"] == "centre" and scores["manifest"]["image_size"] == 32

    monkeypatch.setattr(execution, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(execution.inpainters, "evaluate_inpainters", lambda *_, **__: pytest.fail("measured again"))
    cli.main(arguments)
    assert json.loads((out / "scores.json").read_text()) == scores
    (out / "image-grid.png").rename(out / "grid")  # a kill came before it was drawn
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        cli.main(arguments)
    (out / "grid").rename(out / "image-grid.png")
    (out / "scores.json").write_text(json.dumps(scores | {"models": {}}))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        cli.main(arguments)


def test_table_5_is_the_benchmark_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = []
    environment = {"device_name": "cpu", "dtype": "float32", "device": "cpu", "seconds_a_cell": 0.02}
    cases_of_smoke = tuple(case for case in CASES if case.name in ("smoke", "table5-128"))
    report = BenchReport(environment=environment, cases=cases_of_smoke, cells=())

    def run(**settings: Any) -> BenchReport:
        called.append({name: value for name, value in settings.items() if name != "progress"})
        return report

    def write(report: BenchReport, out: Path) -> list[Path]:
        out.mkdir(parents=True)
        (out / "bench.json").write_text("{}")
        return []

    monkeypatch.setattr(bench_run, "run", run)
    monkeypatch.setattr(execution, "write_report", write)
    for module in (planning, execution):
        monkeypatch.setattr(module, "read_results", lambda path: report)
    plan = make_plan("table5", "smoke", tmp_path / "out", device="cpu")
    cases, cells, seconds = planning.describe_table5(plan)
    assert cases == "smoke, table5-128" and cells == 2 * 2 * len(IMPLEMENTATIONS)
    assert seconds == pytest.approx(cells * 0.02)
    for _ in range(2):
        execution.time_layers(plan, progress=lambda *_: None)
    assert called == [{"cases": "smoke,table5-128", "device": "cpu", "seconds": 0.02}]
    require_own(plan, None)
    with pytest.raises(
        ConfigError, match=r"is of smoke, table5-128, 0\.02 s each, on cpu; expected table5-128, .* 0\.2 s"
    ):
        require_own(make_plan("table5", "small", tmp_path / "out", device="cpu"), None)
    assert planning.describe_table5(make_plan("table5", "paper", tmp_path))[0].count("table5-") == 4

    monkeypatch.setattr(execution, "time_layers", lambda *_, **__: pytest.fail("a dry run has measured"))
    cli.main(["reproduce", "table5", "--scale", "smoke", "--out", str(tmp_path / "new"), "--dry-run"])
    assert f"{cells} measurements" in capsys.readouterr().out and not (tmp_path / "new").exists()
