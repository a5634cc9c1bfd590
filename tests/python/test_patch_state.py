"""What a patched model knows of its tokens: by forward, by thread, and by whoever asks."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from typing import Any

import pytest
import torch
from models import DEPTH, images, tiny
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

import tome_ext
from tome_ext.patch.common.class_swap import Swapped

# --- the head -----------------------------------------------------------------------------------


def made(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Tensors made from what forward_features returned, which know nothing of it."""
    features = model.forward_features(x)
    return {
        "clone": features.clone(),
        "cast": features.to(torch.float32),
        "dropout": nn.functional.dropout(features, 0.5),
        "slice": features[:1].contiguous(),
    }


@pytest.mark.parametrize("pool", ["avg", "map"])
@pytest.mark.parametrize("way", ["clone", "cast", "dropout"])
def test_a_head_never_takes_the_sizes_of_another_forward(pool: str, way: str) -> None:
    model = tome_ext.patch.timm(tiny(global_pool=pool).double(), r=9)
    a, b = images(seed=1, dtype=torch.float64), images(seed=2, dtype=torch.float64)
    features = made(model, a)[way]
    of_a = model.tome
    model.forward_features(b)
    with pytest.raises(RuntimeError, match=r"say so with x = model\.tome\.attach\(x\)"):
        model.forward_head(features)
    of_a.attach(features)
    head = copy.deepcopy(model).to(features.dtype)
    y = head.forward_head(features)
    if way == "clone":
        torch.testing.assert_close(y, model(a), rtol=0, atol=0)
    assert y.isfinite().all()


def test_sizes_belong_to_tokens_whoever_made_them() -> None:
    model = tome_ext.patch.timm(tiny(global_pool="avg").double(), r=9)
    twin = copy.deepcopy(model)
    a, b = images(seed=1, dtype=torch.float64), images(seed=2, dtype=torch.float64)
    features = twin.forward_features(a)
    model.forward_features(b)
    assert torch.equal(model.forward_head(features), model(a))


def test_a_compiled_tower_and_a_head_that_is_not() -> None:
    model = tome_ext.patch.timm(tiny(global_pool="avg").double(), r=9)
    x = images(dtype=torch.float64)
    expected = model(x)
    tower = torch.compile(model.forward_features, backend="eager", fullgraph=True)
    features = tower(x)
    with pytest.raises(RuntimeError, match="the output of a compiled function"):
        model.forward_head(features)
    torch.testing.assert_close(model.forward_head(model.tome.attach(features)), expected)


def two_views(model: Any, a: Tensor, b: Tensor) -> list[Tensor]:
    features = [model.forward_features(x) for x in (a, b)]
    return [model.forward_head(y) for y in features]


def each_view(model: Any, a: Tensor, b: Tensor) -> list[Tensor]:
    return [model.forward_head(model.forward_features(x)) for x in (a, b)]


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_compiled_heads_never_take_the_sizes_of_another_forward(pool: str) -> None:
    model = tome_ext.patch.timm(tiny(global_pool=pool).double(), r=9)
    a, b = images(seed=1, dtype=torch.float64), images(seed=2, dtype=torch.float64)
    expected = [model(x) for x in (a, b)]
    torch.testing.assert_close(two_views(model, a, b), expected)
    in_turn = torch.compile(each_view, backend="eager", fullgraph=True)
    torch.testing.assert_close(in_turn(model, a, b), expected)
    with pytest.raises(Exception, match="not the tokens that this model's tower has returned last"):
        torch.compile(two_views, backend="eager", fullgraph=True)(model, a, b)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="the sizes of these tokens are not known"):
        torch.compile(two_views, backend="eager")(model, a, b)


def test_a_compiled_head_asks_what_its_tokens_are() -> None:
    model = tome_ext.patch.timm(tiny(global_pool="avg").double(), r=9)
    a, b = images(seed=1, dtype=torch.float64), images(seed=2, dtype=torch.float64)
    expected = model(a)
    features = model.forward_features(a)
    model.forward_features(b)
    head = torch.compile(model.forward_head, backend="eager")
    torch.testing.assert_close(head(features), expected)
    with pytest.raises(RuntimeError, match="the sizes of these tokens are not known"):
        head(features.flip(0))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"or torch\.compile without fullgraph"):
        torch.compile(model.forward_head, backend="eager", fullgraph=True)(features)


