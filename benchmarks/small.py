"""All methods, and the controls, on a real model: SmolLM2-135M and a teacher trained from it.

    python -m benchmarks.small [--only opd jsd … controls] [--seeds 3] [--show] [--quick]

The world is that of `benchmarks/small_world.py`. Every method makes as many updates on as many
texts. Where a method has the teacher read or write more than plain OPD does, it is also evaluated
at the update at which it has spent as many teacher's tokens as plain OPD in all. Each finished run
is kept in `runs/bench-small/runs`, so the command goes on where it was stopped, and everything so
far is written to `results/small.json`, with what has not run. A run of a method that this file has
for the same world and settings is not made again; remove the file to make all anew. `--show` prints
it. `--quick` makes two updates a run, with one seed, in a folder of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import opdlab as opd
from benchmarks import small_world
from benchmarks.controls import describe_gain
from benchmarks.run import about_machine
from benchmarks.small_world import World
from opdlab.data.notes import Chunks, Windows, read_note
from opdlab.engine.needs import Access, parse_needs
from opdlab.evidence.rules import TopTokens
from opdlab.methods.contract import student_share, writer_names
from opdlab.models.fingerprints import digest
from opdlab.support.files import write_file

RESULTS = Path(__file__).parent / "results" / "small.json"
CONTROLS = "controls"
PLAIN = "opd"  # the method whose teacher's tokens are the budget of all


@dataclass(frozen=True)
class Scale:
    """Say how large the runs are."""

    steps: int = 24
    batch: int = 8
    prompts: int = small_world.TEST
    samples: int = 1
    settings: Mapping[str, Any] = field(
        default_factory=lambda: {"lr": 2e-3, "schedule": "cosine", "lora": 8}
    )

    @property
    def of_controls(self) -> dict[str, Any]:
        evaluation = {"prompts": self.prompts, "samples": self.samples}
        return {"steps": self.steps, "batch": self.batch, **evaluation, **self.settings}

    def score(self, policy: Any, task: Any) -> dict[str, list[float]]:
        """Return the scores of the held-out prompts: greedy, and the mean over samples."""
        found = opd.evaluate(policy, task, n=self.prompts, k=self.samples, quiet=True)
        return {
            "greedy": [float(score) for score in found.greedy],
            "sampled": [float(score) for score in found.sampled.mean(1)],
        }


QUICK = Scale(steps=2, batch=4, prompts=8)


@dataclass(frozen=True)
class Entry:
    """A method of the comparison.

    Attributes:
        label: What it is called in tables.
        method: The method.
        teacher: "plain"; "hinted" reads each prompt's hint; "none".
        samples: Completions of each prompt; the number of texts of an update is the same for all.
        arm: The arm of the controls that is the same run, which is then not made twice.
        rate: A factor of the learning rate.
    """

    label: str
    method: Any
    teacher: str = "plain"
    samples: int = 1
    arm: str = ""
    rate: float = 1.0


OMNI = opd.OmniOPD(chunks=2, continuations=4, length=1, match_length=True)
# In order of importance. Windows and chunks are short, since the answers have four tokens.
ENTRIES: dict[str, Entry] = {
    PLAIN: Entry("OPD, reverse KL", opd.OPD(), arm="teacher"),
    "forward_kl": Entry("OPD, forward KL", opd.OPD("forward_kl"), arm="other_direction"),
    "jsd": Entry("OPD, Jensen-Shannon", opd.OPD("jensen_shannon")),
    "sequence_kd": Entry("sequence KD", opd.SequenceKD(), arm="teacher_texts"),
    "sft": Entry("SFT on the answers", opd.SFT(), "none"),
    "opd_plus": Entry("OPD+, Jensen-Shannon", opd.OPDPlus("jensen_shannon")),
    "topd": Entry("TOPD, windows of 2", opd.TOPD(window=2, share=0.25)),
    "omniopd": Entry("OmniOPD, 2 chunks of 1, 4 texts each", OMNI),
    "opsa": Entry("OPSA, no teacher", opd.OPSA(), "none", arm="no_teacher_adaptive"),
    # At OPD's rate the penalty destroys the student.
    "opsa_slow": Entry(
        "fixed penalty, no teacher, a tenth of the rate", opd.OPSA(adaptive=False), "none", rate=0.1
    ),
    "opd_slow": Entry("OPD, reverse KL, a tenth of the rate", opd.OPD(), rate=0.1),
    "grpo": Entry("GRPO, 4 samples a prompt", opd.GRPO(), "none", samples=4),
    "privileged": Entry("OPD, the teacher told the sum", opd.OPD(), "hinted"),
    "dopd": Entry("DOPD", opd.DOPD()),
    "self_distillation": Entry(
        "self-distillation, told the sum", opd.SelfDistillation.opsd(), "none"
    ),
    "gopd": Entry("G-OPD, 1.25", opd.GOPD()),
    "sampled": Entry("OPD, sampled tokens", opd.OPD(estimator="sampled")),
    "top_tokens": Entry("OPD on the 20 % of highest entropy", TopTokens("entropy", 0.2)),
    "eopd": Entry("EOPD", opd.EOPD()),
    "soda": Entry("SODA", opd.SODA()),
}
ARMS = [
    "no_teacher_adaptive",
    "other_direction",
    "teacher_texts",
    "shuffled",
    "own_texts",
    "no_teacher",
    "sign",
]


def count_teacher(step: Any, method: Any, policy: Any) -> dict[str, int]:
    """Count the tokens that the teacher read to grade and wrote in a step.

    Args:
        step: A step of a run.
        method: Its method.
        policy: Its tokenizer counts the texts of a teacher that writes.

    Returns:
        `graded` and `written`, in tokens.
    """
    tokens = int(step.metrics["tokens"])
    needs = [need for need in parse_needs(method.needs) if need.policy == "teacher"]
    is_graded = any(need.access is Access.LOGITS for need in needs)
    written = 0
    if student_share(method) == 0 and "teacher" in writer_names(method):
        by_teacher = [writer == "teacher" for writer in step.rollout.writer]
        written = int(step.rollout.learn[torch.tensor(by_teacher)].sum())
    for stored in step.notes.values():
        note = read_note(stored, Windows) or read_note(stored, Chunks)
        if isinstance(note, Windows):
            written += sum(len(pair["teacher"]) for pair in note.windows)
        elif isinstance(note, Chunks):
            texts = [text for chunk in note.chunks for text in chunk["continuations"]]
            written += sum(len(policy.tokenizer.encode(text)) for text in texts)
    return {"graded": tokens * is_graded, "written": written}


def run_one(
    world: World, name: str, seed: int, scale: Scale, folder: Path, budget: float | None
) -> dict[str, Any]:
    """Train one method with one seed and evaluate it, or load what was kept.

    Args:
        world: Student, teacher and task.
        name: A name of `ENTRIES`.
        seed: The seed.
        scale: The size of the run.
        folder: Keeps the finished run.
        budget: Tokens of the teacher that plain OPD took, if they are known.

    Returns:
        Scores of the held-out prompts, tokens of the teacher, and CPU seconds.

    Raises:
        SystemExit: The folder has the run of another world, method or scale.
    """
    entry, student = ENTRIES[name], world.student.frozen()
    teacher = {"plain": world.teacher, "hinted": world.teacher.seeing(), "none": None}
    run = opd.distill(
        student,
        teacher[entry.teacher],
        world.task,
        method=entry.method,
        steps=scale.steps,
        batch=scale.batch // entry.samples,
        seed=seed,
        quiet=True,
        **({"n": entry.samples} if entry.samples > 1 else {}),
        **{**scale.settings, "lr": scale.settings["lr"] * entry.rate},
    )
    try:
        identity = digest(json.dumps([run.identity, asdict(run.settings), asdict(scale)]))
        file = folder / "runs" / f"{name}-{seed}.json"
        if file.exists():
            return read_kept(file, identity)
        done = train(run, world, scale, budget)
        write_file(file, json.dumps({"identity": identity, **done}).encode())
    finally:
        student.weights.delete_adapter(student.adapter)
    return done


def read_kept(file: Path, identity: str) -> dict[str, Any]:
    """Read a run that was kept."""
    kept: dict[str, Any] = json.loads(file.read_text())
    if kept.pop("identity") != identity:
        raise SystemExit(
            f"{file} is of another world, method or scale. Remove it, or use another --folder."
        )
    return kept


def train(run: Any, world: World, scale: Scale, budget: float | None) -> dict[str, Any]:
    """Train, and evaluate at the end and where the budget of teacher's tokens is spent."""
    began = time.process_time()
    evaluating = 0.0
    spent = {"graded": 0, "written": 0}
    at_budget: dict[str, Any] | None = None
    for step in run:
        for kind, tokens in count_teacher(step, run.method, run.student).items():
            spent[kind] += tokens
        is_last = run.done == scale.steps
        if budget and at_budget is None and sum(spent.values()) >= budget and not is_last:
            since = time.process_time()
            at_budget = {"updates": run.done, **scale.score(run.student, world.task)}
            evaluating += time.process_time() - since
    seconds = time.process_time() - began - evaluating
    return {
        **scale.score(run.student, world.task),
        "updates": run.done,
        "teacher": spent,
        "texts": scale.steps * scale.batch,
        "cpu_seconds": round(seconds, 1),
        "at_budget": at_budget,
    }


