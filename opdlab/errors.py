"""The errors that opdlab raises on purpose. Each message says what is wrong, with the values, and then what to do."""


class OpdlabError(Exception):
    """Base of all of them: `except opdlab.OpdlabError` catches what the user can mend."""


class InvalidValue(OpdlabError, ValueError):
    """A setting or an argument has a value that cannot be right."""


class UnknownOption(InvalidValue, TypeError):
    """A keyword that what is called does not take."""


class TokenizerMismatch(OpdlabError):
    """Teacher and student do not speak the same tokens."""


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


class UnknownColumn(OpdlabError, AttributeError):
    """A name that is neither a policy nor a column of the plan."""


class NonFinite(OpdlabError):
    """NaN or infinity where a number must be; the weights were not touched."""


class DamagedFile(OpdlabError):
    """A checkpoint or trace that is not what was written."""


class TeacherError(OpdlabError):
    """A server that teaches is not there, or answers something else than it was asked."""

    status: int | None = None  # the HTTP status, where the server refused


class BudgetSpent(OpdlabError):
    """The next request to a server could cost more than was allowed."""


class PartialDistribution(OpdlabError):
    """A loss wants the whole distribution of a teacher that gives some of its log-probs."""
