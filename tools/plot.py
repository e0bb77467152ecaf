"""Pictures of the sparse attention.

python tools/plot.py recall runs/dsa_warmup-mini                       # recall by layer over steps -> run_dir/recall.png
python tools/plot.py frames --hf exported --video clip.mp4 --question "What happens?" --out frames.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_keye.cli import run_cli
from megatron_keye.errors import UserError
from megatron_keye.pictures import draw_frames, draw_recall


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="plot", description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    recall = kinds.add_parser("recall", help="top-k recall by layer over the steps of a run")
    recall.add_argument("run_dir", type=Path)
    recall.add_argument("--out", type=Path, help="default: run_dir/recall.png")
    frames = kinds.add_parser("frames", help="which frames of a clip the tokens behind it select")
    frames.add_argument("--hf", type=Path, required=True, help="an exported folder")
    frames.add_argument("--video", type=Path, required=True)
    frames.add_argument("--question", default="What happens?")
    frames.add_argument("--out", type=Path, default=Path("frames.png"))
    args = parser.parse_args(argv)
    if args.kind == "recall":
        out = args.out or args.run_dir / "recall.png"
        draw_recall(args.run_dir, out)
    else:
        out = args.out
        draw_selection(args.hf, args.video, args.question, out)
    print(out)


def draw_selection(folder: Path, clip: Path, question: str, out: Path) -> None:
    import megatron_keye.model as m
    from keye_data.export import read_settings
    from keye_data.processor import Processor
    from keye_data.tokenizer import load_tokenizer

    try:
        data = clip.read_bytes()
    except OSError as error:
        raise UserError(f"--video {clip}: {error.strerror}") from error
    content = [{"type": "video", "video": "clip"}, {"type": "text", "text": question}]
    processor = Processor(load_tokenizer(folder), read_settings(folder))
    inputs = processor.prompt([{"role": "user", "content": content}], {"clip": data})
    draw_frames(m.from_hf(folder, attention_mode="sparse"), inputs, out, f"{clip.name}: {question}")


if __name__ == "__main__":
    run_cli(main)
