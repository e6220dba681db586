"""Makes a command's typer parameters from its options, and combines YAML file and command line."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import Field, replace
from enum import Enum, StrEnum
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from alignprop_fast.cli.folder import TRACKER
from alignprop_fast.cli.yaml_file import read_yaml
from alignprop_fast.training.declaration import Command, Declaration, declared, flag, taken, values
from alignprop_fast.training.options import TrainOptions

if TYPE_CHECKING:
    from alignprop_fast.training.config import AlignPropConfig

T = TypeVar("T", bound=TrainOptions)


def command_line(command: Command, defaults: T) -> Callable[[Callable[[typer.Context, T], None]], Callable[..., None]]:
    """Decorates a function of typer's context and one object of options: typer sees a parameter for each option.

    defaults: an object of the same type. Options that the command does not take keep these values.
    """
    options, hints = taken(defaults, command), get_type_hints(type(defaults))

    def decorate(function: Callable[[typer.Context, T], None]) -> Callable[..., None]:
        def run(ctx: typer.Context, **found: Any) -> None:
            given = {name: _plain(value) for name, value in found.items()}
            for field, option in options:
                try:
                    option.check(flag(field.name), given[field.name])
                except ValueError as error:
                    raise typer.BadParameter(str(error)) from error
            function(ctx, replace(defaults, **given))

        parameters = [
            _parameter(field, option, hints[field.name], getattr(defaults, field.name)) for field, option in options
        ]
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        run.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
        run.defaults = defaults  # type: ignore[attr-defined]  # for the docs
        run.__annotations__ = {each.name: each.annotation for each in (context, *parameters)}
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        return run

    return decorate


def _parameter(field: Field[Any], option: Declaration, hint: Any, default: Any) -> inspect.Parameter:
    """The function parameter that typer reads."""
    kind = _kind(field.name, option, hint)
    more: dict[str, Any] = {"help": option.help, "show_default": option.shown or default not in (None, ())}
    typer_option: Any = typer.Option  # as Any, because its first argument may be a name or the default
    if option.argument:
        info, default = typer.Argument(metavar=option.argument, **more), inspect.Parameter.empty
    else:
        names = (flag(field.name),) if default is False else ()  # otherwise typer adds --no-...
        bounds: dict[str, Any] = {"min": option.at_least, "max": option.at_most}
        bounds = {name: bound for name, bound in bounds.items() if isfinite(bound)}
        panel = option.panel and option.panel.value
        info = typer_option(*names, rich_help_panel=panel, case_sensitive=False, **bounds, **more)
        if default is None:
            kind = Optional[kind]  # noqa: UP045  # our oldest typer knows no other union
        elif option.choices:
            default = kind(default)
        elif isinstance(default, tuple):
            default = list(default)
    annotation = Annotated[kind, info]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kind(name: str, option: Declaration, hint: Any) -> Any:
    """The type on the command line of values that are not None: a choice is an Enum, a tuple a list, a size a text."""
    if option.choices:
        return StrEnum(name, {text: text for text in option.choices})
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    if get_origin(hint) is tuple:
        return list[kinds[0]]  # type: ignore[valid-type]
    return str if str in kinds else kinds[0]


def _plain(value: Any) -> Any:
    """Converts typer's value of an option to the type in its declaration, which YAML and JSON support."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.value if isinstance(value, Enum) else value


def given(ctx: typer.Context) -> list[str]:
    """Names of the options given on the command line."""
    return [name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]


def make_config(options: TrainOptions, device: str, resume_from: str) -> AlignPropConfig:
    """The trainer's config. `device`: "cpu" or a CUDA device.

    Raises:
        ValueError: a value cannot work.
    """
    from alignprop_fast.training.config import AlignPropConfig, config_field

    names = {config_field(each.name, option): each.name for each, option in declared(TrainOptions)}
    names.pop("")  # the options that the trainer does not have
    for name, asked in (("cuda_graphs", options.cuda_graphs == "on"), ("compiled", options.compiled)):
        if device == "cpu" and asked:
            raise ValueError(f"{flag(name)} needs a GPU, and there is none to run on: leave it out")
    return AlignPropConfig(
        exp_name="alignprop-fast",
        tracker_project_name=TRACKER,
        logdir=options.output_dir,
        resume_from=resume_from,
        accelerator_kwargs={"cpu": device == "cpu"},
        **{field: getattr(options, name) for field, name in names.items()},
    )


class ConfigCommand(TyperCommand):
    """A command whose defaults come from the YAML file of --config and, with --resume, from the run's own config.yaml.

    The command line beats --config, which beats the resumed run's file, which beats the built-in defaults.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        defaults: dict[str, Any] = {}
        if not given.get("help"):
            config = given.get("config")
            defaults = self._read(Path(config)) if config else {}
            if given.get("resume") or given.get("resume_from"):
                folder = Path(given.get("output_dir") or defaults.get("output_dir") or TrainOptions().output_dir)
                own = folder.expanduser() / "config.yaml"
                if not own.is_file():
                    raise typer.BadParameter(f"nothing to resume in {folder} (no config.yaml): leave --resume out")
                defaults = {**self._read(own), **defaults}
        ctx.default_map = defaults
        return super().parse_args(ctx, args)

    def _read(self, path: Path) -> dict[str, Any]:
        """Options in a YAML file, as the texts that the command line would hold (lists for repeatable options)."""
        content = dict(read_yaml(path))
        if "memory_budget" in content and content["memory_budget"] is None:
            content["memory_budget"] = "none"  # null in runs from the time when it was the default
        options = values(TrainOptions(), Command.TRAIN)
        for key, value in content.items():
            if key not in options:
                close = difflib.get_close_matches(key.replace("-", "_"), options, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known options: {', '.join(options)}"
                raise typer.BadParameter(f"{path} has an unknown option {key!r}; {hint}")
            if isinstance(value, list) and not isinstance(options[key], tuple):
                example = "VALUE" if options[key] is None else options[key]
                raise typer.BadParameter(f"{path}: {key} must be a single value, such as '{key}: {example}'")
            if value == ".inf" and isinstance(options[key], float):  # as YAML writes infinity
                content[key] = "inf"
        return {
            key: [value] if isinstance(options[key], tuple) and isinstance(value, str) else value
            for key, value in content.items()
            if value is not None
        }
