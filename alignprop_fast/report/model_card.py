"""The README.md of a trained model, in the format of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignprop_fast.files import write_whole

_TEXT = """---
{header}
---

# {name}

Fine-tuned{base} by back-propagating a reward through the denoising chain, with
AlignProp (`alignprop_fast`).
{usage}{result}
## Training

| option | value |
|---|---|
{options}

## Source of the method

```bibtex
@article{{prabhudesai2023aligning,
  title = {{Aligning Text-to-Image Diffusion Models with Reward Backpropagation}},
  author = {{Prabhudesai, Mihir and Goyal, Anirudh and Pathak, Deepak and Fragkiadaki, Katerina}},
  journal = {{arXiv preprint arXiv:2310.03739}},
  year = {{2023}}
}}
```
"""

_LORA_USAGE = """
```python
pipe.load_lora_weights("this folder")  # on the base model's diffusers pipeline
```
"""

_KOHYA = """
In ComfyUI, Forge and other programs: put `{kohya}` into the folder of LoRAs.
"""

_AVERAGED = """
`{averaged}/` holds the moving average of the adapters, in both forms. The numbers and pictures below are its own. The
files beside this text are the adapters of the last step.
"""

_RESULT = """{kohya}{averaged}
A strength below 1 takes a part of the effect. There are no trigger words.

## Result

Trained on `{base}` for the reward `{reward}`. Mean over {count} pictures of fixed prompts and seeds:

| | before | after |
|---|---|---|
{scores}

![The same prompts and seeds before (above) and after (below)]({picture})

{number} prompts were trained on: {prompts}.
"""
_PROMPTS = 20  # the most that are listed


@dataclass(frozen=True)
class Result:
    """The result of a run.

    base: the base model's name.
    scores: (before, after) of the reward and of its parts, each the mean of `count` pictures.
    picture, kohya: names of files beside the card.
    averaged: the folder of the averaged adapters, if there are any; the scores after are theirs.
    """

    base: str
    reward: str
    scores: Mapping[str, tuple[float, float]]
    count: int
    prompts: Sequence[str]
    picture: str
    kohya: str
    averaged: str = ""

    def to_text(self) -> str:
        listed = "; ".join(map(_one_line, self.prompts[:_PROMPTS])) + (
            "; and more" if len(self.prompts) > _PROMPTS else ""
        )
        return _RESULT.format(
            base=self.base,
            reward=self.reward,
            count=self.count,
            scores="\n".join(f"| {name} | {old:.3f} | {new:.3f} |" for name, (old, new) in self.scores.items()),
            picture=self.picture,
            kohya=_KOHYA.format(kohya=self.kohya),
            averaged=_AVERAGED.format(averaged=self.averaged) if self.averaged else "",
            number=len(self.prompts),
            prompts=listed,
        )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(value: object) -> str:
    """A value in a Markdown table."""
    return _one_line(str(value)).replace("|", "\\|")


def write_model_card(
    folder: str | Path,
    *,
    name: str,
    base_model: str,
    dataset_name: str | None,
    tags: Iterable[str],
    lora: bool,
    options: dict[str, object],
    result: Result | None = None,
) -> Path:
    """Write `folder/README.md` and return its path. The card names `base_model` if it is a Hub id."""
    from huggingface_hub import ModelCardData

    hub_id = base_model if "/" in base_model and not Path(base_model).expanduser().exists() else None
    data = ModelCardData(
        base_model=hub_id,
        datasets=dataset_name,
        library_name="diffusers",
        tags=sorted(tags),
        model_name=name,
    )
    text = _TEXT.format(
        header=data.to_yaml(),
        name=name,
        base=f" from [{hub_id}](https://huggingface.co/{hub_id})" if hub_id else "",
        usage=_LORA_USAGE if lora else "",
        result=result.to_text() if result else "",
        options="\n".join(f"| {key} | {_cell(value)} |" for key, value in options.items()),
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "README.md", text.encode(errors="replace"))
    return folder / "README.md"
