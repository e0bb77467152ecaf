"""Conversion after training at TP=2 and EP=2: export in one process, verify, import back, everything bit for bit."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_keye.conversion.commands import export, import_hf, verify
from megatron_keye.conversion.stored import Stored, locate
from megatron_keye.errors import UserError
from megatron_keye.model.hf_files import INDEX, Checkpoint
from megatron_keye.parallel import plan
from megatron_keye.parallel.plan import initialize
from megatron_keye.training import checkpoint
from megatron_keye.training.checkpoint import Checkpointer
from megatron_keye.training.engine import Engine
from tests.parallel.launch import launch
from tests.parallel.trained import load, recipe_for, train_and_save, whole_tensors
from tools.convert import main

TOOL = Path(__file__).parents[2] / "tools" / "convert.py"
RUNS = {"tensor2-bf16": ({"tensor": 2, "expert_tensor": 2}, "bf16"), "expert2-fp32": ({"expert": 2}, "fp32")}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def _groups():
    yield
    plan.shut_down()


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory) -> tuple[Path, dict, str]:
    """(run folder, layout, precision) of a step trained on two ranks."""
    layout, precision = RUNS[request.param]
    folder = tmp_path_factory.mktemp("run")
    norms = launch(train_and_save, 2, folder / "checkpoints", layout, precision)
    assert min(norms) > 0
    return folder, layout, precision


@pytest.fixture(scope="module")
def bf16_run(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of one process, and the fp32 master copies that its optimizer held."""
    folder = tmp_path_factory.mktemp("bf16")
    [masters] = launch(_train_alone, 1, folder)
    return folder, masters


def _train_alone(folder: Path) -> dict[str, torch.Tensor]:
    engine = train_and_save(folder, {}, "bf16", scope="all_but_indexers", give_engine=True)
    for optimizer in engine.optimizer.chained_optimizers:
        for parameter, (group, place) in optimizer.model_param_group_index_map.items():
            master = optimizer.optimizer.param_groups[group]["params"][place]
            parameter.data = master.detach().view(parameter.shape).clone()
    return {name: tensor.clone() for name, tensor in whole_tensors(engine).items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("experts", ["fused", "separate"])
def test_export_holds_what_training_would_load(run, experts, tmp_path):
    folder, _, precision = run
    count = export(folder, tmp_path / "hf", experts, say=print)
    files = Checkpoint(tmp_path / "hf")
    recipe = recipe_for({}, precision, init_from=folder / "checkpoints")
    expected = whole_tensors(Engine(recipe, initialize(recipe.parallel)))
    assert count == len(expected) and set(files.names()) == set(expected)
    assert [name for name in expected if not same(files.get(name), expected[name])] == []
    stacked = json.loads((tmp_path / "hf" / INDEX).read_text())["weight_map"]
    assert ("model.layers.0.mlp.experts.gate_up_proj" in stacked) == (experts == "fused")
    assert verify(tmp_path / "hf", folder)


def test_there_and_back_into_the_same_layout(run, tmp_path, capsys):
    folder, layout, precision = run
    export(folder, tmp_path / "hf", "fused", say=lambda line: None)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert verify(tmp_path / "hf", tmp_path / "ckpt")
    assert f"{len(Checkpoint(tmp_path / 'hf').names())} tensors" in capsys.readouterr().out
    wanted = launch(load, 2, layout, precision, folder / "checkpoints")
    for source in (tmp_path / "ckpt", tmp_path / "hf"):
        for mine, theirs in zip(launch(load, 2, layout, precision, source), wanted):
            assert mine.keys() == theirs.keys()
            assert [name for name in mine if not same(mine[name], theirs[name])] == []


def test_fp32_export_of_a_bf16_run_is_the_optimizers_copies(bf16_run, tmp_path):
    folder, masters = bf16_run
    lines: list[str] = []
    export(folder, tmp_path / "hf", dtype=torch.float32, say=lines.append)
    files = Checkpoint(tmp_path / "hf")
    stored = dict(Stored(folder).tensors())
    rounded = [name for name in masters if not torch.equal(files.get(name), stored[name].get().float())]
    assert len(rounded) > len(masters) / 2  # the copies do hold more than the weights
    assert [name for name in masters if not torch.equal(files.get(name), masters[name].float())] == []
    assert any("frozen" in line for line in lines)  # the indexers were
    assert verify(tmp_path / "hf", folder, torch.float32)
    assert not verify(tmp_path / "hf", folder, say=lines.append)
    assert any(line.startswith("dtype: ") for line in lines)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float32"


def test_fp32_export_without_optimizer_says_why_not(bf16_run, tmp_path):
    export(bf16_run[0], tmp_path / "hf", say=lambda line: None)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    with pytest.raises(UserError, match="no optimizer state"):
        export(tmp_path / "ckpt", tmp_path / "fp32", dtype=torch.float32)
    assert not (tmp_path / "fp32").exists()


@pytest.fixture(scope="module")
def exported_run(bf16_run, tmp_path_factory) -> tuple[Path, Path]:
    hf = tmp_path_factory.mktemp("exported") / "hf"
    export(bf16_run[0], hf, "separate", say=lambda line: None)
    return hf, bf16_run[0]


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


def _flip(tensors):
    tensors[NAME].view(torch.int16)[5, 7] ^= 1


def _remove(tensors):
    del tensors[NAME]


def _add(tensors):
    tensors["model.layers.9.strange.weight"] = torch.zeros(3)


def _retype(tensors):
    tensors[NAME] = tensors[NAME].float()


def _reshape(tensors):
    tensors[NAME] = tensors[NAME][:-1].contiguous()


def _transpose(tensors):
    tensors[NAME] = tensors[NAME].T.contiguous()  # square: only the values tell


def _transpose_oblong(tensors):
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].T.contiguous()


