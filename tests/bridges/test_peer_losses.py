"""The losses of the installed TRL through `conform`: what is right passes, what is not is named."""

import pytest

pytest.importorskip("trl", minversion="1.16")
trl_losses = pytest.importorskip("opdlab.bridges.trl_losses", exc_type=ImportError)

from opdlab.conformance import conform  # noqa: E402

CASES = {case.name.partition(" ")[2].partition(" ")[2]: case for case in trl_losses.cases()}


def test_every_trainer_is_there():
    for trainer in ("DistillationTrainer", "GKD", "GOLD", "SDFT", "SDPO"):
        assert any(name.startswith(trainer) for name in CASES)


@pytest.mark.parametrize(
    ("name", "mistakes"),
    [
        ("DistillationTrainer, reverse KL", []),
        ("DistillationTrainer, generalised JSD", []),
        ("GKD loss function, forward KL", []),
        ("GKD compute_loss, reverse KL", ["temperature_ignored"]),
        ("GOLD compute_loss, reverse KL", []),
        ("GOLD universal logits", ["mask_ignored"]),
        ("SDFT top-k, tail", []),
        ("SDFT sampled token", []),
        ("SDPO full logits, reverse KL", []),
    ],
)
def test_a_loss_of_trl(name, mistakes):
    report = conform(CASES[name])
    assert report.mistakes == mistakes, report
