"""Conversations given as messages: the ids are the template's, and the assistant's are learned."""

from __future__ import annotations

import json

import pytest
import torch

import opdlab as opd
from opdlab.data.conversation import FinalText, messages_of
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.tasks import from_records, market
from opdlab.tasks.market import model
from opdlab.teachers import TextOnly


@pytest.fixture(scope="module")
def task() -> opd.Task:
    return market(tools=True)


@pytest.fixture(scope="module")
def clerk() -> opd.Policy:
    return model("clerk")


@pytest.fixture(scope="module")
def played(clerk, task) -> opd.Rollout:
    """Conversations of the clerk that ended by themselves."""
    prompts = task.prompts(40, seed=5)
    whole = clerk.sample(prompts, max_new_tokens=120, temperature=0, **task.sample_options)
    return whole.select([b for b, end in enumerate(whole.finish) if end == "stop"])


@pytest.fixture(scope="module")
def records(played) -> list[dict]:
    """The conversations as peers' data sets store them: arguments as JSON texts, one list."""
    out = []
    for prompt, text in zip(played.prompts, played.texts, strict=True):
        messages = [dict(message) for message in (*prompt.messages, *messages_of(text))]
        for message in messages:
            if "tool_calls" in message:
                message["tool_calls"] = [
                    {
                        "type": "function",
                        "function": {
                            "name": call["function"]["name"],
                            "arguments": json.dumps(call["function"]["arguments"]),
                        },
                    }
                    for call in message["tool_calls"]
                ]
        out.append({"messages": messages, "tools": list(prompt.tools)})
    return out


def test_the_rollout_is_the_one_that_was_played(clerk, played):
    found = rollout_from_texts(clerk, played.prompts, played.texts)
    for name in ("ids", "learn", "turn", "lengths"):
        assert torch.equal(getattr(found, name), getattr(played, name)), name
    assert found.texts == played.texts
    assert found.finish == played.finish
    assert (found.logp == 0).all()


def test_a_data_set_of_a_peer_gives_the_ids_of_the_template(clerk, played, records, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    for turns in ("all", "reply"):
        task = from_records(path, test=0, turns=turns)
        prompts = task.pool["train"]
        assert [prompt.messages for prompt in prompts] == [p.messages for p in played.prompts]
        answers = [prompt.answer for prompt in prompts]
        assert all(isinstance(answer, FinalText) for answer in answers)
        found = rollout_from_texts(clerk, prompts, answers)
        assert torch.equal(found.ids, played.ids)
        assert torch.equal(found.learn, played.learn)
    last = from_records(path, test=0)
    assert len(last.pool["train"][0].messages) == len(records[0]["messages"]) - 1


def test_plain_answers_stand_beside_conversations(clerk, played):
    texts = [played.texts[0], "total:12", played.texts[1]]
    prompts = [played.prompts[0], played.prompts[2], played.prompts[1]]
    found = rollout_from_texts(clerk, prompts, texts)
    assert found.texts == tuple(texts)
    alone = rollout_from_texts(clerk, prompts[1:2], texts[1:2])
    length = int(alone.lengths[0])
    assert torch.equal(found.ids[1, :length], alone.ids[0, :length])
    assert found.completions()[2] == played.completions()[1]


def test_turns_choose_what_is_learned():
    chat = [
        {"role": "user", "content": "figs"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "hats"},
        {"role": "assistant", "content": "2"},
    ]
    sizes = {"last": 3, "reply": 3, "all": 1}
    for turns, size in sizes.items():
        (prompt,) = from_records([{"messages": chat}], test=0, turns=turns).pool["train"]
        assert len(prompt.messages) == size
        assert prompt.answer == "2"
    call = {"type": "function", "function": {"name": "price", "arguments": {"item": "figs"}}}
    ends = [chat[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(InvalidValue, match="ends with a tool call"):
        from_records([{"messages": ends}], test=0)
    (prompt,) = from_records([{"messages": ends}], test=0, turns="all").pool["train"]
    assert '{"name": "price", "arguments": {"item": "figs"}}' in prompt.answer
    with pytest.raises(InvalidValue, match="turns='some'"):
        from_records([{"messages": chat}], test=0, turns="some")


def test_a_template_that_opens_a_turn_in_another_way_is_refused(clerk, played):
    template = clerk.tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}<assistant>", "{% if add_generation_prompt %}<user>"
    )
    other = clerk.with_template(chat_template=template)
    with pytest.raises(OpdlabError, match="in another way than it opens one"):
        rollout_from_texts(other, played.prompts, played.texts)


def test_sft_learns_from_conversations(task, records):
    given = from_records(records, test=0, environment=task.environment, max_new_tokens=120)
    run = opd.distill(
        model("trainee"), None, given, method=opd.SFT(), steps=12, batch=16, lr=5e-3, quiet=True
    )
    step = next(run)
    learned = step.rollout.learn
    assert step.metrics["tokens"] == int(learned.sum()) < step.rollout.tokens
    before = opd.evaluate(model("trainee"), task, n=24, k=0)
    run.train()
    after = opd.evaluate(run.student, task, n=24, k=0)
    assert after.accuracy > before.accuracy + 0.3


def test_sft_on_bare_answers_of_a_task_with_tools_is_refused(task):
    bare = [
        {"messages": [{"role": "user", "content": f"{i} figs?"}], "answer": str(i)}
        for i in range(4)
    ]
    given = from_records(bare, test=0, environment=task.environment)
    with pytest.raises(InvalidValue, match="learn to answer without asking"):
        opd.distill(model("trainee"), None, given, method=opd.SFT(), steps=1, quiet=True)


def test_a_teacher_of_texts_plays_what_it_plays_as_a_policy(task, clerk):
    options = {"method": opd.SequenceKD(), "steps": 1, "batch": 8, "quiet": True}
    options |= {"temperature": 0.0, "seed": 2}
    of_policy = next(opd.distill(model("trainee"), clerk, task, **options)).rollout
    of_texts = next(opd.distill(model("trainee"), TextOnly(clerk), task, **options)).rollout
    assert of_texts.completions() == of_policy.completions()
    assert torch.equal(of_texts.learn, of_policy.learn)
    assert torch.equal(of_texts.turn, of_policy.turn)
    assert set(of_texts.writer) == {"teacher"}
    score = opd.evaluate(TextOnly(clerk), task, n=24, k=0)
    assert score.accuracy == opd.evaluate(clerk, task, n=24, k=0).accuracy


def test_a_limit_of_tokens_holds_for_a_teacher_of_texts(task, clerk):
    options = {"steps": 1, "batch": 8, "max_new_tokens": 40, "quiet": True}
    run = opd.distill(model("trainee"), TextOnly(clerk), task, method=opd.SequenceKD(), **options)
    step = next(run)
    assert int(step.rollout.lengths.max()) <= 40
    assert "length" in step.rollout.finish
