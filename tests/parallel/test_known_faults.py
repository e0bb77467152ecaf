"""Every silent fault known of Megatron-Core, and the check that keeps us from it: the one list of them.

A fault is silent where training goes on and learns something else, or where a rank waits for ever. Most of these were
met; a few were only read about. New ones belong here, with a test.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from invariance import recipe_for, some_rows
from launch import launch
from megatron.core import tensor_parallel
from weights import whole_weights

from megatron_keye.config.layout import layout_errors
from megatron_keye.config.model import build_config
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.errors import UserError
from megatron_keye.model.keye import build_model
from megatron_keye.model.known_faults import refuse_known_faults
from megatron_keye.model.transformer_config import language_config
from megatron_keye.parallel import plan
from megatron_keye.train import parse
from megatron_keye.training import machine, optimizer
from megatron_keye.training.engine import Engine

ROOT = Path(__file__).resolve().parents[2]

# fault: where it is tested (in this folder, or a path under tests/)
FAULTS = {
    "experts cut over other tensor ranks than the layer, without expert parallelism: gradients not summed (below 0.19)": "test_known_faults.py::test_settings_are_refused",
    "use_cpu_initialization: experts of equal local number start equal on all ranks": "test_known_faults.py::test_experts_start_different_and_as_on_one_rank",
    "deallocate_pipeline_outputs with gloo: sends read freed memory": "test_known_faults.py::test_settings_are_refused",
    "batched messages between two interleaved stages are taken for one another": "test_known_faults.py::test_settings_are_refused",
    "random states are not restored without CUDA: replicated weights and dropout differ between ranks": "test_known_faults.py::test_random_states_are_restored",
    "loss functions that return no token count: gradients times the context parallel size": "test_known_faults.py::test_loss_functions_return_a_token_count",
    "the local specification's vision transformer is causal": "test_known_faults.py::test_the_vision_tower_looks_ahead",
    "keys of a mixture's norm differ between the local and Transformer Engine's specification": "megatron_keye/model/test_te_spec.py::test_checkpoints_have_the_same_keys",
    "Transformer Engine's fused input norm hides the normalised hidden states from the indexer": "megatron_keye/model/test_te_spec.py::test_layers_are_transformer_engines_and_norms_stand_apart",
    "saving a checkpoint without psutil waits for ever": "test_known_faults.py::test_psutil_is_asked_for",
    "saving a checkpoint starts the main module again: without a guard it waits for ever": "test_known_faults.py::test_programs_guard_their_main",
    "making an optimizer is a collective of the world": "test_known_faults.py::test_ranks_that_train_other_parts_are_refused",
    "rotary positions of packed rows run on over documents": "test_same_rows.py::test_packed_and_unpacked",
    "torchrun takes a script's option for its own where it begins one of them": "test_known_faults.py::test_torchrun_leaves_our_options_alone",
    "a loaded distributed optimizer shares one step counter, which then advances once a parameter": "test_interleaved.py::test_a_run_goes_on_in_another_layout",
    "sharded weights drawn by others are not marked: the gradient norm leaves shards out": "test_invariance.py::test_layout_equals_one_process",
    "duplicated parameters get no mean over tensor ranks unless marked (indexers)": "test_known_faults.py::test_indexers_stay_equal_on_tensor_ranks",
    "attached losses are not divided by the number of micro-batches": "test_same_rows.py::test_micro_batches_are_accumulated",
    "the balance loss of a micro-batch of several rows weighs as one row": "test_same_rows.py::test_micro_batches_are_accumulated",
    "padding is left out of the balance loss, and computed by experts all the same": "test_padding.py::test_experts_compute_real_tokens_alone",
    "fused permutation reckons with top-k experts for every token, padding too": "test_known_faults.py::test_settings_are_refused",
    "balance losses are kept in a list with room for the layers of the process's first model": "test_known_faults.py::test_a_second_model_of_a_process_has_room_for_its_balance_losses",
    "gathered keys in another order: equal scores are picked otherwise": "test_variants.py::test_selections_are_the_same_on_every_tensor_rank_and_context_shard",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_named_for_it_exists(fault: str):
    file, _, name = FAULTS[fault].partition("::")
    path = ROOT / "tests" / file if "/" in file else Path(__file__).with_name(file)
    assert re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "layout, setting, said",
    [
        ({"tensor": 2, "expert_tensor": 2}, {"expert_tensor_parallel_size": 1}, "not summed over the tensor ranks"),
        ({}, {"use_cpu_initialization": True}, "start with equal weights"),
        ({"pipeline": 2}, {"deallocate_pipeline_outputs": True}, "freed"),
        ({"pipeline": 2, "virtual_pipeline": 2}, {"batch_p2p_comm": True}, "one another"),
        ({}, {"moe_permute_fusion": True}, "leaves it unwritten"),
        ({}, {"calculate_per_token_loss": False}, "multiplied by the context parallel size"),
    ],
    ids=str,
)
def test_settings_are_refused(layout: dict[str, Any], setting: dict[str, Any], said: str):
    config = language_config(build_config("keye_mini"), ParallelConfig(**layout))
    refuse_known_faults(config)
    for name, value in setting.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    with pytest.raises(ValueError, match=said):
        refuse_known_faults(config)


def test_a_configuration_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="not summed over the tensor ranks"):
        language_config(build_config("keye_mini"), ParallelConfig(tensor=2, expert_tensor=1))


def test_recipes_with_experts_cut_otherwise_are_refused():
    recipe = recipe_for("dense", {"tensor": 2, "expert_tensor": 1})
    assert any("trains the experts wrongly" in error for error in layout_errors(recipe, 2))


def first_weights(layout: dict) -> dict[str, torch.Tensor]:
    recipe = recipe_for("dense", layout)
    return whole_weights(Engine(recipe, plan.initialize(recipe.parallel)))


def test_experts_start_different_and_as_on_one_rank():
    one, spread = launch(first_weights, 1, {})[0], launch(first_weights, 2, {"expert": 2})[0]
    assert one.keys() == spread.keys() and all(torch.equal(one[name], spread[name]) for name in one)
    experts = [w for name, w in spread.items() if "experts" in name and "gate_proj" in name]
    assert len({float(w.sum()) for w in experts}) == len(experts) == 4 * 8


def test_random_states_are_restored():
    """A forked generator goes on where it left, and leaves the common one where it was."""

    def draws() -> tuple[torch.Tensor, ...]:
        plan.initialize(ParallelConfig())
        tracker = tensor_parallel.get_cuda_rng_tracker()
        torch.manual_seed(5)
        with tracker.fork():
            first = torch.rand(3)
        common = torch.rand(3)
        with tracker.fork():
            second = torch.rand(3)
        return first, common, second

    first, common, second = launch(draws, 1)[0]
    torch.manual_seed(5)
    assert torch.equal(common, torch.rand(3))
    assert not torch.equal(first, second) and not torch.equal(first, common)


def test_loss_functions_return_a_token_count():
    """(sum of losses, token count, report): only with three Megatron divides by tokens, and by nothing else."""

    def step() -> list[tuple]:
        recipe = recipe_for("dense", {})
        engine = Engine(recipe, groups := plan.initialize(recipe.parallel))
        returned = []
        forward_step = engine.step._forward_step

        def recording(*args, **kwargs):
            losses, loss_func = forward_step(*args, **kwargs)
            returned.append(loss_func(losses.detach()))
            return losses, loss_func

        engine.step._forward_step = recording
        engine.step(some_rows(recipe, groups, 0))
        return [(len(r), r[0].dim(), r[1].dtype, int(r[1])) for r in returned]

    for length, dims, dtype, count in launch(step, 1)[0]:
        assert (length, dims, dtype) == (3, 0, torch.int32) and count > 0


def train_indexers_apart(marked: bool) -> str:
    """Tensor ranks whose gradients of an indexer differ, as kernels that add in any order would make them."""
    recipe = recipe_for("warmup", {"tensor": 2, "expert_tensor": 2})
    engine = Engine(recipe, groups := plan.initialize(recipe.parallel))
    weight = engine.language[0].decoder.layers[0].self_attention.indexer.q_proj.weight
    weight.register_hook(lambda gradient: gradient * (1 + groups.tensor_rank))
    weight.average_gradients_across_tp_domain &= marked
    engine.step(some_rows(recipe, groups, 0))
    try:
        whole_weights(engine)
    except AssertionError as error:
        return str(error)
    return "equal"


def test_indexers_stay_equal_on_tensor_ranks():
    assert launch(train_indexers_apart, 2, True) == ["equal", "equal"]
    assert "disagree" in launch(train_indexers_apart, 2, False)[0]


def train_small_then_large() -> list[float]:
    losses = []
    for layers in (1, 2):
        recipe = recipe_for("dense", {}, model__num_layers=layers)
        engine = Engine(recipe, groups := plan.initialize(recipe.parallel))
        losses.append(engine.step(some_rows(recipe, groups, 0)).extra["load_balancing_loss"])
    return losses


def test_a_second_model_of_a_process_has_room_for_its_balance_losses():
    assert all(loss > 0.9 for loss in launch(train_small_then_large, 1)[0])


def test_the_vision_tower_looks_ahead():
    """The first patch's features change with the last patch."""
    tower = build_model(build_config("keye_mini", vocab_size=256, image_token_id=254, video_token_id=255)).visual
    assert tower is not None
    patches, grid = torch.randn(16, 3, 14, 14), torch.tensor([[4, 4]])
    other = patches.clone()
    other[-1] += 1
    with torch.no_grad():
        first, second = (tower.vision_model(x, grid)[0] for x in (patches, other))
    assert (first - second).abs().max() > 1e-6


