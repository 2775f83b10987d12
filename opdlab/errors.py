"""The errors that opdlab raises on purpose.

Each message says what is wrong, with the values, and then what to do.
"""


class OpdlabError(Exception):
    """Base of all of them: `except opdlab.OpdlabError` catches what the user can mend."""


class InvalidValue(OpdlabError, ValueError):
    """A setting or an argument has a value that cannot be right."""


class UnsupportedModel(OpdlabError, ValueError):
    """A model whose numbers opdlab cannot compute rightly."""


class UnknownOption(InvalidValue, TypeError):
    """A keyword that what is called does not take."""


class TokenizerMismatch(OpdlabError):
    """Teacher and student do not speak the same tokens, or a tokenizer has tokens that its model
    lacks.
    """


class ContextTooLong(OpdlabError):
    """A prompt, with its hint and the tokens to come, does not fit the model."""


class MissingHint(OpdlabError):
    """A policy that sees hints was given a prompt without one."""


class MissingPolicy(OpdlabError):
    """A method needs a distribution that it was not given, or an ability that the policy lacks."""


class EmptyPrompts(OpdlabError):
    """Nothing to work on."""


class BadLoss(OpdlabError):
    """A loss returned the wrong shape, or does not depend on the student."""


class BadPlan(OpdlabError):
    """A plan returned something else than columns, or changed what it was given."""


class UnknownColumn(OpdlabError, AttributeError):
    """A name that is neither a policy nor a column of the plan."""


class UnknownName(OpdlabError, KeyError):
    """A trace or a batch has nothing under this name; the message lists what there is."""

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


class NonFinite(OpdlabError):
    """NaN or infinity where a number must be; the weights were not touched."""

    row: int | None = None  # the first offending token of the pass
    is_explained: bool = (
        False  # whether the message says where the number comes from and what to do
    )


class DamagedFile(OpdlabError):
    """A checkpoint or trace that is not what was written."""


class TeacherError(OpdlabError):
    """A server that teaches is not there, or answers something else than it was asked."""

    status: int | None = None  # the HTTP status, where the server refused


class BudgetSpent(OpdlabError):
    """The next request to a server could cost more than was allowed."""


class PartialDistribution(OpdlabError):
    """A loss wants the whole distribution of a teacher that gives some of its log-probs."""


class BadVerifier(OpdlabError):
    """A verifier failed, or returned anything but one number from 0 to 1."""
