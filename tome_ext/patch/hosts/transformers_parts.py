"""What modules of Transformers become: attentions, blocks, pools and towers.

All of them call their attention through Transformers' ``AttentionInterface``, which is where
attention is reached: see :class:`TomeAttention`.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface

from ...attention import proportional_attention
from ..common.attention_seam import SizedCall, heads_of, weighted_mean
from ..common.block import TomeBlock
from ..common.block_call import BlockCall
from ..common.class_swap import Swapped
from ..common.patched_model import PatchedModel
from ..common.positions import of_grid
from ..common.token_state import Tokens
from ..common.trail import AttentionKind, Trail, attention_kind

__all__ = [
    "BeitLayer",
    "BeitTower",
    "BiasedAttention",
    "ClassPool",
    "CrossPoolLayer",
    "Layer",
    "MaskedAttention",
    "MeanPool",
    "PoolLayer",
    "ProbePool",
    "RotaryLayer",
    "TomeAttention",
    "TransformersTower",
    "VJEPA2Encoder",
    "VJEPA2Layer",
    "VJEPA2Tower",
    "VideoMAELayer",
    "check_version",
]

OLDEST = (5, 18)


def check_version(version: str) -> None:
    """Refuse versions whose towers, blocks and attentions have other parts.

    The last to change were DINOv2's.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(f"this is transformers {version}")


check_version(transformers.__version__)

IMPLEMENTATION = "tome_ext"  # what the attention of an active block is called in Transformers
# Keyword that carries the padding mask (B, N) that the user gave, or False for none, to the
# attention modules.
SHOWN = "tome_shown"


# --- attention ----------------------------------------------------------------------------------


class MergingConfig:
    """A config as an attention module sees it while its block merges."""

    _attn_implementation = IMPLEMENTATION

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


class TomeAttention(Swapped):
    """Attention that calls the ``AttentionInterface``, and ours while its block merges.

    Which function that interface calls is read from ``self.config``. While a block merges, that is
    a view of the config with our function's name. So nothing is copied or written: config.json
    stays as it was, ``set_attn_implementation`` works at any time, and other models of the same
    config are left alone.
    """

    _tome_bias: ClassVar[bool] = False  # whether the mask is a bias over the present tokens

    _tome: Trail

    @property
    def config(self: Any) -> Any:
        # A property is looked up before the instance's own attribute of that name.
        config = self.__dict__["config"]
        return config if self._tome.call is None else MergingConfig(config)

    @config.setter
    def config(self: Any, config: Any) -> None:
        self.__dict__["config"] = config


class MaskedAttention(TomeAttention):
    """Attention whose model may have been given a padding mask."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        *args: Any,
        tome_shown: Tensor | Literal[False] | None = None,
        **kwargs: Any,
    ) -> Any:
        if tome_shown is not None and attention_mask is not None and self._tome.call is not None:
            # Whatever form the model's implementation takes masks in (a float or bool matrix, a
            # BlockMask), that of keys is exact and keeps attention on the operator. Without a
            # padding mask there may still be one that hides nothing, as when exporting.
            attention_mask = None if tome_shown is False else tome_shown[:, None, None, :] != 0
        return super().forward(  # type: ignore[misc]
            hidden_states, attention_mask, *args, **kwargs
        )


class BiasedAttention(TomeAttention):
    """Attention with a bias of pairs, which its block has carried to the present tokens."""

    _tome_bias = True


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the ``AttentionInterface`` calls for the attention of a block that merges.

    q, k and v are (B, H, M, D), returned is (B, M, H, D) and no attention matrix.
    """
    call = module._tome.call
    if module._tome_bias:
        out = call.attend(query, key, value, bias=attention_mask, dropout_p=dropout, scale=scaling)
    else:
        mask = as_mask(attention_mask)
        out = call.attend(query, key, value, mask, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, attention)


