"""What the README and the pages of docs show is true: commands, the programs of the notebooks, and the site itself."""

from __future__ import annotations

import functools
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import attnorm
from attnorm import cli
from attnorm.cli import SUBCOMMANDS
from attnorm.presets import PRESETS
from attnorm.settings import override

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = [page for page in PAGES if "{code-cell}" in page.read_text(encoding="utf-8")]

# What takes hours is made small, and what other tests run from end to end is read here only.
SMALL = ["run.batch_size=4", "run.duration_images=8", "run.device=cpu", "run.precision=float32", "model.width=2"]
SMALL_GENERATOR = ["model.latent_dim=4", "model.image_size=32", "run.log_every_images=4"]
ELSEWHERE = {"watch", "export", "reproduce", "experiment", "bench", "studio", "presets"}


def blocks(page: Path) -> list[list[str]]:
    """The lines of every block of commands, continuation lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [[line.strip() for line in block.splitlines() if line.strip()] for block in found]


def commands(page: Path) -> list[str]:
    """Those of attnorm that are written out, and as they are now (a record says `# at COMMIT`); what torchrun starts is
    for tests/training/test_torchrun.py.
    """
    lines = [line for block in blocks(page) for whole in block for line in whole.split(" && ")]
    is_other = re.compile(r"\.\.\.|\$|\[--|# at [0-9a-f]{7}").search
    return [line for line in lines if line.startswith("attnorm ") and not is_other(line)]


def test_the_readme_begins_with_commands_that_the_makefile_has() -> None:
    targets = [line.split("#")[0].split()[1] for line in blocks(ROOT / "README.md")[0] if line.startswith("make ")]
    assert targets == ["demo", "studio", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[inspect.BoundArguments] = []

    def pretending(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def pretend(*positional: object, **named: object) -> None:
            called.append(inspect.signature(original).bind(*positional, **named))

        return pretend

    monkeypatch.setattr(cli, "app", cli.tyro.extras.SubcommandApp())
    for name, function in SUBCOMMANDS.items():
        cli.app.command(name=name)(pretending(function))
    for command in commands(page):
        cli.main(words := shlex.split(command, comments=True)[1:])
        if words[0] == "train":
            bound = called[-1].arguments
            override(PRESETS[bound["preset"]][1], bound.get("settings", ()))
    assert len(called) == len(commands(page))


def made_small(command: str) -> list[str]:
    """The command with little to do; nothing where other tests run it, or it wants what cannot be had offline."""
    words = shlex.split(re.sub(r"--num \d+", "--num 12", command), comments=True)[1:]
    if words[0] in ELSEWHERE or "--inception-weights" in words:
        return []
    if words[0] == "train":
        settings = SMALL if "inpaint" in words[words.index("--preset") + 1] else [*SMALL, *SMALL_GENERATOR]
        words += [] if "--set" in words else ["--set"]
        words += settings
    return words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages take for granted: photographs by class, one with a mask, folders of such, images to compare."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)

    def draw(file: str, side: int = 64) -> None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file)

    for number in range(8):
        for name in ("church", "golf_ball", "tench"):
            draw(f"FOLDER/{name}/{number}.png")
        draw(f"fakes/{number}.png")
        draw(f"reals/{number}.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (20, 20, 40, 40))
    for photo, hole in (("photo.jpg", "mask.png"), ("photos/a.png", "masks/a.png")):
        draw(photo)
        Path(hole).parent.mkdir(exist_ok=True)
        mask.save(hole)
    return tmp_path


@pytest.mark.usefixtures("few_pictures")
def test_the_commands_of_the_site_do_what_they_say(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the pages, in one folder, as a reader would; with small networks and little to do."""
    for name in ("generators", "inpainting", "scores"):
        if name == "scores":
            shutil.copytree("runs/first", "runs/second")
        for command in commands(ROOT / "docs" / f"{name}.md"):
            words = made_small(command)
            if not words:
                continue
            cli.main(words)
            if "--out" in words and "--dry-run" not in words:
                assert Path(words[words.index("--out") + 1]).exists(), command


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_the_programs_of_a_page_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = re.findall(r"^```{code-cell}[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, page.name, "exec"), names)
    if "plt" in names:
        names["plt"].close("all")


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """All pages and links, without the reference of every module and without running notebooks: make docs does both."""
    pytest.importorskip("myst_nb", reason="myst-nb is not installed: pip install -e '.[dev]'")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-t", "quick"]
    command += ["-d", str(tmp_path / "trees"), "-b", "html", str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "layer.html").is_file()


def test_every_public_name_is_in_the_reference_and_says_what_it_is() -> None:
    listed = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name in set(attnorm.__all__) - {"__version__"}:
        assert re.search(rf":: attnorm\.{name}$", listed, re.MULTILINE), name
        assert (inspect.getdoc(getattr(attnorm, name)) or "").strip(), name
