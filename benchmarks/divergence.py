"""Measure forward and backward of a divergence alone: hidden states and heads in, gradients out.

The sides are opdlab's engine (with built-in divergences, and with a row function in plain PyTorch),
TRL's chunked kernel, autograd on full logits, and the bare matrix products, which are the lower
bound. `python -m benchmarks.divergence CASE` measures one case and prints a JSON line.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import STUDENT, TEACHER, VOCAB, device, measured
from opdlab import OPD
from opdlab.engine import signals
from opdlab.engine.closed_form import closed_form_of
from opdlab.engine.passes import gradient
from opdlab.engine.rows import Rows
from opdlab.methods.contract import Method
from opdlab.methods.conversion import as_method
from opdlab.models.graded import States
from opdlab.models.head import Head

TOKENS, ITERATIONS = 1024, 4  # the first iteration is a warm-up
LARGE_VOCAB = 151_936  # that of Qwen


def own_function(rows: Rows) -> Tensor:
    """The reverse KL as a user would write it."""
    return (rows.student.exp() * (rows.student - rows.teacher)).sum(-1)


METHODS: dict[str, Method] = {
    "own function": as_method(own_function),
    "reverse_kl": OPD("reverse_kl"),
    "jensen_shannon": OPD("jensen_shannon"),
    "forward_kl": OPD("forward_kl"),
}
BETA = {"forward_kl": 0.0, "jensen_shannon": 0.5, "reverse_kl": 1.0}  # TRL's names for them


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        side: Who computes: "opdlab", "trl", "liger", "full logits" or "products".
        loss: A name in `METHODS`.
        trainable: Whether the student's head gets a gradient.
        tokens: Number of tokens.
        watch: Whether opdlab also notes what a training step watches (`signals.watched`).
        vocab: Number of tokens of the vocabulary.
    """

    side: str
    loss: str = "reverse_kl"
    trainable: bool = True
    tokens: int = TOKENS
    watch: bool = False
    vocab: int = VOCAB

    @property
    def name(self) -> str:
        parts = [
            self.side,
            self.loss,
            "trainable" if self.trainable else "frozen",
            str(self.tokens),
            *["watched"] * self.watch,
            *[f"V={self.vocab}"] * (self.vocab != VOCAB),
        ]
        return "/".join(parts)


CASES = {
    case.name: case
    for case in [
        *(
            Case(side, trainable=t)
            for t in (True, False)
            for side in ("products", "opdlab", "full logits", "trl")
        ),
        *(Case("opdlab", "own function", t) for t in (True, False)),
        *(Case("opdlab", trainable=t, watch=True) for t in (True, False)),
        *(
            Case(side, loss)
            for loss in ("jensen_shannon", "forward_kl")
            for side in ("opdlab", "trl")
        ),
        *(Case(side, tokens=n) for n in (256, 4096) for side in ("opdlab", "trl")),
        *(
            Case(side, trainable=False, tokens=4096, vocab=LARGE_VOCAB)
            for side in ("products", "opdlab")
        ),
    ]
}


@dataclass
class Problem:
    """Hidden states and heads of both models; all gradients are made anew in every iteration."""

    student: Tensor
    teacher: Tensor
    student_head: Tensor
    teacher_head: Tensor
    is_checked: bool = False  # as in a run, the first pass alone checks what the loss depends on

    @classmethod
    def of(
        cls,
        case: Case,
        widths: tuple[int, int] = (STUDENT["hidden_size"], TEACHER["hidden_size"]),
        dtype: torch.dtype = torch.float32,
    ) -> Problem:
        torch.manual_seed(0)
        options: dict[str, Any] = {"device": device(), "dtype": dtype}
        student, teacher = (torch.randn(case.tokens, width, **options) for width in widths)
        student_head, teacher_head = (
            0.02 * torch.randn(case.vocab, width, **options) for width in widths
        )
        return cls(
            student.requires_grad_(),
            teacher,
            student_head.requires_grad_(case.trainable),
            teacher_head,
        )

    def solve(self, case: Case) -> float:
        """The mean divergence; its gradients are left in `.grad`."""
        self.student.grad = self.student_head.grad = None
        solvers = {
            "opdlab": self._opdlab,
            "trl": self._trl,
            "full logits": self._full,
            "products": self._products,
            "liger": self._liger,
        }
        return solvers[case.side](case).item()

    def _opdlab(self, case: Case) -> Tensor:
        states = {
            "student": States(self.student, Head(self.student_head, None, case.vocab)),
            "teacher": States(self.teacher, Head(self.teacher_head, None, case.vocab)),
        }
        token = torch.zeros(case.tokens, dtype=torch.long, device=device())
        weight = torch.full((case.tokens,), 1 / case.tokens, device=device())
        method = METHODS[case.loss]
        result = gradient(
            method.loss,
            states,
            token,
            weight,
            watch=signals.watched if case.watch else None,
            check=not self.is_checked,
            closed_form=closed_form_of(method),
        )
        self.is_checked = True
        self.student.grad = result.gradient.to(self.student.dtype)  # as a step does
        return result.loss.mean()

    def _trl(self, case: Case) -> Tensor:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        mask = torch.ones(1, case.tokens, device=device())
        states = self.student[None], self.teacher[None], self.student_head, self.teacher_head
        loss: Tensor = _chunked_divergence_loss(*states, mask, BETA[case.loss])[0]
        loss.backward()
        return loss

    def _liger(self, case: Case) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        made = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[case.loss]
        )
        label = torch.zeros(case.tokens, dtype=torch.long, device=device())
        loss: Tensor = made(self.student, self.student_head, self.teacher, self.teacher_head, label)
        loss.backward()
        return loss

    def _full(self, case: Case) -> Tensor:
        student = (self.student @ self.student_head.T).float().log_softmax(-1)
        teacher = (self.teacher @ self.teacher_head.T).float().log_softmax(-1)
        loss = (student.exp() * (student - teacher)).sum(-1).mean()
        loss.backward()
        return loss

    @torch.no_grad()
    def _products(self, case: Case) -> Tensor:
        """Both heads forward and the student's backward, in chunks; no softmax, no loss."""
        head = self.student_head
        head.grad = torch.zeros_like(head) if case.trainable else None
        size = 128 if device().type == "cpu" else 2048
        for i in range(0, case.tokens, size):
            logits = self.student[i : i + size] @ head.T
            other = self.teacher[i : i + size] @ self.teacher_head.T
            if head.grad is not None:
                head.grad.addmm_(logits.T, self.student[i : i + size])
            logits @ head
            del other
        return torch.tensor(float("nan"))


def measure(name: str) -> dict[str, object]:
    """Measure one case in this process; see `measure_case`."""
    case = CASES[name]
    return measure_case(case, Problem.of(case), ITERATIONS if case.vocab == VOCAB else 2)


def measure_case(case: Case, problem: Problem, iterations: int) -> dict[str, object]:
    """Solve a problem several times.

    Returns:
        The seconds of every iteration, the largest peak, and the divergence, on which all sides
        should agree.
    """
    costs, value = [], float("nan")
    for _ in range(iterations):
        with measured() as cost:
            value = problem.solve(case)
        costs.append(cost)
    return {
        **asdict(case),
        "seconds": [c.seconds for c in costs[1:]],
        "peak_mib": max(c.peak_mib for c in costs),
        "value": value,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1])))
