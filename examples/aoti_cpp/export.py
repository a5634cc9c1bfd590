"""Packages a patched model for C++: ``python export.py FOLDER`` writes what main.cpp reads.

Writes ``model.pt2`` (compiled), ``images.pt`` (an example batch) and ``logits.pt`` (what the model
gives for it in Python).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import tome_ext as tome


def package(model: nn.Module, images: Tensor, folder: Path) -> Path:
    """Compile a model for its present device and any batch size, and save an example beside it.

    Args:
        model: in eval mode, from images (B, 3, H, W) to a tensor or a list of tensors.
        images: (B, 3, H, W) with B of 2 or more, on the model's device.
        folder: where the three files go; it is made if it does not exist.

    Returns:
        The path of the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        logits = model(images)
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    torch.save(images.cpu(), folder / "images.pt")
    logits = [logits] if isinstance(logits, Tensor) else logits
    torch.save([x.cpu() for x in logits], folder / "logits.pt")
    return Path(path)


def main() -> None:
    import timm

    parser = argparse.ArgumentParser(description="Package a patched timm model for C++.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--r", type=int, default=13, help="tokens to merge in every block")
    parser.add_argument("--pretrained", action="store_true", help="download trained weights")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    model = timm.create_model(args.model, pretrained=args.pretrained).eval().to(args.device)
    tome.patch.timm(model, r=args.r)
    images = torch.randn(2, *model.pretrained_cfg["input_size"], device=args.device)
    print("wrote", package(model, images, args.folder))


if __name__ == "__main__":
    main()
