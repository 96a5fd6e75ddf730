"""What HIER adds to training steps: ``python -m benchmarks steps``, with the extra ``evidence``.

Networks have random weights: the time does not depend on them.
"""

import statistics
from typing import Any

import torch
from pytorch_metric_learning import losses
from torch import Tensor, nn

from benchmarks.speed import Step, side_by_side, summary
from hierloss import HIERLoss

TOKENS, FEATURES = 12, 1280
WITHOUT, HEAD = "no HIER", "linear head"
NUM_PROXIES = (64, 512)  # what docs/choosing.md recommends for a CPU, and the paper's


class Pooled(nn.Module):
    """A model of transformers, with the mean of its last hidden states as embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Tensor:
        return self.model(batch).last_hidden_state.flatten(2).mean(2 if batch.ndim == 4 else 1)


def networks(batch_size: int, image_size: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Each network with a batch of its inputs."""
    from efficientnet_lite_pytorch import EfficientNet
    from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

    minilm = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    lite0 = EfficientNet.from_name("efficientnet-lite0", image_size=image_size, num_classes=128)
    images = torch.randn(batch_size, 3, image_size, image_size)
    return {
        HEAD: (nn.Linear(FEATURES, 128), torch.randn(batch_size, FEATURES)),
        "MiniLM": (Pooled(BertModel(minilm)), torch.randint(30_000, (batch_size, TOKENS))),
        "EfficientNet-Lite0": (lite0, images),
        "ResNet-50": (Pooled(ResNetModel(ResNetConfig())), images),
    }


def added(name: str, network: nn.Module, batch: Tensor, repeats: int) -> list[dict[str, Any]]:
    """A training step with ProxyAnchor alone and with HIER, interleaved; in bfloat16 autocast on a GPU."""
    device = batch.device.type
    labels = torch.arange(len(batch), device=device) // 5
    with torch.no_grad():
        size = network(batch[:2]).shape[1]
    steps = {WITHOUT: make_step(network, batch, labels, losses.ProxyAnchorLoss(len(batch) // 5, size))}
    forms: dict[str, dict[str, Any]] = {f"{count} proxies": {"num_proxies": count} for count in NUM_PROXIES}
    many = f"{NUM_PROXIES[-1]} proxies"
    torch.compiler.reset()  # code compiled for several sizes is slower
    if device == "cuda":
        forms |= {f"{many}, first": forms[many], f"{many}, compiled": forms[many]}
        forms[f"{many}, compiled, first"] = forms[many]
    else:
        forms[f"{many}, compiled"] = forms[many]
    for title, options in forms.items():
        base, hier = losses.ProxyAnchorLoss(len(batch) // 5, size), HIERLoss(embedding_size=size, **options)
        if "compiled" in title:
            hier.compile(mode="reduce-overhead")
        # HIER never waits for the GPU, ProxyAnchor does. So its launches can overlap with the network.
        both = losses.MultipleLosses([hier, base] if "first" in title else [base, hier])
        steps[title] = make_step(network, batch, labels, both)
    times = side_by_side(steps, device, repeats)
    rows = []
    for title, own in times.items():
        shares = [100 * (with_hier / without - 1) for with_hier, without in zip(own, times[WITHOUT], strict=True)]
        spread = {"added %": statistics.median(shares), "least %": min(shares), "most %": max(shares)}
        rows.append({"step": f"{name}, {title}", **summary(own), **spread})
    return rows


def make_step(network: nn.Module, batch: Tensor, labels: Tensor, loss_func: nn.Module) -> Step:
    """A function that runs a training step once."""
    loss_func.to(batch.device)
    optimizer = torch.optim.AdamW([*network.parameters(), *loss_func.parameters()], lr=1e-5)

    def run() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=batch.device.type == "cuda"):
            embeddings = network(batch)
        loss: Tensor = loss_func(embeddings.float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def compare(device: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of all networks."""
    rows = []
    batch_size, image_size = (180, 224) if device == "cuda" else (90, 128)
    for name, (network, batch) in networks(batch_size, image_size).items():
        rows += added(name, network.to(device), batch.to(device), repeats)
    return rows
