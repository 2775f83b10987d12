"""Columns of a plan: which names and numbers are taken, and what is refused in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opdlab import Task, Trace, distill, method
from opdlab.engine.batch import Batch
from opdlab.engine.planned import run_plan
from opdlab.errors import BadPlan, OpdlabError
from opdlab.losses.divergences import reverse_kl


@pytest.fixture(scope="module")
def batch(student, teacher, prompts) -> Batch:
    rollout = student.sample(prompts, n=2, max_new_tokens=10, seed=1)
    return Batch(rollout, {"student": student, "teacher": teacher})


class Planned:
    """A method whose plan is given."""

    needs = ("teacher",)

    def __init__(self, plan):
        self.plan = plan

    def loss(self, rows):
        return reverse_kl(rows.student, rows.teacher)


@pytest.mark.parametrize(
    "name",
    [
        "run",
        "step",
        "sample",
        "prompt",
        "position",
        "token_id",
        "loss",
        "grad_norm",
        "share",
        "support",
        "student_logp",
        "teacher_logp",
        "teacher_entropy",
        "teacher_reverse_kl",
        "teacher_top",
        "teacher_tail",
        "student_rank",
        "reference_logp",
        "ema_forward_kl",
        "teacher_coarse_reverse_kl",
        "token",
        "logp",
        "logp_of",
        "on",
        "columns",
        "distributions",
        "student",
        "teacher",
        "",
        " ",
        "a b",
        "2nd",
        "a-b",
        "__len__",
        "teacher+hint_logp",
        "é!",
        3,
        None,
        ("a",),
    ],
)
def test_a_name_that_means_something_else_is_refused(batch, name):
    with pytest.raises(BadPlan, match=r"column named .* a loss|column of every trace"):
        run_plan(Planned(lambda b: {name: torch.zeros(b.mask.shape)}), batch)


@pytest.mark.parametrize(
    "name",
    [
        "route",
        "advantage",
        "gap",
        "windows",
        "notes",
        "values",
        "keys",
        "lambda",
        "étoile",
        "_mine",
        "my_loss",
        "sampler_logp",
    ],
)
def test_any_other_name_is_taken(batch, name):
    assert list(run_plan(Planned(lambda b: {name: torch.zeros(b.mask.shape)}), batch).columns) == [
        name
    ]


@pytest.mark.parametrize(
    ("column", "want"),
    [
        (lambda m: m, 1),
        (lambda m: m.bfloat16(), 1.0),
        (lambda m: m.half(), 1.0),
        (lambda m: m.double(), 1.0),
        (lambda m: m.int(), 1),
        (lambda m: m.to(torch.uint8), 1),
        (lambda m: m.to(torch.uint16), 1),
        (lambda m: m.numpy(), 1),
        (lambda m: m.numpy().astype(np.float16), 1.0),
        (lambda m: m.numpy().astype(">f4"), 1.0),
        (lambda m: m.float().numpy()[::-1], 1.0),
        (lambda m: torch.ones(len(m)), 1.0),
        (lambda m: np.ones(len(m)), 1.0),
        (lambda m: 1.0, 1.0),
        (lambda m: 1, 1),
        (lambda m: True, 1),
        (lambda m: np.float32(1), 1.0),
        (lambda m: np.bool_(True), 1),
        (lambda m: m.double().requires_grad_(), 1.0),
    ],
)
def test_numbers_of_every_kind_reach_loss_and_trace_unchanged(batch, column, want, tmp_path):
    """All columns are 1 on every token, however they are given."""
    ones = torch.ones(batch.mask.shape, dtype=torch.bool)
    got = run_plan(Planned(lambda b: {"x": column(ones)}), batch).columns["x"]
    assert got.shape == (batch.rollout.tokens,)
    assert not got.requires_grad
    assert got.dtype not in (torch.bfloat16, torch.float16, torch.uint16)
    assert bool((got == want).all())


@pytest.mark.parametrize("kind", ["bool", "uint8", "int32", "int64", "float32", "float64"])
@pytest.mark.parametrize("width", [None, 1, 3])
def test_columns_of_every_type_survive_the_file(
    make_policy, teacher, prompts, kind, width, tmp_path
):
    dtype = getattr(torch, kind)

    def plan(b):
        values = torch.arange(b.mask.numel()).view(b.mask.shape) % 2
        return {
            "x": (
                (values if width is None else values[..., None].expand(*b.mask.shape, width)).to(
                    dtype
                )
            )
        }

    task = Task("some", lambda n, seed, split: prompts[:n])
    step = next(
        distill(
            make_policy(0),
            teacher,
            task,
            method=Planned(plan),
            steps=1,
            batch=2,
            max_new_tokens=5,
            quiet=True,
        )
    )
    trace = step.trace()
    again = Trace.load(trace.save(tmp_path / "t.parquet"))
    want = step.plan["x"].numpy()
    for some in (trace, again):
        assert np.array_equal(some.column("x"), want)
        assert some.column("x").dtype == want.dtype


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (lambda m: m + 0j, "complex"),
        (lambda m: m.to_sparse(), "sparse"),
        (lambda m: m.to("meta"), "meta"),
        (lambda m: "text", "'text'"),
        (lambda m: None, "None"),
        (lambda m: m.tolist(), "list"),
        (lambda m: np.array(["a"] * len(m)), "numpy array of <U1"),
        (lambda m: np.zeros(m.shape, object), "numpy array of object"),
        (lambda m: 1j, "complex"),
        (lambda m: m.T.float(), r"shape \[10, 8\]"),
        (lambda m: m[None].float(), r"shape \[1, 8, 10\]"),
        (lambda m: m.sum(), r"shape \[\]"),
        (lambda m: m[:, 0].repeat(9), r"shape \[72\].*batch.spread"),
        (lambda m: torch.zeros(*m.shape, 2, 2), r"shape \[8, 10, 2, 2\]"),
    ],
)
def test_what_is_no_column_is_refused_in_words(batch, column, said):
    with pytest.raises(BadPlan, match=f"plan returned column 'x'.*{said}"):
        run_plan(Planned(lambda b: {"x": column(b.mask.float())}), batch)


@pytest.mark.parametrize("plan", [[1], 0.5, None, "columns", torch.zeros(3), (("x", 1),)])
def test_a_plan_that_gives_no_columns_by_name_is_refused(batch, plan):
    with pytest.raises(BadPlan, match=r"plan returned .* Return columns by name"):
        run_plan(Planned(lambda b: plan), batch)


def test_no_plan_and_an_empty_one_give_no_columns(batch):
    assert run_plan(object(), batch).columns == {}
    assert run_plan(Planned(lambda b: {}), batch).columns == {}


def write_ids(batch):
    batch.rollout.ids[0, 0] += 1


def write_ids_past_autograd(batch):
    batch.rollout.ids.data[0, 0] += 1


def write_logp(batch):
    batch.rollout.logp.mul_(2)


def replace_rollout(batch):
    batch.rollout = batch.rollout.select([0])


@pytest.mark.parametrize(
    "change", [write_ids, write_ids_past_autograd, write_logp, replace_rollout]
)
def test_a_plan_that_changes_the_rollout_is_refused(student, teacher, prompts, change):
    batch = Batch(
        student.sample(prompts, max_new_tokens=6, seed=1), {"student": student, "teacher": teacher}
    )
    with pytest.raises(BadPlan, match=r"changed batch\.rollout.*clone"):
        run_plan(Planned(lambda b: change(b) or {}), batch)


def test_notes_are_plain_data_afterwards(batch):
    def plan(b):
        b.notes = {"mean": torch.tensor(0.5), "ids": np.arange(2), 3: {"deep": (1, None, "a")}}
        return {}

    planned = run_plan(Planned(plan), batch)
    assert planned.notes == {"mean": 0.5, "ids": [0, 1], "3": {"deep": [1, None, "a"]}}


def test_notes_that_no_file_can_hold_are_refused(student, prompts):
    batch = Batch(student.sample(prompts, max_new_tokens=2, seed=1), {"student": student})
    with pytest.raises(BadPlan, match=r"batch\.notes at deep\.x\[1\].*Notes hold"):
        run_plan(Planned(lambda b: b.notes.update(deep={"x": [0, student]}) or {}), batch)


def test_a_nan_that_the_loss_reads_is_named_and_one_that_it_does_not_read_is_kept(
    make_policy, teacher, prompts
):
    task = Task("some", lambda n, seed, split: prompts[:n])
    holes = lambda b: {"weight": torch.full(b.mask.shape, float("nan"))}
    run = lambda m: distill(
        make_policy(0), teacher, task, method=m, steps=1, batch=2, max_new_tokens=4, quiet=True
    )
    step = next(run(Planned(holes)))
    assert bool(step.plan["weight"].isnan().all())

    @method(plan=holes)
    def reads(rows):
        return rows.weight * reverse_kl(rows.student, rows.teacher)

    with pytest.raises(
        OpdlabError,
        match=(
            r"Step 1, .*The plan's column 'weight' is nan here\. Return finite numbers from plan\."
        ),
    ):
        next(run(reads))


def test_what_a_plan_raises_says_in_which_step(batch):
    def plan(b):
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        run_plan(Planned(plan), batch)
    assert getattr(caught.value, "__notes__", ["Raised by the plan of Planned in step 1."]) == [
        "Raised by the plan of Planned in step 1."
    ]
