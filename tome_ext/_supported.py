"""``tome-ext models``: what is supported, with tokens, a suggested r and the operations it saves.

Models are made on the meta device with a single block, which has everything that the figures depend
on but the number of blocks; that is what the library would have been asked for.
"""

from __future__ import annotations

import fnmatch
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import _models
from ._command import CommandError, one_line
from .patch.common.methods import ToMe
from .patch.registry import HOSTS

__all__ = ["Supported", "expand", "is_supported", "run", "suggested_r"]

SIGNS = "*?["  # what makes a pattern of a name
SHARE = 0.8  # of the patch tokens that the suggested r removes at most, over all blocks


@dataclass(frozen=True)
class Supported:
    """A model that the patch takes.

    Attributes:
        name: as ``--model`` takes it; of Transformers the class of a tower, whose other figures are
            those of its default config.
        tokens: N, those that enter the first block.
        blocks: how many there are.
        r: a suggestion, see :func:`suggested_r`.
        saved: share of the blocks' operations that this r saves.
    """

    name: str
    tokens: int
    blocks: int
    r: int
    saved: float


def suggested_r(patches: int, blocks: int) -> int:
    """The largest r that removes at most 80% of the patch tokens, over all blocks; at least 1.

    That is 13 for 196 patches and 12 blocks, the paper's choice for ViT-S/16 and ViT-B/16.
    """
    return max(1, int(SHARE * patches) // blocks)


def run(pattern: str | None, as_json: bool) -> list[Supported]:
    """Print the models whose name has the pattern in it, or matches it, as a table or as JSON.

    Raises:
        CommandError: there are none.
    """
    prefix, colon, rest = (pattern or "").partition(":")
    if colon and prefix not in _models.LIBRARIES:
        raise CommandError(
            f"no library {prefix!r}; expected one of {', '.join(_models.LIBRARIES)}, got {pattern}"
        )
    wanted = _matcher(rest if colon else prefix)
    rows: list[Supported] = []
    missing = []
    for name, library in _models.LIBRARIES.items():
        if colon and name != prefix:
            continue
        if find_spec(library.package) is None:
            missing.append(f"models of {name} need pip install {library.install}")
            continue
        rows += FINDERS[name](wanted)
    if not rows:
        why = f" ({'; '.join(missing)})" if missing else ""
        raise CommandError(f"no supported model has {pattern!r} in its name{why}")
    print(json.dumps([asdict(row) for row in rows], indent=2) if as_json else table(rows, missing))
    return rows


def expand(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of models, those with * or ? as all that match and can be patched.

    Raises:
        CommandError: none matches, or the library's names are not known.
    """
    found: list[str] = []
    for name in names:
        if not any(sign in name for sign in SIGNS):
            found.append(name)
            continue
        prefix, colon, pattern = name.partition(":")
        if not colon:
            prefix, pattern = "timm", name
        if prefix not in _models.LIBRARIES or prefix == "hf":
            raise CommandError(
                f"{name}: expected * and ? in names of timm, torchvision: or open_clip:"
            )
        _models.LIBRARIES[prefix].require()
        matching = [row.name for row in FINDERS[prefix](_matcher(pattern))]
        if not matching:
            raise CommandError(f"no supported model matches {name!r}")
        found += matching
    return tuple(dict.fromkeys(found))


def is_supported(prefix: str, name: str) -> bool:
    """Whether the library's model of that name can be patched."""
    return any(True for _ in FINDERS[prefix](lambda each: each == name))


def _matcher(pattern: str) -> Callable[[str], bool]:
    if any(sign in pattern for sign in SIGNS):
        return lambda name: fnmatch.fnmatch(name, pattern)
    return lambda name: pattern.lower() in name.lower()


def table(rows: list[Supported], missing: list[str]) -> str:
    """The rows as text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'model':{width}}  {'tokens':>6}  {'blocks':>6}  {'r':>4}  saves"]
    lines += [
        f"{row.name:{width}}  {row.tokens:>6}  {row.blocks:>6}  {row.r:>4}  {row.saved:>5.0%}"
        for row in rows
    ]
    lines += [
        "",
        f"r: the largest that removes at most {SHARE:.0%} of the patch tokens over all blocks",
        "saves: share of the operations in attention and MLP of all blocks",
        "hf:CLASS: with its default config; --model takes a folder or a model of the hub",
    ]
    return "\n".join([*lines, *missing])


# --- figures ------------------------------------------------------------------------------------


def described(name: str, model: _models.Model, blocks: int | None) -> Supported | None:
    """The figures of a model with that many blocks, None for its own; None if unsupported."""
    try:
        layout = _models.layout(model)
    except CommandError:
        return None
    depth = blocks or len(layout.tower.blocks)
    r = suggested_r(layout.tokens - layout.prefix, depth)
    return Supported(name, layout.tokens, depth, r, saved(layout, depth, r))


def saved(layout: _models.Layout, blocks: int, r: int) -> float:
    """Share of the operations in attention and MLP that r saves, counted from shapes.

    A block of N tokens, M of which are left, has 2 N operations for each weight of its attention,
    4 N^2 C for its attention matrix, and 2 M for each other weight.
    """
    block, mixin = layout.tower.blocks[0]
    names = layout.tower.block_attributes.get("_tome_names") or mixin._tome_names
    attn = block._modules.get(names.attn)
    if attn is not None:
        before = _weights(attn)
    else:  # attentions side by side; or one block without parts, which merges at its end
        inside = {id(part) for part in block.modules()}
        parts = [part for part, *_ in layout.tower.others if id(part) in inside]
        before = sum(map(_weights, parts)) if parts else _weights(block)
    after = _weights(block) - before

    def operations(r: int) -> int:
        total, count = 0, layout.tokens
        for _ in range(blocks):
            total += 2 * count * before + 4 * count * count * layout.width
            count = ToMe().tokens_after(count, layout.prefix, r, None)
            total += 2 * count * after
        return total

    return 1 - operations(r) / operations(0)


def _weights(module: nn.Module) -> int:
    """The number of weights that each token is multiplied by."""
    return sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if parameter.dim() == 2 and "bias" not in name
    )


# --- timm ---------------------------------------------------------------------------------------


class _Asked(Exception):  # noqa: N818  (no error)
    pass


class _RatesOnCpu(TorchFunctionMode):
    """On the meta device, ``torch.linspace`` without a device is made on the CPU.

    timm up to 1.0.20 reads the rates of its stochastic depth from one, number by number.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs = {"device": "cpu", **kwargs}
        return func(*args, **kwargs)


def _timm_short(name: str, **options: Any) -> tuple[Any, int | None]:
    """A timm model on the meta device with one block, and how many it should have.

    None as the number if the model has all of its blocks.
    """
    import timm

    with torch.device("meta"), _RatesOnCpu():
        try:
            module: Any = timm.create_model(name, depth=1, **options)
        except Exception:  # one that is not made like that
            return timm.create_model(name, **options), None
        cls = type(module)

        def asked(self: Any, *args: Any, **given: Any) -> None:
            raise _Asked(given)

        default = inspect.signature(cls.__init__).parameters.get("depth")
        with mock.patch.object(cls, "__init__", asked):
            try:
                timm.create_model(name, **options)
            except _Asked as found:
                given = found.args[0]
                depth = getattr(given.get("cfg"), "depth", None) or given.get("depth")
                if depth is None and default is not None:
                    depth = default.default
                if isinstance(depth, int):
                    return module, depth
        return timm.create_model(name, **options), None


def _timm_candidates() -> list[str]:
    """Names of models that may be supported: by what the module that makes them knows."""
    import timm

    host = import_module("tome_ext.patch.hosts.timm")
    classes = {family.classes[0] for family in getattr(host, "FAMILIES", ())}
    found = []
    for name in timm.list_models():
        module = inspect.getmodule(timm.models.model_entrypoint(name))
        if any(hasattr(module, cls) for cls in classes):
            found.append(name)
    return found


def _timm(wanted: Callable[[str], bool]) -> Iterator[Supported]:
    for name in _timm_candidates():
        if wanted(name):
            row = _timm_row(name, name, None)
            if row is not None:
                yield row


def _timm_row(shown: str, name: str, img_size: int | None) -> Supported | None:
    options = {"num_classes": 0} if img_size is None else {"num_classes": 0, "img_size": img_size}
    try:
        module, depth = _timm_short(name, **options)
    except Exception:  # needs what is not there, such as a backbone of a name
        return None
    return described(shown, _models._timm_model(module.eval(), img_size), depth)


# --- other libraries ----------------------------------------------------------------------------


def _torchvision(wanted: Callable[[str], bool]) -> Iterator[Supported]:
    import torchvision

    for name in _models._torchvision_names():
        builder = torchvision.models.get_model_builder(name)
        if builder.__module__.endswith(".vision_transformer") and wanted(name):
            with torch.device("meta"):
                model = _models._torchvision_load(name, False, None, False)
            model.module.eval()
            row = described(f"torchvision:{name}", model, None)
            if row is not None:
                yield row


def _open_clip(wanted: Callable[[str], bool]) -> Iterator[Supported]:
    import open_clip

    host = HOSTS.get("open_clip")
    towers = set(_timm_candidates()) if host is not None and find_spec("timm") else set()
    for name in _models._open_clip_names():
        if host is None or not wanted(name):
            continue
        tower = open_clip.get_model_config(name)["vision_cfg"]
        inner = tower.get("timm_model_name")
        row = None
        if inner in towers:
            row = _timm_row(f"open_clip:{name}", inner, tower["image_size"])
        elif inner is None and isinstance(tower["layers"], int):
            one_layer = mock.patch.object(open_clip, "get_model_config", _one_layer(name))
            with one_layer, torch.device("meta"):
                model = _models._open_clip_load(name, False, None, False)
            model.module.eval()
            row = described(f"open_clip:{name}", model, tower["layers"])
        if row is not None:
            yield row


def _one_layer(name: str) -> Callable[[str], Any]:
    import open_clip

    config = open_clip.get_model_config(name)
    return lambda _: {**config, "vision_cfg": {**config["vision_cfg"], "layers": 1}}


def _hf(wanted: Callable[[str], bool]) -> Iterator[Supported]:
    if "transformers" not in HOSTS:
        return
    host: Any = import_module("tome_ext.patch.hosts.transformers")
    for family in host.FAMILIES:
        cls = next(iter(family.towers))
        if not wanted(cls):
            continue
        tower: Any = getattr(import_module(family.module), cls)
        config = tower.config_class()
        depth = config.num_hidden_layers
        config.num_hidden_layers = 1
        row = None
        for device in ("meta", "cpu"):  # some forwards read numbers from their input
            try:
                with torch.device(device):
                    model = _models._hf_model(tower(config), "", config)
            except Exception as error:  # a default config that makes no model
                raise CommandError(f"{cls}: {one_line(error)}") from None
            model.module.eval()
            row = described(f"hf:{cls}", model, depth)
            if row is not None:
                break
        if row is not None:
            yield row


FINDERS: dict[str, Callable[[Callable[[str], bool]], Iterator[Supported]]] = {
    "timm": _timm,
    "hf": _hf,
    "torchvision": _torchvision,
    "open_clip": _open_clip,
}
