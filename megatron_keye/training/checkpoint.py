"""Checkpoints in Megatron's distributed format: published whole or not at all, checksummed, found again, pruned.

run_dir/checkpoints/latest_checkpointed_iteration.txt
run_dir/checkpoints/iter_0000100/   Megatron's shards (weights, optimizer), and beside them
    state.json       iteration, samples consumed, layout
    model.json       the model's configuration
    resolved.yaml    the recipe as it ran
    loader_*.pt      where each data-parallel rank's reader stands
    rng_*.pt         random states of each rank
    checksums.json   crc32 and size of every file above
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from keye_data.accounting import Account
from megatron_keye.config.model import ModelConfig, check_same_model
from megatron_keye.errors import UserError
from megatron_keye.journal import crc_and_size
from megatron_keye.parallel.plan import Plan
from megatron_keye.parallel.together import together
from megatron_keye.training.model_state import load_model_state, metadata, model_state

if TYPE_CHECKING:
    from megatron_keye.training.engine import Engine

LATEST = "latest_checkpointed_iteration.txt"
# Of an optimizer's groups: what the recipe says now, not what it said when the checkpoint was written.
RECIPE_KEYS = ("max_lr", "min_lr", "betas", "eps", "wd_mult")
FULL = 16 * 2**20  # bytes free below which a failed save is put down to the disk


def iteration_folder(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def complete(root: Path) -> list[Path]:
    """Iteration folders that were published, oldest first. A folder gets its name only when it is whole."""
    return sorted(f for f in root.glob("iter_[0-9]*") if (f / "checksums.json").is_file())


def newest(root: Path) -> Path | None:
    return next(iter(complete(root)[::-1]), None)


def point_to(root: Path, iteration: int) -> None:
    """The pointer that Megatron's own tools read names this one; it is never half written."""
    pointer = root / f".{LATEST}"
    pointer.write_text(str(iteration))
    os.replace(pointer, root / LATEST)


@dataclasses.dataclass
class Progress:
    iteration: int = 0
    consumed_samples: int = 0
    account: Account = dataclasses.field(default_factory=Account)  # of the data, all ranks together
    skipped_steps: int = 0

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Progress:
        """From what dataclasses.asdict made of one."""
        return cls(**{**saved, "account": Account(**saved["account"])})


