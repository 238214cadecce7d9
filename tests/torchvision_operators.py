"""Declare the two compiled operators that torchvision names on import, where its binary does not load.

`.ci/run` puts this file and a .pth that imports it into an environment, before torchvision is imported first. Video
processors use neither of the two.
"""

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
for operator in ("nms", "qnms"):
    torch.library.define(f"torchvision::{operator}", SCHEMA)
