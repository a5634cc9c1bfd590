"""Code written for the published project, as people write it, under that project's name."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from models import DEPTH, images, plain_tome, tiny
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

import tome_ext
from tome_ext import matching, schedule
from tome_ext.published.patch.mae import make_tome_class as make_mae_class
from tome_ext.published.patch.timm import (
    ToMeAttention,
    ToMeBlock,
    apply_patch,
    make_tome_class,
)

# --- imports ------------------------------------------------------------------------------------

IMPORTS = """
import tome
import tome as tm; tm.patch.timm
import tome.merge
import tome.merge as m; m.bipartite_soft_matching
import tome.utils as u; u.parse_r
import tome.vis; tome.vis.generate_colormap
import tome.patch; tome.patch.timm
import tome.patch.timm; tome.patch.timm(model)
import tome.patch.mae
import tome.patch.swag
import tome; tome.utils.benchmark
import tome; tome.merge.merge_wavg
import tome; tome.make_visualization
from tome import merge, patch, utils
from tome import make_visualization
from tome import *; patch.timm; merge.merge_source; utils.benchmark; make_visualization
from tome.merge import bipartite_soft_matching, merge_source, merge_wavg
from tome.merge import kth_bipartite_soft_matching, random_bipartite_soft_matching, do_nothing
from tome.merge import *; bipartite_soft_matching
from tome.utils import parse_r, benchmark
from tome.vis import make_visualization, generate_colormap
from tome.patch import timm, mae, swag
from tome.patch.timm import apply_patch, ToMeBlock, ToMeAttention, make_tome_class
from tome.patch.timm import apply_patch as patch_model; patch_model(model, True, False)
from tome.patch.mae import apply_patch, make_tome_class, ToMeBlock, ToMeAttention
from tome.patch.mae import make_tome_class as make_mae_tome_class
from tome.patch.swag import apply_patch
""".strip().splitlines()


@pytest.fixture
def as_tome() -> Iterator[types.ModuleType]:
    """The published project's name for this test."""
    yield tome_ext.install_as("tome")
    for name in [name for name in sys.modules if name.split(".")[0] == "tome"]:
        del sys.modules[name]


@pytest.mark.parametrize("statement", IMPORTS)
def test_every_form_of_import(as_tome: types.ModuleType, statement: str) -> None:
    exec(statement, {"model": tiny()})


def test_names_are_the_same_objects_wherever_they_come_from(as_tome: types.ModuleType) -> None:
    import tome  # type: ignore[import-not-found]
    from tome.merge import merge_wavg  # type: ignore[import-not-found]
    from tome.patch.timm import ToMeBlock as Named  # type: ignore[import-not-found]
    from tome.vis import generate_colormap  # type: ignore[import-not-found]

    assert tome is as_tome
    assert tome_ext.install_as("tome") is tome  # again
    assert merge_wavg is tome_ext.merge_wavg
    assert Named is ToMeBlock
    assert generate_colormap is tome_ext.vis.generate_colormap
    assert callable(tome.patch.timm)
    assert tome.patch.timm is sys.modules["tome.patch.timm"].apply_patch
    # What the published project does not have.
    assert tome.match is tome_ext.match
    assert tome.patch.remove is tome_ext.patch.remove
    for module, name in ((tome, "nothing"), (tome.patch, "nothing"), (tome.vis, "nothing")):
        with pytest.raises(AttributeError, match=r"module 'tome_ext\.published.* 'nothing'"):
            getattr(module, name)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'tome\.plan'"):
        import tome.plan  # type: ignore[import-not-found]


def test_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tome_ext.install_as("token_merging")
    code = "from token_merging.merge import do_nothing as found"
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["found"] is matching.do_nothing
    for name in [name for name in sys.modules if name.split(".")[0] == "token_merging"]:
        del sys.modules[name]


