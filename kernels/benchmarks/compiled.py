"""Every Triton kernel of dsa, as the operators start it at Keye's geometry, compiled for GPUs that are not there.

python kernels/benchmarks/compiled.py [--targets sm_80 sm_90 sm_100 gfx942] [--kernels NAME ...] [--write]

Prints registers, spills, shared memory and the matrix instructions found in the machine code. --write keeps the figures in
results/compiled.json, for readme_tables.py. Needs no GPU: Triton brings its assemblers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from gpu_inputs import KEYE, causal
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from keye_kernels.dsa import triton_backend
from keye_kernels.dsa.triton_backend.recorder import Launch, Recorder

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a block may use
RESULTS = Path(__file__).resolve().parent / "results" / "compiled.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_for(launch: Launch, target: str) -> dict:
    """Compiles one launch; a compiler error is raised."""
    names = launch.kernel.arg_names
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    built = triton.compile(source, target=TARGETS[target], options=options)
    figures = {"kernel": launch.name, "target": target, **options, "shared": built.metadata.shared}
    figures["tensor_memory"] = getattr(built.metadata, "tmem_size", None) or 0
    figures["dots"] = built.asm["ttir"].count("tt.dot ")
    figures |= _amd(built.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(built.asm["cubin"])
    shown = {name: value for name, value in launch.constants if isinstance(value, int | str)}
    return figures | {"constants": shown}


def _nvidia(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
        code = _output("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    count = lambda pattern: len(re.findall(pattern, code))  # noqa: E731
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills": count(r"\b(?:STL|LDL)\b"),
        "wgmma": count(r"\b[HIQ]GMMA"),
        "mma": count(r"\bHMMA"),
        "tcgen05": count(r"\bUTC\w*MMA"),
    }


def _amd(assembly: str) -> dict:
    last = lambda key: int((re.findall(rf"\.{key}:\s*(\d+)", assembly) or [0])[-1])  # noqa: E731
    mfma = len(re.findall(r"\bv_mfma", assembly))
    return {"registers": last("vgpr_count"), "spills": last("vgpr_spill_count"), "mfma": mfma}


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def _compile(job: tuple[int, str]) -> dict:
    at, target = job
    try:
        return compile_for(_LAUNCHES[at], target)
    except Exception as error:  # one kernel that does not compile must not hide the others
        launch = _LAUNCHES[at]
        return {"kernel": launch.name, "target": target, "error": f"{type(error).__name__}: {str(error)[:500]}"}


_LAUNCHES: list[Launch] = []  # inherited by forked workers: kernels do not pickle


def compile_all(launches: list[Launch], targets: list[str]) -> list[dict]:
    """One entry for each distinct launch and target, in the order of the launches."""
    _LAUNCHES[:] = {launch.variant: launch for launch in launches}.values()
    jobs = [(at, target) for at in range(len(_LAUNCHES)) for target in targets]
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, len(jobs) or 1)) as pool:
        return pool.map(_compile, jobs, chunksize=1)


def label(entry: dict, results: list[dict]) -> str:
    """The kernel's name with those of its constants in which its variants differ."""
    kin = [other["constants"] for other in results if other["kernel"] == entry["kernel"] and "constants" in other]
    names = sorted({name for constants in kin for name in constants})
    differing = [name for name in names if len({str(constants.get(name)) for constants in kin}) > 1]
    shown = ", ".join(f"{name}={entry['constants'][name]}" for name in differing if name in entry.get("constants", {}))
    return f"{entry['kernel']}({shown})" if shown else entry["kernel"]


def table(results: list[dict]) -> str:
    """Text for a terminal."""
    columns = ("num_warps", "num_stages", "registers", "spills", "shared", "wgmma", "mma", "tcgen05", "mfma")
    rows = [("kernel", "target", *columns)]
    for entry in results:
        figures = (entry["error"],) if "error" in entry else tuple(str(entry.get(column, "")) for column in columns)
        rows.append((entry["label"], entry["target"], *figures))
    widths = [max(len(row[i]) for row in rows if i < len(row) > 3) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def keye_launches(length: int = 8192) -> list[Launch]:
    """What forward and backward of every public operator start at Keye's geometry in bf16, one causal sequence.

    Two degrees of agreement between neighbours, so that both the gathered and the contiguous path are taken.
    """
    g = KEYE
    shapes = [(length, g.heads, g.dim), (length, g.kv_heads, g.dim), (length, g.kv_heads, g.dim)]
    shapes += [(length, g.indexer_heads, g.indexer_dim), (length, g.indexer_dim), (length, g.indexer_heads)]
    leaves = [torch.zeros(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    (q, k, v), indexer, ranges = leaves[:3], leaves[3:], causal(length, torch.device("cpu"))
    indices = torch.arange(length, dtype=torch.int32)[:, None] - torch.arange(g.topk, dtype=torch.int32).flip(0)
    launches: list[Launch] = []
    for entries in (g.topk // 2, length):
        with Recorder(entries) as recorder:
            triton_backend.select_topk(*indexer, *ranges, g.topk)
            for deterministic in (False, True):
                for mode in ("sparse", "warmup"):
                    outputs = triton_backend.dsa_attention(
                        *leaves, *ranges, g.topk, mode, deterministic=deterministic, return_indices=mode == "sparse"
                    )
                    torch.autograd.backward(outputs[:2], [torch.zeros_like(x) for x in outputs[:2]])
                out, _ = triton_backend.sparse_attention(q, k, v, indices.clamp_min(-1), deterministic=deterministic)
                out.backward(torch.zeros_like(out))
            out, _ = triton_backend.dense_attention(q, k, v, *ranges)
            out.backward(torch.zeros_like(out))
        launches += recorder.launches
    for wide in (4 * length, 32 * length):  # thresholds work otherwise where a row does not fit on a multiprocessor
        shapes = [(wide, g.indexer_heads, g.indexer_dim), (wide, g.indexer_dim), (wide, g.indexer_heads)]
        with Recorder(length) as recorder:
            triton_backend.select_topk(
                *(torch.empty(shape, dtype=torch.bfloat16) for shape in shapes),
                *causal(wide, torch.device("cpu")),
                g.topk,
            )
        launches += recorder.launches
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", help="only these, by name")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--write", action="store_true", help=f"write the figures to {RESULTS.name}")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it")
    torch.set_num_threads(1)
    launches = [x for x in keye_launches() if not options.kernels or x.name in options.kernels]
    results = compile_all(launches, options.targets)
    for entry in results:
        entry["label"] = label(entry, results)
    print(table(results))
    document = {"triton": triton.__version__, "torch": torch.__version__, "kernels": results}
    for path in filter(None, (options.json, RESULTS if options.write else None)):
        path.write_text(json.dumps(document, indent=1) + "\n")
    if any("error" in entry for entry in results):
        sys.exit("some kernels do not compile")


if __name__ == "__main__":
    main()
