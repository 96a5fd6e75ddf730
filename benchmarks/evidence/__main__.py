"""Does HIER help, where, and with which settings? Studies of many training runs, and the tables made of them.

    python -m benchmarks.evidence base --data PATH          # learning rates of base losses
    python -m benchmarks.evidence sweep --data PATH         # settings of the faithful method
    python -m benchmarks.evidence candidates --data PATH    # changes to the method
    python -m benchmarks.evidence combinations --data PATH  # the best change, with others, one seed
    python -m benchmarks.evidence finalists --data PATH     # the best of these
    python -m benchmarks.evidence test --data PATH          # what was chosen, on test classes, 10 seeds
    python -m benchmarks.evidence report                    # tables and plots of all of them, from the files

Only ``test`` touches test classes; the others choose among validation classes, split from the training classes.
A study that was stopped goes on where it was. The runs are in benchmarks/results/evidence, one line each.

Data: scikit-learn's digits and a synthetic tree need no file. The folder ``--data`` has trec_questions.npz, the
questions of TREC (50 classes in 6 superclasses; Li and Roth 2002, in NLTK's corpus "qc") as embedded by
all-MiniLM-L6-v2, with arrays ``embeddings`` and ``label`` ("COARSE:fine"); and omniglot_small1.zip, which is
python/images_background_small1.zip of github.com/brendenlake/omniglot (136 characters of 5 alphabets).
"""

import argparse
from pathlib import Path

from rich.console import Console

from . import tables
from .data import DATASETS
from .settings import FAITHFUL
from .studies import FOLDER, SEEDS, perform, read

IMAGES = Path(__file__).parents[2] / "docs" / "images" / "evidence"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("study", choices=[*SEEDS, "report"])
    parser.add_argument("--data", type=Path, help="folder with trec_questions.npz and omniglot_small1.zip")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--seeds", type=int, help="how many (default: 3, in combinations 1, in test 10)")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default: 2)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the runs are kept")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where report puts the plots")
    args = parser.parse_args()
    if args.study == "report":
        report(args.folder, args.images)
        return
    if args.data is None and {"trec", "omniglot"} & set(args.datasets):
        parser.error("trec and omniglot need --data PATH; without it, say --datasets digits synthetic")
    perform(args.study, args.datasets, args.data, args.workers, args.seeds, args.folder)


def report(folder: Path, images: Path) -> None:
    """Print every table and write every plot."""
    images.mkdir(parents=True, exist_ok=True)
    studies = {study: read(study, folder) for study in SEEDS}
    for study, rows in studies.items():
        print(
            f"\n## {study}: {len(rows)} runs, {sum(row['seconds'] for row in rows) / 60:.0f} minutes of one core\n"
        )
        for title, table in tables.of_study(study, rows):
            print(f"**{title}**\n\n{table}")
    for name, figure in tables.figures(studies, FAITHFUL):
        figure.savefig(images / f"{name}.png", dpi=110)
        Console(stderr=True).print(f"wrote {images / name}.png", highlight=False)


if __name__ == "__main__":
    main()
