"""The wrapper of every entry point, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
sys.path[:0] = [".", "data_pipeline"]
from keye_data.errors import DataError
from omegaconf import OmegaConf
from megatron_keye.cli import run_cli
from megatron_keye.errors import UserError

def main(argv):
    assert "--debug" not in argv
    match argv[0]:
        case "user": raise UserError("first fault\\nsecond fault")
        case "data": raise DataError("no shards")
        case "omega": OmegaConf.to_container(OmegaConf.create({"a": "${b}"}), resolve=True)
        case "bug": raise RuntimeError("a bug")
        case "ctrl-c": raise KeyboardInterrupt
        case "code": return 3
        case "fine": print(*argv)

run_cli(main)
"""


def run(*arguments, rank=None):
    env = {"PYTHONPATH": ".", **({"RANK": rank} if rank else {})}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=env, timeout=60
    )


@pytest.mark.parametrize(
    "arguments, code, err",
    [
        (["user"], 1, "error: first fault\nerror: second fault\n"),
        (["data"], 1, "error: no shards\n"),
        (["omega"], 1, "error: a: Interpolation key 'b' not found\n"),
        (["ctrl-c"], 130, ""),
        (["code"], 3, ""),
        (["fine", "a.b=c"], 0, ""),
    ],
)
def test_exit_codes_and_lines(arguments, code, err):
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (code, err)
    assert done.stdout == ("fine a.b=c\n" if code == 0 else "")


@pytest.mark.parametrize("arguments", [["user", "--debug"], ["--debug", "data"], ["bug"]])
def test_traceback_only_for_debug_and_bugs(arguments):
    done = run(*arguments)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_other_ranks_say_who_they_are():
    assert run("data", rank="3").stderr == "error (rank 3): no shards\n"
