"""Import, train no step, export: not a bit moves, whatever the type, the layout of experts, and the ranks between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_keye.config.load import recipe_yaml
from megatron_keye.conversion.commands import export, import_hf
from megatron_keye.errors import UserError
from megatron_keye.parallel import plan
from megatron_keye.training.checkpoint import Checkpointer, Progress
from megatron_keye.training.engine import Engine
from tests.parallel.launch import launch
from tests.parallel.trained import recipe_for
from tests.tools.small_checkpoint import BF16, FP32, assert_same, tensors, write

DTYPES = {"bf16": BF16, "fp32": FP32}


@pytest.fixture(autouse=True)
def _groups():
    yield
    plan.shut_down()


def start_and_save(root: Path, layout: dict, precision: str, init_from: Path) -> None:
    """What a run of no steps does. An optimizer has states to save once they are set up, here without moving anything."""
    recipe = recipe_for(layout, precision, init_from=init_from)
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    for part in engine.optimizer.chained_optimizers:
        part._init_optimizer_states_with_dummy_values()
    Checkpointer(root, groups, recipe.model, keep=2).save(Progress(), engine, {}, recipe_yaml(recipe))


def say(line: str) -> None:
    pass


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("experts", ["fused", "separate"])
def test_no_bit_moves(precision, experts, tmp_path):
    hf = write(tmp_path / "hf", DTYPES[precision], experts)
    expected = tensors(hf)
    import_hf(hf, tmp_path / "imported")
    export(tmp_path / "imported", tmp_path / "direct", experts, say=say)
    assert_same(tmp_path / "direct", expected)
    launch(start_and_save, 1, tmp_path / "run" / "checkpoints", {}, precision, tmp_path / "imported")
    export(tmp_path / "run", tmp_path / "back", experts, say=say)
    assert_same(tmp_path / "back", expected)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"tensor": 2, "expert_tensor": 2}, {}),
        ({"expert": 2}, {"expert": 4}),
        ({"pipeline": 2}, {}),
    ],
    ids=["tp2-tp1", "ep2-ep4", "pp2-pp1"],
)
def test_through_other_ranks(first, second, tmp_path):
    hf = write(tmp_path / "hf", BF16)
    import_hf(hf, tmp_path / "imported")
    source = tmp_path / "imported"
    for i, layout in enumerate((first, second)):
        ranks = max(layout.values(), default=1)
        launch(start_and_save, ranks, tmp_path / f"run{i}" / "checkpoints", layout, "bf16", source)
        source = tmp_path / f"run{i}" / "checkpoints"
        export(source, tmp_path / f"back{i}", say=say)
        assert_same(tmp_path / f"back{i}", tensors(hf))


def retyped(folder: Path, hf: Path, is_wide) -> dict[str, torch.Tensor]:
    """`hf` with some of its bf16 tensors in fp32."""
    values = tensors(hf)
    for name in filter(is_wide, values):  # bits below bf16's, so that a detour through bf16 would show
        values[name] = values[name].float() * (1 + 2**-12)
    folder.mkdir()
    save_file(values, folder / "model.safetensors")
    (folder / "config.json").write_bytes((hf / "config.json").read_bytes())
    return values


def test_each_tensor_keeps_its_type(tmp_path):
    hf = write(tmp_path / "hf", BF16)
    mixed = retyped(tmp_path / "mixed", hf, lambda name: "sa_indexer.k_norm" in name or name.startswith("mlp_AR.pre"))
    assert {tensor.dtype for tensor in mixed.values()} == {BF16, FP32}
    import_hf(tmp_path / "mixed", tmp_path / "imported")
    export(tmp_path / "imported", tmp_path / "back", say=say)
    assert_same(tmp_path / "back", mixed)


def test_types_that_cannot_be_kept_are_named(tmp_path):
    hf = write(tmp_path / "hf", BF16)
    wide = "model.layers.1.self_attn.q_norm.weight"
    mixed = retyped(tmp_path / "mixed", hf, lambda name: name == wide)
    with pytest.raises(
        UserError, match=rf"layers\.0\.self_attn\.q_norm\.weight is torch.bfloat16 but {wide} is"
    ) as said:
        import_hf(tmp_path / "mixed", tmp_path / "imported")
    assert "--dtype" in str(said.value) and not (tmp_path / "imported").exists()
    import_hf(tmp_path / "mixed", tmp_path / "imported", FP32)
    export(tmp_path / "imported", tmp_path / "back", say=say)
    assert_same(tmp_path / "back", {name: tensor.float() for name, tensor in mixed.items()})
