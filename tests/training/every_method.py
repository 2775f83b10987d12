"""Train two steps with every method, in as many processes as it is launched in.

Run by `test_several_processes.py`: `every_method.py FOLDER [OTHER]`. The main process writes into
`FOLDER/METHOD` the gathered trace of the second step and checkpoints. `FOLDER/evaluation.json` is
an evaluation, `FOLDER/scored.parquet` a scored rollout, and `FOLDER/resumed` the second step of the
run in `OTHER`, by another number of processes.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import opdlab as opd
from opdlab.models.graded import TopLogprobs
from opdlab.teachers.text_only import as_writer

torch.set_num_threads(1)
LR = 1e-3
TOP = opd.TopK(6, by="teacher")
AHEAD = "ahead, many teachers"  # the run of texts written ahead that is taken up


class Judge:
    """A teacher that only writes: the length of the answer it is asked about, as a digit."""

    def write(self, prompts, n=1, *, max_new_tokens=64, temperature=1.0, seed=0):
        texts = [str(prompt.messages[-1]["content"]) for prompt in prompts]
        return [[f"I say {len(text) % 10}."] * n for text in texts]


class Elsewhere:
    """A teacher as if on a server: it gives its likeliest tokens, in another thread."""

    k = 6

    def __init__(self, policy: opd.Policy) -> None:
        self.policy = policy

    def grade(self, rollout):
        return self.begin(rollout)()

    def begin(self, rollout):
        with torch.no_grad():
            logp = self.policy.grade(rollout).logp()

        def work() -> TopLogprobs:
            top, token = logp.topk(self.k), rollout.ids[rollout.mask]
            own = logp.gather(1, token[:, None])[:, 0]
            return TopLogprobs(top.indices, top.values, own, token, logp.shape[1])

        return work

    def write(self, prompts, n=1, **options):
        return as_writer(self.policy).write(prompts, n, **options)


@dataclass(frozen=True)
class Own:
    """A user's own plan: the loss counts where the student is less sure than the median."""

    needs = ("teacher",)
    formula = "weight * sum(student * log(student / teacher))"

    def plan(self, batch):
        everyone = batch.gather(batch.rollout.logp)
        unsure = (
            batch.rollout.logp < everyone.quantile(0.5) - 1e-3
        )  # not a token at the median itself
        return {
            "weight": unsure * batch.random(batch.step) / batch.mean(-batch.rollout.logp).float(),
        }

    def loss(self, rows):
        return rows.weight * opd.losses.reverse_kl(rows.student, rows.teacher)


def shop(prompt: opd.Prompt) -> str:
    """The teacher of a prompt: one for each half of the shopkeepers."""
    return "one" if str(prompt.messages[0]["content"]) < "f" else "other"


