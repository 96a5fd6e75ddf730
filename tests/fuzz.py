"""Fuzzing: random calls of everything that takes tensors. Finite in, finite out; not finite in, not finite out.

    make fuzz                                              a million cases, on one core
    python tests/fuzz.py --seed 7 --cases 1000
    python tests/fuzz.py --seed 7 --first 123 --cases 1    one case of that run again, with all that was drawn

A case is one call of one function or module, and its backward pass, with everything drawn: sizes, dtype, values,
memory layout, curvature, settings. A case fails if it raises, if values or gradients are not finite although the
input is, if the result is finite although the input is not, or if what cannot be negative is.

Half precision may overflow where the same call in float32 gives a number that half precision does not have, and
nowhere else.
"""

import argparse
import math
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import geoopt
import torch
from pytorch_metric_learning import reducers
from torch import Tensor
from tqdm import tqdm

from hierloss import (
    FromPoincare,
    HIERLoss,
    PoincareDistance,
    PoincareKNN,
    ReciprocalNeighborMiner,
    ToPoincare,
    functional,
    poincare,
)

SHARE_NOT_FINITE = 0.05
MAX_FAILURES = 20
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def can_be_compared(dtype: torch.dtype) -> bool:
    """Whether this torch does what labels are for; older ones cannot with larger unsigned integers."""
    try:
        torch.zeros(1).to(dtype)[torch.zeros(1, dtype=torch.long)].eq(0)
    except (RuntimeError, NotImplementedError):
        return False
    return True


INTEGERS = [
    dtype
    for name in ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]
    if can_be_compared(dtype := getattr(torch, name))
]


@dataclass
class Case:
    """One call: ``call`` of ``inputs``, with the parameters of ``module`` as further inputs."""

    call: Callable[..., Tensor | None]
    inputs: list[Tensor]
    module: torch.nn.Module | None = None
    by_row: bool = False
    """Whether a row of the result depends on that row of the first input alone."""
    not_negative: bool = False
    not_finite_is_seen: bool = True
    """Whether the result has a place for NaN; triplets have not."""


