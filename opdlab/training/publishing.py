"""Save what a run trained so that plain PEFT and transformers load it, and push it to the Hub."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models import model_files
from opdlab.models.adapters import files as adapter_files
from opdlab.models.quantization import describe_quantization
from opdlab.support.expect import shortened
from opdlab.support.interrupts import hold_interrupts
from opdlab.training.evaluation import Evaluation
from opdlab.training.model_card import Form, write_card
from opdlab.training.state import RunState

MARK = ".opdlab"  # an empty file: a folder that has it may be written again
Evaluations = Mapping[str, Evaluation] | None


def save_adapter(
    run: RunState, path: str | os.PathLike[str], evaluations: Evaluations = None
) -> Path:
    """Write the student's adapter with tokenizer and card, atomically.

    Args:
        run: The run.
        path: The folder; one that was written by this function before is replaced.
        evaluations: Evaluations for the card, by name.

    Returns:
        The folder.

    Raises:
        InvalidValue: The student has no adapter, or the folder holds something else.
    """
    folder = _as_folder(path, "save_adapter")
    _check_adapter(run, "save_adapter")
    with _replacing(folder) as new:
        _write_adapter(run, new)
        _write_card(run, new, Form.ADAPTER, str(folder), evaluations)
    return folder


def export(
    run: RunState,
    path: str | os.PathLike[str],
    merged: bool = True,
    evaluations: Evaluations = None,
) -> Path:
    """Write a whole model with tokenizer and card, atomically.

    Args:
        run: The run.
        path: The folder; one that was written by this function before is replaced.
        merged: Whether the adapter is added to the weights. Otherwise the base model is written,
            and the adapter into the folder `adapter` in it.
        evaluations: Evaluations for the card, by name.

    Returns:
        The folder.

    Raises:
        InvalidValue: The folder holds something else, or the base model is quantised and
            `merged=False`.
    """
    folder = _as_folder(path, "export")
    form = _check_form(run, merged)
    with _replacing(folder) as new:
        _write_model(run, new, form)
        _write_card(run, new, form, str(folder), evaluations)
    return folder


def push_to_hub(
    run: RunState,
    repo_id: str,
    *,
    merged: bool | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    evaluations: Evaluations = None,
) -> str:
    """Upload the adapter, or the whole model, with its card to the Hub.

    Args:
        run: The run.
        repo_id: The repository, as "name/model"; it is made if it is not there.
        merged: None uploads the adapter (the model, if all weights were trained); True the model
            with the adapter added to its weights.
        private: Whether a new repository is private; the account's default by default.
        token: The Hub's token; by default the one that is saved on this machine. It is written
            nowhere.
        revision: The branch to upload to; it is made if it is not there.
        evaluations: Evaluations for the card, by name.

    Returns:
        The address of the repository.

    Raises:
        InvalidValue: The name is none.
        OpdlabError: The Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except (HFValidationError, TypeError, AttributeError):
        raise InvalidValue(
            f"push_to_hub got repo_id={shortened(repo_id)}. Use the name of a repository, as"
            " 'name/model'."
        ) from None
    has_adapter = run.student.adapter is not None
    form = Form.ADAPTER if has_adapter and not merged else Form.MERGED
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        if form is Form.ADAPTER:
            _write_adapter(run, folder)
        else:
            _write_model(run, folder, form)
        _write_card(run, folder, form, repo_id, evaluations)
        api = HfApi(token=token)
        try:
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(made.repo_id, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=made.repo_id,
                folder_path=folder,
                revision=revision,
                commit_message="Upload with opdlab",
                ignore_patterns=[MARK],
            )
        except Exception as error:  # the Hub's client has errors of many libraries
            raise _refused(repo_id, error, token) from None
    return str(made)


def _refused(repo_id: str, error: Exception, token: str | None) -> OpdlabError:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    said = said or type(error).__name__
    if isinstance(token, str) and token:
        said = said.replace(token, "***")
    return OpdlabError(
        f"Nothing could be pushed to {repo_id!r}: {said[:300]} Check the name and the token (hf"
        " auth login, or token=…), or save it here: run.save_adapter('a folder')."
    )


def _check_adapter(run: RunState, where: str) -> str:
    if run.student.adapter is None:
        raise InvalidValue(
            f"{where}: this run trains all weights and has no adapter. Use run.export('a folder')."
        )
    return run.student.adapter


def _check_form(run: RunState, merged: Any) -> Form:
    if not isinstance(merged, bool):
        raise InvalidValue(f"export got merged={shortened(merged)}. Use True or False.")
    if merged or run.student.adapter is None:
        return Form.MERGED
    if how := describe_quantization(run.student.weights.model):
        raise InvalidValue(
            f"export got merged=False for a base model that is {how}. Use"
            " run.save_adapter('a folder'), or merged=True, which writes plain weights."
        )
    return Form.BASE_AND_ADAPTER


def _write_adapter(run: RunState, folder: Path) -> None:
    weights, name = run.student.weights, _check_adapter(run, "save_adapter")
    state = weights.adapter_state(name)
    if run.has_new_embeddings:
        beside = model_files.embeddings(weights)
        state = {**{key: value for key, value in beside.items() if key not in state}, **state}
    adapter_files.write(folder, weights.config_of(name), state, weights.source or None)
    weights.tokenizer.save_pretrained(folder)


def _write_model(run: RunState, folder: Path, form: Form) -> None:
    if form is Form.BASE_AND_ADAPTER:
        model_files.write_model(run.student.weights, folder)
        adapter = folder / "adapter"
        adapter.mkdir()
        _write_adapter(run, adapter)
        return
    is_plain = run.student.adapter is None
    weights = run.student.weights if is_plain else run.student.merged().weights
    model_files.write_model(weights, folder)


def _write_card(
    run: RunState, folder: Path, form: Form, name: str, evaluations: Evaluations
) -> None:
    (folder / "README.md").write_text(write_card(run, form, name, evaluations), encoding="utf-8")
    (folder / MARK).touch()


def _as_folder(path: Any, where: str) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not str(path).strip() or "\0" in str(path):
        raise InvalidValue(f"{where} got path={shortened(path)}. Use the path of a folder.")
    folder = Path(path).expanduser()
    is_ours = (folder / MARK).exists()
    if folder.exists() and not is_ours and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidValue(
            f"{where} got path={str(folder)!r}, where something else lies. Use a new folder."
        )
    return folder


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the name of `folder` when the block is done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    old = new.with_name(f"{new.name}.old")
    try:
        new.chmod(0o755)  # temporary folders are for their owner alone
        yield new
        with hold_interrupts():
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
