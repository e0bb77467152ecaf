"""The released model piece by piece, in this process: names, layouts, selection, padding, generation, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import megatron_keye.model as m
from megatron_keye.conversion.layout import exported_shapes
from megatron_keye.hf_release.attention_keye_vl2 import attend, select_keys
from megatron_keye.hf_release.configuration_keye_vl2 import KeyeVL2Config
from megatron_keye.hf_release.modeling_keye_vl2 import KeyeVL2MoeForConditionalGeneration as Released
from megatron_keye.hf_release.positions_keye_vl2 import rope_positions
from megatron_keye.model.hf_config import config_dict

IMAGE, CLIP = 62, 63
SMALL = dict(vocab_size=64, image_token_id=IMAGE, video_token_id=CLIP, vision_packing_positions=8, topk=8, num_layers=2)
GRID = torch.tensor([[1, 2, 4], [1, 4, 4]])
PICTURES = torch.tensor([[1, 2, IMAGE, IMAGE, 3, 4, 5, 6, 7, 8], [9, 1, 2, CLIP, CLIP, CLIP, CLIP, 3, 4, 5]])


def megatron(**changes: object) -> m.KeyeModel:
    model = m.build_model(
        m.build_config("keye_mini", **{"attention_mode": "sparse", **SMALL, **changes}), seed=5
    ).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:  # norms and biases that are not ones and zeros
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return model


@pytest.fixture(scope="module")
def model() -> m.KeyeModel:
    return megatron()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("release")
    for experts in ("fused", "separate"):
        m.to_hf(model, path / experts, experts=experts)
    return {experts: path / experts for experts in ("fused", "separate")}


@pytest.fixture
def released(folders) -> Released:
    return Released.from_pretrained(folders["fused"])


def pixels(grid: torch.Tensor) -> torch.Tensor:
    return torch.rand(int(grid.prod(-1).sum()), 3, 14, 14, generator=torch.Generator().manual_seed(0)) * 2 - 1


def some_ids(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", ["keye_mini", "keye_vl2_30b_a3b"])
def test_names_and_shapes_are_the_exported_ones(preset):
    with torch.device("meta"):
        model = Released(KeyeVL2Config(**config_dict(m.build_config(preset), "bfloat16")))
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == {name: list(shape) for name, shape in exported_shapes(preset, "fused", 1, 1, 1)}
    if preset == "keye_vl2_30b_a3b":
        assert sum(tensor.numel() for tensor in model.state_dict().values()) == 31_122_082_160


def test_defaults_are_the_released_values():
    """A released config.json may lack keys that this stack writes."""
    written = KeyeVL2Config(**config_dict(m.build_config("keye_vl2_30b_a3b"), "bfloat16")).to_dict()
    for key, value in KeyeVL2Config().to_dict().items():
        if key in ("sa_config", "vision_config", "rope_parameters"):
            assert value == {inner: written[key][inner] for inner in value} | (
                {"image_size": 384} if key == "vision_config" else {}
            )
        elif not key.endswith("token_id") or key in ("image_token_id", "video_token_id"):
            assert key in ("architectures", "dtype") or written[key] == value, key


def test_both_layouts_of_experts_load_and_are_saved_for_from_hf(model, folders, tmp_path):
    states = []
    for experts, folder in folders.items():
        released = Released.from_pretrained(folder)
        states.append(released.state_dict())
        released.save_pretrained(tmp_path / experts)
        for again in (m.from_hf(tmp_path / experts), m.from_hf(folder)):
            assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))
            assert (again.cfg.topk, again.cfg.mrope_layout) == (8, "chunked")
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("experts", ["fused", "separate"])
def test_folders_that_do_not_fill_the_model_are_refused(folders, tmp_path, experts):
    def edited(edit) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        (path / "config.json").write_bytes((folders[experts] / "config.json").read_bytes())
        tensors = load_file(next(folders[experts].glob("*.safetensors")))
        edit(tensors)
        save_file(tensors, path / "model.safetensors")
        return path

    if experts == "fused":
        with pytest.raises(ValueError, match=r"1 tensors are missing \(first: model\.layers\.1\.mlp\.experts"):
            Released.from_pretrained(edited(lambda t: t.pop("model.layers.1.mlp.experts.gate_up_proj")))
    else:
        with pytest.raises(RuntimeError, match="conversion"):  # transformers' own, which names the tensor above it
            Released.from_pretrained(edited(lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight")))
    with pytest.raises(ValueError, match=r"1 tensors are not part of the model \(first: model\.ghost"):
        Released.from_pretrained(edited(lambda t: t.update({"model.ghost": torch.zeros(1)})))
    with pytest.raises(ValueError, match=r"of another shape .*mlp\.gate\.weight"):
        Released.from_pretrained(edited(lambda t: t.update({"model.layers.0.mlp.gate.weight": torch.zeros(3, 3)})))


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_interleaved_sections(tmp_path, mode):
    model = megatron(mrope_layout="interleaved", head_dim=64, mrope_section=[12, 10, 10], attention_mode=mode)
    m.to_hf(model, tmp_path / "hf")
    released = Released.from_pretrained(tmp_path / "hf", attention_mode=mode)
    assert released.config.rope_parameters["mrope_interleaved"]
    ids = torch.cat([PICTURES, some_ids(30, rows=2)], dim=1)
    with torch.no_grad():
        wanted = model(ids, None, pixels(GRID), GRID)
        torch.testing.assert_close(
            released(ids, pixel_values=pixels(GRID), grid_thw=GRID).logits, wanted, atol=1e-4, rtol=0
        )
        released.config.rope_parameters["mrope_interleaved"] = False
        other = released(ids, pixel_values=pixels(GRID), grid_thw=GRID).logits
    assert float((other - wanted).abs().max()) > 1e-2


def test_selection_by_hand():
    """One head, one dimension: scores are gate * relu(q * k)."""
    k = torch.tensor([[2.0], [-1.0], [2.0], [0.0], [5.0], [-3.0]])
    q = torch.ones(3, 1, 1)
    gate = torch.tensor([[1.0], [-1.0], [0.0]])
    visible = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]).bool()

    def chosen(topk: int) -> list[list[int]]:
        return [row.nonzero()[:, 0].tolist() for row in select_keys(q, k, gate, visible, topk)]

    # row 1: -2 0 -2 0 -5 0, where -1 * relu(-1) is -0.0; row 2: all zero, some of them -0.0
    assert chosen(1) == [[0], [1], [1]]
    assert chosen(3) == [[0, 1, 2], [1, 3, 5], [1, 2, 3]]
    assert chosen(9) == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]


def test_a_query_without_a_key_gives_zero():
    q, k, v = (torch.randn(2, heads, 4, generator=torch.Generator().manual_seed(0)) for heads in (4, 2, 2))
    out = attend(q, k, v, torch.tensor([[False, False], [True, False]]))
    assert not out[0].any()
    torch.testing.assert_close(out[1].view(4, 4), v[0].repeat_interleave(2, dim=0))


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(released):
    ids = some_ids(20)
    alone = released(ids).logits
    for left, right in ((7, 0), (0, 7), (3, 4)):
        padded = torch.nn.functional.pad(ids, (left, right), value=61)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        logits = released(torch.cat([padded, some_ids(27, seed=1)]), torch.cat([mask, torch.ones(1, 27).long()])).logits
        torch.testing.assert_close(logits[:1, left : left + 20], alone, atol=1e-5, rtol=0)


class Largest(TorchDispatchMode):
    """The greatest number of elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@torch.no_grad()
