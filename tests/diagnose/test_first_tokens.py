"""The check "in reach", on one token of which student and teacher are known."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from opdlab.diagnose.checks import Check
from opdlab.diagnose.doctor import recommend
from opdlab.diagnose.first_tokens import FirstTokens, measure_pulls
from opdlab.engine.rows import Rows


def look(student: float, teacher: float) -> FirstTokens:
    """First tokens of one prompt: one, to which the two give these probabilities."""
    log_probs = [torch.tensor([[p, 1 - p]], dtype=torch.float64).log() for p in (student, teacher)]
    rows = Rows(dict(zip(("student", "teacher"), log_probs, strict=True)), torch.tensor([0]), {})
    columns = {name: value.detach().numpy() for name, value in measure_pulls(rows).items()}
    return FirstTokens(pd.DataFrame({"prompt": [0], "position": [0], "text": ["{"], **columns}))


@pytest.mark.parametrize(
    ("student", "teacher", "state"),
    [
        (1e-6, 0.9, "warn"),
        (9e-5, 0.9, "warn"),
        (2e-3, 0.9, "note"),
        (5e-2, 0.9, "ok"),
        (0.9, 0.95, "ok"),
        (5e-3, 6e-3, "ok"),  # the teacher does not want it either, so no divergence pulls
    ],
)
def test_the_rarer_the_token_the_graver_the_finding(student, teacher, state):
    assert look(student, teacher).check().state == state


def test_a_rare_token_speaks_for_forward_kl():
    found = look(2e-3, 0.9)
    pulls = found.pulls
    share = pulls["reverse_kl"] / pulls["forward_kl"]
    assert 0.005 < share < 0.1
    assert f"reverse KL pulls on it {share:.1%} as hard as forward KL" in found.check().finding
    fine = Check("overlap", "ok", "")
    assert recommend([fine, found.check()]) == 'method=opd.OPD("forward_kl")'
    assert recommend([fine, look(0.5, 0.9).check()]) == 'method=opd.OPD("reverse_kl")'
    mend = Check("overlap", "warn", "")
    assert recommend([mend, found.check()]) == 'method=opd.OPD("forward_kl", on_policy=0.5)'
