"""The gradient of HIER at a fixed ratio to all others', in every way of combining losses and of going back."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from pytorch_metric_learning import losses
from torch.utils.checkpoint import checkpoint

from hierloss import HIERLoss
from hierloss.gradient_ratio import hold_gradient_ratio

CLASSES, D, B, P = 6, 8, 30, 16

BASES = {
    "ProxyAnchor": lambda **kwargs: losses.ProxyAnchorLoss(CLASSES, D, **kwargs),
    "NormalizedSoftmax": lambda **kwargs: losses.NormalizedSoftmaxLoss(CLASSES, D, **kwargs),
    "SupCon": losses.SupConLoss,
    "MultiSimilarity": losses.MultiSimilarityLoss,
    "Triplet": losses.TripletMarginLoss,
}


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=generator).requires_grad_(), torch.arange(B) % CLASSES


def make_hier(gradient_ratio=0.3, **kwargs):
    """In eval mode, where nothing is drawn: gradients of separate calls can be compared."""
    torch.manual_seed(0)
    return HIERLoss(**{"num_proxies": P, "embedding_size": D} | kwargs, gradient_ratio=gradient_ratio).eval()


def make_base(name="ProxyAnchor", **kwargs):
    torch.manual_seed(1)
    return BASES[name](**kwargs)


def gradient(loss, embeddings):
    return torch.autograd.grad(loss, embeddings, retain_graph=True)[0].double()


def expected_gradient(others, own, ratio=0.3):
    """The definition, in float64, from separate gradients."""
    return others + ratio * others.norm() / own.norm() * own


def own_gradient(embeddings, labels=None):
    return gradient(make_hier(None)(embeddings, labels), embeddings)


# --- ways of combining losses -------------------------------------------------------------------------------


COMBINATIONS = {
    "multiple": lambda base, hier, *args: losses.MultipleLosses([base, hier])(*args),
    "multiple, weighted": lambda base, hier, *args: losses.MultipleLosses(
        {"hier": hier, "base": base}, weights={"hier": 123.0, "base": 1.0}
    )(*args),
    "sum": lambda base, hier, *args: base(*args) + 0.01 * hier(*args),
    "sum, HIER first": lambda base, hier, *args: hier(*args) + base(*args),
    "sum, scaled": lambda base, hier, *args: 1e6 * (base(*args) + 0.01 * hier(*args)) / 1e6,
}


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("name", BASES)
def test_the_ratio_is_the_argument(name, combination):
    embeddings, labels = batch()
    others = gradient(make_base(name)(embeddings, labels), embeddings)
    own = own_gradient(embeddings, labels)
    loss = COMBINATIONS[combination](make_base(name), make_hier(), embeddings, labels)
    actual = gradient(loss, embeddings)
    torch.testing.assert_close(actual, expected_gradient(others, own), rtol=1e-4, atol=1e-5)
    assert float((actual - others).norm() / others.norm()) == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("name", BASES)
def test_as_embedding_regularizer(name):
    embeddings, labels = batch()
    others = gradient(make_base(name)(embeddings, labels), embeddings)
    base = make_base(name, embedding_regularizer=make_hier(), embedding_reg_weight=7.0)
    actual = gradient(base(embeddings, labels), embeddings)
    torch.testing.assert_close(actual, expected_gradient(others, own_gradient(embeddings)), rtol=1e-4, atol=1e-5)


def test_with_draws():
    """In training mode the backward pass draws noise: the same as without the ratio, from the same seed."""
    embeddings, labels = batch()

    def total(ratio):
        hier, base = make_hier(ratio).train(), make_base()
        torch.manual_seed(3)
        loss = hier(embeddings, labels) if ratio is None else base(embeddings, labels) + hier(embeddings, labels)
        torch.manual_seed(4)
        return gradient(loss, embeddings)

    others = gradient(make_base()(embeddings, labels), embeddings)
    torch.testing.assert_close(total(0.3), expected_gradient(others, total(None)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(dtype):
    """One tensor in half precision for both losses: the ratio holds to the digits of the dtype."""
    embeddings, labels = batch()
    low = embeddings.detach().to(dtype).requires_grad_()
    base = make_base("SupCon")
    others = gradient(base(low, labels), low)
    actual = gradient(base(low, labels) + make_hier()(low, labels), low)
    assert float((actual - others).norm() / others.norm()) == pytest.approx(0.3, rel=1e-2)


def test_under_autocast():
    """The output of the model is half precision, and goes to both losses."""
    model, (inputs, labels) = torch.nn.Linear(D, D), batch()
    base, hier = make_base("SupCon"), make_hier()

    def gradients(*loss_funcs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = model(inputs)
            embeddings.retain_grad()
            loss = sum(loss_func(embeddings, labels) for loss_func in loss_funcs)
        loss.backward()
        assert embeddings.dtype == torch.bfloat16
        return embeddings.grad.double()

    others = gradients(base)
    assert float((gradients(base, hier) - others).norm() / others.norm()) == pytest.approx(0.3, rel=1e-2)


def test_gradient_of_the_proxies_has_the_scale_of_the_weight():
    embeddings, labels = batch()
    grads = []
    for ratio, weight in ((None, 0.25), (0.3, 0.25), (0.3, 0.5)):
        hier = make_hier(ratio)
        (make_base()(embeddings, labels) + weight * hier(embeddings, labels)).backward()
        grads.append(hier.proxies.grad)
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], 2 * grads[0])


def test_the_ratio_may_change_between_steps():
    """As a warm-up does."""
    embeddings, labels = batch()
    base, hier = make_base(), make_hier(0.0)
    others, own = gradient(base(embeddings, labels), embeddings), own_gradient(embeddings, labels)
    for ratio in (0.0, 0.1, 2.0):
        hier.gradient_ratio = ratio
        actual = gradient(base(embeddings, labels) + hier(embeddings, labels), embeddings)
        torch.testing.assert_close(actual, expected_gradient(others, own, ratio), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["before", "after"])
def test_two_of_them_on_one_tensor(order):
    """Each is held relative to what came before it: the base loss, and for the second also the first."""
    embeddings, labels = batch()
    first, second, base = make_hier(0.3), make_hier(0.5, margin=1.0), make_base()
    others, own = gradient(base(embeddings, labels), embeddings), own_gradient(embeddings, labels)
    other_own = gradient(make_hier(None, margin=1.0)(embeddings, labels), embeddings)
    parts = [first(embeddings, labels), second(embeddings, labels)]
    loss = sum([base(embeddings, labels), *parts] if order == "before" else [*parts, base(embeddings, labels)])
    expected = expected_gradient(expected_gradient(others, own), other_own, 0.5)
    torch.testing.assert_close(gradient(loss, embeddings), expected, rtol=1e-4, atol=1e-5)


# --- ways of going back -------------------------------------------------------------------------------------


def step(embeddings, labels, hier=None):
    return make_base()(embeddings, labels) + (hier or make_hier())(embeddings, labels)


def wanted(embeddings, labels):
    others = gradient(make_base()(embeddings, labels), embeddings)
    return expected_gradient(others, own_gradient(embeddings, labels))


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_accumulation_in_a_model():
    """Embeddings that are no leaf: what goes on into the model is the scaled sum."""
    model, expected = torch.nn.Linear(D, D, bias=False), 0
    for seed in range(3):
        inputs, labels = batch(seed)
        embeddings = model(inputs)
        expected = expected + wanted(embeddings, labels).T @ inputs.double()
        step(embeddings, labels).backward()
    close(model.weight.grad, expected)


def test_two_backward_passes_over_one_graph():
    embeddings, labels = batch()
    loss = step(embeddings, labels)
    loss.backward(retain_graph=True)
    close(embeddings.grad, wanted(embeddings, labels))
    loss.backward()
    close(embeddings.grad, 2 * wanted(embeddings, labels))


def test_gradients_of_some_inputs_only():
    """The hook has nothing to add where HIER, or the embeddings, have no part in a backward pass."""
    embeddings, labels = batch()
    base, hier = make_base(), make_hier()
    loss = base(embeddings, labels) + hier(embeddings, labels)
    torch.autograd.grad(loss, hier.proxies, retain_graph=True)
    torch.autograd.grad(loss, base.proxies, retain_graph=True)
    close(torch.autograd.grad(loss, embeddings)[0], wanted(embeddings, labels))


def test_hooks_do_not_pile_up_on_a_leaf():
    embeddings, labels = batch()
    hier = make_hier()
    for _ in range(5):
        step(embeddings, labels, hier).backward()
    assert not embeddings._backward_hooks


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("what", ["model", "losses"])
def test_checkpointing(what, use_reentrant):
    model, (inputs, labels) = torch.nn.Linear(D, D, bias=False), batch()
    expected = wanted(model(inputs), labels).T @ inputs.double()
    if what == "model":
        loss = step(checkpoint(model, inputs, use_reentrant=use_reentrant), labels)
    else:
        loss = checkpoint(step, model(inputs), labels, use_reentrant=use_reentrant)
    loss.backward()
    close(model.weight.grad, expected)


def test_functional_call():
    embeddings, labels = batch()
    hier = make_hier()
    proxies = {"proxies": hier.proxies.detach().clone().requires_grad_()}
    loss = make_base()(embeddings, labels) + torch.func.functional_call(hier, proxies, (embeddings, labels))
    close(torch.autograd.grad(loss, embeddings)[0], wanted(embeddings, labels))


def test_torch_func():
    embeddings, labels = batch()
    base, hier = make_base(), make_hier()
    found = torch.func.grad(lambda x: base(x, labels) + hier(x, labels))(embeddings.detach())
    close(found, wanted(embeddings, labels))


def test_fully_sharded_model_and_losses():
    """FSDP2 around the model, and around all losses together: the embeddings get the same gradient as without."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this version of torch has no fully_shard")
    inputs, labels = batch()
    gradients = []
    for sharded in (False, True):
        torch.manual_seed(2)
        model, loss_func = torch.nn.Linear(D, D), losses.MultipleLosses([make_base(), make_hier()])
        if sharded:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            for module in (model, loss_func):  # each loss by itself would get a copy of the embeddings
                fsdp.fully_shard(module, mesh=mesh)
        try:
            embeddings = model(inputs)
            embeddings.retain_grad()
            loss_func(embeddings, labels).backward()
        finally:
            if sharded:
                dist.barrier()
                dist.destroy_process_group()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(*gradients)
    others = gradient(make_base()(embeddings, labels), embeddings)
    ratio = (gradients[1].double() - others).norm() / others.norm()
    assert float(ratio) == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (-0.1, "gradient_ratio must be a finite non-negative number, got -0.1"),
        (torch.nan, "gradient_ratio must be a finite non-negative number, got nan"),
        (torch.inf, "gradient_ratio must be a finite non-negative number, got inf"),
        ("0.5", "gradient_ratio must be a non-negative number, got '0.5' of type str"),
        (True, "gradient_ratio must be a non-negative number, got True of type bool"),
    ],
)
def test_a_bad_ratio_is_refused_also_later(ratio, message):
    with pytest.raises((TypeError, ValueError), match=message):
        HIERLoss(gradient_ratio=ratio)
    hier = make_hier(gradient_ratio=0.2)
    with pytest.raises((TypeError, ValueError), match=message):
        hier.gradient_ratio = ratio
    assert hier.gradient_ratio == 0.2


