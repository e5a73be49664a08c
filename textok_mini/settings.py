"""From presets, YAML files and `key=value` to settings.

    config = load_config("laptop", ["training.steps=500", "seed=3"])

Whatever comes from a user passes through `from_dict`, which refuses unknown keys and wrong types by name.
"""

import contextlib
import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from textok_mini.config import Config, ConfigError


def merge(base: dict, extra: dict) -> dict:
    """`extra` over `base`, group by group; neither is changed."""
    both = dict(base)
    for key, value in extra.items():
        both[key] = merge(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}


def load_config(preset_or_file: str, overrides: Sequence[str] = ()) -> Config:
    """A preset's name (`laptop`: minutes on two cores, `smoke`: seconds, for tests, or one of the paper's, such as
    `imagenet256-32`) or a YAML file (`preset: NAME` and any groups), then overrides like `training.steps=500`.

    Raises ConfigError for anything unknown, of the wrong type, or impossible."""
    path = Path(preset_or_file)
    path = path if path.suffix in (".yaml", ".yml", ".json") else preset_file(preset_or_file)
    return from_dict(Config, apply_overrides(read_settings(path), overrides))


def preset_file(name: str) -> Path:
    if name not in PRESETS:
        there = ", ".join(PRESETS)
        raise ConfigError(f"{name!r} is neither a preset ({there}) nor a .yaml file{nearest(name, PRESETS)}")
    return PRESETS[name]


def read_settings(path: Path) -> dict:
    """A YAML file's settings, over those of the preset that it names."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings; write groups like `training:` with keys under them")
    base = values.pop("preset", None)
    return merge(read_settings(preset_file(base)), values) if base is not None else values


SHORT_FORMS = {"data": "data.source", "seed": ("training.seed", "generator.seed")}


class Typed(str):
    """What was typed after `key=`: a text as it is for a field of text, YAML for any other."""


def apply_overrides(values: dict, overrides: Sequence[str], short: Mapping[str, Any] = SHORT_FORMS) -> dict:
    """`key=value` strings over nested settings; `short` forms stand for dotted keys."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not KEY=VALUE, as in training.steps=500")
        value = parsed(Typed(text)) if text.startswith("{") else Typed(text)
        meant = short.get(key, key)
        for dotted in (meant,) if isinstance(meant, str) else meant:
            nested = value
            for part in reversed(dotted.split(".")):
                nested = {part: nested}
            values = merge(values, nested)
    return values


def parsed(value: Any) -> Any:
    try:
        return yaml.safe_load(value) if isinstance(value, Typed) else value
    except yaml.YAMLError:
        return str(value)


def from_dict(cls: type, values: dict, prefix: str = "") -> Any:
    """A config dataclass from nested plain values; raises ConfigError on unknown keys and wrong types."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'config'} must be a group of settings, not {values!r}")
    built = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"unknown setting {prefix}{key}{nearest(key, fields, prefix)}")
        kind = fields[key].type
        nested = dataclasses.is_dataclass(kind)
        built[key] = from_dict(kind, value, f"{prefix}{key}.") if nested else convert(kind, value, prefix + key)
    return cls(**built)


def convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as `kind`: int, float, bool, str or a Literal. Numbers are never rounded, truth never guessed."""
    if kind is str and isinstance(value, Typed):
        return str(value)
    value = parsed(value)
    if get_origin(kind) is Literal:
        options = get_args(kind)
        if value not in options:
            raise ConfigError(f"{key} must be one of {', '.join(options)}, not {value!r}{nearest(value, options)}")
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and (number or isinstance(value, str)):  # YAML reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            if math.isfinite(float(value)):
                return float(value)
    if kind is str and number:
        return str(value)
    if kind is not float and isinstance(value, kind) and (number or kind is not int):
        return value
    raise ConfigError(f"{key} must be {kind.__name__}, not {value!r}")


def nearest(key: Any, valid: Any, prefix: str = "") -> str:
    """'; did you mean X?' where something valid is close enough, also a key of another group."""
    close = difflib.get_close_matches(str(key), list(valid), n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    if list(valid) != list(PRESETS):
        dotted = [f"{g.name}.{f.name}" for g in dataclasses.fields(Config) for f in dataclasses.fields(g.type)]
        close = [d for d in dotted if d.split(".")[1] == key]
        close = close or difflib.get_close_matches(prefix + str(key), dotted, n=1)
    return f"; did you mean {close[0]}?" if close else ""


to_dict = dataclasses.asdict  # nested plain values, ready for JSON; `from_dict` reads them back


def of_training(config: Config) -> dict[str, dict]:
    """The groups that a run of this config depends on: a tokenizer's are not the generator's."""
    names = "text dit generator" if config.generator.latents else "data text tokenizer discriminator training"
    return {name: to_dict(getattr(config, name)) for name in names.split()}


def config_json(config: Any) -> str:
    return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"
