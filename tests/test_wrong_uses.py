"""Wrong and odd uses are understood, or refused before compute with the value and a way out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import opdlab as opd
from opdlab import (
    DOPD,
    EOPD,
    GOPD,
    GRPO,
    OPD,
    OVD,
    SFT,
    SODA,
    TOPD,
    OmniOPD,
    OPDPlus,
    Policy,
    SelfDistillation,
    SpanOPD,
    TopK,
)
from opdlab.audit import as_loss
from opdlab.engine.needs import Access, Need, parse_need
from opdlab.errors import InvalidValue, MissingPolicy, OpdlabError, UnknownOption
from opdlab.losses.divergences import forward_kl, reverse_kl
from opdlab.methods import SequenceKD
from opdlab.methods.contract import FunctionMethod
from opdlab.methods.conversion import as_method


@dataclass(frozen=True)
class World:
    """The market's pair and task; calls that are refused leave them as they are."""

    student: Policy
    teacher: Policy
    task: opd.Task

    @property
    def all(self) -> tuple[Policy, Policy, opd.Task]:
        """The arguments of functions that look at a pair."""
        return self.student, self.teacher, self.task

    @property
    def rollout(self) -> opd.Rollout:
        """Two tokens of the student."""
        return self.student.sample(self.task.prompts(1), max_new_tokens=2)

    def distill(self, **changes: Any) -> opd.Run:
        """Prepare a run in which only `changes` differ from an ordinary one."""
        given = {
            "student": self.student,
            "teacher": self.teacher,
            "task": self.task,
            "steps": 2,
            "batch": 2,
            "quiet": True,
        }
        return opd.distill(**(given | changes))


@pytest.fixture(scope="module")
def world() -> World:
    return World(*opd.load("market"))


def refused(call: Callable[[], Any], says: str, error: type[Exception] = InvalidValue) -> None:
    """Check the class of an error, that it is opdlab's own, and a part of its words."""
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, OpdlabError)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


SETTINGS = [
    ({"steps": 2.5}, "Settings got steps=2.5. Use a whole number of at least 1."),
    ({"steps": "3"}, "steps='3'. Use a whole number of at least 1."),
    ({"steps": True}, "steps=True. Use a whole number of at least 1."),
    ({"steps": None}, "steps=None."),
    ({"steps": math.inf}, "steps=inf."),
    ({"batch": 1.5}, "batch=1.5. Use a whole number"),
    ({"batch": "4"}, "batch='4'. Use a whole number"),
    ({"batch": -4}, "batch=-4. Use a whole number of at least 1."),
    ({"n": None}, "n=None. Use a whole number of at least 1."),
    ({"n": 0}, "n=0. Use a whole number of at least 1."),
    ({"max_new_tokens": 12.0}, "max_new_tokens=12.0. Use a whole number"),
    ({"lr": math.nan}, "lr=nan. Use a finite number of at least 0."),
    ({"lr": math.inf}, "lr=inf. Use a finite number of at least 0."),
    ({"lr": -1.0}, "lr=-1.0. Use a finite number of at least 0."),
    ({"lr": "1e-4"}, "lr='1e-4'. Use a finite number of at least 0."),
    ({"lr": torch.tensor(1e-4)}, "lr=tensor(1.0000e-04). Use a finite number"),
    ({"schedule": "cosin"}, "schedule='cosin'. Use 'constant' or 'cosine'."),
    ({"schedule": None}, "schedule=None. Use 'constant' or 'cosine'."),
    ({"warmup": -5}, "warmup=-5. Use a whole number of at least 0."),
    ({"warmup": 0.1}, "warmup=0.1. Use a whole number of at least 0."),
    ({"warmup": 2}, "warmup=2 for steps=2, so the learning rate would never reach lr."),
    ({"lora": 0}, "lora=0. Use a whole number of at least 1, or None."),
    ({"lora": -8}, "lora=-8. Use a whole number of at least 1, or None."),
    ({"lora": "16"}, "lora='16'. Use a whole number of at least 1, or None."),
    ({"lora": 8.0}, "lora=8.0. Use a whole number of at least 1, or None."),
    ({"lora": True}, "lora=True. Use a whole number of at least 1, or None."),
    ({"lora": False}, "lora=False. Use a whole number of at least 1, or None."),
    ({"normalize": "mean"}, "normalize='mean'. Use 'token' or 'sequence' or 'constant'."),
    ({"micro_batch": -1}, "micro_batch=-1. Use a whole number of at least 1, or None."),
    ({"micro_batch": 0}, "micro_batch=0. Use a whole number of at least 1, or None."),
    ({"micro_batch": 1.5}, "micro_batch=1.5. Use a whole number of at least 1, or None."),
    (
        {"temperature": math.nan},
        "temperature=nan. Use 0 for the likeliest token, or a finite number",
    ),
    ({"temperature": -1}, "temperature=-1. Use 0 for the likeliest token"),
    (
        {"temperature": 1e-9},
        "temperature=1e-09. Use 0 for the likeliest token, or a finite number of at least 0.001.",
    ),
    ({"temperature": math.inf}, "temperature=inf. Use 0"),
    ({"temperature": "1"}, "temperature='1'. Use 0"),
    (
        {"temperature": 0, "n": 4},
        "temperature=0 with n=4: without randomness, all completions of a prompt are the same.",
    ),
    ({"top_p": 0}, "top_p=0. Use a number above 0, at most 1."),
    ({"top_p": 1.5}, "top_p=1.5. Use a number above 0, at most 1."),
    ({"top_p": math.nan}, "top_p=nan. Use a number above 0, at most 1."),
    ({"clip": -0.05}, "clip=-0.05. Use a finite number of at least 0."),
    ({"clip": math.nan}, "clip=nan. Use a finite number of at least 0."),
    ({"clip": None}, "clip=None. Use a finite number of at least 0."),
    ({"weight_decay": -1}, "weight_decay=-1. Use a finite number of at least 0."),
    ({"ema_rate": 5}, "ema_rate=5. Use a number from 0 to 1."),
    ({"ema_rate": -0.1}, "ema_rate=-0.1. Use a number from 0 to 1."),
    ({"seed": -1}, "seed=-1. Use a whole number from 0 to 2**32 - 1."),
    ({"seed": None}, "seed=None. Use a whole number from 0"),
    ({"seed": 1 << 40}, "seed=1099511627776. Use a whole number from 0"),
    ({"seed": "a"}, "seed='a'. Use a whole number from 0"),
    ({"precision": "fp16"}, "precision='fp16'. Use 'no' or 'bf16'."),
    ({"precision": torch.bfloat16}, "precision=torch.bfloat16. Use 'no' or 'bf16'."),
    ({"checkpointing": "yes"}, "checkpointing='yes'. Use True or False."),
    ({"checkpointing": 1}, "checkpointing=1. Use True or False."),
    ({"evaluate_every": -1}, "evaluate_every=-1. Use a whole number of at least 0."),
    ({"evaluate_every": True}, "evaluate_every=True. Use a whole number of at least 0."),
    ({"snapshot_every": -2}, "snapshot_every=-2. Use a whole number of at least 0."),
    ({"save_every": -1}, "save_every=-1. Use a whole number of at least 0."),
    ({"save_every": 0.5}, "save_every=0.5. Use a whole number of at least 0."),
    ({"batchsize": 3}, "distill has no setting batchsize. There are steps, batch, n,"),
    ({"learning_rate": 1e-4, "micro_batches": 2}, "no setting learning_rate, micro_batches."),
    ({"micro_batches": 2}, "Did you mean 'micro_batch'?"),
    ({"quiet": "no"}, "distill got quiet='no'. Use True or False."),
    ({"log_with": "nope"}, "distill got log_with='nope', which is no tracker. Use aim, clearml,"),
    ({"log_with": 5}, "distill got log_with=5"),
    ({"log_with": "clearml"}, "distill got log_with='clearml', whose package is not installed."),
    ({"save": 5}, "distill got save=5. Use the path of a folder, as 'runs/first', or None."),
]