def test_a_project_of_that_name_that_was_imported_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tome", "tome.merge"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        before = dict(sys.modules)
        with pytest.raises(
            ImportError, match=rf"{name} was imported already.*install_as\('tome'\)"
        ):
            tome_ext.install_as("tome")
        assert sys.modules == before
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("name", ["", "a.b", "tome_ext", "1st", None])
def test_names_it_cannot_be_installed_as(name: Any) -> None:
    with pytest.raises(ValueError, match="name: expected a top-level name such as 'tome', got"):
        tome_ext.install_as(name)


def test_needs_no_model_library_and_no_pillow_until_they_are_used(run_python: Any) -> None:
    run = run_python(
        "import sys, tome_ext\n"
        "sys.modules.update(dict.fromkeys(['timm', 'torchvision', 'PIL', 'numpy']))\n"
        "tome_ext.install_as('tome')\n"
        "import tome, tome.vis, tome.patch.mae, torch\n"
        "from tome.merge import merge_wavg\n"
        "from tome.patch.timm import apply_patch\n"
        "model = torch.nn.Linear(1, 1)\n"
        "for use in (lambda: apply_patch(model), lambda: tome.vis.generate_colormap):\n"
        "    try: use()\n"
        "    except (ImportError, ValueError) as error: print(error)\n"
        "    else: raise SystemExit('expected an error')\n"
    )
    assert run.returncode == 0, run.stderr


def test_the_package_itself_under_another_name_says_what_to_call(run_python: Any) -> None:
    run = run_python(
        "import sys, tome_ext\n"
        "sys.modules['tome'] = tome_ext\n"
        "import tome\n"
        "for name in ('utils', 'patch', 'patch.timm', 'vis'):\n"
        "    try: exec(f'from tome.{name} import anything')\n"
        "    except ImportError as error: assert 'tome_ext.install_as' in str(error), error\n"
        "    else: raise SystemExit(name)\n"
    )
    assert run.returncode == 0, run.stderr


def test_signatures_are_the_published_ones(as_tome: types.ModuleType) -> None:
    def parameters(function: Any) -> list[tuple[str, Any]]:
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in found if p.kind not in kinds]

    no = inspect.Parameter.empty
    start = [("model", no), ("trace_source", False)]
    assert parameters(as_tome.patch.timm) == [*start, ("prop_attn", True)]
    assert parameters(as_tome.patch.swag) == [*start, ("prop_attn", True)]
    assert parameters(as_tome.patch.mae) == [*start, ("prop_attn", False)]
    assert parameters(as_tome.vis.generate_colormap) == [("N", no), ("seed", 0)]
    assert parameters(as_tome.merge.do_nothing) == [("x", no), ("mode", None)]
    names = [name for name, _ in parameters(as_tome.make_visualization)]
    assert names == ["img", "source", "patch_size", "class_token"]
    assert [name for name, _ in parameters(as_tome.utils.parse_r)] == ["num_layers", "r"]


# --- the patch ----------------------------------------------------------------------------------


def test_patch_of_timm_is_ours() -> None:
    x = images()
    model, ours = tiny(), tome_ext.patch.timm(tiny(), r=9, prop_attn=False)
    apply_patch(model, True, False)
    assert model.r == 0
    assert model._tome_info["trace_source"] is True
    model.r = 9
    assert torch.equal(model(x), ours(x))
    assert model._tome_info["source"].shape == (2, 65 - 9 * DEPTH, 65)
    assert tome_ext.patch.remove(model) is None
    assert torch.equal(apply_patch(model, r=9, prop_attn=False, inference=True)(x), ours(x))


def test_swag_is_torchvisions() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        made = torchvision.models.VisionTransformer(32, 4, 3, 4, 32, 64, num_classes=5)
        return made.eval()

    from tome_ext.published.patch import swag

    x = images()
    patched = swag(model(), True)
    patched.r = 9
    assert torch.equal(patched(x), tome_ext.patch.torchvision(model(), r=9)(x))
    assert patched._tome_info["source"].shape == (2, 65 - 27, 65)


class EncoderBlock(nn.Module):
    """Of the name that the published patch looks for in SWAG's own repository."""