def test_psutil_is_asked_for(monkeypatch):
    monkeypatch.setattr(machine, "_installed", lambda package: package != "psutil")
    with pytest.raises(UserError, match="psutil"):
        machine.check_machine(recipe_for("dense", {}), torch.device("cpu"))


def test_programs_guard_their_main():
    """What a program does, it does under `if __name__ == "__main__"`: importing the file starts nothing."""
    programs = [p for p in [*ROOT.glob("megatron_keye/*.py"), *ROOT.glob("tools/*.py")] if "argparse" in p.read_text()]
    assert ROOT / "megatron_keye/train.py" in programs
    for program in programs:
        assert 'if __name__ == "__main__":' in program.read_text(), program
        for statement in ast.parse(program.read_text()).body:
            if isinstance(statement, ast.Expr):
                assert not re.match(r"(raise )?(sys\.exit\()?(main|run_cli)\(", ast.unparse(statement)), program


def build_other_parts() -> str:
    recipe = recipe_for("dense", {"pipeline": 2})
    groups = plan.initialize(recipe.parallel)
    if groups.rank == 1:
        trains, optimizer.trains = optimizer.trains, lambda modules: False
    try:
        Engine(recipe, groups)
    except RuntimeError as error:
        return str(error)
    finally:
        if groups.rank == 1:
            optimizer.trains = trains
    return "built"


def test_ranks_that_train_other_parts_are_refused():
    assert all("differs between ranks" in said for said in launch(build_other_parts, 2, timeout=60))


def test_torchrun_leaves_our_options_alone():
    from torch.distributed.run import get_args_parser

    ours = ["recipes/stage1.yaml", "profile=mini", "--dry-run", "--world-size", "8", "--json", "plan.json"]
    parsed = get_args_parser().parse_args(["--nproc-per-node", "2", "-m", "megatron_keye.train", *ours])
    assert parsed.training_script_args == ours
    assert parse(ours).world_size == 8
