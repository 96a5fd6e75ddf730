"""Fuzzing: random calls of everything that takes tensors. Finite in, finite out; not finite in, not finite out.

A case is one call of one function or module, and its backward pass. Hypothesis draws sizes, dtypes, memory
layouts, settings, kinds of values, and the seed with which torch draws the values. A case fails if it raises, if
values or gradients are not finite although the input is, if the result is finite although the input is not, or if
what cannot be negative is. Half precision may overflow only where the same call in float32 gives a number that
half precision does not have.
"""

import io
import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from pytorch_metric_learning import reducers
from torch import Tensor

import hierloss
from hierloss import PoincareDistance, functional, poincare

fuzzing = settings(
    max_examples=int(os.environ.get("FUZZ_CASES", "80")),  # of each function or module
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def can_be_label(dtype: torch.dtype) -> bool:
    """Older versions of torch do not compare larger unsigned integers."""
    try:
        return bool(torch.zeros(1).to(dtype)[torch.zeros(1, dtype=torch.long)].eq(0))
    except RuntimeError:
        return False


HALF = (torch.float16, torch.bfloat16)
FLOATS = (*[torch.float32] * 4, *[torch.float64] * 3, torch.float16, *HALF)
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
INTEGERS += filter(can_be_label, [torch.uint16, torch.uint32, torch.uint64])
LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    *[Tensor.contiguous] * 6,
    lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    lambda x: x.repeat_interleave(2, 0)[::2],
    lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    lambda x: x[:1].expand(x.shape),  # the values of the first row
]
# The work that a case may be: little, so that there can be many; now and then more.
BUDGETS = [2e4] * 4951 + [1e5, 1e6, 1e7, 1e8] * 12 + [math.inf]
BYTES = 100  # of decisions for a case: more than any needs


@dataclass
class Case:
    call: Callable[..., Any]
    arguments: dict[str, Any]
    module: torch.nn.Module | None = None
    by_row: bool = False  # a row of the result depends on that row of the argument alone
    not_negative: bool = False
    most: int = 0  # indices in the result are smaller
    spoiled: str | None = None  # the input that is not finite

    def inputs(self) -> dict[str, Tensor]:
        """Floating point tensors: arguments, and parameters that exist before the first call."""
        tensors = self.arguments | ({} if self.module is None else dict(self.module.named_parameters()))
        known = {k: x for k, x in tensors.items() if type(x) in (Tensor, torch.nn.Parameter)}
        return {k: x for k, x in known.items() if x.is_floating_point()}


