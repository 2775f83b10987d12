"""Kill trainings and take them up again; run by `test_crashes.py` as a program of its own.

A laboratory imports everything once and forks a child for every training, so that dozens of them
can be killed in little time. Each child trains the market's student with a moving average,
snapshots, evaluations and a checkpoint per step, and writes the trace of every step.

    python crash_lab.py FOLDER KILLS      prints one JSON object
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import opdlab as opd
from opdlab import errors
from opdlab.training import checkpoint, optimizer_files, phases, saving
from opdlab.training import run as run_module

STEPS = 4
TIMED = ("seconds", "generate_s", "grade_s", "learn_s")
SETTINGS = {
    "batch": 2,
    "n": 2,
    "steps": STEPS,
    "max_new_tokens": 8,
    "seed": 5,
    "lr": 1e-3,
    "save_every": 1,
    "snapshot_every": 2,
    "evaluate_every": 2,
    "quiet": True,
}
# Where a step can be met: a module, and the function that is called there.
PHASES: dict[str, tuple[Any, str]] = {
    "write": (run_module, "write_rollout"),
    "grade and plan": (run_module, "plan_step"),
    "backward": (run_module, "accumulate_gradient"),
    "reduce": (phases, "reduce_gradients"),
    "measure": (run_module, "measure_step"),
    "update": (run_module, "update_weights"),
    "snapshot": (saving, "keep_snapshot"),
    "save the weights": (checkpoint, "_write_weights"),
    "save the optimizer": (optimizer_files, "_write_whole"),
    "save the snapshots": (checkpoint, "_write_snapshots"),
    "save the manifest": (checkpoint, "_checksums_of"),
    "flush": (checkpoint, "_flush_files"),
    "evaluate": (run_module, "evaluate"),
    "add the evaluation": (checkpoint, "_replace_file"),
}


# Of every phase, the first and the third call, before and after; these in the short form.
FEW = [
    ("backward", 3, False),
    ("update", 1, True),
    ("flush", 3, False),
    ("save the manifest", 1, True),
    ("evaluate", 1, False),
]


def loss(rows: Any) -> torch.Tensor:
    """Reverse KL to the teacher and, less, to the student's moving average."""
    student = rows.student
    to_teacher = (student.exp() * (student - rows.teacher)).sum(-1)
    return to_teacher + 0.1 * (student.exp() * (student - rows.ema)).sum(-1)


class Lab:
    """The models and the task, loaded once and copied by every fork."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.student, self.teacher, _ = opd.load("market")
        whole = opd.tasks.market()
        records = [
            {"prompt": prompt.messages[-1]["content"], "answer": prompt.answer}
            for prompt in whole.prompts(12)
        ]
        self.task = opd.tasks.from_records(records, test=4, max_new_tokens=8)

    def train(self, folder: Path) -> None:
        """Begin a run in a folder or take it up, and write the trace of each step."""
        given = {"method": loss, "needs": ("teacher", "ema")}
        if list((folder / "run").glob("step-*")):
            given = {"method": opd.methods.contract.FunctionMethod(loss, needs=given["needs"])}
            run = opd.resume(
                folder / "run",
                self.student,
                self.teacher,
                self.task,
                quiet=True,
                method=given["method"],
            )
        else:
            run = opd.distill(
                self.student, self.teacher, self.task, save=folder / "run", **given, **SETTINGS
            )
        for step in run:
            step.trace().save(folder / "traces" / f"{step.number}.parquet")

    def fork(self, act: Callable[[], None]) -> int:
        """Do something in a child process; returns its number."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def wait(child: int) -> int:
    """Wait for a child; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(phase: str, occurrence: int, is_after: bool) -> None:
    """Let this process be killed before or after the n-th call of a phase's function."""
    module, name = PHASES[phase]
    whole, calls = getattr(module, name), [0]

    def deadly(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == occurrence and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        done = whole(*args, **options)
        if calls[0] == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(module, name, deadly)


def send_during(child: int, folder: Path, number: int, steps: int, seconds: float) -> None:
    """Send a signal to a child some seconds after it saved so many steps, if it still runs."""
    while len(list((folder / "run").glob("step-*"))) < steps:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.005)
    time.sleep(seconds)
    os.kill(child, number)


