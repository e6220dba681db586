"""The bundled counter: how many things of each kind are in a 64 x 64 picture, as a sum over the cells of a grid.

A small residual network gives one logit per kind and cell of an 8 x 8 grid; the count of a kind is the sum of the
cells' sigmoids. A thing may spread over several cells, each of which then holds a part of it.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignprop_fast.demo.vocabulary import THINGS

KIND = "alignprop_counter"  # `model_type` of its config.json
CLASSES = tuple(dict.fromkeys(thing.noun for thing in THINGS))
WIDTHS = (24, 48, 96)
_GROUPS = 8


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(_GROUPS, width), nn.GroupNorm(_GROUPS, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x_BCHW))))))


class Counter(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> logits [B, classes, 8, 8]. A class's count is the sum of their sigmoids."""

    def __init__(self, classes: tuple[str, ...] = CLASSES, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.classes, self.widths = tuple(classes), tuple(widths)
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), _Residual(width)]
        layers += [_Residual(widths[-1]), nn.GroupNorm(_GROUPS, widths[-1]), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], len(self.classes), 1)
        nn.init.constant_(self.head.bias, -5.0)  # type: ignore[arg-type]  # most cells are empty

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.head(self.trunk(pixels_BCHW))

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors (fp16) to `folder`."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": KIND, "classes": self.classes, "widths": self.widths}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        state = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path) -> "Counter":
        """The counter in `folder`, in fp32. Raises OSError, ValueError or KeyError for damaged files."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        counter = cls(tuple(config["classes"]), tuple(config["widths"]))
        try:
            state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
            counter.load_state_dict(state)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder / 'model.safetensors'} is damaged; copy it again") from error
        return counter


def soft_counts(logits_BCHW: Tensor) -> Tensor:
    """[B, classes]: the sum over the cells."""
    return torch.sigmoid(logits_BCHW).sum((-2, -1))
