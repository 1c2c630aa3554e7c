"""Backbones, one file per model family; `load` selects the family by the model folder.

A new one is a file here or a plug-in (`ditflow.registry`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ditflow.backbones.config import STRING, Check, ModelConfigError, read_config
from ditflow.backbones.contract import Backbone, TextLimit
from ditflow.backbones.revision import folder_revision
from ditflow.errors import DitflowError, SettingsError
from ditflow.layout import LatentLayout
from ditflow.registry import modules_of, plugin_folders
from ditflow.settings import ExecutionSettings, MethodSettings, ModelDefaults, SamplingSettings

__path__ += plugin_folders("backbones")

MINI = ("mini", "mini-rotary", "mini-additive")
"""Names of the embedded tiny models; `mini` is the rotary one."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelNotFoundError(DitflowError, ValueError):
    """There is no supported model at a path, or it may not be downloaded; the code says which."""

    default_code = "model-not-found"


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

    name: recorded in outputs in place of `path`, for instance of a local copy.
    dtype: float32, bfloat16, float16, or auto: float32 on a CPU, on a GPU the precision of the release.
    device: cpu, cuda, cuda:1, or auto. download: whether a hub id may be downloaded (tens of gigabytes).
    Raises ModelNotFoundError, ModelConfigError and SettingsError. Only safetensors are read, and no code of the model
    folder is run.
    """
    folder = find_model(path, download=download)
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    family, defaults = _family(folder), _own_defaults(folder)
    family.describe(folder, path, defaults)  # validates the configurations
    precision = family.release_dtype(folder, target) if dtype == "auto" else _dtype(dtype)
    with _build_errors(folder):
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
    """What is known of a model without loading its weights."""

    path: str
    revision: str
    layout: LatentLayout
    defaults: ModelDefaults


def identify(path: str, *, download: bool = False) -> ModelIdentity:
    """Return a model's revision, layout and defaults without loading it; its files are hashed once (see `revision`)."""
    folder = find_model(path, download=download)
    layout, defaults = _family(folder).describe(folder, path, _own_defaults(folder))
    return ModelIdentity(path, folder_revision(folder), layout, defaults)


def read_text_limit(path: str, *, download: bool = False) -> TextLimit:
    """Return the length limit of a model's prompts, with its tokenizer; loads no weights."""
    folder = find_model(path, download=download)
    with _build_errors(folder):
        limit: TextLimit = _family(folder).read_text_limit(folder)
    return limit


@contextmanager
def _build_errors(folder: Path) -> Iterator[None]:
    """Convert errors of the libraries while a model is built into a ModelConfigError that names the folder."""
    try:
        yield
    except (ModelConfigError, ModelNotFoundError, SettingsError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the machine; the libraries' own have no errno
            raise
        raise ModelConfigError(
            f"{folder}: the model cannot be built: {type(error).__name__}: {error}. Its files are inconsistent, or "
            "one is damaged: copy the folder again from its source",
            code="model-build-failed",
            key="model.path",
        ) from error


def _family(folder: Path) -> Any:
    """Return the backbone module whose PIPELINES include the folder's pipeline class."""
    file = folder / "model_index.json"
    index = read_config(file, {"_class_name": STRING})
    for part, classes in index.items():
        known = not isinstance(classes, list) or classes[:1] in ([None], ["diffusers"], ["transformers"])
        if not part.startswith("_") and not known:
            raise ModelConfigError(
                f"{file}: {part}: {classes!r:.100} is not valid: expected a class of diffusers or transformers. No "
                "other code is run",
                code="model-foreign-code",
            )
    pipeline = index["_class_name"]
    valid: list[str] = []
    for module in modules_of(__name__):
        if pipeline in getattr(module, "PIPELINES", ()):
            return module
        valid += getattr(module, "PIPELINES", ())
    raise ModelNotFoundError(
        f"{folder} holds a {pipeline}, which no backbone supports; valid: {', '.join(valid)}. Use another model, or "
        "add a backbone (docs/add-a-backbone.md).",
        code="model-unsupported",
        key="model.path",
    )


def find_model(path: str, *, download: bool = False) -> Path:
    """Return the local folder of a model; ModelNotFoundError if there is none."""
    if path in MINI:
        from ditflow.mini import mini_folder

        return mini_folder(path)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _hub_folder(path, download)
    if not (folder / "model_index.json").is_file():
        raise ModelNotFoundError(
            f"{folder} is not a diffusers model folder: it has no model_index.json. Pass the folder that was written "
            "by save_pretrained or by a hub download.",
            code="model-folder-invalid",
            key="model.path",
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
            "Check the path, or allow the download (model.download: true, or load(..., download=True)).",
            key="model.path",
        ) from error


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise SettingsError("dtype", name, f"auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _own_defaults(folder: Path) -> dict[str, Any]:
    """Return the defaults in a model folder's `ditflow.json`: none, some or all fields of `ModelDefaults`."""
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
            # Coordinates with the preset `lasting` allow every setting, each within its own limits.
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
    """Convert JSON's lists to tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
