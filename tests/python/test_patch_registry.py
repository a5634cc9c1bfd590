"""A library outside the package, patched as those inside it are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tome_ext
from tome_ext.patch import Host
from tome_ext.patch.common.attention_seam import TomeMultiheadAttention
from tome_ext.patch.common.block import BlockNames, TomeBlock
from tome_ext.patch.common.block_call import BlockCall
from tome_ext.patch.common.patched_model import PatchedModel, Tower
from tome_ext.patch.common.trail import AttentionKind, attention_kind
from tome_ext.patch.registry import HOSTS

DEPTH = 3


class Layer(nn.Module):
    """A block of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        y: Tensor = x + self.ffn(self.after(x))
        return y


class Encoder(nn.Module):
    """A tower of another library, without a class token; returns its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer() for _ in range(DEPTH)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class PatchedLayer(TomeBlock):
    def _tome_attention_kind(self: Any) -> AttentionKind:
        return attention_kind(self.attention, self.attention.head_dim, 0.0)

    def _tome_attend(self: Any, call: BlockCall, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        return super()._tome_attend(call, x, (x, x), {"need_weights": False})


class PatchedEncoder(PatchedModel):
    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self._tome.finish(super().forward(x))  # type: ignore[misc]
        return y


def find_tower(model: Any) -> Tower:
    if not isinstance(model, Encoder):
        raise ValueError(f"model: expected an Encoder, got {type(model).__name__}")
    names = BlockNames(norm1="before", attn="attention", norm2="after", mlp="ffn")
    return Tower(
        module=model,
        mixin=PatchedEncoder,
        blocks=[(layer, PatchedLayer) for layer in model.layers],
        others=[(layer.attention, TomeMultiheadAttention, {}) for layer in model.layers],
        num_prefix_tokens=0,
        class_token=False,
        block_attributes={"_tome_names": names},
    )


@pytest.fixture
def host() -> Iterator[Host]:
    mine = Host("mine", __name__.split(".")[0], find_tower, "mine >= 1.0")
    tome_ext.patch.register(mine)
    yield mine
    del HOSTS["mine"]


def test_another_library_is_patched_as_those_inside(host: Host) -> None:
    torch.manual_seed(0)
    model = Encoder().double().eval()
    x = torch.randn(2, 12, 16, dtype=torch.float64).repeat_interleave(2, dim=1)
    expected = model(x)
    assert torch.equal(tome_ext.patch.auto(model)(x), expected)
    model.r = [12]
    y = model(x)
    assert model.tome.num_tokens == 12
    torch.testing.assert_close(model.tome.unmerge(y), expected, rtol=0, atol=1e-12)
    assert "tome::attention" in tome_ext.info(model)["attention"]
    tome_ext.patch.auto(model, [12], restore_tokens=True)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    tome_ext.patch.remove(model)
    assert type(model) is Encoder


def test_its_tower_is_found_inside_another_model(host: Host) -> None:
    model = nn.Sequential(nn.Linear(16, 16), Encoder())
    tome_ext.patch.auto(model, r=4)
    assert model(torch.randn(2, 24, 16)).shape == (2, 24 - 4 * DEPTH, 16)
    assert model.tome.num_tokens == 24 - 4 * DEPTH
    with pytest.raises(ValueError, match="expected the model that was patched, got its tower"):
        tome_ext.patch.remove(model[1])
    tome_ext.patch.remove(model)
    assert type(model) is nn.Sequential


def test_what_it_refuses_is_refused_by_name(host: Host) -> None:
    with pytest.raises(ValueError, match="expected an Encoder, got Layer"):
        tome_ext.patch.auto(Layer())
    with pytest.raises(ValueError, match=r"with several \(0, 1\); patch them one by one"):
        tome_ext.patch.auto(nn.Sequential(Encoder(), Encoder()))
    with pytest.raises(ValueError, match="expected a new name, got 'mine'"):
        tome_ext.patch.register(host)


def test_unknown_models_name_the_libraries_there_are() -> None:
    with pytest.raises(ValueError, match=r"open_clip, timm, torchvision, transformers.*Linear"):
        tome_ext.patch.auto(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"host: expected one of .* got 'mine'"):
        tome_ext.patch.auto(nn.Linear(2, 2), host="mine")
    for wrong in (None, "vit", nn.Linear):
        with pytest.raises(ValueError, match=r"model: expected a torch\.nn\.Module, got"):
            tome_ext.patch.auto(wrong)
