"""Transformers' vision towers for the host contract."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from host_cases import Case, Inputs, loud
from torch import Tensor, nn

DEPTH = 4
SIDE = 6  # patches per side of an image
PATCH = 4
TOKENS = SIDE * SIDE
FRAMES = 2  # of 4 x 4 patches each, of a video
LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
IMAGE: dict[str, Any] = {**LAYERS, "image_size": SIDE * PATCH, "patch_size": PATCH}
LABELS = {"num_labels": 5}
BOTH = ("eager", "sdpa")


def images(batch: int = 2, seed: int = 0, paired: bool = False) -> Tensor:
    """Random images; with ``paired``, horizontal neighbours among the patches are equal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, SIDE * PATCH, SIDE, PATCH, generator=generator)
    return (_pairs(x) if paired else x).flatten(3)


def videos(batch: int = 2, seed: int = 0, paired: bool = False) -> Tensor:
    """Random videos (batch, 2 * FRAMES, 3, 16, 16), for tubelets of 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2 * FRAMES, 3, 4 * PATCH, 4, PATCH, generator=generator)
    return (_pairs(x) if paired else x).flatten(4)


def _pairs(x: Tensor) -> Tensor:
    return x[..., ::2, :].repeat_interleave(2, dim=-2)


def made(model: Callable[..., Any], config: Callable[..., Any], **options: Any) -> Any:
    """``model(config(**options))`` with loud weights."""
    torch.manual_seed(0)
    return loud(model(config(**options)))


def _image_inputs(batch: int, seed: int) -> Inputs:
    return {"pixel_values": images(batch, seed)}


def _logits(out: Any) -> Tensor:
    y: Tensor = out.logits
    return y


def _pooled(out: Any) -> Tensor:
    y: Tensor = out.pooler_output
    return y


def _class_token(out: Any) -> Tensor:
    y: Tensor = out.last_hidden_state[:, 0]
    return y


def without_positions(model: nn.Module) -> None:
    """Zero what tells equal patches apart: embeddings of positions, rotations and their biases."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" in name:
                parameter.zero_()
        for module in model.modules():
            if type(module).__name__ == "DINOv3ViTRopePositionEmbedding":
                module.inv_freq.zero_()
            if type(module).__name__ == "VJEPA2RopeAttention":
                module.apply_rotary_embeddings = lambda x, ids: x
            if type(module).__name__ == "VideoMAEEmbeddings":
                module.position_embeddings.zero_()
            if type(module).__name__ == "Aimv2RMSNorm":  # which computes in float32
                module.forward = partial(
                    nn.functional.rms_norm,
                    normalized_shape=module.weight.shape,
                    weight=module.weight,
                    eps=module.variance_epsilon,
                )


def _paired(model: Any, inputs: Inputs) -> Inputs:
    without_positions(model)
    x = inputs["pixel_values"]
    return {"pixel_values": images(len(x), paired=True).to(x.dtype)}


def _paired_video(name: str) -> Callable[[Any, Inputs], Inputs]:
    def paired(model: Any, inputs: Inputs) -> Inputs:
        without_positions(model)
        x = inputs[name]
        return {name: videos(len(x), paired=True).to(x.dtype)}

    return paired


def _hidden(prefix: int) -> Callable[[int, int, float], Inputs]:
    def hidden(batch: int, seed: int, noise: float) -> Inputs:
        x = images(batch, seed)
        x[..., 4 * PATCH :, :] += noise  # the last two rows of patches
        shown = torch.ones(batch, prefix + TOKENS, dtype=torch.int64)
        shown[:, -2 * SIDE :] = 0
        return {"pixel_values": x, "attention_mask": shown}

    return hidden


def _case(
    name: str,
    model: Callable[..., Any],
    config: Callable[..., Any],
    options: dict[str, Any],
    prefix: int,
    output: Callable[[Any], Tensor] = _logits,
    **more: Any,
) -> Case:
    more = {"class_token": prefix > 0, "equal_tokens": _paired, "implementations": BOTH, **more}
    return Case(
        f"transformers: {name}",
        lambda: made(model, config, **options),
        more.pop("inputs", _image_inputs),
        output,
        prefix + more.pop("num_patches", TOKENS),
        prefix,
        DEPTH,
        **more,
    )


# --- SigLIP 2 takes patches, a mask and the shape of each image ---------------------------------


