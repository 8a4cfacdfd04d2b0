"""Show the method at work in minutes, on a drawn data set, by the commands that a user types.

    python tests/demo.py [--arch maskrcnn] [--folder DIR]

It draws images, trains a teacher for them, trains a student by train.py, and evaluates both by
evaluate.py, through fewer and fewer bytes.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import drawn
import torch

import train

MIN_SIZE, MAX_SIZE = 96, 168


def run(what, script, *flags):
    """Print and run a command; return the last line that it prints."""
    command = ["python", os.path.relpath(ROOT / script), *map(str, flags)]
    print(f"\n{what}\n\n    {shlex.join(command)}\n", flush=True)
    process = subprocess.Popen(
        [sys.executable, ROOT / script, *command[2:]], stdout=subprocess.PIPE, text=True)
    last_line = ""
    for line in process.stdout:
        if last_line:
            print(last_line, end="", flush=True)
        last_line = line
    if process.wait():
        sys.exit(process.returncode)
    return last_line


def make_teacher(arch, folder):
    """Draw the data set and train its teacher; return their paths."""
    data_dir, teacher_file = folder / "data", folder / f"teacher_{arch}.pt"
    shutil.rmtree(data_dir, ignore_errors=True)
    drawn.write_dataset(data_dir, train=256, val=12)
    print(f"Drew 256 images to train on and 12 to validate with, in {data_dir}/: red boxes and blue "
          "ellipses.\nNow a teacher is trained for them, with their labels.\n", flush=True)
    teacher = drawn.train_teacher(arch, data_dir, 85, MIN_SIZE, MAX_SIZE, rois=16)
    torch.save(teacher.state_dict(), teacher_file)
    return data_dir, teacher_file


def main():
    parser = argparse.ArgumentParser(description="Show GHND at work on a drawn data set.")
    parser.add_argument("--arch", choices=train.EXPERIMENTS, default="fasterrcnn")
    parser.add_argument(
        "--folder", type=Path, default=Path("demo"),
        help="where everything goes; an earlier demo there is replaced (%(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    output_dir = args.folder / "student"
    shutil.rmtree(output_dir, ignore_errors=True)
    data_dir, teacher_file = make_teacher(args.arch, args.folder)

    common = ["--data-dir", data_dir, "--teacher-ckpt", teacher_file]
    run("The student learns to give the teacher's features through 3 channels. The loss reads no "
        "label; the relative errors of the four layers fall.",
        "train.py", "--arch", args.arch, *common, "--output-dir", output_dir, "--min-size", MIN_SIZE,
        "--max-size", MAX_SIZE, "--epochs", 3, "--lr-drops", 2, "--images-per-step", 4,
        "--limit-train", 112, "--limit-val", 2, "--log-every", 10)

    ckpt = train.RunFolder(output_dir, args.arch).last  # two images are too few to tell the best
    summary = json.loads(run(
        "The student is split: its head packs an image into bytes, its tail detects from them. With "
        "fewer bits a value there are fewer bytes. The teacher gets JPEG files for comparison.",
        "evaluate.py", "--ckpt", ckpt, *common, "--bits", 8, 4, "--jpeg", 1, "--pictures",
        args.folder / "pictures"))

    print("\nIn short:")
    for iou_type in summary["student"]:
        teacher, student = (summary[name][iou_type]["AP"] for name in ("teacher", "student"))
        print(f"    {iou_type} AP: teacher {teacher:.3f}, student {student:.3f}")
        for row in summary["rate"] + summary["jpeg"]:
            ap = row["metrics"][iou_type]["AP"]
            share = row["payload_bytes"] / summary["file_bytes"]
            print(f"    {row['sent']}: {ap:.3f}, sending {row['payload_bytes']:.0f} bytes an image, "
                  f"{share:.0%} of its file")
    print(f"    annotations, teacher and student side by side: {args.folder}/pictures/")


if __name__ == "__main__":
    main()
