"""Models of every library by name, ``[LIBRARY:]NAME``, ready for the commands.

Each is loaded as a module that takes a batch of pictures and returns one tensor: pooled features,
or logits. Libraries are imported when a model of theirs is asked for.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._command import CommandError, one_line, prefer_cache_without_network
from .patch.common.patched_model import PatchedModel, Tower
from .patch.registry import find_tower

__all__ = ["LIBRARIES", "Layout", "Library", "Model", "features", "layout", "logits", "split"]

TIMM_SCHEMES = ("hf-hub", "hf_hub", "local-dir")  # of its own names, which have a colon too
HALF = (0.5, 0.5, 0.5)  # mean and std of pictures where nothing else is known


@dataclass(frozen=True)
class Model:
    """A model in eval mode, and how it wants its pictures.

    Attributes:
        name: as it was asked for; with the tag of its weights, where the library chose them.
        module: takes (B, \\*shape), returns features (B, C) or logits (B, classes).
        shape: of one input: (3, height, width), of a video (frames, 3, height, width).
        patch: pixels a side of which height and width must be multiples; 1 where that is not known.
        data: of its pictures, as ``timm.data.create_loader`` takes it.
        classes: how many classes the logits have; 0 for features.
        own_size: whether it has the input size that its weights were trained with.
        missing: why its weights are random; None if they are not.
    """

    name: str
    module: Any
    shape: tuple[int, ...]
    patch: tuple[int, int] = (1, 1)
    data: dict[str, Any] = field(default_factory=dict)
    classes: int = 0
    own_size: bool = True
    missing: str | None = None

    def images(self, batch_size: int) -> Tensor:
        """Random pictures (B, \\*shape) of the model's dtype and device, the same each time."""
        x = torch.randn(batch_size, *self.shape, generator=torch.Generator().manual_seed(0))
        weight = next(p for p in self.module.parameters() if p.is_floating_point())
        return x.to(weight.device, weight.dtype)


@dataclass(frozen=True)
class Library:
    """What the commands know of a library.

    Attributes:
        prefix: of its models' names.
        package: what must be there to import, ``install`` what pip calls it.
        near: names like a wrong one; raises for names that are none. None if any may be right.
        load: ``load(name, pretrained, img_size, head)`` for features, or with the classifier that
            the library gives the model by default.
        classify: ``classify(name, classes, checkpoint, img_size)`` for logits of these classes.
    """

    prefix: str
    package: str
    install: str
    names: Callable[[], list[str]] | None
    load: Callable[[str, bool, int | None, bool], Model]
    classify: Callable[[str, list[str], Path | None, int | None], Model]

    def require(self) -> None:
        """Refuse to go on without the package."""
        if find_spec(self.package) is None:
            raise CommandError(
                f"models of {self.prefix}: need {self.package}: pip install {self.install}"
            )


def split(spec: str) -> tuple[Library, str]:
    """The library and the name of ``[LIBRARY:]NAME``; without a library it is timm's.

    Raises:
        CommandError: there is no such library, it is not installed, or it has no such model.
    """
    prefix, colon, name = spec.partition(":")
    if not colon or prefix in TIMM_SCHEMES:
        prefix, name = "timm", spec
    library = LIBRARIES.get(prefix)
    if library is None:
        known = ", ".join(f"{each}:NAME" for each in LIBRARIES)
        raise CommandError(f"no library {prefix!r}, of {spec!r}; expected {known}, or timm's NAME")
    library.require()
    if library.names is not None and ":" not in name:
        known_names = library.names()
        if name.partition("/")[0].partition(".")[0] not in known_names:
            from ._supported import is_supported  # which needs this module

            alike = difflib.get_close_matches(name, known_names, n=20)
            near = list(islice((each for each in alike if is_supported(prefix, each)), 3))
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise CommandError(f"{library.prefix} has no model {name!r}{hint}")
    return library, name


def features(
    spec: str, *, pretrained: bool = False, img_size: int | None = None, head: bool = False
) -> Model:
    """A model that returns pooled features.

    Args:
        spec: ``[LIBRARY:]NAME``.
        pretrained: with its weights where they can be had, else random ones: the same each time,
            and ``missing`` says why.
        img_size: side of the input in pixels; None means the model's own.
        head: with the classifier that the library gives it by default.

    Raises:
        CommandError: no such model, or it can't be made.
    """
    library, name = split(spec)
    missing = None
    if pretrained:
        missing = prefer_cache_without_network()
        try:
            return _named(spec, _random(library.load, name, True, img_size, head))
        # Whatever keeps the weights away (no network, none published, a full disk), one can go on
        # without them; a model that can't be made at all fails again here.
        except MissingWeightsError as error:
            missing = str(error)
        except Exception as error:
            missing = missing or f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        model = _random(library.load, name, False, img_size, head)
    except CommandError:
        raise
    except Exception as error:  # libraries and models raise all kinds
        raise CommandError(
            f"{library.prefix} can't make the model {name!r}: {one_line(error)}"
        ) from None
    return _named(spec, replace(model, missing=missing))


