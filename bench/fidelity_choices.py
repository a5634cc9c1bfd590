"""Which way of merging changes a trained model's answers least: what guided merging was found by.

    python bench/fidelity_choices.py --data FOLDER --json bench/results/fidelity_choices.json

The model and the pictures are those of bench/fidelity.py, but the half to choose by. Every choice
removes the same number of tokens in every layer; figures are over those of ToMe.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from fidelity import deviation_figures, deviations, embed, patch_by, write
from fidelity_data import SOURCES, TOWER, clip_tower, load

from tome_ext import MergePlan, match
from tome_ext._command import find_device
from tome_ext.bench._contenders import share_weights
from tome_ext.bench.timing import describe_machine
from tome_ext.patch.common.methods import AttentionInputs, Given, MethodName, Ranks, ToMe

R_VALUES = (8, 12, 16)


@dataclass(frozen=True)
class Choice(ToMe):
    """A way of merging.

    Attributes:
        compare: what similarity is of: the mean of the "keys" over heads, the keys of "all heads"
            one behind the other, or the "tokens" after attention.
        by_size: whether cost has the factor of sizes; see :func:`tome_ext.match`.
        power: of the class token's attention as a factor of cost; 0 is none.
        by_shift: whether that is of how far attention moves a token, in place of its attention.
        keeps_norms: whether a row is stretched to the mean length of the tokens that make it.
    """

    name: ClassVar[MethodName] = cast("MethodName", "choice")
    compare: ClassVar[str] = "keys"
    by_size: ClassVar[bool] = False
    power: ClassVar[float] = 0.0
    by_shift: ClassVar[bool] = False
    keeps_norms: ClassVar[bool] = False

    def rank(self, of: AttentionInputs) -> Ranks:
        asks = self.power > 0 and not self.by_shift
        return Ranks(of.k, of.cls_attention() if asks else None)

    def plan(self, ranks: Ranks, amount: int, prefix: int, given: Given) -> MergePlan:
        keys, scores = ranks
        assert keys is not None
        assert given.x is not None
        metric = given.x if self.compare == "tokens" else keys
        if self.compare == "all heads":
            metric = keys.transpose(1, 2).flatten(2)
        size = given.size if self.by_size else None  # None is 1 each, by which ranks stay
        if self.by_shift:
            assert given.branch is not None
            assert given.scale is None
            scores = torch.linalg.vector_norm(given.branch, dim=2)
        importance = None if scores is None else scores**self.power
        return match(metric, amount, prefix, size=size, importance=importance)

    def averages(self, ranks: Ranks | None) -> bool:
        return False  # so that the tokens are added up before, and can be compared


CHOICES: dict[str, dict[str, Any]] = {
    "ToMe: keys, the most similar": {},
    "keys, by size": {"by_size": True},
    "keys, by size, attention^0.75": {"by_size": True, "power": 0.75},
    "keys of all heads, by size, attention^0.75": {
        "compare": "all heads", "by_size": True, "power": 0.75,
    },
    "tokens, the most similar": {"compare": "tokens"},
    "tokens, by size": {"compare": "tokens", "by_size": True},
    "tokens, attention^0.75": {"compare": "tokens", "power": 0.75},
    "tokens, by size, attention^0.5": {"compare": "tokens", "by_size": True, "power": 0.5},
    "tokens, by size, attention^0.75": {
        "compare": "tokens", "by_size": True, "power": 0.75,
    },
    "tokens, by size, attention^1": {"compare": "tokens", "by_size": True, "power": 1.0},
    "keys, by size, attention^0.75, norms kept": {
        "by_size": True, "power": 0.75, "keeps_norms": True,
    },
    "tokens, by size, norms kept": {"compare": "tokens", "by_size": True, "keeps_norms": True},
    "tokens, by size, shift^0.75, norms kept": {
        "compare": "tokens", "by_size": True, "power": 0.75, "by_shift": True, "keeps_norms": True,
    },
    "guided: tokens, by size, attention^0.75, norms kept": {
        "compare": "tokens", "by_size": True, "power": 0.75, "keeps_norms": True,
    },
}  # fmt: skip


def measure(options: argparse.Namespace) -> None:
    """All choices, written as they come."""
    device = find_device(options.device)
    model = clip_tower(options.data).to(device)
    sets = load(options.data, options.most)
    choose = {name: p.tensor(p.chooses)[: options.each] for name, p in sets.items()}
    plain = {name: embed(model, x, options.batch_size, device) for name, x in choose.items()}
    result: dict[str, Any] = {
        "model": TOWER,
        "sources": [source.package for source in SOURCES],
        "dtype": "float32",
        "pictures": {name: len(x) for name, x in choose.items()},
        "machine": describe_machine(device),
        "choices": {},
    }
    for name, how in CHOICES.items():
        method: type[Choice] = type("Choice", (Choice,), how)
        found = {}
        for r in R_VALUES:
            made = patch_by(method, share_weights(model), r)
            far = [
                deviations(embed(made, x, options.batch_size, device), plain[kind])
                for kind, x in choose.items()
            ]
            found[str(r)] = deviation_figures(np.concatenate(far))
        result["choices"][name] = found
        print(f"{name:44}", *(f"{found[str(r)]['mean']:.5f}" for r in R_VALUES), flush=True)
        write(options.json, result)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, metavar="FOLDER", required=True)
    options.add_argument("--json", type=Path, metavar="FILE", required=True)
    options.add_argument("--most", type=int, metavar="N", help="pictures of a set (default: all)")
    options.add_argument("--each", type=int, metavar="N", help="of these, choose by so many")
    options.add_argument("--device", default="cpu")
    options.add_argument("--batch-size", type=int, default=8)
    with torch.inference_mode():
        measure(options.parse_args())


if __name__ == "__main__":
    sys.exit(main())
