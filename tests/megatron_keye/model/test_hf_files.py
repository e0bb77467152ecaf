"""Released files: shards and index are written whole, and what is wrong with them is named in one line."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch

from megatron_keye.errors import UserError
from megatron_keye.model.hf_files import INDEX, SINGLE, Checkpoint, publishing, write
from tests.parallel.launch import launch

TENSORS = {
    "model.norm.weight": torch.arange(6.0),
    **{
        f"model.layers.{layer}.mlp.experts.{e}.{part}.weight": torch.randn(*shape)
        for layer in (0, 1)
        for e in range(3)
        for part, shape in {"gate_proj": (4, 5), "up_proj": (4, 5), "down_proj": (5, 4)}.items()
    },
    "lm_head.weight": torch.randn(7, 5),
}


@pytest.mark.parametrize("experts", ["fused", "separate"])
@pytest.mark.parametrize("shard_bytes", [1, 500, 10**9])
def test_written_and_read(tmp_path, experts, shard_bytes):
    write(tmp_path / "x", TENSORS.items(), experts, shard_bytes)
    files = Checkpoint(tmp_path / "x")
    assert sorted(files.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(files.get(name), tensor)
        assert files.get(name).is_contiguous()
        assert files.shape(name) == list(tensor.shape)
    index = json.loads((tmp_path / "x" / INDEX).read_text())
    shards = sorted(f.name for f in (tmp_path / "x").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert len(index["weight_map"]) == (2 + 2 * 2 if experts == "fused" else len(TENSORS))
    if shard_bytes == 1:
        assert len(shards) == len(index["weight_map"])


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "x", TENSORS.items(), "fused", shard_bytes=600)
    return tmp_path / "x"


def edit_index(folder: Path, edit) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / INDEX).unlink(), "neither"),
        (lambda f: (f / INDEX).write_text("{"), "not a safetensors index"),
        (lambda f: (f / INDEX).write_text("[]"), "not a safetensors index"),
        (lambda f: edit_index(f, lambda m: m.update(ghost=first_shard(f).name)), "ghost is said to be in"),
        (lambda f: edit_index(f, lambda m: m.pop("model.norm.weight")), "model.norm.weight is not in"),
        (lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": "../x.safetensors"})), "no file name"),
        (lambda f: (f / SINGLE).write_bytes(first_shard(f).read_bytes()), "both model.safetensors.index.json and"),
        (lambda f: first_shard(f).unlink(), "model-00001-of-.* is missing"),
        (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-3]), "model-00001-of-.* cut short"),
        (lambda f: first_shard(f).write_bytes(b"12"), "model-00001-of-.* cut short"),
    ],
    ids=[
        "no-index",
        "broken-index",
        "list-index",
        "ghost",
        "unlisted",
        "outside",
        "both",
        "no-shard",
        "truncated",
        "tiny",
    ],
)
def test_damage_is_named(folder, damage, said):
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_absent_tensors_and_folders_are_named(folder):
    with pytest.raises(UserError, match=r"tensor model\.layers\.9"):
        Checkpoint(folder).get("model.layers.9")
    with pytest.raises(UserError, match="no such folder"):
        Checkpoint(folder / "nowhere")


def test_the_same_expert_twice(tmp_path):
    doubled = {**TENSORS, "model.layers.0.mlp.experts.down_proj": torch.zeros(3, 4, 5)}
    write(tmp_path / "x", doubled.items(), "separate")
    with pytest.raises(UserError, match=r"holds model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight"):
        Checkpoint(tmp_path / "x")


def test_fused_experts_of_odd_width(tmp_path):
    write(tmp_path / "x", [("model.layers.0.mlp.experts.gate_up_proj", torch.zeros(2, 4, 7))], "separate")
    with pytest.raises(UserError, match=r"gate_up_proj has shape \[2, 4, 7\]; gate and up"):
        Checkpoint(tmp_path / "x")


def test_dtypes(tmp_path):
    write(tmp_path / "bf16", [("a", torch.zeros(1).bfloat16()), ("b", torch.zeros(1).bfloat16())])
    assert Checkpoint(tmp_path / "bf16").common_dtype() is torch.bfloat16
    write(tmp_path / "int", [("a", torch.zeros(1, dtype=torch.int8))])
    with pytest.raises(UserError, match="a is I8"):
        Checkpoint(tmp_path / "int").common_dtype()


def test_nothing_is_left_of_a_failure(tmp_path):
    def tensors():
        yield "a", torch.zeros(3)
        raise ValueError("from within")

    with pytest.raises(ValueError, match="from within"):
        write(tmp_path / "x", tensors(), "fused", 1)
    assert list(tmp_path.iterdir()) == []


def _write_beyond_the_limit(folder: str) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # the kernel refuses the rest, as on a full disk
    with pytest.raises(UserError, match="could not be written") as caught:
        write(folder, [("a", torch.zeros(10_000)), ("b", torch.zeros(20_000))], shard_bytes=45_000)
    return str(caught.value)


def test_a_disk_that_refuses(tmp_path):
    said = launch(_write_beyond_the_limit, 1, str(tmp_path / "x"))[0]
    assert "File too large" in said
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_a_full_one_kept(tmp_path):
    (tmp_path / "x").mkdir()
    write(tmp_path / "x", TENSORS.items())
    with pytest.raises(UserError, match="not empty"), publishing(tmp_path / "x"):
        pass
    assert len(Checkpoint(tmp_path / "x").names()) == len(TENSORS)


def test_folders_made_on_the_way_go_with_a_failure(tmp_path):
    (tmp_path / "was").mkdir()
    with pytest.raises(ZeroDivisionError), publishing(tmp_path / "was" / "a" / "b" / "x"):
        raise ZeroDivisionError
    assert list(tmp_path.rglob("*")) == [tmp_path / "was"]


def test_a_file_that_cannot_be_read_is_not_put_down_to_the_disk(tmp_path):
    with (
        pytest.raises(UserError, match=r"source/shard could not be read .*, so .*/x was not written"),
        publishing(tmp_path / "x"),
    ):
        (tmp_path / "source" / "shard").read_bytes()
    with pytest.raises(UserError, match=r"/x could not be written .*kept\.json"), publishing(tmp_path / "x") as draft:
        (draft / "no" / "kept.json").write_bytes(b"")
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_nothing_is_not_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "link", tmp_path / "link" / "x"):
        with pytest.raises(UserError, match=r"link is a link to .*gone, which is not there"), publishing(folder):
            pass
    assert list(tmp_path.iterdir()) == [tmp_path / "link"]


def test_all_is_on_disk_before_the_name_appears(tmp_path, monkeypatch):
    synced: list[str] = []

    def watch(handle: int, fsync=os.fsync) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}").replace(str(tmp_path), ""))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    with publishing(tmp_path / "x") as draft:
        (draft / "config.json").write_text("{}")
    assert synced == ["/.x.partial/config.json", "/.x.partial", ""]
