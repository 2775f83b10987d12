"""Rollouts: what a policy wrote, token by token, and the sampling loop that writes them.

The loop shares a prompt's prefill among its samples, drops finished rows from the batch, samples by inverse CDF from
one uniform number a token, and hands back the log-probs and entropies that it has at hand anyway. The uniform numbers
depend on seed, row, position and max_new_tokens only: the same seed gives the same text whatever other rows the batch
holds, up to rounding.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opdlab.continuation import begin
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.expect import expect_prompts
from opdlab.forward import group_rows
from opdlab.head import Head
from opdlab.policy import Policy, Prompt
from opdlab.precision import without_autocast
from opdlab.same_tokens import fingerprint
from opdlab.templates import end_token
from opdlab.tokens import completion_texts
from opdlab.validation import Count, Finite, GeneratorSeed, Temperature, Text, Unchecked, Whole, shortened, validate, validate_arguments
from opdlab.weights import Weights
from opdlab.written_text import finish_of


@dataclass(frozen=True, eq=False)
class Rollout:
    """`B` completions, right-padded to `T`. Contains no hint: every policy renders the prompts as it sees them.

    `ids [B, T]`, `lengths [B]` (the EOS token counts), `logp [B, T]` and `entropy [B, T]` of the policy that wrote it, at
    temperature 1, in nats; zero in the padding and where a text was not sampled. `finish[b]` is "stop" or "length".
    `n`: completions of each prompt, which stand in groups of `n` rows; 1 where the prompts have different numbers of them.
    """

    prompts: tuple[Prompt, ...]
    ids: Tensor
    lengths: Tensor
    logp: Tensor
    entropy: Tensor
    finish: tuple[str, ...]
    texts: tuple[str, ...]
    writer: tuple[str, ...]
    n: int = 1
    vocabulary: str | None = None  # fingerprint of the tokenizer whose ids these are; None: not known

    @property
    def mask(self) -> Tensor:
        """`[B, T]`, true on completion tokens. Made from the lengths, so pad = EOS is no problem."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def completions(self) -> list[list[int]]:
        """The completion ids, a list a row."""
        return [row[:length] for row, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    def rows(self, which: Sequence[int]) -> Rollout:
        """The rollout of some rows only, in that order."""
        pick = torch.as_tensor(list(which), dtype=torch.long, device=self.ids.device)
        width = max(1, int(self.lengths[pick].max())) if len(which) else 1
        parts: dict[str, Any] = {k: getattr(self, k)[pick][:, :width] for k in ("ids", "logp", "entropy")}
        parts |= {k: tuple(getattr(self, k)[i] for i in which) for k in ("prompts", "finish", "texts", "writer")}
        return replace(self, **parts, lengths=self.lengths[pick], n=self.n if self._keeps_groups(which) else 1)

    def _keeps_groups(self, which: Sequence[int]) -> bool:
        """Whether these rows are whole groups of `n`, each in its order."""
        groups = [list(which[i : i + self.n]) for i in range(0, len(which), self.n)]
        return all(group[0] % self.n == 0 and group == list(range(group[0], group[0] + self.n)) for group in groups)

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        cut = sum(f == "length" for f in self.finish)
        return f"Rollout({len(self)} completions, {self.tokens} tokens, {cut} cut off at the length limit)"


@validate_arguments
def sample(policy: Policy, prompts: Unchecked[Sequence[Prompt]], n: Count = 1, *, max_new_tokens: Whole = 64, temperature: Finite = 1.0,
           top_p: Finite = 1.0, seed: GeneratorSeed = 0, prefixes: Unchecked[Sequence[Sequence[int]] | None] = None,
           batch_size: Count | None = None, writer: Text = "student") -> Rollout:  # fmt: skip
    """Write `n` completions of each prompt: row `i * n + j` is sample `j` of prompt `i`.

    temperature: 0 is greedy. For on-policy training keep 1 and top_p 1: then `logp` is the sampler's own.
    prefixes: token ids already written after each prompt, to be continued (they are not part of the result).
    batch_size: prompts held in memory at once (all by default). Raises InvalidValue, ContextTooLong and EmptyPrompts.
    """
    prompts = expect_prompts(prompts, "sample")
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise InvalidValue(
            f"sample got max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}. Use at least one token, "
            "a temperature of 0 or more and 0 < top_p <= 1."
        )
    validate("sample", {"temperature": temperature}, {"temperature": Temperature})
    prefixes = None if prefixes is None else _checked_prefixes(prefixes, len(prompts), policy.weights.vocab_size)
    begun = None if prefixes is None else [len(prefix) for prefix in prefixes]
    starts = policy.encode_all(prompts, max_new_tokens, begun)
    if prefixes is not None:
        starts = [start + list(prefix) for start, prefix in zip(starts, prefixes, strict=True)]
    uniform = torch.rand(len(starts), n, max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step, parts = batch_size or len(starts), []
    with torch.no_grad(), policy.weights.using(policy.adapter) as model:
        for i in range(0, len(starts), step):
            u = uniform[i : i + step].flatten(0, 1)
            parts.append(_write(model, policy.head, policy.weights, starts[i : i + step], n, u, temperature, top_p))
    written = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    width = max(1, int(written["lengths"].max()))
    stops = torch.tensor(sorted(policy.weights.eos), device=written["ids"].device)
    last = written["ids"].gather(1, (written["lengths"][:, None] - 1).clamp(min=0))[:, 0]
    stopped = torch.isin(last, stops) & (written["lengths"] > 0)
    ids, logp, entropy = (written[k][:, :width] for k in ("ids", "logp", "entropy"))
    bodies = [row[:length] for row, length in zip(ids.tolist(), written["lengths"].tolist(), strict=True)]
    return Rollout(
        prompts=tuple(p for p in prompts for _ in range(n)), ids=ids, lengths=written["lengths"], logp=logp, entropy=entropy,
        finish=tuple("stop" if s else "length" for s in stopped.tolist()),
        texts=tuple(completion_texts(policy.tokenizer, bodies, policy.weights.eos)), writer=(writer,) * len(bodies), n=n,
        vocabulary=fingerprint(policy.tokenizer),
    )  # fmt: skip


def _checked_prefixes(prefixes: Any, prompts: int, vocab_size: int) -> list[list[int]]:
    """The token ids that each prompt's completion goes on from.

    Raises:
        InvalidValue: There is not one list for each prompt, or something in them is no token id.
    """
    advice = "Use one list of token ids for each prompt, as [[5, 17], []]."
    if hasattr(prefixes, "tolist"):
        prefixes = prefixes.tolist()
    if isinstance(prefixes, (str, bytes)) or not isinstance(prefixes, Sequence):
        raise InvalidValue(f"sample got prefixes={shortened(prefixes)}. {advice}")
    if len(prefixes) != prompts:
        raise InvalidValue(f"sample got {len(prefixes)} prefixes for {prompts} prompts. {advice}")
    rows = []
    for i, prefix in enumerate(prefixes):
        row = prefix.tolist() if hasattr(prefix, "tolist") else prefix
        ids = list(row) if isinstance(row, Sequence) and not isinstance(row, (str, bytes)) else None
        if ids is None or not all(isinstance(token, numbers.Integral) and 0 <= int(token) < vocab_size for token in ids):
            raise InvalidValue(
                f"sample got prefixes[{i}]={shortened(prefix)}, which are no token ids of the policy (0 to {vocab_size - 1}). {advice}"
            )
        rows.append([int(token) for token in ids])
    return rows


def written(policy: Policy, prompts: Sequence[Prompt], texts: Sequence[str], writer: str = "answer") -> Rollout:
    """Make a rollout of given texts, for supervised training and for looking.

    A finished text ends with a token of the policy's own EOS set. A text that its writer had to cut (a `WrittenText` with
    finish "length") is left open, and counts as cut. Where a text itself spells a token of the EOS set, it ends there.

    Args:
        policy: Its tokenizer makes the tokens.
        prompts: The prompt of each text.
        texts: One text a prompt; plain strings count as finished.
        writer: Who wrote them, for the trace.
    """
    tokenizer, eos = policy.tokenizer, policy.weights.eos
    prompts = expect_prompts(prompts, "written")
    chats = [prompt.messages is not None for prompt in prompts]
    ends = {chat: end_token(policy, chat) for chat in set(chats)}
    ids, finish = [], []
    for text, end in zip(texts, map(ends.get, chats), strict=True):
        row = list(tokenizer(str(text), add_special_tokens=False)["input_ids"])
        first = next((t for t, token in enumerate(row) if token in eos), None)
        is_cut = first is None and finish_of(text) == "length"
        ids.append(row[:first] + ([] if is_cut or end is None else [end]))
        finish.append("length" if is_cut else "stop")
    lengths = torch.tensor([len(row) for row in ids], device=policy.weights.device)
    width = max(1, int(lengths.max()))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=policy.weights.device)
    none = torch.zeros(padded.shape, device=policy.weights.device)
    return Rollout(
        prompts=tuple(prompts),
        ids=padded,
        lengths=lengths,
        logp=none,
        entropy=none.clone(),
        finish=tuple(finish),
        texts=tuple(str(text) for text in texts),
        writer=(writer,) * len(ids),
        vocabulary=fingerprint(tokenizer),
    )


def joined(parts: Sequence[Rollout]) -> Rollout:
    """Several rollouts as one, rows in order. Its `n` is theirs, or 1 where they differ."""
    width = max(part.ids.shape[1] for part in parts)
    wide = lambda x: torch.nn.functional.pad(x, (0, width - x.shape[1]))
    whole: dict[str, Any] = {k: torch.cat([wide(getattr(part, k)) for part in parts]) for k in ("ids", "logp", "entropy")}
    whole |= {k: sum((getattr(part, k) for part in parts), ()) for k in ("prompts", "finish", "texts", "writer")}
    vocabularies = {part.vocabulary for part in parts}
    vocabulary = vocabularies.pop() if len(vocabularies) == 1 else None
    counts = {part.n for part in parts}  # samples of a prompt stand side by side only if all parts have as many
    n = counts.pop() if len(counts) == 1 else 1
    return Rollout(**whole, lengths=torch.cat([part.lengths for part in parts]), n=n, vocabulary=vocabulary)


def _write(
    model: PreTrainedModel,
    head: Head,
    weights: Weights,
    starts: list[list[int]],
    n: int,
    uniform: Tensor,
    temperature: float,
    top_p: float,
) -> dict[str, Tensor]:
    """Write `n` texts after each prompt: ids, logp, entropy `[B, T]` and lengths `[B]`. `uniform [B, T]` decides every token.

    Prompts of different length are run apart where the model cannot pad them.
    """
    mixed = weights.abilities.pads_left or not weights.abilities.caches  # without a cache, `hidden_at` sees to it
    groups = group_rows([len(start) for start in starts], mixed=mixed)
    if len(groups) == 1:
        return _write_batch(model, head, weights, starts, n, uniform, temperature, top_p)
    out: dict[str, Tensor] = {}
    for group in groups:
        rows = [i * n + j for i in group for j in range(n)]
        part = _write_batch(model, head, weights, [starts[i] for i in group], n, uniform[rows], temperature, top_p)
        out = out or {key: value.new_zeros(len(uniform), *value.shape[1:]) for key, value in part.items()}
        for key, value in part.items():
            out[key][rows] = value
    return out


def _write_batch(
    model: PreTrainedModel,
    head: Head,
    weights: Weights,
    starts: list[list[int]],
    n: int,
    uniform: Tensor,
    temperature: float,
    top_p: float,
) -> dict[str, Tensor]:
    """The loop over tokens, all texts side by side."""
    device, (rows, steps) = model.device, uniform.shape
    uniform, stops = uniform.to(device), torch.tensor(sorted(weights.eos), device=device)
    texts = begin(model, starts, n, weights.abilities)
    live = torch.arange(rows, device=device)  # which row of the result each row of the batch writes
    out = {
        "ids": torch.zeros(rows, steps, dtype=torch.long, device=device),
        "lengths": torch.full((rows,), steps, device=device),
        "logp": torch.zeros(rows, steps, device=device),
        "entropy": torch.zeros(rows, steps, device=device),
    }
    going = torch.ones(rows, dtype=torch.bool, device=device)
    for t in range(steps):
        token, logp, entropy = draw(head(texts.states), uniform[live, t], temperature, top_p)
        out["ids"][live, t], out["logp"][live, t], out["entropy"][live, t] = token, logp, entropy
        ended = torch.isin(token, stops) & going
        out["lengths"][live[ended]] = t + 1
        going = going & ~ended
        left = int(going.sum())
        if left == 0 or t + 1 == steps:
            break
        if left <= 0.75 * len(going):  # shrinking the batch copies the cache: only when it pays
            keep = going.nonzero()[:, 0]
            texts.keep(keep)
            live, token, going = live[keep], token[keep], going[keep]
        texts.append(token)
    inside = torch.arange(steps, device=device) < out["lengths"][:, None]
    return {key: value if key == "lengths" else value * inside for key, value in out.items()}


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sample `[n, V]` logits by inverse CDF at `uniform [n]`: token ids, their log-probs and the entropies at temperature 1.

    A token without probability is never drawn. Raises OpdlabError where the logits hold no distribution (NaN, +inf).
    """
    norm = logits.logsumexp(-1, keepdim=True)
    p = (logits - norm).exp_()
    with without_autocast(logits.device):  # which would round vecdot to bfloat16
        entropy = norm[:, 0] - torch.linalg.vecdot(p, logits.clamp(min=torch.finfo(logits.dtype).min))
    if not bool(torch.isfinite(norm).all()):
        raise OpdlabError("The model's logits hold NaN or infinity while sampling. Check its weights, dtype and learning rate.")
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        if temperature != 1:
            p = (logits / temperature).softmax(-1)
        token = _invert(_nucleus(p, top_p) if top_p < 1 else p, uniform)
    return token, logits.gather(-1, token[:, None])[:, 0] - norm[:, 0], entropy


def _invert(p: Tensor, uniform: Tensor) -> Tensor:
    cdf = p.cumsum(-1)
    whole = cdf[:, -1]
    point = (uniform * whole).to(cdf.dtype).minimum(whole.nextafter(torch.zeros_like(whole)))  # rounding must not reach the end
    return torch.searchsorted(cdf, point[:, None], right=True)[:, 0]


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest likeliest tokens that together hold `top_p`."""
    ordered, ids = p.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
    return torch.zeros_like(p).scatter_(-1, ids, ordered)
