"""What a run saves loads in plain PEFT and transformers, in a fresh process, unchanged."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import opdlab as opd
from opdlab import Policy, Prompt
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.training.model_card import escape

SECRET = "hf_verysecretkey"

# A process without opdlab: it runs the code of cards, and sends log-probs of some ids back. One for
# all tests, since importing PyTorch takes seconds.
READER = """
import json, sys
import torch
for line in sys.stdin:
    code, ids, quantised, place = json.loads(line)
    found = {}
    exec(code, found)
    model, tokenizer = found["model"].eval(), found["tokenizer"]
    for layer in model.modules():
        if quantised and type(layer).__module__.startswith("bitsandbytes"):
            layer.train()  # without the kernel that rounds on a CPU, as opdlab computes
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    assert not [name for name in sys.modules if name.split(".")[0] == "opdlab"]
    from safetensors.torch import save_file
    save_file({"logp": logp.contiguous()}, place)
    print("RESULT " + json.dumps(tokenizer.chat_template), flush=True)
"""


def code_of(folder: Path) -> str:
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


@pytest.fixture(scope="module")
def reader():
    process = subprocess.Popen(
        [sys.executable, "-c", READER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )

    def read(folder: Path, ids: list[int], quantised: bool = False):
        place = folder.parent / "logp.safetensors"
        request = json.dumps([code_of(folder), ids, quantised, str(place)])
        process.stdin.write(f"{request}\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("RESULT "):
                return load_file(place)["logp"], json.loads(line.removeprefix("RESULT "))
        raise AssertionError(f"the code of the card failed: {code_of(folder)}")

    yield read
    process.stdin.close()
    process.wait()


def log_probs(policy: Policy, ids: list[int]) -> torch.Tensor:
    with torch.no_grad(), policy.weights.using(policy.adapter) as model:
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


IDS = [5, 9, 30, 12, 44, 7, 8, 9, 10, 11]
HELD_OUT = [Prompt("cleo"), Prompt("ana buys 3"), Prompt("ben sells 2")]
PROMPTS = [Prompt("ana has 4"), Prompt("ben"), Prompt("dan has 1")]


@pytest.fixture
def folder(tmp_path, make_model, words):
    def make(**config) -> Path:
        path = tmp_path / "base"
        sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
        make_model(len(words), **{**sizes, **config}).save_pretrained(path)
        words.save_pretrained(path)
        return path

    return make


def trained(student: Policy, **settings):
    """A run of two large steps toward another policy with the same tokens."""
    teacher = student.copied() if student.adapter is None else student.without_adapter().copied()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in teacher.weights.model.parameters():
            if value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    task = opd.tasks.from_prompts(
        [*PROMPTS, *HELD_OUT],
        name="names",
        test=3,
        max_new_tokens=6,
        verify=lambda prompt, text: 0.5,
    )
    given = {"steps": 2, "batch": 3, "max_new_tokens": 6, "lr": 3e-2, "quiet": True, **settings}
    return opd.distill(student, teacher, task, **given).train()


KINDS = {
    "plain": ({}, {}, {}),
    "tied": ({"tie_word_embeddings": True}, {}, {}),
    "modules to save": ({}, {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}, {}),
    "dora": ({}, {"use_dora": True}, {}),
    "bfloat16": ({}, {}, {"dtype": "bfloat16"}),
    "a template of its own": ({}, {}, {"chat_template": "{{ messages[0]['content'] }}"}),
    "4bit": ({}, {}, {"quantization": "4bit"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_as_its_card_says(kind, folder, reader, tmp_path):
    config, lora, options = KINDS[kind]
    if "quantization" in options:
        pytest.importorskip("bitsandbytes")
    student = Policy.load(folder(**config), device="cpu", **options).adapt(4, **lora)
    run = trained(student)
    saved = run.save_adapter(tmp_path / "adapter")
    want = log_probs(run.student, IDS)
    assert (want - log_probs(run.student.without_adapter(), IDS)).abs().max() > 0.05
    got, template = reader(saved, IDS, "quantization" in options)
    close = {"atol": 1e-2 if kind == "bfloat16" else 1e-4, "rtol": 0}
    torch.testing.assert_close(got, want, **close)
    assert template == run.student.tokenizer.chat_template
    given = {k: v for k, v in options.items() if k in ("quantization", "dtype")}
    again = Policy.load(saved, device="cpu", **given)
    torch.testing.assert_close(log_probs(again, IDS), want)
    assert again.tokenizer.chat_template == template


@pytest.mark.parametrize("kind", ["plain", "tied", "modules to save", "dora", "4bit"])
def test_an_exported_model_loads_as_its_card_says(kind, folder, reader, tmp_path):
    config, lora, options = KINDS[kind]
    if "quantization" in options:
        pytest.importorskip("bitsandbytes")
    run = trained(Policy.load(folder(**config), device="cpu", **options).adapt(4, **lora))
    want = log_probs(run.student, IDS)
    got, _ = reader(run.export(tmp_path / "merged"), IDS)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)
    if "quantization" in options:
        with pytest.raises(InvalidValue, match="merged=False for a base model that is 4-bit"):
            run.export(tmp_path / "both", merged=False)
        return
    got, _ = reader(run.export(tmp_path / "both", merged=False), IDS)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_a_resized_vocabulary_goes_along(folder, reader, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = folder()
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<new>", "<newer>"])
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer))
    run = trained(Policy.of(model, tokenizer).adapt(4))
    want = log_probs(run.student, IDS)
    saved = run.save_adapter(tmp_path / "adapter")
    got, _ = reader(saved, IDS)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    again = Policy.load(saved, device="cpu")
    torch.testing.assert_close(log_probs(again, IDS), want)
    assert len(again.tokenizer) == len(tokenizer)


def test_full_training_is_exported_and_its_checkpoint_loads(folder, reader, tmp_path):
    from transformers import AutoModelForCausalLM

    run = trained(Policy.load(folder(), device="cpu"), lora=None, lr=1e-3, save=tmp_path / "run")
    want = log_probs(run.student, IDS)
    got, _ = reader(run.export(tmp_path / "model"), IDS)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "step-000002").eval()
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([IDS])).logits[0].log_softmax(-1)
    torch.testing.assert_close(logp, want, atol=1e-4, rtol=0)
    with pytest.raises(InvalidValue, match=r"has no adapter\. Use run\.export"):
        run.save_adapter(tmp_path / "adapter")


def test_a_resumed_run_saves_the_same(folder, tmp_path):
    source = folder()
    run = trained(Policy.load(source, device="cpu"), save=tmp_path / "run")
    resumed = opd.resume(
        tmp_path / "run", Policy.load(source, device="cpu"), run.teacher, run.task, quiet=True
    )
    one, two = (r.save_adapter(tmp_path / n) for r, n in ((run, "a"), (resumed, "b")))
    name = "adapter_model.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()


def test_saving_is_atomic_and_replaces_its_own_folders_only(folder, tmp_path, monkeypatch):
    run = trained(Policy.load(folder(), device="cpu"))
    saved = run.save_adapter(tmp_path / "deep" / "adapter")
    before = {one.name: one.read_bytes() for one in saved.iterdir()}
    monkeypatch.setattr(
        type(run.student.tokenizer),
        "save_pretrained",
        lambda *_: (_ for _ in ()).throw(OSError("full")),
    )
    with pytest.raises(OSError, match="full"):
        run.save_adapter(saved)
    assert {one.name: one.read_bytes() for one in saved.iterdir()} == before
    assert [one.name for one in saved.parent.iterdir()] == ["adapter"]
    monkeypatch.undo()
    assert run.save_adapter(saved) == saved
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InvalidValue, match="where something else lies"):
        run.export(tmp_path / "mine")
    with pytest.raises(InvalidValue, match="path=3"):
        run.save_adapter(3)


def test_the_card_says_what_was_done(folder, tmp_path):
    run = trained(Policy.load(folder(), device="cpu"), evaluate_every=1)
    after = opd.evaluate(run.student, run.task, n=3)
    saved = run.save_adapter(tmp_path / "adapter", evaluations={"after": after})
    card = (saved / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft"
    assert "opdlab" in head["tags"]
    assert "base_model" not in head, "a folder of this machine is no model of the Hub"
    low, high = after.interval.low, after.interval.high
    whole = opd.evaluate(run.student, run.task).interval
    for said in (
        f"| after | 0.500 | {low:.3f} to {high:.3f} | 3 |",
        f"| step 2 | 0.500 | {whole.low:.3f} to {whole.high:.3f} | {whole.prompts} |",
        "| method | OPD |",
        "| task | names |",
        "| seed | 0 |",
        "| LoRA rank | 16 |",
        "| opdlab | ",
        "peak memory",
        "seconds of training",
    ):
        assert said in card, said
    with pytest.raises(InvalidValue, match="Use a dict of evaluations by name"):
        run.save_adapter(tmp_path / "b", evaluations={"after": 0.5})


def test_foreign_text_stays_text(folder, tmp_path):
    run = trained(Policy.load(folder(), device="cpu"))
    bad = "x`\n---\nlicense: mit\n---\n<script>alert(1)</script> | [a](http://b) **c** \" ''' ```"
    run.task = type(run.task)(**{**vars(run.task), "name": bad})
    run.student.weights.source = bad
    card = (run.save_adapter(tmp_path / "adapter") / "README.md").read_text()
    head, body = card.split("---\n")[1], "---\n".join(card.split("---\n")[2:])
    assert "license" not in yaml.safe_load(head)
    outside = re.sub(r"^(`{3,})python\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    for mark in ("<script", "](http", "**c**", "```", "\n---"):
        assert mark not in outside, mark
    block = re.search(r"^(`{3,})python\n(.*?)^\1$", body, re.DOTALL | re.MULTILINE)[2]
    compile(block, "card", "exec")
    assert escape("a|b<c>") == "a&#124;b&#60;c&#62;"


# The Hub.


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files needs."""

    def log_message(self, *_):
        pass

    def _answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        server.seen.append((self.path, self.headers.get("Authorization"), body))
        if self.headers.get("Authorization") != f"Bearer {SECRET}":
            self._answer({"error": f"Invalid token {SECRET}"}, 401)
        elif self.path.endswith("/repos/create"):
            name = json.loads(body)["name"]
            self._answer({"url": f"{server.url}/me/{name}", "name": f"me/{name}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        elif "/commit/" in self.path:
            self._answer({"commitUrl": f"{server.url}/me/x/commit/1", "commitOid": "1" * 40})
        else:
            self._answer({})

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Authorization"), b""))
        self._answer({"id": "me/x", "sha": "1" * 40, "siblings": []})

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.seen = f"http://127.0.0.1:{server.server_address[1]}", []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(hf_api.constants, "ENDPOINT", server.url)
    yield server
    server.shutdown()


def test_an_adapter_is_pushed_with_its_card(hub, folder, tmp_path):
    run = trained(Policy.load(folder(), device="cpu"))
    address = run.push_to_hub("me/mine", private=True, token=SECRET)
    assert address == f"{hub.url}/me/mine"
    created = json.loads(next(body for path, _, body in hub.seen if path.endswith("/create")))
    assert created.get("private") is True or created.get("visibility") == "private"
    commit = next(body for path, _, body in hub.seen if "/commit/main" in path).decode()
    sent = [json.loads(line) for line in commit.splitlines()]
    names = {line["value"]["path"] for line in sent if line["key"] == "file"}
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json"} <= names
    assert "tokenizer.json" in names
    assert not [name for name in names if name.startswith(".")]
    assert SECRET not in commit
    run.push_to_hub("me/mine", merged=True, token=SECRET, revision="trained")
    commit = next(body for path, _, body in hub.seen if "/commit/trained" in path).decode()
    assert '"path": "model.safetensors"' in commit or '"path":"model.safetensors"' in commit


def test_a_refused_push_says_so_without_the_token(hub, folder):
    run = trained(Policy.load(folder(), device="cpu"))
    with pytest.raises(OpdlabError, match="Nothing could be pushed to 'me/mine'") as caught:
        run.push_to_hub("me/mine", token=f"{SECRET}wrong")
    assert SECRET not in str(caught.value).replace(f"{SECRET}wrong", "")
    assert f"{SECRET}wrong" not in str(caught.value)
    for name in ("a/b/c", "", 3, "../x"):
        with pytest.raises(InvalidValue, match="repo_id="):
            run.push_to_hub(name, token=SECRET)
