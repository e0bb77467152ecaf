"""Copies into an exported folder the code that runs it, and names that code in the folder's configurations.

The model's files go as they are. The processor's are keye_data's own sources, flattened: transformers takes single files
alone, so keye_data/video/api.py becomes keye_data_video_api.py and imports are rewritten; nothing else is touched.
"""

from __future__ import annotations

import re
from pathlib import Path

import keye_data

HERE = Path(__file__).parent
DATA = Path(keye_data.__file__).parent
MODEL = ("configuration", "attention", "vision", "positions", "generation", "modeling")
PROCESSOR = "processing_keye_vl2.py"
AUTO_MODEL = {
    "AutoConfig": "configuration_keye_vl2.KeyeVL2Config",
    **dict.fromkeys(
        ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"),
        "modeling_keye_vl2.KeyeVL2MoeForConditionalGeneration",
    ),
}
# `from keye_data.x import`, and inside a package `from .x import`: the only forms keye_data's shipped sources use.
IMPORT = re.compile(r"^([ \t]*from )(keye_data(?:\.\w+)*|\.\w*(?:\.\w+)*)(?= import )", re.MULTILINE)


def ship_model(folder: Path) -> None:
    """The model's code beside its weights; `config_dict` names it."""
    for name in MODEL:
        file = f"{name}_keye_vl2.py"
        (folder / file).write_bytes((HERE / file).read_bytes())


def ship_processor(folder: Path) -> None:
    """The processor's code beside the configurations that keye_data's Processor.save_pretrained wrote."""
    from megatron_keye.hf_release.processing_keye_vl2 import name_code  # brings all of transformers

    for name, source in processor_sources().items():
        (folder / name).write_text(source, encoding="utf-8")
    name_code(folder)


def processor_sources() -> dict[str, str]:
    """File name in the folder -> source, of the processor and every keye_data module it needs, directly or not."""
    sources: dict[str, str] = {}
    waiting = [(PROCESSOR, HERE / PROCESSOR, "")]
    while waiting:
        name, path, package = waiting.pop()
        if name in sources:
            continue
        needed: list[str] = []

        def flat(match: re.Match, package: str = package, needed: list[str] = needed) -> str:
            module = f"{package}{match[2]}" if match[2].startswith(".") else match[2]
            needed.append(module)
            return f"{match[1]}.{module.replace('.', '_')}"

        sources[name] = IMPORT.sub(flat, path.read_text(encoding="utf-8"))
        waiting += [(f"{module.replace('.', '_')}.py", *_locate(module)) for module in needed]
    return dict(sorted(sources.items()))


def _locate(module: str) -> tuple[Path, str]:
    """keye_data.a.b -> its file, and the package that relative imports in it start from."""
    path = DATA.joinpath(*module.split(".")[1:])
    if path.is_dir():
        return path / "__init__.py", module
    return path.with_suffix(".py"), module.rpartition(".")[0]