def logits(
    spec: str,
    classes: list[str],
    checkpoint: Path | None = None,
    img_size: int | None = None,
) -> Model:
    """A model that returns logits: with its pretrained head, or with weights from a file.

    Args:
        spec: ``[LIBRARY:]NAME``.
        classes: names of the classes. A pretrained head has its own, as many as ``Model.classes``.
        checkpoint: weights for so many classes.
        img_size: side of the input in pixels; None means the model's own.

    Raises:
        CommandError: no such model, or its weights can't be had or don't fit.
    """
    library, name = split(spec)
    if checkpoint is not None and not checkpoint.is_file():
        raise CommandError(f"there is no checkpoint {checkpoint}")
    offline = prefer_cache_without_network() if checkpoint is None else None
    try:
        model = _random(library.classify, name, classes, checkpoint, img_size)
    except CommandError:
        raise
    except Exception as error:  # of the hub, the network, the disk or the library
        if checkpoint is not None:
            size = "the model's own size" if img_size is None else f"{img_size} pixels"
            raise CommandError(
                f"{checkpoint} is no checkpoint of {name!r} with {len(classes)} classes, as many "
                f"as the folder has, for images of {size} (--img-size): {one_line(error)}"
            ) from None
        raise CommandError(
            f"can't load pretrained weights of {name!r} ({offline or one_line(error)}); "
            "give weights of your own with --checkpoint FILE"
        ) from None
    return _named(spec, model)


def smaller(
    model: Model, spec: str, classes: list[str], checkpoint: Path | None, img_size: int
) -> Any:
    """A classifier as :func:`logits` made it, for pictures of another size: its module.

    Raises:
        CommandError: its position embeddings can't be resized.
    """
    if not hasattr(model.module, "set_input_size"):
        return logits(spec, classes, checkpoint, img_size).module
    module = copy.deepcopy(model.module)
    module.set_input_size(img_size=img_size)
    return module


def _random(make: Callable[..., Model], *arguments: Any) -> Model:
    """What ``make`` makes, its random numbers the same each time, and for inference only.

    torch's counter of operations can't follow parameters that are a module's input and want
    gradients, such as the latent of an attention pool.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(*arguments)
    model.module.eval().requires_grad_(False)
    return model


def _named(spec: str, model: Model) -> Model:
    for side, pixels in zip(model.shape[-2:], model.patch, strict=True):
        if side % pixels:
            raise CommandError(f"--img-size: {spec} needs a multiple of {pixels}, got {side}")
    return model if model.name else replace(model, name=spec)


def digest_of(module: nn.Module) -> str:
    """A hash of all weights."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_state(module: nn.Module, checkpoint: Path) -> None:
    """Load a file of weights, all of which must be there and fit."""
    if checkpoint.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: Any = load_file(checkpoint)
    else:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if isinstance(state, dict):  # of training scripts, with the weights under a key
        for key in ("state_dict", "model"):
            state = state.get(key, state)
    if not isinstance(state, dict):
        raise ValueError(f"expected a state dict, got {type(state).__name__}")
    module.load_state_dict(state)


