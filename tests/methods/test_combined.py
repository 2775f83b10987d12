"""A combined method trains exactly the weighted sum of its parts, wherever these stand."""

from __future__ import annotations

import warnings

import pytest
import torch

import opdlab as opd
from opdlab import exact
from opdlab.errors import BadLoss, BadPlan, InvalidValue, UnknownOption
from opdlab.methods.by_name import make_method
from opdlab.training import method_state

SHAPE = {"vocab": 4, "length": 2, "prompts": 2}
TABLES = {
    name: exact.Table.random(**SHAPE, seed=seed)
    for seed, name in enumerate(("student", "teacher", "reference"))
}


def group(n: int = 4) -> tuple[opd.Rollout, torch.Tensor]:
    """`n` completions of each prompt, as a step has them, with a weight each."""
    rollout = exact.everything(TABLES["student"].prompts, 4, 2, by=TABLES["student"])
    rows = [*range(n), *range(16, 16 + n)]  # 16 texts of two tokens follow each of the prompts
    chosen = rollout.select(rows)
    object.__setattr__(chosen, "n", n)
    return chosen, torch.linspace(0.5, 1.5, 2 * n, dtype=torch.float64)


def judge(prompt: opd.Prompt, text: str) -> float:
    return float(len(text) % 3) / 2


