"""Prompts as policies read them: chat templates, their arguments, special tokens at both ends."""

from __future__ import annotations

import copy
import warnings

import pytest
from tokenizers.processors import TemplateProcessing

from opdlab import Policy, Prompt, distill, tasks
from opdlab.errors import InvalidValue, OpdlabError, TokenizerMismatch
from opdlab.models.same_tokens import check_same_tokens
from opdlab.models.templates import can_sanitize
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.teachers import TextOnly

TURNS = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}{% if add_generation_prompt"
    " %}<assistant>{% endif %}"
)
RAISES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{%"
    " endif %}" + TURNS
)
SILENT = TURNS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{"
    " raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + TURNS
)
THINKS = TURNS.replace(
    "<assistant>",
    "<assistant>{% if enable_thinking is defined and not enable_thinking %} 0{% endif %}",
)
ASK = {"role": "user", "content": "ana has 4"}
CHAT = Prompt(messages=(ASK,), hint="sum", id="c")


@pytest.fixture
def with_template(make_model, bytes_bpe):
    """Make a policy whose tokenizer has a template of its own."""

    def make(template: str | None = TURNS, seed: int = 0, **options) -> Policy:
        tokenizer = copy.deepcopy(bytes_bpe)
        tokenizer.chat_template = template
        return Policy.of(make_model(len(tokenizer), seed, eos_token_id=0), tokenizer, **options)

    return make


def read(policy: Policy, prompt: Prompt) -> str:
    return policy.tokenizer.decode(policy.encode(prompt))


# System messages.


@pytest.mark.parametrize("template", [RAISES, SILENT, ALTERNATES])
def test_a_hint_goes_into_the_users_turn_where_there_is_no_system_role(with_template, template):
    policy = with_template(template)
    assert read(policy, CHAT) == "<user> ana has 4<assistant>"
    assert (
        read(policy.seeing(), CHAT)
        == read(policy.seeing("sum"), CHAT)
        == "<user> sum\n\nana has 4<assistant>"
    )
    assert (
        read(policy, Prompt(messages=({"role": "system", "content": "sum"}, ASK)))
        == "<user> sum\n\nana has 4<assistant>"
    )


def test_a_hint_goes_into_the_system_message_where_there_is_one(with_template):
    assert read(with_template().seeing(), CHAT) == "<system> sum<user> ana has 4<assistant>"


def test_messages_of_one_role_are_joined_where_roles_must_alternate(with_template):
    told = with_template(ALTERNATES).seeing([{"role": "user", "content": "ben has 2"}])
    assert read(told, CHAT) == "<user> ben has 2\n\nana has 4<assistant>"
    assert (
        read(with_template().seeing([{"role": "user", "content": "ben has 2"}]), CHAT)
        == "<user> ben has 2<user> ana has 4<assistant>"
    )


def test_a_chat_that_the_template_refuses_is_refused_in_words(with_template):
    policy = with_template("{{ raise_exception('No chats on Sundays') }}")
    with pytest.raises(
        OpdlabError,
        match=r"Prompt 'c' is a chat, but the chat template refuses it: No chats on Sundays\.",
    ):
        policy.sample([CHAT])


def test_a_chat_without_template_is_refused_in_words(with_template):
    policy = with_template(None)
    with pytest.raises(
        OpdlabError,
        match=(
            r"Prompt 'c' is a chat, but there is no chat template in the tokenizer\. Give plain"
            r" texts"
        ),
    ):
        policy.sample([Prompt("ana"), CHAT])
    with pytest.raises(OpdlabError, match="there is no chat template"):
        TextOnly(policy).write([CHAT])


def test_many_prompts_are_encoded_as_one_by_one(with_template, prompts):
    for policy in (with_template(), with_template(RAISES).seeing()):
        assert policy.encode_all(prompts) == [policy.encode(prompt) for prompt in prompts]


# Arguments of the template.