class Checkpointer:
    """Saves and restores one run."""

    def __init__(self, root: Path, plan: Plan, model: ModelConfig, keep: int):
        self.root, self.plan, self.model, self.keep = root, plan, model, keep

    # ---- save

    def save(
        self,
        progress: Progress,
        engine: Engine,
        loader_state: Any,
        recipe_yaml: str,
    ) -> Path:
        """Write everything under a temporary name, then rename. A failure leaves earlier checkpoints as they were."""
        folder = iteration_folder(self.root, progress.iteration)
        draft = self._draft(folder)
        parts = (
            lambda: self._make(draft),
            lambda: self._write(draft, progress, engine, loader_state, recipe_yaml),
            lambda: self._checksums(draft),
        )
        for part in parts:
            sums = self._together(folder, part)
        self._together(folder, lambda: self._publish(draft, folder, sums))
        return folder

    def _together(self, folder: Path, part: Callable[[], Any]) -> list[Any]:
        """What `part` returned on every rank. Where it fails on one, all raise the same UserError."""
        result = problem = None
        try:
            result = part()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            problem = self._reason(error)
        everyone: list[Any] = [None] * self.plan.world_size
        dist.all_gather_object(everyone, (result, problem))
        reason = next((its_problem for _, its_problem in everyone if its_problem), None)
        if reason is None:
            return [its_result for its_result, _ in everyone]
        if self.plan.rank == 0:
            shutil.rmtree(self._draft(folder), ignore_errors=True)
        kept = newest(self.root)
        raise UserError(
            f"{folder}: the checkpoint could not be written ({reason}); put that right and start again: "
            + (f"the run will go on from {kept.name}" if kept else "no earlier checkpoint exists")
        )

    def _draft(self, folder: Path) -> Path:
        return self.root / f".{folder.name}.draft"

    def _make(self, draft: Path) -> None:
        if self.plan.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)

    def _write(self, draft: Path, progress: Progress, engine: Engine, loader_state: Any, recipe_yaml: str) -> None:
        weights = model_state(engine.language, engine.tower)
        state = dict(weights)
        state["optimizer"] = engine.optimizer.sharded_state_dict(weights, metadata=metadata())
        state["schedule"] = engine.schedule.state_dict()
        dist_checkpointing.save(state, str(draft), content_metadata=None)
        self._save_beside(draft, progress, loader_state, recipe_yaml)

    def _reason(self, error: BaseException) -> str:
        """torch's writers report a full disk in words of their own, so the disk is asked."""
        free = shutil.disk_usage(self.root.parent).free
        if free < FULL:
            return f"disk full: {free:,} bytes free"
        root = error
        while (cause := root.__cause__ or root.__context__) is not None:
            root = cause
        return f"{type(root).__name__}: {' '.join(str(root).split())[-300:]}"

    def _save_beside(self, draft: Path, progress: Progress, loader_state: Any, recipe_yaml: str) -> None:
        torch.save(_random_states(), draft / f"rng_{self.plan.rank:05d}.pt")
        if self.plan.rank == self.plan.block_source:
            torch.save(loader_state, draft / f"loader_{self.plan.data_rank:05d}.pt")
        if self.plan.rank == 0:
            layout = {**dataclasses.asdict(self.plan.config), "data": self.plan.data_size}
            (draft / "state.json").write_text(json.dumps({**dataclasses.asdict(progress), "layout": layout}, indent=1))
            (draft / "model.json").write_text(json.dumps(dataclasses.asdict(self.model), indent=1))
            (draft / "resolved.yaml").write_text(recipe_yaml)

    def _checksums(self, draft: Path) -> dict[str, list[int]]:
        """Of this rank's share of the files."""
        return {f.name: checksum(f) for f in sorted(draft.iterdir())[self.plan.rank :: self.plan.world_size]}

    def _publish(self, draft: Path, folder: Path, sums: list[dict[str, list[int]]]) -> None:
        if self.plan.rank != 0:
            return
        everything = {name: its_sums for part in sums for name, its_sums in part.items()}
        (draft / "checksums.json").write_text(json.dumps(everything, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
        point_to(self.root, int(folder.name.removeprefix("iter_")))
        for old in complete(self.root)[: -self.keep]:
            shutil.rmtree(old)

    # ---- restore

    def restore(self, folder: Path, engine: Engine) -> tuple[Progress, Any]:
        """Everything a run needs to go on -> (progress, loader state)."""
        together(lambda: verify(folder, self.plan.rank, self.plan.world_size))
        check_same_model(folder, saved_model(folder), self.model)
        saved = json.loads((folder / "state.json").read_text())
        layout = saved.pop("layout")
        if layout is None:
            raise UserError(
                f"{folder} holds imported weights and no state of a run; name it in training.init_from and use another run_dir"
            )
        if saved.keys() != Progress.__dataclass_fields__.keys():
            raise UserError(
                f"{folder} was written by another version of this code; go on with that one, or name the folder in "
                "training.init_from and use another run_dir"
            )
        same_layout = layout == {**dataclasses.asdict(self.plan.config), "data": self.plan.data_size}
        for part in engine.optimizer.chained_optimizers:
            part._init_optimizer_states_with_dummy_values()
        weights = model_state(engine.language, engine.tower)
        state = dict(weights)
        state["optimizer"] = engine.optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata())
        state["schedule"] = {}
        ours = [{key: group[key] for key in RECIPE_KEYS if key in group} for group in engine.optimizer.param_groups]
        loaded = dist_checkpointing.load(state, str(folder))
        load_model_state(loaded, engine.language, engine.tower)
        engine.optimizer.load_state_dict(loaded["optimizer"])
        for group, values in zip(engine.optimizer.param_groups, ours, strict=True):
            group.update(values)
        engine.schedule.load_state_dict(loaded["schedule"])
        if same_layout:
            _set_random_states(torch.load(folder / f"rng_{self.plan.rank:05d}.pt", weights_only=True))
        readers = [torch.load(f, weights_only=True) for f in sorted(folder.glob("loader_*.pt"))]
        if layout["data"] == self.plan.data_size:
            return Progress.of(saved), readers[self.plan.data_rank]
        return Progress.of(saved), readers  # the loader deals them out anew, or says why it cannot


def load_weights(folder: Path, model: ModelConfig, language: list[nn.Module], tower: nn.Module, plan: Plan) -> None:
    """Weights alone, from any layout: the start of the next phase."""
    together(lambda: verify(folder, plan.rank, plan.world_size))
    check_same_model(folder, saved_model(folder), model)
    loaded = dist_checkpointing.load(model_state(language, tower), str(folder))
    load_model_state(loaded, language, tower)


def saved_model(folder: Path) -> dict[str, Any]:
    """The configuration of the model in an iteration folder."""
    return json.loads((folder / "model.json").read_text())


def verify(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Every file is there, whole and unchanged; the ranks share the reading. Raises UserError naming the first that is not."""
    for name, sums in sorted(recorded(folder).items())[rank::world_size]:
        file = folder / name
        try:
            state = None if checksum(file) == sums else "is damaged"
        except FileNotFoundError:
            state = "is missing"
        except OSError as error:
            state = f"cannot be read ({error})"
        if state is not None:
            raise UserError(f"{file} {state}; remove the folder, and the run goes on from the checkpoint before it")


def recorded(folder: Path) -> dict[str, list[int]]:
    """[crc32, size] of each file. Raises UserError for a list that cannot be read or leaves the weights out."""
    file = folder / "checksums.json"
    try:
        sums = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); use another checkpoint") from error
    needed = {".metadata", "model.json", *(shard.name for shard in folder.glob("*.distcp"))}
    pairs = isinstance(sums, dict) and all(isinstance(pair, list) and len(pair) == 2 for pair in sums.values())
    if not pairs or not needed <= sums.keys():
        raise UserError(f"{file} is damaged: it does not list every file; use another checkpoint")
    return sums


def checksum(file: Path) -> list[int]:
    with file.open("rb") as stream:
        return crc_and_size(stream)


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
