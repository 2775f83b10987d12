"""`conform`: examine a loss of any code base on toy models whose gradients are known exactly."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch

from opdlab.audit.auditing import make_table
from opdlab.conformance import claim_checks, mask_checks, norm_checks, range_checks
from opdlab.conformance.calling import Caller, OutOfTime
from opdlab.conformance.case import Case
from opdlab.conformance.claim_checks import label_of
from opdlab.conformance.export import case_of_method
from opdlab.conformance.finding import Finding, Status
from opdlab.conformance.probe import Probe, failed, skipped
from opdlab.conformance.report import Conformance
from opdlab.conformance.spec import Spec
from opdlab.errors import BadLoss, InvalidValue
from opdlab.methods.contract import Method, name_of
from opdlab.support.expect import shortened
from opdlab.support.progress import Progress
from opdlab.support.validation import Flag, Positive, Seed, validate_arguments

Question = Callable[[Probe], Finding]

# In the order in which they are asked: a mistake is named by the first question that finds it.
QUESTIONS: dict[str, Question] = {
    "call": mask_checks.check_call,
    "alignment": mask_checks.check_alignment,
    "prompt": mask_checks.check_prompt,
    "padding": mask_checks.check_padding,
    "mask": mask_checks.check_mask,
    "eos": mask_checks.check_eos,
    "truncation": mask_checks.check_truncation,
    "empty batch": mask_checks.check_empty,
    "gradient": claim_checks.check_gradient,
    "claim": claim_checks.check_claim,
    "scale": claim_checks.check_scale,
    "bias": claim_checks.check_bias,
    "extra terms": claim_checks.check_extra_terms,
    "equality": claim_checks.check_equality,
    "value": claim_checks.check_value,
    "tail": claim_checks.check_tail,
    "temperature": range_checks.check_temperature,
    "parameter": range_checks.check_parameter,
    "rows": norm_checks.check_rows,
    "reduction": norm_checks.check_reduction,
    "accumulation": norm_checks.check_accumulation,
    "processes": norm_checks.check_processes,
    "head": norm_checks.check_head,
    "extremes": range_checks.check_extremes,
    "ruled out": range_checks.check_ruled_out,
}
# After one of these fails, the others would only repeat it.
GATES = ("call", "alignment")
# What a failure explains, so that its consequences are not counted again.
EXPLAINED = {
    "prompt": ("mask", "scale", "reduction", "accumulation", "processes", "rows"),
    "padding": ("mask", "eos", "scale", "reduction", "accumulation", "processes", "rows"),
    "mask": ("reduction", "accumulation", "processes"),
    "eos": ("truncation", "reduction", "accumulation", "processes"),
    "truncation": ("rows", "reduction", "accumulation", "processes"),
    "gradient": ("claim", "scale", "bias"),
    "claim": ("bias", "temperature", "parameter"),
    "rows": ("reduction", "accumulation", "processes"),
    "reduction": ("accumulation", "processes"),
}


@validate_arguments
def conform(
    loss: Any,
    spec: Any = None,
    *,
    name: str | None = None,
    seed: Seed = 0,
    seconds: Positive = 300.0,
    quiet: Flag = True,
) -> Conformance:
    """Certify a loss: which divergence's gradient it trains, and what it does with its inputs.

    The loss is called on toy models of a few tokens, whose every text and probability is known, so
    its expected gradient is computed and not sampled. Each question is answered by pass, fail, a
    caution, or skip; known mistakes are called by their names
    (`opdlab.conformance.MISTAKES`).

    Args:
        loss: A function with the arguments of one of the protocols of
            `opdlab.conformance.contract`, a `Case`, or one of opdlab's own methods.
        spec: How it is called and what it claims, as a `Spec`; by default it takes logits and
            claims nothing. A case and a method bring their own.
        name: Its name in the report.
        seed: Seed of the toy models.
        seconds: After this time no more questions are asked, and the loss does not pass.
        quiet: Whether to show no progress.

    Returns:
        The report.

    Raises:
        InvalidValue: It is no loss, or the spec is none.
        OpdlabError: A method reads more than student and teacher.
    """
    case = _case(loss, spec, name)
    progress = Progress(len(QUESTIONS), "conform", "question", quiet=quiet, leave=False)
    began = time.monotonic()
    caller = Caller(case.loss, case.spec, began + seconds)
    with _kept_generators(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = Probe(caller, case.name, seed)
        try:
            findings = list(_ask(probe, progress))
        finally:
            progress.close()
        return _report(probe, findings, time.monotonic() - began)


def is_method(loss: Any) -> bool:
    """Tell whether this is one of opdlab's kind of methods, or the class of one.

    Args:
        loss: Anything.

    Returns:
        Whether it has `needs` and a loss of rows.
    """
    is_class = isinstance(loss, type) and hasattr(loss, "needs") and hasattr(loss, "loss")
    return isinstance(loss, Method) or is_class


def _case(loss: Any, spec: Any, name: str | None) -> Case:
    """Make a case of what a user gave."""
    if spec is not None and not isinstance(spec, Spec):
        raise InvalidValue(
            f"conform got spec={shortened(spec)}. Use opdlab.conformance.Spec(kind='logits', …)."
        )
    if isinstance(loss, Case):
        if spec is not None:
            raise InvalidValue("conform got a case and a spec. A case has its own; leave it out.")
        return loss if name is None else Case(name, loss.loss, loss.spec)
    if is_method(loss):
        if spec is not None:
            raise InvalidValue(
                "conform got a method and a spec. A method brings its own; leave it out, or export"
                " the method first (opdlab.conformance.for_trl)."
            )
        return case_of_method(loss, name)
    if not callable(loss) or isinstance(loss, type):
        raise InvalidValue(
            f"conform got {shortened(loss)}. Give a function of the student's and the teacher's"
            " logits and a mask, or a method, as opdlab.OPD()."
        )
    return Case(name or name_of(loss), loss, spec or Spec())


@contextmanager
def _kept_generators(seed: int) -> Iterator[None]:
    """Give a loss that draws random numbers the same ones each time, and leave the user's alone.

    PyTorch's settings for the whole process are put back as well.
    """
    kept = random.getstate(), np.random.get_state()
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def _ask(probe: Probe, progress: Progress) -> Iterator[Finding]:
    """Ask all questions, but for those that a failure has already answered."""
    closed: dict[str, str] = {}
    for i, (check, question) in enumerate(QUESTIONS.items()):
        progress.update(i, question=check)
        if check in closed:
            yield skipped(check, f"Not asked, since {closed[check]} fails.")
            continue
        try:
            found = question(probe)
        except OutOfTime:
            yield failed(check, "out_of_time", "The time was over. Give more seconds.")
            closed = dict.fromkeys(QUESTIONS, "the time")
            continue
        except BadLoss as error:
            found = failed(check, "no_loss", str(error))
        if found.status is Status.FAIL:
            others = QUESTIONS if check in GATES else EXPLAINED.get(check, ())
            closed |= {other: check for other in others if other not in closed}
        yield found


def _report(probe: Probe, findings: list[Finding], seconds: float) -> Conformance:
    """Put the report together; the table and the verdict need the reading of the world."""
    table, verdict = pd.DataFrame(), "It could not be read."
    if "far" in probe.__dict__:
        table, verdict = make_table(probe.far.matches), probe.far.verdict
    claim = ""
    if probe.spec.trains:
        claim = label_of(probe.spec)
        said = next(one for one in findings if one.check == "claim")
        verdict = said.said if said.status is not Status.SKIP else verdict
    return Conformance(probe.name, claim, verdict, tuple(findings), table, seconds)