def test_higher_order_is_refused():
    embeddings, labels = batch()
    (grad,) = torch.autograd.grad(step(embeddings, labels), embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="the HIER loss can be differentiated once only"):
        grad.square().sum().backward()


def test_threads():
    """Each thread has a batch of its own and shares the loss."""
    # All that draws random numbers is made here: threads share torch's generator.
    hier, bases, batches = make_hier(), [make_base() for _ in range(4)], [batch(seed) for seed in range(4)]

    def work(base, batch):
        embeddings, labels = batch
        for _ in range(20):
            embeddings.grad = None
            (base(embeddings, labels) + hier(embeddings, labels)).backward()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, bases, batches))  # raises what a thread raises
    for embeddings, labels in batches:
        close(embeddings.grad, wanted(embeddings, labels))


@pytest.mark.slow
def test_compiled():
    """With graph breaks, the loss compiles; the hook runs outside."""
    torch.compiler.reset()
    embeddings, labels = batch()
    base, hier = make_base("SupCon"), make_hier()

    def total(embeddings):
        return base(embeddings, labels) + hier(embeddings, labels)

    expected = gradient(total(embeddings), embeddings)
    close(gradient(torch.compile(total, backend="aot_eager")(embeddings), embeddings), expected)


def test_compiled_without_graph_breaks_is_refused():
    torch.compiler.reset()
    embeddings, labels = batch()
    compiled = torch.compile(make_hier(), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="hold_gradient_ratio"):
        compiled(embeddings, labels)