def test_arguments_reach_the_template_and_every_view(with_template):
    policy = with_template(THINKS, chat_template_kwargs={"enable_thinking": False})
    plain = "<user> ana has 4<assistant>"
    assert read(policy, CHAT) == f"{plain} 0"
    views = [
        policy.frozen(),
        policy.copied(),
        policy.seeing(lambda prompt: prompt),
        policy.adapt(2).frozen(),
    ]
    assert [read(view, CHAT) for view in views] == [f"{plain} 0"] * 4
    assert read(policy.with_template(enable_thinking=True), CHAT) == plain
    assert read(policy, CHAT) == f"{plain} 0"
    assert (
        TextOnly(policy).write([CHAT], max_new_tokens=4, seed=1)[0][0]
        == policy.sample([CHAT], max_new_tokens=4, seed=1).texts[0]
    )
    assert "enable_thinking=False" in repr(policy)


def test_a_run_keeps_them_for_the_policies_that_it_makes(with_template):
    student = with_template(THINKS, chat_template_kwargs={"enable_thinking": False})
    task = tasks.from_records(
        [{"prompt": [ASK], "hint": "sum"}, {"prompt": [{**ASK, "content": "ben"}], "hint": "sum"}],
        test=0,
    )

    def loss(rows):
        return (
            (rows.student - rows["ema"].detach()).square().sum(-1)
            + rows["reference"].sum(-1) * 0
            + rows["ema+hint"].sum(-1) * 0
        )

    method = type(
        "Own", (), {"needs": ("reference", "ema", "ema+hint"), "loss": staticmethod(loss)}
    )()
    for lora in (2, None):
        run = distill(
            (
                student
                if lora
                else with_template(THINKS, chat_template_kwargs={"enable_thinking": False})
            ),
            None,
            task,
            method=method,
            lora=lora,
            steps=1,
            batch=2,
            max_new_tokens=4,
            quiet=True,
        )
        assert list(run.policies) == ["student", "reference", "ema", "ema+hint"]
        assert all(
            policy.chat_template_kwargs == {"enable_thinking": False}
            for policy in run.policies.values()
        )
        next(run)


def test_an_answer_can_be_gone_on_with(with_template):
    policy = with_template(chat_template_kwargs={"continue_final_message": True})
    assert (
        read(policy, Prompt(messages=(ASK, {"role": "assistant", "content": "total 4"})))
        == "<user> ana has 4<assistant> total 4"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"enable_thinkin": False},
            "has enable_thinkin, which this tokenizer's chat template does not read",
        ),
        ({"tools": []}, "has tools, which this tokenizer's chat template does not read"),
        ({"tokenize": False}, "has tokenize, which opdlab sets itself"),
        (["enable_thinking"], "chat_template_kwargs is .*Use a dict of names and values"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "The chat template fails with chat_template_kwargs=",
        ),
    ],
)
def test_arguments_that_nothing_reads_are_refused(with_template, options, message):
    with pytest.raises(InvalidValue, match=message):
        with_template(THINKS, chat_template_kwargs=options)


def test_arguments_without_template_are_refused(with_template):
    with pytest.raises(InvalidValue, match="The tokenizer has no chat template that could read"):
        with_template(None, chat_template_kwargs={"enable_thinking": False})


def test_they_are_compared_between_student_and_teacher(with_template):
    student = with_template(THINKS, chat_template_kwargs={"enable_thinking": False})
    check_same_tokens(
        student, with_template(THINKS, 1, chat_template_kwargs={"enable_thinking": False})
    )
    with pytest.raises(
        TokenizerMismatch,
        match=(
            r"teacher's chat template differs.*: '' there, ' 0' here.*has"
            r" chat_template_kwargs=\{\}, the student "
            r"\{'enable_thinking': False\}.*tokenizer=student\.tokenizer.*SpanOPD\(\)"
        ),
    ):
        check_same_tokens(student, with_template(THINKS, 1))


def test_templates_that_differ_in_system_messages_alone_are_refused(with_template):
    with pytest.raises(
        TokenizerMismatch, match=r"chat template differs.*tokenizer=student\.tokenizer"
    ):
        check_same_tokens(with_template(TURNS), with_template(RAISES, 1))