class Draw(random.Random):
    """What a case is drawn from; notes what it drew."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)  # that of Python 3.10 takes one argument at most

    def __init__(self, seed: int, number: int, notes: dict[str, Any]) -> None:
        super().__init__(seed * 2**40 + number)
        self.generator = torch.default_generator
        self.torch_seed = self.getrandbits(62)
        self.generator.manual_seed(self.torch_seed)
        # The work that a case may be: little, so that there can be many; now and then whatever is drawn.
        kind = self.random()
        self.budget = math.inf if kind < 0.0002 else 10 ** (self.uniform(5, 8) if kind < 0.01 else 4.3)
        self.notes = notes

    def note(self, **drawn: Any) -> Any:
        self.notes |= drawn
        return next(iter(drawn.values()))

    def maybe(self, probability: float) -> bool:
        return self.random() < probability

    def power_of_ten(self, low: float, high: float) -> float:
        return 10 ** self.uniform(low, high)

    def count(self, low: int, high: int) -> int:
        """A whole number, log-uniform."""
        return min(high, int(low * ((high + 1) / low) ** self.random()))

    def sizes(self, work: Callable[..., float], **largest: int) -> list[int]:
        """Log-uniform numbers from 1 to the largest, of all whose work is within the budget."""
        for _ in range(50):
            sizes = {name: self.count(1, high) for name, high in largest.items()}
            if work(*sizes.values()) <= self.budget:
                break
        else:
            sizes = dict.fromkeys(largest, 1)
        self.note(**sizes)
        return list(sizes.values())

    def dtype(self) -> torch.dtype:
        return self.note(dtype=self.choices(FLOATS, (2, 1, 4, 3))[0])

    def c(self) -> float:
        return self.note(c=self.power_of_ten(-6, 3) if self.maybe(0.8) else self.choice((1e-6, 0.1, 1.0, 1e3)))

    def c_or_tensor(self) -> tuple[float | Tensor, float]:
        """A number, or the tensor of a learned curvature; and the radius of the ball."""
        c = self.c()
        if self.maybe(0.75):
            return c, c**-0.5
        dtype = self.note(c_is=self.choice((torch.float32, torch.float64)))
        return torch.tensor(c, dtype=dtype, requires_grad=self.maybe(0.8)), c**-0.5

    def c_or_ball(self) -> tuple[float | geoopt.PoincareBall, float]:
        """A number, or a ball of geoopt; and the radius of the ball."""
        c = self.c()
        if self.maybe(0.8):
            return c, c**-0.5
        c = min(c, 80.0)  # geoopt's softplus overflows soon after
        return geoopt.PoincareBall(c=c, learnable=self.note(learnable=self.maybe(0.7))), c**-0.5

    def distance(self, on_ball: float, **options: Any) -> tuple[PoincareDistance, float]:
        """A distance, with that probability for points on the ball; and a norm that embeddings should be near."""
        ball, radius = self.c_or_ball()
        normalize = not self.note(on_ball=self.maybe(on_ball))
        distance = PoincareDistance(ball, self.clip_radius(), normalize_embeddings=normalize, **options)
        return distance, (distance.clip_radius or 1.0) if normalize else radius

    def clip_radius(self) -> float | None:
        kind = self.random()
        value = None if kind < 0.2 else 2.3 if kind < 0.5 else self.power_of_ten(-30 if kind < 0.7 else -3, 3)
        return self.note(clip_radius=value)

    # --- tensors --------------------------------------------------------------------------------------------

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def uniform_tensor(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=self.generator) * (high - low) + low

    def points(self, n: int, dim: int, dtype: torch.dtype, radius: float, *, name: str = "values") -> Tensor:
        """A leaf of shape (n, dim), near and far from a sphere of that radius."""
        x = self.normal(n, dim)
        unit = x / x.norm(dim=1, keepdim=True).clamp_min(1e-9)

        def uniform(low: float, high: float) -> Tensor:
            return self.uniform_tensor(low, high, n, 1)

        def some_of(rows: Tensor, most: int) -> Tensor:
            return rows[torch.randint(most, (n,), generator=self.generator)]

        def boundary() -> Tensor:
            off = 10 ** uniform(-17, -1) * torch.sign(uniform(-1, 1))
            return unit * (radius * (1 + off * (uniform(0, 1) > 0.3)))

        kinds: dict[str, tuple[float, Callable[[], Tensor]]] = {
            "normal": (6, lambda: x * (self.power_of_ten(-2, 2) / math.sqrt(dim))),
            "one scale": (3, lambda: unit * self.power_of_ten(-30, 30)),
            "scale of each row": (3, lambda: unit * 10 ** uniform(-30, 30)),
            "zeros": (0.5, lambda: x * 0),
            "one point": (1, lambda: unit[:1].expand(n, dim) * (radius * self.power_of_ten(-3, 1))),
            "duplicates": (2, lambda: some_of(unit, max(1, n // 2)) * radius * self.random()),
            "some zeros": (1, lambda: unit * (radius * uniform(0, 1) * (uniform(0, 1) > 0.5))),
            "near pairs": (2, lambda: (unit[:1] * self.random() + unit * 10 ** uniform(-20, -1)) * radius),
            "boundary": (3, boundary),
            "inside": (3, lambda: unit * (radius * uniform(0, 1))),
            "outside": (2, lambda: unit * (radius * 10 ** uniform(0, 30))),
            "axes": (1, lambda: some_of(torch.eye(dim), dim).double() * radius * self.choice((1, 0.5, -1, 2))),
        }
        kind = self.note(**{name: self.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]})
        return self.leaf(kinds[kind][1](), dtype)

    def leaf(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The values as a leaf of that dtype, in some memory layout, with or without gradient."""
        largest = torch.finfo(dtype).max
        x = self.layout(x.clamp(-largest, largest).to(dtype))
        return x.requires_grad_(self.note(requires_grad=self.maybe(0.85)))

    def layout(self, x: Tensor) -> Tensor:
        """The same values (of an expanded tensor those of the first row) in another memory layout."""
        kind = self.random()
        if kind < 0.6 or x.ndim == 0 or x.numel() == 0:
            return x.contiguous()
        self.note(layout=(name := self.choice(("transposed", "strided", "slice", "expanded"))))
        if name == "transposed":
            return x.T.contiguous().T if x.ndim == 2 else x.contiguous()
        if name == "strided":
            return x.repeat_interleave(2, 0)[::2]
        if name == "slice":
            return torch.cat([x, x], -1)[..., : x.shape[-1]]
        return x[:1].expand(x.shape)

    def labels(self, n: int) -> Tensor | None:
        if self.maybe(0.25):
            return None
        dtype = self.note(labels=self.choice(INTEGERS))
        classes = torch.randint(self.count(1, max(1, n)), (n,), generator=self.generator)
        if dtype == torch.bool:
            return self.layout(classes > 0)
        info = torch.iinfo(dtype)
        first = self.choice((0, info.min, info.max))
        values = [first - k if first == info.max else first + k for k in range(min(n, info.max - info.min))]
        table = torch.tensor(values, dtype=torch.uint64 if dtype == torch.uint64 else torch.int64).to(dtype)
        return self.layout(table[classes % len(values)])

    def reshaped(self, x: Tensor) -> Tensor:
        """Rows as they are, or as one vector, or with more leading dimensions."""
        kind = self.random()
        if kind < 0.8 or len(x) == 0:
            return x
        shape = (x.shape[1],) if kind < 0.9 and len(x) == 1 else (1, len(x), 1, x.shape[1])
        return x.detach().reshape(self.note(shape=shape)).requires_grad_(x.requires_grad)

    def rows(self) -> tuple[int, int]:
        n, dim = self.sizes(lambda n, d: 4 * n * d, B=1000, D=2048)
        return (0, dim) if self.maybe(0.005) else (n, dim)


