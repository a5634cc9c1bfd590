"""What only Transformers has: recorded states, attention implementations, files, larger models."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from host_cases import cast, loud
from host_cases_transformers import (
    BEIT,
    DEPTH,
    IMAGE,
    LABELS,
    LAYERS,
    PATCH,
    SIDE,
    TOKENS,
    VJEPA2,
    images,
    made,
    naflex,
    videos,
    without_positions,
)
from torch import nn

import tome_ext
from tome_ext.patch.common.block_call import BlockCall
from tome_ext.patch.common.positions import for_all_tokens, of_length_1
from tome_ext.patch.hosts.transformers import FAMILIES
from tome_ext.patch.hosts.transformers_families import REFUSED
from tome_ext.patch.hosts.transformers_parts import check_version

N = TOKENS + 1
R = 4
LENGTHS = [N - layer * R for layer in range(DEPTH + 1)]


def vit(**options: Any) -> Any:
    return made(hf.ViTForImageClassification, hf.ViTConfig, **IMAGE, **LABELS, **options)


def patched(model: Any = None, r: Any = R, **options: Any) -> Any:
    return tome_ext.patch.transformers(vit() if model is None else model, r, **options)


def dinov2(model: Any, **options: Any) -> Any:
    return made(model, hf.Dinov2Config, **IMAGE, mlp_ratio=2, **options)


# --- what a forward returns ---------------------------------------------------------------------


def test_hidden_states_have_the_length_of_their_layer() -> None:
    model = patched()
    out = model(images(), output_hidden_states=True)
    assert [x.shape[1] for x in out.hidden_states] == LENGTHS
    for layer, x in enumerate(out.hidden_states):
        spread = model.tome.unmerge(x, layer)
        assert spread.shape == (2, N, 32)
        assert torch.equal(spread[:, 0], x[:, 0])
    # A list asks for some of them, from some version of Transformers on.
    wanted = vit()(images(), output_hidden_states=[-2]).hidden_states
    chosen = model(images(), output_hidden_states=[-2]).hidden_states
    assert [x is None for x in chosen] == [x is None for x in wanted]
    for x, whole in zip(chosen, out.hidden_states, strict=False):
        assert x is None or torch.equal(x, whole)


def test_restored_tokens_come_with_restored_states() -> None:
    merged, full = patched(vit().vit), patched(vit().vit, restore_tokens=True)
    out = merged(images(), output_hidden_states=True)
    spread = full(images(), output_hidden_states=True)
    assert out.last_hidden_state.shape[1] == LENGTHS[-1]
    assert torch.equal(spread.last_hidden_state, merged.tome.unmerge(out.last_hidden_state))
    for layer, x in enumerate(spread.hidden_states):
        assert torch.equal(x, merged.tome.unmerge(out.hidden_states[layer], layer))


def test_restored_tokens_in_one_graph() -> None:
    model = made(hf.VJEPA2ForVideoClassification, hf.VJEPA2Config, **VJEPA2, **LABELS)
    patched(model, restore_tokens=True)
    with torch.no_grad():
        expected = model(videos()).logits
        torch._dynamo.reset()
        y = torch.compile(model, fullgraph=True, backend="eager")(videos()).logits
    torch.testing.assert_close(y, expected)


def test_tuples_instead_of_outputs() -> None:
    model = patched(vit().vit)
    out = model(images(), output_hidden_states=True)
    first, states = model(images(), output_hidden_states=True, return_dict=False)
    assert torch.equal(first, out.last_hidden_state)
    assert len(states) == DEPTH + 1


def test_attention_matrices_are_refused_while_merging() -> None:
    model = patched()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"output_attentions: .* set model.r = 0"):
        model(images(), output_attentions=True)
    model.r = 0
    assert len(model(images(), output_attentions=True).attentions) == DEPTH
    model.r = R
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        model(images())


def test_a_mask_is_refused_where_there_is_a_bias_of_pairs() -> None:
    model = made(hf.BeitForImageClassification, hf.BeitConfig, **BEIT).beit
    x, shown = images(), torch.ones(2, N, dtype=torch.int64)
    expected = model(x, attention_mask=shown).last_hidden_state
    patched(model)
    for args, mask in ((), {"attention_mask": shown}), ((None, False, shown), {}):
        model.r = R
        with pytest.raises(ValueError, match=r"attention_mask: .* set model.r = 0 to use one"):
            model(x, *args, **mask)
        model.r = 0
        assert torch.equal(model(x, *args, **mask).last_hidden_state, expected)


def test_signature_is_the_model_s() -> None:
    tower = vit().vit
    before = inspect.signature(tower.forward)
    assert inspect.signature(patched(tower).forward) == before


# --- attention implementations ------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [["eager", "sdpa"], pytest.param(["sdpa", "flex_attention"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_implementations_agree_and_change_after_patching(names: list[str]) -> None:
    shown = torch.ones(2, N, dtype=torch.int64)
    shown[:, -2 * SIDE :] = 0
    model = patched(r=[0, R, 0, R])
    expected = None
    with torch.no_grad():  # flex_attention has no gradient on the CPU
        for name in names:
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            y = model(images(), attention_mask=shown).logits
            assert model.tome.num_tokens == N - 2 * R
            expected = y if expected is None else expected
            torch.testing.assert_close(y, expected)


def test_a_matrix_as_mask_counts_as_one_of_keys() -> None:
    model = patched(vit().double())
    shown = torch.ones(2, N, dtype=torch.int64)
    shown[:, -2 * SIDE :] = 0
    x = images().double()
    matrix = (shown != 0)[:, None, None, :].expand(2, 1, N, N)
    torch.testing.assert_close(
        model(x, attention_mask=matrix).logits, model(x, attention_mask=shown).logits
    )
    positional = model.vit(x, None, None, shown).last_hidden_state
    torch.testing.assert_close(positional, model.vit(x, attention_mask=shown).last_hidden_state)


def test_two_models_of_one_config_do_not_mix() -> None:
    model = vit()
    other = hf.ViTForImageClassification(model.config).eval()
    expected = other(images()).logits
    patched(model)(images())
    assert torch.equal(other(images()).logits, expected)


# --- heads, and models around a tower -----------------------------------------------------------


def siglip2(labels: int = 5) -> Any:
    vision = {**LAYERS, "num_patches": TOKENS, "patch_size": PATCH, "vision_use_head": False}
    text = {**LAYERS, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = hf.Siglip2Config(vision_config=vision, text_config=text, num_labels=labels)
    return loud(hf.Siglip2ForImageClassification(config))


def dual(model: Any, config: Any, **options: Any) -> Any:
    text = {
        **LAYERS, "vocab_size": 9, "max_position_embeddings": 8, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return loud(model(config(vision_config=dict(IMAGE), text_config=text, **options)))


MEANS = {
    "CLIP": lambda: dual(hf.CLIPForImageClassification, hf.CLIPConfig, num_labels=5),
    "MetaCLIP 2": lambda: dual(hf.MetaClip2ForImageClassification, hf.MetaClip2Config),
    "SigLIP": lambda: dual(hf.SiglipForImageClassification, hf.SiglipConfig, num_labels=5),
    "DINOv2": lambda: dinov2(hf.Dinov2ForImageClassification, num_labels=5),
    "BEiT, class token": lambda: made(
        hf.BeitForImageClassification, hf.BeitConfig, **{**BEIT, "use_mean_pooling": False}
    ),
    "BEiT, one bias for all layers": lambda: made(
        hf.BeitForImageClassification,
        hf.BeitConfig,
        **{
            **BEIT,
            "use_relative_position_bias": False,
            "use_shared_relative_position_bias": True,
            "layer_scale_init_value": 0.0,
        },
    ),
}


@pytest.mark.parametrize("name", MEANS)
def test_heads_count_merged_tokens(name: str) -> None:
    model = MEANS[name]().double()
    without_positions(model)
    x = images(paired=True).double()
    expected = model(x).logits
    patched(model, r=[TOKENS // 2])
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-10)
    assert model.tome.num_tokens < N - 10


def test_a_masked_mean_counts_what_is_shown() -> None:
    model = patched(siglip2().double(), r=TOKENS)
    one, other = (cast(naflex(2, 0, noise), torch.float64) for noise in (0.0, 3.0))
    expected = model(**one).logits
    torch.testing.assert_close(model(**other).logits, expected, rtol=0, atol=1e-12)
    tome_ext.patch.remove(model)
    without_positions(model)
    one["pixel_values"] = one["pixel_values"][:, ::2].repeat_interleave(2, dim=1)
    expected = model(**one).logits
    patched(model, r=[TOKENS // 2 - SIDE])
    torch.testing.assert_close(model(**one).logits, expected, rtol=0, atol=1e-10)


def test_a_mean_after_pruning_is_over_the_tokens_left() -> None:
    model = patched(MEANS["DINOv2"](), method="topk")
    tokens = model.dinov2(images()).last_hidden_state
    assert tokens.shape[1] == LENGTHS[-1]
    both = torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), dim=1)
    torch.testing.assert_close(model(images()).logits, model.classifier(both))


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP", "AIMv2"])
def test_dual_models(kind: str) -> None:
    classes = {
        "CLIP": (hf.CLIPModel, hf.CLIPConfig),
        "SigLIP": (hf.SiglipModel, hf.SiglipConfig),
        "AIMv2": (hf.Aimv2Model, hf.Aimv2Config),
    }
    model = dual(*classes[kind])
    inputs = {"pixel_values": images(), "input_ids": torch.tensor([[1, 4, 5, 2]] * 2)}
    text = model(**inputs).text_embeds
    patched(model)
    out = model(**inputs)
    assert torch.equal(out.text_embeds, text)  # its text tower is of the same classes
    assert out.vision_model_output.last_hidden_state.shape[1] == model.tome.num_tokens
    assert model.vision_model.r == R


def test_backbones_and_dense_heads_get_every_state_at_full_length() -> None:
    backbones = [
        dinov2(hf.Dinov2Backbone, out_indices=[2, 4]),
        made(hf.DINOv3ViTBackbone, hf.DINOv3ViTConfig, **IMAGE, out_indices=[2, 4]),
        made(hf.BeitBackbone, hf.BeitConfig, **BEIT, out_indices=[2, 4]),
    ]
    for backbone in backbones:
        before = backbone(images()).feature_maps
        maps = patched(backbone)(images()).feature_maps
        assert [x.shape for x in maps] == [x.shape for x in before]
        assert not torch.equal(maps[-1], before[-1])
        assert backbone.tome.num_tokens < TOKENS - 3 * R
        backbone.r = 0
        assert torch.equal(backbone(images()).feature_maps[-1], before[-1])


def test_depth_anything() -> None:
    config = hf.Dinov2Config(
        **IMAGE, mlp_ratio=2, out_indices=[1, 2, 3, 4], reshape_hidden_states=False
    )
    model = loud(
        hf.DepthAnythingForDepthEstimation(
            hf.DepthAnythingConfig(
                backbone_config=config, reassemble_hidden_size=32, neck_hidden_sizes=[8] * 4,
                fusion_hidden_size=8, head_hidden_size=8, patch_size=PATCH,
            )
        )
    )  # fmt: skip
    depth = model(images()).predicted_depth
    assert patched(model)(images()).predicted_depth.shape == depth.shape
    assert model.tome.num_tokens == LENGTHS[-1]
    model.r = 0
    assert torch.equal(model(images()).predicted_depth, depth)


def test_decoders_get_every_token() -> None:
    model = patched(made(hf.ViTForMaskedImageModeling, hf.ViTConfig, **IMAGE, encoder_stride=4))
    masked = torch.arange(TOKENS).expand(2, -1) % 3 == 0
    assert model(images(), bool_masked_pos=masked).reconstruction.shape == (2, 3, 24, 24)
    mae = made(
        hf.ViTMAEForPreTraining, hf.ViTMAEConfig, **IMAGE, decoder_hidden_size=16,
        decoder_num_attention_heads=2, decoder_num_hidden_layers=1, decoder_intermediate_size=16,
    )  # fmt: skip
    assert patched(mae, r=1)(images()).logits.shape[1] == TOKENS


def test_v_jepa_2_with_and_without_its_predictor() -> None:
    model = made(hf.VJEPA2Model, hf.VJEPA2Config, **VJEPA2)
    x = videos()
    expected = model(x).predictor_output.last_hidden_state
    patched(model)
    out = model(x)
    assert out.last_hidden_state.shape[1] == 32
    assert out.predictor_output.last_hidden_state.shape == expected.shape
    short = model(x, skip_predictor=True, output_hidden_states=True)
    assert short.last_hidden_state.shape[1] == 16
    assert [y.shape[1] for y in short.hidden_states] == [32, 28, 24, 20, 16]
    assert torch.equal(model.tome.unmerge(short.last_hidden_state), out.last_hidden_state)


def test_v_jepa_2_restores_tokens_where_none_have_merged() -> None:
    model = made(hf.VJEPA2Model, hf.VJEPA2Config, **VJEPA2)
    x = videos()
    expected = model(x, skip_predictor=True).last_hidden_state
    patched(model, r=0, threshold=0.999999, restore_tokens=True)
    out = model(x, skip_predictor=True).last_hidden_state
    assert model.tome.num_tokens == expected.shape[1], "no pair is so similar"
    torch.testing.assert_close(out, expected)


POOLS: dict[str, tuple[Any, str]] = {
    "SigLIP": (lambda: made(hf.SiglipVisionModel, hf.SiglipVisionConfig, **IMAGE), "head"),
    "AIMv2": (lambda: made(hf.Aimv2VisionModel, hf.Aimv2VisionConfig, **IMAGE), "head"),
    "BEiT": (lambda: made(hf.BeitModel, hf.BeitConfig, **BEIT), "pooler"),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_of_kept_tokens_never_takes_other_sizes(name: str) -> None:
    make, part = POOLS[name]
    model = patched(make())
    pool = next(m for n, m in model.named_modules() if n.split(".")[-1] == part)
    out = model(images())
    tokens, expected = out.last_hidden_state, out.pooler_output
    model(images(seed=5))
    torch.testing.assert_close(pool(tokens), expected, rtol=0, atol=0)
    for other in (tokens[:1], tokens.flip(0), tokens.clone(), tokens[:1].expand(2, -1, -1)):
        with pytest.raises(RuntimeError, match="the sizes of these tokens are not known"):
            pool(other)
    model.r = 0
    torch.testing.assert_close(pool(tokens[:1]), pool(tokens.clone())[:1])  # nothing merges now


@pytest.mark.parametrize("name", [*POOLS, "V-JEPA 2"])
@pytest.mark.parametrize("strict", [False, True])
def test_pools_compile_as_one_graph_where_nothing_merges(name: str, strict: bool) -> None:
    if name == "V-JEPA 2":
        config: Any = hf.VJEPA2Config
        model = made(hf.VJEPA2ForVideoClassification, config, **VJEPA2, **LABELS)
        inputs = videos()
    else:
        model, inputs = POOLS[name][0](), images()
    with torch.no_grad():
        expected = model(inputs)[-1 if name != "V-JEPA 2" else 0]
        patched(model, r=0)
        model(inputs)
        if strict:
            run: Any = torch.compile(model, backend="eager", fullgraph=True)
        else:
            run = torch.export.export(model, (inputs,), strict=False).module()
        torch.testing.assert_close(run(inputs)[-1 if name != "V-JEPA 2" else 0], expected)


def test_a_pool_called_while_its_tower_runs_takes_what_its_tokens_are() -> None:
    model = patched(POOLS["SigLIP"][0]())
    pool = next(m for n, m in model.named_modules() if n.split(".")[-1] == "head")
    out = model(images(), output_hidden_states=True)
    kept, expected = out.last_hidden_state, out.pooler_output
    seen: list[Any] = []
    encoder = next(m for n, m in model.named_modules() if n.split(".")[-1] == "encoder")
    encoder.register_forward_hook(lambda *_: seen.append(pool(kept)))
    model(images(seed=5))
    assert torch.equal(seen[0], expected)


def test_an_attention_pool_with_a_parametrization() -> None:
    model = POOLS["SigLIP"][0]()
    pool = next(m for n, m in model.named_modules() if n.split(".")[-1] == "head")

    class Halved(nn.Module):
        def forward(self, weight: Any) -> Any:
            return weight / 2

    nn.utils.parametrize.register_parametrization(pool.attention, "in_proj_weight", Halved())
    expected = model(images()).pooler_output
    patched(model, threshold=1.0, r=0)
    torch.testing.assert_close(model(images()).pooler_output, expected)


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_that_peft_copies_counts_by_size(name: str) -> None:
    peft = pytest.importorskip("peft")
    make, part = POOLS[name]
    model = patched(make())
    expected = model(images()).pooler_output
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=[part])
    wrapped = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(wrapped(images()).pooler_output, expected)


def test_adapters_of_a_pool_take_part_where_tokens_have_merged() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["head.attention"], r=2, init_lora_weights=False)
    make = POOLS["SigLIP"][0]
    with pytest.raises(ValueError, match="if that is an adapter, add it after the patch"):
        patched(peft.get_peft_model(make(), config))
    model = peft.get_peft_model(patched(make()), config).eval()
    y = model(images()).pooler_output
    with model.disable_adapter():
        assert not torch.allclose(model(images()).pooler_output, y, atol=1e-3)
    y.sum().backward()
    assert any(p.grad is not None for n, p in model.named_parameters() if "lora" in n)
    torch.testing.assert_close(model.merge_and_unload()(images()).pooler_output, y)


def test_a_fused_token_s_rotary_table_is_the_mean_of_all_it_stands_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = made(hf.DINOv3ViTModel, hf.DINOv3ViTConfig, **IMAGE)
    tome_ext.patch.transformers(model, r=[8, 8, 0], method="evit")
    given: dict[int, Any] = {}
    own = BlockCall.rotary

    def rotary(call: BlockCall, table: Any, *args: Any) -> Any:
        given[call.tokens.layer] = table, own(call, table, *args)
        return given[call.tokens.layer][1]

    monkeypatch.setattr(BlockCall, "rotary", rotary)
    model(images())
    table, found = given[2]
    prefix = model.tome.rules.num_prefix_tokens
    carried = model.tome.plan_after(2).merge(for_all_tokens(table, 2, prefix))[0]
    torch.testing.assert_close(found, of_length_1(carried[:, prefix:]))


def llava() -> Any:
    text = hf.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**IMAGE), text_config=text, image_token_id=59
    )
    return loud(hf.LlavaForConditionalGeneration(config))


def internvl() -> Any:
    text = hf.Qwen2Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    vision = hf.InternVLVisionConfig(
        **{**IMAGE, "image_size": [24, 24], "patch_size": [PATCH, PATCH]}
    )
    config = hf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=59)
    return loud(hf.InternVLForConditionalGeneration(config))


@pytest.mark.parametrize(("model", "tokens"), [(llava, TOKENS), (internvl, TOKENS // 4)])
def test_language_models_get_every_token(model: Any, tokens: int) -> None:
    model = model()
    ids = torch.tensor([[1, *[59] * tokens, 5, 6]] * 2)
    expected = model(input_ids=ids, pixel_values=images()).logits
    patched(model)
    merged = model(input_ids=ids, pixel_values=images()).logits
    assert merged.shape == expected.shape
    assert not torch.equal(merged, expected)
    assert model.tome.num_tokens == LENGTHS[-1]
    assert model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images(),
        max_new_tokens=2, pad_token_id=0,
    ).shape[1] > ids.shape[1]  # fmt: skip
    tome_ext.patch.remove(model)
    assert torch.equal(model(input_ids=ids, pixel_values=images()).logits, expected)


def test_timm_models_inside_are_timm_s() -> None:
    config = hf.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 24, "patch_size": 4, "depth": 4, "embed_dim": 32, "num_heads": 2},
        num_labels=5,
    )
    model = loud(hf.TimmWrapperForImageClassification(config))
    expected = model(images()).logits
    assert tome_ext.patch.auto(model, r=R)(images()).logits.shape == (2, 5)
    assert model.tome.num_tokens == model.timm_model.tome.num_tokens == LENGTHS[-1]
    tome_ext.patch.remove(model)
    assert torch.equal(model(images()).logits, expected)


def test_a_tower_in_a_module_of_the_user_s() -> None:
    model = nn.Sequential(vit().vit)
    assert tome_ext.patch.auto(model, r=R)(images()).last_hidden_state.shape[1] == LENGTHS[-1]


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "config", "why"),
    [
        (hf.SwinModel, hf.SwinConfig, "swin is not supported: it attends within shifted windows"),
        (hf.HieraModel, hf.HieraConfig, "hiera is not supported"),
        (hf.SamVisionModel, hf.SamVisionConfig, "sam is not supported: its tokens stay a grid"),
        (hf.PixtralVisionModel, hf.PixtralVisionConfig, "pixtral is not supported: it packs"),
        (hf.BertModel, hf.BertConfig, "expected a vision tower of ViT, DeiT,"),
    ],
)
def test_other_families_are_refused_by_name(model: Any, config: Any, why: str) -> None:
    with torch.device("meta"):
        made = model(config())
    with pytest.raises(ValueError, match=why):
        tome_ext.patch.auto(made, r=R)
    assert not any(name.startswith("_tome") for part in made.modules() for name in vars(part))


def test_what_a_tower_cannot_be() -> None:
    class Other(hf.ViTModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="expected a vision tower of"):
        patched(Other(hf.ViTConfig(**IMAGE)))
    two = hf.VisionTextDualEncoderModel(vision_model=vit().vit, text_model=vit().vit)
    with pytest.raises(ValueError, match=r"several \(vision_model, text_model\)"):
        patched(two)
    model = vit()
    model.vit.layers[1].forward = lambda x, *args, **kwargs: x
    with pytest.raises(ValueError, match="ViTLayer as block 1, whose forward"):
        patched(model)
    with pytest.raises(ValueError, match="add_pooling_layer=False"):
        patched(hf.IJepaModel(hf.IJepaConfig(**IMAGE), add_pooling_layer=True))


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.17.0"])
def test_older_versions_are_refused(version: str) -> None:
    with pytest.raises(ImportError, match=f"this is transformers {version}"):
        check_version(version)


def test_families_name_what_there_is() -> None:
    for family in FAMILIES:
        module = __import__(family.module, fromlist=["_"])
        for name in (*family.towers, family.layer, family.attention, *family.heads, *family.pools):
            assert hasattr(module, name), (family.name, name)
    models = Path(hf.__file__).parent / "models"
    assert [name for name in REFUSED if not (models / name).is_dir()] == []


# --- files, training and other libraries --------------------------------------------------------


def test_files_are_those_of_the_unpatched_model(tmp_path: Path) -> None:
    model = vit()
    model.save_pretrained(tmp_path / "before")
    y = patched(model)(images()).logits
    model.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / each / "config.json").read_text() for each in ("before", "after"))
    assert before == after
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "after")
    assert torch.equal(patched(loaded)(images()).logits, y)


def test_pipeline() -> None:
    from PIL import Image

    processor = hf.ViTImageProcessor(size={"height": 24, "width": 24})
    model = patched()
    classify = hf.pipeline("image-classification", model=model, image_processor=processor)
    labels = classify(Image.new("RGB", (30, 30), (90, 20, 30)), top_k=5)
    assert sum(label["score"] for label in labels) == pytest.approx(1)
    assert model.tome.num_tokens == LENGTHS[-1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["ViT", "DINOv3", "V-JEPA 2"])
def test_checkpointed_gradients_are_the_same(name: str, reentrant: bool) -> None:
    def make() -> Any:
        if name == "DINOv3":
            return made(hf.DINOv3ViTModel, hf.DINOv3ViTConfig, **IMAGE)
        if name == "V-JEPA 2":
            return made(hf.VJEPA2ForVideoClassification, hf.VJEPA2Config, **VJEPA2, **LABELS)
        return vit()

    grads = []
    for checkpointed in (False, True):
        model = patched(make()).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        x = (videos() if name == "V-JEPA 2" else images()).requires_grad_()
        out = model(x)
        (out.pooler_output if name == "DINOv3" else out.logits).square().sum().backward(
            retain_graph=False
        )
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_r_may_change_before_a_checkpointed_backward() -> None:
    grads = []
    for change in (False, True):
        model = patched().train()
        model.gradient_checkpointing_enable()
        loss = model(images().requires_grad_()).logits.square().sum()
        if change:
            model.r = 1
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": images(1, index)[0], "labels": index}


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = patched()
    before = model.classifier.weight.detach().clone()
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], gradient_checkpointing=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = hf.Trainer(model, arguments, train_dataset=Pictures(), eval_dataset=Pictures())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert not torch.equal(model.classifier.weight, before)
    assert model.tome.num_tokens == LENGTHS[-1]


@pytest.mark.parametrize("patched_first", [False, True])
def test_peft(patched_first: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    model = vit()
    if patched_first:
        model = peft.get_peft_model(patched(model), config)
    else:
        model = tome_ext.patch.auto(peft.get_peft_model(model, config), r=R)
    model.eval()
    assert tome_ext.patch.find(model).r == R
    tome_ext.patch.find(model).r = 1
    model(pixel_values=images())
    assert model.base_model.model.vit.tome.num_tokens == N - DEPTH
    tome_ext.patch.find(model).r = R
    y = model(pixel_values=images()).logits
    assert model.base_model.model.vit.tome.num_tokens == LENGTHS[-1]
    y.sum().backward()
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    assert names
    assert all("lora" in name for name in names)
    torch.testing.assert_close(model.merge_and_unload()(images()).logits, y)


def test_a_peft_model_of_another_library() -> None:
    peft = pytest.importorskip("peft")
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 24, "patch_size": 4, "depth": 4, "embed_dim": 32, "num_heads": 2}
    model = loud(timm.models.VisionTransformer(**sizes, num_classes=5))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], r=2))
    tome_ext.patch.auto(model, r=R)(images())
    assert model.tome.num_tokens == LENGTHS[-1]


@pytest.mark.parametrize("hooked_first", [False, True])
def test_accelerate_s_hooks(hooked_first: bool) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    def hook(model: nn.Module) -> None:
        for module in model.modules():
            device_hook = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
            hooks.add_hook_to_module(module, device_hook)

    model, expected = vit(), patched()(images()).logits
    plain = vit()(images()).logits
    if hooked_first:
        hook(model)
    patched(model)
    if not hooked_first:
        hook(model)
    torch.testing.assert_close(model(images()).logits, expected)
    assert model.tome.num_tokens == LENGTHS[-1]
    tome_ext.patch.remove(model)
    assert torch.equal(model(images()).logits, plain)
    hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(patched(model)(images()).logits, expected)
    tome_ext.patch.remove(model)
    assert torch.equal(model(images()).logits, plain)