def test_an_export_of_two_views_is_refused() -> None:
    class Views(nn.Module):
        def __init__(self, run: Any) -> None:
            super().__init__()
            self.model = tome_ext.patch.timm(tiny(global_pool="avg"), r=9)
            self.run = run

        def forward(self, a: Tensor, b: Tensor) -> list[Tensor]:
            views: list[Tensor] = self.run(self.model, a, b)
            return views

    inputs = images(seed=1), images(seed=2)
    views = Views(each_view)
    program = torch.export.export(views, inputs, strict=False)
    torch.testing.assert_close(program.module()(*inputs), views(*inputs))
    with pytest.raises(RuntimeError, match="the sizes of these tokens are not known"):
        torch.export.export(Views(two_views), inputs, strict=False)
    # What an export has left, which is fake, is nothing to a compiled head.
    features = views.model.forward_features(inputs[0])
    head = torch.compile(views.model.forward_head, backend="eager")
    torch.testing.assert_close(head(features), views.model(inputs[0]))


@pytest.mark.parametrize("inference", [False, True])
def test_a_block_copied_alone_works_on_in_its_tower(inference: bool) -> None:
    """As PEFT's modules_to_save, which trains copies in place of some modules."""
    model = tome_ext.patch.timm(tiny(), r=[6, 0, 8], restore_tokens=True, inference=inference)
    x = images()
    with torch.no_grad():
        expected = model.forward_features(x)
        mine = copy.deepcopy(model.blocks[2])
        assert mine._tome is model._tome
        original, model.blocks[2] = model.blocks[2], mine
        assert torch.equal(model.forward_features(x), expected)
        # What the block before leaves for the original is not taken by a copy that was trained.
        twin = copy.deepcopy(model)
        assert twin._tome is not model._tome
        for block in (mine, twin.blocks[2]):
            block.norm1.weight.mul_(3)
        assert torch.equal(model.forward_features(x), twin.forward_features(x))
        assert not torch.equal(model.forward_features(x), expected)
        model.r = 0
        assert model.forward_features(x).shape == expected.shape
        assert model.tome.num_tokens == expected.shape[1]
        assert twin.forward_features(x).shape == expected.shape
        assert twin.tome.num_tokens == expected.shape[1] - 14
        model.blocks[2] = original
        tome_ext.patch.remove(model)
    assert not any(isinstance(module, Swapped) for module in model.modules())


def test_a_copy_has_a_trail_of_its_own_whichever_part_is_copied_first() -> None:
    model = tome_ext.patch.torchvision(VisionTransformer(24, 4, 2, 2, 32, 48, num_classes=3), r=4)
    twin = copy.deepcopy(nn.ModuleList([model.encoder, model]))[1]
    assert twin._tome is not model._tome
    parts = [module for module in twin.modules() if isinstance(module, Swapped)]
    assert len(parts) == 6  # the model, its encoder, two blocks and their attention
    assert all(part._tome is twin._tome for part in parts)
    assert [block() for block in twin._tome.blocks] == list(twin.encoder.layers)
    assert [block() for block in model._tome.blocks] == list(model.encoder.layers)
    twin.r = 0
    model(images(side=24))
    assert (model.tome.num_tokens, twin(images(side=24)).shape) == (37 - 8, (2, 3))
    assert twin.tome.num_tokens == 37


def test_a_copy_leaves_patched_models_inside_it_their_own_trails() -> None:
    student = tome_ext.patch.timm(tiny(), r=4)
    student.teacher = tome_ext.patch.timm(tiny(depth=DEPTH + 2), r=9)
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        twin.r = 0
        assert (twin.teacher.r, student.r) == (9, 4)
        twin.teacher(images())
        assert twin.teacher.tome.num_tokens == 65 - 9 * (DEPTH + 2)


def test_a_copied_block_that_stays_is_the_one_that_follows() -> None:
    model = tome_ext.patch.timm(tiny(), r=4)
    model.blocks[1] = copy.deepcopy(model.blocks[1])
    gc.collect()
    model.blocks[1] = copy.deepcopy(model.blocks[1])
    gc.collect()
    assert model._tome.following(0, model.blocks[0]) is model.blocks[1]


def test_attach_refuses_other_tokens() -> None:
    model = tome_ext.patch.timm(tiny(), r=9)
    model(images())
    with pytest.raises(ValueError, match=r"expected \(2, 38, C\), got \(2, 65, 32\) float32"):
        model.tome.attach(torch.randn(2, 65, 32))


# --- settings -----------------------------------------------------------------------------------


