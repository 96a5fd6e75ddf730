"""Prints tables and writes JSON and plots: ``python -m benchmarks speed steps growth distances search``."""

import argparse
from pathlib import Path

import torch

from benchmarks import distances, speed, steps
from benchmarks.report import bars, show, write

NAMES = ("speed", "steps", "growth", "distances", "search")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="|".join(NAMES), default=NAMES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each size (default: 10)")
    parser.add_argument(
        "--output", type=Path, help="folder for JSON and plots (default: benchmarks/results, docs/images)"
    )
    args = parser.parse_args()
    unknown = set(args.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    device = torch.device(args.device)
    suffix = "" if device.type == "cpu" else f"-{device.type}"

    if "speed" in args.names:
        rows = speed.compare(args.device, args.repeats, batch=180, dim=128, proxies=512, triplets=50)
        show("A training step of HIER, forward and backward", rows)
        show("ProxyAnchor and HIER", speed.cost_of_options(args.device, 2 * args.repeats))
        show("Where the time of hierloss goes", speed.breakdown(args.device))
        if device.type == "cpu":
            show("How far the limit is", speed.limit(rows))
            show("Added to the import of PML", speed.import_time(args.repeats))
        write(f"speed{suffix}", device, rows, None, args.output)
    if "steps" in args.names:
        rows = steps.compare(args.device, args.repeats)
        show("Training steps of whole networks with ProxyAnchor, and what HIER adds", rows)
        drawn = [row for row in rows if steps.WITHOUT not in row["step"] and steps.HEAD not in row["step"]]
        write(f"steps{suffix}", device, rows, bars(drawn, "step", "added %"), args.output)
    if "growth" in args.names:
        rows = speed.growth(args.device, max(2, args.repeats // 3))
        show("A training step of HIER as sizes grow", rows)
        write(f"growth{suffix}", device, rows, speed.plot_growth(rows), args.output)
        show("With many proxies", speed.many_proxies(args.device))
    if "distances" in args.names:
        rows = [row for dtype in (torch.float32, torch.bfloat16, torch.float16) for row in distances.errors(dtype)]
        show("Largest relative error of distances and their gradients", rows)
        show("The worst cells of these", distances.worst(rows))
        show("Time of all pairs, forward and backward", distances.speed(args.device, args.repeats))
        write("distances", torch.device("cpu"), rows, distances.plot(rows), args.output)
    if "search" in args.names:
        from benchmarks import search  # needs FAISS, which the other benchmarks do not

        rows = search.compare(args.repeats)
        show("10 nearest of 100,000 references for 10,000 queries, 128 dimensions, on the CPU", rows)
        write("search", torch.device("cpu"), rows, None, args.output)


if __name__ == "__main__":
    main()
