"""Does HIER help when a whole image encoder is trained? EfficientNet-Lite0 on photographs of 200 species of birds.

    python -m benchmarks.evidence.images --data PATH --output PATH    # the runs that are missing, then the report
    python -m benchmarks.evidence.images                              # the report of the runs so far

``--data`` is CUB-200, the 2010 release: a folder of images for each species, and families.json {species: family}.
Each run is one of examples/retrieval_benchmarks/train.py, whose command is printed; ``--output`` has the log and
checkpoint of the one that is not finished. For each seed, half of the species are drawn for training; each image of
the others is searched for among these. All methods of a seed have the same split, initial weights, batches and
crops. Finished runs are appended to images.jsonl.
"""

import argparse
import itertools
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import curves, study
from .training import SCORES

__all__ = ["LOSSES", "METHODS", "command", "curve"]

TRAIN = Path(__file__).parents[2] / "examples" / "retrieval_benchmarks" / "train.py"
LOSSES = {"ProxyAnchor": "proxy_anchor", "MultiSimilarity": "multi_similarity"}
METHODS = {
    "none": ["--hier-weight", "0"],
    "ratio 0.3": ["--gradient-ratio", "0.3", "--num-proxies", "64", "--triplets-per-anchor", "10"],
}
# One process that loads images draws the crops from random numbers of its own, whatever the losses draw.
COMMON = ["--dataset", "folder", "--random-split", "--backbone", "efficientnet_lite0", "--frozen-blocks", "11"]
COMMON += ["--image-size", "96", "--workers", "1", "--eval-first", "--eval-every", "2"]


def command(data: Path, output: Path, loss: str, method: str, seed: int, epochs: int) -> list[str]:
    """The command of a run, which goes on if there is a checkpoint."""
    paths = ["--data", data, "--taxonomy", data / "families.json", "--output", output]
    options = ["--base-loss", LOSSES[loss], *METHODS[method], "--seed", seed, "--epochs", epochs]
    resume = ["--resume"] if (output / "checkpoint.pt").exists() else []
    return [sys.executable, *map(str, [TRAIN, *COMMON, *paths, *options, *resume])]


def curve(log: Path) -> dict[str, Any]:
    """Scores by cosine at each epoch that was evaluated, and the share of embeddings beyond the clip radius."""
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if "cosine" in row]
    return {
        str(row["epoch"]): {
            "test": {score: round(row["cosine"][score], 4) for score in SCORES},
            "clipped": round(row["clipped"], 4),
        }
        for row in rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.images",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder of the images; without it, only the report")
    parser.add_argument("--output", type=Path, help="folder for what is not finished")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--epochs", type=int, default=6, help="of training (default: 6)")
    parser.add_argument("--folder", type=Path, default=study.FOLDER, help="where the runs are kept")
    parser.add_argument("--images", type=Path, default=curves.IMAGES, help="where the picture goes")
    args = parser.parse_args()
    if args.data and not args.output:
        parser.error("--data needs --output PATH, a folder for what is not finished")
    keys = ("loss", "method", "seed", "epochs")
    done = {tuple(row[key] for key in keys) for row in study.read("images", args.folder)}
    # Seed by seed, so that an unfinished study is balanced.
    for seed, loss, method in itertools.product(range(args.seeds if args.data else 0), LOSSES, METHODS):
        if (loss, method, seed, args.epochs) in done:
            continue
        output = args.output / f"{loss}-{method.replace(' ', '-')}-{seed}-{args.epochs}"
        words = command(args.data, output, loss, method, seed, args.epochs)
        print(shlex.join(words), flush=True)
        subprocess.run(words, check=True)
        row = {"dataset": "cub", "loss": loss, "method": method, "seed": seed, "epochs": args.epochs}
        args.folder.mkdir(parents=True, exist_ok=True)
        with (args.folder / "images.jsonl").open("a") as file:
            file.write(json.dumps({**row, "curve": curve(output / "log.jsonl")}) + "\n")
        shutil.rmtree(output)
    curves.write(args.folder, args.images)


if __name__ == "__main__":
    main()
