"""One command from a config to a trained adapter: measure, train, trace, measure again, report.

    distill → open_session → measure_before → follow → finish → report

A run that the folder holds is taken up by itself. All numbers that the report needs lie in the
folder, so the report of an interrupted run can be written too (`opdlab report`).
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from opdlab import viz
from opdlab.commands import report
from opdlab.commands.flags import DEFAULT_FOLDER, Given
from opdlab.commands.output import Output
from opdlab.commands.run_files import Measured, RunFiles
from opdlab.data.column import Column
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.trace import Trace
from opdlab.diagnose.health import Health, health
from opdlab.engine.recording import rollout_from_trace
from opdlab.errors import InvalidValue, TokenizerMismatch, printable
from opdlab.methods.contract import name_of
from opdlab.models.policy import Policy, as_policy
from opdlab.models.protocols import Grader
from opdlab.models.same_tokens import check_same_tokens
from opdlab.support.expect import shortened
from opdlab.teachers import LogprobServer, MultiTeacher, TextOnly, TextServer
from opdlab.training import trackers
from opdlab.training.config import Config, write_toml
from opdlab.training.configured import Parts, load_parts, prepare_run
from opdlab.training.evaluation import Evaluation, evaluate
from opdlab.training.resolution import grader_names
from opdlab.training.run import Run
from opdlab.training.scoring import score
from opdlab.training.step import Step
from opdlab.viz import View, embed

SAVE_EVERY = 10  # steps between two checkpoints where the config does not say
PROBE_SEED = 1  # of the prompts and texts of traces


@dataclass(eq=False)
class Session:
    """A run that a terminal follows.

    Attributes:
        run: The run.
        config: Its config.
        files: The places of its files.
        output: Where to print.
        measured: What was measured so far.
        watch: The watch over its health.
        probes: The held-out prompts of the traces.
        next_board: The time of the next state of the board's page, as `time.monotonic`.
    """

    run: Run
    config: Config
    files: RunFiles
    output: Output
    measured: Measured
    watch: Health
    probes: list[Prompt]
    next_board: float = 0.0


def distill(
    given: Given, output: Output, *, fresh: bool = False, accept_changes: bool = False
) -> None:
    """Train the student of a config, and report.

    Args:
        given: The config, and functions of the user's own.
        output: Where to print; its `result` becomes the report.
        fresh: Whether to begin a new run in a folder of its own.
        accept_changes: Whether to go on with a run although its parts or settings are others now.

    Raises:
        OpdlabError: Something does not fit. Nothing was computed then.
        SystemExit: The run was interrupted. It can be taken up.
    """
    config = _with_defaults(given, fresh)
    output.say(f"opdlab distill: {config.run.folder}")
    parts = load_parts(config, given.method, given.verify)
    run = prepare_run(config, parts, accept_changes=accept_changes)
    session = _open_session(run, parts, config, output)
    if not run.accelerator.is_main_process:  # the others only train, and send their traces
        for step in run:
            _trace_of_update(session, step)
        return
    try:
        with _stopping_on_term():
            measure_before(session, parts)
            follow(session)
            finish(session)
    except KeyboardInterrupt:
        run.progress.close()
        _stop(session)
    output.result = report.write_report(session.files.folder)
    report.print_report(output.console, output.result)
    run.accelerator.end_training()


def _with_defaults(given: Given, fresh: bool) -> Config:
    """The config with a folder and with checkpoints."""
    config = given.config
    if config.settings.get("trace_k") and not config.run.trace_every:
        raise InvalidValue(
            f"distill got settings.trace_k={shortened(config.settings['trace_k'])}, which would"
            " change nothing: top tokens are kept in the traces of steps, and run.trace_every is 0."
            " Give it too, as --set run.trace_every=20."
        )
    folder = Path(config.run.folder or Path(DEFAULT_FOLDER, given.name).absolute())
    if fresh:
        folder = next(path for path in _names(folder) if _is_free(path))
    return replace(
        config,
        run=replace(config.run, folder=str(folder)),
        settings={"save_every": SAVE_EVERY, **config.settings},
    )


def _is_free(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


def _names(folder: Path) -> Iterator[Path]:
    """The folder's own name, then the same with 2, 3, … behind it."""
    yield folder
    number = 2
    while True:
        yield folder.with_name(f"{folder.name}-{number}")
        number += 1