# --- what is called -----------------------------------------------------------------------------------------


def of_ball(function: Callable[..., Tensor], c: float | Tensor, *inputs: Tensor, **judged: bool) -> Case:
    """A case of a function whose last argument is ``c``: an input, if it is a tensor."""
    if isinstance(c, Tensor):
        return Case(function, [*inputs, c], **judged)
    return Case(lambda *tensors: function(*tensors, c), [*inputs], **judged)


def map_of_points(function: Callable[..., Tensor]) -> Callable[[Draw], Case]:
    def target(draw: Draw) -> Case:
        n, dim = draw.rows()
        dtype, (c, radius) = draw.dtype(), draw.c_or_tensor()
        return of_ball(function, c, draw.reshaped(draw.points(n, dim, dtype, radius)), by_row=True)

    return target


def clip_norm(draw: Draw) -> Case:
    (n, dim), radius = draw.rows(), draw.clip_radius()
    x = draw.reshaped(draw.points(n, dim, draw.dtype(), radius or 1.0))
    return Case(partial(poincare.clip_norm, radius=radius), [x], by_row=True)


def from_hyperboloid(draw: Draw) -> Case:
    (n, dim), (c, radius) = draw.rows(), draw.c_or_tensor()
    space = draw.points(n, dim, torch.float64, radius).detach()
    time = (radius**2 + space.square().sum(-1, keepdim=True)).sqrt()
    x = draw.leaf(torch.cat([space, time], -1), draw.dtype())
    return of_ball(poincare.from_hyperboloid, c, x, by_row=True)


def lift_references(draw: Draw) -> Case:
    (n, dim), (c, radius) = draw.rows(), draw.c_or_tensor()
    x = draw.points(n, dim, draw.dtype(), radius)
    farthest = draw.note(max_distance=draw.choice((None, draw.power_of_ten(-3, 4))))
    return of_ball(partial(poincare.lift_references, max_distance=farthest), c, x)


def distance(draw: Draw) -> Case:
    (n, dim), (c, radius), dtype = draw.rows(), draw.c_or_tensor(), draw.dtype()
    x = draw.reshaped(draw.points(n, dim, dtype, radius))
    other = draw.note(other=draw.choice(("points", "same", "near", "one")))
    if other == "same":
        y = x.detach().clone().requires_grad_(x.requires_grad)
    elif other == "near":
        y = draw.leaf(x.detach().double() * (1 + draw.power_of_ten(-17, -1)), dtype)
    else:
        y = draw.points(1 if other == "one" else x.shape[0] if x.ndim == 2 else 1, dim, dtype, radius)
    return of_ball(poincare.distance, c, x, y, not_negative=True)


def pairs(draw: Draw) -> tuple[int, int, int]:
    n, m, dim = draw.sizes(lambda n, m, d: n * m * 8 + (n + m) * d * 8 + n * m * d / 4, B=1000, M=5000, D=2048)
    return n, m, dim


