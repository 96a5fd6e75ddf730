"""Prints tables and writes JSON and plots: ``python -m benchmarks speed growth distances search``."""

import argparse
from pathlib import Path

import torch

from benchmarks import distances, search, speed
from benchmarks.report import show, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="speed|growth|distances|search",
        default=["speed", "growth", "distances", "search"],
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each size (default: 10)")
    parser.add_argument(
        "--output", type=Path, help="folder for JSON and plots (default: benchmarks/results, docs/images)"
    )
    args = parser.parse_args()
    unknown = set(args.names) - {"speed", "growth", "distances", "search"}
    if unknown:
        names = "speed, growth, distances and search"
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {names}")
    device = torch.device(args.device)
    suffix = "" if device.type == "cpu" else f"-{device.type}"

    if "speed" in args.names:
        rows = speed.compare(args.device, args.repeats, batch=180, dim=128, proxies=512, triplets=50)
        show("A training step of HIER, forward and backward", rows)
        show("ProxyAnchor and HIER", speed.cost_of_ratio(args.device, 2 * args.repeats))
        show("Where the time of hierloss goes", speed.breakdown(args.device))
        if device.type == "cpu":
            show("How far the limit is", speed.limit(rows[-1]["median ms"]))
        else:
            from torchvision.models import resnet50

            images = torch.randn(180, 3, 224, 224, device=device)
            network = resnet50(num_classes=128).to(device)
            show("Added to a training step of ResNet-50", speed.added_to_a_network(network, images, args.repeats))
        write(f"speed{suffix}", device, rows, None, args.output)
    if "growth" in args.names:
        rows = speed.growth(args.device, max(2, args.repeats // 3))
        show("A training step of HIER as sizes grow", rows)
        show("With many proxies", speed.many_proxies(args.device))
        write(f"growth{suffix}", device, rows, speed.plot_growth(rows), args.output)
    if "distances" in args.names:
        rows = [row for dtype in (torch.float32, torch.bfloat16, torch.float16) for row in distances.errors(dtype)]
        show("Largest relative error of distances and their gradients", rows)
        show("The worst cells of these", distances.worst(rows))
        show("Time of all pairs, forward and backward", distances.speed(args.device, args.repeats))
        write("distances", torch.device("cpu"), rows, distances.plot(rows), args.output)
    if "search" in args.names:
        rows = search.compare(args.repeats)
        show("10 nearest of 100,000 references for 10,000 queries, 128 dimensions, on the CPU", rows)
        write("search", torch.device("cpu"), rows, None, args.output)


if __name__ == "__main__":
    main()
