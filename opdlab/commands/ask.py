"""Ask the models of a config: `opdlab evaluate`, `opdlab sample` and `opdlab score`.

A config names up to three: its student, its teacher, and the distilled student, which is the last
checkpoint in the run's folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from opdlab import viz
from opdlab.commands.flags import DEFAULT_FOLDER, Given
from opdlab.commands.output import Output
from opdlab.commands.report import trained_place
from opdlab.commands.run_files import RunFiles
from opdlab.data.prompt import Prompt
from opdlab.data.sampling_config import SamplingConfig
from opdlab.errors import InvalidValue, MissingPolicy, OpdlabError, printable
from opdlab.models.policy import Policy, as_policy
from opdlab.models.protocols import Grader, Writer
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.tasks import Task
from opdlab.tasks.by_name import load_model
from opdlab.teachers import TextOnly
from opdlab.teachers.writing import write_texts
from opdlab.training.config import ModelTable
from opdlab.training.configured import load_config_task, load_policy, load_teacher
from opdlab.training.evaluation import evaluate as run_evaluation
from opdlab.training.scoring import score as run_scoring
from opdlab.viz.overview import overview

WHO = ("student", "distilled", "teacher")


class Models:
    """The models of a config, each loaded when it is first asked for.

    Args:
        given: The config.
    """

    def __init__(self, given: Given) -> None:
        self.given, self.config = given, given.config
        self._loaded: list[tuple[ModelTable, Policy]] = []
        folder = self.config.run.folder or Path(DEFAULT_FOLDER, given.name)
        self.files = RunFiles(Path(folder))
        self.checkpoint = trained_place(self.files) if Path(folder).is_dir() else None

    def names(self) -> list[str]:
        """List the models that there are.

        Returns:
            Some of `WHO`.
        """
        there = {
            "student": True,
            "distilled": self.checkpoint is not None,
            "teacher": self.config.teacher is not None,
        }
        return [name for name, is_there in there.items() if is_there]

    def load(self, who: str) -> Any:
        """Load a model.

        Args:
            who: One of `WHO`.

        Returns:
            A policy, or a teacher on a server.

        Raises:
            OpdlabError: There is no such model.
        """
        if who not in WHO:
            raise InvalidValue(f"--who got {who!r}. Use some of {', '.join(WHO)}.")
        if who not in self.names():
            ways = {
                "distilled": f"there is no checkpoint in {self.files.folder}. Run opdlab distill"
                " first, or say where the run is with --out",
                "teacher": "the config has no teacher. Give --teacher",
            }
            raise OpdlabError(f"--who got {who!r}, but {ways[who]}.")
        if who == "student":
            return load_policy(self.config.student, self._loaded)
        if who == "distilled":
            return self._load_distilled()
        return load_teacher(self.config.teacher, self.config, self._loaded)

    def _load_distilled(self) -> Policy:
        """The trained adapter on its base; it sees what the student sees."""
        table = self.config.student
        options, place = dict(table.loading), str(self.checkpoint)
        if (Path(place) / "adapter_config.json").exists():
            policy = load_model(table.source, **{**options, "adapter": place})
        else:  # all weights were trained
            policy = load_model(place, **options)
        if table.hint:
            return policy.seeing()
        return policy if table.context is None else policy.seeing(table.context)


def evaluate(given: Given, output: Output, who: Sequence[str], n: int, k: int, seed: int) -> None:
    """Evaluate the models of a config on held-out prompts.

    Args:
        given: The config.
        output: Where to print; its `result` becomes the numbers.
        who: Some of `WHO`; all that there are by default.
        n: Number of prompts.
        k: Samples for each prompt, beside the greedy answer.
        seed: Seed of prompts and samples.

    Raises:
        OpdlabError: A model or the task is not there.
    """
    models, task = Models(given), load_config_task(given.config, given.verify)
    chosen = list(who) or models.names()
    found = {}
    for name in chosen:
        policy = models.load(name)
        found[name] = run_evaluation(policy, task, n, k, seed, name=name, quiet=False)
    output.result = {
        "task": task.name,
        "evaluations": {name: one.table() for name, one in found.items()},
    }
    if {"student", "distilled"} <= found.keys():
        gain = found["distilled"] - found["student"]
        output.result["gain"] = {"mean": gain.mean, "low": gain.low, "high": gain.high}
    if not output.is_json:
        for one in found.values():
            output.say(repr(one))
        if "gain" in output.result:
            output.say(f"gain: {gain!r}")


def sample(
    given: Given,
    output: Output,
    who: Sequence[str],
    asked: Sequence[str],
    prompts: int,
    n: int,
    options: Mapping[str, Any],
) -> None:
    """Let the models of a config write.

    Args:
        given: The config.
        output: Where to print; its `result` becomes the texts.
        who: Some of `WHO`; the distilled student, or the student if there is none, by default.
        asked: Questions; by default held-out prompts of the task.
        prompts: Number of these.
        n: Texts for each prompt.
        options: Fields of `SamplingConfig`; a length limit of None is that of the task, or 256 for
            questions.

    Raises:
        OpdlabError: A model or the task is not there.
    """
    models = Models(given)
    task = None if asked else load_config_task(given.config, given.verify)
    room = options["max_new_tokens"] or (256 if task is None else task.max_new_tokens)
    config = SamplingConfig.of("sample", {**options, "max_new_tokens": room})
    rows = []
    for name in list(who) or [_default(models)]:
        policy = models.load(name)
        if task is None:
            questions = _read_questions(policy, asked)
        else:
            questions = task.prompts(prompts, seed=config.seed, split="test")
        texts = _write(policy, questions, n, config)
        for prompt, written in zip(questions, texts, strict=True):
            for text in written:
                rows.append(_describe(name, prompt, text, task))
    output.result = rows
    if not output.is_json:
        table = Table("who", "prompt", "text", *(["score"] if _has_scores(rows) else []))
        for row in rows:
            cells = [escape(printable(str(row[key]))) for key in ("who", "prompt", "text")]
            scores = [f"{row['score']:.2f}"] if _has_scores(rows) else []
            table.add_row(*cells, *scores)
        output.console.print(table)


def _has_scores(rows: Sequence[dict[str, Any]]) -> bool:
    return any(row["score"] is not None for row in rows)


def _default(models: Models) -> str:
    return "distilled" if "distilled" in models.names() else "student"


def _read_questions(policy: Any, asked: Sequence[str]) -> list[Prompt]:
    """Questions as chats, where the model has a chat template."""
    local = as_policy(policy)
    is_chat = local is None or getattr(local.tokenizer, "chat_template", None) is not None
    if is_chat:
        return [
            Prompt(messages=({"role": "user", "content": text},), id=str(i))
            for i, text in enumerate(asked)
        ]
    return [Prompt(text, id=str(i)) for i, text in enumerate(asked)]


def _write(policy: Any, prompts: list[Prompt], n: int, config: SamplingConfig) -> list[list[str]]:
    if as_policy(policy) is not None:
        rollout = policy.sample(prompts, n, **config.options())
        texts = list(rollout.texts)
        return [texts[i : i + n] for i in range(0, len(texts), n)]
    if not isinstance(policy, Writer):
        raise MissingPolicy(f"{type(policy).__name__} does not write texts. Use --who student.")
    return [list(map(str, row)) for row in write_texts(policy, prompts, n, config)]


def _describe(who: str, prompt: Prompt, text: str, task: Task | None) -> dict[str, Any]:
    question = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
    is_judged = task is not None and task.verify is not None
    return {
        "who": who,
        "id": prompt.id,
        "prompt": question,
        "text": text,
        "answer": prompt.answer,
        "score": task.score(prompt, text) if is_judged and task is not None else None,
    }


def score(
    given: Given,
    output: Output,
    who: Sequence[str],
    texts: str,
    prompts: int,
    trace: Path,
    k: int,
    seed: int,
    page: bool,
) -> None:
    """Make a trace: the task's prompts, answered, and graded by the student and the teacher.

    Args:
        given: The config.
        output: Where to print; its `result` becomes a summary.
        who: The first policy, one of "student" and "distilled"; the distilled one if there is one.
        texts: "student" for texts that this policy writes, "answer" for the reference answers.
        prompts: Number of held-out prompts.
        trace: The file to write.
        k: Top tokens that are kept of each policy.
        seed: Seed of prompts and texts.
        page: Whether to draw a page beside the trace.

    Raises:
        OpdlabError: A model or the task is not there, or a prompt has no answer to grade.
    """
    models, task = Models(given), load_config_task(given.config, given.verify)
    if len(who) > 1 or "teacher" in who:
        raise InvalidValue("--who names the policy that is graded first. Use student or distilled.")
    name = who[0] if who else _default(models)
    student, teacher = models.load(name), None
    if "teacher" in models.names():
        teacher = models.load("teacher")
    if isinstance(teacher, TextOnly) or (teacher is not None and not isinstance(teacher, Grader)):
        raise MissingPolicy(
            "The teacher only writes, and a trace needs one that grades tokens. Give a local model"
            " with the student's tokens, or a server with kind = 'logprobs'."
        )
    asked = task.prompts(prompts, seed=seed, split="test")
    if texts == "answer":
        rollout = rollout_from_texts(student, asked, [_answer_of(prompt) for prompt in asked])
    elif texts == "student":
        rollout = student.sample(
            asked, max_new_tokens=task.max_new_tokens, seed=seed, **task.sample_options
        )
    else:
        raise InvalidValue(f"--texts got {texts!r}. Use student or answer.")
    found = run_scoring(rollout, student, teacher, k)
    path = found.save(trace)
    table = found.table
    means = {
        column: float(found.column(column).mean())
        for column in ("student_logp", "student_entropy", "teacher_logp", "teacher_reverse_kl")
        if column in table.column_names and len(found)
    }
    output.result = {
        "trace": str(path),
        "who": name,
        "texts": len(asked),
        "tokens": len(found),
        "means": means,
    }
    output.say(f"{name}: {len(found)} tokens of {len(asked)} texts")
    for column, mean in means.items():
        output.say(f"  {column} {mean:.3f} nats per token")
    output.say(f"trace: {path}")
    if page:
        drawn = viz.page(path.with_suffix(".html"), title=path.name, lenses=overview(found, 0))
        output.result["page"] = str(drawn)
        output.say(f"page: {drawn}")


def _answer_of(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise OpdlabError(
            f"The prompt {prompt.id!r} has no answer to grade. Leave --texts at student, or give"
            " records with answers."
        )
    return prompt.answer
