"""Lets torchvision be imported where its compiled operators cannot be loaded.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its library does not load, and its import then
stops at the names of two operators. Its transforms and timm use none of them, so the names are enough.
"""

import torch

try:
    import torchvision
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