WITHOUT_EFFECT = [
    (
        {"save": "", "save_every": 1},
        "save_every=1, which would change nothing: there is no folder to save in.",
    ),
    ({"save_every": 1}, "Give distill save='a folder'."),
    (
        {"ema_rate": 0.1},
        "ema_rate=0.1, which would change nothing: OPD reads no moving average (`ema`).",
    ),
    (
        {"snapshot_every": 1, "lora": None},
        "snapshots keep adapters, and lora=None trains all weights.",
    ),
    (
        {"method": SFT(), "temperature": 0.7},
        "temperature=0.7, which would change nothing: SFT trains on the reference answers",
    ),
    ({"method": SFT(), "top_p": 0.7}, "top_p=0.7, which would change nothing"),
    ({"method": SFT(), "n": 4}, "n=4, which would change nothing"),
]


@pytest.mark.parametrize(("given", "says"), [*SETTINGS, *WITHOUT_EFFECT], ids=repr)
def test_a_setting_that_cannot_be_right_is_refused(world, given, says):
    refused(lambda: world.distill(**given), says)


@pytest.mark.parametrize(
    "given",
    [
        {"lr": 0},
        {"clip": 0},
        {"temperature": 0},
        {"temperature": 0, "method": SequenceKD()},
        {"seed": 2**32 - 1},
        {"steps": np.int64(2), "lr": np.float32(0.1), "quiet": np.bool_(True)},
        {"warmup": 1},
        {"ema_rate": 0.05},  # the default, said aloud
        {"method": SFT(), "temperature": 1.0},
        {"log_with": "all"},
    ],
    ids=repr,
)
def test_an_odd_setting_that_has_a_meaning_is_used(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # trackers write files
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = World(*opd.load("market")).distill(**given)
    next(run)
    assert run.done == 1
    assert {
        name: getattr(run.settings, name) for name in given.keys() & vars(run.settings).keys()
    } == pytest.approx({name: value for name, value in given.items() if name in vars(run.settings)})


def test_greedy_training_takes_the_likeliest_token_and_clip_0_leaves_the_gradient():
    world = World(*opd.load("market"))
    step = next(world.distill(temperature=0, clip=0, lr=0))
    greedy = world.student.sample(step.rollout.prompts, max_new_tokens=24, temperature=0)
    assert step.rollout.texts == greedy.texts


def test_a_recipe_may_name_what_a_method_does_not_use_but_not_what_does_not_exist(world):
    unused = replace(world.task, recipe={**world.task.recipe, "temperature": 0.5})
    assert world.distill(task=unused, method=SFT()).settings.temperature == 0.5
    refused(
        lambda: world.distill(task=replace(world.task, recipe={"learning_rate": 1})),
        "the task's recipe has no setting learning_rate",
    )


def test_evaluation_and_rewards_need_a_verifier(world):
    bare = replace(world.task, verify=None)
    refused(
        lambda: world.distill(task=bare, evaluate_every=1),
        "evaluate_every=1, but market has no verifier.",
    )
    refused(
        lambda: world.distill(task=bare, method=GRPO(), n=4),
        "GRPO learns from a verifier, but market has none.",
        MissingPolicy,
    )
    refused(
        lambda: world.distill(method=GRPO()),
        "distill got n=1, too few per prompt. Use n=4 or more",
    )
    refused(lambda: world.distill(method=OVD()), "OVD compares the completions of a prompt")


# Objects in the wrong place.

PLACES = [
    (lambda w: w.distill(student=None), "student=None. Use a Policy: Policy.load("),
    (
        lambda w: w.distill(student=w.student.weights.model),
        "That is a model without its tokenizer. Make a policy of it: Policy.of(",
    ),
    (lambda w: w.distill(student="Qwen/Qwen3-0.6B"), "Load it: Policy.load('Qwen/Qwen3-0.6B')."),
    (lambda w: w.distill(student=w.student.tokenizer), "That is a tokenizer without its model."),
    (lambda w: w.distill(student=Policy), "That is the class Policy, and not an object of it."),
    (
        lambda w: opd.distill((w.student, w.teacher, w.task)),
        "Unpack it with a star: distill(*opdlab.load('market')).",
    ),
    (lambda w: w.distill(teacher=w.task, task=w.teacher), "distill got task=Policy("),
    (lambda w: w.distill(teacher=w.task), "distill got teacher=Task("),
    (
        lambda w: w.distill(teacher="a/model"),
        "teacher='a/model'. That is a text, a path or a name. Load it: Policy.load('a/model').",
    ),
    (
        lambda w: w.distill(teacher=w.teacher.weights.model),
        "Make a policy of it: Policy.of(model, tokenizer).",
    ),
    (lambda w: w.distill(teacher=3), "distill got teacher=3. That is an int."),
    (
        lambda w: w.distill(task=w.task.prompts(3)),
        "That is a list of Prompt objects. Use a task: opdlab.tasks.from_records(",
    ),
    (
        lambda w: w.distill(task=[{"prompt": "a"}]),
        "That is a list of dict objects. Use a task: opdlab.tasks.from_records(",
    ),
    (
        lambda w: w.distill(task="file.jsonl"),
        "Make a task of the file: opdlab.tasks.from_records('file.jsonl')",
    ),
    (lambda w: w.distill(task={"prompt": ["a"]}), "That is a dict. Use a task"),
    (
        lambda w: w.distill(task=OPD()),
        "That is a method. The order is distill(student, teacher, task, method=…)",
    ),
    (
        lambda w: opd.distill(w.student, w.teacher, w.task, OPD()),
        "too many positional arguments. It takes student, teacher, task, method",
    ),
    (
        lambda w: w.distill(policies=[w.teacher]),
        "Use a dict of policies by name, as {'reference': policy}, or None.",
    ),
    (
        lambda w: w.distill(policies={"techer": w.teacher}),
        "which OPD does not use: it reads 'teacher'. Did you mean 'teacher'?",
    ),
    (
        lambda w: w.distill(policies={"reference": w.teacher}),
        "policies={'reference': …}, which OPD does not use",
    ),
    (
        lambda w: w.distill(policies={"student": w.teacher}),
        "but the student is the policy that trains.",
    ),
    (lambda w: w.distill(policies={"teacher": None}), "distill got policies['teacher']=None."),
    (lambda w: w.distill(policies={"teacher": "a/model"}), "Load it: Policy.load('a/model')."),
    (lambda w: w.distill(policies={3: w.teacher}), "Use a dict of policies by name"),
    (
        lambda w: w.distill(method=SFT(), policies={"teacher": w.teacher}),
        "which SFT does not use: it reads no policy.",
    ),
]


@pytest.mark.parametrize(("call", "says"), PLACES, ids=[says[:50] for _, says in PLACES])
def test_an_object_in_the_wrong_place_is_told_apart(world, call, says):
    refused(lambda: call(world), says)


# What stands for a method.


def of_rows(rows):
    return reverse_kl(rows.student, rows.teacher)


class Plain:
    """A user's method, with nothing but the contract."""

    needs = ("teacher",)

    def loss(self, rows):
        return of_rows(rows)


class Module(torch.nn.Module):
    def forward(self, rows):
        return of_rows(rows)


def with_needs(rows):
    return reverse_kl(rows.student, rows.teacher) + 0 * rows.reference.sum(-1)


with_needs.needs = ("teacher", "reference")

SAME = {
    "an instance": OPD(),
    "a class": OPD,
    "a user's class": Plain,
    "a function": of_rows,
    "a lambda": lambda rows: reverse_kl(rows.student, rows.teacher),
    "a partial": functools.partial(lambda scale, rows: scale * of_rows(rows), 1.0),
    "a decorated function": opd.method(needs=("teacher",))(of_rows),
    "a decorator without parentheses": opd.method(of_rows),
    "an empty decorator": opd.method()(of_rows),
    "one need as a text": opd.method(needs="teacher")(of_rows),
    "a list of needs": opd.method(needs=["teacher"])(of_rows),
    "a divergence": reverse_kl,
    "a module": Module(),
}


@pytest.mark.parametrize("name", SAME)
def test_whatever_stands_for_a_method_trains_the_same(name):
    """One conversion for `distill`, `audit` and `exact`."""
    runs = [World(*opd.load("market")).distill(method=method) for method in (OPD(), SAME[name])]
    assert runs[1].history.empty
    losses = [next(run).metrics["loss"] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert opd.audit(SAME[name]).trains == "reverse_kl"
    policies = {
        who: opd.exact.Table.random(3, 1, seed=seed)
        for seed, who in enumerate(("student", "teacher"))
    }
    torch.testing.assert_close(
        opd.exact.gradient(SAME[name], policies), opd.exact.gradient(OPD(), policies)
    )


def test_a_function_reads_what_it_says_or_what_is_given_beside_it(world):
    assert as_method(of_rows).needs == ("teacher",)
    assert as_method(with_needs).needs == ("teacher", "reference")
    assert as_method(with_needs, needs="teacher").needs == ("teacher",)
    run = world.distill(
        method=lambda rows: forward_kl(rows.student, rows.reference), needs=("reference",)
    )
    assert list(run.policies) == ["student", "reference"]
    assert (
        opd.audit(lambda rows: forward_kl(rows.student, rows.reference), needs="reference").trains
        == "forward_kl"
    )
    method = OPD()
    assert as_method(method) is method
    assert as_method(forward_kl).needs == ("teacher",)
    assert isinstance(as_method(of_rows), FunctionMethod)


@opd.method
def decorated(rows):
    return of_rows(rows)


def test_a_method_of_a_function_has_its_name(world):
    assert repr(world.distill(method=decorated)) == "Run(decorated, step 0 of 2)"


def method_of(**parts: Any) -> Any:
    """An object with these attributes."""
    return type("Mine", (), parts)()


METHODS = [
    ("opd", "distill got the text 'opd' for a method. Use the method itself: opdlab.OPD()."),
    ("opd-plus", "Use the method itself: opdlab.OPDPlus()."),
    ("ppo", "Use one of opdlab's methods itself, as opdlab.OPD(); there are DOPD, EOPD"),
    ("", "Use one of opdlab's methods itself"),
    (object(), "an object without a loss trains nothing."),
    (
        3,
        (
            "distill got 3. Give a loss (a function of rows), a method, as opdlab.OPD(), or the"
            " class of one"
        ),
    ),
    ([OPD()], "distill got [OPD("),
    ({}, "distill got {}."),
    (object, "distill got the class object, which has no loss."),
    (opd.methods.Method, "distill got the class Method, which has no loss."),
    (functools.partial, "distill got the class partial, which "),
    (opd, "distill got <module"),
    (lambda: 0, "<lambda> takes nothing, but it is called with rows alone."),
    (lambda a, b, c: 0, "<lambda> takes a, b, c, but it is called with rows alone."),
    (
        lambda rows, batch: 0,
        (
            "<lambda> takes rows, batch, but it is called with rows alone. Write it as a function"
            " of one argument"
        ),
    ),
    (lambda *, rows: 0, "but it is called with rows alone."),
    (
        method_of(needs=("teacher",), loss=3),
        "Mine, whose loss is 3. Make it a function of rows: def loss(self, rows).",
    ),
    (
        method_of(needs=("teacher",), loss=lambda: 0),
        "Mine.loss takes nothing, not even self. Write it as def loss(self, rows).",
    ),
    (
        method_of(needs=("teacher",), loss=lambda self, a, b: 0),
        "Mine.loss takes a, b, but it is called with rows alone.",
    ),
    (
        method_of(needs="teacher", loss=lambda self, rows: 0),
        "which is one text. Write a tuple of names: needs=('teacher',).",
    ),
    (
        method_of(needs=None, loss=lambda self, rows: 0),
        "Mine has needs=None. Write a tuple of names of policies",
    ),
    (
        method_of(needs={"teacher"}, loss=lambda self, rows: 0),
        "Mine has needs={'teacher'}. Write a tuple",
    ),
    (
        method_of(needs=(3,), loss=lambda self, rows: 0),
        "Mine names 3 in `needs`. Use names of policies",
    ),
    (
        method_of(loss=lambda self, rows: 0),
        "Mine, which does not say what it reads. Give it needs = ('teacher',)",
    ),
    (
        method_of(needs=(), loss=lambda self, rows: 0, plan=None),
        "Mine, whose plan is None. Make it a function of the batch, or",
    ),
    (
        method_of(needs=(), loss=lambda self, rows: 0, plan=lambda self: 0),
        "Mine.plan takes nothing, but it is called with batch alone.",
    ),
    (
        method_of(needs=(), loss=lambda self, rows: 0, on_policy=2),
        "Mine got on_policy=2. Use a number from 0 to 1.",
    ),
    (method_of(needs=(), loss=lambda self, rows: 0, on_policy=math.nan), "Mine got on_policy=nan."),
    (
        method_of(needs=(), loss=lambda self, rows: 0, writer="techer"),
        "writer='techer'. Use 'teacher', 'answer', or a tuple of these.",
    ),
    (method_of(needs=(), loss=lambda self, rows: 0, writer=()), "Mine has writer=()."),
    (
        method_of(needs=(), loss=lambda self, rows: 0, recipe=3),
        "Mine has recipe=3. Use a dict of settings",
    ),
    (
        method_of(needs=(), loss=lambda self, rows: 0, recipe={"step": 1}),
        "the method's recipe has no setting step.",
    ),
]


@pytest.mark.parametrize(("method", "says"), METHODS, ids=[says[:50] for _, says in METHODS])
def test_what_is_no_method_is_refused_in_words(world, method, says):
    refused(lambda: world.distill(method=method), says)


def test_a_model_and_a_policy_are_no_methods(world):
    for wrong in (world.student.weights.model, world.student, world.task):
        refused(
            lambda wrong=wrong: world.distill(method=wrong),
            "an object without a loss trains nothing.",
        )
    refused(
        lambda: world.distill(method=OPD(), needs="teacher"),
        "needs='teacher' beside OPD, which names its own. Leave needs out.",
    )
    refused(lambda: opd.audit("k3"), "audit got the text 'k3' for a method.")
    refused(lambda: opd.audit(OPD(), seed=-1), "audit got seed=-1.")
    refused(lambda: opd.method(plan=3)(of_rows), "of_rows has plan=3.")
    refused(
        lambda: opd.method(needs=("teacher",))(3),
        "opdlab.method got 3. Put it above a loss function",
    )


# Names in `needs`.

NEEDS = [
    (
        "teacher.text+hint",
        (
            "'+hint' and '.text' cannot be combined. Name 'teacher.text', and give distill"
            " policies={'teacher.text': …}"
        ),
    ),
    ("teacher+hint.text", "'+hint' and '.text' cannot be combined."),
    ("teacher+hint.spans", "'+hint' and '.spans' cannot be combined."),
    (
        "teacher+hints",
        "'+hints' is no suffix. Use 'teacher', 'teacher+hint', 'teacher.text', 'teacher.spans'.",
    ),
    ("teacher.txt", "'.txt' is no suffix."),
    ("teacher+hint+hint", "'+hint+hint' is no suffix."),
    ("teacher.text.spans", "'.text.spans' is no suffix."),
    ("teacher ", "which is no name of a policy. Use letters, digits and _"),
    ("", "names '' in `needs`, which is no name of a policy."),
    ("+hint", "which is no name of a policy."),
    ("token", "'token' means something else in a loss."),
    (b"teacher", "names b'teacher' in `needs`. Use names of policies"),
]


@pytest.mark.parametrize(("name", "says"), NEEDS)
def test_a_need_that_cannot_be_met_is_refused(name, says):
    refused(lambda: opd.method(needs=(name,))(of_rows), says)


def test_a_need_is_read_by_one_parser():
    assert parse_need("teacher+hint") == Need("teacher", hinted=True)
    assert parse_need("maths") == Need("maths")
    assert parse_need("teacher.spans") == Need("teacher", access=Access.SPANS)
    for name in ("student+hint", "ema", "maths.text", "my-teacher+hint"):
        assert str(parse_need(name)) == name


def test_a_name_that_nobody_gives_is_told_with_what_exists(world):
    loss = opd.method(needs=("techer",))(of_rows)
    refused(
        lambda: world.distill(method=loss),
        "of_rows needs 'techer', but there is no such policy. Did you mean 'teacher'? There are"
        " student, teacher, reference, ema; give distill any other by name,"
        " policies={'techer': …}.",
        MissingPolicy,
    )


def test_any_name_may_be_a_policy(world):
    both = opd.method(needs=("maths", "style+hint"))(
        lambda rows: reverse_kl(rows.student, rows.maths) + 0 * rows["style+hint"].sum(-1)
    )
    refused(
        lambda: world.distill(method=both, policies={"maths": world.teacher}),
        "needs 'style+hint'",
        MissingPolicy,
    )
    run = world.distill(
        method=both,
        policies={"maths": world.teacher, "style": world.teacher},
        task=opd.tasks.market(hint="style"),
    )
    assert list(run.policies) == ["student", "maths", "style+hint"]
    assert run.policies["style+hint"].context is not None


class Writer:
    """A teacher that only writes."""

    def write(self, prompts, n=1, **_):
        return [["a"] * n for _ in prompts]


def test_what_is_given_must_be_able_to_do_what_is_asked(world):
    text = opd.method(needs=("style.text",))(lambda rows: -rows.logp)
    given = world.distill(method=text, policies={"style.text": world.teacher}).policies[
        "style.text"
    ]
    assert isinstance(given, opd.teachers.TextOnly)
    refused(
        lambda: world.distill(policies={"teacher": Writer()}),
        "'teacher' must grade tokens, but Writer only writes.",
        MissingPolicy,
    )


# Fields of methods.

FIELDS = [
    (lambda: OPD("nope"), "OPD has no divergence 'nope'. Use one of forward_kl"),
    (lambda: OPD(reverse_kl), "OPD has no divergence <function"),
    (lambda: OPD("generalized_jsd", {"beta": 7}), "generalized_jsd got beta=7"),
    (lambda: OPD("generalized_jsd", {"beta": math.nan}), "got beta=nan. Use a finite number."),
    (lambda: OPD("generalized_jsd", {"beta": "0.5"}), "got beta='0.5'. Use a finite number."),
    (
        lambda: OPD("generalized_jsd", {"beta": 0.5, "normalize": "no"}),
        "got normalize='no'. Use True or False.",
    ),
    (lambda: OPD("alpha_divergence", {"alpha": math.inf}), "got alpha=inf. Use a finite number."),
    (lambda: OPD("reverse_kl", {"beta": 0.5}), "reverse_kl has no option 'beta'. It takes none."),
    (
        lambda: OPD("generalized_jsd", {"alpha": 0.5}),
        "generalized_jsd has no option 'alpha'. It takes beta, normalize.",
    ),
    (lambda: OPD(options=[0.5]), "OPD got options=[0.5]. Use a dict of the divergence's keywords"),
    (lambda: OPD(on_policy="a"), "OPD got on_policy='a'. Use a finite number."),
    (lambda: OPD(on_policy=math.nan), "OPD got on_policy=nan."),
    (lambda: OPD(on_policy=True), "OPD got on_policy=True."),
    (lambda: OPD(discount=math.nan, estimator="sampled"), "OPD got discount=nan."),
    (lambda: OPD(top_k="4"), "OPD got top_k='4'."),
    (lambda: OPD(top_k=0), "TopK got k=0"),
    (lambda: OPD(top_k=True), "OPD got top_k=True."),
    (
        lambda: OPD(top_k=TopK(4, by="techer")),
        "but it reads no 'techer'. Use by='student' or by='teacher'.",
    ),
    (lambda: OPD(estimator=None), "OPD got estimator=None"),
    (lambda: TopK(0), "TopK got k=0, tail='bucket'. Use k >= 1"),
    (lambda: TopK(2.0), "TopK got k=2.0. Use a whole number."),
    (lambda: TopK("4"), "TopK got k='4'. Use a whole number."),
    (lambda: TopK(4, by=None), "TopK got by=None. Use a text."),
    (lambda: OPDPlus("nope"), "There is no generator 'nope'. Use one of"),
    (lambda: OPDPlus(None), "Generator got name=None. Use a text."),
    (lambda: OPDPlus("alpha_divergence", {"alpha": "x"}), "Generator got alpha='x'. Use a number."),
    (
        lambda: OPDPlus("alpha_divergence", {"gamma": 1}),
        "no divergence has 'gamma'. Use alpha, beta, shift or scale.",
    ),
    (lambda: OPDPlus(clip="6"), "OPDPlus got clip='6'. Use a finite number, or None."),
    (lambda: OPDPlus(clip=-1), "a clip above 0 or None for none"),
    (lambda: OPDPlus(centred="no"), "OPDPlus got centred='no'. Use True or False."),
    (lambda: OPDPlus(discount=math.nan), "OPDPlus got discount=nan."),
    (lambda: GRPO(clip=-1), "GRPO got clip=-1. Use a number above 0, at most 1."),
    (lambda: GRPO(clip=math.nan), "GRPO got clip=nan."),
    (lambda: GRPO(scale="no"), "GRPO got scale='no'. Use True or False."),
    (lambda: TOPD(window=2.5), "TOPD got window=2.5. Use a whole number of at least 1."),
    (lambda: TOPD(share=math.nan), "TOPD got share=nan."),
    (
        lambda: TOPD(max_points=0),
        "TOPD got max_points=0. Use a whole number of at least 1, or None.",
    ),
    (lambda: TOPD(max_points=-1), "TOPD got max_points=-1."),
    (lambda: TOPD(min_loss=math.nan), "TOPD got min_loss=nan. Use a finite number, or None."),
    (lambda: TOPD(weight=math.inf), "TOPD got weight=inf."),
    (lambda: TOPD(epsilon="0.05"), "TOPD got epsilon='0.05'."),
    (lambda: DOPD(k=2.0), "DOPD got k=2.0."),
    (lambda: DOPD(light="0.6"), "DOPD got light='0.6'."),
    (lambda: DOPD(light=math.inf), "DOPD got light=inf."),
    (lambda: DOPD(adaptive="no"), "DOPD got adaptive='no'. Use True or False."),
    (lambda: DOPD(anchor=None), "DOPD got anchor=None. Use one of live, frozen, ema"),
    (lambda: EOPD(threshold="1"), "EOPD got threshold='1'."),
    (lambda: EOPD(threshold=math.nan), "EOPD got threshold=nan."),
    (lambda: EOPD(k=1.5), "EOPD got k=1.5."),
    (lambda: GOPD(scale="1"), "GOPD got scale='1'."),
    (lambda: GOPD(scale=math.inf), "the weight of the teacher's reward. Use a number above 0"),
    (lambda: SODA(beta=math.nan), "SODA got beta=nan."),
    (lambda: SODA(beta="0.1"), "SODA got beta='0.1'."),
    (lambda: OVD(ballots=0), "OVD got ballots=0. Use a whole number of at least 1."),
    (lambda: OVD(clip=0), "OVD got clip=0."),
    (lambda: OVD(temperature=-1), "OVD got temperature=-1."),
    (lambda: OVD(seed=-1), "OVD got seed=-1."),
    (lambda: OVD(ask="how good?"), "OVD got ask='how good?'."),
    (lambda: SpanOPD(credit=None), "SpanOPD got credit=None."),
    (lambda: SelfDistillation(options={"beta": 1}), "jensen_shannon has no option 'beta'."),
    (lambda: SelfDistillation(clip="1"), "SelfDistillation got clip='1'."),
    (
        lambda: SelfDistillation(anchor=3),
        "SelfDistillation got anchor=3. Use one of live, frozen, ema",
    ),
    (
        lambda: SelfDistillation(top_k=TopK(4, by="reference+hint")),
        "Use by='student' or by='teacher'.",
    ),
    (lambda: SelfDistillation.context_distillation(k=0), "TopK got k=0"),
    (lambda: SelfDistillation.sdft("kl"), "SelfDistillation has no divergence 'kl'"),
    (lambda: OmniOPD(chunks=2.5), "OmniOPD got chunks=2.5. Use a whole number."),
    (lambda: OmniOPD(alpha=math.nan), "OmniOPD got alpha=nan."),
    (lambda: OmniOPD(similarity=["edit"]), "OmniOPD got similarity=['edit']"),
    (lambda: OmniOPD(match_length="no"), "OmniOPD got match_length='no'."),
    (
        lambda: opd.losses.generalized_jsd(*[torch.zeros(1, 2)] * 2, beta=math.nan),
        "generalized_jsd got beta=nan.",
    ),
    (
        lambda: opd.losses.alpha_divergence(*[torch.zeros(1, 2)] * 2, alpha="1"),
        "alpha_divergence got alpha='1'.",
    ),
    (lambda: as_loss(3), "Estimate got k=3. Use a text."),
]


@pytest.mark.parametrize(("call", "says"), FIELDS, ids=[says for _, says in FIELDS])
def test_a_field_of_a_method_that_cannot_be_right_is_refused(call, says):
    refused(call, says)


def test_odd_fields_that_have_a_meaning_are_used():
    assert OPD(top_k=4) == OPD(top_k=TopK(4))
    assert SelfDistillation(top_k=np.int64(4)).top_k == TopK(4)
    assert EOPD(threshold=math.inf).threshold == math.inf
    assert OPD(on_policy=1) == OPD()
    assert OPD("generalized_jsd", {"beta": 0, "normalize": True}).options == {
        "beta": 0,
        "normalize": True,
    }


def test_an_option_that_does_not_exist_is_also_a_type_error():
    with pytest.raises(TypeError):
        OPD("reverse_kl", {"beta": 0.5})
    assert issubclass(UnknownOption, InvalidValue)


def test_a_users_subclass_is_checked_as_its_parent():
    @dataclass(frozen=True)
    class Mine(OPD):
        name: str = "mine"

    assert Mine(name="other").divergence == "reverse_kl"
    refused(lambda: Mine(on_policy=3), "on_policy=3")


# Sampling.

SAMPLING = [
    ({"n": 0}, "sample got n=0. Use a whole number of at least 1."),
    ({"n": -1}, "sample got n=-1."),
    ({"n": 1.5}, "sample got n=1.5."),
    ({"n": True}, "sample got n=True."),
    ({"seed": -1}, "sample got seed=-1. Use a whole number from 0 to 2**64 - 1."),
    ({"seed": None}, "sample got seed=None."),
    ({"batch_size": 0}, "sample got batch_size=0. Use a whole number of at least 1, or None."),
    ({"batch_size": -1}, "sample got batch_size=-1."),
    ({"temperature": math.nan}, "sample got temperature=nan. Use 0 for the likeliest token"),
    ({"temperature": "1"}, "sample got temperature='1'."),
    ({"temperature": 1e-9}, "sample got temperature=1e-09. Use 0 for the likeliest token"),
    ({"top_p": math.nan}, "sample got top_p=nan."),
    ({"top_p": 0}, "sample got top_p=0. Use a number above 0, at most 1."),
    ({"max_new_tokens": 2.0}, "sample got max_new_tokens=2.0. Use a whole number of at least 1."),
    ({"max_new_tokens": 0}, "sample got max_new_tokens=0"),
    ({"top_k": -1}, "sample got top_k=-1. Use a whole number of at least 0."),
    ({"min_p": 1.0}, "sample got min_p=1.0. Use a number from 0 to below 1."),
    ({"stop": ""}, "sample got an empty text in stop=. It would end every completion at once"),
    (
        {"num_beams": 3},
        "sample has no option 'num_beams'. It takes n, prefixes, batch_size, writer,"
        " places, environment, max_new_tokens, temperature, top_p, top_k, min_p, stop, seed,"
        " min_new_tokens.",
    ),
    (
        {"prefixes": [[1]]},
        "sample got 1 prefixes for 2 prompts. Use one list of token ids for each prompt",
    ),
    (
        {"prefixes": ["a", "b"]},
        "sample got prefixes[0]='a', which are no token ids of the policy (0 to 69).",
    ),
    ({"prefixes": "ab"}, "sample got prefixes='ab'."),
    ({"prefixes": [[1], [99999]]}, "sample got prefixes[1]=[99999]"),
    ({"prefixes": [[1.5], [1]]}, "sample got prefixes[0]=[1.5]"),
    ({"prefixes": [1, 2]}, "sample got prefixes[0]=1"),
    ({"writer": 3}, "sample got writer=3. Use a text."),
]


@pytest.mark.parametrize(("given", "says"), SAMPLING, ids=repr)
def test_sampling_refuses_what_cannot_be_right(world, given, says):
    refused(
        lambda: world.student.sample(world.task.prompts(2), **({"max_new_tokens": 2} | given)), says
    )


PROMPTS = [
    (lambda w: w.student.sample("abc"), "sample got prompts='abc'."),
    (
        lambda w: w.student.sample(["a", "b"]),
        (
            "sample got prompts[0]='a'. That is a text, a path or a name. Use Prompt('a') for"
            " plain text"
        ),
    ),
    (lambda w: w.student.sample(None), "sample got prompts=None. Use a list of Prompt objects"),
    (lambda w: w.student.sample(w.task), "That is a task. Ask it for some: task.prompts(8)."),
    (
        lambda w: w.student.sample([w.task.prompts(1)[0], "x"]),
        "sample got prompts[1]='x'.",
    ),
    (lambda w: w.student.sample({"prompt": "a"}), "That is a dict."),
    (
        lambda w: w.student.sample([{"prompt": "a"}]),
        "prompts[0]={'prompt': 'a'}. That is a dict. Use a Prompt",
    ),
    (lambda w: opd.sample(None, w.task.prompts(2)), "sample got policy=None. Use a Policy"),
    (
        lambda w: opd.sample(w.student.weights.model, w.task.prompts(2)),
        "Make a policy of it",
    ),
]


@pytest.mark.parametrize(("call", "says"), PROMPTS, ids=[says[:50] for _, says in PROMPTS])
def test_prompts_in_the_wrong_form_are_told_apart(world, call, says):
    refused(lambda: call(world), says)


def test_one_prompt_an_iterator_and_numpy_s_numbers_are_understood(world):
    prompts = world.task.prompts(2)
    want = world.student.sample(prompts, 2, max_new_tokens=3, seed=1)
    got = world.student.sample(
        iter(prompts),
        np.int64(2),
        max_new_tokens=np.int32(3),
        seed=np.uint8(1),
        temperature=np.float32(1),
    )
    assert got.texts == want.texts
    assert world.student.sample(prompts[0], 2, max_new_tokens=3, seed=1).texts == want.texts[:2]
    begun = world.student.sample(prompts, max_new_tokens=2, prefixes=torch.tensor([[6, 7], [8, 9]]))
    assert (
        begun.texts
        == world.student.sample(prompts, max_new_tokens=2, prefixes=[[6, 7], [8, 9]]).texts
    )


# Looking.


DIAGNOSES = [
    (lambda w: opd.doctor(*w.all, k=0), "doctor got k=0. Use a whole number of at least 1."),
    (lambda w: opd.doctor(*w.all, k=1.5), "doctor got k=1.5."),
    (lambda w: opd.doctor(*w.all, seed=-1), "doctor got seed=-1."),
    (
        lambda w: opd.doctor(*w.all, prompts=0),
        "A diagnosis got prompts=0. Use a whole number of at least 1.",
    ),
    (lambda w: opd.doctor(*w.all, prompts=2.5), "A diagnosis got prompts=2.5."),
    (lambda w: opd.doctor(*w.all, prompts="two"), "A diagnosis got prompts='two'."),
    (
        lambda w: opd.doctor(*w.all, batchsize=2),
        "doctor has no setting batchsize. It takes those of distill: steps, batch",
    ),
    (lambda w: opd.doctor(*w.all, batch=0), "batch=0"),
    (lambda w: opd.doctor(None, w.teacher), "doctor got student=None. Use a Policy"),
    (lambda w: opd.doctor(w.student, None), "doctor got teacher=None."),
    (lambda w: opd.doctor(w.student, w.task, w.teacher), "doctor got task=Policy("),
    (
        lambda w: opd.doctor(w.student, "a/model", w.task),
        "Load it: Policy.load('a/model').",
    ),
    (lambda w: opd.diagnose.overlap(*w.all, k=0), "overlap got k=0."),
    (
        lambda w: opd.diagnose.overlap(*w.all, rollout=[]),
        "overlap got rollout=[]. That is a list. Use a Rollout",
    ),
    (lambda w: opd.diagnose.exposure(*w.all, n=0), "exposure got n=0."),
    (
        lambda w: opd.diagnose.privilege(*w.all, controls="no"),
        "privilege got controls='no'. Use True or False.",
    ),
    (
        lambda w: opd.diagnose.privilege(*w.all, split="dev"),
        "privilege got split='dev'. Use 'train' or 'test'.",
    ),
]


@pytest.mark.parametrize(("call", "says"), DIAGNOSES, ids=[says[:50] for _, says in DIAGNOSES])
def test_a_diagnosis_refuses_what_cannot_be_right(world, call, says):
    refused(lambda: call(world), says)


VIEWS = [
    (
        lambda w: opd.viz.TokenLens(None),
        "TokenLens got trace=None. Use a Trace, as opdlab.score(",
    ),
    (lambda w: opd.viz.TokenLens("t.parquet"), "Read it: Trace.load('t.parquet')."),
    (
        lambda w: opd.viz.TokenLens(w.rollout),
        "That is a rollout. Grade it first: opdlab.score(rollout, student, teacher).",
    ),
    (
        lambda w: opd.viz.TokenLens(w.distill()),
        "That is a training run. Take the trace of its last step, run.last.trace()",
    ),
    (lambda w: opd.viz.Audits(None), "Audits got trace=None"),
    (lambda w: opd.viz.Forks(None), "Forks got trace=None"),
    (lambda w: opd.viz.PrivilegeLens(None), "PrivilegeLens got trace=None"),
    (lambda w: opd.viz.Regimes(None), "Regimes got trace=None"),
    (lambda w: opd.viz.Rollouts(None), "Rollouts got trace=None"),
    (lambda w: opd.viz.TailAudit(None), "TailAudit got trace=None"),
    (lambda w: opd.viz.Timeline(None), "Timeline got trace=None"),
    (lambda w: opd.viz.Playground(trace=w.rollout), "Playground got trace=Rollout("),
    (
        lambda w: opd.viz.Playground(losses=3),
        "Playground got 3. Give a loss (a function of rows)",
    ),
    (lambda w: opd.viz.Playground(losses="nope"), "There is no divergence 'nope'."),
    (
        lambda w: opd.viz.Compare({"a": None, "b": None}),
        "Compare got {'a': …}=None. Use a Trace",
    ),
    (lambda w: opd.viz.Compare(None), "Compare got None. Give traces by name"),
    (lambda w: opd.viz.Scrubber([None]), "Scrubber got traces=[None]. Use traces by step"),
    (lambda w: opd.viz.Scrubber({1: None}), "Scrubber got {1: …}=None. Use a Trace"),
    (lambda w: opd.snapshots.rescore(None, w.rollout), "rescore got run=None. Use a Run"),
    (
        lambda w: opd.snapshots.rescore("runs/first", w.rollout),
        "Take the saved run up again: opdlab.resume('runs/first'",
    ),
    (
        lambda w: opd.snapshots.rewrite(w.distill(), "text"),
        "rewrite got prompts='text'.",
    ),
]


@pytest.mark.parametrize(("call", "says"), VIEWS, ids=[says[:50] for _, says in VIEWS])
def test_a_view_of_something_else_than_a_trace_is_refused(world, call, says):
    refused(lambda: call(world), says)
