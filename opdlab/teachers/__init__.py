"""Teachers that are no local `Policy`: a model that only writes, and servers that write or grade.

All of them have `write(prompts, n, prefixes=…)` and `check(student, prompts, max_new_tokens)`;
those with log-probs also have `grade(rollout)`. `distill` takes any of them as its `teacher`. Their
texts are `WrittenText`s, which say whether the text was finished or cut.
"""

from opdlab.data.written_text import WrittenText
from opdlab.teachers.budget import Budget, Usage
from opdlab.teachers.byte_teacher import ByteTeacher
from opdlab.teachers.cache import Cache, rescue
from opdlab.teachers.contract import Checked, Grader, Writer
from opdlab.teachers.logprob_server import LogprobServer
from opdlab.teachers.many import MultiTeacher
from opdlab.teachers.text_only import TextOnly
from opdlab.teachers.text_server import TextServer

# mypy reads these lines: a class that does not fit its protocol is an error.
_WRITERS: tuple[type[Writer], ...] = (TextOnly, TextServer, LogprobServer, MultiTeacher)
_CHECKED: tuple[type[Checked], ...] = (
    TextOnly,
    TextServer,
    LogprobServer,
    MultiTeacher,
    ByteTeacher,
)
_GRADERS: tuple[type[Grader], ...] = (LogprobServer, MultiTeacher, ByteTeacher)

__all__ = [
    "Budget",
    "ByteTeacher",
    "Cache",
    "LogprobServer",
    "MultiTeacher",
    "TextOnly",
    "TextServer",
    "Usage",
    "WrittenText",
    "rescue",
]
