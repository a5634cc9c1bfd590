"""What holds for a patched model of every library; ``host_cases`` has the models."""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_cases import Case, all_cases, cast
from torch import Tensor, nn

import tome_ext
from tome_ext.patch.common import block_call

CASES = all_cases()
MASKED = [case for case in CASES if case.hidden is not None]
PAIRED = [case for case in CASES if case.equal_tokens is not None]


def patch(case: Case, model: nn.Module, r: Any = 0, **options: Any) -> Any:
    return tome_ext.patch.auto(model, r, **{**case.options, **options})


def run(case: Case, model: Any, inputs: dict[str, Any]) -> Tensor:
    return case.output(model(**inputs))


def snapshot(model: nn.Module) -> list[tuple[type, list[str]]]:
    return [(type(module), sorted(vars(module))) for module in model.modules()]


def implementations(case: Case, model: Any) -> Any:
    """The model with each way it has of computing attention."""
    if not case.implementations:
        yield model
    for name in case.implementations:
        model.set_attn_implementation(name)
        yield model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_r_0_is_the_unpatched_model_bit_for_bit(case: Case) -> None:
    for train in (False, True):
        for model in implementations(case, case.make().train(train)):
            twin = copy.deepcopy(model)
            patch(case, model)
            outputs = []
            for each in (twin, model):
                torch.manual_seed(1)
                outputs.append(run(case, each, case.inputs(2, 0)))
                if train:
                    outputs[-1].square().sum().backward()
            assert torch.equal(*outputs)
            for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                assert p.grad is None or torch.equal(p.grad, q.grad), name
            tome_ext.patch.remove(model)
            model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_merge_and_none_is_lost(case: Case) -> None:
    for model in implementations(case, case.make()):
        patch(case, model, r=3)
        y = run(case, model, case.inputs(3, 0))
        assert y.isfinite().all()
        left = case.num_tokens - 3 * case.depth
        tokens = model.tome
        assert tokens.num_tokens == left
        assert tokens.size.shape == (3, left)
        assert (tokens.size.sum(1) == case.num_tokens).all()
        assert (tokens.size[:, : case.num_prefix_tokens] == 1).all()
        assert case.attention in tome_ext.info(model)["attention"]
        tome_ext.patch.remove(model)


