"""A run: everything built from a recipe, and the loop over its steps."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from keye_data.accounting import Account, Skipped
from keye_data.loader import Loader
from keye_data.processor import Processor
from keye_data.sample import Batch
from keye_data.tokenizer import load_tokenizer
from megatron_keye.config.load import recipe_yaml
from megatron_keye.config.recipe import Recipe
from megatron_keye.errors import UserError
from megatron_keye.model import backend
from megatron_keye.parallel.activity import activity
from megatron_keye.parallel.balance import imbalance
from megatron_keye.parallel.plan import Plan
from megatron_keye.parallel.together import together
from megatron_keye.planning.flops import step_flops
from megatron_keye.training import checkpoint
from megatron_keye.training.engine import Engine, agreed
from megatron_keye.training.feed import BlockFeed
from megatron_keye.training.health import Health
from megatron_keye.training.logging import RunLog, say
from megatron_keye.training.step import StepResult


class Trainer:
    """Builds model, data and optimizer for this rank, restores what there is to restore, and trains."""

    def __init__(self, recipe: Recipe, plan: Plan):
        self.recipe, self.plan = recipe, plan
        self.run_dir = Path(recipe.run_dir)
        self.micro_batches = recipe.training.global_batch_size // (recipe.training.micro_batch_size * plan.data_size)
        self.progress = checkpoint.Progress()
        self.stop_signal = False
        self.nonfinite = 0
        reads = plan.rank == plan.block_source
        self.loader = together(lambda: self._build_loader() if reads else None)
        self.checkpointer = checkpoint.Checkpointer(
            self.run_dir / "checkpoints", plan, recipe.model, recipe.checkpoint.keep
        )
        found = agreed(checkpoint.newest(self.checkpointer.root))
        if found is not None and not recipe.checkpoint.resume:
            raise UserError(
                f"checkpoint.resume is false, but {found} exists, and this run's own would be pruned as older than it; "
                "use another run_dir, or remove the checkpoints"
            )
        self.engine = Engine(recipe, plan, resume_from=found)
        if found is not None:
            self._resume(found)
        self.health = Health(recipe, self.engine.language)
        cost = partial(step_flops, recipe.model) if recipe.training.balance else None
        self.feed = BlockFeed(self.loader, plan, cost)
        is_logger = plan.data_rank == 0 and plan.is_last_stage and plan.tensor_rank == 0 and plan.context_rank == 0
        self.log = RunLog(recipe, self.run_dir, is_logger, self.progress.iteration)

    # ---- building

    def _build_loader(self) -> Loader:
        data, training = self.recipe.data, self.recipe.training
        return Loader(
            data,
            self._processor(),
            rank=self.plan.data_rank,
            world_size=self.plan.data_size,
            micro_batch_size=training.micro_batch_size,
            seed=training.seed,
        )

    def _processor(self) -> Processor:
        """Raises UserError where tokenizer and model number the tokens differently."""
        model, path = self.recipe.model, self.recipe.data.tokenizer
        tokenizer = load_tokenizer(path)
        processor = Processor(tokenizer, self.recipe.data)
        for key, theirs in (("image_token_id", processor.image_token_id), ("video_token_id", processor.video_token_id)):
            if getattr(model, key) != theirs:
                raise UserError(
                    f"model.{key} = {getattr(model, key)}, but tokenizer {path} has {theirs}; set the model's"
                )
        if (most := max(tokenizer.get_vocab().values())) >= model.vocab_size:
            raise UserError(
                f"tokenizer {path} goes up to token {most}, above model.vocab_size = {model.vocab_size}; set {most + 1} or more"
            )
        return processor

    def _resume(self, folder: Path) -> None:
        self.progress, loader_state = self.checkpointer.restore(folder, self.engine)
        together(lambda: self.loader.load_state_dict(loader_state) if self.loader is not None else None)
        if self.plan.rank == 0:
            say(f"going on from {folder}")

    # ---- running

    def run(self) -> None:
        if self.plan.rank == 0:
            self._announce()
        with self._stops_on_signal():
            self._steps()
        self.log.finish()

    def _steps(self) -> None:
        training = self.recipe.training
        last = min(training.steps, training.stop_after or training.steps)
        saved_at = self.progress.iteration
        interval = self.recipe.checkpoint.interval
        while self.progress.iteration < last:
            self._one_step()
            stopping = self._any_rank_stops()
            if stopping or (interval and self.progress.iteration % interval == 0):
                self.save()
                saved_at = self.progress.iteration
            if stopping:
                if self.plan.rank == 0:
                    say(f"stopped by a signal at iteration {saved_at}, saved; the same command goes on from here")
                break
        if saved_at != self.progress.iteration:
            self.save()

    def _one_step(self) -> None:
        activity.step = self.progress.iteration + 1
        begin = time.perf_counter()
        batches = self.feed.take(self.micro_batches)
        self.health.before(activity.step)
        result = self.engine.step(batches)
        lr = self.engine.optimizer.param_groups[0]["lr"]
        self.progress.iteration += 1
        self.engine.schedule.step(increment=1)
        account, bad, sizes, flops = self._totals(batches)
        self.progress.consumed_samples += sum(account.consumed.values())
        self.progress.account += account
        self.log.skipped(self.progress.iteration, bad)
        self._guard(result)
        elapsed = time.perf_counter() - begin
        self.log.step(
            {
                "iteration": self.progress.iteration,
                "consumed samples": self.progress.consumed_samples,
                "iteration-time": elapsed,
                "throughput": flops / elapsed / 1e12 / self.plan.world_size,
                "tokens-per-second": result.tokens / elapsed,
                "tokens": result.tokens,
                "predicted-tokens": result.predicted_tokens,
                "learning-rate": lr,
                "batch-size": self.recipe.training.global_batch_size,
                "lm loss": result.lm_loss,
                **result.extra,
                **self.health.after(),
                "grad-norm": result.grad_norm,
                **self._balance(batches),
                "skipped-steps": self.progress.skipped_steps,
                "consumed-samples-by-source": self.progress.account.consumed,
                "epochs-by-source": self.progress.account.epochs(sizes),
                "skipped-samples": sum(self.progress.account.reasons.values()),
                "skipped-samples-by-reason": self.progress.account.reasons,
                "sample-keys": [k for b in batches for k in b.keys],
            }
        )

    def _totals(self, batches: list[Batch]) -> tuple[Account, list[Skipped], dict[str, int], float]:
        """Over all blocks: samples used and skipped, the latter by name, the sizes of the sources, floating-point work."""
        mine: Any = None
        if self.loader is not None:
            bad = [one for b in batches for one in b.bad]
            mine = (Account.of(batches), bad, self.loader.source_sizes, step_flops(self.recipe.model, batches))
        everyone: list[Any] = [None] * self.plan.world_size
        dist.all_gather_object(everyone, mine)
        accounts, bads, sizes, flops = zip(*(part for part in everyone if part is not None))
        return sum(accounts, Account()), [one for part in bads for one in part], sizes[0], sum(flops)

    def _balance(self, batches: list[Batch]) -> dict[str, float]:
        """Greatest over mean, of all ranks: work of encoding and of the language model. The slowest encoding, wait and decoding."""
        vision = self.engine.step.vision
        text = [replace(b, grid=b.grid[:0]) for b in batches]
        lm_work = step_flops(self.recipe.model, text)
        mine = [vision.load, lm_work, vision.encode_ms, self.feed.wait_ms, self.feed.decode_ms]
        loads = torch.tensor([mine], dtype=torch.float64, device=torch.cuda.current_device())
        everyone = loads.new_empty(self.plan.world_size, len(mine))
        dist.all_gather_into_tensor(everyone, loads)
        vit, lm, encode, wait, decode = everyone.T.tolist()
        return {
            "vit-imbalance": imbalance(vit),
            "lm-imbalance": imbalance(lm),
            "vit-encode-ms": max(encode),
            "video-decode-wait-ms": max(wait),  # the step stood still for want of a batch
            "video-decode-ms": max(decode),  # most of it while the step before was running
        }

    def _guard(self, result: StepResult) -> None:
        self.nonfinite = 0 if result.finite else self.nonfinite + 1
        self.progress.skipped_steps += not result.finite
        if self.nonfinite >= self.recipe.training.max_nonfinite_steps:
            raise UserError(
                f"iteration {self.progress.iteration}: loss or gradient was not finite for {self.nonfinite} steps in a row "
                "(training.max_nonfinite_steps); lower optimizer.lr, or look at the samples named in metrics.jsonl"
            )

    @contextlib.contextmanager
    def _stops_on_signal(self) -> Iterator[None]:
        """The handlers of before come back: one left behind would keep this trainer, its model and its groups alive.

        Not after a failure: the watchdog still has to say what happened when torchrun asks the ranks to end.
        """
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGUSR1)}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _) -> None:
        self.stop_signal = True

    def _any_rank_stops(self) -> bool:
        flag = torch.tensor(float(self.stop_signal), device=torch.cuda.current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def save(self) -> None:
        state = self.loader.state_dict() if self.loader is not None else None
        folder = self.checkpointer.save(self.progress, self.engine, state, recipe_yaml(self.recipe))
        if self.plan.rank == 0:
            say(f"  saved {folder}")

    def _announce(self) -> None:
        p, parallel = self.plan, self.recipe.parallel
        say(f"{self.recipe.name}: {self.recipe.training.steps} steps, {self.recipe.model.attention_mode} attention")
        say(
            f"  layout: {p.world_size} ranks = pipeline {parallel.pipeline} x data {p.data_size} x context "
            f"{parallel.context} x tensor {parallel.tensor}; experts over {parallel.expert}"
        )
        say(f"  layers: {backend.describe()}")
        for part, (trained, total) in self.engine.trained.items():
            say(f"  {part}: {trained:,} of {total:,} parameters of this rank train")

    def close(self) -> None:
        if self.loader is not None and hasattr(self.loader, "close"):
            self.loader.close()