def pairwise_distance(draw: Draw) -> Case:
    (n, m, dim), (c, radius), dtype = pairs(draw), draw.c_or_tensor(), draw.dtype()
    x = draw.points(n, dim, dtype, radius)
    if draw.maybe(0.3):
        y = x.detach()[:m].clone().requires_grad_()
    else:
        y = draw.points(m, dim, draw.dtype() if draw.maybe(0.1) else dtype, radius, name="values of y")
    if draw.maybe(0.1):
        x = x.detach().expand(2, n, dim).requires_grad_(x.requires_grad)
    result = draw.note(result=draw.choice((None, None, torch.float32, torch.float64)))
    return of_ball(partial(poincare.pairwise_distance, dtype=result), c, x, y, not_negative=True)


def distances_between(draw: Draw, n: int, m: int, dtype: torch.dtype) -> Tensor:
    kinds: dict[str, Callable[[], Tensor]] = {
        "uniform": lambda: draw.uniform_tensor(0, 9.2, n, m),
        "scale": lambda: 10 ** draw.uniform_tensor(-30, 30, n, m),
        "ties": lambda: draw.uniform_tensor(0, 5, n, m).round(),
        "zeros": lambda: torch.zeros(n, m, dtype=torch.float64),
        "hyperbolic": lambda: PoincareDistance()(x := draw.normal(n, 3), x if n == m else draw.normal(m, 3)),
        "one scale": lambda: draw.uniform_tensor(0, 1, n, m) * draw.power_of_ten(-30, 30),
    }
    return draw.leaf(kinds[draw.note(values=draw.choice(list(kinds)))](), dtype)


def reciprocal_triplets(draw: Draw) -> Case:
    n, t = draw.sizes(lambda n, t: 10 * n * n + 10 * n * t, B=1000, t=50)
    d, labels = distances_between(draw, n, n, draw.dtype()), draw.labels(n)
    k, even = draw.note(k=draw.count(2, 2 * n + 2)), draw.note(even=draw.maybe(0.3))

    def call(d: Tensor) -> None:
        mined = functional.reciprocal_triplets(d, labels, num_neighbors=k, triplets_per_anchor=t, random=not even)
        check_triplets(mined[:3], n)

    return Case(call, [d], not_finite_is_seen=False)


def check_triplets(triplets: Sequence[Tensor], n: int) -> None:
    for index in triplets:
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < n:
            raise AssertionError(f"index {int(index.min())} to {int(index.max())} of {n} points")


def hierarchical_triplet_loss(draw: Draw) -> Case:
    n, p, t = draw.sizes(lambda n, p, t: 3 * n * p + 20 * t * p, B=1000, P=5000, T=50_000)
    t = 0 if draw.maybe(0.01) else t
    dtype = draw.dtype()
    d = distances_between(draw, n, p, dtype)
    index = draw.choice((torch.int64, torch.int64, torch.int32))
    triplets = draw.layout(torch.randint(n, (3, t), generator=draw.generator).to(index))
    triplets = tuple(triplets) if draw.maybe(0.5) else triplets
    kind = draw.note(noise=draw.choice((None, None, "gumbel", "zero", "large")))
    working = torch.promote_types(dtype, torch.float32)
    inputs = [d]
    if kind == "zero":
        inputs.append(torch.zeros((), dtype=working).expand(2, t, p))
    elif kind is not None:
        noise = -(-draw.uniform_tensor(1e-9, 1, 2, t, p).log()).clamp_min(1e-9).log()
        inputs.append((noise * (1e6 if kind == "large" else 1)).to(working))
    margin = draw.note(margin=draw.choice((0.0, 0.1, draw.power_of_ten(-3, 3))))
    temperature = draw.note(temperature=draw.choice((0.1, draw.power_of_ten(-3, 3))))

    def call(d: Tensor, noise: Tensor | None = None) -> Tensor:
        options = {"margin": margin, "temperature": temperature, "noise": noise}
        losses, ancestors = functional.hierarchical_triplet_loss(d, triplets, **options)
        check_triplets(ancestors, p)
        return losses

    return Case(call, inputs, not_negative=True)


