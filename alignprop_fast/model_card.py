"""The README.md of a trained model, in the form the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_TEXT = """---
{header}
---

# {name}

Fine-tuned{base} by back-propagating a reward through the denoising chain, with
AlignProp (`alignprop_fast`).
{usage}
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


def write_model_card(
    folder: str | Path,
    *,
    name: str,
    base_model: str | None,
    dataset_name: str | None,
    tags: Iterable[str],
    lora: bool,
    options: dict[str, object],
) -> Path:
    """Write `folder/README.md` and return its path. `base_model` is a Hub id, or None for a local folder."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base_model, datasets=dataset_name, library_name="diffusers", tags=sorted(tags), model_name=name
    )
    text = _TEXT.format(
        header=data.to_yaml(),
        name=name,
        base=f" from [{base_model}](https://huggingface.co/{base_model})" if base_model else "",
        usage=_LORA_USAGE if lora else "",
        options="\n".join(f"| {key} | {value} |" for key, value in options.items()),
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".README.md.tmp"
    temporary.write_text(text, encoding="utf-8")
    return temporary.replace(folder / "README.md")
