"""What a method remembers between steps: saved by its own words, undone with a failed step, or said
to be lost.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

import opdlab as opd
from opdlab import errors
from opdlab.training import method_state, phases

OPTIONS = {"batch": 2, "steps": 4, "seed": 5, "lr": 1e-2, "quiet": True, "save_every": 2}
TASK = opd.tasks.from_records(
    [{"prompt": f"{name} has 4 7 apples"} for name in "ana ben cleo dan".split()],
    test=0,
    max_new_tokens=4,
)


class Running:
    """Weighs the loss by a running mean of the student's log-probs, and counts its steps."""

    needs = ("teacher",)

    def __init__(self) -> None:
        self.mean = torch.zeros(2)
        self.steps = 0

    def plan(self, batch):
        self.steps += 1
        self.mean = 0.5 * self.mean + 0.5 * batch.rollout.logp.mean()
        return {"scale": torch.full_like(batch.rollout.logp, 1 + self.steps + float(self.mean[0]))}

    def loss(self, rows):
        return rows.scale * opd.losses.reverse_kl(rows.student, rows.teacher)


class Kept(Running):
    def state_dict(self):
        return {
            "mean": self.mean,
            "steps": self.steps,
            "notes": {"names": ["a", None], "rate": 0.5},
        }

    def load_state_dict(self, state):
        assert state["notes"] == {"names": ["a", None], "rate": 0.5}
        self.mean, self.steps = state["mean"], state["steps"]


def train(make_policy, folder, method, **options) -> opd.Run:
    return opd.distill(
        make_policy(0), make_policy(1), TASK, method=method, save=folder, **{**OPTIONS, **options}
    ).train()


def resume(make_policy, folder, method, **options) -> opd.Run:
    return opd.resume(
        folder, make_policy(0), make_policy(1), TASK, method=method, quiet=True, **options
    )


def losses(run) -> list[float]:
    return run.history["loss"].tolist()