def test_memory_grows_with_the_chunk_and_chunks_change_nothing(released):
    ids, logits, largest = some_ids(600), [], []
    for chunk in (600, 16):
        released.config.sa_config["q_chunk_size"] = chunk
        with Largest() as mode:
            logits.append(released(ids).logits)
        largest.append(mode.elements)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    per_group = 2
    assert largest[0] == per_group * 600 * 600
    assert largest[1] <= 600 * 256 < 600 * 600  # the projections of all tokens are the largest now


def test_positions_and_disagreements(model):
    everywhere = torch.ones_like(PICTURES).bool()
    ours = model._positions(PICTURES, GRID[:, 1:])
    assert torch.equal(rope_positions(PICTURES, GRID, {IMAGE, CLIP}, everywhere), ours)
    for grid, ids, complaint in (
        (GRID[:1], PICTURES, "6 picture tokens, but grid_thw describes 2"),
        (torch.tensor([[1, 4, 6]]), PICTURES, "ends inside a picture"),
        (torch.tensor([[1, 4, 2], [1, 4, 4]]).flip(0), PICTURES, "ends inside a picture"),
        (GRID[:1], torch.tensor([[1, IMAGE, 2, IMAGE]]), "not in one piece at token 1"),
        (torch.tensor([[2, 2, 4]]), PICTURES, "grid_thw must be"),
        (torch.tensor([[1, 3, 4]]), PICTURES, "grid_thw must be"),
    ):
        with pytest.raises(ValueError, match=complaint):
            rope_positions(ids, grid, {IMAGE, CLIP}, torch.ones_like(ids).bool())


