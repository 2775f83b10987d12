"""Any object in any place is used, or refused in opdlab's own words."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import opdlab as opd
from opdlab import viz
from opdlab.data.labels import Labels
from opdlab.data.map_results import MapResults
from opdlab.errors import OpdlabError
from opdlab.viz import questions

JUNK = {
    "None": None,
    "a text": "x",
    "an empty text": "",
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "nan": math.nan,
    "inf": math.inf,
    "True": True,
    "an empty list": [],
    "a list of None": [None],
    "a list of texts": ["a"],
    "an empty dict": {},
    "a dict": {"a": 1},
    "a dict by number": {1: 2},
    "an object": object(),
    "bytes": b"x",
    "an array": np.array([1.0]),
    "a tensor": torch.tensor([1.0]),
    "a table": pd.DataFrame(),
    "a class": int,
}


def _right_loss(student, teacher, mask):
    return opd.losses.reverse_kl(student.log_softmax(-1), teacher.log_softmax(-1))


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Functions that look or prepare, with arguments that are right."""
    student, teacher, task = opd.load("market")
    prompts = task.prompts(2)
    rollout = student.sample(prompts, 2, max_new_tokens=6, seed=0)
    trace = opd.score(rollout, student, teacher)
    run = opd.distill(student, teacher, task, steps=1, batch=2, quiet=True, snapshot_every=1)
    run.train()
    folder = tmp_path_factory.mktemp("files")
    viz.MethodMap.example().results.save(folder / "map.json")
    of_trace = {"trace": trace}
    url = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    pair = {"student": student, "teacher": teacher, "task": task}
    return {
        "Policy.sample": (student.sample, {"prompts": prompts, "max_new_tokens": 2}),
        "Policy.log_probs": (student.log_probs, {"rollout": rollout}),
        "Policy.seeing": (student.seeing, {}),
        "task.prompts": (task.prompts, {"n": 2}),
        "task.scores": (task.scores, {"prompts": prompts, "texts": ["a", "b"]}),
        "Prompt": (opd.Prompt, {"text": "a"}),
        "concat_rollouts": (opd.concat_rollouts, {"parts": [rollout]}),
        "from_records": (opd.tasks.from_records, {"records": [{"prompt": "a", "answer": "b"}] * 4}),
        "market": (opd.tasks.market, {}),
        "load": (opd.load, {}),
        "score": (opd.score, {"rollout": rollout, "student": student, "teacher": teacher}),
        "what_if": (opd.what_if, {**of_trace, "loss": opd.OPD("forward_kl")}),
        "trace.column": (trace.column, {"name": "student_logp"}),
        "trace.save": (trace.save, {"path": folder / "trace.parquet"}),
        "trace.sample": (trace.sample, {"i": 0}),
        "run.at": (run.at, {"step": 1}),
        "run.save_adapter": (run.save_adapter, {"path": folder / "adapter"}),
        "snapshots.rescore": (opd.snapshots.rescore, {"run": run, "rollout": rollout}),
        "snapshots.rewrite": (opd.snapshots.rewrite, {"run": run, "prompts": prompts}),
        "diagnose.health": (opd.diagnose.health, {"run": run}),
        "diagnose.overlap": (opd.diagnose.overlap, {**pair, "rollout": rollout}),
        "TextServer": (opd.teachers.TextServer, url),
        "LogprobServer": (opd.teachers.LogprobServer, url),
        "VLLMServer": (opd.samplers.VLLMServer, url),
        "VLLM": (opd.samplers.VLLM, {}),
        "Budget": (opd.teachers.Budget, {}),
        "TopK": (opd.TopK, {"k": 2}),
        "reverse_kl": (
            opd.losses.reverse_kl,
            {"student": torch.zeros(1, 2), "teacher": torch.zeros(1, 2)},
        ),
        "MultiTeacher": (opd.teachers.MultiTeacher, {"members": {"a": teacher, "b": teacher}}),
        "ByteTeacher": (opd.teachers.ByteTeacher, {"policy": teacher}),
        "conform": (opd.conform, {"loss": _right_loss, "seconds": 1e-3}),
        "Spec": (opd.conformance.Spec, {}),
        "for_trl": (opd.conformance.for_trl, {"method": opd.OPD()}),
        "for_verl": (opd.conformance.for_verl, {"method": opd.OPDPlus()}),
        "SDPO": (opd.SDPO, {}),
        "OPSA": (opd.OPSA, {}),
        "credit": (opd.credit, letters()),
        "TurnOPD": (opd.TurnOPD, {}),
        "TokenLens": (viz.TokenLens, of_trace),
        "Equation": (viz.Equation, of_trace),
        "Disagreements": (viz.Disagreements, of_trace),
        "TwoRules": (viz.TwoRules, of_trace),
        "Marks": (viz.Marks, of_trace),
        "diagnose.branch": (
            opd.diagnose.branch,
            {**pair, "rollout": rollout, "sample": 0, "position": 0, "n": 1, "max_new_tokens": 1},
        ),
        "diagnose.attribute": (
            opd.diagnose.attribute,
            {
                "student": student,
                "teacher": teacher,
                "rollout": rollout,
                "sample": 0,
                "position": 0,
            },
        ),
        "Labels": (Labels, of_trace),
        "questions.worst": (questions.worst, of_trace),
        "questions.where": (questions.where, {**of_trace, "conditions": ["student_logp < 0"]}),
        "Timeline": (viz.Timeline, of_trace),
        "Regimes": (viz.Regimes, of_trace),
        "Rollouts": (viz.Rollouts, of_trace),
        "TailAudit": (viz.TailAudit, of_trace),
        "Playground": (viz.Playground, of_trace),
        "Compare": (viz.Compare, {"traces": {"a": trace, "b": trace}}),
        "Scrubber": (viz.Scrubber, {"traces": {0: trace, 1: trace}}),
        "RunBoard": (viz.RunBoard, {"runs": run}),
        "RunCard": (viz.RunCard, {"run": run}),
        "MethodMap": (viz.MethodMap, {"results": viz.MethodMap.example().results}),
        "MapResults.load": (MapResults.load, {"path": folder / "map.json"}),
        "Arms": (viz.Arms, {"controls": viz.Arms.example().controls}),
    }


