"""A recipe: one training phase."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_keye.config.checkpoint import CheckpointConfig
from megatron_keye.config.data import DataConfig
from megatron_keye.config.logging import LoggingConfig
from megatron_keye.config.model import ModelConfig
from megatron_keye.config.optimizer import OptimizerConfig
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.training import TrainingConfig


@dataclass
class Recipe:
    name: str = "run"
    run_dir: str = "runs/${name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
