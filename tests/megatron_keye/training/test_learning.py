"""The mini model learns to see: trained on generated clips, it answers held-out ones, and without pixels it cannot."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from keye_data.processor import Processor
from keye_data.shards import build_shards
from keye_data.synthetic import generate
from keye_data.tokenizer import load_tokenizer
from megatron_keye.config.load import load_recipe
from megatron_keye.model import KeyeModel
from megatron_keye.parallel import plan
from megatron_keye.training.trainer import Trainer

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
HELD_OUT = 60


def answers(model: torch.nn.Module, processor: Processor, folder: Path, *, see: bool) -> list[bool]:
    """Is the most likely first token that of the answer? One per held-out question."""
    right = []
    for line in (folder / "conversations.jsonl").read_text().splitlines():
        *question, answer = json.loads(line)["messages"]
        names = [part["video"] for part in question[0]["content"] if part["type"] == "video"]
        prompt = processor.prompt(question, {name: (folder / name).read_bytes() for name in names})
        if not see:
            prompt["pixel_values"].zero_()
        with torch.no_grad():
            logits = model(**prompt)
        right.append(int(logits[0, -1].argmax()) == processor.tokenizer.encode(answer["content"])[0])
    return right


@pytest.mark.slow  # a hundred steps of training: two minutes
def test_answers_held_out_clips_and_fails_blindfolded(qwen_tiktoken: Path, tmp_path: Path):
    generate(tmp_path / "train", 600, split="train", questions=["colour"])
    held_out = tmp_path / "held_out"
    generate(held_out, HELD_OUT, split="heldout", questions=["colour"])
    build_shards(tmp_path / "train", tmp_path / "shards")
    recipe = load_recipe(
        RECIPES / "stage1.yaml",
        [
            *("profile=mini", "training.init_from=null", f"run_dir={tmp_path / 'run'}", "training.steps=110"),
            *(f"data.tokenizer={qwen_tiktoken}", f"data.sources=[{{path: {tmp_path / 'shards'}, weight: 1.0}}]"),
            *("data.seq_length=512", "data.workers=0", "logging.wandb=off", "logging.interval=20"),
            *(
                "optimizer.schedule=constant",
                "optimizer.lr=2e-3",
                "optimizer.warmup_steps=10",
                "optimizer.decay_steps=null",
            ),
        ],
    )
    plan.shut_down()
    trainer = Trainer(recipe, plan.initialize(recipe.parallel))
    handler = signal.getsignal(signal.SIGTERM)
    trainer.run()
    trainer.close()
    assert signal.getsignal(signal.SIGTERM) is handler, "a handler left behind holds the trainer and its groups"

    model = KeyeModel(recipe.model).eval()
    model.language_model.load_state_dict(trainer.engine.language[0].state_dict())
    model.visual.load_state_dict(trainer.engine.tower.state_dict())
    processor = Processor(load_tokenizer(str(qwen_tiktoken)), recipe.data)
    truth = Counter(
        json.loads(line)["messages"][-1]["content"]
        for line in (held_out / "conversations.jsonl").read_text().splitlines()
    )
    best_constant = truth.most_common(1)[0][1] / HELD_OUT
    seeing = sum(answers(model, processor, held_out, see=True)) / HELD_OUT
    blind = sum(answers(model, processor, held_out, see=False)) / HELD_OUT
    plan.shut_down()
    # four colours: a quarter by guessing; one standard deviation of 60 guesses is 0.056
    assert best_constant < 0.3
    assert seeing > 0.75, (seeing, blind)
    assert blind < best_constant + 0.12, (seeing, blind)
