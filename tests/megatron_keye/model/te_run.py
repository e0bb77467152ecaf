"""A few training steps of the mini model whose layers are Transformer Engine's (the stand-in's).

python te_run.py OUT: writes what `survey` returns. A process of its own, for Megatron looks for the library once.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

STEPS = 2


def survey() -> dict[str, Any]:
    """Which classes the layers are of, what a checkpoint holds, and how the model trains."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    from megatron_keye.model import backend
    from megatron_keye.parallel import plan
    from megatron_keye.training.engine import Engine
    from megatron_keye.training.model_state import model_state
    from tests.parallel.invariance import recipe_for, train

    recipe = recipe_for("sparse", {})
    engine = Engine(recipe, plan.initialize(recipe.parallel))
    layer = engine.language[0].decoder.layers[0]
    parts = {
        "input norm": layer.input_layernorm,
        "qkv": layer.self_attention.linear_qkv,
        "q norm": layer.self_attention.q_layernorm,
        "proj": layer.self_attention.linear_proj,
        "norm before experts": layer.pre_mlp_layernorm,
        "experts": layer.mlp.experts,
        "final norm": engine.language[0].decoder.final_layernorm,
    }
    state = model_state(engine.language, engine.tower)
    apply_factories(state)
    run = train(recipe, steps=STEPS)
    plan.shut_down()
    return {
        "classes": {name: type(part).__name__ for name, part in parts.items()},
        "keys": {(t.key, tuple(t.global_shape), t.dtype) for t in nested_values(state)},
        "described": backend.describe(),
        "run": run,
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import te_stand_in

    te_stand_in.install()
    from megatron_keye.model import backend, transformer_config

    for module in (backend, transformer_config):
        module.has_transformer_engine = lambda: True  # type: ignore[attr-defined]  # there is no CUDA
    Path(sys.argv[1]).write_bytes(pickle.dumps(survey()))