def from_controls(controls: opd.Controls, name: str, scale: Scale) -> dict[str, Any]:
    """Take the runs of a method that an arm of the controls is, by seed."""
    entry = ENTRIES[name]
    if entry.arm not in controls.arms:
        return {}
    arm = controls.arms[entry.arm]
    writes = student_share(entry.method) == 0
    out = {}
    for i, seed in enumerate(arm.seeds):
        tokens = 0 if entry.teacher == "none" else int(arm.tokens[i])
        out[str(seed)] = {
            "greedy": arm.greedy[i].tolist(),
            "sampled": arm.sampled[i].tolist(),
            "updates": scale.steps,
            "teacher": {"graded": 0 if writes else tokens, "written": tokens if writes else 0},
            "texts": scale.steps * scale.batch,
            "cpu_seconds": None,  # the controls note wall seconds
            "at_budget": None,
        }
    return out


def run_controls(world: World, seeds: int, scale: Scale, folder: Path) -> opd.Controls:
    """Run the arms of the controls that are missing."""
    return opd.controls(
        world.student,
        world.teacher,
        world.task,
        arms=ARMS,
        seeds=seeds,
        folder=folder / CONTROLS,
        quiet=True,
        **scale.of_controls,
    )


def gains(runs: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
    """Compute accuracy and gain, greedy and of samples, over prompts and seeds."""
    return {
        kind: describe_gain(np.asarray([run[kind] for run in runs]), np.asarray(before[kind]))
        for kind in ("greedy", "sampled")
    }


def summarise(name: str, runs: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a method: its runs, the gain, and the gain at plain OPD's teacher's tokens."""
    out = {"label": ENTRIES[name].label, **gains(list(runs.values()), before)}
    early = [run["at_budget"] for run in runs.values()]
    if all(early):
        updates = float(np.mean([one["updates"] for one in early]))
        out["equal_teacher_tokens"] = {"updates": updates, **gains(early, before)}
    for kind in ("graded", "written"):
        out[f"teacher_{kind}"] = float(np.mean([run["teacher"][kind] for run in runs.values()]))
    seconds = [run["cpu_seconds"] for run in runs.values()]
    out["cpu_seconds"] = None if None in seconds else float(np.mean(seconds))
    return {**out, "runs": dict(runs)}


@dataclass
class Bench:
    """Everything that is known so far, and where it is written."""

    world: World
    scale: Scale
    folder: Path
    path: Path
    seeds: int
    facts: dict[str, Any]
    before: dict[str, list[float]]
    controls: opd.Controls | None = None
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def go_on(self, only: tuple[str, ...]) -> None:
        """Run what is missing: seed by seed, the controls before the methods that they share."""
        names = [name for name in ENTRIES if not only or name in only]
        shared = any(ENTRIES[name].arm for name in names)
        for seed in range(self.seeds):
            if shared or CONTROLS in only:
                self.controls = run_controls(self.world, seed + 1, self.scale, self.folder)
                for name in names:
                    if ENTRIES[name].arm:
                        self.runs[name] = from_controls(self.controls, name, self.scale)
                self.write()
            for name in names:
                if not ENTRIES[name].arm:
                    self.add(name, seed)

    def take_up(self) -> None:
        """Take over the results that are written already, if they are of the same world."""
        stored = json.loads(self.path.read_text()) if self.path.exists() else {}
        same = stored.get("settings") == asdict(self.scale)
        if not same or stored.get("before") != self.before:
            return
        known = {name: one for name, one in stored["methods"].items() if name in ENTRIES}
        self.runs = {name: dict(one["runs"]) for name, one in known.items()}
        if stored["controls"] is not None:
            self.controls = opd.Controls.from_json(stored["controls"])

    def add(self, name: str, seed: int) -> None:
        """Run a method with a seed, or load what was kept, unless only its result is left."""
        is_kept = (self.folder / "runs" / f"{name}-{seed}.json").exists()
        if str(seed) in self.runs.get(name, {}) and not is_kept:
            return
        plain = self.runs.get(PLAIN, {}).get(str(seed))
        budget = None if plain is None else sum(plain["teacher"].values())
        found = run_one(self.world, name, seed, self.scale, self.folder, budget)
        self.runs.setdefault(name, {})[str(seed)] = found
        self.write()
        print(
            f"{name} {seed}: greedy {np.mean(found['greedy']):.3f}, samples"
            f" {np.mean(found['sampled']):.3f}, {found['teacher']}, {found['cpu_seconds']} CPU s",
            flush=True,
        )

    def write(self) -> None:
        write_file(self.path, (json.dumps(self.to_json(), indent=1) + "\n").encode())

    def to_json(self) -> dict[str, Any]:
        missing = {
            name: [seed for seed in range(self.seeds) if str(seed) not in self.runs.get(name, {})]
            for name in ENTRIES
        }
        return {
            **about_machine(),
            "world": self.facts,
            "settings": asdict(self.scale),
            "before": self.before,
            "methods": {
                name: summarise(name, self.runs[name], self.before)
                for name in ENTRIES
                if self.runs.get(name)
            },
            "not_run": {name: seeds for name, seeds in missing.items() if seeds},
            "controls": None if self.controls is None else describe_controls(self.controls),
        }


def describe_controls(found: opd.Controls) -> dict[str, Any]:
    """Describe controls, with the verdicts by greedy completions and by samples."""
    out = found.to_json()
    for by in ("greedy", "samples"):
        share = replace(found, by=by).share
        out[f"by_{by}"] = {
            "verdict": share.verdict.value,
            "share": repr(share),
            "interval": [share.value, share.low, share.high],
        }
    return out


def describe_world(
    world: World, scale: Scale, folder: Path
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Evaluate student and teacher on the held-out prompts, once for all runs in the folder.

    Returns:
        The facts of the world, with accuracies in all and by grade; and the student's scores.
    """
    file, key = folder / "world.json", [*map(str, (world.student, world.teacher)), asdict(scale)]
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("key") == key:
        return kept["facts"], kept["before"]
    facts: dict[str, Any] = dict(world.facts)
    grades = [
        str(prompt.metadata["grade"])
        for prompt in world.task.prompts(scale.prompts, seed=0, split="test")
    ]
    scores = {
        name: scale.score(policy, world.task)
        for name, policy in (("student", world.student), ("teacher", world.teacher))
    }
    for name, found in scores.items():
        by_grade = {
            grade: [one for one, of in zip(found["greedy"], grades, strict=True) if of == grade]
            for grade in sorted(set(grades))
        }
        facts[name] = {
            "accuracy": float(np.mean(found["greedy"])),
            "sampled": float(np.mean(found["sampled"])),
            "by_grade": {
                grade: {"accuracy": float(np.mean(of)), "prompts": len(of)}
                for grade, of in by_grade.items()
            },
        }
    write_file(file, json.dumps({"key": key, "facts": facts, "before": scores["student"]}).encode())
    return facts, scores["student"]


def print_results(stored: Mapping[str, Any]) -> None:
    """Print the table of methods, the controls, and what has not run."""

    def cells(of: Mapping[str, Any]) -> list[str]:
        return [
            f"{of[kind]['accuracy']:.3f}, {of[kind]['gain']:+.3f}"
            f" [{of[kind]['low']:+.3f}, {of[kind]['high']:+.3f}]"
            for kind in ("greedy", "sampled")
        ]

    columns = ("method", "updates", "seeds", "greedy", "samples", "graded", "written", "CPU s")
    table = Table(*columns, title="Accuracy and gain", title_justify="left")
    world = stored["world"]
    for name in ("student", "teacher"):
        found = world[name]
        table.add_row(name, "", "", f"{found['accuracy']:.3f}", f"{found['sampled']:.3f}")
    for one in stored["methods"].values():
        seconds = one["cpu_seconds"]
        table.add_row(
            one["label"],
            str(stored["settings"]["steps"]),
            str(one["greedy"]["seeds"]),
            *cells(one),
            f"{one['teacher_graded']:.0f}",
            f"{one['teacher_written']:.0f}",
            "" if seconds is None else f"{seconds:.0f}",
        )
        if "equal_teacher_tokens" in one:
            equal = one["equal_teacher_tokens"]
            label = "  at as many teacher's tokens as OPD"
            table.add_row(label, f"{equal['updates']:.0f}", "", *cells(equal))
    console = Console(width=160)
    console.print(table)
    if stored["controls"] is not None:
        console.print(repr(opd.Controls.from_json(stored["controls"])), markup=False)
        console.print("By samples:", stored["controls"]["by_samples"]["share"], markup=False)
    console.print(f"Not run: {stored['not_run'] or 'nothing'}", markup=False)


def main(
    only: tuple[str, ...] = (),
    seeds: int = 3,
    show: bool = False,
    quick: bool = False,
    model: str = "",
    folder: Path = small_world.FOLDER,
) -> None:
    """Run what is missing and print the results.

    Args:
        only: Names of methods, or "controls"; all by default.
        seeds: Seeds of each.
        show: Print the results so far and run nothing.
        quick: Two updates a run, one seed, in the folder `quick`.
        model: A model in place of SmolLM2: a folder, a GGUF file or a name on the Hub.
        folder: Keeps the teacher and the finished runs.
    """
    torch.set_num_threads(1)
    unknown = set(only) - {*ENTRIES, CONTROLS}
    if unknown:
        raise SystemExit(f"There is no {min(unknown)!r}. Use {', '.join([*ENTRIES, CONTROLS])}.")
    if show:
        print_results(json.loads(RESULTS.read_text()))
        return
    is_trial = quick or bool(model)
    scale = QUICK if quick else Scale()
    place = folder / "quick" if quick else folder
    world = small_world.load_world(place, model=model)
    facts, before = describe_world(world, scale, place)
    path = place / RESULTS.name if is_trial else RESULTS
    bench = Bench(world, scale, place, path, 1 if quick else seeds, facts, before)
    bench.take_up()
    bench.go_on(only)
    print_results(json.loads(path.read_text()))


if __name__ == "__main__":
    tyro.cli(main)