def test_swags_own_classes_are_refused_by_an_error_that_names_what_to_call() -> None:
    from tome_ext.published.patch import swag

    for model in (nn.Sequential(EncoderBlock()), tiny()):
        with pytest.raises(ValueError, match=r"got .*SWAG_E2E_V1.*tome_ext\.patch\.torchvision"):
            swag(model)
    for name in ("make_block_class", "make_transformer_class", "make_encoder_class"):
        with pytest.raises(ImportError, match=rf"no {name} .*tome_ext\.patch\.torchvision"):
            exec(f"from tome_ext.published.patch.swag import {name}")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from tome_ext.published.patch.swag import nothing")


# --- _tome_info ---------------------------------------------------------------------------------


def test_info_that_is_written_takes_effect() -> None:
    model, x = apply_patch(tiny()), images()
    info = model._tome_info
    info["r"] = 9
    assert model.r == 9
    assert torch.equal(model(x), tome_ext.patch.timm(tiny(), r=9)(x))
    assert info["source"] is None
    info["r"] = [9, 5, 3]
    info["prop_attn"], info["trace_source"] = False, True
    assert torch.equal(model(x), tome_ext.patch.timm(tiny(), r=[9, 5, 3], prop_attn=False)(x))
    assert model._tome_info["source"].shape == (2, 65 - 17, 65)
    info.update(size=None, source=None)
    assert model.tome is None
    assert info["size"] is info["source"] is None
    info["mine"] = "kept"
    assert model._tome_info["mine"] == "kept"
    assert copy.deepcopy(model)._tome_info["mine"] == "kept"
    assert info.pop("mine") == "kept"
    assert "mine" not in model._tome_info
    info["class_token"], info["distill_token"] = True, False  # as they are


def test_info_that_cannot_take_effect_raises_and_changes_nothing() -> None:
    model = apply_patch(tiny(), r=9)
    info, before = model._tome_info, dict(model._tome_info)
    for key, value, message in (
        ("size", torch.ones(2, 65, 1), r"'size'\]: expected None.*MergePlan\.merge\(x, size\)"),
        ("source", torch.eye(65), r"'source'\]: expected None"),
        ("class_token", False, r"'class_token'\]: expected True, which the model says, got False"),
        ("distill_token", True, r"'distill_token'\]: expected False, .*tome_ext\.match"),
        ("r", "8", r"expected an integer >= 0, got '8'"),
        ("prop_attn", "no", r"expected True or False, got 'no'"),
        ("trace_source", None, r"expected True or False, got None"),
        ("r", [1] * 9, r"at most 3 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            info[key] = value
    for change in (lambda: info.pop("r"), info.clear, lambda: info.__delitem__("class_token")):
        with pytest.raises(TypeError, match="cannot be deleted, only read or set"):
            change()
    with pytest.raises(AttributeError, match=r"change model\.r, or patch again .*patch\.auto\("):
        model._tome_info = {"r": 8}
    assert info == before
    pruning = tome_ext.patch.timm(tiny(), r=9, method="topk")
    with pytest.raises(ValueError, match=r"'prop_attn'\]: 'topk' has no sizes .*method='tome'"):
        pruning._tome_info["prop_attn"] = True


def test_info_is_a_view_and_its_copies_are_dicts() -> None:
    model = apply_patch(tiny(), r=9)
    info = model._tome_info
    assert info["size"] is None
    model(images())
    assert info["size"].shape == (2, 65 - 27, 1)
    for other in (dict(info), copy.copy(info), copy.deepcopy(info), {**info}):
        assert type(other) is dict
        assert other["r"] == [9] * DEPTH
    assert pickle.loads(pickle.dumps(info)).keys() == info.keys()
    assert len(info) == len(list(info)) == 7
    assert repr(info).startswith("{'r': [9, 9, 9], 'size': tensor(")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sizes_in_info_have_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = apply_patch(tiny(global_pool="").to(dtype), r=9)
    x = model.forward_features(images(dtype=dtype))
    size = model._tome_info["size"]
    assert size.dtype == dtype
    assert torch.equal(size.squeeze(2).float(), model.tome.size)
    assert model.head((x * size)[:, 1:].sum(1) / 64).dtype == dtype


# --- classes to build on --------------------------------------------------------------------------


def patched_by_client(model: Any, r: Any, block: type, attention: type, **info: Any) -> Any:
    """A patch of one's own, as clients write it around the published classes."""
    model.__class__ = make_tome_class(type(model))
    model.r = r
    model._tome_info = {
        "r": 0,
        "size": None,
        "source": None,
        "trace_source": False,
        "prop_attn": True,
        "class_token": model.cls_token is not None,
        "distill_token": False,
        **info,
    }
    for module in model.modules():
        if isinstance(module, Block):
            module.__class__ = block
            module._tome_info = model._tome_info
        elif isinstance(module, Attention):
            module.__class__ = attention
    return model


class OwnBlock(ToMeBlock):
    """A client's block: merging written out with the published functions."""

    def forward(self, x: Tensor) -> Tensor:
        info: Any = self._tome_info
        attended, metric = self.attn(self.norm1(x), info["size"] if info["prop_attn"] else None)
        x = x + self._drop_path1(self.ls1(attended))
        r = info["r"].pop(0)
        if r > 0:
            merge, _ = matching.bipartite_soft_matching(metric, r, info["class_token"])
            if info["trace_source"]:
                info["source"] = matching.merge_source(merge, x, info["source"])
            x, info["size"] = matching.merge_wavg(merge, x, info["size"])
        return x + self._drop_path2(self.ls2(self.mlp(self.norm2(x))))


class OwnAttention(ToMeAttention):
    """A client's attention: the matrix, with the sizes as they come."""

    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        logits = q @ k.mT * self.scale
        if size is not None:
            logits = logits + size.log()[:, None, None, :, 0]
        weights = logits.softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2)), k.mean(1)


