"""Between TRL's tensors and opdlab's prompts and rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.tokens import completion_texts
from opdlab.errors import InvalidValue
from opdlab.models.fingerprints import vocabulary_digest
from opdlab.models.policy import Policy


class PromptsAsRead(Policy):
    """A policy that reads the prompts of a step by the token ids that TRL's trainer gave them.

    Policies with a context of their own, such as a hint, render their prompts as always.

    Attributes:
        read: The ids of the step's prompts, by `id` of the `Prompt`. Views share it.
    """

    read: dict[int, list[int]]

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *args: Any, **options: Any
    ) -> PromptsAsRead:
        """Make a policy of a model in memory; see `Policy.of`."""
        policy: PromptsAsRead = super().of(model, tokenizer, *args, **options)  # type: ignore[assignment]
        policy.read = {}
        return policy

    def encode_unchecked(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Encode prompts; those that the trainer has read are not rendered again.

        Args:
            prompts: The prompts.

        Returns:
            Token ids of each prompt, without padding.
        """
        if self.context is None and all(id(prompt) in self.read for prompt in prompts):
            return [list(self.read[id(prompt)]) for prompt in prompts]
        return super().encode_unchecked(prompts)


def read_prompts(rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """Read the rows of TRL's dataset.

    Args:
        rows: Each with a `prompt` (a text or messages), and perhaps `answer`, `hint` and `id`.

    Returns:
        One prompt for each row.

    Raises:
        InvalidValue: A row has images, which opdlab's policies do not read.
    """
    prompts = []
    for row in rows:
        if any(row.get(name) for name in ("image", "images")):
            raise InvalidValue("A row of the dataset has images. MethodTrainer trains on texts.")
        said = {name: row[name] for name in ("answer", "hint", "id") if row.get(name) is not None}
        asked = row["prompt"]
        what = {"text": asked} if isinstance(asked, str) else {"messages": asked}
        prompts.append(Prompt(**what, **said))
    return prompts


def read_rollout(
    student: PromptsAsRead, prompts: Sequence[Prompt], inputs: Mapping[str, Tensor]
) -> Rollout:
    """Read the completions that TRL generated, and note how it read their prompts.

    Args:
        student: The student, whose `read` gets the ids of the prompts.
        prompts: The prompt of each completion.
        inputs: TRL's tensors.

    Returns:
        The rollout; its log-probs and entropies are left at zero. Tokens that tools wrote are
        tokens of the completion, but the student does not learn them.
    """
    ids, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
    for prompt, row, real in zip(
        prompts, inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True
    ):
        student.read[id(prompt)] = row[real].tolist()
    lengths = mask.sum(-1)
    eos = student.weights.eos
    bodies = [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
    finish = tuple("stop" if body and body[-1] in eos else "length" for body in bodies)
    zeros = torch.zeros(ids.shape, device=ids.device)
    return Rollout(
        prompts=tuple(prompts),
        ids=ids,
        lengths=lengths,
        logp=zeros,
        entropy=zeros.clone(),
        finish=finish,
        texts=tuple(completion_texts(student.tokenizer, bodies, eos)),
        writer=("student",) * len(bodies),
        vocabulary=vocabulary_digest(student.tokenizer),
        learn=mask & inputs.get("tool_mask", inputs["completion_mask"]).bool(),
    )


def pad_inputs(student: Policy, rollout: Rollout, pad: int) -> dict[str, Tensor]:
    """Make TRL's tensors of a rollout: prompts padded on the left, completions on the right.

    Args:
        student: It reads the prompts.
        rollout: The completions.
        pad: The id of the padding token.

    Returns:
        `prompt_ids`, `prompt_mask`, `completion_ids` and `completion_mask`.
    """
    starts = student.encode_all(rollout.prompts)
    width = max(map(len, starts))
    padded = [[pad] * (width - len(row)) + row for row in starts]
    real = [[0] * (width - len(row)) + [1] * len(row) for row in starts]
    device = rollout.ids.device
    return {
        "prompt_ids": torch.tensor(padded, device=device),
        "prompt_mask": torch.tensor(real, device=device),
        "completion_ids": torch.where(rollout.mask, rollout.ids, pad),
        "completion_mask": rollout.mask.long(),
    }


def first_prompts(dataset: Any, most: int) -> list[Prompt]:
    """Read the first prompts of a dataset, for checks.

    Args:
        dataset: TRL's `train_dataset`.
        most: How many to read at most.

    Returns:
        The prompts.
    """
    return read_prompts([row for _, row in zip(range(most), dataset, strict=False)])