# --- what a model is like -----------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The tokens of a model, as a forward finds them.

    Attributes:
        tokens: N, those that enter the first block.
        prefix: how many of them are no patches.
        grid: rows and columns of the patches of one picture; None where they are no such grid.
        width: C, channels of a token.
        tower: what a host says of the model.
    """

    tokens: int
    prefix: int
    grid: tuple[int, int] | None
    width: int
    tower: Tower


def layout(model: Model) -> Layout:
    """Run a model, which must not be patched, as far as its first block.

    Raises:
        CommandError: it is not supported, or its forward takes no such pictures.
    """
    try:
        tower = find_tower(model.module)
    except ValueError as error:
        raise CommandError(str(error)) from None
    first: Any = tower.blocks[0][0]
    hook = first.register_forward_pre_hook(_stop, with_kwargs=True)
    try:
        with torch.inference_mode():
            model.module(model.images(1))
        raise CommandError(f"{model.name}: a forward does not reach its first block")
    except _Reached as reached:
        _, tokens, width = reached.shape
    except (AssertionError, RuntimeError, ValueError) as error:
        raise CommandError(
            f"{model.name} takes no input of {tuple(model.shape)}: {one_line(error)}"
        ) from None
    finally:
        hook.remove()
    prefix = tower.num_prefix_tokens
    grid = _grid(tokens - prefix, model.shape) if len(model.shape) == 3 else None
    return Layout(tokens, prefix, grid, width, tower)


class _Reached(Exception):  # noqa: N818  (no error)
    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


def _stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    raise _Reached(x.shape)


def _grid(patches: int, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns, of the picture's proportions."""
    _, height, width = shape
    rows = math.isqrt(patches * height // width)
    if (
        rows
        and patches % rows == 0
        and abs(rows * width - patches // rows * height) < max(height, width)
    ):
        return rows, patches // rows
    return None


# --- timm ---------------------------------------------------------------------------------------


def _timm_names() -> list[str]:
    import timm

    names: list[str] = timm.list_models()
    return names


def _timm_model(module: Any, img_size: int | None, classes: int = 0) -> Model:
    from timm.data import resolve_model_data_config

    data = resolve_model_data_config(module, args={"img_size": img_size})
    embed: Any = getattr(module, "patch_embed", None)
    size = getattr(embed, "img_size", None) or data["input_size"][1:]
    ratio = embed.feat_ratio(as_scalar=False) if hasattr(embed, "feat_ratio") else (1, 1)
    own = tuple(module.pretrained_cfg["input_size"])
    shape = (own[0], *size) if img_size is None else (own[0], img_size, img_size)
    return Model("", module, shape, tuple(ratio), data, classes, own == tuple(data["input_size"]))


def _timm_load(name: str, pretrained: bool, img_size: int | None, head: bool) -> Model:
    import timm

    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if not head:
        options["num_classes"] = 0
    module = timm.create_model(name, pretrained=pretrained, **options)
    return _timm_model(module, img_size)


def _timm_classify(
    name: str, classes: list[str], checkpoint: Path | None, img_size: int | None
) -> Model:
    import timm

    if checkpoint is None:
        module: Any = timm.create_model(name, pretrained=True, img_size=img_size)
        tag = module.pretrained_cfg.get("tag")
        full = f"{name}.{tag}" if tag and "." not in name and ":" not in name else name
        return replace(_timm_model(module, img_size, module.num_classes), name=full)
    try:
        module = timm.create_model(
            name, pretrained=False, num_classes=len(classes), img_size=img_size
        )
    except Exception as error:
        raise CommandError(f"timm can't make the model {name!r}: {error}") from None
    # Nothing but weights: timm 1.0.20 to 1.0.25 would run code from the file by default.
    timm.models.load_checkpoint(module, str(checkpoint), weights_only=True)
    return _timm_model(module, img_size, len(classes))


# --- torchvision --------------------------------------------------------------------------------


def _torchvision_names() -> list[str]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _torchvision_make(
    name: str, pretrained: bool, img_size: int | None, classes: int | None = None
) -> Model:
    import torchvision

    options: dict[str, Any] = {} if img_size is None else {"image_size": img_size}
    if classes is not None:
        options["num_classes"] = classes
    weights = torchvision.models.get_model_weights(name).DEFAULT
    if pretrained:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        offline = None if cached.exists() else prefer_cache_without_network()
        if offline is not None:
            raise OSError(offline)
        options["weights"] = weights
    module = torchvision.models.get_model(name, **options)
    preset = weights.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    own = getattr(module, "image_size", crop)
    side = img_size or own
    data = {
        "input_size": (3, side, side),
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "crop_pct": crop / resize,
        "crop_mode": "center",
    }
    patch = getattr(module, "patch_size", 1)
    number = module.heads.head.out_features if hasattr(module, "heads") else 0
    return Model("", module, (3, side, side), (patch, patch), data, number, side == crop)


def _torchvision_load(name: str, pretrained: bool, img_size: int | None, head: bool) -> Model:
    model = _torchvision_make(name, pretrained, img_size)
    if not head and hasattr(model.module, "heads"):
        model.module.heads = nn.Identity()
    return replace(model, classes=0)


def _torchvision_classify(
    name: str, classes: list[str], checkpoint: Path | None, img_size: int | None
) -> Model:
    if checkpoint is None:
        return _torchvision_make(name, True, img_size)
    model = _torchvision_make(name, False, img_size, len(classes))
    _load_state(model.module, checkpoint)
    return model


# --- OpenCLIP -----------------------------------------------------------------------------------


class _First(nn.Module):
    """An image tower of OpenCLIP, without the tokens that it may return besides."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, x: Tensor) -> Tensor:
        out = self.visual(x)
        pooled: Tensor = out[0] if isinstance(out, tuple) else out
        return pooled


class _ZeroShot(nn.Module):
    """Logits: how much the picture is like the text of each class, (B, classes)."""

    texts: Tensor

    def __init__(self, visual: nn.Module, texts: Tensor) -> None:
        super().__init__()
        self.pictures = _First(visual)
        self.register_buffer("texts", texts)

    def forward(self, x: Tensor) -> Tensor:
        return 100 * nn.functional.normalize(self.pictures(x), dim=-1) @ self.texts


def _open_clip_names() -> list[str]:
    import open_clip

    names: list[str] = open_clip.list_models()
    return names


def _open_clip_parts(name: str) -> tuple[str, str | None]:
    """The model and its weights: ``NAME/TAG``, or the first tag that OpenCLIP lists for it."""
    import open_clip

    name, _, tag = name.partition("/")
    tags = open_clip.list_pretrained_tags_by_model(name)
    return name, tag or (tags[0] if tags else None)


def _open_clip_model(
    module: nn.Module, visual: Any, preprocess: dict[str, Any], full: str, classes: int = 0
) -> Model:
    size = visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    data = {
        "input_size": (3, height, width),
        "interpolation": preprocess.get("interpolation", "bicubic"),
        "mean": tuple(preprocess["mean"]),
        "std": tuple(preprocess["std"]),
        "crop_pct": 1.0,
        "crop_mode": "squash" if preprocess.get("resize_mode") == "squash" else "center",
    }
    patch = getattr(visual, "patch_size", (1, 1))
    return Model(full, module, (3, height, width), tuple(patch), data, classes)


def _open_clip_load(name: str, pretrained: bool, img_size: int | None, head: bool) -> Model:
    import open_clip
    from open_clip.model import _build_vision_tower

    name, tag = _open_clip_parts(name)
    if pretrained:
        if tag is None:
            raise CommandError(f"OpenCLIP lists no weights of {name}")
        clip = open_clip.create_model(name, pretrained=tag, force_image_size=img_size)
        preprocess = open_clip.get_model_preprocess_cfg(clip)
        full = f"open_clip:{name}/{tag}"
        return _open_clip_model(_First(clip.visual), clip.visual, preprocess, full)
    config = open_clip.get_model_config(name)
    tower = dict(config["vision_cfg"], timm_model_pretrained=False)
    if img_size is not None:
        tower["image_size"] = img_size
    # Without the text tower, whose config may be on the hub.
    visual = _build_vision_tower(config["embed_dim"], tower, config.get("quick_gelu", False))
    preprocess = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        **open_clip.get_pretrained_cfg(name, tag or ""),
    }
    return _open_clip_model(_First(visual), visual, preprocess, "")


def _open_clip_classify(
    name: str, classes: list[str], checkpoint: Path | None, img_size: int | None
) -> Model:
    import open_clip

    name, tag = _open_clip_parts(name)
    weights = tag if checkpoint is None else str(checkpoint)
    if weights is None:
        raise CommandError(f"OpenCLIP lists no weights of {name}; give some with --checkpoint FILE")
    clip = open_clip.create_model(
        name, pretrained=weights, force_image_size=img_size, output_dict=False
    ).eval()
    with torch.inference_mode():
        texts = open_clip.build_zero_shot_classifier(
            clip,
            open_clip.get_tokenizer(name),
            _words(classes),
            open_clip.OPENAI_IMAGENET_TEMPLATES,
            num_classes_per_batch=10,
        )
    module = _ZeroShot(clip.visual, texts.clone())
    full = f"open_clip:{name}" + ("" if checkpoint else f"/{tag}")
    preprocess = open_clip.get_model_preprocess_cfg(clip)
    return _open_clip_model(module, clip.visual, preprocess, full, len(classes))


def _words(classes: list[str]) -> list[str]:
    """Names of classes in words: those of ImageNet in place of its numbers."""
    import open_clip
    from timm.data import ImageNetInfo

    if classes == list(ImageNetInfo("imagenet-1k").label_names()):
        names: list[str] = open_clip.IMAGENET_CLASSNAMES
        return names
    return [name.replace("_", " ") for name in classes]


# --- Transformers -------------------------------------------------------------------------------


class _Output(nn.Module):
    """A model of Transformers that takes pictures and returns features or logits.

    ``projection`` is that of a model of pictures and texts, from the pooled output to features that
    both share; ``pooled`` whether the model's pooler, if it has one, has weights of its own.
    """

    def __init__(
        self, model: Any, class_token: bool, projection: nn.Module | None, pooled: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.projection = projection
        self.class_token = class_token
        self.kind = model.config.model_type
        self.names = ("logits", "image_embeds", *(("pooler_output",) if pooled else ()))

    def forward(self, x: Tensor) -> Tensor:
        inputs: dict[str, Any] = {}
        if self.kind == "vjepa2" and not hasattr(self.model, "classifier"):
            inputs["skip_predictor"] = True
        if self.kind.startswith("siglip2"):  # pictures cut into patches, which may be padded
            x, inputs = _patches(x, self.model.config)
        out = self.model(x, **inputs)
        for name in self.names:
            found: Tensor | None = getattr(out, name, None)
            if found is not None:
                return found if self.projection is None else self.projection(found)
        x = out.last_hidden_state
        if self.class_token:
            return x[:, 0]
        if isinstance(self, PatchedModel) and not torch.compiler.is_compiling():
            tokens = self.tome  # each counts as often as it stands for one
            if tokens is not None and tokens.fit(x):
                x = tokens.unmerge(x)
        return x.mean(1)


def _patches(x: Tensor, config: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures (B, 3, H, W) as SigLIP 2 takes them: (B, P, p * p * 3), and what goes with that."""
    side = _vision(config).patch_size
    rows, columns = x.shape[-2] // side, x.shape[-1] // side
    cut = x.unflatten(3, (columns, side)).unflatten(2, (rows, side))  # (B, 3, rows, p, columns, p)
    cut = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shown = torch.ones(cut.shape[:2], dtype=torch.int64, device=x.device)
    shapes = torch.tensor([[rows, columns]], device=x.device).expand(len(x), 2)
    return cut, {"pixel_attention_mask": shown, "spatial_shapes": shapes}


def _vision(config: Any) -> Any:
    """The part of a config that says what the vision tower is."""
    return getattr(config, "vision_config", config)


def _hf_config(name: str, img_size: int | None) -> Any:
    from huggingface_hub import constants
    from transformers import AutoConfig

    if not Path(name).is_dir():
        prefer_cache_without_network()
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=constants.HF_HUB_OFFLINE)
    except Exception as error:
        raise CommandError(
            f"hf:{name}: expected a folder that save_pretrained has written, or a model of the "
            f"hub, got no config: {one_line(error)}"
        ) from None
    if img_size is not None:
        vision = _vision(config)
        key = "crop_size" if hasattr(vision, "crop_size") else "image_size"
        if not hasattr(vision, key):
            raise CommandError(f"--img-size: {config.model_type} has no image size in its config")
        own = getattr(vision, key)
        setattr(vision, key, img_size if isinstance(own, int) else [img_size, img_size])
    return config


def _hf_shape(config: Any) -> tuple[int, ...]:
    vision = _vision(config)
    size = getattr(vision, "crop_size", None) or getattr(vision, "image_size", None)
    if size is None:  # SigLIP 2 knows how many patches there are at most
        size = math.isqrt(vision.num_patches) * vision.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    frames = getattr(vision, "num_frames", None) or getattr(vision, "frames_per_clip", None)
    shape = (vision.num_channels if hasattr(vision, "num_channels") else 3, height, width)
    return shape if frames is None else (frames, *shape)


def _hf_data(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the image processor beside the weights says, if there is one."""
    from huggingface_hub import constants
    from transformers import AutoImageProcessor

    data = {
        "input_size": shape[-3:],
        "interpolation": "bicubic",
        "mean": HALF,
        "std": HALF,
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    try:
        found = AutoImageProcessor.from_pretrained(name, local_files_only=constants.HF_HUB_OFFLINE)
        said = found.to_dict()
    except Exception:  # there is none, or it is of another kind
        return data
    if said.get("do_normalize", True) and said.get("image_mean"):
        data["mean"], data["std"] = tuple(said["image_mean"]), tuple(said["image_std"])
    resample = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    data["interpolation"] = resample.get(int(said.get("resample") or 3), "bicubic")
    resized = dict(said.get("size") or {})
    shortest = resized.get("shortest_edge")
    if said.get("do_center_crop") and shortest:
        data["crop_pct"] = shape[-1] / shortest
    elif "height" in resized:
        data["crop_mode"] = "squash"
    return data


def _hf_pretrained(cls: Any, name: str, config: Any) -> tuple[Any, list[str]]:
    """A model with the weights of a folder or of the hub, and the names of those it lacks.

    Transformers makes those up. They may be of parts that are not used, such as the texts' tower.
    """
    from huggingface_hub import constants

    module, info = cls.from_pretrained(
        name, config=config, local_files_only=constants.HF_HUB_OFFLINE, output_loading_info=True
    )
    return module, sorted(info["missing_keys"])


class MissingWeightsError(CommandError):
    """A checkpoint lacks weights that the model's answer depends on."""


def _hf_model(
    module: Any, name: str, config: Any, classes: int = 0, missing: Sequence[str] = ()
) -> Model:
    try:
        tower = find_tower(module)
    except ValueError as error:
        raise CommandError(str(error)) from None
    projection = None
    # What masks pictures, and predicts what is masked, is for training.
    missing = [
        key
        for key in missing
        if not key.endswith("mask_token") and not key.startswith("predictor.")
    ]
    if not classes and hasattr(config, "vision_config"):
        projection = getattr(module, "visual_projection", None)
        (path,) = (path for path, part in module.named_modules() if part is tower.module)
        parts = (f"{path}." if path else "", "visual_projection.")
        missing = [key for key in missing if key.startswith(parts)]
        module = tower.module  # what is beside it takes text
    # A classifier's checkpoint has no pooler; what its own logits need is no such extra.
    of_pooler = [key for key in missing if not classes and "pooler" in key.split(".")]
    needed = missing if projection is not None else [key for key in missing if key not in of_pooler]
    if needed:
        raise MissingWeightsError(
            f"hf:{name}: expected weights for all that is used of {type(module).__name__}, got "
            f"none for {len(needed)} of its tensors, such as {needed[0]}; they would be random"
        )
    shape = _hf_shape(config)
    patch = getattr(_vision(config), "patch_size", 1)
    height, width = (patch, patch) if isinstance(patch, int) else patch[-2:]
    wrapped = _Output(module, tower.class_token, projection, pooled=not of_pooler)
    return Model("", wrapped, shape, (height, width), _hf_data(name, shape), classes)


def _hf_load(name: str, pretrained: bool, img_size: int | None, head: bool) -> Model:
    import transformers

    config = _hf_config(name, img_size)
    auto: Any = transformers.AutoModel
    # AutoModel lacks some vision towers that are there alone, and the projection of others; their
    # class is in the config.
    own = (config.architectures or ("",))[0]
    mapped = type(config) in transformers.MODEL_MAPPING and not own.endswith("WithProjection")
    known = mapped or not own
    cls = auto if known else getattr(transformers, own)
    missing: list[str] = []
    if pretrained:
        module, missing = _hf_pretrained(cls, name, config)
    else:
        module = auto.from_config(config) if known else cls(config)
    return _hf_model(module, name, config, missing=missing)


def _hf_classify(
    name: str, classes: list[str], checkpoint: Path | None, img_size: int | None
) -> Model:
    from transformers import AutoModelForImageClassification

    config = _hf_config(name, img_size)
    missing: list[str] = []
    if len(_hf_shape(config)) == 4:
        raise CommandError(f"hf:{name} takes videos, and eval reads pictures")
    if checkpoint is not None:
        config.num_labels = len(classes)
        module = AutoModelForImageClassification.from_config(config)
        _load_state(module, checkpoint)
    elif any(str(each).endswith("Classification") for each in config.architectures or ()):
        module, missing = _hf_pretrained(AutoModelForImageClassification, name, config)
    else:
        raise CommandError(
            f"hf:{name} was not trained for classes ({', '.join(config.architectures or ())}); "
            "give weights of an image classifier with --checkpoint FILE"
        )
    return _hf_model(module, name, config, config.num_labels, missing)


LIBRARIES = {
    library.prefix: library
    for library in (
        Library("timm", "timm", "timm", _timm_names, _timm_load, _timm_classify),
        Library("hf", "transformers", "transformers", None, _hf_load, _hf_classify),
        Library(
            "torchvision", "torchvision", "torchvision",
            _torchvision_names, _torchvision_load, _torchvision_classify,
        ),
        Library(
            "open_clip", "open_clip", "open_clip_torch",
            _open_clip_names, _open_clip_load, _open_clip_classify,
        ),
    )
}  # fmt: skip