def test_generation_with_pictures_batches_and_several_answers(released):
    inputs = {"pixel_values": pixels(GRID), "grid_thw": GRID, "max_new_tokens": 12, "do_sample": False}
    inputs["suppress_tokens"] = [IMAGE, CLIP]  # without a cache, rows are read again and must agree with the grid
    cached = released.generate(PICTURES, **inputs)
    assert torch.equal(cached, released.generate(PICTURES, use_cache=False, **inputs))
    first = released.generate(PICTURES[:1], **{**inputs, "pixel_values": pixels(GRID)[:8], "grid_thw": GRID[:1]})
    assert torch.equal(cached[:1], first)
    several = released.generate(PICTURES, **{**inputs, "do_sample": True, "top_k": 1, "num_return_sequences": 3})
    assert torch.equal(several, cached.repeat_interleave(3, dim=0))
    beams = released.generate(PICTURES, **inputs, num_beams=3)  # rows of the cache, index keys too, change places
    assert torch.equal(beams, released.generate(PICTURES, use_cache=False, **inputs, num_beams=3))
    assert not torch.equal(beams, cached)


def test_a_prompt_may_end_in_a_picture(model, released):
    ids, grid = torch.tensor([[1, 2, 3, IMAGE, IMAGE, IMAGE]]), torch.tensor([[1, 2, 6]])
    got = released.generate(ids, pixel_values=pixels(grid), grid_thw=grid, max_new_tokens=8, do_sample=False)
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, None, pixels(grid), grid)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids)


def test_what_is_not_supported_is_refused(released):
    ids, cache = some_ids(5), DynamicCache(config=released.config)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        released.generate(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="StaticCache is not supported"):
        released(ids, past_key_values=StaticCache(config=released.config, max_cache_len=8))
    with pytest.raises(ValueError, match="indexer key cache"):
        released(ids, past_key_values=DynamicCache())
    released(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids are needed behind a cache"):
        released(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids are needed to continue"):
        released.generate(torch.cat([ids, ids], 1), past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"attention_mask is \[1, 1, 5, 5\] and must be \[1, 5\]"):
        released(ids, attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="no pixel_values"):
        released(PICTURES, grid_thw=GRID)
    with pytest.raises(ValueError, match="hold 3 patches, but grid_thw describes 24"):
        released(PICTURES, grid_thw=GRID, pixel_values=pixels(GRID)[:3])
    with pytest.raises(ValueError, match="inputs_embeds"):
        released(ids, inputs_embeds=torch.zeros(1, 5, 64))
    with pytest.raises(ValueError, match="output_attentions"):
        released(ids, output_attentions=True)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("attention_mode", "warm", "neither 'sparse' nor 'dense'"),
        ("norm_topk_prob", False, "norm_topk_prob = False"),
        ("tie_word_embeddings", True, "tie_word_embeddings = True"),
        ("mlp_only_layers", [3], "mlp_only_layers"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}, "rope_type = 'yarn'"),
        ("rope_scaling", {"rope_type": "default", "mrope_section": [16, 24, 20]}, "must sum to head_dim / 2"),
        ("rope_scaling", {"mrope_section": [16, 24, 24], "mrope_interleaved": True}, "every third"),
    ],
)
def test_configurations_of_other_models_are_refused(key, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        KeyeVL2Config(**{key: value})


@torch.no_grad()
def test_bf16_follows_fp32(model, released, tmp_path):
    """Rounded weights, and fp32 inside scores, router, norms and softmax: 8 bits of mantissa through two layers."""
    narrow = m.KeyeModel(model.cfg, torch.bfloat16).eval()
    narrow.load_state_dict(model.state_dict())
    m.to_hf(narrow, tmp_path / "hf")
    half = Released.from_pretrained(tmp_path / "hf")
    assert half.dtype is torch.bfloat16 and json.loads((tmp_path / "hf" / "config.json").read_text())["auto_map"]
    half.config.attention_mode = "dense"
    narrow.cfg.attention_mode = "dense"
    ids = torch.cat([PICTURES, some_ids(20, rows=2)], dim=1)
    ours = narrow(ids, None, pixels(GRID), GRID).float()
    theirs = half(ids, pixel_values=pixels(GRID), grid_thw=GRID).logits.float()
    off = (ours - theirs).abs().mean() / ours.abs().mean()
    assert float(off) < 0.03
