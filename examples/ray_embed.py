"""Embeds a folder of pictures with Ray Data, in workers that each hold a patched model.

    pip install 'ray[data]' pillow
    python ray_embed.py PICTURES OUT --model vit_base_patch16_224 --r 8 [--workers 2] [--gpus 1]

OUT becomes a folder of Parquet files with the columns ``path``, the whole one, and ``feature``, as
those of ``tome-ext embed``, whose paths begin in PICTURES. Weights are timm's pretrained ones, or
of a folder: ``--model local-dir:FOLDER``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import tome_ext


class Embed:
    """Gives rows with ``path`` and ``image``, (height, width, 3) uint8, a ``feature`` instead."""

    def __init__(self, model: str, r: int, device: str) -> None:
        self.device = device
        self.model = timm.create_model(model, pretrained=True, num_classes=0).eval().to(device)
        tome_ext.patch.auto(self.model, r, inference=True)
        self.transform = create_transform(**resolve_model_data_config(self.model))

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        images = [self.transform(Image.fromarray(image)) for image in batch["image"]]
        features = self.model(torch.stack(images).to(self.device)).float().cpu()
        rows = pa.FixedSizeListArray.from_arrays(features.flatten().numpy(), features.shape[1])
        return pa.table({"path": batch["path"], "feature": rows})


def embed(
    pictures: Path, out: Path, model: str, r: int, workers: int, gpus: float, batch_size: int
) -> None:
    """Read pictures, a batch at a time, and write their features as they come."""
    rows = ray.data.read_images(str(pictures), mode="RGB", include_paths=True)
    features = rows.map_batches(
        Embed,
        fn_constructor_args=(model, r, "cuda" if gpus else "cpu"),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus,
    )
    features.write_parquet(str(out))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Embeds a folder of pictures with Ray Data.")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--r", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1, help="that hold a model each")
    parser.add_argument("--gpus", type=float, default=0, help="that each worker has, such as 0.5")
    parser.add_argument("--batch-size", type=int, default=64)
    embed(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
