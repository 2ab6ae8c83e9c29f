"""Models by name: a hub name, a folder, or weights that an installed package or attnscope itself carries."""

import hashlib
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedConfig

from attnscope.families import ModelFamily, find_family
from attnscope.reference import carrying, models
from attnscope.reference.alignments import CONFIG_KEY

EMBEDDED_PREFIX = "embedded:"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHA_BLOCK = 2**26
# While transformers builds a model, `PreTrainedModel.tie_weights` and torch's default dtype are patched for the whole
# process; two threads at once leave the patch behind, and tied weights without values from then on.
_one_at_a_time = threading.Lock()


class ModelError(ValueError):
    """A model that can't be loaded or used; the message is one sentence."""


@dataclass
class LoadedModel:
    """A model with what turns samples into its inputs, and the family that knows its roles."""

    model: torch.nn.Module
    name: str
    family: ModelFamily
    source: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    _options: dict[str, object] = field(default_factory=dict)

    @property
    def config(self) -> PreTrainedConfig:
        """The transformers configuration; an empty one for a module that has none."""
        found = getattr(self.model, "config", None)
        return found if isinstance(found, PreTrainedConfig) else PreTrainedConfig()

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lies."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's first floating parameter."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @cached_property
    def module_names(self) -> list[str]:
        """Qualified names of all modules."""
        return [name for name, _ in self.model.named_modules()]

    @cached_property
    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase | None":
        """The model's tokenizer, when it takes text and has one."""
        if not self.takes("input_ids"):
            return None
        tokenizer = self._part(AutoTokenizer)
        if tokenizer is not None and tokenizer.pad_token is None:
            # Padding is masked, so that any token serves; GPT-like tokenizers declare none.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer

    @cached_property
    def image_processor(self) -> "transformers.BaseImageProcessor | None":
        """The model's image processor, when it takes images and has one."""
        # The Pillow backend is there wherever we are; the torchvision one resizes a little differently, and numbers
        # should not depend on whether it is installed.
        return self._part(AutoImageProcessor, backend="pil") if self.takes("pixel_values") else None

    @cached_property
    def processor(self) -> "transformers.ProcessorMixin | None":
        """The model's joint processor of images and text."""
        return self._part(AutoProcessor)

    @property
    def text_limit(self) -> int | None:
        """The most text tokens that the model takes, when it says so."""
        config = getattr(self.config, "text_config", self.config)
        limits = [getattr(config, "max_position_embeddings", None)]
        limits.append(getattr(self.tokenizer, "model_max_length", None))
        known = [n for n in limits if isinstance(n, int) and 0 < n < 10**9]
        # RoBERTa and its kin count positions from padding_idx + 1.
        offset = 2 if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert") else 0
        return min(known) - (offset if known and min(known) == limits[0] else 0) if known else None

    def digest(self) -> str:
        """SHA-256 over the names, shapes and contents of all parameters and buffers."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            for start in range(0, flat.numel(), _SHA_BLOCK):
                total.update(flat[start : start + _SHA_BLOCK].numpy())
        return total.hexdigest()

    def takes(self, name: str) -> bool:
        """Whether the model's forward takes an input of this name."""
        if name == str(getattr(self.model, "main_input_name", "")):
            return True
        return name in inspect.signature(self.model.forward).parameters

    def _part(self, auto: type, **options: object) -> Any:
        if self.source is None:
            return None
        try:
            return auto.from_pretrained(  # type: ignore[attr-defined]
                self.source, revision=self.revision, trust_remote_code=self.trust_remote_code, **options
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


def load_model(
    model: str | Path | torch.nn.Module,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """A model ready to be recorded: in evaluation mode, its parameters frozen, on its device.

    A loaded module is taken as it is (device, dtype and implementation aren't touched).

    Raises
    ------
    ModelError
        When there is no such model, or its weights aren't safetensors.
    """
    if isinstance(model, torch.nn.Module):
        name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
        source = name if Path(name).is_dir() else None
        return LoadedModel(model, name, _family_of(model), source=source)
    name = str(model)
    _check_device(device)
    source, architecture = _resolve(name)
    config = _config(name, source, revision, trust_remote_code)
    if architecture is not None:
        config.architectures = [architecture]
    with _one_at_a_time:
        loaded = _weights(name, source, config, dtype, attn_implementation, revision, trust_remote_code)
    unfilled = [n for n, parameter in loaded.named_parameters() if parameter.is_meta]
    if unfilled:
        raise ModelError(
            f"transformers left {unfilled[0]!r} of model {name!r} without values;"
            " is another thread loading a model at the same time?"
        )
    loaded = _on_device(loaded, device).eval()
    for parameter in loaded.parameters():
        parameter.requires_grad_(False)
    return LoadedModel(loaded, name, _family_of(loaded), source, revision, trust_remote_code)


def default_device() -> str:
    """Where a model runs that nobody places elsewhere: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def gpus() -> list[str]:
    """The GPUs of this machine, as devices."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def _check_device(device: str | torch.device | None) -> None:
    """Raise ModelError for a device that torch doesn't know or that isn't here."""
    try:
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {str(device)!r} can't be used: {_first(error)}") from None


def _on_device(model: torch.nn.Module, device: str | torch.device | None) -> torch.nn.Module:
    return model.to(default_device() if device is None else device)


def _family_of(model: torch.nn.Module) -> ModelFamily:
    return find_family(str(getattr(getattr(model, "config", None), "model_type", "")))


def _resolve(name: str) -> tuple[str, str | None]:
    """The folder or hub name behind a model name, and its class where the name chooses one."""
    if name.startswith(carrying.PREFIX):
        try:
            folder, architecture = carrying.locate(name)
        except ValueError as error:
            raise ModelError(str(error)) from None
        return str(folder), architecture
    if name.startswith(EMBEDDED_PREFIX):
        from attnscope.embedded import EMBEDDED_MODELS, embedded_model

        short = name.removeprefix(EMBEDDED_PREFIX)
        if short not in EMBEDDED_MODELS:
            known = ", ".join(EMBEDDED_PREFIX + n for n in EMBEDDED_MODELS)
            raise ModelError(f"unknown model {name!r}; the embedded ones are {known}")
        try:
            return str(embedded_model(short)), None
        except ModuleNotFoundError as error:
            raise ModelError(str(error)) from None
    path = Path(name)
    if path.is_dir():
        _check_folder(path)
        return str(path), None
    if path.exists():
        raise ModelError(f"model {name!r} is a file; name the folder that holds its config.json and safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model folder {name!r} does not exist")
    return name, None


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(f"model folder {str(path)!r} has no config.json")
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise ModelError(
            f"model folder {str(path)!r} holds its weights as pickle ({pickles[0]}), which can run code when loaded;"
            " save them with save_pretrained(), which writes safetensors"
        )
    raise ModelError(f"model folder {str(path)!r} holds no weights: no .safetensors file")


def _config(name: str, source: str, revision: str | None, trust: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        if Path(source).is_dir():
            raise ModelError(f"model folder {name!r} has a config.json that can't be used: {_first(error)}") from None
        raise ModelError(
            f"unknown model {name!r}: no such folder, and the hub did not give it ({_first(error)})"
        ) from None


def _weights(
    name: str,
    source: str,
    config: PreTrainedConfig,
    dtype: str | torch.dtype | None,
    attn_implementation: str | None,
    revision: str | None,
    trust: bool,
) -> torch.nn.Module:
    architectures = getattr(config, "architectures", None) or [""]
    cls = models.class_of(architectures[0], config)
    options: dict[str, object] = {"use_safetensors": True, "revision": revision, "dtype": dtype or "auto"}
    if cls is transformers.AutoModel:
        options["trust_remote_code"] = trust
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        # Each of ViLT's heads loads from one file with all of them, which needs no telling.
        with _without_progress_bars(), _without_notes(_is_ours(name, config)), _drawn_alike():
            return cls.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelError(f"model {name!r} can't be loaded: {_first(error)}") from None
    except Exception as error:  # safetensors raises an exception class of its own, straight from Exception
        if type(error).__name__ == "SafetensorError":
            raise ModelError(f"model {name!r} has a damaged safetensors file: {_first(error)}") from None
        raise


@contextmanager
def _drawn_alike() -> Iterator[None]:
    """What a checkpoint lacks (a pooler, say) is drawn the same each time, so that runs can be resumed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _is_ours(name: str, config: PreTrainedConfig) -> bool:
    return name.startswith(carrying.PREFIX) or hasattr(config, CONFIG_KEY)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def _without_notes(wanted: bool) -> Iterator[None]:
    """Keep transformers from telling about weights that a model has no use for."""
    level = transformers.utils.logging.get_verbosity()
    if wanted:
        transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)


def _first(error: Exception) -> str:
    """The first sentence or line of an error's message."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return (text.splitlines() or [type(error).__name__])[0].rstrip(".")
