"""Backbones, one file per model family; `load` finds the right one for a model folder.

A new one is a new file here, or in `backbones/` of a folder in `DITFLOW_PLUGINS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ditflow.backbones.base import Backbone, Geometry, TextLimit
from ditflow.backbones.config import TEXT, Check, ModelConfigError, read_config
from ditflow.backbones.revision import folder_revision
from ditflow.registry import modules_of, plugin_folders
from ditflow.settings import ExecutionSettings, MethodSettings, ModelDefaults, SamplingSettings, SettingsError

__path__ += plugin_folders("backbones")

MINI = ("mini", "mini-rotary", "mini-additive")
"""Names of the embedded tiny models; `mini` is the rotary one."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelNotFoundError(ValueError):
    """There is no loadable model at a path, or it may not be downloaded."""


def load(
    path: str,
    *,
    name: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    execution: ExecutionSettings | None = None,
    download: bool = False,
) -> Backbone:
    """Load a video diffusion transformer: `mini`, a diffusers folder, or a hub id.

    name: what the model is called in what it makes, if it lies at `path` only by chance.
    dtype: float32, bfloat16, float16, or auto: 32 bits on a CPU; on a GPU what the model was released in.
    device: cpu, cuda, cuda:1, or auto. download: whether a hub id may be fetched (tens of gigabytes).
    Raises ModelNotFoundError and ModelConfigError. Only safetensors are read, and no code of the model's folder is run.
    """
    folder = find_model(path, download=download)
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    family, defaults = _family(folder), _own_defaults(folder)
    family.read_geometry(folder, path, defaults)  # which checks what is about to be built
    precision = family.release_dtype(folder, target) if dtype == "auto" else _dtype(dtype)
    with _building_from(folder):
        backbone: Backbone = family.load(
            folder,
            name=name or path,
            revision=folder_revision(folder),
            dtype=precision,
            device=target,
            defaults=defaults,
            execution=execution,
        )
    return backbone


@dataclass(frozen=True)
class ModelIdentity:
    """What can be known of a model without loading its weights."""

    path: str
    revision: str
    geometry: Geometry


def identify(path: str, *, download: bool = False) -> ModelIdentity:
    """Return a model's revision and geometry; reads its files once (hashes are remembered), loads nothing."""
    folder = find_model(path, download=download)
    geometry = _family(folder).read_geometry(folder, path, _own_defaults(folder))
    return ModelIdentity(path, folder_revision(folder), geometry)


def read_text_limit(path: str, *, download: bool = False) -> TextLimit:
    """Return how long a model's prompts may be, with its tokenizer; loads no weights."""
    folder = find_model(path, download=download)
    with _building_from(folder):
        limit: TextLimit = _family(folder).read_text_limit(folder)
    return limit


@contextmanager
def _building_from(folder: Path) -> Iterator[None]:
    """Turn whatever the libraries raise over a folder's files into a ModelConfigError that names the folder."""
    try:
        yield
    except (ModelConfigError, ModelNotFoundError, SettingsError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the machine; libraries raise others for a file
            raise
        raise ModelConfigError(
            f"{folder}: the model cannot be built: {type(error).__name__}: {error}. Its files do not fit together, or "
            "one is damaged: copy the folder again from where it came"
        ) from error


def _family(folder: Path) -> Any:
    """Return the module of this package whose PIPELINES name the folder's pipeline class."""
    file = folder / "model_index.json"
    index = read_config(file, {"_class_name": TEXT})
    for part, classes in index.items():
        known = not isinstance(classes, list) or classes[:1] in ([None], ["diffusers"], ["transformers"])
        if not part.startswith("_") and not known:
            raise ModelConfigError(
                f"{file}: {part}: {classes!r:.100} is not valid: expected a class of diffusers or transformers. No "
                "other code is run"
            )
    pipeline = index["_class_name"]
    valid: list[str] = []
    for module in modules_of(__name__):
        if pipeline in getattr(module, "PIPELINES", ()):
            return module
        valid += getattr(module, "PIPELINES", ())
    raise ModelNotFoundError(f"{folder} holds a {pipeline}, which no backbone runs; valid: {', '.join(valid)}")


def find_model(path: str, *, download: bool = False) -> Path:
    """Return the local folder of a model; ModelNotFoundError says what was looked for, and what to do."""
    if path in MINI:
        from ditflow.mini import mini_folder

        return mini_folder(path)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _hub_folder(path, download)
    if not (folder / "model_index.json").is_file():
        raise ModelNotFoundError(
            f"{folder} is no diffusers model folder: it has no model_index.json. Pass the folder that was written "
            "by save_pretrained or by a hub download."
        )
    return folder


def _hub_folder(path: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=not download))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelNotFoundError(
            f"model {path!r} is neither a folder here, nor in the local hub cache, nor one of {', '.join(MINI)}. "
            "Check the path, or allow the download (model.download: true, or load(..., download=True))."
        ) from error


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"dtype: {name!r} is not valid: expected auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _own_defaults(folder: Path) -> dict[str, Any]:
    """Return the defaults that a model folder carries in `ditflow.json`: none, some or all of `ModelDefaults`."""
    file = folder / "ditflow.json"
    if not file.is_file():
        return {}
    values = read_config(file, _SECTIONS)
    valid = [field.name for field in fields(ModelDefaults)]
    if unknown := sorted(set(values) - set(valid)):
        raise ModelConfigError(f"{file}: {', '.join(unknown)} is not valid: expected some of {', '.join(valid)}")
    for section in _SECTIONS.keys() & values.keys():
        values[section] = {name: _tuples(own) for name, own in (values[section] or {}).items()}
    values = _tuples(values)
    try:
        ModelDefaults(**{"blocks": (0,), **values})
        for own in (values, *(own for section in _SECTIONS.keys() & values.keys() for own in values[section].values())):
            # Coordinates with the preset `lasting` may have every setting, each in its own limits.
            for settings in (MethodSettings(optimize="coordinates", preset="lasting"), SamplingSettings()):
                replace(settings, **{f.name: own[f.name] for f in fields(settings) if f.name in own})
    except (SettingsError, TypeError) as error:
        raise ModelConfigError(f"{file}: {error}") from error
    return values


_SECTION: Check = (
    "an object of objects",
    lambda came: came is None or (isinstance(came, dict) and all(isinstance(own, dict) for own in came.values())),
)
_SECTIONS = dict.fromkeys(("losses", "variables", "lasting"), _SECTION)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
