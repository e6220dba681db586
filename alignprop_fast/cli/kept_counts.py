"""Counts that an estimate needs, kept for the next question or shipped with the package. Read without torch.

The file name is a hash of all that the counts depend on: options, the files that these name, the versions of the
libraries and, in the user's folder, this package's code. The package's own counts are of built-in models and rewards
under default options and usual ranks; `make_counts` makes them, and a test counts again.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alignprop_fast.cli.plan_options import PlanOptions
from alignprop_fast.files import cache_folder, write_whole
from alignprop_fast.models.load.made_for import made_for
from alignprop_fast.planner import CountedReward, CountedTable, from_text, packed, unpacked

SHIPPED = Path(__file__).parent / "counts"
# The options that say what is asked about counts. All others determine the counts.
BESIDE_COUNTS = {
    *("num_inference_steps", "truncation", "memory_budget", "host_memory"),
    *("table", "save_table", "json", "output_dir"),
}
_OF_REWARD = {
    *("reward", "reward_model", "reward_words", "normalise_rewards", "prompts"),
    *("watch_reward", "watch_reward_model", "watch_prompts", "watch_pictures", "diversity_model", "patience"),
}
_OF_BOTH = {"mixed_precision", "allow_pickle"}
OF_DECODER = {"model", "model_config", "height", "width", *_OF_BOTH}
# It matters whether they are above 0.
_SWITCHES = {"cfg_normalization", "kl_weight", "ema_decay"}
_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class Part:
    """What is counted by itself: a model or a reward at a batch size.

    name: begins the file names. options: those that the counts depend on, and what else they depend on.
    """

    name: str
    batch: int
    options: Mapping[str, Any]

    @classmethod
    def model(cls, options: PlanOptions, batch: int) -> Part:
        """The denoising steps and the decoder. The GPU matters only where it decides which products are rounded."""
        idle = BESIDE_COUNTS | _OF_REWARD | {"batch_size", "deterministic"}
        if options.sampling_precision == "exact":
            idle |= {"gpu"}
        chosen = {name: value for name, value in _given(options).items() if name not in idle}
        chosen |= {name: True for name in _SWITCHES & chosen.keys()}
        return cls(Path(options.model).name, batch, chosen | _guidance(options))

    @classmethod
    def reward(cls, options: PlanOptions, batch: int, size: tuple[int, int]) -> Part:
        """Scoring pictures of this size (height, width)."""
        chosen = {name: value for name, value in _given(options).items() if name in _OF_REWARD | _OF_BOTH}
        return cls("reward", batch, {**chosen, "size": size})

    def read(self) -> Any:
        """Its `CountedTable` or `CountedReward`; None if it is not kept or damaged."""
        try:
            text = shipped(self.shipped_in).get(self.key)
            return unpacked(self.kept.read_bytes()) if text is None else from_text(text)
        except (OSError, ValueError):
            return None

    def keep(self, counted: CountedTable | CountedReward) -> None:
        """Write it if the disk lets us."""
        try:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.kept, packed(counted))
        except OSError:
            pass  # counted again next time

    @property
    def shipped_in(self) -> Path:
        """The package's file that has it, if any has."""
        return SHIPPED / f"{self.name}.xz"

    @property
    def key(self) -> str:
        """Its name there."""
        return f"{self.batch}-{_hash(self._known)}"

    @property
    def kept(self) -> Path:
        return cache_folder() / "counts" / f"{self.name}-{self.batch}-{_hash([self._known, _code()])}.json.gz"

    @cached_property
    def _known(self) -> list[Any]:
        versions = [version(name).partition("+")[0] for name in _LIBRARIES]
        return [dict(self.options), [*_named(self.options)], versions]


def _guidance(options: PlanOptions) -> dict[str, Any]:
    """What matters of guidance: whether there is any. A scale above 1 counts as the model's own, if that is one too.
    A negative prompt needs a true scale to change anything, and its text never does."""
    own, chosen = made_for(options.model, options.model_config), dict[str, Any]()
    for name, usual in (("guidance_scale", own.guidance_scale), ("true_cfg_scale", own.true_cfg_scale)):
        scale = getattr(options, name)
        chosen[name] = usual if scale is None or (scale > 1 and usual > 1) else scale
    return {**chosen, "negative_prompt": options.negative_prompt is not None and chosen["true_cfg_scale"] > 1}


@cache
def shipped(path: Path) -> Mapping[str, str]:
    """The texts of counts in a file of the package, by key; none if there is no such file or it is damaged."""
    try:
        lines = lzma.decompress(path.read_bytes()).decode().splitlines()
    except (OSError, lzma.LZMAError):
        return {}
    return {key: text for key, _, text in (line.partition("\t") for line in lines)}


def archive(texts: Mapping[str, str]) -> bytes:
    """The content of such a file. Counts under other options differ in little, so together they take little more."""
    return lzma.compress("\n".join(f"{key}\t{texts[key]}" for key in sorted(texts)).encode())


def batches(batch: int) -> tuple[int, int]:
    """The batch sizes of a question's tables. Two determine the costs at every other."""
    return batch, 2 if batch == 1 else 1


def _given(options: PlanOptions) -> dict[str, Any]:
    """The options that are not the defaults, so that a new option leaves the file names as they are."""
    defaults = asdict(PlanOptions())
    return {name: value for name, value in asdict(options).items() if value != defaults[name]}


def _hash(known: Any) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def _named(chosen: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of the files that the options name, as PATH or NAME=PATH; of a folder those inside."""
    for value in chosen.values():
        for text in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(text, str):
                continue
            for name in map(os.path.expanduser, (text, text.partition("=")[2])):
                if os.path.exists(name):  # unlike Path, it takes any text
                    path = Path(name)
                    yield from map(_state, sorted(path.rglob("*")) if path.is_dir() else [path])


def _state(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns


@cache
def _code() -> str:
    """A hash of the package's code, which may change within a version."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
