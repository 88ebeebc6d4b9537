"""Faults by the hundred: does a training that is killed, stopped, starved or damaged end with the same weights?

    python scripts/campaign.py --out campaign --faults 1000 --summary docs/results/campaign.md

Every fault has a number, and all that is random about it follows from that number: which preset, how many processes,
what goes wrong and when. A run begins, the fault comes (sometimes a second one), and the same command is given until it
ends by itself. Then its last checkpoint and its log are held against those of the undisturbed run, bit for bit. A fault
is one line of OUT/faults.jsonl; the same command goes on where it stopped. Linux, on the CPU, one thread a process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import platform
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# What a process needs is imported once, here: it is forked, and starts at once.
from attnorm import cli
from attnorm.checkpoint import find_damage
from attnorm.data import builtin
from attnorm.run_directory import RunDirectory
from attnorm.system.files import append_lines, read_lines, write_text
from attnorm.system.provenance import commit, processor
from attnorm.training import trainer

PRELOADED = (trainer, builtin)
PRESETS = ("smoke", "inpaint-smoke")
INTERVAL, DURATION = 16, 80  # images between checkpoints, and of a run
SETTINGS = (
    *(f"run.duration_images={DURATION}", f"run.checkpoint_every_images={INTERVAL}", "run.log_every_images=8"),
    *("run.keep_checkpoints=3", "run.device=cpu", "run.precision=float32"),
)
GRACE = 30.0  # seconds that torchrun allows the others of a process that has failed
PATIENCE = 900.0  # seconds, after which what has not ended hangs: long, for a machine that others use too


@dataclass
class Leg:
    """One call of the command, in one or more processes."""

    pids: list[int]
    log: Path
    begun: float

    def wait(self) -> list[int]:
        """Exit statuses. Where one process has failed, the others get SIGTERM and half a minute, as from torchrun; one
        that hangs is killed and has 999.
        """
        statuses: dict[int, int] = {}
        failed_at = None
        while len(statuses) < len(self.pids):
            for pid in self.pids:
                if pid in statuses:
                    continue
                done, status = os.waitpid(pid, os.WNOHANG)
                now = time.monotonic()
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                    if statuses[pid] and failed_at is None:
                        failed_at = now
                        for other in self.pids:
                            if other not in statuses:
                                os.kill(other, signal.SIGTERM)
                elif now - self.begun > PATIENCE or (failed_at is not None and now - failed_at > GRACE):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    statuses[pid] = 999
            time.sleep(0.005)
        return [statuses[pid] for pid in self.pids]

    def send(self, number: int, which: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[which], number)


def arguments(preset: str, out: Path) -> list[str]:
    return ["train", "--preset", preset, "--data", "builtin", "--out", str(out), "--set", *SETTINGS]


def start(preset: str, out: Path, processes: int, before: Callable[[], None] = lambda: None) -> Leg:
    """Forks the processes of a training; `before` runs in each of them first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    log = out.with_suffix(".log")
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _train(preset, out, log, rank, processes, port, before)
        pids.append(pid)
    return Leg(pids, log, time.monotonic())


def _train(preset: str, out: Path, log: Path, rank: int, processes: int, port: str, before: Callable[[], None]) -> None:
    status = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if processes > 1:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        before()
        try:
            cli.main(arguments(preset, out))
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# Faults. Each is given the random numbers of its own and returns once the processes have ended.


def kill(preset: str, out: Path, processes: int, draw: random.Random, seconds: float) -> list[int]:
    """SIGKILL of one process, or of all."""
    leg = start(preset, out, processes)
    time.sleep(draw.uniform(0, 1.1 * seconds))
    for which in range(processes) if draw.random() < 0.3 else [draw.randrange(processes)]:
        leg.send(signal.SIGKILL, which)
    return leg.wait()


def kill_in_a_save(preset: str, out: Path, processes: int, draw: random.Random, seconds: float) -> list[int]:
    """SIGKILL of the first process as soon as an unfinished checkpoint is there."""
    leg, after = start(preset, out, processes), draw.randrange(0, DURATION, INTERVAL)
    folder = out / "checkpoints"
    while leg_lives(leg) and time.monotonic() - leg.begun < PATIENCE:
        names = os.listdir(folder) if folder.is_dir() else []
        if any(name.endswith(".tmp") and int(name[1:10]) > after for name in names):
            break
    leg.send(signal.SIGKILL, 0)
    return leg.wait()