def naflex(batch: int, seed: int, noise: float | None = None) -> Inputs:
    """Patches (B, 36, 48); with ``noise``, the last twelve are hidden, and have it added."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, TOKENS, 3 * PATCH * PATCH, generator=generator)
    shown = torch.ones(batch, TOKENS, dtype=torch.int64)
    shapes = torch.tensor([[SIDE, SIDE]] * batch)
    if noise is not None:
        x[:, -2 * SIDE :] += noise
        shown[:, -2 * SIDE :] = 0
        shapes[:, 0] -= 2
    return {"pixel_values": x, "pixel_attention_mask": shown, "spatial_shapes": shapes}


def _paired_naflex(model: Any, inputs: Inputs) -> Inputs:
    without_positions(model)
    x = inputs["pixel_values"]
    return {**inputs, "pixel_values": x[:, ::2].repeat_interleave(2, dim=1)}


VJEPA2: dict[str, Any] = {
    **LAYERS,
    "crop_size": 4 * PATCH,
    "patch_size": PATCH,
    "frames_per_clip": 2 * FRAMES,
    "mlp_ratio": 2,
    "num_pooler_layers": 1,
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1,
    "pred_mlp_ratio": 2.0,
}
BEIT: dict[str, Any] = {
    **IMAGE,
    **LABELS,
    "use_relative_position_bias": True,
    "use_mean_pooling": True,
    "layer_scale_init_value": 0.5,
    "drop_path_rate": 0.1,
}


def _video_case(
    name: str,
    model: Callable[..., Any],
    config: Callable[..., Any],
    options: dict[str, Any],
    pixels: str,
) -> Case:
    return _case(
        name,
        model,
        config,
        options,
        0,
        inputs=lambda batch, seed: {pixels: videos(batch, seed)},
        num_patches=FRAMES * 16,
        equal_tokens=_paired_video(pixels),
    )


CASES = [
    _case(
        "ViT", hf.ViTForImageClassification, hf.ViTConfig, {**IMAGE, **LABELS}, 1,
        hidden=_hidden(1),
    ),
    _case(
        "DeiT", hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig, {**IMAGE, **LABELS}, 2
    ),
    _case("ViT-MSN", hf.ViTMSNForImageClassification, hf.ViTMSNConfig, {**IMAGE, **LABELS}, 1),
    _case("I-JEPA", hf.IJepaForImageClassification, hf.IJepaConfig, {**IMAGE, **LABELS}, 0),
    _case(
        "DINOv2", hf.Dinov2Model, hf.Dinov2Config,
        {**IMAGE, "mlp_ratio": 2, "drop_path_rate": 0.1}, 1, _pooled, hidden=_hidden(1),
    ),
    _case(
        "DINOv2 with registers", hf.Dinov2WithRegistersForImageClassification,
        hf.Dinov2WithRegistersConfig,
        {**IMAGE, **LABELS, "mlp_ratio": 2, "num_register_tokens": 3}, 4,
    ),
    _case(
        "DINOv3", hf.DINOv3ViTModel, hf.DINOv3ViTConfig, {**IMAGE, "num_register_tokens": 2}, 3,
        _pooled,
    ),
    _case("CLIP", hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig,
          {**IMAGE, "projection_dim": 8}, 1, lambda out: out.image_embeds),
    _case("MetaCLIP 2", hf.MetaClip2VisionModel, hf.MetaClip2VisionConfig, IMAGE, 1, _pooled),
    _case("SigLIP", hf.SiglipVisionModel, hf.SiglipVisionConfig, IMAGE, 0, _pooled),
    _case(
        "SigLIP 2", hf.Siglip2VisionModel, hf.Siglip2VisionConfig,
        {**LAYERS, "num_patches": TOKENS, "patch_size": PATCH}, 0, _pooled,
        inputs=naflex, equal_tokens=_paired_naflex, hidden=naflex,
    ),
    _case("AIMv2", hf.Aimv2VisionModel, hf.Aimv2VisionConfig, IMAGE, 0, _pooled),
    _video_case(
        "VideoMAE", hf.VideoMAEForVideoClassification, hf.VideoMAEConfig,
        {**LAYERS, **LABELS, "image_size": 4 * PATCH, "patch_size": PATCH,
         "num_frames": 2 * FRAMES, "tubelet_size": 2},
        "pixel_values",
    ),
    _video_case(
        "V-JEPA 2", hf.VJEPA2ForVideoClassification, hf.VJEPA2Config, {**VJEPA2, **LABELS},
        "pixel_values_videos",
    ),
    _case(
        "BEiT", hf.BeitForImageClassification, hf.BeitConfig, BEIT, 1,
        attention="does more than hide keys",
    ),
    _case(
        "InternVL", hf.InternVLVisionModel, hf.InternVLVisionConfig,
        {**IMAGE, "image_size": [SIDE * PATCH] * 2, "patch_size": [PATCH] * 2}, 1, _class_token,
    ),
]  # fmt: skip
