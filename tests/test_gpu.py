"""What only an accelerator can show: no waiting, graph capture, mixed precision."""

import pytest
import torch

from hierloss import HIERLoss, poincare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

B, D, P = 180, 128, 512


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, D, generator=generator).cuda().requires_grad_(), (torch.arange(B) // 2).cuda()


def total(loss_func, embeddings, labels):
    """HIER beside another loss, which has a gradient for the ratio and needs no synchronization."""
    return embeddings.square().mean() + loss_func(embeddings, labels)


@pytest.mark.parametrize("with_labels", [True, False])
def test_the_host_never_waits(batch, with_labels):
    loss_func = HIERLoss(P, D).cuda()
    embeddings, labels = batch
    total(loss_func, embeddings, labels).backward()  # the first call sets up libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total(loss_func, embeddings, labels if with_labels else None).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph_of_a_training_step(batch, compiled):
    """Replays draw new triplets and noise, and train the proxies."""
    loss_func = HIERLoss(P, D).cuda()
    if compiled:
        loss_func.compile(fullgraph=True)
    embeddings, labels = batch
    optimizer = torch.optim.Adam(loss_func.parameters(), lr=1e-2, capturable=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            total(loss_func, embeddings, labels).backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        embeddings.grad = None
        loss = total(loss_func, embeddings, labels)
        loss.backward()
        optimizer.step()
    values = []
    before = loss_func.proxies.detach().clone()
    for _ in range(20):
        graph.replay()
        values.append(loss.item())
    assert len(set(values)) > 10
    assert all(0 < v < 5 for v in values)
    assert not torch.equal(before, loss_func.proxies)


def test_the_ratio_of_gradients(batch):
    embeddings, labels = batch
    (others,) = torch.autograd.grad(embeddings.square().mean(), embeddings)
    total(HIERLoss(P, D, gradient_ratio=0.3).cuda(), embeddings, labels).backward()
    assert float((embeddings.grad - others).norm() / others.norm()) == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(batch, mode):
    """The ratio holds, each call draws anew, and accumulated gradients of the proxies are those of eager mode."""
    embeddings, labels = batch
    (others,) = torch.autograd.grad(embeddings.square().mean(), embeddings)
    loss_func = HIERLoss(P, D, gradient_ratio=0.3).cuda()

    def steps():
        losses = []
        loss_func.proxies.grad = None  # and accumulated then
        for _ in range(20):
            embeddings.grad = None
            losses.append(total(loss_func, embeddings, labels))
            losses[-1].backward()
            assert float((embeddings.grad - others).norm() / others.norm()) == pytest.approx(0.3, rel=1e-3)
        return torch.stack(losses).detach(), loss_func.proxies.grad

    eager, eager_gradient = steps()
    loss_func.compile(mode=mode, fullgraph=True)
    compiled, gradient = steps()
    assert len(compiled.unique()) > 10
    assert (compiled.mean() - eager.mean()).abs() < 4 * ((compiled.var() + eager.var()) / 20).sqrt()
    assert torch.cosine_similarity(gradient.flatten(), eager_gradient.flatten(), 0) > 0.99
    assert float(gradient.norm() / eager_gradient.norm()) == pytest.approx(1, abs=0.05)


def test_mean_over_draws_is_that_of_the_cpu(batch):
    torch.manual_seed(0)
    on_cpu = HIERLoss(P, D)
    on_gpu = HIERLoss(P, D).cuda()
    on_gpu.load_state_dict(on_cpu.state_dict())
    embeddings, labels = batch
    a = torch.stack([on_gpu(embeddings, labels).detach().cpu() for _ in range(20)])
    b = torch.stack([on_cpu(embeddings.cpu(), labels.cpu()).detach() for _ in range(20)])
    assert (a.mean() - b.mean()).abs() < 4 * (a.var() / 20 + b.var() / 20).sqrt()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_grad_scaler(batch, dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(D, D).cuda()
    loss_func = HIERLoss(P).cuda()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss_func.parameters()], lr=1e-3)
    scaler = torch.amp.GradScaler("cuda")
    embeddings, labels = batch
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            loss = total(loss_func, model(embeddings.detach()), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append(loss.item())
    assert sum(values[-10:]) < sum(values[:10])
    assert scaler.get_scale() > 1


def test_distances_are_those_of_the_cpu(batch):
    x = poincare.exp_map0(batch[0].detach() * 0.1, 0.1)
    expected = poincare.pairwise_distance(x.cpu(), x.cpu(), 0.1)
    torch.testing.assert_close(poincare.pairwise_distance(x, x, 0.1).cpu(), expected, rtol=1e-6, atol=1e-9)
