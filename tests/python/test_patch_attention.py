"""What computes attention in a patched model, and that no attention matrix is built."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from models import images, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tome_ext


def names_of_attention(model: Any) -> list[str]:
    """What computes attention, one name a block, as info says it."""
    names = []
    for span in tome_ext.info(model)["attention"].split("; "):
        blocks, name = span.split(": ", 1)
        first, _, last = blocks.removeprefix("blocks ").removeprefix("block ").partition("-")
        names += [name] * (int(last or first) - int(first) + 1)
    return names


OPERATOR = "tome::attention"
OWN = "the model's own, as nothing has merged"
STOCK = "scaled_dot_product_attention"


@pytest.mark.parametrize("options", [{}, {"unfused": True}, {"qk_norm": True}])
def test_info_says_what_computes_attention(options: dict[str, Any]) -> None:
    model = tome_ext.patch.timm(tiny(**options), r=[0, 8, 8])
    expected = [OWN, OPERATOR, OPERATOR]
    assert names_of_attention(model) == expected
    model(images())
    assert names_of_attention(model) == expected
    rows = tome_ext.info(model)
    assert rows["model"] == "VisionTransformer, 3 blocks"
    assert (rows["r"], rows["proportional attention"]) == ("[0, 8, 8]", "on")
    model.r = [8, 0, 0]
    assert names_of_attention(model) == [OPERATOR] * 3
    tome_ext.patch.timm(model, r=8, prop_attn=False)
    assert names_of_attention(model) == [OPERATOR] * 3
    assert tome_ext.info(model)["proportional attention"] == "off"
    tome_ext.patch.remove(model)
    with pytest.raises(ValueError, match="expected a patched model, got VisionTransformer"):
        tome_ext.info(model)


def test_info_looks_into_wrapped_models() -> None:
    model = tome_ext.patch.timm(tiny(), r=8)
    want = tome_ext.info(model)["attention"]
    assert tome_ext.info(torch.compile(model))["attention"] == want
    assert tome_ext.info(torch.nn.DataParallel(model))["attention"] == want
    with pytest.raises(ValueError, match="expected a patched model, got VisionTransformer"):
        tome_ext.info(torch.compile(tiny()))


def test_modules_that_must_see_the_attention_matrix_are_refused() -> None:
    model = tiny(unfused=True)
    model.blocks[1].attn.attn_drop = torch.nn.Softshrink()
    with pytest.raises(ValueError, match=r"as attn_drop, got .* as block 1 with Softshrink"):
        tome_ext.patch.timm(model, r=8)
    assert type(model).__name__ == "VisionTransformer"
    assert type(model.blocks[0].attn).__name__ == "Attention"


def test_dropout_follows_the_module_that_drops() -> None:
    model = tome_ext.patch.timm(tiny(unfused=True), r=8).train()
    for block in model.blocks:
        block.attn.attn_drop.p = 0.5
        block.attn.attn_drop.eval()
    assert names_of_attention(model)[1:] == [OPERATOR] * 2
    x = images()
    assert torch.equal(model(x), model(x))


def test_copies_know_nothing_of_forwards_they_did_not_run() -> None:
    model = tome_ext.patch.timm(tiny(), r=8)
    model(images(), attn_mask=torch.ones(65, 65, dtype=torch.bool))
    assert STOCK in names_of_attention(model)[1]
    assert names_of_attention(copy.deepcopy(model))[1:] == [OPERATOR] * 2


def test_info_says_why_attention_falls_back() -> None:
    model = tome_ext.patch.timm(tiny(), r=8)
    for block in model.blocks[1:]:
        block.attn.attn_drop.p = 0.25
    assert names_of_attention(model)[1:] == [OPERATOR] * 2
    dropped = [f"{STOCK} (attention dropout of 0.25)"] * 2
    assert names_of_attention(model.train())[1:] == dropped
    model(images())
    assert names_of_attention(model)[1:] == dropped
    model.eval()(images())
    assert names_of_attention(model)[1:] == [OPERATOR] * 2
    model(images(), attn_mask=torch.ones(65, 65, dtype=torch.bool))
    assert names_of_attention(model)[1:] == [f"{STOCK} (a mask that does more than hide keys)"] * 2
    model(images(), attn_mask=torch.ones(2, 1, 1, 65, dtype=torch.bool))
    assert names_of_attention(model)[1:] == [OPERATOR] * 2


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("unfused", [True, False])
def test_autocast_computes_attention_in_its_dtype(qk_norm: bool, unfused: bool) -> None:
    """Norms give float32 queries and keys to bfloat16 values."""
    model = tome_ext.patch.timm(tiny(qk_norm=qk_norm, unfused=unfused), r=8).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images())
    assert names_of_attention(model)[1:] == [OPERATOR] * 2
    y.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that operators return, those of a backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"unfused": True}, {"qk_norm": True, "global_pool": "map"}]
)
def test_no_attention_matrix_is_built(train: bool, padding: bool, options: dict[str, Any]) -> None:
    """The largest tensor grows as the number of tokens, not as its square."""
    model = tiny(dynamic_img_size=True, **options).train(train)
    tome_ext.patch.timm(model, r=8)
    largest = []
    for side in (64, 96):
        tokens = (side // 4) ** 2 + 1
        mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool) if padding else None
        with Shapes() as shapes, torch.set_grad_enabled(train):
            y = model(images(2, side), attn_mask=mask)
            if train:
                y.square().sum().backward()
        # 128 channels in the MLP are the most; every layer has more tokens.
        assert not [shape for shape in shapes.seen if sum(n > 200 for n in shape) > 1]
        largest.append(max(math.prod(shape) for shape in shapes.seen) / tokens)
    assert largest[1] <= 1.1 * largest[0]  # 2.2 for a matrix
