"""torch.compile of a patched model: graphs, recompilations, batch sizes, CUDA graphs.

Compiled training steps are in test_run_training.py, autocast in test_run_modes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import RUN, VARIANTS, images, tiny
from torch import Tensor, fx

import tome_ext

R = 8
DEPTH = 2
MODELS: dict[str, dict[str, Any]] = {
    **{name: VARIANTS[name] for name in RUN},
    "unfused, attention pool": {"global_pool": "map", "unfused": True, "reg_tokens": 2},
}


class Counting:
    """A backend that runs a graph as it is, and keeps it to be counted."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    @property
    def count(self) -> int:
        return len(self.graphs)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return tome_ext.patch.timm(tiny(depth=DEPTH, **MODELS[request.param]), r=R)


@torch.no_grad()
def test_all_layers_are_one_graph_that_is_kept(model: Any) -> None:
    backend = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        x = images(seed=seed)
        expected = model(x)
        want = model.tome
        torch.testing.assert_close(compiled(x), expected)
        # What a forward leaves is the same.
        assert model.tome[:3] == want[:3] == (DEPTH, 2, model.num_prefix_tokens + 64 - R * DEPTH)
        assert torch.equal(model.tome.size, want.size)
        assert torch.equal(model.tome.plan.assign, want.plan.assign)
    assert backend.count == 1
    targets = [node.target for node in backend.graphs[0].graph.nodes]
    assert targets.count(torch.ops.tome.match.default) == DEPTH


@torch.no_grad()
def test_guided_merging_is_one_graph() -> None:
    model = tome_ext.patch.timm(tiny(depth=DEPTH, init_values=0.5), r=R, method="guided")
    backend = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in (2, 2, 3):
        x = images(batch)
        torch.testing.assert_close(compiled(x), model(x))
    targets = [node.target for node in backend.graphs[0].graph.nodes]
    assert targets.count(torch.ops.tome.match.default) == DEPTH
    assert targets.count(torch.ops.tome.cls_attention.default) == DEPTH


@torch.no_grad()
def test_a_new_r_compiles_once_and_an_old_one_never_again(model: Any) -> None:
    backend = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    counts = []
    for r in (8, [0, 4], 8, 0, [0, 4], (8, -1), 8, 0):
        model.r = r
        torch.testing.assert_close(compiled(images()), model(images()))
        counts.append(backend.count)
    assert counts == [1, 2, 2, 3, 3, 4, 4, 4]


@torch.no_grad()
@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_one_graph_serves_all_batch_sizes(model: Any, how: str) -> None:
    backend = Counting()
    dynamic = True if how == "dynamic=True" else None
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    counts = []
    for batch in (2, 3, 7, 1, 5, 1, 4):
        x = images(batch)
        if how == "mark_dynamic" and batch > 1:
            torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), model(x))
        assert model.tome.batch_size == batch
        counts.append(backend.count)
    # torch treats a batch of one as a case of its own, for every model.
    assert counts == [1, 1, 1, 2, 2, 2, 2]


@torch.no_grad()
@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_inductor_in_reduce_overhead_mode(name: str) -> None:
    torch.compiler.reset()
    model = tome_ext.patch.timm(tiny(depth=DEPTH, **VARIANTS[name]), r=R)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for seed in range(2):
        x = images(seed=seed)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.cuda
def test_reduce_overhead_on_a_gpu(model: Any) -> None:
    torch.compiler.reset()
    model.cuda()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for r in (R, 3, R):
        model.r = r
        for seed in range(4):  # a warm-up, a recording, replays
            x = images(seed=seed, device="cuda")
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=1e-4, atol=1e-4)


def test_blocks_compiled_one_by_one() -> None:
    """Each is a graph of its own, for each knows its layer; torch's limit must allow them all."""
    model = tome_ext.patch.timm(tiny(depth=3), r=R)
    expected = model(images())
    for limit, enough in ((2, False), (3, True)):
        backend = Counting()
        for block in model.blocks:
            block.compile(fullgraph=True, backend=backend)
        with torch._dynamo.config.patch(recompile_limit=limit):
            if not enough:
                with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
                    model(images())
                continue
            for _ in range(2):
                torch.testing.assert_close(model(images()), expected)
            assert backend.count == 3


def test_eager_head_after_compiled_features() -> None:
    model = tome_ext.patch.timm(tiny(depth=DEPTH, global_pool="avg"), r=R)
    compiled = torch.compile(model.forward_features, fullgraph=True, backend=Counting())
    for seed in range(3):
        x = images(seed=seed)
        features = compiled(x)
        with pytest.raises(RuntimeError, match="the output of a compiled function"):
            model.forward_head(features)
        y = model.forward_head(model.tome.attach(features))
        torch.testing.assert_close(y, model(x))


def test_feature_maps_compile() -> None:
    model = tome_ext.patch.timm(tiny(depth=DEPTH), r=R)
    backend = Counting()

    @torch.compile(fullgraph=True, backend=backend)
    def maps(x: Tensor) -> list[Tensor]:
        return model.forward_intermediates(x, intermediates_only=True)

    for seed in range(2):
        x = images(seed=seed)
        for got, want in zip(
            maps(x), model.forward_intermediates(x, intermediates_only=True), strict=True
        ):
            torch.testing.assert_close(got, want)
    assert backend.count == 1
