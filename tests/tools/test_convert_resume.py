"""A conversion killed in the middle is no checkpoint and no folder, and goes on from its finished files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_keye.conversion.commands import export, import_hf
from megatron_keye.errors import UserError
from megatron_keye.journal import NAME, Journal
from megatron_keye.model.hf_files import Checkpoint, publishing
from megatron_keye.parallel import plan
from megatron_keye.training import checkpoint
from tests.parallel.launch import launch
from tests.tools.small_checkpoint import BF16, write

CUT = 300_000  # bytes of a file: about five files in all


def importing(hf: Path, out: Path, progress: Callable) -> None:
    import_hf(hf, out / "ckpt", file_bytes=CUT, progress=progress)


def exporting(ckpt: Path, out: Path, progress: Callable) -> None:
    export(ckpt, out / "hf", shard_bytes=CUT, progress=progress, say=lambda line: None)


@contextmanager
def dying(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Ends the process as `kill -9` does when three quarters are written."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if what == "writing" and done > 0.75 * total:
            os.kill(os.getpid(), signal.SIGKILL)

    yield advance


@contextmanager
def watching(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """In the end all bytes were told of."""
    counts: list[int] = []
    yield counts.append
    assert sum(counts) == pytest.approx(total, rel=0.2)  # bytes of finished files count with what is around tensors


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("source") / "hf", BF16)


@pytest.fixture(params=["import", "export"])
def conversion(request, hf, tmp_path) -> tuple[Callable, Path, Path]:
    """(what to run, its source, the name of what appears)"""
    if request.param == "import":
        return importing, hf, Path("ckpt", "iter_0000000")
    import_hf(hf, tmp_path / "ckpt", say=lambda line: None)
    plan.shut_down()
    return exporting, tmp_path / "ckpt", Path("hf")


@pytest.fixture(autouse=True)
def _groups():
    yield
    plan.shut_down()


def killed(run: Callable, source: Path, out: Path, name: Path) -> Path:
    """-> what the killed process left"""
    with pytest.raises(RuntimeError, match=f"left with code -{int(signal.SIGKILL)}"):
        launch(run, 1, source, out, dying)
    assert not (out / name).exists()
    return (out / name).with_name(f".{name.name}.partial")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def finished(draft: Path) -> list[Path]:
    return sorted(file for file in draft.iterdir() if file.suffix in (".distcp", ".safetensors"))


def test_finished_files_are_kept_and_checked(conversion, tmp_path):
    run, source, name = conversion
    draft = killed(run, source, tmp_path / "a", name)
    assert checkpoint.newest(tmp_path / "a" / "ckpt") is None
    with pytest.raises(UserError):
        Checkpoint(draft)
    kept = finished(draft)
    assert len(kept) >= 3
    damaged = bytearray(kept[1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    kept[1].write_bytes(damaged)
    written = {file.name: file.stat().st_mtime_ns for file in kept}
    for stray in ("tokenizer.json", "model-00009-of-00009.safetensors"):  # there, and not in the journal
        (draft / stray).write_bytes(b"of a command that was given otherwise")

    run(source, tmp_path / "a", watching)
    assert not draft.exists()
    run(source, tmp_path / "b", watching)  # in one go
    whole, resumed = contents(tmp_path / "b" / name), contents(tmp_path / "a" / name)
    assert whole.keys() == resumed.keys() and NAME not in resumed
    assert [file for file in whole if whole[file] != resumed[file]] == []
    now = {file: (tmp_path / "a" / name / file).stat().st_mtime_ns for file in written}
    assert [file for file in written if now[file] != written[file]] == [kept[1].name]


def test_files_of_another_source_are_written_again(conversion, hf, tmp_path):
    run, source, name = conversion
    draft = killed(run, source, tmp_path / "a", name)
    written = {file.name: file.stat().st_mtime_ns for file in finished(draft)}
    (draft / NAME).with_name("__0_99.distcp").write_bytes(b"killed before it was entered")
    if run is importing:
        shard = next(source.glob("*.safetensors"))
        os.utime(shard, ns=(1, 1))
    else:
        other = write(tmp_path / "other", BF16, "separate")
        source = import_hf(other, tmp_path / "ckpt2", dtype=BF16, file_bytes=CUT)
    run(source, tmp_path / "a", watching)
    assert all((tmp_path / "a" / name / file).stat().st_mtime_ns != time for file, time in written.items())
    assert not (tmp_path / "a" / name / "__0_99.distcp").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"source": 1, "files": 2}'])
def test_a_journal_that_cannot_be_read_tells_of_nothing(text, tmp_path):
    (tmp_path / NAME).write_text(text)
    (tmp_path / "a").write_bytes(b"x")
    journal = Journal(tmp_path, {"of": "this"})
    assert journal.finished("a") is None and journal.news == ""
    with journal.writing("a", [1]) as stream:
        stream.write(b"whole")
    assert Journal(tmp_path, {"of": "this"}).finished("a") == [1]


def test_one_process_at_a_time(tmp_path):
    with (
        publishing(tmp_path / "x", resume=True),
        pytest.raises(UserError, match="written by another process"),
        publishing(tmp_path / "x", resume=True),
    ):
        pass
    assert (tmp_path / "x").is_dir()  # the first was not disturbed
