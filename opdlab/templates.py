"""Special tokens of prompts and answers: where a chat template puts them, and where a policy needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opdlab.policy import Policy


def end_token(policy: Policy, chat: bool) -> int | None:
    """Choose the token of the policy's EOS set that ends its answers; None where the set is empty.

    Several models end a turn of a chat with another token than a text: Gemma with `<end_of_turn>`, not with `<eos>`. So
    for a chat it is the first token of the set behind an assistant's turn, as the chat template writes it.
    """
    eos, tokenizer = policy.weights.eos, policy.tokenizer
    if chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        answer_onwards = ids[len(tokenizer.apply_chat_template(turns[:1], return_dict=False)) :]
        found = next((token for token in answer_onwards if token in eos), None)
        if found is not None:
            return int(found)
    if tokenizer.eos_token_id in eos:
        return int(tokenizer.eos_token_id)
    return min(eos, default=None)
