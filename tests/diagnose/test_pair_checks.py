"""What can be told of a pair without running it: the same judgement as the check that distill
makes, but all of it at once.
"""

from __future__ import annotations

import pytest

from opdlab import Prompt
from opdlab.diagnose.pair_checks import (
    check_heads,
    check_pair,
    check_room,
    check_stops,
    check_templates,
    check_tokens,
)
from opdlab.errors import TokenizerMismatch
from opdlab.models.same_tokens import check_same_tokens, compare_chats

OTHER = "{% for m in messages %}({{ m['role'] }}) {{ m['content'] }} {% endfor %}"
CHATS = [Prompt(messages=({"role": "user", "content": "a b"},))]


@pytest.fixture(scope="module")
def pairs(make_policy, make_tokenizer) -> dict:
    """A student, and teachers that differ from it in one thing each."""
    same = make_tokenizer()
    return {
        "student": make_policy(0, same),
        "same": make_policy(1, make_tokenizer()),
        "padded": make_policy(1, make_tokenizer(), vocab=32),
        "letters": make_policy(1, make_tokenizer("a b c d e g")),
        "longer": make_policy(1, make_tokenizer("a b c d e f g")),
        "eos": make_policy(1, make_tokenizer(), eos=[0]),
        "more eos": make_policy(1, make_tokenizer(), eos=[0, 1]),
        "template": make_policy(1, make_tokenizer(template=OTHER)),
        "words": make_policy(1),
    }


@pytest.mark.parametrize(
    "name", ["same", "padded", "letters", "longer", "eos", "more eos", "template", "words"]
)
def test_it_stops_exactly_what_distill_refuses(name, pairs):
    checks = check_pair(pairs["student"], pairs[name], CHATS, 4)
    stopped = any(check.state == "stop" for check in checks)
    try:
        check_same_tokens(pairs["student"], pairs[name])
    except TokenizerMismatch:
        assert stopped
    else:
        assert not stopped
        assert name in ("same", "padded")
    assert all(check.remedy for check in checks if check.state == "stop")


def test_the_first_different_id_is_named(pairs):
    check = check_tokens(pairs["student"], pairs["letters"])
    assert (
        "id 11 is 'f' in the student and 'g' in the teacher; 1 of 12 ids differ, 11 strings are in"
        " both" in check.finding
    )
    assert "OmniOPD, SequenceKD" in check.remedy
    assert (
        "id 12 is None in the student and 'g' in the teacher"
        in check_tokens(pairs["student"], pairs["longer"]).finding
    )


def test_stop_tokens_are_compared_as_sets(pairs):
    check = check_stops(pairs["student"], pairs["more eos"])
    assert check.state == "stop"
    assert "the student ends with '[eos]', the teacher with '[pad]', '[eos]'" in check.finding
    assert (
        check_stops(pairs["student"], pairs["words"]).state == "note"
    )  # another vocabulary: said once, by the tokens


def test_a_student_without_a_stop_token_is_warned_about(make_policy, make_tokenizer):
    endless = make_policy(0, make_tokenizer(), eos=[])
    assert check_stops(endless, endless).state == "warn"
    assert "every text runs to the limit" in check_stops(endless, endless).finding


def test_templates_side_by_side_with_the_first_difference(pairs, make_policy, make_tokenizer):
    both = compare_chats(pairs["student"], pairs["template"])
    assert both.at == 0
    assert both.student.startswith("[user] a")
    assert both.teacher.startswith("(user) a")
    late = make_tokenizer(
        template=(
            "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[assistant]!"
        )
    )
    check = check_templates(pairs["student"], make_policy(1, late), CHATS)
    both = compare_chats(pairs["student"], make_policy(1, late))
    assert both.student[: both.at] == both.teacher[: both.at]
    assert both.student[both.at :] == ""
    assert both.teacher[both.at :] == "!"
    assert check.state == "stop"
    assert "tokenizer=student.tokenizer" in check.remedy
    assert compare_chats(pairs["student"], pairs["same"]).at is None


def test_the_arguments_of_a_template_count(make_policy, make_tokenizer):
    """As in `distill`: one reads an empty thought before its answer, and the other does not."""
    thinking = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
        "{% if think %}!{% endif %}"
    )
    student = make_policy(0, make_tokenizer(template=thinking))
    plain = make_policy(1, make_tokenizer(template=thinking))
    told = plain.with_template(think=True)
    assert check_templates(student, plain, CHATS).state == "ok"
    check = check_templates(student, told, CHATS)
    assert check.state == "stop"
    assert "same chat_template_kwargs" in check.remedy
    with pytest.raises(TokenizerMismatch, match="chat template differs"):
        check_same_tokens(student, told)
    # one model may read two forms
    assert check_templates(plain, told, CHATS).state == "note"
    check_same_tokens(plain, told)


def test_chats_need_a_template(make_policy, make_tokenizer):
    plain = make_policy(0, make_tokenizer(template=None))
    assert check_templates(plain, plain, CHATS).state == "stop"
    assert "has no chat template" in check_templates(plain, plain, CHATS).finding
    assert check_templates(plain, plain, [Prompt("a")]).state == "ok"


def test_padding_rows_are_noted_and_cut(pairs):
    assert check_heads(pairs["student"], pairs["same"]).state == "ok"
    check = check_heads(pairs["student"], pairs["padded"])
    assert check.state == "note"
    assert "12 and 32, of which 0 and 20 stand for no token" in check.finding


def test_room_counts_the_teachers_own_prompt(pairs):
    fits = check_room(pairs["student"], pairs["same"], CHATS, 252)
    assert fits.state == "ok"
    assert "prompts of up to 4 tokens and 252 to come, in a context of 256" in fits.finding
    assert check_room(pairs["student"], pairs["same"], CHATS, 253).state == "stop"
    told = check_room(pairs["student"], pairs["same"].seeing("a b c d e f"), CHATS, 251)
    assert told.state == "stop"
    assert "up to 4 (11 for the teacher) tokens" in told.finding