def methods() -> dict[str, tuple[object, dict[str, object]]]:
    """Every method with the settings that it needs."""
    audits = {"chunks": 4, "continuations": 4, "length": 1, "similarity": "rouge1"}
    top = {"window": 3, "share": 0.3}
    return {
        "OPD full": (opd.OPD(), {"trace_k": 3}),
        "OPD top-k": (opd.OPD("forward_kl", top_k=8), {}),
        "OPD sampled": (opd.OPD(estimator="sampled", baseline="value", discount=0.9), {}),
        "OPD mixed": (opd.OPD(on_policy=0.5), {"n": 2, "micro_batch": 3}),
        "OPDPlus": (opd.OPDPlus("forward_kl", baseline="value"), {"normalize": "sequence"}),
        "TOPD": (opd.TOPD(**top), {}),
        "TOPD points": (
            opd.TOPD(**top, max_points=5, threshold="low_loss_q3", downweight="high_ot"),
            {},
        ),
        "DOPD": (opd.DOPD(), {"trace_k": 3, "micro_batch": 2}),
        "OmniOPD": (opd.OmniOPD(**audits, match_length=True), {}),
        "OmniOPD random": (opd.OmniOPD(**audits, select="random"), {}),
        "SelfDistillation": (opd.SelfDistillation(anchor="ema"), {}),
        "GRPO": (opd.GRPO(), {"n": 4}),
        "SequenceKD": (opd.SequenceKD(), {"normalize": "constant"}),
        "SFT": (opd.SFT(), {}),
        "SODA": (opd.SODA(), {}),
        "OVD": (opd.OVD(), {"n": 2}),
        "SpanOPD": (opd.SpanOPD(), {}),
        "EOPD": (opd.EOPD(), {}),
        # Its advantage divides by the range of some tokens' entropies, and rounding shows in it at
        # seed 3: up to 1.3e-4, depending on the processor. At this seed it is below 1e-5.
        "OPSA": (opd.OPSA(), {"seed": 0}),
        "GOPD": (opd.GOPD(), {}),
        "Combined": (opd.Combined(opd.OPD(), opd.GRPO(), Own(), weights=(1, 0.5, 2)), {"n": 4}),
        "TurnOPD": (opd.TurnOPD(), {}),
        "SDPO": (opd.SDPO(solution_form="hint {}", feedback_form="hint {}"), {"n": 2}),
        "RLSD": (opd.RLSD(anchor="frozen"), {"n": 4}),
        "SDAR": (opd.SDAR(), {"n": 4}),
        "many teachers": (opd.OPD("forward_kl"), {"trace_k": 3}),
        "ahead": (opd.OPD(top_k=TOP), {"generate_ahead": True, "importance_cap": 2.0}),
        "ahead, many teachers": (
            opd.OPD(on_policy=0.6, top_k=TOP),
            {"generate_ahead": True, "n": 2, "trace_k": 3},
        ),
        "own plan": (Own(), {}),
    }


def other_teachers(base: opd.Policy, teacher: opd.Policy) -> dict[str, object]:
    """The teachers of those methods that do not learn from the shipped one itself."""
    told = base.frozen().seeing("7 + 6 = 1 3")
    return {
        "OVD": Judge(),
        "many teachers": opd.MultiTeacher({"one": teacher, "other": told}, shop),
        "ahead": Elsewhere(teacher),
        "ahead, many teachers": opd.MultiTeacher({"one": Elsewhere(teacher), "other": told}, shop),
    }


# What the number of processes decides: means and quantiles of a plan, who writes, groups, averages,
# several teachers, texts written ahead. Three processes run these, two run all.
IN_THREE = (
    "OPD full",
    "OPD mixed",
    "OmniOPD random",
    "SelfDistillation",
    "GRPO",
    "TurnOPD",
    "Combined",
    "many teachers",
    "ahead",
    AHEAD,
    "own plan",
)


def main(folder: Path, other: Path | None) -> None:
    """Train with every method, evaluate, score and resume."""
    is_three = os.environ.get("WORLD_SIZE") == "3"
    base, teacher, task = opd.load("market")
    teachers = other_teachers(base, teacher)
    for name, (method, settings) in methods().items():
        if is_three and name not in IN_THREE:
            continue
        chosen = teachers.get(name, teacher)
        options = {"steps": 2, "batch": 5, "max_new_tokens": 12, "seed": 3, "lr": LR}
        options |= {"quiet": True, "save": folder / name, "save_every": 1, **settings}
        run = opd.distill(base.frozen(), chosen, task, method=method, **options)
        for step in run:
            trace = step.gather_trace()
        if run.accelerator.is_main_process:
            trace.save(folder / name / "trace.parquet")
    processes = run.accelerator
    found = opd.evaluate(base, task, n=7, k=3, max_new_tokens=12, processes=processes)
    rollout = base.sample(task.prompts(5), n=2, max_new_tokens=12)
    trace = opd.score(rollout, base, teacher, method=opd.TOPD(), processes=processes)
    if processes.is_main_process:
        numbers = {
            name: getattr(found, name).tolist() for name in ("greedy", "sampled", "length", "cut")
        }
        (folder / "evaluation.json").write_text(json.dumps(numbers))
        trace.save(folder / "scored.parquet")

    if other is not None:
        there = {"save": folder / "resumed", "quiet": True}
        opd.resume(other / "OPD full", base.frozen(), teacher, task, step=1, **there).train()
        there["save"] = folder / "resumed ahead"
        opd.resume(
            other / AHEAD, base.frozen(), teachers[AHEAD], task, step=1, allow="teacher", **there
        ).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