def leg_lives(leg: Leg) -> bool:
    return os.waitid(os.P_PID, leg.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def terminate(preset: str, out: Path, processes: int, draw: random.Random, seconds: float) -> list[int]:
    """SIGTERM to one process, as a scheduler's notice; the run saves and ends."""
    leg = start(preset, out, processes)
    time.sleep(draw.uniform(0, 1.1 * seconds))
    leg.send(draw.choice((signal.SIGTERM, signal.SIGINT)), draw.randrange(processes))
    return leg.wait()


def terminate_twice(preset: str, out: Path, processes: int, draw: random.Random, seconds: float) -> list[int]:
    """A second SIGTERM soon after the first one: no time is left to save."""
    leg = start(preset, out, processes)
    time.sleep(draw.uniform(0, 1.1 * seconds))
    for _ in range(2):
        for which in range(processes):
            leg.send(signal.SIGTERM, which)
        time.sleep(draw.uniform(0, 0.05))
    return leg.wait()


def interrupt_at_start(preset: str, out: Path, processes: int, draw: random.Random, seconds: float) -> list[int]:
    """Ctrl-C while Python still starts and imports, of the command as it is typed."""
    log = out.with_suffix(".log")
    with log.open("a") as file:
        command = [sys.executable, "-m", "attnorm", *arguments(preset, out)]
        process = subprocess.Popen(command, stdout=file, stderr=file)
        time.sleep(draw.uniform(0.2, 4.0))
        process.send_signal(signal.SIGINT)
        return [process.wait(PATIENCE)]


def no_room(preset: str, out: Path, processes: int, draw: random.Random, seconds: float) -> list[int]:
    """Writing fails beyond a random size of a file: a disk that is full in the middle of a checkpoint."""
    size = draw.randrange(1_000, 400_000)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return start(preset, out, processes, before=limit).wait()


def tear(preset: str, out: Path, processes: int, draw: random.Random, seconds: float) -> list[int]:
    """A kill, and the newest checkpoint loses its end, as on a disk that had not written it yet."""
    statuses = kill(preset, out, processes, draw, seconds)
    if files := RunDirectory(out).checkpoints():
        with files[-1].open("r+b") as file:
            file.truncate(draw.randrange(files[-1].stat().st_size))
    return statuses


def flip(preset: str, out: Path, processes: int, draw: random.Random, seconds: float) -> list[int]:
    """A kill, and one bit of the newest checkpoint is another one: half of the time in its header."""
    statuses = kill(preset, out, processes, draw, seconds)
    if files := RunDirectory(out).checkpoints():
        content = bytearray(files[-1].read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        place = draw.randrange(header) if draw.random() < 0.5 else draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        files[-1].write_bytes(content)
    return statuses


def jump(preset: str, out: Path, processes: int, draw: random.Random, seconds: float) -> list[int]:
    """The clock is set by up to a year, forth or back, before the run and again with a kill within it."""
    offset = draw.uniform(-3e7, 3e7)

    def another_clock() -> None:
        real = time.time
        time.time = lambda: real() + offset

    leg = start(preset, out, processes, before=another_clock)
    time.sleep(draw.uniform(0, 1.1 * seconds))
    leg.send(signal.SIGKILL, draw.randrange(processes))
    statuses = leg.wait()
    for file in out.rglob("*"):
        moment = time.time() + draw.uniform(-3e7, 3e7)
        os.utime(file, (moment, moment))
    return statuses


FAULTS: dict[str, Callable[[str, Path, int, random.Random, float], list[int]]] = {
    "SIGKILL": kill,
    "SIGKILL in a save": kill_in_a_save,
    "SIGTERM or Ctrl-C": terminate,
    "SIGTERM twice": terminate_twice,
    "Ctrl-C at start": interrupt_at_start,
    "full disk": no_room,
    "torn write": tear,
    "flipped bit": flip,
    "clock jump": jump,
}


@dataclass
class Undisturbed:
    tensors: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]
    seconds: float


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The log without what no two runs share: times."""
    rows = read_lines(RunDirectory(out).metrics_file)
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def undisturbed(preset: str, processes: int, folder: Path) -> Undisturbed:
    out = folder / f"undisturbed-{preset}-{processes}"
    shutil.rmtree(out, ignore_errors=True)
    leg = start(preset, out, processes)
    statuses = leg.wait()
    if any(statuses):
        raise SystemExit(f"the undisturbed run itself fails with {statuses}: {leg.log.read_text()}")
    return Undisturbed(load_file(last_of(out)), rows_of(out), time.monotonic() - leg.begun)


def last_of(out: Path) -> Path:
    return RunDirectory(out).checkpoint_file(DURATION)


def whole_checkpoints(out: Path) -> list[int]:
    """Images seen of those that are whole: of the fault's making, others are there too."""
    run = RunDirectory(out)
    return [int(file.stem) for file in run.checkpoints() if not find_damage(file)] if run.exists() else []


def try_fault(number: int, seed: int, counts: list[int], folder: Path, known: dict[Any, Undisturbed]) -> dict[str, Any]:
    """What the fault of this number does; "wrong" says in words what is not as it must be."""
    draw = random.Random(seed * 1_000_003 + number)
    kind = list(FAULTS)[number % len(FAULTS)]
    preset, processes = draw.choice(PRESETS), draw.choice(counts)
    if kind == "Ctrl-C at start":
        processes = 1
    if (preset, processes) not in known:
        known[preset, processes] = undisturbed(preset, processes, folder)
    right = known[preset, processes]
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    out.with_suffix(".log").unlink(missing_ok=True)

    kinds, statuses, wrong = [kind], [], []
    if draw.random() < 0.3:
        kinds.append(draw.choice([name for name in FAULTS if name != "Ctrl-C at start"]))
    for each in kinds:
        had = max(whole_checkpoints(out), default=0)
        statuses.append(FAULTS[each](preset, out, processes, draw, right.seconds))
        if 999 in statuses[-1]:
            wrong.append(f"{each}: a process hangs")
        if each not in ("torn write", "flipped bit") and max(whole_checkpoints(out), default=0) < had:
            wrong.append(f"{each}: the newest whole checkpoint is gone")
    left = max(whole_checkpoints(out), default=0)
    begun = time.monotonic()
    ending = start(preset, out, processes)
    statuses.append(ending.wait())
    said = ending.log.read_text(errors="replace")
    if any(statuses[-1]):
        wrong.append(f"the undisturbed end has status {statuses[-1]}")
    if "Traceback" in said:
        wrong.append("a traceback is shown")
    if last_of(out).is_file():
        ours = load_file(last_of(out))
        differing = [
            name for name in right.tensors if not torch.equal(ours.get(name, torch.empty(0)), right.tensors[name])
        ]
        if differing or ours.keys() != right.tensors.keys():
            wrong.append(f"{len(differing)} tensors differ, for example {differing[:1]}")
        if rows_of(out) != right.rows:
            wrong.append("the log is another one")
    else:
        wrong.append("there is no last checkpoint")
    if wrong:
        write_text(folder / f"fault-{number}.log", said)
    return {
        "number": number,
        "kinds": kinds,
        "preset": preset,
        "processes": processes,
        "statuses": statuses,
        "resumed_at": left,
        "seconds_to_the_end": round(time.monotonic() - begun, 2),
        "wrong": wrong,
    }


def summary(rows: list[dict[str, Any]], seed: int) -> str:
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in rows:
        for kind in row["kinds"]:
            counts[kind][0] += 1
            counts[kind][1] += row["processes"] > 1
            counts[kind][2] += bool(row["wrong"])
    lines = [
        "# Faults in training",
        "",
        f"`python scripts/campaign.py --out campaign --faults {len(rows)} --seed {seed}`: the presets "
        f"{' and '.join(PRESETS)}, {DURATION} images, a checkpoint every {INTERVAL}; one thread a process. After its "
        "fault (three runs of ten get a second one) the same command is given again, and must end with the weights and "
        "the log of the undisturbed run, bit for bit, without a traceback, a process that hangs, or a whole checkpoint "
        "lost.",
        "",
        f"{len(rows)} runs, {sum(len(row['kinds']) for row in rows)} faults; "
        f"{sum(bool(row['wrong']) for row in rows)} ended otherwise than they must. Commit {commit() or 'unknown'}, "
        f"{processor()}, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}.",
        "",
        "| fault | times | in several processes | ended otherwise |",
        "|---|---|---|---|",
        *(f"| {kind} | {times} | {several} | {bad} |" for kind, (times, several, bad) in counts.items()),
        "",
    ]
    wrong = [row for row in rows if row["wrong"]]
    if wrong:
        lines += ["Those that ended otherwise:", ""]
        lines += [f"- number {row['number']} ({', '.join(row['kinds'])}): {'; '.join(row['wrong'])}" for row in wrong]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--faults", type=int, default=1_000, help="runs with a fault, of which some have two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--summary", type=Path, help="where the summary is written")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    builtin.builtin_views = functools.cache(builtin.builtin_views)  # made once, for all that are forked
    for size in (32, 40):
        builtin.builtin_views(size)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "faults.jsonl"
    known: dict[Any, Undisturbed] = {}
    for number in range(len(read_lines(file)), given.faults):
        row = try_fault(number, given.seed, given.processes, given.out, known)
        append_lines(file, [row])
        print(f"{number}: {', '.join(row['kinds'])}; {row['wrong'] or 'as it must'}", flush=True)
    rows = read_lines(file)
    if given.summary:
        write_text(given.summary, summary(rows, given.seed))
    raise SystemExit(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    main()