def contents(folder: Path) -> dict[str, Any]:
    """All that a run keeps, without the times that it took."""
    final = checkpoint.find_checkpoint(folder / "run")
    said = json.loads((final / "run.json").read_text())
    history = json.loads((final / "history.json").read_text())
    kept = {
        "step": said["step"],
        "history": [{k: v for k, v in row.items() if k not in TIMED} for row in history],
        "snapshots": said["snapshots"],
        "steps": sorted(path.name for path in (folder / "run").glob("step-*")),
    }
    for name in ("adapter_model", "optimizer", "ema"):
        kept[name] = (final / f"{name}.safetensors").read_bytes()
    for path in sorted((folder / "run" / "snapshots").iterdir()):
        kept[path.name] = path.read_bytes()
    # A kill within a save leaves a hidden partial file beside the trace, never a broken trace.
    for path in sorted((folder / "traces").glob("*.parquet")):
        trace = opd.Trace.load(path)
        kept[f"trace {path.name}"] = (trace.meta, trace.table.to_pydict())
    return kept


def left_behind(folder: Path) -> list[str]:
    """Hidden files and folders that no run needs.

    The traces here are the user's own files, outside of the run's folder: a save that is killed
    leaves a partial file there, which no run takes up.
    """
    found = [path for path in folder.rglob(".*") if path.parent != folder / "traces"]
    return sorted(str(path.relative_to(folder)) for path in found)


def differences(folder: Path, right: dict[str, Any]) -> list[str]:
    """What is not as in the uninterrupted run."""
    try:
        found = contents(folder)
    except Exception as error:
        return [repr(error)]
    names = right.keys() | found.keys()
    # The loop writes a step's trace after the run has saved the step, so a kill in between leaves
    # out that one.
    missing = {n for n in right if str(n).startswith("trace ") and n not in found}
    if len(missing) == 1:
        names = names - missing
    return sorted(str(n) for n in names if repr(right.get(n)) != repr(found.get(n)))


def try_kill(
    lab: Lab,
    folder: Path,
    right: dict[str, Any],
    prepare: Callable[[], None],
    signal_after: tuple[int, int, float] | None,
) -> dict[str, Any]:
    """Kill one training, take it up until it ends, and compare."""
    folder.mkdir(parents=True)
    child = lab.fork(lambda: (prepare(), lab.train(folder)))
    if signal_after is not None:
        number, steps, seconds = signal_after
        send_during(child, folder, number, steps, seconds)
    ended = wait(child)
    readable = []
    for path in sorted((folder / "run").glob("step-*")):
        try:
            checkpoint.find_checkpoint(path)
        except errors.OpdlabError as error:
            readable.append(str(error))
    partial = left_behind(folder)
    resumed = wait(lab.fork(lambda: lab.train(folder)))
    return {
        "ended": ended,
        "resumed": resumed,
        "unreadable": readable,
        "left by the killed": partial,
        "left in the end": left_behind(folder),
        "differs": differences(folder, right),
    }