def _negative_zero(tensors):
    tensors["model.layers.0.self_attn.sa_indexer.k_norm.bias"].neg_()  # zeros: equal as numbers


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_flip, f"differs: {NAME} in 1 of 4096 values"),
        (_remove, f"missing: {NAME}"),
        (_add, "extra: model.layers.9.strange.weight"),
        (_retype, f"dtype: {NAME} is torch.float32"),
        (_reshape, rf"shape: {NAME} is \[63, 64\]"),
        (_transpose, f"differs: {NAME} in 4[0-9]{{3}} of 4096 values; it is transposed"),
        (_transpose_oblong, r"shape: model.layers.0.self_attn.q_proj.weight is \[64, 256\].* transposed"),
        (_negative_zero, "differs: model.layers.0.self_attn.sa_indexer.k_norm.bias in 32 of 32 values"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verify_names_each_difference_and_fails(exported_run, damage, expected, tmp_path, capsys):
    hf, ckpt = exported_run
    tensors: dict[str, torch.Tensor] = {}
    for shard in hf.glob("*.safetensors"):
        tensors |= load_file(shard)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(hf / "config.json", tmp_path)
    assert main(["verify", "--hf", str(tmp_path), "--ckpt", str(ckpt)]) == 1
    faults = capsys.readouterr().out.splitlines()
    assert re.match(expected, faults[0])
    assert len(faults) == 2 and faults[1].startswith("1 of ")


def test_verify_names_what_is_wrong_in_fused_experts(exported_run, tmp_path, capsys):
    _, ckpt = exported_run
    export(ckpt, tmp_path / "hf", "fused", say=lambda line: None)
    shard = next((tmp_path / "hf").glob("*.safetensors"))
    tensors = load_file(shard)
    down = tensors["model.layers.1.mlp.experts.down_proj"]
    down[2] = down[2].T.clone()
    both = tensors["model.layers.0.mlp.experts.gate_up_proj"].view(torch.int16)
    both[5, 7, 9] ^= 1  # of 2 x 64 columns: the gate's half
    both[5, 7, 100] ^= 1 << 14
    save_file(tensors, shard)
    assert main(["verify", "--hf", str(tmp_path / "hf"), "--ckpt", str(ckpt)]) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if ".experts." in line]
    assert len(faults) == 3
    for fault, name in zip(faults, ("0.mlp.experts.5.gate_proj", "0.mlp.experts.5.up_proj")):
        assert fault == f"differs: model.layers.{name}.weight in 1 of 4096 values"
    assert re.match(r"differs: model\.layers\.1\.mlp\.experts\.2\.down_proj\.weight .*; it is transposed$", faults[2])


