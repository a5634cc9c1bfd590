"""Patches that make models of other libraries merge tokens.

``common`` is what every patch shares, and knows no library; each library has one file in ``hosts``,
which says where its blocks are and what they are called; ``registry`` finds the library of a model.
A library is imported only when a model of it is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..schedule import KeepRate, Schedule, Threshold
from ..setting import Setting
from .common.methods import MethodName, make_method
from .common.patched_model import PatchedModel, Tower, find, patch_model, remove
from .common.rules import Settings
from .common.token_state import Tokens
from .registry import HOSTS, Host, find_tower, register

__all__ = [
    "Host",
    "Tokens",
    "auto",
    "find",
    "open_clip",
    "register",
    "remove",
    "timm",
    "torchvision",
    "transformers",
]


def auto(
    model: nn.Module,
    r: Schedule = 0,
    prop_attn: bool = True,
    trace_source: bool = False,
    *,
    method: MethodName = "tome",
    keep_rate: KeepRate | None = None,
    threshold: Threshold | None = None,
    normalize_fused: bool = False,
    fused_weight_grad: bool = False,
    restore_tokens: bool = False,
    inference: bool = False,
    host: str | None = None,
    setting: Setting | str | Path | None = None,
) -> Any:
    """Patch a Vision Transformer, so that its blocks go on with fewer tokens.

    Each block reduces its tokens between attention and MLP, by one of four methods:

    - "tome" merges similar tokens (Bolya et al., *Token Merging: Your ViT But Faster*, ICLR 2023;
      arXiv 2210.09461); the metric is the mean of the keys over heads.
    - "guided" merges as "tome" does, but compares tokens in place of keys, and of the pairs found
      merges those that change the answer least: the cost of :func:`tome_ext.match` with sizes and,
      where there is a class token, its attention to the power of 0.75 as importance. Merged tokens
      keep the mean length of those that make them. Its answers are nearer to those of the unpatched
      model than those of "tome", for about 2% more time on a CPU; docs/fidelity.md has the figures.
    - "topk" keeps the patch tokens that the class token attends to most, on average over heads, and
      drops the others. Those that stay keep their order.
    - "evit" does so too, but fuses the others into one token, at the end: the sum of their
      features, weighted by the class token's attention (Liang et al., *Not All Patches are What You
      Need*, ICLR 2022; arXiv 2202.07800). In later blocks it is a patch token like any other.

    The model is changed in place: it keeps its parameters, hooks, ``state_dict`` and the names of
    its classes. With ``r=0`` it computes what it did before. ``model.r``,
    ``model.keep_rate`` and ``model.threshold`` change later how many tokens go; a forward keeps to
    those that it began with. Through a wrapper they are reached by
    ``tome_ext.patch.find(wrapper).r``.

    The model returns merged tokens (B, M, C); ``model.tome`` has their sizes and their plan, and
    ``model.tome.unmerge`` spreads them. Feature maps have their usual shape: in them, merged tokens
    share their value and dropped ones are 0. Average pooling and attention pooling weight merged
    tokens by size, as if over the original tokens; after pruning they are over the tokens that are
    left. Tokens that a mask hides merge with none, and are dropped by the first layer that merges:
    a model that averages over hidden tokens too no longer does.

    In blocks that reduce tokens, and in those behind them, no attention matrix is built, whatever
    the model's settings say: ``torch.ops.tome.attention`` computes attention, or
    ``F.scaled_dot_product_attention`` where that cannot (attention dropout while training, masks
    that do more than hide keys); ``tome_ext.info(model)`` says which and why. Hooks on modules that
    would see the matrix do not run there.

    Args:
        model: a model of a supported library, or one that contains exactly one such model. If it is
            patched already, its settings are replaced.
        r: tokens to remove per layer: an int, ``(r, inflection)`` or a list; see
            :func:`tome_ext.schedule.parse_r`.
        prop_attn: add log(size) of each key token to the logits (proportional attention). The
            paper finds it better for models trained with labels, worse for MAE off the shelf. Only
            "tome" and "guided" have sizes.
        trace_source: fill ``model._tome_info["source"]``, as code written for the published
            patch expects. New code uses ``model.tome.plan``, which is there in any case.
        method: "tome", "guided", "evit" or "topk", as above. The last two need a class token.
        keep_rate: instead of ``r``, the share of patch tokens to keep, rounded up: a float for the
            layers after a quarter, a half and three quarters of the model (4, 7 and 10 of 12), or a
            list with one per layer; see :func:`tome_ext.schedule.parse_keep_rate`. EViT's fused
            token comes on top, whereas ``r`` counts it: there r + 1 tokens become one.
        threshold: instead of ``r``, the cosine similarity from which on tokens merge, a number for
            all layers or a list with one (or None) per layer; see
            :func:`tome_ext.schedule.parse_threshold`. So each image keeps as many tokens as it
            needs. In a batch the images with fewer than others end in rows of size 0, which
            attention and pools pass over; so it is B = 1, or images that are alike, that gain most.
            A layer merges half of its tokens at most. For "guided" it is the cost of a pair that
            decides, as of one of that similarity whose sizes are 1 and whose importance is that of
            the mean attention. Only "tome" and "guided"; not to be exported, and on a GPU each
            layer waits for the number of its rows.
        normalize_fused: of "evit", divide the weights by their sum, so that the fused token is a
            mean. Published models are trained without.
        fused_weight_grad: of "evit", let gradients flow through the weights, as the published code
            does in training.
        restore_tokens: return tokens at their full number, each merged one as often as it counts,
            for whatever reads them as a grid. With methods that prune, dropped tokens are zeros
            then, for pools too.
        inference: promise that the model is only run without gradients. Each block then computes
            the first norm of the next one together with its own last sum, in one pass over the
            tokens instead of three, where nothing observes or changes the modules in between. The
            results differ in rounding from those with gradients, which are still right if they are
            asked for after all. Hooks on a block observe it; Transformers leaves some on every
            block when ``output_hidden_states`` is first asked for. Under ``torch.inference_mode``,
            where torch does not count changes, nothing but hooks may change tokens in place between
            two blocks.
        host: the library, where it should not be found by the model's class: a name of
            :data:`tome_ext.patch.registry.HOSTS`.
        setting: what :func:`tome_ext.tune` has found for this model, or the file it was saved as:
            it says ``r``, ``method`` and what the method has besides (``prop_attn``,
            ``normalize_fused``), which must not be given then. If a forward begins with another
            number of tokens than it was found for, that is a warning.

    Returns:
        The model. As a context manager it removes the patch at the end:
        ``with tome_ext.patch.auto(model, r=8): ...``.

    Raises:
        ValueError: the model or a block is of a kind that is not supported (the message names
            it), or a setting is wrong; or ``setting`` is of a model with another number of layers.
            Nothing is changed.
        OSError: the file of ``setting`` can't be read.
        ImportError: the library is not installed, or too old.
    """
    if host is not None and (not isinstance(host, str) or host not in HOSTS):
        raise ValueError(f"host: expected one of {sorted(HOSTS)}, got {host!r}")
    find: Callable[[nn.Module], Tower]
    find = find_tower if host is None else HOSTS[host].find_tower
    options: dict[str, Any] = {
        "prop_attn": prop_attn,
        "normalize_fused": normalize_fused,
        "fused_weight_grad": fused_weight_grad,
    }
    for_tokens = None
    if setting is not None:
        given = {
            "r": not (isinstance(r, int) and r == 0),
            "method": method != "tome",
            "keep_rate": keep_rate is not None,
            "threshold": threshold is not None,
            "prop_attn": prop_attn is not True,
            "normalize_fused": normalize_fused is not False,
        }
        if any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise ValueError(f"expected setting or {names}, got both: the setting says them")
        setting = setting if isinstance(setting, Setting) else Setting.load(setting)
        r, method, for_tokens = list(setting.r), setting.method, setting.tokens  # type: ignore[assignment]
        options.update(setting.options)
        find = _checked(find, model, setting)
    settings = Settings(
        make_method(method, **options),
        r,
        keep_rate,
        threshold,
        trace_source,
        restore_tokens,
        inference,
        for_tokens,
    )
    return patch_model(model, find, settings)


def _checked(
    find: Callable[[nn.Module], Tower], model: nn.Module, setting: Setting
) -> Callable[[nn.Module], Tower]:
    """``find`` for models with as many layers as a setting is for.

    Raises:
        ValueError: ``model`` is patched, and has another number.
    """

    def check(layers: int) -> None:
        if layers != setting.layers:
            raise ValueError(
                f"setting: expected one for a model of {layers} layers, got one for "
                f"{setting.layers} ({setting.model})"
            )

    def find_checked(model: nn.Module) -> Tower:
        tower = find(model)
        check(len(tower.blocks))
        return tower

    if isinstance(model, PatchedModel):
        check(len(model._tome.rules.layers))
    return find_checked


def timm(
    model: nn.Module,
    r: Schedule = 0,
    prop_attn: bool = True,
    trace_source: bool = False,
    **settings: Any,
) -> Any:
    """:func:`auto` for a model of timm (vit, deit, dinov2, dinov3, siglip, eva02, naflexvit, ...).

    Takes a ``VisionTransformer``, ``VisionTransformerDistilled``, ``Eva``, ``NaFlexVit``, ``Beit``
    or ``VisionTransformerRelPos`` with the library's own blocks and attentions; docs/models.md and
    ``tome-ext models`` have the list.
    """
    return auto(model, r, prop_attn, trace_source, host="timm", **settings)


def torchvision(model: nn.Module, r: Schedule = 0, prop_attn: bool = True, **settings: Any) -> Any:
    """:func:`auto` for torchvision's ``VisionTransformer`` (vit_b_16, ..., SWAG's weights)."""
    return auto(model, r, prop_attn, host="torchvision", **settings)


def open_clip(model: nn.Module, r: Schedule = 0, prop_attn: bool = True, **settings: Any) -> Any:
    """:func:`auto` for a model of OpenCLIP, or its image tower; the text tower is left alone.

    Takes ``CLIP``, ``CustomTextCLIP`` and ``CoCa`` whose ``visual`` is a ``VisionTransformer``, or
    a ``TimmModel`` around a model that :func:`timm` takes.
    """
    return auto(model, r, prop_attn, host="open_clip", **settings)


def transformers(
    model: nn.Module,
    r: Schedule = 0,
    prop_attn: bool = True,
    trace_source: bool = False,
    **settings: Any,
) -> Any:
    """:func:`auto` for a model of Hugging Face's Transformers.

    Takes a vision tower (docs/models.md and ``tome-ext models`` list them) by itself, with a head,
    or inside a larger model. A tower by itself, or under a classifier or a dual
    encoder, returns merged tokens and hidden states, each of the length it has at that layer:
    ``model.tome.unmerge(hidden_states[k], k)`` spreads one. Under any other model of Transformers,
    as a backbone, a depth estimator or a language model, both come back at full length, as with
    ``restore_tokens=True``.

    Any ``attn_implementation`` serves, also one set later; it computes the attention of blocks
    before the first that merges. ``output_attentions`` needs ``r = 0``.
    """
    return auto(model, r, prop_attn, trace_source, host="transformers", **settings)