def test_a_state_that_is_kept_makes_the_resumed_run_exact(make_policy, tmp_path):
    whole = train(make_policy, tmp_path / "whole", Kept())
    train(make_policy, tmp_path / "parts", Kept(), steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = resume(make_policy, tmp_path / "parts", Kept(), steps=4).train()
    assert losses(again) == losses(whole)
    assert again.method.steps == 4
    one, two = (
        load_file(tmp_path / which / "step-000004" / "adapter_model.safetensors")
        for which in ("whole", "parts")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert {path.suffix for path in (tmp_path / "whole").rglob("*") if path.is_file()} == {
        ".safetensors",
        ".json",
    }


def test_a_state_that_is_not_kept_is_said_when_it_is_lost(make_policy, tmp_path):
    with pytest.warns(
        UserWarning,
        match=(
            r"Running keeps Running.mean, Running.steps from step to step, and checkpoints do not"
            r" hold that"
        ),
    ):
        train(make_policy, tmp_path, Running(), steps=2)
    with pytest.warns(
        UserWarning,
        match=r"Running had changed Running.mean, Running.steps by step 2.*state_dict\(\)",
    ):
        assert resume(make_policy, tmp_path, Running()).done == 2


class Still:
    """Holds lists and tensors, and changes none of them."""

    needs = ("teacher",)

    def __init__(self) -> None:
        self.weights = [0.1, 0.2]
        self.table = torch.ones(3)

    def loss(self, rows):
        return self.weights[0] * opd.losses.reverse_kl(rows.student, rows.teacher)


def test_what_does_not_change_is_no_state(make_policy, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(make_policy, tmp_path, Still(), steps=2)
        assert resume(make_policy, tmp_path, Still()).done == 2


def enclosed():
    seen, count = [], 0

    def plan(batch):
        nonlocal count
        count += 1
        seen.append(batch.rollout.tokens)
        return {"scale": torch.full_like(batch.rollout.logp, float(count))}

    @opd.method(needs=("teacher",), plan=plan)
    def loss(rows):
        return rows.scale * opd.losses.reverse_kl(rows.student, rows.teacher)

    return loss


def test_variables_of_an_enclosing_function_are_seen(make_policy, tmp_path):
    with pytest.warns(
        UserWarning,
        match=r"keeps count \(of enclosed.*plan\), seen \(of enclosed.*plan\) from step to step",
    ):
        train(make_policy, tmp_path, method := enclosed(), steps=2)
    for again in (enclosed(), method):  # in a new process, and in this one
        with pytest.warns(UserWarning, match="had changed count"):
            assert resume(make_policy, tmp_path, again).done == 2


COUNTS: dict[str, int] = {"steps": 0}


def counted_plan(batch):
    COUNTS["steps"] += 1
    return {"scale": torch.ones_like(batch.rollout.logp)}


def test_globals_are_seen(make_policy, tmp_path):
    method = opd.method(plan=counted_plan)(
        lambda rows: rows.scale * opd.losses.reverse_kl(rows.student, rows.teacher)
    )
    with pytest.warns(UserWarning, match=r"keeps COUNTS \(a global of counted_plan\)"):
        train(make_policy, tmp_path, method, steps=2)


def interrupt(run):
    raise KeyboardInterrupt


def test_a_failed_step_leaves_the_state_as_it_was(make_policy, monkeypatch):
    method = Kept()
    run = opd.distill(
        make_policy(0), make_policy(1), TASK, method=method, **{**OPTIONS, "save_every": 0}
    )
    with monkeypatch.context() as patched:
        patched.setattr(phases, "reduce_gradients", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(run)
    assert (method.steps, method.mean.tolist()) == (0, [0.0, 0.0])
    next(run)
    assert method.steps == 1


def test_the_state_of_a_module_is_kept(make_policy, tmp_path):
    class Critic(torch.nn.Module):
        needs = ("teacher",)

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Linear(1, 1)
            self.register_buffer("steps", torch.zeros(()))

        def plan(self, batch):
            self.steps += 1
            return {"scale": torch.full_like(batch.rollout.logp, float(self.steps))}

        def loss(self, rows):
            return rows.scale * opd.losses.reverse_kl(rows.student, rows.teacher)

    trained = Critic()
    train(make_policy, tmp_path, trained, steps=2)
    torch.manual_seed(3)
    again = resume(make_policy, tmp_path, Critic())
    assert torch.equal(again.method.scale.weight, trained.scale.weight)
    assert float(again.method.steps) == 2


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ([1], r"state_dict\(\) returned a list"),
        ({"a": (1, 2)}, r"state_dict\(\)\['a'\] is a tuple"),
        ({"a": {"b": object()}}, r"\['a'\]\['b'\] is a object"),
        ({1: 2}, "has the key 1. Use texts"),
        ({"a": {1: 2}}, "has the key 1. Use texts"),
    ],
)
def test_a_state_that_no_checkpoint_holds_is_refused(make_policy, state, said):
    method = Kept()
    method.state_dict = lambda: state
    with pytest.raises(errors.InvalidValue, match=said):
        opd.distill(make_policy(0), make_policy(1), TASK, method=method, quiet=True)


def test_half_a_protocol_is_refused(make_policy):
    method = Running()
    method.state_dict = dict
    with pytest.raises(errors.OpdlabError, match="Running has state_dict but no load_state_dict"):
        opd.distill(make_policy(0), make_policy(1), TASK, method=method, quiet=True)


def test_a_method_with_a_state_does_not_take_a_checkpoint_without(make_policy, tmp_path):
    train(make_policy, tmp_path / "with", Kept(), steps=1)
    said = pytest.raises(
        errors.OpdlabError, match="holds a state of the method, but Running has no state_dict"
    )
    with (
        said,
        pytest.warns(
            UserWarning,
            match="although the run was trained with the method .*Kept and .*Running is given",
        ),
    ):
        resume(make_policy, tmp_path / "with", Running(), allow="method")


def test_a_damaged_state_is_noticed(make_policy, tmp_path):
    train(make_policy, tmp_path, Kept(), steps=1)
    path = tmp_path / "step-000001" / method_state.FILE
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        errors.DamagedFile, match=r"method\.safetensors is missing or not what was written"
    ):
        resume(make_policy, tmp_path, Kept())
    assert method_state.FILE in json.loads((tmp_path / "step-000001" / "manifest.json").read_text())