def poincare_distance(draw: Draw) -> Case:
    (n, m, dim), dtype = pairs(draw), draw.dtype()
    kind = draw.note(kind=draw.choice(("all pairs", "with ref_emb", "pairwise", "normalize")))
    module, radius = draw.distance(0.4, power=draw.choice((1, 1, 1, 2)), collect_stats=draw.maybe(0.2))
    x = draw.points(n, dim, dtype, radius)
    if kind == "all pairs":
        return Case(module, [x], module, not_negative=True)
    if kind == "normalize":
        return Case(module.normalize, [x], module, by_row=True)
    y = draw.points(n if kind == "pairwise" else m, dim, dtype, radius, name="values of y")

    def pairwise(*tensors: Tensor) -> Tensor:
        return module.pairwise_distance(*map(module.maybe_normalize, tensors))

    return Case(pairwise if kind == "pairwise" else module, [x, y], module, not_negative=True)


def to_poincare(draw: Draw) -> Case:
    n, dim = draw.rows()
    ball, _ = draw.c_or_ball()
    module = ToPoincare(ball, draw.clip_radius(), riemannian_gradient=draw.note(riemannian=draw.maybe(0.3)))
    x = draw.reshaped(draw.points(n, dim, draw.dtype(), module.clip_radius or 1.0))
    return Case(module, [x], module, by_row=True)


def from_poincare(draw: Draw) -> Case:
    n, dim = draw.rows()
    ball, radius = draw.c_or_ball()
    module = FromPoincare(ball)
    x = draw.reshaped(draw.points(n, dim, draw.dtype(), radius))
    return Case(module, [x], module, by_row=True)


def miner_of(draw: Draw, n: int, t: int, distance: PoincareDistance) -> ReciprocalNeighborMiner:
    return ReciprocalNeighborMiner(draw.note(k=draw.count(2, max(20, 2 * n))), t, distance=distance)


def reciprocal_neighbor_miner(draw: Draw) -> Case:
    n, dim, t = draw.sizes(lambda n, d, t: n * n * (10 + d / 4) + n * (8 * d + 10 * t), B=1000, D=2048, t=50)
    distance, radius = draw.distance(0.3)
    module = miner_of(draw, n, t, distance)
    x, labels = draw.points(n, dim, draw.dtype(), radius), draw.labels(n)
    labels = torch.zeros(n, dtype=torch.long) if labels is None else labels

    def call(x: Tensor) -> None:
        check_triplets(module(x, labels), n)

    return Case(call, [x], module, not_finite_is_seen=False)


def hier_loss(draw: Draw) -> Case:
    def work(n: int, p: int, d: int, t: int) -> float:
        q = n + p
        return n * n * 10 + q * p * (10 + d / 4) + q * d * 8 + 20 * q * t * p

    n, p, dim, t = draw.sizes(work, B=1000, P=5000, D=2048, t=50)
    dtype, (distance, radius) = draw.dtype(), draw.distance(0.2)
    module = HIERLoss(
        num_proxies=p,
        embedding_size=draw.choice((None, dim)),
        margin=draw.note(margin=draw.choice((0.1, 0.1, 0.0, draw.power_of_ten(-3, 2)))),
        temperature=draw.note(temperature=draw.choice((0.1, 0.1, draw.power_of_ten(-3, 2)))),
        miner=miner_of(draw, n, t, distance),
        proxy_batch_size=draw.note(proxy_batch_size=draw.count(2, max(2, p)) if draw.maybe(0.2) else None),
        distance=distance,
        reducer=draw.note(reducer=draw.choice((None, None, reducers.SumReducer(), reducers.AvgNonZeroReducer()))),
        collect_stats=draw.maybe(0.1),
    )
    x, labels = draw.points(n, dim, dtype, radius), draw.labels(n)
    if draw.maybe(0.1) and module.embedding_size is not None:
        # Not a learnable curvature: its gradient is a sum of large terms that cancel, which float16 cannot hold.
        kind = draw.note(proxies=draw.choice((torch.float16, torch.bfloat16, torch.float64)))
        module.proxies.data = module.proxies.data.to(kind)
    module.train(draw.note(training=draw.maybe(0.75)))
    autocast = draw.note(autocast=draw.maybe(0.05))

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return module(x, labels)

    return Case(call, [x], module, not_negative=True)


def poincare_knn(draw: Draw) -> Case:
    n, m, dim = pairs(draw)
    dtype, (distance, radius) = draw.dtype(), draw.distance(0.4)
    knn = PoincareKNN(distance)
    x = draw.points(n, dim, dtype, radius)
    together = draw.note(ref_includes_query=draw.maybe(0.3))
    y = x if together else draw.points(m, dim, dtype, radius, name="values of y")
    k = draw.note(k=draw.randint(0, n - 1) if together else draw.count(1, m))

    def call(x: Tensor, y: Tensor) -> Tensor | None:
        try:
            distances, indices = knn(x, k, x if together else y, together)
        except ValueError as error:  # it refuses what is not finite
            if "must be finite, got NaN or infinity in row" in str(error) and "spoiled" in draw.notes:
                return None
            raise
        check_triplets([indices], len(y))
        return distances

    return Case(call, [x, y], distance, not_negative=True, not_finite_is_seen=False)