@pytest.mark.parametrize(
    ("section", "key", "value", "ours"),
    [
        ("", "rope_theta", 1e6, "rope_theta is 1000000.0"),
        ("sa_config", "topk", 7, "topk is 7"),
        ("vision_config", "layer_norm_eps", 1e-3, "vision_layer_norm_eps is 0.001"),
        ("rope_scaling", "mrope_section", [12, 10, 10], r"mrope_section is \[12, 10, 10\]"),
    ],
)
def test_verify_names_what_config_json_says_otherwise(exported_run, section, key, value, ours, tmp_path, capsys):
    folder = Path(shutil.copytree(exported_run[0], tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["verify", "--hf", str(folder), "--ckpt", str(exported_run[1])]) == 1
    fault, _ = capsys.readouterr().out.splitlines()
    assert re.match(rf"config: {ours} in .*config\.json and .* in the checkpoint$", fault)


def _ghost(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.7.ghost.weight"] = next(folder.glob("*.safetensors")).name
    (folder / INDEX).write_text(json.dumps(index))


def _truncate(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1000)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_ghost, r"model\.layers\.7\.ghost\.weight is said to be in model-00001-of-00001\.safetensors, which does not"),
        (_truncate, r"model-00001-of-00001\.safetensors is cut short or damaged"),
    ],
)
def test_verify_names_files_that_are_wrong(exported_run, damage, said, tmp_path):
    folder = Path(shutil.copytree(exported_run[0], tmp_path / "hf"))
    damage(folder)
    with pytest.raises(UserError, match=said):
        main(["verify", "--hf", str(folder), "--ckpt", str(exported_run[1])])


def test_damaged_checkpoint_is_refused_by_name(bf16_run, tmp_path):
    folder = Path(shutil.copytree(locate(bf16_run[0]), tmp_path / "iter_0000001"))
    shard = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        export(tmp_path, tmp_path / "hf")
    with pytest.raises(UserError, match="no complete checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "hf")
    listed = json.loads((folder / "checksums.json").read_text())
    without = {name: pair for name, pair in listed.items() if name != shard.name}
    for text in ("{", "[]", "{}", json.dumps(without), json.dumps(dict.fromkeys(listed, 1))):
        (folder / "checksums.json").write_text(text)
        for reading in (lambda: export(tmp_path, tmp_path / "hf"), lambda: checkpoint.verify(folder)):
            with pytest.raises(UserError, match=r"checksums\.json is damaged"):
                reading()


def test_import_never_writes_over_checkpoints(exported_run):
    hf, ckpt = exported_run
    with pytest.raises(UserError, match="holds checkpoints already"):
        import_hf(hf, ckpt)


def test_imported_weights_are_no_run_to_resume(exported_run, tmp_path):
    folder = import_hf(exported_run[0], tmp_path)
    recipe = recipe_for({}, "bf16")
    with pytest.raises(UserError, match="init_from"):
        Checkpointer(tmp_path, initialize(recipe.parallel), recipe.model, keep=2).restore(folder, None)  # type: ignore[arg-type]


def test_another_model_is_refused(exported_run, tmp_path):
    recipe = recipe_for({}, "bf16", init_from=exported_run[0])
    recipe.model.rms_norm_eps = 1e-5
    with pytest.raises(UserError, match=r"model\.rms_norm_eps"):
        Engine(recipe, initialize(recipe.parallel))


def test_processor_files_come_from_the_run_or_are_said_to_be_missing(bf16_run, qwen_tiktoken, tmp_path, capsys):
    folder, _ = bf16_run
    assert main(["export", "--ckpt", str(folder), "--out", str(tmp_path / "a")]) == 0
    assert "no tokenizer and preprocessor files: tokenizer no-tokenizer-was-here" in capsys.readouterr().out
    assert not (tmp_path / "a" / "tokenizer.json").exists()
    arguments = ["export", "--ckpt", str(folder), "--out", str(tmp_path / "b"), "--tokenizer", str(qwen_tiktoken)]
    assert main(arguments) == 0
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json"):
        assert (tmp_path / "b" / name).is_file()
    for name in ("config.json", "generation_config.json", INDEX):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def convert(*arguments: object, shell_limit: str = "true") -> subprocess.CompletedProcess:
    """The tool as a process of its own."""
    command = shlex.join([sys.executable, str(TOOL), *map(str, arguments)])
    return subprocess.run(["bash", "-c", f"{shell_limit}; exec {command}"], capture_output=True, text=True, check=False)


def test_a_mistake_is_one_line(tmp_path):
    done = convert("import", "--hf", tmp_path / "nowhere", "--out", tmp_path / "ckpt")
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and "nowhere" in line
    assert not (tmp_path / "ckpt").exists()


def test_a_failed_write_leaves_nothing(exported_run, tmp_path):
    hf, ckpt = exported_run
    limit = "ulimit -f 200"  # KiB: no file may grow larger, as on a disk that is full
    imported = convert("import", "--hf", hf, "--out", tmp_path / "new" / "folders" / "ckpt", shell_limit=limit)
    exported = convert("export", "--ckpt", ckpt, "--out", tmp_path / "hf", shell_limit=limit)
    for done in (imported, exported):
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "could not be written" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