def as_mask(mask: Any) -> Tensor | None:
    """A mask of any implementation as one that broadcasts to (B, H, N, N)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"attention_mask: expected a tensor in a block that merges, got {type(mask).__name__}; "
            "pass the padding mask (B, N), or use set_attn_implementation('sdpa')"
        )
    return mask[:, None, None, :] != 0 if mask.dim() == 2 else mask


# --- blocks -------------------------------------------------------------------------------------


class Layer(TomeBlock):
    """A layer of a vision tower that merges between attention and MLP."""

    _tome_attention: str  # path of the module that calls the AttentionInterface

    def _tome_attention_kind(self: Any) -> AttentionKind:
        attn = self.get_submodule(self._tome_attention)
        head_dim = first_of(attn, "head_dim", "attention_head_size")
        dropout = first_of(attn, "attention_dropout", "dropout_prob", "dropout")
        return attention_kind(attn, head_dim, dropout if attn.training else 0.0)


def first_of(module: nn.Module, *names: str) -> Any:
    """The first attribute of those names that is there."""
    return next(vars(module)[name] for name in names if name in vars(module))


class RotaryLayer(Layer):
    """DINOv3's: ``position_embeddings`` are (cosines, sines), (P, D) each, of the patches."""

    def _tome_arguments(
        self, call: BlockCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        if len(args) > 1:  # attention_mask comes first
            kwargs["position_embeddings"], args = args[1], args[:1]
        carried = call.rotary(kwargs["position_embeddings"])
        if carried is not None:
            cos, sin = carried
            kwargs["position_embeddings"] = (cos.unsqueeze(1), sin.unsqueeze(1))
        return args, kwargs


class VideoMAELayer(Layer):
    """Its MLP is in two modules, the second of which adds the residual."""

    def _tome_mlp(self: Any, normed: Tensor) -> Tensor:
        # Not the residual itself: what adds it later may do so together with the next norm.
        nothing = normed.new_zeros(())
        out: Tensor = self.output(self.intermediate(normed), nothing)
        return out


class VJEPA2Layer(Layer):
    """It takes ids of tokens as positions, and returns a tuple."""

    def _tome_arguments(
        self: Any, call: BlockCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        plan = call.plan_so_far()
        ids = None
        if plan is not None:
            attn = self.attention
            every = torch.arange(plan.num_tokens, device=plan.assign.device)
            places = torch.stack(attn.get_position_ids(every[None]), dim=-1)
            ids = call.position_ids(places)
        return (ids,), {}

    def _tome_reduce(
        self, call: BlockCall, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return super()._tome_reduce(call, x, args, kwargs), None


class BeitLayer(Layer):
    """It adds a relative-position bias, which a merged token takes from one of its members.

    The bias of merged tokens differs between the images of a batch: (B, H, M, M) in place of
    (1, H, N, N). It is exact for the positions that tokens take, but no flash attention takes it.
    """

    _tome_drives = True  # its own forward would make the bias anew, of the original tokens

    def _tome_arguments(
        self: Any, call: BlockCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"attention_mask": self._tome_relative_bias(call, *args, **kwargs)}

    def _tome_relative_bias(
        self: Any,
        call: BlockCall,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """The layer's bias and the one that all layers share, (1 or B, H, M, M)."""
        assert resolution is not None
        height, width = (side // self.patch_size for side in resolution)
        bias = attention_mask
        if self.relative_position_bias is not None:
            num_tokens = height * width + 1
            own = self.relative_position_bias(
                (height, width), interpolate_pos_encoding, dim_size=num_tokens
            )
            bias = own if bias is None else own + bias
        if bias is None:
            return None
        return call.relative_bias(bias, of_grid(height, width, 1, bias.device))


# --- pools inside a tower or behind it ----------------------------------------------------------


class ProbePool(Swapped):
    """SigLIP's attention pool, which counts tokens by size."""

    _tome: Trail

    def forward(self: Any, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        trail: Trail = self._tome
        tokens = trail.merged(hidden_state)
        size = None if tokens is None else counts(tokens, attention_mask)
        if size is None:
            masks = () if attention_mask is None else (attention_mask,)
            out: Tensor = super().forward(hidden_state, *masks)  # type: ignore[misc]
            return out
        probe = self.probe.expand(hidden_state.shape[0], -1, -1)
        keys = hidden_state
        call = SizedCall(size)
        x = trail.within(call, self.attention, probe, keys, keys, need_weights=False)[0]
        return (x + self.mlp(self.layernorm(x)))[:, 0]


class ClassPool(Swapped):
    """AIMv2's attention pool, which counts tokens by size."""

    _tome: Trail

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        tokens = self._tome.merged(hidden_states)
        size = None if tokens is None else counts(tokens, None)
        if size is None:
            out: Tensor = super().forward(hidden_states)  # type: ignore[misc]
            return out
        query = self.cls_token.expand(hidden_states.shape[0], -1, -1)
        q, k, v = (
            heads_of(x, self.num_heads)
            for x in (query, self.k_proj(hidden_states), self.v_proj(hidden_states))
        )
        pooled = proportional_attention(q, k, v, size).transpose(1, 2).flatten(2)
        return self.output_proj(pooled.mean(dim=1))


class MeanPool(Swapped):
    """BEiT's pool: the mean of the patch tokens, each as often as it counts; or the class token."""

    _tome: Trail

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        tokens = self._tome.merged(hidden_states)
        if self.layernorm is None or tokens is None or tokens.size is None:
            out: Tensor = super().forward(hidden_states)  # type: ignore[misc]
            return out
        return self.layernorm(weighted_mean(hidden_states[:, 1:], tokens.size[:, 1:]))


def counts(tokens: Tokens, shown: Tensor | None) -> Tensor | None:
    """How often each token (B, M) counts in a pool, with a padding mask (B, N) of the original.

    None if all count once.
    """
    counted = tokens.rules.method.proportional
    if shown is None:
        return tokens.size if counted else None
    plan = tokens.plan
    assert plan is not None
    visible = plan.merge(shown.to(torch.float32).unsqueeze(-1), reduce="sum")[0].squeeze(-1)
    return visible if counted else (visible > 0).to(torch.float32)


class PoolLayer(Swapped):
    """A layer of V-JEPA 2's attentive pooler, whose attention counts tokens by size."""

    _tome_crosses: ClassVar[bool] = False  # whether tokens are the second argument

    _tome: Trail

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        trail: Trail = self._tome
        x = args[1 if self._tome_crosses else 0]
        size = trail.size_of(x)
        if size is None or not trail.rules.method.proportional:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        else:
            own = super().forward  # type: ignore[misc]
            out = trail.within(SizedCall(size), own, *args, **kwargs)
        if not self._tome_crosses:
            trail.same(x, out[0])
        return out


class CrossPoolLayer(PoolLayer):
    """The layer of that pooler whose query reads the tokens."""

    _tome_crosses = True


# --- towers -------------------------------------------------------------------------------------


class TransformersTower(PatchedModel):
    """A vision tower. What it returns knows of merged tokens, or is at full length."""

    _tome_finished: ClassVar[bool] = False  # whether a part of it says what its tokens are

    _tome_mask: tuple[str, int] | None  # argument that is a padding mask (B, N), and its place

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Trainers and exporters read the names of arguments from the signature.
        of_model = getattr(super(), "forward", None)
        if of_model is not None and "_tome_base" in vars(cls):
            mixin = vars(cls)["_tome_mixin"]

            @functools.wraps(of_model)
            def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
                return mixin.forward(self, *args, **kwargs)

            cls.forward = forward  # type: ignore[method-assign]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        trail: Trail = self._tome
        rules = trail.rules
        if rules.idle:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        refuse_attentions(self, kwargs)
        if self._tome_mask is not None:
            name, index = self._tome_mask
            mask = args[index] if index < len(args) else kwargs.get(name)
            if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
                kwargs[SHOWN] = False if mask is None else mask
        as_dict = kwargs.pop("return_dict", None)
        if as_dict is None:
            as_dict = getattr(self.config, "return_dict", True)
        trail.local.runs = True
        try:
            out = super().forward(*args, return_dict=True, **kwargs)  # type: ignore[misc]
        finally:
            trail.local.runs = False
        if not self._tome_finished:
            out.last_hidden_state = trail.finish(out.last_hidden_state, sized=False)
        states = getattr(out, "hidden_states", None)
        tokens = trail.current
        if states is not None and tokens is not None and trail.restores(rules):
            out.hidden_states = tuple(
                None if x is None else tokens.unmerge(x, layer) for layer, x in enumerate(states)
            )
        return out if as_dict else out.to_tuple()


def refuse_attentions(tower: Any, kwargs: dict[str, Any]) -> None:
    """Refuse to return attention matrices, which blocks that merge do not build."""
    wanted = kwargs.get("output_attentions")
    if wanted is None:
        wanted = getattr(tower.config, "output_attentions", False)
    if wanted:
        raise ValueError(
            "output_attentions: expected False, got True of a model that merges tokens, whose "
            "blocks build no attention matrix; set model.r = 0 for the matrices"
        )


class BeitTower(TransformersTower):
    """BEiT's; its bias of pairs leaves no room for a mask."""

    def forward(
        self: Any,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is not None and not self._tome.rules.idle:
            raise ValueError(
                "attention_mask: expected None of a BEiT that merges tokens, got a mask; set "
                "model.r = 0 to use one"
            )
        return super().forward(
            pixel_values,
            bool_masked_pos,
            interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )


class VJEPA2Tower(TransformersTower):
    """V-JEPA 2: its predictor, and masks of tokens, want the encoder's tokens at full length."""

    _tome_finished = True  # by VJEPA2Encoder

    def forward(
        self: Any,
        pixel_values_videos: Tensor,
        context_mask: Any = None,
        target_mask: Any = None,
        skip_predictor: bool = False,
        **kwargs: Any,
    ) -> Any:
        full = not skip_predictor or context_mask is not None or target_mask is not None
        if full and not self._tome.rules.idle:
            kwargs["tome_full"] = True
        return super().forward(
            pixel_values_videos,
            context_mask=context_mask,
            target_mask=target_mask,
            skip_predictor=skip_predictor,
            **kwargs,
        )


class VJEPA2Encoder(Swapped):
    """The part of V-JEPA 2 before the predictor."""

    _tome: Trail

    def forward(self: Any, *args: Any, tome_full: bool = False, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not self._tome.rules.idle:
            out.last_hidden_state = self._tome.finish(out.last_hidden_state, tome_full)
        return out