def _open_session(run: Run, parts: Parts, config: Config, output: Output) -> Session:
    """Gather what a run is followed with, say where it stands, and write its config down."""
    assert config.run.folder is not None
    files = RunFiles(Path(config.run.folder))
    measured = files.read_measured() if run.done else Measured()
    watch = health(run)
    known = [alarm for alarm in measured.alarms if alarm.step <= run.done]
    watch.alarms = known or watch.alarms  # those of the steps themselves know more than the history
    steps = run.settings.steps
    if run.done >= steps:
        output.say(
            f"the run has done all its {steps} steps. To train on, give more (--set"
            f" settings.steps={2 * steps}); --fresh begins a new run."
        )
    elif run.done:
        output.say(f"resuming after step {run.done} of {steps}")
    probes = parts.task.prompts(config.run.trace_prompts, seed=PROBE_SEED, split="test")
    if run.accelerator.is_main_process:
        embed.write(files.config, write_toml(config))
    return Session(run, config, files, output, measured, watch, probes)


@contextmanager
def _stopping_on_term() -> Iterator[None]:
    """Let SIGTERM stop a run as Ctrl-C does, so that a scheduler's notice loses no step."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure_before(session: Session, parts: Parts) -> None:
    """Evaluate the student and the teacher, and trace the student, before the first step.

    What an earlier part of the run measured is kept.

    Args:
        session: The session.
        parts: The models and the task.
    """
    run, evaluations = session.run, session.measured.evaluations
    start = _start_of(run)
    if start is not None and not _is_known(session, "before"):
        _evaluate(session, "before", start, "student")
    if start is not None and 0 not in session.files.traces():
        _trace(session, 0, start)
    is_server = _asks_servers(parts.teacher)
    asks = session.config.run.eval_teacher
    wanted = not is_server if asks is None else asks
    if parts.teacher is not None and wanted and not _is_known(session, "teacher"):
        _evaluate(session, "teacher", _as_writer(parts.teacher, run.student), "teacher")
    said = [f"{role} {one.accuracy:.2f}" for role, one in evaluations.items() if role != "after"]
    if said:
        session.output.say(
            f"{run.task.name}: {', '.join(said)} of {_prompts(evaluations)} held-out prompts"
            f" right; distilling with {name_of(run.method)} …"
        )


def _asks_servers(teacher: Any) -> bool:
    """Tell whether a teacher's texts cost money, or have no single author."""
    if isinstance(teacher, MultiTeacher):
        is_mixed = isinstance(teacher.route, Mapping)
        return is_mixed or any(map(_asks_servers, teacher.members.values()))
    return isinstance(teacher, (LogprobServer, TextServer))


def _start_of(run: Run) -> Policy | None:
    """The student before training, where it can still be had."""
    if run.done == 0:
        return run.student
    is_bare = run.identity["student"]["adapter"] is None and run.student.adapter is not None
    return run.student.without_adapter() if is_bare else None


def _is_known(session: Session, role: str) -> bool:
    known, asked = session.measured.evaluations.get(role), session.config.run
    if not asked.eval_prompts or session.run.task.verify is None:
        return True
    return (
        known is not None
        and known.requested == asked.eval_prompts
        and known.sampled.shape[1] == asked.eval_samples
    )


def _evaluate(session: Session, role: str, policy: Any, name: str) -> None:
    """Evaluate a policy on the held-out prompts, and keep the result."""
    began, asked = time.perf_counter(), session.config.run
    session.measured.evaluations[role] = evaluate(
        policy,
        session.run.task,
        n=asked.eval_prompts,
        k=asked.eval_samples,
        name=name,
        quiet=False,
    )
    _add_cost(session, "evaluating_s", time.perf_counter() - began)
    session.files.write_measured(session.measured)


def _add_cost(session: Session, name: str, seconds: float) -> None:
    costs = session.measured.costs
    costs[name] = costs.get(name, 0.0) + seconds
    # ru_maxrss counts kibibytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    costs["peak_memory_gib"] = max(costs.get("peak_memory_gib", 0.0), peak)
    if torch.cuda.is_available():
        on_gpu = torch.cuda.max_memory_allocated() / 2**30
        costs["peak_gpu_memory_gib"] = max(costs.get("peak_gpu_memory_gib", 0.0), on_gpu)


def _prompts(evaluations: dict[str, Evaluation]) -> int:
    return max(one.prompts for one in evaluations.values())


def _as_writer(teacher: Any, student: Policy) -> Any:
    """The teacher as something to evaluate: a local one with other tokens writes texts."""
    local = as_policy(teacher)
    return TextOnly(local) if local is not None and not _shares_tokens(student, local) else teacher


def _shares_tokens(student: Policy, teacher: Policy) -> bool:
    try:
        check_same_tokens(student, teacher)
    except TokenizerMismatch:
        return False
    return True