def test_nothing_waits_for_the_device():
    """On the meta device every question for a value raises."""
    embeddings = torch.randn(B, D, device="meta", requires_grad=True)
    (embeddings.sum() + hold_gradient_ratio(embeddings, 0.3).square().sum()).backward()
    assert embeddings.grad.device.type == "meta"


# --- where there is nothing to hold -------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["alone", "separate", "copy", "other dtype"])
def test_a_gradient_alone_is_left_as_it_is_and_reported_once(case):
    embeddings, labels = batch()
    base, hier = make_base("SupCon"), make_hier()
    others, own = gradient(base(embeddings, labels), embeddings), own_gradient(embeddings, labels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            embeddings.grad = None
            if case == "alone":
                hier(embeddings, labels).backward()
                others = 0
            elif case == "separate":
                base(embeddings, labels).backward()
                hier(embeddings, labels).backward()
            elif case == "copy":
                (base(embeddings, labels) + hier(embeddings.clone(), labels)).backward()
            else:
                (base(embeddings, labels) + hier(embeddings.double(), labels)).backward()
            close(embeddings.grad, others + own)
    (warning,) = caught
    assert "gradient_ratio=0.3 had no effect: no other gradient reached" in str(warning.message)
    assert "losses.MultipleLosses([base, hier])(embeddings, labels).backward()" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize("factor", [0.0, 1e-30])
def test_a_base_gradient_of_zero(factor):
    """HIER's share of nothing is nothing."""
    embeddings, labels = batch()
    (factor * embeddings.sum() + make_hier()(embeddings, labels)).backward()
    expected = factor * (B * D) ** 0.5
    assert expected * 0.7 <= float(embeddings.grad.double().norm()) <= expected * 1.3


def test_a_gradient_of_hier_of_zero():
    embeddings, labels = batch()
    others = gradient(make_base()(embeddings, labels), embeddings)
    (make_base()(embeddings, labels) + 0 * make_hier()(embeddings, labels)).backward()
    close(embeddings.grad, others)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["base", "hier"])
