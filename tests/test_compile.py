"""torch.compile without graph breaks, with the values of eager mode."""

import copy
import pickle

import pytest
import torch
from conditions import TORCH_CAN_COMPILE, needs_compiler
from pytorch_metric_learning import losses
from torch._dynamo.utils import counters

from hierloss import HIERLoss, functional, poincare

pytestmark = pytest.mark.skipif(
    not TORCH_CAN_COMPILE,
    reason="torch 2.3 and 2.5 cannot trace its autograd functions; compiled by 2.6, some values differ",
)


def values_and_gradients(function, *inputs):
    torch.manual_seed(0)
    out = function(*inputs)
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    return out, *torch.autograd.grad(out, wanted)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.fixture
def fixed_shapes(monkeypatch):
    """The shapes that a compiler and a GPU need, and so the same random numbers."""
    monkeypatch.setattr(functional, "shapes_may_depend_on_values", lambda _: False)


def functional_core(drawn):
    """A mean loss as a function of distances, with draws or with given noise; and distances."""
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(30, 16, generator=generator).requires_grad_()
    triplets = torch.randint(30, (3, 200), generator=generator)
    noise = None if drawn else torch.randn(2, 200, 16, generator=generator)

    def mean(distances):
        return functional.hierarchical_triplet_loss(distances, triplets, noise=noise).losses.mean()

    return mean, distances


@pytest.mark.parametrize("drawn", [False, True])
def test_functional_core(drawn, monkeypatch):
    mean, distances = functional_core(drawn)
    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    actual = values_and_gradients(compiled, distances)
    if drawn:  # the shapes that a compiler needs, and so the same random numbers
        monkeypatch.setattr(functional, "shapes_may_depend_on_values", lambda _: False)
    torch.testing.assert_close(actual, values_and_gradients(mean, distances))


def test_distances():
    x = (torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) * 0.3).requires_grad_()

    def total(x):
        return poincare.pairwise_distance(poincare.exp_map0(x, 0.7), x, 0.7).square().sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(values_and_gradients(compiled, x), values_and_gradients(total, x))


@pytest.mark.slow
@pytest.mark.parametrize("with_labels", [False, True])
def test_the_loss_itself(with_labels, monkeypatch):
    torch.manual_seed(0)
    loss_func = HIERLoss(num_proxies=24, embedding_size=8, gradient_ratio=None)
    embeddings = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(32) % 6 if with_labels else None
    compiled = torch.compile(loss_func, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    wanted = embeddings, loss_func.proxies
    value = compiled(embeddings, labels)
    gradients = torch.autograd.grad(value, wanted)
    # The shapes that a compiler needs.
    monkeypatch.setattr(functional, "shapes_may_depend_on_values", lambda _: False)
    torch.manual_seed(1)
    expected = loss_func(embeddings, labels)
    torch.testing.assert_close((value, *gradients), (expected, *torch.autograd.grad(expected, wanted)))


@pytest.mark.slow
def test_batches_of_other_sizes():
    torch.manual_seed(0)
    loss_func = HIERLoss(num_proxies=24, embedding_size=8, gradient_ratio=None)
    compiled = torch.compile(loss_func, backend="aot_eager")
    for size in (30, 31, 40):
        assert compiled(torch.randn(size, 8), torch.arange(size) % 5).isfinite()


@pytest.mark.usefixtures("fixed_shapes")
def test_features_for_neighbours_in_one_graph():
    """They are looked up outside: the number of a thread cannot be traced."""
    embeddings, features = torch.randn(30, 8, requires_grad=True), torch.randn(30, 5)
    hier = HIERLoss(16, 8, gradient_ratio=None).eval()
    expected = hier(embeddings, neighbor_features=features)
    assert not torch.isclose(hier(embeddings), expected)
    hier.compile(fullgraph=True, backend="aot_eager")
    with hier.neighbors_from(features):
        torch.testing.assert_close(hier(embeddings), expected)


@pytest.mark.usefixtures("fixed_shapes")
def test_the_method_in_one_graph_beside_a_ratio():
    """Also, it keeps the checks and warnings of eager mode."""
    embeddings, labels = torch.randn(30, 8, requires_grad=True), torch.arange(30) % 6
    hier = HIERLoss(16, 8).eval()
    both = losses.MultipleLosses([losses.SupConLoss(), hier])
    wanted = embeddings, hier.proxies
    expected = torch.autograd.grad(both(embeddings, labels), wanted)
    hier.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(both(embeddings, labels), wanted), expected)
    with pytest.raises(ValueError, match=r"labels must have shape \(30,\)"):
        hier(embeddings, labels[1:])
    hier.train()
    for _ in range(101):
        hier(embeddings, labels).backward()
    with pytest.warns(UserWarning, match="proxies of HIERLoss did not change in 100 training steps"):
        hier(embeddings, labels)


@pytest.mark.usefixtures("fixed_shapes")
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_not_compiled(clone):
    calls = []

    def backend(module, inputs):
        return lambda *args: calls.append(1) or module(*args)

    embeddings = torch.randn(30, 8)
    hier = HIERLoss(16, 8).eval()
    hier.compile(backend=backend)
    expected = hier(embeddings)
    assert calls
    calls.clear()
    torch.testing.assert_close(clone(hier)(embeddings), expected)
    assert not calls


@pytest.mark.slow
@needs_compiler
def test_on_a_cpu(monkeypatch):
    """Only the work on triplets is compiled. The values in eval mode stay; test_functional.py tests the draws."""
    monkeypatch.setattr(functional, "_CHUNK_CELLS", 32 * 125)  # several chunks
    kernels, compile_kernel = set(), functional._compile
    monkeypatch.setattr(functional, "_compile", lambda kernel: kernels.add(kernel) or compile_kernel(kernel))
    hier = HIERLoss(32, 8, gradient_ratio=None).eval()
    embeddings, labels = torch.randn(30, 8, requires_grad=True), torch.arange(30) % 6
    inputs = embeddings, hier.proxies
    expected = values_and_gradients(lambda *_: hier(embeddings, labels), *inputs)
    hier.compile(mode="reduce-overhead")
    counters.clear()
    torch.testing.assert_close(values_and_gradients(lambda *_: hier(embeddings, labels), *inputs), expected)
    assert kernels == {functional._soft_gradients}
    hier.train()(embeddings, labels).backward()
    assert kernels == {functional._soft_gradients, functional._group_weights}
    assert counters["stats"]["unique_graphs"] >= 3  # of Dynamo
    assert not counters["graph_break"]


@pytest.mark.slow
@needs_compiler
def test_inductor():
    """The default backend, on the core with given noise: it draws random numbers of its own."""
    mean, distances = functional_core(drawn=False)
    compiled = torch.compile(mean, fullgraph=True)
    torch.testing.assert_close(values_and_gradients(compiled, distances), values_and_gradients(mean, distances))


def test_the_size_must_be_known():
    with pytest.raises(RuntimeError, match="cannot be compiled before its first batch; give embedding_size"):
        HIERLoss().compile()