TARGETS: dict[str, tuple[float, Callable[[Draw], Case]]] = {
    **{
        f"poincare.{name}": (1.5, map_of_points(getattr(poincare, name)))
        for name in ("exp_map0", "lift_queries", "log_map0", "project", "riemannian_gradient", "to_hyperboloid")
    },
    "poincare.clip_norm": (1.5, clip_norm),
    "poincare.distance": (2, distance),
    "poincare.from_hyperboloid": (1.5, from_hyperboloid),
    "poincare.lift_references": (1, lift_references),
    "poincare.pairwise_distance": (3, pairwise_distance),
    "functional.hierarchical_triplet_loss": (3, hierarchical_triplet_loss),
    "functional.reciprocal_triplets": (2, reciprocal_triplets),
    "FromPoincare": (1, from_poincare),
    "HIERLoss": (3, hier_loss),
    "PoincareDistance": (3, poincare_distance),
    "PoincareKNN": (1, poincare_knn),
    "ReciprocalNeighborMiner": (1.5, reciprocal_neighbor_miner),
    "ToPoincare": (1, to_poincare),
}


# --- running and judging ------------------------------------------------------------------------------------


class Failure(Exception):
    """What was wrong with a case."""


@dataclass
class Report:
    """What came of a run."""

    failures: list[str] = field(default_factory=list)
    cases: Counter[str] = field(default_factory=Counter)
    """Of every function or module."""
    seconds: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    drawn: dict[str, Any] = field(default_factory=dict)
    """In the last case."""

    def __str__(self) -> str:
        lines = [f"{'':38}{'cases':>10}{'CPU ms each':>14}"]
        for name in sorted(self.cases):
            lines.append(f"{name:38}{self.cases[name]:10,}{1000 * self.seconds[name] / self.cases[name]:14.2f}")
        for kind in sorted(self.kinds):
            lines.append(f"{kind:38}{self.kinds[kind]:10,}")
        return "\n".join([*lines, f"{'failures':38}{len(self.failures):10,}"])


def run_case(seed: int, number: int, notes: dict[str, Any]) -> None:
    """Draw a case, run it, and raise if it went wrong; ``notes`` receives what was drawn, and what came of it."""
    draw = Draw(seed, number, notes)
    name = draw.note(name=draw.choices(list(TARGETS), [weight for weight, _ in TARGETS.values()])[0])
    not_finite = draw.maybe(SHARE_NOT_FINITE)
    case = TARGETS[name][1](draw)
    if not_finite and all(x.numel() for x in case.inputs):
        spoiled = spoil(draw, case)
        found = run(case, draw.torch_seed, gradients=False)
        if case.not_finite_is_seen:
            check_not_finite(case, spoiled, found["result"])
        return
    found = run(case, draw.torch_seed)
    if case.not_negative and (found["result"] < 0).any():
        raise Failure(f"a negative result, {float(found['result'].min())}")
    wrong = {key: value for key, value in found.items() if not value.isfinite().all()}
    if wrong and all(value.dtype in FLOATS[:2] for value in wrong.values()):
        in_float32(case)
        exact = run(case, draw.torch_seed)
        for key, value in list(wrong.items()):
            largest = torch.finfo(value.dtype).max
            if exact[key].isfinite().all() and (exact[key][~value.isfinite()].abs() > 0.99 * largest).all():
                del wrong[key]
                draw.note(overflowed=True)
    for key, value in wrong.items():
        raise Failure(f"{key}, {value.dtype}, is not finite: {value[~value.isfinite()][:3].tolist()}, ...")


