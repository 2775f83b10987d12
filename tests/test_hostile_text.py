"""Foreign text steers no terminal: 200 strings through what prints, on a real terminal (a pty)."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest
from warm_start import python

# What a terminal obeys, in the forms that it takes; each sets a title, clears the screen, moves,
# asks for an answer, opens a link, turns the order of letters, or rings.
ORDERS = (
    "\x1b]0;owned\x07",
    "\x1b[2J",
    "\x1b[31m",
    "\x1b[6n",
    "\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x1bP0;1|17/owned\x1b\\",
    "\x1b]52;c;b3duZWQ=\x07",
    "\x9b2J",
    "\x9d0;owned\x9c",
    "\u202edesrever",
    "\u2066isolated\u2069",
    "\rowned",
    "\b\b\bowned",
    "\x07",
    "\x00",
    "\x7f",
    "\u2028owned",
)
AROUND = (
    "{}",
    "[bold]{}[/bold]",
    "a {} b",
    "{}\\",
    "<b>{}</b>",
    "3 + {}",
    "${{x}}{}",
    "日本{}",
    "`{}`",
    "'{}'",
    '"{}"',
    "%s{}",
)
STRINGS = [around.format(order) for order in ORDERS for around in AROUND]
FORBIDDEN = (
    "\x1b]",
    "\x1bP",
    "\x1b[2J",
    "\x1b[6n",
    "\x9b",
    "\x9d",
    "\u202e",
    "\u2066",
    "\u2028",
    "\x07",
    "\b",
    "\x00",
    "\x7f",
)

PRINTING = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
import opdlab as opd
from opdlab.commands.output import Output
from opdlab.support.consoles import make_console
from rich.markup import escape
from rich.table import Table

student, teacher, task = opd.load("market")
rollout = student.sample(task.prompts(1), max_new_tokens=4, seed=0)
trace = opd.score(rollout, student, teacher)
found = opd.evaluate(student, task, n=1, max_new_tokens=2, quiet=True)
console, output = make_console(), Output(is_json=False)
for text in json.load(open(sys.argv[1], encoding="utf-8")):
    table = Table("text")
    table.add_row(escape(text))
    console.print(table)
    console.print(text, markup=False)
    output.say(text)
    print(opd.Prompt(text, id=text, hint=text))
    print(opd.evaluate(student, task, n=1, max_new_tokens=2, quiet=True, name=text))
    print(opd.Task(text, task.draw, task.verify, 4))
    for view in (opd.viz.TokenLens, opd.viz.Timeline, opd.viz.Rollouts):
        print(view(trace, title=text))
    for wrong in (
        lambda: opd.load(text),
        lambda: opd.distill(student, teacher, task, method=text),
        lambda: opd.distill(student, teacher, task, **{text: 1}),
        lambda: trace.column(text),
        lambda: opd.Trace.load(text),
        lambda: opd.tasks.from_records([{text: 1}]),
        lambda: opd.resume(text, student, teacher, task),
        lambda: opd.teachers.TextServer(text),
        lambda: opd.method(needs=(text,))(lambda rows: 0),
    ):
        try:
            wrong()
        except Exception as error:
            print(type(error).__name__, error)
print("end of the strings")
"""


def on_a_terminal(command: list[str], folder: Path) -> str:
    """Run a command on a terminal of its own, and return all that it wrote there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        close_fds=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    process.wait()
    os.close(ours)
    return b"".join(parts).decode("utf-8", "replace")


def test_there_are_two_hundred():
    assert len(STRINGS) >= 200
    assert len(set(STRINGS)) == len(STRINGS)


def test_what_prints_shows_orders_as_text(tmp_path):
    (tmp_path / "strings.json").write_text(json.dumps(STRINGS), encoding="utf-8")
    said = on_a_terminal([python(), "-c", PRINTING, "strings.json"], tmp_path)
    assert "end of the strings" in said, said[-2000:]
    for order in FORBIDDEN:
        assert order not in said, said[max(0, said.find(order) - 200) : said.find(order) + 50]
    assert said.count("\r") == said.count("\r\n")  # the terminal's own line ends
    assert r"\x1b]0;owned\x07" in said
    assert r"\u202edesrever" in said


@pytest.mark.parametrize("words", [["--task", "questions.jsonl"], ["--who", ORDERS[0]]])
def test_the_command_line_shows_orders_as_text(tmp_path, words):
    lines = [{"prompt": f"3 + 4 ={order}", "answer": order} for order in ORDERS[:7]]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "questions.jsonl").write_text(text, encoding="utf-8")
    command = [python(), "-m", "opdlab.commands.cli", "sample", "--student", "student"]
    said = on_a_terminal(
        [*command, "--teacher", "teacher", *words, "--prompts", "3", "--max-new-tokens", "8"],
        tmp_path,
    )
    for order in FORBIDDEN:
        assert order not in said, said[max(0, said.find(order) - 200) : said.find(order) + 50]
    assert "owned" in said or r"\x1b" in said
