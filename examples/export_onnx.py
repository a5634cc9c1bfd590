"""Writes what the C++ programs run: ``python export_onnx.py model.onnx images.bin``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import tome_ext as tome


def export(model: nn.Module, images: Tensor, graph: Path, file: Path, engine: str) -> Tensor:
    """Write a model for any batch size, and the images (B, 3, H, W) as float32.

    Returns:
        The model's output for the images.
    """
    tome.onnx.export(
        model,
        (images,),
        graph,
        operators="native",
        engine=engine,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    file.write_bytes(images.numpy().tobytes())
    with torch.inference_mode():
        return model(images)


def main() -> None:
    import timm

    parser = argparse.ArgumentParser(description="Export a patched timm model for an engine.")
    parser.add_argument("graph", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--engine", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--r", type=int, default=13, help="tokens to merge in every block")
    parser.add_argument("--pretrained", action="store_true", help="download trained weights")
    args = parser.parse_args()

    model = timm.create_model(args.model, pretrained=args.pretrained).eval()
    tome.patch.timm(model, r=args.r)
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    for row in export(model, images, args.graph, args.images, args.engine):
        print(" ".join(f"{x:.6g}" for x in row[:5]))


if __name__ == "__main__":
    main()
