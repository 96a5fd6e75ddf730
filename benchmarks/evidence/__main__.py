"""Does HIER help beside five base losses on frozen features, at which ratio, and at which length of training?

    python -m benchmarks.evidence length --data PATH     # the base losses alone, up to 3,200 steps
    python -m benchmarks.evidence validate --data PATH   # methods, on validation classes
    python -m benchmarks.evidence test --data PATH       # methods, on test classes, 10 seeds
    python -m benchmarks.evidence report                 # the table, the picture and the CSV of all runs so far

Classes are split at random for each seed: a third for training, a sixth for validation, half for testing. Only
``test`` scores test classes, with seeds of its own. ``length`` finds the number of steps at which each
base loss alone has the best MAP@R among validation classes; the others train four times as long and score on the
way. A study that was stopped goes on where it was. Runs are in benchmarks/results/evidence, one line each.

The folder ``--data`` has frozen ImageNet features of EfficientNet-Lite0: cub200_2010_features.npz (CUB-200, 2010
release: ``features``, ``label``, ``family``), fashion_features.npz (Fashion Product Images, small: ``features``,
``label``, ``sub``, ``master``) and grocery_features.npz (Grocery Store: ``features``, ``label``, ``coarse``,
``department``).
"""

import argparse
from pathlib import Path

from . import report, study
from .data import TABLES
from .training import LOSSES, METHODS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=[*study.SEEDS, "report"])
    parser.add_argument("--data", type=Path, help="folder with the tables of features")
    parser.add_argument("--datasets", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, help="how many (default: 3; test: 10)")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default: 2)")
    parser.add_argument("--folder", type=Path, default=study.FOLDER, help="where the runs are kept")
    parser.add_argument("--images", type=Path, default=report.IMAGES, help="where report puts the picture")
    args = parser.parse_args()
    if args.what == "report":
        report.write(args.folder, args.images)
        return
    if args.data is None:
        parser.error(f"{args.what} needs --data PATH, the folder with the tables of features")
    todo = study.runs(args.what, args.datasets, args.losses, args.methods, args.seeds, args.folder)
    study.perform(args.what, todo, args.data, args.workers, args.folder)


if __name__ == "__main__":
    main()