CLIENTS = [
    pytest.param(ToMeBlock, ToMeAttention, id="ours"),
    pytest.param(OwnBlock, ToMeAttention, id="own block"),
    pytest.param(ToMeBlock, OwnAttention, id="own attention"),
    pytest.param(OwnBlock, OwnAttention, id="both"),
]


@pytest.mark.parametrize(("block", "attention"), CLIENTS)
@pytest.mark.parametrize("schedule", [9, (9, -1), [5, 0, 7]])
def test_a_clients_patch_is_tome(block: type, attention: type, schedule: Any) -> None:
    x = images(dtype=torch.float64)
    want = plain_tome(tiny(init_values=0.5).double(), x, tome_ext.parse_r(DEPTH, schedule))
    model = patched_by_client(tiny(init_values=0.5).double(), schedule, block, attention)
    for _ in range(2):
        torch.testing.assert_close(model(x), want)
    assert model._tome_info["size"].sum(1).eq(65).all()


@pytest.mark.parametrize(("block", "attention"), CLIENTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_clients_patch_in_half_precision(
    block: type, attention: type, dtype: torch.dtype
) -> None:
    """Nothing on the way may leave the model's dtype, sizes least of all."""
    model = patched_by_client(tiny().to(dtype), 9, block, attention, trace_source=True)
    y = model(images(dtype=dtype))
    assert y.dtype == model._tome_info["size"].dtype == dtype
    assert y.isfinite().all()
    assert model._tome_info["source"].shape == (2, 65 - 27, 65)
    with torch.autocast("cpu", dtype):
        again = patched_by_client(tiny(), 9, block, attention)(images())
    tolerance = 0.05 if dtype == torch.float16 else 0.3
    assert (again.float() - y.float()).abs().max() < tolerance * y.float().abs().max()


def test_a_clients_patch_trains() -> None:
    x = images(dtype=torch.float64)
    grads = []
    for patch in (lambda m: patched_by_client(m, 9, OwnBlock, OwnAttention), partial(
        tome_ext.patch.timm, r=9
    )):  # fmt: skip
        model = patch(tiny().double())
        model(x).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("options", [{"gated": True}, {"qk_norm": True}, {"unfused": True}])
def test_our_attention_is_all_of_timms(options: dict[str, Any]) -> None:
    x = images(dtype=torch.float64)
    model = patched_by_client(tiny(**options).double(), 9, ToMeBlock, ToMeAttention)
    torch.testing.assert_close(model(x), tome_ext.patch.timm(tiny(**options).double(), r=9)(x))


def test_distilled_models_and_no_proportional_attention() -> None:
    x = images(dtype=torch.float64)
    info = {"distill_token": True, "prop_attn": False}
    model = patched_by_client(tiny(distilled=True).double(), 9, ToMeBlock, ToMeAttention, **info)
    ours = tome_ext.patch.timm(tiny(distilled=True).double(), r=9, prop_attn=False)
    torch.testing.assert_close(model(x), ours(x))


def test_patched_modules_are_instances_of_the_published_classes() -> None:
    for model in (apply_patch(tiny()), patched_by_client(tiny(), 9, OwnBlock, OwnAttention)):
        assert sum(isinstance(module, ToMeBlock) for module in model.modules()) == DEPTH
        assert sum(isinstance(module, ToMeAttention) for module in model.modules()) == DEPTH
    assert not any(isinstance(module, OwnBlock) for module in apply_patch(tiny()).modules())
    for module in tiny().modules():
        assert not isinstance(module, (ToMeBlock, ToMeAttention))
    assert isinstance(ToMeBlock(32, num_heads=4), Block)
    assert isinstance(ToMeAttention(32, num_heads=4), Attention)


def test_replacing_a_forward_that_patched_models_do_not_run_is_refused() -> None:
    for owner in (ToMeBlock, ToMeAttention):
        before = owner.forward
        with pytest.raises(TypeError, match=rf"derive a class from {owner.__name__} and put it on"):
            owner.forward = lambda self, x: x  # type: ignore[method-assign,assignment]
        assert owner.forward is before

    class Mine(ToMeBlock):
        pass

    Mine.forward = lambda self, x: 2 * x  # type: ignore[method-assign,assignment,misc]
    assert torch.equal(Mine(32, num_heads=4)(torch.ones(1)), torch.full((1,), 2.0))


def test_a_block_that_was_left_without_its_dict_says_so() -> None:
    block = ToMeBlock(32, num_heads=4)
    for given in (None, {}, {"r": 0}, {"r": []}):
        if given is not None:
            block._tome_info = given
        with pytest.raises(RuntimeError, match=r"ToMeBlock: expected _tome_info with a list 'r'"):
            block(torch.randn(2, 9, 32))


# --- MAE ------------------------------------------------------------------------------------------


class Mae(VisionTransformer):
    """What MAE makes of timm's class, in its own words: pooling is part of forward_features."""

    def __init__(self, global_pool: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.global_pool = global_pool  # type: ignore[assignment]
        if global_pool:
            self.fc_norm = nn.LayerNorm(options["embed_dim"], eps=1e-6)
            del self.norm

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = self.blocks(self._pos_embed(self.patch_embed(x)))
        return self.fc_norm(x[:, 1:].mean(1)) if self.global_pool else self.norm(x)[:, 0]


class MaeOfNow(Mae):
    """One with a forward of its own, as its head needs under today's timm."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.forward_features(x))


def mae(kind: type = MaeOfNow, pools: bool = True) -> Any:
    """A model of 64 patches with weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = kind(
        pools, img_size=32, patch_size=4, embed_dim=32, depth=DEPTH, num_heads=4, num_classes=5
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.double().eval()


def mae_tome(x: Tensor, pools: bool) -> Tensor:
    """The same with timm's own class, whose patch has tests of its own."""
    options = {"global_pool": "avg"} if pools else {}
    model = tiny(**options).double()
    own = mae(pools=pools).state_dict()
    model.load_state_dict(own)
    return tome_ext.patch.timm(model, r=9, prop_attn=False)(x)


@pytest.mark.parametrize("pools", [True, False])
def test_mae_pools_by_size(pools: bool) -> None:
    from tome_ext.published.patch import mae as patch_mae

    x = images(dtype=torch.float64)
    model = mae(pools=pools)
    unpatched, keys, kind = model(x), list(model.state_dict()), type(model)
    assert patch_mae(model) is model
    assert model._tome_info["prop_attn"] is False
    torch.testing.assert_close(model(x), unpatched)
    model.r = 9
    want = mae_tome(x, pools)
    torch.testing.assert_close(model(x), want)
    assert not torch.allclose(want, unpatched)
    assert list(model.state_dict()) == keys
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(x), model(x))
    patch_mae(model, True, True, r=5, inference=True)  # again, with other settings
    assert (model.r, model._tome_info["trace_source"], model._tome_info["prop_attn"]) == (
        5, True, True)  # fmt: skip
    tome_ext.patch.remove(model)
    assert type(model) is kind
    assert torch.equal(model(x), unpatched)


@pytest.mark.parametrize("pools", [True, False])
def test_mae_with_the_head_that_timm_has_now(pools: bool) -> None:
    """timm's forward_head pools and normalises what forward_features has pooled already."""
    from tome_ext.published.patch import mae as patch_mae

    x = images(dtype=torch.float64)
    model = patch_mae(mae(Mae, pools), r=9)
    torch.testing.assert_close(model(x), mae_tome(x, pools))
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 32)
    with pytest.raises(ValueError, match="attn_mask: expected none"):
        model.forward_features(x, attn_mask=torch.ones(65, 65, dtype=torch.bool))


def test_mae_of_timm_and_what_is_no_vision_transformer() -> None:
    from tome_ext.published.patch import mae as patch_mae

    x = images()
    model = patch_mae(tiny(global_pool="avg"), r=9)
    ours = tome_ext.patch.timm(tiny(global_pool="avg"), r=9, prop_attn=False)
    assert torch.equal(model(x), ours(x))

    class Own(VisionTransformer):
        def forward_features(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            return super().forward_features(x)

    for other, message in (
        (Own(img_size=32, patch_size=4, embed_dim=32, depth=1, num_heads=4), "forward_features of"),
        (nn.Linear(1, 1), "got torch.nn.modules.linear.Linear"),
    ):
        with pytest.raises(ValueError, match=message):
            patch_mae(other)
    pooling = mae()
    pooling.attn_pool = AttentionPoolLatent(32, pos_embed="abs", feat_size=8)
    with pytest.raises(ValueError, match="adds position embeddings"):
        patch_mae(pooling)


@pytest.mark.parametrize("pools", [True, False])
def test_a_clients_forward_on_a_patched_mae(pools: bool) -> None:
    """Found in public code: the forward that timm changed is put back on the instance."""
    from tome_ext.published.patch import mae as patch_mae

    def forward(self: Any, x: Tensor) -> Tensor:
        self._tome_info["r"] = schedule.parse_r(len(self.blocks), self.r)
        self._tome_info["size"] = None
        self._tome_info["source"] = None
        return self.head(self.forward_features(x))

    x = images(dtype=torch.float64)
    model = patch_mae(mae(Mae, pools), prop_attn=False)
    model.forward = types.MethodType(forward, model)
    model._tome_info["r"] = [9] * DEPTH
    for _ in range(2):
        torch.testing.assert_close(model(x), mae_tome(x, pools))
    assert (model.r, model._tome_info["r"]) == ([9] * DEPTH, [9] * DEPTH)


@pytest.mark.parametrize("pools", [True, False])
def test_a_clients_patch_of_mae(pools: bool) -> None:
    x = images(dtype=torch.float64)
    model = patched_by_client(mae(pools=pools), 9, ToMeBlock, ToMeAttention, prop_attn=False)
    model.__class__ = make_mae_class(MaeOfNow)
    torch.testing.assert_close(model(x), mae_tome(x, pools))
    model.r = 0
    torch.testing.assert_close(model(x), mae(pools=pools)(x))