class Draw(io.BytesIO):
    """Decisions. Each reads two bytes, which Hypothesis drew; zeros are the simplest.

    Hypothesis would take longer to draw one by one than most calls take, and would make five of six cases by small
    changes of another one.
    """

    radius = 1.0  # that points should be near

    def below(self, n: int, size: int = 2) -> int:
        return n * int.from_bytes(self.read(size), "big") >> 8 * size

    def share(self) -> float:
        return self.below(2**16) / (2**16 - 1)

    def one_in(self, n: int) -> bool:
        return self.below(n) == n - 1

    def choice(self, *values: Any) -> Any:
        return values[self.below(len(values))]

    def power_of_ten(self, low: float, high: float) -> float:
        return 10 ** (low + (high - low) * self.share())

    def count(self, low: int, high: int) -> int:
        """A whole number, log-uniform."""
        return min(high, int(low * ((high + 1) / low) ** self.share()))

    def sizes(self, work: Callable[..., float], *largest: int) -> list[int]:
        """Numbers from 1 to the largest, log-uniform within a budget of work."""
        budget, found = self.choice(*BUDGETS), [1] * len(largest)
        for i in self.choice(*itertools.permutations(range(len(largest)))):
            high = largest[i]
            while high > 1 and work(*found[:i], high, *found[i + 1 :]) > budget:
                high = high * 3 // 4
            found[i] = self.count(1, high)
        return found

    def c(self, ball: bool = False) -> Any:
        """A number; or the tensor of a learned curvature, or a ball of geoopt."""
        c = self.choice(1.0, *[self.power_of_ten(-6, 3)] * 9, 1e-6, 0.1, 1e3)
        is_number, learned = not self.one_in(4), not self.one_in(4)
        if ball and not is_number:
            c = min(c, 80.0)  # geoopt's softplus overflows soon after
        self.radius = c**-0.5
        if is_number:
            return c
        if ball:
            return geoopt.PoincareBall(c, learned)
        return torch.tensor(c, dtype=self.choice(torch.float32, torch.float64), requires_grad=learned)

    def clip_radius(self) -> float | None:
        radius = self.choice(None, 2.3, self.power_of_ten(-3, 3), self.power_of_ten(-30, 3))
        self.radius = radius or 1.0
        return radius

    def module(self, **options: Any) -> PoincareDistance:
        normalize, clip_radius, ball = not self.one_in(3), self.clip_radius(), self.c(ball=True)
        self.radius = (clip_radius or 1.0) if normalize else self.radius
        return PoincareDistance(ball, clip_radius, normalize_embeddings=normalize, **options)

    def values(self, n: int, dim: int) -> Tensor:
        """Rows near and far from a sphere."""
        x = torch.randn(n, dim, dtype=torch.float64)
        unit = x / x.norm(dim=1, keepdim=True).clamp_min(1e-9)
        u, v, share = torch.rand(n, 1, dtype=torch.float64), torch.rand(n, 1), self.share()
        near = unit * self.radius
        return self.choice(
            *[lambda: x * (self.power_of_ten(-2, 2) / math.sqrt(dim))] * 3,
            lambda: x * 0,
            lambda: unit * self.power_of_ten(-30, 30),
            lambda: unit * 10 ** (60 * u - 30),
            lambda: near[:1].expand(n, dim) * self.power_of_ten(-3, 1),
            lambda: near[torch.randint(max(1, n // 2), (n,))] * share,  # duplicates
            lambda: near * u * (v > 0.5),  # some at the origin
            lambda: near[:1] * share + near * 10 ** (19 * u - 20),  # near pairs
            lambda: near * (1 + 10 ** (16 * u - 17) * torch.sign(v - 0.5) * (v > 0.2)),  # the boundary
            lambda: near * u,  # inside
            lambda: near * 10 ** (30 * u),  # outside
            lambda: torch.eye(dim)[torch.randint(dim, (n,))] * (self.radius * self.choice(1, 0.5, -1, 2)),  # axes
        )()

    def leaf(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.choice(*FLOATS)
        largest = torch.finfo(dtype).max
        x = self.choice(*LAYOUTS)(x.double().clamp(-largest, largest).to(dtype))
        return x.requires_grad_(not self.one_in(7))

    def rows(self) -> Tensor:
        """Points as rows, as one vector, or with more leading dimensions."""
        n, dim = self.sizes(lambda n, d: 4 * n * d, 1000, 2048)
        n = 0 if self.one_in(100) else n
        x = self.leaf(self.values(n, dim))
        shape = self.choice(*[x.shape] * 6, (1, n, 1, dim), (dim,) if n == 1 else x.shape)
        return x if shape == x.shape else x.detach().reshape(shape).requires_grad_(x.requires_grad)

    def others(self, x: Tensor, n: int) -> Tensor:
        """Other points than those of ``x``, or the same, or near ones; now and then of another dtype."""
        dtype = self.choice(*[x.dtype] * 9, None)
        if self.one_in(2):
            return self.leaf(self.values(n, x.shape[-1]), dtype)
        near = x.detach()[: n if x.ndim > 1 else None].double()
        return self.leaf(near * (1 + self.choice(0, self.power_of_ten(-17, -1))), dtype)

    def two_sets(self, same_size: bool = False) -> tuple[Tensor, Tensor]:
        n, m, dim = self.sizes(lambda n, m, d: n * m * (8 + d / 4) + (n + m) * d * 8, 1000, 5000, 2048)
        x = self.leaf(self.values(n, dim))
        return x, self.others(x, n if same_size else m)

    def distances(self, n: int, m: int) -> Tensor:
        points, others = torch.randn(n, 3), torch.randn(m, 3)
        kind = self.choice(
            lambda: 9.2 * torch.rand(n, m),
            lambda: (5 * torch.rand(n, m)).round(),  # ties
            lambda: PoincareDistance()(points, points if n == m else others),
            lambda: self.values(n, m).abs(),
            lambda: 10 ** (60 * torch.rand(n, m) - 30),
        )
        return self.leaf(kind())

    def labels(self, n: int) -> Tensor | None:
        dtype = self.choice(None, None, *INTEGERS)
        if dtype is None:
            return None
        info = torch.iinfo(torch.uint8 if dtype == torch.bool else dtype)
        first = self.choice(0, info.min, info.max)
        classes = torch.randint(self.count(1, min(n, info.max)), (n,)) * (-1 if first == info.max else 1)
        return self.choice(*LAYOUTS)(torch.tensor([first + k for k in classes.tolist()], dtype=dtype))

    def miner(self, n: int, t: int, distance: PoincareDistance) -> hierloss.ReciprocalNeighborMiner:
        return hierloss.ReciprocalNeighborMiner(self.count(3, max(20, 2 * n)), t, distance=distance)


def map_of_points(function: Callable[..., Tensor], name: str = "x") -> Callable[[Draw], Case]:
    return lambda draw: Case(function, {"c": draw.c(), name: draw.rows()}, by_row=True)


class Targets(Draw):
    """A method for each function or class that takes tensors, of its name, draws a case of it."""

    exp_map0 = map_of_points(poincare.exp_map0, "v")
    lift_queries = map_of_points(poincare.lift_queries)
    log_map0 = map_of_points(poincare.log_map0)
    project = map_of_points(poincare.project)
    riemannian_gradient = map_of_points(poincare.riemannian_gradient)
    to_hyperboloid = map_of_points(poincare.to_hyperboloid)

    def clip_norm(self) -> Case:
        return Case(poincare.clip_norm, {"radius": self.clip_radius(), "v": self.rows()}, by_row=True)

    def from_hyperboloid(self) -> Case:
        c, (n, dim) = self.c(), self.sizes(lambda n, d: 4 * n * d, 1000, 2048)
        space = self.values(n, dim)
        points = torch.cat([space, (self.radius**2 + space.square().sum(-1, keepdim=True)).sqrt()], -1)
        return Case(poincare.from_hyperboloid, {"c": c, "points": self.leaf(points)}, by_row=True)

    def lift_references(self) -> Case:
        farthest = self.choice(None, self.power_of_ten(-3, 4))
        return Case(poincare.lift_references, {"c": self.c(), "x": self.rows(), "max_distance": farthest})

    def distance(self) -> Case:
        c, x = self.c(), self.rows()
        y = self.others(x, self.choice(len(x), 1) if x.ndim == 2 else 1)
        return Case(poincare.distance, {"x": x, "y": y, "c": c}, not_negative=True)

    def pairwise_distance(self) -> Case:
        c, (x, y) = self.c(), self.two_sets()
        if self.one_in(10):
            x = x.detach().expand(2, *x.shape).requires_grad_(x.requires_grad)
        dtype = self.choice(None, None, torch.float32, torch.float64)
        return Case(poincare.pairwise_distance, {"x": x, "y": y, "c": c, "dtype": dtype}, not_negative=True)

    def reciprocal_triplets(self) -> Case:
        n, t = self.sizes(lambda n, t: 10 * n * n + 10 * n * t, 1000, 50)
        arguments = {"distances": self.distances(n, n), "labels": self.labels(n), "random": not self.one_in(3)}
        arguments |= {"num_neighbors": self.count(3, 2 * n + 3), "triplets_per_anchor": t}
        return Case(functional.reciprocal_triplets, arguments, most=n)

    def hierarchical_triplet_loss(self) -> Case:
        n, p, t = self.sizes(lambda n, p, t: 3 * n * p + 20 * t * p, 1000, 5000, 50_000)
        triplets = torch.randint(n, (3, 0 if self.one_in(100) else t))
        triplets = self.choice(*LAYOUTS)(triplets.to(self.choice(torch.int64, torch.int32)))
        arguments = {"distances": self.distances(n, p), "triplets": self.choice(triplets, tuple(triplets))}
        arguments["margin"] = self.choice(0.1, 0.0, self.power_of_ten(-3, 3))
        arguments["temperature"] = self.choice(0.1, self.power_of_ten(-3, 3))
        if self.one_in(2):
            noise = -(-torch.rand(2, triplets.shape[1], p).clamp_min(1e-9).log()).clamp_min(1e-9).log()
            noise = self.choice(noise, torch.zeros(()).expand(noise.shape), noise * 1e6)
            dtype = torch.promote_types(arguments["distances"].dtype, torch.float32)
            arguments["noise"] = self.choice(*LAYOUTS)(noise.to(dtype))
        return Case(functional.hierarchical_triplet_loss, arguments, not_negative=True, most=p)

    def PoincareDistance(self) -> Case:
        module = self.module(power=self.choice(1, 1, 1, 2), collect_stats=self.one_in(5))
        kind = self.choice("all pairs", "with ref_emb", "pairwise", "normalize")
        x, y = self.two_sets(same_size=kind == "pairwise")
        if kind == "normalize":
            return Case(module.normalize, {"embeddings": x}, module, by_row=True)
        arguments = {"query_emb": x} if kind == "all pairs" else {"query_emb": x, "ref_emb": y}

        def pairwise(query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            return module.pairwise_distance(*map(module.maybe_normalize, (query_emb, ref_emb)))

        return Case(pairwise if kind == "pairwise" else module, arguments, module, not_negative=True)

    def PoincareKNN(self) -> Case:
        distance, (x, y), itself = self.module(), self.two_sets(), self.one_in(3)
        arguments = {"query": x, "reference": (y := x if itself else y), "ref_includes_query": itself}
        arguments["k"] = self.count(1, len(y)) - itself
        return Case(hierloss.PoincareKNN(distance), arguments, distance, not_negative=True, most=len(y))

    def ToPoincare(self) -> Case:
        module = hierloss.ToPoincare(self.c(ball=True), self.clip_radius(), riemannian_gradient=self.one_in(3))
        return Case(module, {"v": self.rows()}, module, by_row=True)

    def FromPoincare(self) -> Case:
        module = hierloss.FromPoincare(self.c(ball=True))
        return Case(module, {"x": self.rows()}, module, by_row=True)

    def ReciprocalNeighborMiner(self) -> Case:
        n, dim, t = self.sizes(lambda n, d, t: n * n * (10 + d / 4) + n * (8 * d + 10 * t), 1000, 2048, 50)
        module, labels = self.miner(n, t, self.module()), self.labels(n)
        labels = torch.zeros(n, dtype=torch.long) if labels is None else labels
        return Case(module, {"embeddings": self.leaf(self.values(n, dim)), "labels": labels}, module, most=n)

    def HIERLoss(self) -> Case:
        def work(n: int, p: int, d: int, t: int) -> float:
            return n * n * 10 + (n + p) * (p * (10 + d / 4 + 20 * t) + d * 8)

        n, p, dim, t = self.sizes(work, 1000, 5000, 2048, 50)
        module = hierloss.HIERLoss(
            num_proxies=(p := max(2, p)),
            embedding_size=self.choice(dim, None),
            margin=self.choice(0.1, 0.0, self.power_of_ten(-3, 2)),
            temperature=self.choice(0.1, self.power_of_ten(-3, 2)),
            distance=(distance := self.module()),
            miner=self.miner(n, t, distance),
            proxy_batch_size=self.choice(*[None] * 4, self.count(2, p)),
            gradient_ratio=self.choice(0.1, None),
            reducer=self.choice(None, None, reducers.SumReducer(), reducers.AvgNonZeroReducer()),
            collect_stats=self.one_in(10),
        ).train(not self.one_in(4))
        if module.embedding_size is not None and self.one_in(10):
            # Not a learnable curvature: its gradient is a sum of large terms that cancel, too large for float16.
            module.proxies.data = module.proxies.data.to(self.choice(*HALF, torch.float64))
        call = torch.autocast("cpu", torch.bfloat16, enabled=self.one_in(20))(module.__call__)
        arguments = {"embeddings": self.leaf(self.values(n, dim)), "labels": self.labels(n)}
        return Case(call, arguments, module, not_negative=True)


TARGETS = [name for name in vars(Targets) if not name.startswith("__")]


@st.composite
def cases(draw: Callable[..., Any], target: Callable[[Targets], Case]) -> Case:
    """A case. In one of 20, an input has a number that is not finite."""
    decide = Targets(draw(st.binary(min_size=BYTES, max_size=BYTES)))
    torch.default_generator.manual_seed(decide.below(2**32, size=4))  # torch.manual_seed takes milliseconds
    spoil, case = decide.one_in(20), target(decide)
    assert decide.tell() < BYTES - 10, "too few decisions"
    inputs = case.inputs()
    if case.call is poincare.riemannian_gradient:
        inputs.pop("c", None)  # it has an effect on the gradient alone
    if spoil and all(x.numel() for x in inputs.values()):
        case.spoiled, value = decide.choice(*inputs), decide.choice(math.nan, math.inf, -math.inf)
        x = inputs[case.spoiled]
        if value == -math.inf and (case.spoiled == "noise" or case.spoiled.endswith("isp_c")):
            value = math.nan  # minus infinity keeps a proxy from being drawn; of geoopt's ball, it is flat space
        x.data = x.data.clone(memory_format=torch.contiguous_format)
        x.data.view(-1)[torch.randint(x.numel(), ())] = value
    return case


def run(case: Case) -> dict[str, Tensor]:
    """The result, unless it is indices alone, and the gradients of a weighted sum of it."""
    torch.default_generator.manual_seed(torch.initial_seed())
    returned = case.call(**case.arguments)
    found = {}
    for x in returned if isinstance(returned, tuple) else (returned,):
        if x.is_floating_point():
            found["result"] = x
        elif x.dtype != torch.bool:
            assert ((x >= 0) & (x < case.most)).all(), "an index of no point"
    leaves = {name: x for name, x in case.inputs().items() if x.requires_grad}
    if found and found["result"].requires_grad and case.spoiled is None:
        weights = torch.linspace(-1, 1.5, found["result"].numel()).view(found["result"].shape)
        grads = torch.autograd.grad((found["result"] * weights).sum(), list(leaves.values()), allow_unused=True)
        found |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
    return {name: x.detach() for name, x in found.items()}


def judge_spoiled(case: Case) -> None:
    event("input that is not finite")
    if isinstance(case.call, hierloss.PoincareKNN):
        what = "must be finite, got NaN" if case.spoiled in case.arguments else "must be a finite positive number"
        with pytest.raises(ValueError, match=what):
            run(case)
        return
    result = run(case).get("result", torch.empty(0))
    assert not result.numel() or not result.isfinite().all(), "a finite result of input that is not finite"
    if case.by_row and case.spoiled in case.arguments and case.spoiled != "c":
        bad = [~x.isfinite().all(-1) for x in (case.arguments[case.spoiled], result)]
        assert torch.equal(*bad), "a row that is not finite spoils another"


def judge(case: Case) -> None:
    note(f"strides: {[x.stride() for x in case.inputs().values()]}")
    if case.spoiled is not None:
        judge_spoiled(case)
        return
    found = run(case)
    assert not case.not_negative or not (found["result"] < 0).any(), "a negative result"
    if not all(x.isfinite().all() for x in found.values()):
        for x in case.inputs().values():
            x.data = x.data.to(torch.promote_types(x.dtype, torch.float32))
        for name, exact in run(case).items():
            x = found[name]
            too_large = exact.isfinite().all() & (exact.abs() > 0.99 * torch.finfo(x.dtype).max)
            assert (x.isfinite() | too_large).all(), f"{name}, {x.dtype}, is not finite"
        event("overflow of half precision")


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
@fuzzing
@given(data=st.data())
def test_fuzz(name: str, data: st.DataObject) -> None:
    judge(data.draw(cases(getattr(Targets, name))))


# --- the fuzzing itself -------------------------------------------------------------------------------------


def test_everything_that_takes_tensors_is_a_target():
    left_out = {
        "HierarchicalTripletLoss",  # what hierarchical_triplet_loss returns
        "Hierarchy",  # of NumPy inside, and refuses what is not finite
        *("functional", "metrics", "poincare"),
    }
    assert {*poincare.__all__, *functional.__all__, *hierloss.__all__} - left_out == set(TARGETS)


def fuzz(function):
    """Like a map of points; ``c`` has no effect, but must be finite."""
    target = map_of_points(lambda x, c: function(x) + 0 * c)
    many = settings(fuzzing, max_examples=500, derandomize=True, database=None, phases=[Phase.generate])
    many(given(cases(target))(judge))()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: x / x.norm(dim=-1, keepdim=True), "is not finite"),  # NaN at the origin
        (lambda x: poincare.exp_map0(x, 1.0).nan_to_num(), "a finite result of input that is not finite"),
        (lambda x: x.view(x.numel()).view(x.shape), "view size is not compatible"),
        (lambda x: x + 0 * x.double().sum(), "a row that is not finite spoils another"),
        (lambda x: x * 1e4 * 1e-4, "torch.float16, is not finite"),  # overflows on the way
    ],
)
def test_it_finds_what_is_wrong(broken, message):
    with pytest.raises((AssertionError, RuntimeError), match=message):
        fuzz(broken)


def test_half_precision_may_overflow_where_the_result_is_too_large_for_it():
    fuzz(lambda x: x * 1e4 if x.isfinite().all() else x)  # overflows in the same cases as the last one above