@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_merging_equal_tokens_changes_nothing(case: Case) -> None:
    assert case.equal_tokens is not None
    model = case.make().double()
    inputs = case.equal_tokens(model, cast(case.inputs(2, 0), torch.float64))
    expected = run(case, model, inputs)
    patch(case, model, r=[(case.num_tokens - case.num_prefix_tokens) // 2])
    y = run(case, model, inputs)
    assert model.tome.num_tokens < case.num_tokens
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_hidden_pixels_change_nothing(case: Case) -> None:
    assert case.hidden is not None
    for model in implementations(case, case.make().double()):
        patch(case, model, r=case.num_tokens)
        one, other = (cast(case.hidden(2, 0, noise), torch.float64) for noise in (0.0, 3.0))
        expected = run(case, model, one)
        assert model.tome.num_tokens < case.num_tokens / 2
        torch.testing.assert_close(run(case, model, other), expected, rtol=0, atol=1e-12)
        tome_ext.patch.remove(model)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_image_does_not_depend_on_its_batch(case: Case) -> None:
    model = patch(case, case.make().double(), r=5)
    inputs = cast(case.inputs(3, 0), torch.float64)
    together = run(case, model, inputs)
    for image in range(3):
        alone = {
            key: x[image : image + 1] if isinstance(x, Tensor) else x for key, x in inputs.items()
        }
        torch.testing.assert_close(
            run(case, model, alone), together[image : image + 1], rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("method", ["tome", "guided"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_by_a_threshold_each_image_has_the_tokens_it_has_alone(case: Case, method: Any) -> None:
    model = case.make().double()
    inputs = cast(case.inputs(3, 0), torch.float64)
    for threshold in (0.95, 0.9, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, -1.0, -4.0):
        patch(case, model, method=method, threshold=threshold)
        together = run(case, model, inputs)
        counts = (model.tome.size > 0).sum(1).tolist()
        if len(set(counts)) > 1 and max(counts) < case.num_tokens:
            break
    assert len(set(counts)) > 1
    assert max(counts) == model.tome.num_tokens < case.num_tokens
    assert (model.tome.size.sum(1) == case.num_tokens).all()
    for image, count in enumerate(counts):
        alone = {
            key: x[image : image + 1] if isinstance(x, Tensor) else x for key, x in inputs.items()
        }
        y = run(case, model, alone)
        assert model.tome.num_tokens == count
        mine = together[image : image + 1]
        if y.dim() == 3 and mine.shape[1] == max(counts):
            mine = mine[:, :count]
        torch.testing.assert_close(y, mine, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["topk", "evit"])
@pytest.mark.parametrize("case", [case for case in CASES if case.class_token], ids=str)
def test_methods_that_prune(case: Case, method: Any) -> None:
    model = patch(case, case.make(), r=4, method=method)
    y = run(case, model, case.inputs(2, 0))
    assert y.isfinite().all()
    assert model.tome.num_tokens == case.num_tokens - 4 * case.depth
    assert model.tome.size is None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_guided_merging(case: Case) -> None:
    model, inputs = case.make().double(), cast(case.inputs(2, 0), torch.float64)
    plain = run(case, model, inputs)
    patch(case, model, r=4, method="guided")
    y = run(case, model, inputs)
    assert y.isfinite().all()
    assert model.tome.num_tokens == case.num_tokens - 4 * case.depth
    assert (model.tome.size.sum(1) == case.num_tokens).all()
    by_guided = model.tome.plan.assign
    assert (y - plain).abs().max() > 1e-6
    patch(case, model, r=4, method="tome")
    run(case, model, inputs)
    assert not torch.equal(model.tome.plan.assign, by_guided)
    patch(case, model, r=0, method="guided")
    assert torch.equal(run(case, model, inputs), plain)


@pytest.mark.parametrize("method", ["tome", "guided", "topk", "evit"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_plans_made_beside_attention_are_the_same(
    case: Case, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a CUDA graph, but for the stream."""
    if method in ("topk", "evit") and not case.class_token:
        return
    model = patch(case, case.make(), r=4, method=method)
    expected = run(case, model, case.inputs(2, 0))
    joined: list[object] = []
    stream = SimpleNamespace(wait_stream=joined.append)
    monkeypatch.setattr(block_call, "stream_beside", lambda q: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    assert torch.equal(run(case, model, case.inputs(2, 0)), expected)
    assert len(joined) >= case.depth


@pytest.mark.parametrize("case", [case for case in CASES if not case.class_token], ids=str)
def test_methods_that_prune_need_a_class_token(case: Case) -> None:
    model = case.make()
    before = snapshot(model)
    with pytest.raises(ValueError, match="this model has no class token"):
        patch(case, model, r=4, method="evit")
    assert snapshot(model) == before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_remove_restores_class_config_and_output(case: Case) -> None:
    model = case.make()
    before, expected = snapshot(model), run(case, model, case.inputs(2, 0))
    config = getattr(model, "config", None)
    written = None if config is None else config.to_json_string()
    names = [type(module).__name__ for module in model.modules()]
    patch(case, model, r=4)
    assert [type(module).__name__ for module in model.modules()] == names
    assert list(model.state_dict()) == list(case.make().state_dict())
    assert not torch.equal(run(case, model, case.inputs(2, 0)), expected)
    assert config is None or model.config.to_json_string() == written
    tome_ext.patch.remove(model)
    assert snapshot(model) == before
    assert config is None or (model.config is config and config.to_json_string() == written)
    assert torch.equal(run(case, model, case.inputs(2, 0)), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_copies_are_patched_and_independent(case: Case) -> None:
    model = patch(case, case.make(), r=4)
    expected = run(case, model, case.inputs(2, 0))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.tome is None
        assert torch.equal(run(case, twin, case.inputs(2, 0)), expected)
        twin.r = 0
        assert model.r == 4
        tome_ext.patch.remove(twin)
    assert torch.equal(run(case, model, case.inputs(2, 0)), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_do_not_mix(case: Case) -> None:
    model = patch(case, case.make(), r=4)
    inputs = [case.inputs(1 + index, index) for index in range(3)]
    with torch.no_grad():
        expected = [run(case, model, x) for x in inputs]
    wrong: list[object] = []
    barrier = threading.Barrier(len(inputs))

    def work(index: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(4):
                    barrier.wait(timeout=60)
                    if not torch.equal(run(case, model, inputs[index]), expected[index]):
                        wrong.append(index)
                    if model.tome.batch_size != 1 + index:
                        wrong.append(model.tome)
        except Exception as error:
            wrong.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_as_one_graph_once(case: Case) -> None:
    model = patch(case, case.make(), r=4)
    with torch.no_grad():
        expected = run(case, model, case.inputs(2, 0))
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        y = case.output(compiled(**case.inputs(2, 0)))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(**case.inputs(2, 1))
    assert model.tome.num_tokens == case.num_tokens - 4 * case.depth


@pytest.mark.parametrize("case", [case for case in CASES if case.exports], ids=str)
def test_exports_for_every_batch_size(case: Case) -> None:
    model = patch(case, case.make(), r=4)
    inputs, batch = case.inputs(2, 0), torch.export.Dim("batch")
    free = {name: {0: batch} if isinstance(x, Tensor) else None for name, x in inputs.items()}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=free, strict=False).module()
        for images in (1, 3):
            inputs = case.inputs(images, images)
            torch.testing.assert_close(case.output(program(**inputs)), run(case, model, inputs))
