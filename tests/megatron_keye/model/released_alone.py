"""Run by test_hf_release.py in a process of its own: an exported folder under transformers, without this stack.

    python -P released_alone.py FOLDER REQUESTS ANSWERS SAVED

REQUESTS: a JSON list of {"name", "conversations": [messages, ...], "mode", "gradients"}; ANSWERS: a torch file with, by name,
"inputs", "logits" [B, T, V], "selected" (for each layer bool [T, S] of each row), "tokens" int64 [B, 32], "loss" and "gradients". SAVED: where both are saved
and loaded from again.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from typing import Any

STACK = ("megatron", "megatron_keye", "keye_data", "keye_kernels", "omegaconf", "tests")


class Absent(importlib.abc.MetaPathFinder):
    """As on a machine that has never seen the stack."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in STACK:
            raise ModuleNotFoundError(f"{fullname} must not be imported here")
        return None


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402  (behind the finder)
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline  # noqa: E402

torch.set_num_threads(1)


def answer(model, processor, request: dict, selected: list[torch.Tensor]) -> dict:
    conversations = request["conversations"]
    model.config.attention_mode = request["mode"]
    inputs = processor.apply_chat_template(
        conversations if len(conversations) > 1 else conversations[0], tokenize=True, add_generation_prompt=True
    )
    with torch.no_grad():
        selected.clear()
        logits = model(**inputs, use_cache=False).logits
        found = {"inputs": dict(inputs), "logits": logits, "selected": list(selected)}
        tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        found["tokens"] = tokens[:, inputs["input_ids"].shape[1] :]
    if request["gradients"]:
        model.zero_grad()
        found["loss"] = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        found["loss"].backward()
        found["gradients"] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found


def save_and_load(model, processor, folder: str, request: dict) -> None:
    """What save_pretrained wrote is as good as the exported folder."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    inputs = [
        which.apply_chat_template(request["conversations"][0], tokenize=True)
        for which in (processor, AutoProcessor.from_pretrained(folder, trust_remote_code=True))
    ]
    assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def check_pipeline(folder: str, messages: list[dict[str, Any]], answer: str) -> None:
    """The convenient way says what the plain one does."""
    ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    ask.model.config.attention_mode = "sparse"
    [said] = ask(messages, max_new_tokens=32, do_sample=False, return_full_text=False)
    assert said["generated_text"] == answer, (said, answer)


def main(folder: str, requests: str, answers: str, saved: str) -> None:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    attention: Any = sys.modules[type(model.model.layers[0].self_attn).__module__]
    selected: list[torch.Tensor] = []
    select = attention.select_keys

    def recorded(*args: Any) -> torch.Tensor:
        selected.append(select(*args))
        return selected[-1]

    attention.select_keys = recorded
    with open(requests) as file:
        asked = json.load(file)
    found = {request["name"]: answer(model, processor, request, selected) for request in asked}
    save_and_load(model, processor, saved, asked[-1])
    picture = next(request for request in asked if request["name"] == "picture, sparse")
    [text] = processor.batch_decode(found["picture, sparse"]["tokens"], skip_special_tokens=True)
    check_pipeline(folder, picture["conversations"][0], text)
    assert not any(name.partition(".")[0] in STACK for name in sys.modules)
    torch.save(found, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