class Waiting(nn.Module):
    """An MLP that waits in the middle of a forward."""

    def __init__(self, inner: nn.Module, inside: threading.Event, go: threading.Event) -> None:
        super().__init__()
        self.inner, self.inside, self.go = inner, inside, go

    def forward(self, x: Tensor) -> Tensor:
        self.inside.set()
        assert self.go.wait(60)
        y: Tensor = self.inner(x)
        return y


def test_a_forward_keeps_to_the_settings_it_began_with() -> None:
    model = tome_ext.patch.timm(tiny(), r=[8, 8, 8])
    x = images()
    expected = model(x)
    inside, go = threading.Event(), threading.Event()
    model.blocks[0].mlp = Waiting(model.blocks[0].mlp, inside, go)
    result: list[Tensor] = []
    thread = threading.Thread(target=lambda: result.append(model(x)))
    thread.start()
    assert inside.wait(60)
    model.r = [0, 20, 3]
    go.set()
    thread.join()
    assert torch.equal(result[0], expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_merges_as_its_forward_did(reentrant: bool) -> None:
    model = tome_ext.patch.timm(tiny().double(), r=[8, 6, 4])
    twin = copy.deepcopy(model)
    x = images(dtype=torch.float64).requires_grad_()

    def run(model: Any, inside: Any) -> Tensor:
        tokens = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            tokens = inside(block, tokens)
        return model.forward_head(model.norm(tokens))

    expected = torch.autograd.grad(
        run(twin, lambda block, tokens: block(tokens)).square().sum(),
        list(twin.blocks.parameters()),
    )
    y = run(model, lambda block, tokens: checkpoint(block, tokens, use_reentrant=reentrant))
    model.r = [1, 20, 0]
    left = model.tome
    y.square().sum().backward()
    for p, grad in zip(model.blocks.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert model.tome is left


# --- modules ------------------------------------------------------------------------------------


def test_classes_keep_their_names() -> None:
    model = tiny(global_pool="map")
    names = [(type(m).__module__, type(m).__qualname__) for m in model.modules()]
    tome_ext.patch.timm(model, r=8)
    assert [(type(m).__module__, type(m).__qualname__) for m in model.modules()] == names


def test_hooks_on_all_modules_see_what_they_would_see() -> None:
    model = tome_ext.patch.timm(tiny(init_values=0.5).double(), r=8)
    x = images(dtype=torch.float64)
    expected = model(x)
    norms: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, args, out: norms.append(module))
    try:
        y = model(x)
    finally:
        handle.remove()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for block in model.blocks:
        assert [module for module in norms if module is block.norm2] == [block.norm2]


def test_attention_that_was_bypassed_is_noticed_where_nothing_merges() -> None:
    """Tokens that have merged before would silently count once."""
    model = tome_ext.patch.timm(tiny(), r=[8, 0, 0])

    class Other(nn.Module):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return x

    model.blocks[2].attn = Other()
    with pytest.raises(RuntimeError, match="attention of block 2 handed over no keys"):
        model(images())


def test_jit_trace_with_its_defaults() -> None:
    model = tome_ext.patch.timm(tiny(global_pool="avg"), r=8)
    traced = torch.jit.trace(model, images())
    torch.testing.assert_close(traced(images(seed=1)), model(images(seed=1)))


class Wrapper(nn.Module):
    """As PEFT's models, which hold theirs two attributes deep."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def forward(self, x: Tensor) -> Any:
        return self.base_model["model"](x)


def test_info_of_quantised_and_wrapped_models() -> None:
    model = tome_ext.patch.timm(tiny(), r=8)
    want = tome_ext.info(model)
    assert tome_ext.info(Wrapper(model)) == want
    assert tome_ext.info(nn.Sequential(model, nn.Identity())) == want
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert tome_ext.info(quantised)["attention"] == want["attention"]
    assert quantised(images()).isfinite().all()


WRAPPERS: dict[str, Any] = {
    "none": lambda model: model,
    "two attributes deep": Wrapper,
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "a wrapper of a wrapper": lambda model: nn.DataParallel(Wrapper(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_r_is_set_through_any_wrapper(name: str) -> None:
    torch._dynamo.reset()
    wrapped = WRAPPERS[name](tome_ext.patch.timm(tiny(), r=8))
    inside = tome_ext.patch.find(wrapped)
    assert isinstance(inside, type(tome_ext.patch.find(inside)))
    expected = tome_ext.patch.timm(tiny(), r=3)(images())
    inside.r = 3
    torch.testing.assert_close(wrapped(images()), expected)
    assert inside.tome.num_tokens == 65 - 3 * DEPTH
    assert tome_ext.info(wrapped)["r"] == "3"


def test_what_is_patched_inside_is_found_or_refused_by_name() -> None:
    with pytest.raises(ValueError, match="expected a patched model, got DataParallel"):
        tome_ext.patch.find(nn.DataParallel(tiny()))
    pair = nn.ModuleList([tome_ext.patch.timm(tiny()), tome_ext.patch.timm(tiny())])
    for ask in (tome_ext.patch.find, tome_ext.info):
        with pytest.raises(ValueError, match=r"got ModuleList with several \(0, 1\); ask for each"):
            ask(pair)
    # A larger model that was patched is found, and not its tower.
    outer = nn.Sequential(nn.Identity(), tiny())
    tome_ext.patch.auto(outer, r=8)
    assert tome_ext.patch.find(nn.DataParallel(outer)) is outer
    with pytest.raises(ValueError, match=r"patched already.*tome_ext.patch.find\(model\).r"):
        tome_ext.patch.auto(nn.DataParallel(outer), r=3)


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["token", "avg", "map", ""])
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_restored_tokens_are_those_spread_by_hand(pool: str, method: Any) -> None:
    model = tome_ext.patch.timm(tiny(global_pool=pool).double(), r=8, method=method)
    x = images(dtype=torch.float64)
    merged, y = model.forward_features(x), model(x)
    spread = model.tome.unmerge(merged)
    tome_ext.patch.timm(model, r=8, method=method, restore_tokens=True)
    assert torch.equal(model.forward_features(x), spread)
    assert model.tome.num_tokens == 65 - 8 * DEPTH
    assert model.forward_features(x).shape == (2, 65, 32)
    if method == "tome" and pool:
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)


def test_unmerge_takes_the_tokens_of_any_layer() -> None:
    model = tome_ext.patch.timm(tiny(), r=[8, 0, 6])
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    model(images())
    for layer, out in enumerate(outputs, 1):
        spread = model.tome.unmerge(out, layer)
        assert torch.equal(spread, model.tome.plan_after(layer).unmerge(out))
    with pytest.raises(ValueError, match=r"expected 57 tokens, those after 1 layers, got \(2, 51"):
        model.tome.unmerge(outputs[2], 1)


def test_pruned_hidden_tokens_stay_hidden() -> None:
    model = tiny(depth=4).double()
    shown = torch.ones(2, 1, 1, 65, dtype=torch.bool)
    shown[..., 41:] = False
    one, other = images(dtype=torch.float64), images(dtype=torch.float64)
    other[..., 20:, :] = 5.0  # patches from row 5 on: tokens 41 and later
    for method in ("tome", "guided", "evit", "topk"):
        for proportional in (True, False):
            tome_ext.patch.timm(model, keep_rate=[0.7] * 4, method=method, prop_attn=proportional)
            expected = model(one, attn_mask=shown)
            assert model.tome.num_tokens < 25
            y = model(other, attn_mask=shown)
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
            matrix = shown.expand(2, 1, 65, 65)
            if method in ("tome", "guided"):
                y = model(other, attn_mask=matrix)
                torch.testing.assert_close(y, model(one, attn_mask=matrix), rtol=0, atol=1e-12)


# --- what cannot be patched -----------------------------------------------------------------------


class Named(nn.Module):
    """A wrapper with something of its own by the name that a patched model needs."""

    def __init__(self, model: nn.Module, name: str, value: Any) -> None:
        super().__init__()
        self.encoder = model
        setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.encoder(x)


@pytest.mark.parametrize(
    ("name", "value"),
    [("r", 3.0), ("r", nn.Parameter(torch.ones(1))), ("method", "mean"), ("tome", nn.Identity())],
)
def test_names_of_the_model_s_own_are_not_taken(name: str, value: Any) -> None:
    model = Named(tiny(), name, value)
    with pytest.raises(ValueError, match=f"expected a module without '{name}'.* got Named"):
        tome_ext.patch.auto(model, r=8)
    assert type(model) is Named
    tome_ext.patch.auto(model.encoder, r=8)
    assert getattr(model, name) is value


def test_what_is_patched_inside_is_not_patched_again() -> None:
    model = nn.Sequential(tiny())
    tome_ext.patch.auto(model[0], r=8)
    with pytest.raises(ValueError, match=r"0 \(VisionTransformer\) in it is patched already"):
        tome_ext.patch.auto(model, r=8)
    tome_ext.patch.remove(model[0])
    assert tome_ext.patch.auto(model, r=8).tome is None