def letters() -> dict[str, Any]:
    """Two exact tables, a text of the first, and a task of letters."""
    student = opd.exact.Table.random(3, 2, seed=0)
    teacher = opd.exact.Table.random(3, 2, student.prompts, seed=1)
    right = lambda prompt, text: float("b" in text)
    task = opd.Task("letters", lambda n, seed, split: [student.prompts[0]] * n, right, 2)
    return {
        "texts": student.sample(student.prompts, seed=0),
        "student": student,
        "teacher": teacher,
        "task": task,
    }


NAMES = [
    *("Policy.sample", "Policy.log_probs", "Policy.seeing", "task.prompts", "task.scores"),
    *("Prompt", "concat_rollouts", "from_records", "market", "load", "score", "what_if"),
    *("trace.column", "trace.save", "trace.sample", "run.at", "run.save_adapter"),
    *("snapshots.rescore", "snapshots.rewrite", "diagnose.health", "diagnose.overlap"),
    *("TextServer", "LogprobServer", "VLLMServer", "VLLM", "Budget", "TopK", "reverse_kl"),
    *("MultiTeacher", "ByteTeacher", "SDPO", "TurnOPD", "OPSA", "credit"),
    *("conform", "Spec", "for_trl", "for_verl"),
    *("TokenLens", "Timeline", "Regimes", "Rollouts", "TailAudit", "Playground", "Compare"),
    *("Scrubber", "RunBoard", "RunCard", "Equation", "Disagreements", "TwoRules", "Marks", "Arms"),
    *("diagnose.branch", "diagnose.attribute", "Labels", "questions.worst", "questions.where"),
    *("MethodMap", "MapResults.load"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_nothing_ends_in_a_raw_error(name, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a text may be a path
    function, right = calls[name]
    function(**right)
    kinds = inspect.Parameter
    places = [
        place
        for place, one in inspect.signature(function).parameters.items()
        if one.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
    ]
    raw, refused = [], []
    for place in dict.fromkeys([*places, *right]):
        for what, value in JUNK.items():
            try:
                function(**{**right, place: value})
            except OpdlabError as error:
                refused.append(str(error))
            except Exception as error:
                raw.append(f"{name}({place}={what}): {type(error).__name__}: {error}"[:200])
    assert not raw, "\n".join(raw)
    assert len(refused) >= len(places)
    assert not any("\n" in said for said in refused)
