"""Put back what a checkpoint holds: the adapter with its settings, and the optimizer's state."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from opdlab.errors import DamagedFile, OpdlabError
from opdlab.models.adapters.files import json_default
from opdlab.models.shards import share_of
from opdlab.support.tensor_files import check_same_tensors
from opdlab.training import checkpoint, run_folder
from opdlab.training.optimizer_files import SavedOptimizer, plain_name
from opdlab.training.state import RunState

# Settings of an adapter that change its numbers; what PEFT adds besides are names and bookkeeping.
_ADAPTER = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "use_dora",
    "use_rslora",
    "bias",
    "lora_bias",
    "fan_in_fan_out",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "lora_dropout",
    "trainable_token_indices",
    "layer_replication",
)


@dataclass(frozen=True)
class SavedRun:
    """Hold a checkpoint that was found and verified, and what its `run.json` says.

    Attributes:
        folder: The checkpoint's folder.
        said: The content of `run.json`.
    """

    folder: Path
    said: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The step after which it was written."""
        return int(self.said["step"])

    @property
    def is_old(self) -> bool:
        """Whether it was written before checkpoints knew what the run was made of."""
        return int(self.said.get("format", 1)) < 2

    @property
    def batches(self) -> int:
        """How many batches of `settings` a step had: earlier versions counted one per process."""
        is_earlier = int(self.said.get("format", 1)) < 3
        return int(self.said.get("processes", 1)) if is_earlier else 1

    @property
    def lineage(self) -> run_folder.Lineage:
        """The run that wrote it; files of the first format have no name."""
        written = self.said.get("run", {"name": "", "root": "", "ancestors": {}})
        return run_folder.Lineage(written["name"], written["ancestors"], written["root"])


def fit_adapter(run: RunState, saved: SavedRun) -> None:
    """Give a student without adapter the one that the checkpoint describes.

    Refuses a student with another adapter.

    Args:
        run: The new run; its student may get an adapter.
        saved: The checkpoint; one of full training has no adapter, and nothing is done.

    Raises:
        OpdlabError: The student has an adapter of other settings.
        DamagedFile: The description of the adapter cannot be read.
    """
    path = saved.folder / "adapter_config.json"
    if not path.exists():
        return
    described = checkpoint.read_json(path)
    weights, name = run.student.weights, run.student.adapter
    if name is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT on fields of its other versions
            config = PeftConfig.from_pretrained(str(saved.folder))
        config.inference_mode = False
        run.student._adapter.name = weights.add_adapter(config, seed=run.settings.seed)
        return
    now = json.loads(json.dumps(weights.config_of(name).to_dict(), default=json_default))
    for key in _ADAPTER:
        before, after = (_unordered(side.get(key)) for side in (described, now))
        if key in described and before != after:
            raise OpdlabError(
                f"The student's adapter {name!r} has {key}={after} and that of {saved.folder} has "
                f"{before}. Give the student without an adapter: it gets the one that the"
                " checkpoint describes."
            )


def _unordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value


def restore_optimizer(run: RunState, saved: SavedRun) -> None:
    """Give every parameter its optimizer state.

    States are matched by names that do not depend on the adapter's name.

    Args:
        run: The new run, whose optimizer gets the states.
        saved: The checkpoint; one of step 0 may hold no states.

    Raises:
        DamagedFile: A parameter has no state, or one of another shape.
    """
    optimizer = SavedOptimizer(saved.folder)
    path = optimizer.path
    if not optimizer.shapes and saved.step == 0:
        return
    parameters = {plain_name(name, run.student.adapter): p for name, p in run.parameters.items()}
    states: dict[str, dict[str, str]] = {}  # of each parameter: the names of its tensors, by kind
    for key in optimizer.shapes:
        kind, name = key.split("/", 1)
        states.setdefault(name, {})[kind] = key
    states = _without_adapter(states, set(parameters))
    for kind in {kind for state in states.values() for kind in state}:
        shaped = {
            name: optimizer.shapes[state[kind]] for name, state in states.items() if kind in state
        }
        there = (
            parameters
            if kind != "step"
            else {name: shaped.get(name, p) for name, p in parameters.items()}
        )
        check_same_tensors(there, shaped, path)
    if not states:
        raise DamagedFile(
            f"{path} holds no optimizer state. Resume from an earlier checkpoint: step=N."
        )
    for name, p in parameters.items():
        read = {kind: optimizer.read(key) for kind, key in states[name].items()}
        run.optimizer.state[p] = {
            kind: value.to(p.device) if kind == "step" else share_of(value.to(p.device, p.dtype), p)
            for kind, value in read.items()
        }


def _without_adapter(states: dict[str, Any], wanted: set[str]) -> dict[str, Any]:
    """Take the adapter's name, which the first format kept, out of the names."""
    if states.keys() == wanted or not states:
        return states
    for part in next(iter(states)).split("."):
        renamed = {plain_name(name, part): state for name, state in states.items()}
        if renamed.keys() == wanted:
            return renamed
    return states