def follow(session: Session) -> None:
    """Train all remaining steps, with the page of the board and the traces following.

    Args:
        session: The session.
    """
    every = session.config.run.trace_every
    _draw_board(session)
    for step in session.run:
        for alarm in session.watch(step):
            session.measured.alarms.append(alarm)
            print(printable(f"! {alarm}"), file=sys.stderr)
        update = _trace_of_update(session, step)
        if update is not None:
            update.save(session.files.update(step.number))
        if every and step.number % every == 0:
            _trace(session, step.number, session.run.student)
        if time.monotonic() >= session.next_board:
            _draw_board(session)


def _trace_of_update(session: Session, step: Step) -> Trace | None:
    """The step's own texts, losses and top tokens where they are kept; in every process."""
    every = session.config.run.trace_every
    is_kept = every and step.number % every == 0 and session.run.settings.trace_k
    return step.gather_trace() if is_kept else None


def _draw_board(session: Session, refreshes: bool = True) -> None:
    """Write the page of the run board; for at most a twentieth of the time."""
    began = time.monotonic()
    run = session.run
    seconds = session.config.run.refresh if refreshes else 0.0
    board: View = viz.RunBoard(run, watch=session.watch)
    state = "" if refreshes else "This run is not training now. "
    viz.page(
        session.files.board,
        title=f"{session.files.folder.name}: step {run.done} of {run.settings.steps}",
        lenses=[("", board)],
        note=f"{state}{name_of(run.method)} on {run.task.name}, in {session.files.folder.name}",
        refresh=seconds,
    )
    took = time.monotonic() - began
    session.next_board = time.monotonic() + max(session.config.run.refresh, 20 * took)


def _trace(session: Session, step: int, policy: Policy) -> None:
    """Let the student answer the probe prompts, and keep the graded texts."""
    run, began = session.run, time.perf_counter()
    room = run.settings.max_new_tokens
    turns = run.task.sample_options
    rollout = policy.sample(session.probes, max_new_tokens=room, seed=PROBE_SEED, **turns)
    trace = _grade(session, rollout, policy)
    trace.save(session.files.trace(step))
    trackers.show_strips(run.accelerator, _strips(trace), step)
    _add_cost(session, "tracing_s", time.perf_counter() - began)
    session.files.write_measured(session.measured)


def _grade(session: Session, rollout: Rollout, policy: Policy) -> Trace:
    """Grade texts by the student, by the policies of the method, and by the teacher if it can."""
    run = session.run
    graders = {name: run.policies[name] for name in grader_names(run.policies) if name != "student"}
    local = as_policy(run.teacher)
    can_grade = isinstance(run.teacher, Grader) if local is None else _shares_tokens(policy, local)
    if run.teacher is not None and can_grade:
        graders.setdefault("teacher", run.teacher)
    trace = score(rollout, policy, **graders)
    if run.task.verify is None:
        return trace
    rewards = run.task.scores(rollout.prompts, rollout.texts)
    reward = [rewards[sample] for sample in trace.column("sample").tolist()]
    return trace.with_columns(reward=Column(reward, "the verifier's score of the completion"))


def _strips(trace: Trace) -> list[trackers.Strip]:
    """The graded texts as trackers show them."""
    strips = []
    for sample in range(len(trace.meta["texts"])):
        lens = viz.TokenLens(trace, sample)
        strips.append(
            trackers.Strip(
                f"text {sample + 1}",
                str(trace.meta["prompts"][sample]),
                str(trace.meta["texts"][sample]),
                lens,
            )
        )
    return strips


def finish(session: Session) -> None:
    """Evaluate and trace the trained student, and keep its adapter.

    Args:
        session: The session.
    """
    run, files = session.run, session.files
    name = f"student after {run.done} steps"
    known = session.measured.evaluations.get("after")
    if not (_is_known(session, "after") and (known is None or known.name == name)):
        _evaluate(session, "after", run.student, name)
    if run.done not in files.traces():
        _trace(session, run.done, run.student)
    first = files.traces().get(0)
    if first is not None:
        again = rollout_from_trace(Trace.load(first), session.probes)
        _grade(session, again, run.student).save(files.before_again)
    if run.student.adapter is not None and run.accelerator.is_main_process:
        run.save_adapter(files.adapter, evaluations=session.measured.evaluations)
    _draw_board(session, refreshes=False)
    files.write_measured(session.measured)


def _stop(session: Session) -> NoReturn:
    """Save the run where it is, and say how to go on."""
    run, steps = session.run, session.run.settings.steps
    session.files.write_measured(session.measured)
    _draw_board(session, refreshes=False)
    if not run.done:
        sys.exit("opdlab: stopped before the first step; the same command begins again")
    if run.done < steps or session.files.checkpoint() is None:
        run.save()
    sys.exit(
        f"opdlab: stopped after step {run.done} of {steps}, which is saved. The same command goes"
        f" on from there; opdlab report {session.files.folder} shows what was learned so far."
    )
