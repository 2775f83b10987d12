"""The errors that opdlab raises on purpose.

Each message says what is wrong, with the values, and then what to do. Foreign words in it cannot
steer a terminal.
"""

# Characters that a terminal obeys or that turn the order of others: C0 and C1 controls but for line
# breaks and tabs, and the marks of writing direction.
_STEERING = [
    *(code for code in range(32) if code not in (9, 10)),
    *range(127, 160),
    *(0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)),
]
_AS_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _STEERING}


def printable(text: str) -> str:
    """Make a foreign text fit for a terminal.

    Args:
        text: The text.

    Returns:
        The text, with characters that a terminal would obey written as Python's escapes.
    """
    return text.translate(_AS_ESCAPES)


class OpdlabError(Exception):
    """Something that the user can mend is wrong.

    It is the base of all errors here: `except opdlab.OpdlabError` catches them. It is raised itself
    where no other class fits.
    """

    def __str__(self) -> str:
        """The message, fit for a terminal."""
        return printable(super().__str__())


class InvalidValue(OpdlabError, ValueError):
    """A setting or an argument has a value that cannot be right.

    Raised when the value is passed, before anything is computed.
    """


class UnknownOption(InvalidValue, TypeError):
    """A keyword is passed to a function, a class or a setting that does not take it.

    Raised by the call.
    """


class UnsupportedModel(OpdlabError, ValueError):
    """A model's numbers would not be right in opdlab.

    Raised when a policy is made of it.
    """


class TokenizerMismatch(OpdlabError):
    """Two things that must share their tokens do not.

    Raised when a policy is made of a tokenizer with tokens that its model lacks, when a run begins
    with a teacher of other tokens than the student's, and when a policy is to grade a rollout of
    another tokenizer.
    """


class ContextTooLong(OpdlabError):
    """A prompt, with its hint and the tokens to come, does not fit the model's context.

    Raised before the model runs on it; by `distill`, before the first step.
    """


class MissingHint(OpdlabError):
    """A policy that sees hints is given a prompt without one.

    Raised when the prompt is read; by `distill`, before the first step.
    """


class MissingPolicy(OpdlabError):
    """A method needs a distribution that it was not given, or an ability that a policy lacks.

    Raised when a run is made, or by the function that compares policies.
    """


class EmptyPrompts(OpdlabError):
    """There are no prompts to work on, or a prompt has no tokens.

    Raised by the function that got them.
    """


class BadLoss(OpdlabError):
    """A loss returns the wrong shape, reads other rows, or does not depend on the student.

    Raised when a run is made and in every step, before the weights move.
    """


class BadPlan(OpdlabError):
    """A plan returns something else than columns, or changes the batch that it was given.

    Raised after the plan, before the loss runs.
    """


class UnknownColumn(OpdlabError, AttributeError):
    """A loss or a picture asks for a name that is neither a policy nor a column of the plan.

    Raised where the name is used; the message lists the names that there are.
    """


class UnknownName(OpdlabError, KeyError):
    """A trace or a batch has nothing under a name.

    Raised where the name is looked up; the message lists the names that there are.
    """

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


class NonFinite(OpdlabError):
    """A NaN or an infinity stands where a number must be.

    Raised in a step before the weights move, so they are as they were.

    Attributes:
        row: The first offending token of the pass; None if it is not known.
        is_explained: Whether the message says where the number comes from, and what to do.
    """

    row: int | None = None
    is_explained: bool = False


class DamagedFile(OpdlabError):
    """A checkpoint or a trace is not as it was written.

    Raised when the file is read; the run and its weights are as they were.
    """


class TeacherError(OpdlabError):
    """A server that teaches is not there, or answers something else than it was asked.

    Raised by the request, after it was tried again.

    Attributes:
        status: The HTTP status, where the server refused; None where it did not answer.
    """

    status: int | None = None


class SamplerError(OpdlabError):
    """A sampler such as vLLM is not there, or writes something else than it was asked.

    Raised by the call, after it was tried again. A run is between two steps then: what it has done
    is kept, and it can go on.
    """


class BudgetSpent(OpdlabError):
    """The next request to a server could cost more than was allowed.

    Raised before the request is sent.
    """


class PartialDistribution(OpdlabError):
    """A loss asks for the whole distribution of a teacher that gives some of its log-probs.

    Raised when a run is made and wherever the loss runs; the message names a loss that can do
    without.
    """


class BadVerifier(OpdlabError):
    """A verifier fails, or returns anything but one number from 0 to 1.

    Raised when a completion is checked.
    """
