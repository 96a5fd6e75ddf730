"""Does HIER help when a whole image encoder is trained? EfficientNet-Lite0 on photographs of 200 species of birds.

    python -m benchmarks.evidence.images --data PATH --output PATH    # the runs that are missing, then the report
    python -m benchmarks.evidence.images                              # the report of the runs so far

``--data`` is CUB-200, the 2010 release: a folder of images for each species, and families.json {species: family}.
A run is one of examples/retrieval_benchmarks/train.py: its command is printed, ``--output`` gets its log. For each
seed, half of the species are drawn for training. Each image of the others is searched for among these. All methods
of a seed have the same split, initial weights, batches and crops. Runs are appended to images.jsonl.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import curves

TRAIN = Path(__file__).parents[2] / "examples" / "retrieval_benchmarks" / "train.py"
LOSSES = {"ProxyAnchor": "proxy_anchor", "MultiSimilarity": "multi_similarity"}
METHODS = {
    "none": ["--hier-weight", "0"],
    **{f"ratio {r}": ["--gradient-ratio", r, "--num-proxies", "64"] for r in ("0.1", "0.3")},
}
# One process that loads images draws the crops from random numbers of its own, whatever the losses draw.
COMMON = ["--dataset", "folder", "--random-split", "--backbone", "efficientnet_lite0", "--frozen-blocks", "11"]
COMMON += ["--image-size", "96", "--workers", "1", "--eval-first", "--eval-every", "3"]


def command(data: Path, output: Path, loss: str, method: str, seed: int, epochs: int) -> list[str]:
    """The command of a run, which goes on if there is a checkpoint."""
    paths = ["--data", data, "--taxonomy", data / "families.json", "--output", output]
    options = ["--base-loss", LOSSES[loss], *METHODS[method], "--seed", seed, "--epochs", epochs]
    resume = ["--resume"] if (output / "checkpoint.pt").exists() else []
    return [sys.executable, *map(str, [TRAIN, *COMMON, *paths, *options, *resume])]


def curve(log: Path) -> dict[str, Any]:
    """Scores by cosine at each epoch that was evaluated, and the share of embeddings beyond the clip radius."""
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if "cosine" in row]
    return {str(row["epoch"]): {"test": row["cosine"], "clipped": row["clipped"]} for row in rows}


def main() -> None:
    parser = curves.make_parser("images", __doc__, 30, "folder of the images")
    parser.add_argument("--output", type=Path, help="folder for logs and checkpoints")
    args = parser.parse_args()
    if args.data and not args.output:
        parser.error("--data needs --output PATH, a folder for logs and checkpoints")

    def run_one(loss: str, method: str, seed: int) -> dict[str, Any]:
        output = args.output / f"{loss}-{method.replace(' ', '-')}-{seed}-{args.length}"
        words = command(args.data, output, loss, method, seed, args.length)
        print(shlex.join(words), flush=True)
        subprocess.run(words, check=True)
        found = curve(output / "log.jsonl")
        (output / "checkpoint.pt").unlink()
        return found

    if args.data:
        curves.perform(args, "cub", LOSSES, METHODS, run_one)
    curves.write(args.folder, args.images)


if __name__ == "__main__":
    main()
