"""Teachers that are no local `Policy`: a model that only writes, services that write, servers that
grade.

All of them `write(prompts, n, prefixes=…)` and `check(student, prompts, max_new_tokens)`; those
with log-probs also `grade(rollout)`. `distill` takes any of them as its `teacher`. What they write
is a `WrittenText`, which says whether the text was finished or cut.
"""

from opdlab.data.written_text import WrittenText
from opdlab.teachers.budget import Budget, Usage
from opdlab.teachers.cache import Cache
from opdlab.teachers.logprob_server import LogprobServer
from opdlab.teachers.text_only import TextOnly
from opdlab.teachers.text_server import TextServer

__all__ = ["Budget", "Cache", "LogprobServer", "TextOnly", "TextServer", "Usage", "WrittenText"]