def run(case: Case, torch_seed: int, gradients: bool = True) -> dict[str, Tensor]:
    """The result, if there is one, and the gradients of a weighted sum of it."""
    torch.default_generator.manual_seed(torch_seed)
    result = case.call(*case.inputs)
    leaves = {f"gradient of input {i}": x for i, x in enumerate(case.inputs) if x.requires_grad}
    if case.module is not None:
        leaves |= {f"gradient of {name}": p for name, p in case.module.named_parameters() if p.requires_grad}
    found = {} if result is None else {"result": result.detach()}
    if gradients and leaves and result is not None and result.requires_grad:
        weights = torch.linspace(-1, 1.5, result.numel()).view_as(result) if result.ndim else 1
        grads = torch.autograd.grad((result * weights).sum(), list(leaves.values()), allow_unused=True)
        found |= {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return found


def in_float32(case: Case) -> None:
    """Turn what is half precision into float32, values unchanged."""
    for i, x in enumerate(case.inputs):
        if x.dtype in FLOATS[:2]:
            case.inputs[i] = x.detach().float().requires_grad_(x.requires_grad)
    if case.module is not None and any(p.dtype in FLOATS[:2] for p in case.module.parameters()):
        case.module.float()


def spoil(draw: Draw, case: Case) -> int | None:
    """Put something that is not finite into an input, which becomes contiguous, or a parameter.

    Returns the number of the input, ``None`` for a parameter.
    """
    value = draw.note(not_finite=draw.choice((math.nan, math.inf, -math.inf)))
    parameters = [] if case.module is None else list(case.module.parameters())
    if parameters and draw.maybe(0.3):
        parameter = draw.choice(parameters)
        if not isinstance(parameter, torch.nn.UninitializedParameter):
            draw.note(spoiled="parameter")
            if parameter.ndim == 0 and value == -math.inf:
                value = math.nan  # of geoopt's curvature, this means a flat space, which some functions have
            with torch.no_grad():
                parameter.view(-1)[draw.randrange(parameter.numel())] = value
            return None
    where = draw.note(spoiled=draw.randrange(len(case.inputs)))
    if where == 1 and draw.notes["name"] == "functional.hierarchical_triplet_loss" and value == -math.inf:
        value = math.nan  # such noise keeps a proxy from being drawn, which is a result
    if where == 1 and draw.notes["name"] == "poincare.riemannian_gradient":
        where = 0  # of c, the gradient alone depends
    x = case.inputs[where].detach().clone(memory_format=torch.contiguous_format)
    x.view(-1)[draw.randrange(x.numel())] = value
    case.inputs[where] = x.requires_grad_(case.inputs[where].requires_grad)
    return where


def check_not_finite(case: Case, spoiled: int | None, result: Tensor) -> None:
    if result.numel() and result.isfinite().all():
        raise Failure("a finite result of input that is not finite")
    if case.by_row and spoiled == 0:
        bad = [~t.isfinite().all(-1) for t in (case.inputs[0], result)]
        if not torch.equal(*bad):
            raise Failure("a row that is not finite spoils another")


def fuzz(numbers: Iterable[int], seed: int) -> Report:
    """Run the cases of these numbers; stop at ``MAX_FAILURES``."""
    report = Report()
    for number in numbers:
        notes = report.drawn = {}
        start = time.process_time()
        try:
            run_case(seed, number, notes)
        except Exception as error:
            report.failures.append(describe(seed, number, notes, error))
            tqdm.write(report.failures[-1])
        name = str(notes["name"])
        report.cases[name] += 1
        report.seconds[name] += time.process_time() - start
        report.kinds["with input that is not finite"] += "spoiled" in notes
        report.kinds["overflowed half precision"] += "overflowed" in notes
        if len(report.failures) == MAX_FAILURES:
            break
    return report


def describe(seed: int, number: int, notes: dict[str, Any], error: Exception) -> str:
    what = str(error) if isinstance(error, Failure) else "".join(traceback.format_exception(error)).rstrip()
    drawn = ", ".join(f"{key}={value}" for key, value in notes.items() if key != "name")
    again = f"python tests/fuzz.py --seed {seed} --first {number} --cases 1"
    return f"case {number} of seed {seed}, {notes['name']}: {what}\n    drawn: {drawn}\n    again: {again}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, help="another one each time, unless given")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    torch.set_num_threads(1)
    print(f"{args.cases:,} cases of seed {seed} from {args.first:,} on; torch {torch.__version__}", flush=True)
    numbers = range(args.first, args.first + args.cases)
    report = fuzz(tqdm(numbers, smoothing=0.02, mininterval=1 if sys.stderr.isatty() else 60), seed)
    print(report.drawn if args.cases == 1 else "", report, sep="\n")
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