def run_all(root: Path, kills: int) -> dict[str, Any]:
    lab = Lab()
    at = random.Random(kills)
    began = time.monotonic()
    assert wait(lab.fork(lambda: lab.train(root / "whole"))) == 0
    seconds = time.monotonic() - began
    a_step = min(1.0, seconds / STEPS / 2)
    right = contents(root / "whole")
    tries: dict[str, dict[str, Any]] = {}
    for number in range(kills):
        tries[f"random {number}"] = try_kill(
            lab,
            root / f"random{number}",
            right,
            lambda: None,
            (signal.SIGKILL, number % STEPS, at.uniform(0, a_step)),
        )
    every = [(phase, n, after) for phase in PHASES for n in (1, 3) for after in (False, True)]
    chosen = every if kills >= 30 else FEW
    for number, (phase, n, is_after) in enumerate(chosen):
        name = f"{'after' if is_after else 'before'} {phase}, {n}"
        tries[name] = try_kill(
            lab,
            root / f"phase{number}",
            right,
            lambda p=phase, n=n, a=is_after: kill_at(p, n, a),
            None,
        )
    for kind in (signal.SIGTERM, signal.SIGINT):
        for number in range(max(1, kills // 6)):
            name = f"{kind.name} {number}"
            tries[name] = try_kill(
                lab,
                root / name,
                right,
                lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                (kind, 1 + number % (STEPS - 1), at.uniform(0, a_step / 2)),
            )
    return {
        "seconds": seconds,
        "tries": tries,
        "full disk": full_disk(lab, root / "full", right),
        "read-only": read_only(lab, root / "readonly", right),
        "two": two_processes(lab, root / "two", right),
    }


def said_of(lab: Lab, folder: Path, act: Callable[[], Any]) -> str:
    """The error that an act in a child ends with, "" for none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "said.txt"

    def attempt() -> None:
        text = ""
        try:
            act()
        except errors.OpdlabError as error:
            text = str(error)
        path.write_text(text)

    code = wait(lab.fork(attempt))
    return path.read_text() if code == 0 else f"ended with {code}"


def full_disk(lab: Lab, folder: Path, right: dict[str, Any]) -> dict[str, Any]:
    """The system refuses to write files beyond some size, then there is room again."""
    said = folder / "said"

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        whole = checkpoint._write_weights
        calls = [0]

        def limited(*args: Any) -> None:
            calls[0] += 1
            if calls[0] == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
            try:
                whole(*args)
            finally:
                resource.setrlimit(
                    resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                )

        checkpoint._write_weights = limited
        lab.train(folder)

    text = said_of(lab, said, act)
    steps = sorted(path.name for path in (folder / "run").glob("step-*"))
    partial = left_behind(folder)
    resumed = wait(lab.fork(lambda: lab.train(folder)))
    return {
        "said": text,
        "steps": steps,
        "left": partial,
        "resumed": resumed,
        "differs": differences(folder, right),
    }


def read_only(lab: Lab, folder: Path, right: dict[str, Any]) -> dict[str, Any]:
    """The folder may no longer be written to after two steps, then it may again."""
    (folder / "run").mkdir(parents=True)
    (folder / "traces").mkdir()
    for path in (folder, folder / "run", folder / "traces"):
        path.chmod(0o777)
    for path in folder.resolve().parents:  # pytest's folders are private
        if str(path).startswith("/tmp/"):
            path.chmod(path.stat().st_mode | 0o055)

    def act() -> None:
        os.seteuid(65534)  # root may write anywhere
        whole, calls = checkpoint.write_checkpoint, [0]

        def closing(run: Any, where: Path, *rest: Any) -> Path:
            calls[0] += 1
            if calls[0] == 3:
                where.chmod(0o555)
            return whole(run, where, *rest)

        (folder / "run").mkdir(exist_ok=True)
        os.seteuid(0)
        os.chown(folder / "run", 65534, -1)
        os.seteuid(65534)
        checkpoint.write_checkpoint = closing
        try:
            lab.train(folder)
        finally:
            os.seteuid(0)

    if os.geteuid() != 0:
        return {}
    text = said_of(lab, folder / "said", act)
    steps = sorted(path.name for path in (folder / "run").glob("step-*"))
    (folder / "run").chmod(0o777)
    resumed = wait(lab.fork(lambda: lab.train(folder)))
    return {"said": text, "steps": steps, "resumed": resumed, "differs": differences(folder, right)}


def two_processes(lab: Lab, folder: Path, right: dict[str, Any]) -> dict[str, Any]:
    """A second process wants the folder while the first one trains in it, and after it ended."""
    folder.mkdir(parents=True)
    slow = folder / "go on"

    def first() -> None:
        whole = run_module.update_weights

        def waiting(*args: Any) -> Any:
            while not slow.exists():
                time.sleep(0.02)
            return whole(*args)

        run_module.update_weights = waiting
        lab.train(folder)

    child = lab.fork(first)
    while not (folder / "run" / ".lock").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    text = said_of(lab, folder / "said", lambda: lab.train(folder))
    slow.touch()
    ended = wait(child)
    after = said_of(lab, folder / "said", lambda: lab.train(folder))
    return {
        "said": text,
        "process": child,
        "ended": ended,
        "after": after,
        "differs": differences(folder, right),
    }


if __name__ == "__main__":
    print(json.dumps(run_all(Path(sys.argv[1]), int(sys.argv[2]))))
