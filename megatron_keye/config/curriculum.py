"""A curriculum: phases in their order, and how each is launched.

load_curriculum("recipes/curriculum.yaml", ["profile=mini", "root=/scratch/runs", "all.training.steps=3"])
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from megatron_keye.config import schema
from megatron_keye.config.load import layered, load_recipe
from megatron_keye.config.recipe import Recipe
from megatron_keye.config.validate import validate
from megatron_keye.errors import UserError

ALL = "all"  # an override that begins so is for every phase


@dataclass
class PhaseConfig:
    recipe: str = MISSING  # the name of a file beside the curriculum, less .yaml
    nodes: int = 1


@dataclass
class CurriculumConfig:
    phases: list[PhaseConfig] = field(default_factory=list)
    profile: str | None = None  # of every phase
    root: str = "runs"  # the folder of the run folders
    launch: str = "torchrun --standalone --nproc-per-node {ranks}"  # also {nodes}, and {host}: the machine this runs on
    nodes: int | None = None  # of every phase; None = its own
    ranks: int = 8  # on each node


@dataclass(frozen=True)
class Phase:
    """One run, resolved. `words`: what follows the launcher in its command, `-m megatron_keye.train` included."""

    name: str
    recipe: Recipe
    nodes: int
    words: list[str]
    warnings: list[str]

    @property
    def checkpoints(self) -> Path:
        return Path(self.recipe.run_dir) / "checkpoints"


def load_curriculum(path: str | Path, overrides: list[str]) -> tuple[CurriculumConfig, list[Phase]]:
    """The curriculum and its phases, every recipe loaded and validated, each beginning where the one before it ends.

    `stage1.a.b=c` overrides phase stage1, `all.a.b=c` every phase, anything else the curriculum. Raises UserError.
    """
    path = Path(path)
    names = [str(p.get("recipe")) for p in layered(CurriculumConfig, path).get("phases", [])]
    for_phases = [
        text for text in overrides if text.partition(".")[0] in (ALL, *names) and "." in text.partition("=")[0]
    ]
    data = layered(CurriculumConfig, path, [text for text in overrides if text not in for_phases])
    config = schema.instance(CurriculumConfig, schema.typed(CurriculumConfig, data, str(path)), str(path))
    if not config.phases:
        raise UserError(f"{path}: phases is empty; list at least one recipe")
    for key, value in (
        ("ranks", config.ranks),
        ("nodes", config.nodes),
        *((f"phases.{p.recipe}.nodes", p.nodes) for p in config.phases),
    ):
        if value is not None and value < 1:
            raise UserError(f"{path}: {key} = {value} must be 1 or more")
    phases: list[Phase] = []
    for each in config.phases:
        own = [text.partition(".")[2] for text in for_phases if text.partition(".")[0] in (ALL, each.recipe)]
        phases.append(_phase(path, config, each, own, phases[-1] if phases else None))
    return config, phases


def _phase(path: Path, config: CurriculumConfig, each: PhaseConfig, own: list[str], before: Phase | None) -> Phase:
    file = path.parent / f"{each.recipe}.yaml"
    chosen = [f"profile={config.profile}"] if config.profile else []
    name = load_recipe(file, chosen).name
    words = [*chosen, f"run_dir={Path(config.root) / name}"]
    if before is not None:
        words.append(f"training.init_from={before.checkpoints}")
    words += own
    recipe, nodes = load_recipe(file, words), config.nodes or each.nodes
    try:
        warnings = validate(recipe, nodes * config.ranks)
    except UserError as error:
        raise UserError("\n".join(f"{each.recipe}: {line}" for line in str(error).splitlines())) from error
    return Phase(each.recipe, recipe, nodes, ["-m", "megatron_keye.train", str(file), *words], warnings)