# Special tokens at both ends and within.


def test_the_beginning_is_there_once(make_policy, words):
    tokenizer = copy.deepcopy(words)
    tokenizer.bos_token = "<user>"
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", begin)]
    )
    policy = Policy.of(make_policy(0).weights.model, tokenizer)
    assert (
        policy.encode(Prompt("<user> ana has"))
        == policy.encode(Prompt("ana has"))
        == [begin, *words("ana has")["input_ids"]]
    )


def test_a_tokenizer_that_ends_texts_leaves_prompts_open(make_policy, words):
    tokenizer = copy.deepcopy(words)
    ends = ("<eos>", words.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[ends]
    )
    policy = Policy.of(make_policy(0).weights.model, tokenizer)
    assert policy.encode_all([Prompt("ana has"), CHAT]) == make_policy(0).encode_all(
        [Prompt("ana has"), CHAT]
    )


def test_special_tokens_that_a_prompt_spells_are_told_once(make_policy, words):
    for prompt, token in (
        (Prompt("total <eos> ?", id="p"), "<eos>"),
        (Prompt(messages=({**ASK, "content": "a <user> b"},), id="p"), "<user>"),
    ):
        policy = Policy.of(make_policy(0).weights.model, copy.deepcopy(words))
        with pytest.warns(
            UserWarning,
            match=(
                f"Prompt 'p' spells the special token '{token}' in its text, and the model reads it"
                " as that"
            ),
        ):
            policy.encode(prompt)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            policy.encode(prompt)


def test_a_chat_that_was_rendered_before_warns_of_nothing(make_policy, words):
    policy = Policy.of(make_policy(0).weights.model, copy.deepcopy(words))
    chat = [ASK, {"role": "assistant", "content": "total 4"}, {"role": "user", "content": "ben"}]
    text = policy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert policy.encode(Prompt(text)) == policy.encode(Prompt(messages=tuple(chat)))


def test_spelled_tokens_are_read_letter_by_letter_on_request(make_policy, bytes_bpe):
    tokenizer = copy.deepcopy(bytes_bpe)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    model, options = make_policy(0, tokenizer).weights.model, {"sanitize_control_tokens": True}
    if not can_sanitize(tokenizer):  # before transformers 5.20: refused, not ignored
        with pytest.raises(InvalidValue, match=r"Install transformers 5\.20 or newer"):
            Policy.of(model, tokenizer, chat_template_kwargs=options)
        return
    policy = Policy.of(model, tokenizer, chat_template_kwargs=options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = policy.encode(Prompt(messages=({"role": "user", "content": "a <|end|> b"},)))
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids) == "a <|end|> b<|end|>"


# Lists of prompts.


def test_one_prompt_is_a_list_of_prompts(student):
    want = student.encode_all([Prompt("ana has")])
    for prompts in (Prompt("ana has"), (Prompt("ana has"),), iter([Prompt("ana has")])):
        assert student.encode_all(prompts) == want
    assert rollout_from_texts(student, Prompt("ana has"), ["total"]).prompts == (Prompt("ana has"),)


@pytest.mark.parametrize(
    "prompts", [None, 7, b"ana", "ana", ["ana"], {"prompt": "ana"}, [{"prompt": "ana"}], [None]]
)
def test_what_is_no_prompt_is_refused(student, prompts):
    with pytest.raises(InvalidValue, match=r"encode_all got prompts"):
        student.encode_all(prompts)
    with pytest.raises(InvalidValue, match=r"encode got prompt"):
        student.encode(prompts)


def test_a_context_that_makes_no_prompt_is_refused(student):
    with pytest.raises(
        InvalidValue,
        match=r"The context of Policy.* made 'ana' of a prompt\. Let it return an opdlab\.Prompt",
    ):
        student.seeing(lambda prompt: prompt.text).encode(Prompt("ana"))
    for context in ("", 5, []):
        with pytest.raises(InvalidValue):
            student.seeing(context)
