"""The picture of controls: what it says of seeds, marks and the share is what the arms have."""

from __future__ import annotations

from dataclasses import replace

import pytest

import opdlab as opd
from opdlab.evidence.controls import Controls
from opdlab.viz import Arms

SCORES = {"teacher": 18, "no_teacher": 4, "sign": 11}  # right answers of 20


def controls(**seeds: int) -> Controls:
    """Controls of these arms, each with that many seeds."""
    found = Arms.example().controls.to_json()
    example = dict(found["arms"])
    found["arms"] = {
        name: {
            **example[name],
            "seeds": list(range(count)),
            "greedy": [[float(p < SCORES[name]) for p in range(20)]] * count,
            "sampled": [[None] * 20] * count,
            "tokens": [100] * count,
            "seconds": [1] * count,
        }
        for name, count in seeds.items()
    }
    return opd.Controls.from_json(found)


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ({"teacher": 10, "no_teacher": 3}, "20 prompts and 3 to 10 seeds."),
        ({"teacher": 3, "no_teacher": 10}, "20 prompts and 3 to 10 seeds."),
        ({"teacher": 3, "no_teacher": 3}, "20 prompts and 3 seeds."),
        ({"teacher": 1, "no_teacher": 1}, "20 prompts and 1 seed."),
    ],
)
def test_the_caption_counts_the_seeds_of_every_arm(seeds, said):
    picture = Arms(controls(**seeds))
    assert said in picture.html()
    assert said in repr(picture)


def test_the_legend_names_only_signs_that_are_drawn():
    part = "with part of the teacher"
    with_part = Arms(controls(teacher=2, no_teacher=2, sign=2)).html()
    without_part = Arms(controls(teacher=2, no_teacher=2)).html()
    assert part in with_part
    assert part not in without_part
    assert "without a teacher" in without_part
    assert "without a teacher" not in Arms(controls(teacher=2, sign=2), share=False).html()


def test_the_scale_has_numbers_at_their_places():
    html = Arms(controls(teacher=2, no_teacher=2)).html()
    for place, number in (("0.00%", "0"), ("50.00%", "0.5"), ("100.00%", "1")):
        assert f'style="left:{place}">{number}</i>' in html


def test_the_share_can_be_left_out():
    found = controls(teacher=2, no_teacher=2)
    share = "of the gain is due to the teacher"
    for picture, is_said in ((Arms(found), True), (Arms(found, share=False), False)):
        assert (share in picture.html()) is is_said
        assert (share in repr(picture)) is is_said
    lone = replace(found, arms={"teacher": found.arms["teacher"]})
    assert "teacher-free" not in Arms(lone, share=False).html()