TASK = opd.tasks.from_records([{"prompt": "a"}] * 3, test=0, max_new_tokens=2, verify=judge)
PAIRS = {
    "disjoint needs": (opd.OPD(), opd.GRPO()),
    "shared needs": (opd.OPD("forward_kl"), opd.OPD(estimator="sampled", discount=1.0)),
    "overlapping needs": (opd.GOPD(), opd.OPD("jensen_shannon")),
    "two of one kind": (opd.OPD(estimator="sampled"), opd.OPD(estimator="sampled", discount=0.5)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_gradient_is_the_weighted_sum(name):
    rollout, weight = group()
    texts = tuple("ab"[: row % 3] + "c" * (row % 2) for row in range(len(rollout)))
    object.__setattr__(rollout, "texts", texts)
    on = lambda method: exact.gradient_on(method, TABLES, rollout, weight, task=TASK)
    one, two = PAIRS[name]
    parts = [on(one), on(two)]
    assert all(part.norm() > 1e-3 for part in parts)
    got = on(opd.Combined(one, two, weights=(0.7, -0.2)))
    torch.testing.assert_close(got, 0.7 * parts[0] - 0.2 * parts[1], rtol=1e-12, atol=1e-14)


def test_a_training_step_moves_by_the_weighted_sum():
    """Through the backbone, with micro-batches, from one rollout."""
    gradients = {}
    for name, method in {
        "opd": opd.OPD(),
        "grpo": opd.GRPO(),
        "both": opd.Combined(opd.OPD(), opd.GRPO(), weights=(1, 0.25)),
    }.items():
        student, teacher, task = opd.load("market")
        options = {"batch": 3, "n": 4, "seed": 3, "temperature": 2.0, "micro_batch": 5, "clip": 0}
        run = opd.distill(student, teacher, task, method=method, steps=1, quiet=True, **options)
        next(run)
        gradients[name] = torch.cat([p.grad.flatten() for p in run.parameters.values()])
    want = gradients["opd"] + 0.25 * gradients["grpo"]
    assert gradients["grpo"].norm() > 1e-3
    torch.testing.assert_close(gradients["both"], want, rtol=1e-4, atol=1e-6)


def test_it_reads_and_asks_for_what_its_parts_do():
    method = opd.Combined(opd.GOPD(), opd.GRPO(), opd.DOPD)
    assert method.needs == tuple(dict.fromkeys((*opd.GOPD().needs, *opd.DOPD().needs)))
    assert (method.verifies, method.least_n, method.on_policy) == (True, 2, 1.0)
    assert method.recipe == {"normalize": "sequence"}
    assert list(method.parts) == ["gopd", "grpo", "dopd"]
    first_counts = opd.Combined(opd.TOPD(), opd.DOPD())
    assert first_counts.recipe == {"normalize": "token"}


def test_columns_and_notes_carry_the_name_of_their_method():
    student, _, task = opd.load("market")
    method = opd.Combined(opd.OPD(estimator="sampled"), opd.SpanOPD(), opd.GRPO())
    teacher = student.frozen().seeing("1 + 1 = 2")
    run = opd.distill(student, teacher, task, method=method, steps=1, batch=2, n=2, quiet=True)
    trace = next(run).trace()
    assert {"opd_advantage", "spanopd_advantage", "grpo_advantage"} <= set(trace.meta["plan"])
    assert "alignments" in next(iter(trace.meta["notes"].values()))


def test_functions_and_classes_are_parts_too():
    def my(rows):
        return -rows.logp

    def my_loss(rows):
        return opd.losses.forward_kl(rows.student, rows.teacher)

    method = opd.Combined(my, my_loss, opd.OPD, lambda rows: rows.logp)
    assert list(method.parts) == ["my", "my_loss", "opd", "lambda"]
    rollout, weight = group()
    on = lambda one: exact.gradient_on(one, TABLES, rollout, weight)
    want = on(my) + on(my_loss) + on(opd.OPD()) - on(my)
    torch.testing.assert_close(on(method), want)


def test_a_weight_of_zero_trains_nothing_even_where_the_loss_is_infinite():
    rollout, weight = group()
    broken = lambda rows: rows.logp * float("inf")
    on = lambda one: exact.gradient_on(one, TABLES, rollout, weight)
    got = on(opd.Combined(opd.OPD(), broken, weights=(1, 0)))
    torch.testing.assert_close(got, on(opd.OPD()))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidValue, match="two or more"):
        opd.Combined(opd.OPD())
    for weights in ((1,), (1, float("nan")), (0, 0), (True, 1), "11", 3):
        with pytest.raises(InvalidValue, match="one finite number for each"):
            opd.Combined(opd.OPD(), opd.GRPO(), weights=weights)
    with pytest.raises(InvalidValue, match=r"from -1e\+06 to 1e\+06: .* range of float32"):
        opd.Combined(opd.OPD(), opd.GRPO(), weights=(1e308, 1e308))
    with pytest.raises(InvalidValue, match=r"share of 1 .* SFT, which wants 0 and 'answer'"):
        opd.Combined(opd.OPD(), opd.SFT())
    with pytest.raises(InvalidValue, match="Combined got 3"):
        opd.Combined(opd.OPD(), 3)
    opd.Combined(opd.OPD(on_policy=0.5), opd.OPD("forward_kl", on_policy=0.5))


def test_a_loss_of_another_shape_is_named():
    wide = lambda rows: rows.student
    rollout, weight = group()
    with pytest.raises(BadLoss, match="loss of lambda returned"):
        exact.gradient_on(opd.Combined(opd.OPD(), wide), TABLES, rollout, weight)
    planless = opd.method(plan=lambda batch: 3)(lambda rows: -rows.logp)
    with pytest.raises(BadPlan, match="plan of lambda returned int"):
        exact.gradient_on(opd.Combined(opd.OPD(), planless), TABLES, rollout, weight)


class Counting:
    """Counts its steps, and says so in its state."""

    needs = ("teacher",)

    def __init__(self) -> None:
        self.steps = torch.zeros(())

    def plan(self, batch):
        self.steps += 1
        return {"scale": torch.full_like(batch.rollout.logp, float(self.steps))}

    def loss(self, rows):
        return rows.scale * opd.losses.reverse_kl(rows.student, rows.teacher)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"].clone()


def test_a_resumed_run_goes_on_with_the_state_of_each_part(tmp_path):
    def make():
        return opd.Combined(Counting(), opd.Combined(opd.GRPO(), Counting()), weights=(1, 0.5))

    options = {"batch": 2, "n": 2, "seed": 5, "quiet": True, "max_new_tokens": 6}
    student, teacher, task = opd.load("market")
    whole = opd.distill(student, teacher, task, method=make(), steps=4, **options).train()
    student, teacher, task = opd.load("market")
    opd.distill(
        student, teacher, task, method=make(), steps=4, save=tmp_path, save_every=2, **options
    ).train()
    student, teacher, task = opd.load("market")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = opd.resume(
            tmp_path, student, teacher, task, method=make(), step=2, save=tmp_path / "b", quiet=True
        )
        assert float(again.method.methods[0].steps) == 2
        again.train()
    assert again.history["loss"].tolist() == whole.history["loss"].tolist()
    other = opd.Combined(Counting(), opd.Combined(opd.GRPO(), Counting()), weights=(1, 0.4))
    student, teacher, task = opd.load("market")
    with pytest.raises(opd.OpdlabError, match="method"):
        opd.resume(tmp_path, student, teacher, task, method=other, quiet=True)


def test_state_that_a_part_does_not_save_is_noticed():
    class Silent(Counting):
        state_dict = load_state_dict = None

    silent = Silent()
    memory = method_state.Memory(opd.Combined(Counting(), silent))
    silent.steps = torch.ones(())
    assert memory.moved() == ["silent: Silent.steps"]


def test_a_config_makes_it():
    table = {
        "methods": [{"name": "opd", "divergence": "forward_kl"}, {"name": "grpo"}],
        "weights": [1, 0.5],
    }
    made = make_method("combined", table)
    assert made == opd.Combined(opd.OPD("forward_kl"), opd.GRPO(), weights=(1, 0.5))
    with pytest.raises(UnknownOption, match="weight'"):
        make_method("combined", {**table, "weight": 1})
    with pytest.raises(InvalidValue, match="list of tables"):
        make_method("combined", {"methods": ["opd", "grpo"]})
    with pytest.raises(UnknownOption, match=r"methods\[0\] has 'divergenc'"):
        make_method("combined", {"methods": [{"name": "opd", "divergenc": "x"}]})
