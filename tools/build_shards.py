"""Builds the WebDataset shards that training reads.

  python tools/build_shards.py clips/ --out data/clips                       pictures and clips, captions beside them
  python tools/build_shards.py llava.json --media images/ --out data/llava   LLaVA's, ShareGPT's or OpenAI's conversations
  python tools/build_shards.py old_tars/ --out data/new --on-error skip      existing tars; bad samples go to bad.jsonl
  python tools/build_shards.py films.jsonl --out data/films --reencode fps=2,gop=16,height=360 \\
      --tokenizer data/tokenizer --budget recipes/stage1.yaml --budget recipes/stage3.yaml

SOURCE is a file or a folder with files of one of these formats, told by looking (the first record of a list decides):
  captions     pictures and clips, each with its caption in a .txt file of the same name
  openai       .jsonl (or a JSON list) of {"messages": [{"role", "content": text or parts}]} or documents {"text": ...}
  llava        JSON list or .jsonl of {"image" or "video": name(s), "conversations": [{"from", "value": "<image>\\n..."}]}
  sharegpt     the same with lists "images" and "videos"; also "messages" with such placeholders
  webdataset   .tar files with one .json or .txt member and media per sample

Every picture is decoded once and every clip scanned: its packet table is stored beside it, and films longer than
--segment-seconds are cut, without re-encoding, where decoding can start. DIR also receives samples.jsonl (for every sample its
media, their size, length and digest, and its tokens), duplicates.json, and Energon's index.

A build that was stopped, or killed, goes on with the same command. The same source and options give the same bytes, whatever the
number of processes or machines. Look at the result with tools/inspect_shards.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_pipeline"))  # works uninstalled too

from keye_data.errors import DataError
from keye_data.shards.options import FORMATS, Options, Reencode, parse_bytes


def _parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder; appears when it is whole")
    parser.add_argument("--format", choices=FORMATS, help="instead of looking")
    parser.add_argument("--media", type=Path, metavar="DIR", help="what media paths count from; else the list's folder")
    parser.add_argument("--on-error", choices=("stop", "skip", "keep"), default=default.on_error, help="at a bad sample: "
                        "stop (default); skip it, with its reason in bad.jsonl; or keep it if only its media are damaged, "
                        "for the loader to find")  # fmt: skip
    group = parser.add_argument_group("shards")
    group.add_argument(
        "--samples-per-shard", type=int, default=default.samples_per_shard, metavar="N", help="%(default)s"
    )
    group.add_argument(
        "--shard-bytes", default="4G", metavar="SIZE", help="a larger shard goes on in a further file; %(default)s"
    )
    group.add_argument(
        "--segment-seconds", type=float, default=default.segment_seconds, metavar="S", help="%(default)s"
    )
    group.add_argument("--reencode", metavar="CHOICES", help="store clips as H.264 with few frames and key frames close "
                       "together: fps=2,gop=16,height=360,crf=23 (these are the defaults)")  # fmt: skip
    group = parser.add_argument_group("token counts")
    group.add_argument("--tokenizer", type=Path, metavar="PATH", help="a Hugging Face folder or a qwen.tiktoken file")
    group.add_argument("--budget", action="append", default=[], metavar="RECIPE", help="count by this recipe's data "
                       "section, or by NAME=TOKENS; may be repeated")  # fmt: skip
    group = parser.add_argument_group("where")
    group.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes; %(default)s here"
    )
    group.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help="on a Ray cluster whose machines see SOURCE "
                       "and DIR under the same paths: host:port, auto for one that runs here, local for a new one; without "
                       "ADDRESS that in RAY_ADDRESS, else local")  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _options(given: argparse.Namespace) -> Options:
    options = Options(
        format=given.format,
        media=given.media,
        samples_per_shard=given.samples_per_shard,
        shard_bytes=parse_bytes(given.shard_bytes),
        segment_seconds=given.segment_seconds,
        on_error=given.on_error,
        reencode=None if given.reencode is None else Reencode.parse(given.reencode),
        tokenizer=given.tokenizer and given.tokenizer.expanduser().absolute(),
        budgets=tuple(given.budget),
    )
    if given.workers < 1:
        raise DataError(f"--workers {given.workers}: it must be at least 1")
    options.check()
    return options


def _build(given: argparse.Namespace, options: Options) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    from keye_data.shards.build import build
    from keye_data.shards.executors import Pool, Processes, Ray
    from keye_data.shards.growing import finished_shards
    from keye_data.shards.sources import detect, read_source

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:.1f}/s")

    options = replace(options, format=options.format or detect(given.source))
    print(f"{given.source}: {options.format}{'' if given.format else ' (told by looking)'}", flush=True)
    waiting = finished_shards(given.out)
    if waiting:
        print(f"going on: {waiting} shards are finished, and checked first", flush=True)
    workers, shards = given.workers, 1
    pool: Callable[[], Pool] = lambda: Processes(min(workers, shards))  # noqa: E731
    if given.ray is not None:
        pool = lambda: Ray(given.ray, workers)  # noqa: E731
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("samples", total=None)
        total = sum(1 for _ in read_source(given.source, str(options.format)))
        progress.update(bar, total=total)
        shards = max(1, -(-total // options.samples_per_shard))
        if shards < min(workers, total):
            share = -(-total // workers)
            progress.print(f"{shards} processes have work, {workers} might: --samples-per-shard {share} would do that")
        done = build(given.source, given.out, options, pool=pool, progress=lambda count: progress.advance(bar, count))
    print(f"{given.out}: {done.samples} samples in {done.shards} shards" + (f", {done.kept} kept" if done.kept else ""))
    if done.bad:
        print(f"{done.bad} bad samples were left out: {given.out / 'bad.jsonl'} says why")
    if done.damaged:
        print(f"{done.damaged} samples with damaged media were kept: see `problem` in {given.out / 'samples.jsonl'}")
    if done.shared_media or done.identical:
        counts = f"{done.shared_media} files are used by several samples, {done.identical} samples repeat others"
        print(f"{counts}: {given.out / 'duplicates.json'}")


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    from keye_data.shards.growing import finished_shards

    try:
        _build(given, _options(given))
    except (DataError, OSError) as error:
        if given.debug:
            raise
        print(f"build_shards: {error}", file=sys.stderr)
        if finished := finished_shards(given.out):
            print(
                f"build_shards: {finished} finished shards wait; the same command goes on from there", file=sys.stderr
            )
        return 1
    except KeyboardInterrupt:
        begun = "; the same command goes on from here" if finished_shards(given.out) else " before a shard was finished"
        print(f"build_shards: stopped{begun}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