def test_gradients_that_are_not_finite_stay_so(where, bad):
    """A gradient scaler must see them, and skip the step."""
    embeddings, _ = batch()
    factor = torch.ones(B, D)
    factor[3, 2] = bad
    ours = hold_gradient_ratio(embeddings, 0.3)
    base, hier = embeddings.cos(), ours.sin()
    loss = ((factor * base).sum() + hier.sum()) if where == "base" else (base.sum() + (factor * hier).sum())
    loss.backward()
    assert not embeddings.grad[3, 2].isfinite()


def test_a_gradient_scaler():
    """Its factor cancels, and a step that overflows is skipped."""
    for scale, finite in ((2.0**16, True), (2.0**126, False)):
        model, (inputs, labels) = torch.nn.Linear(D, D, bias=False), batch()
        expected = wanted(model(inputs), labels).T @ inputs.double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = model.weight.detach().clone()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(1e3 * step(model(inputs), labels)).backward()
        scaler.unscale_(optimizer)
        if finite:
            close(model.weight.grad / 1e3, expected)
        scaler.step(optimizer)
        assert torch.equal(model.weight, before) != finite


@pytest.mark.filterwarnings("error")
def test_embeddings_without_gradient():
    """A frozen model: the proxies learn, there is nothing to hold, and nothing to report."""
    embeddings, labels = batch()
    hier = make_hier()
    hier(embeddings.detach(), labels).backward()
    with torch.no_grad():
        assert hier(embeddings, labels).isfinite()
    assert hier.proxies.grad.norm() > 0


# --- statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [None, 0.3])
def test_the_ratio_before_scaling_is_recorded(ratio):
    embeddings, labels = batch()
    others, own = gradient(make_base()(embeddings, labels), embeddings), own_gradient(embeddings, labels)
    hier = make_hier(ratio, collect_stats=True)
    (make_base()(embeddings, labels) + 0.5 * hier(embeddings, labels)).backward()
    assert hier.unscaled_gradient_ratio == pytest.approx(float(0.5 * own.norm() / others.norm()), rel=1e-4)
    expected = others + 0.5 * own if ratio is None else expected_gradient(others, own)
    close(embeddings.grad, expected)
    assert "gradient_ratio" in hier._record_these
    assert "unscaled_gradient_ratio" in hier._record_these_stats


@pytest.mark.parametrize(("ratio", "weight", "reports"), [(None, 1e4, 1), (None, 1e-4, 0), (0.3, 1e4, 0)])
def test_a_large_ratio_is_reported_once(ratio, weight, reports):
    embeddings, labels = batch()
    base, hier = make_base(), make_hier(ratio, collect_stats=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count in range(250):
            (base(embeddings, labels) + weight * hier(embeddings, labels)).backward()
            assert len(caught) == (reports if count >= 99 else 0)
    if reports:
        assert "larger than that of all other losses in 100 backward passes" in str(caught[0].message)
        assert "HIERLoss(gradient_ratio=0.1)" in str(caught[0].message)
        assert caught[0].filename == __file__
