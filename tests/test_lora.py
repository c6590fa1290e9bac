"""LoRA on the language side of any family: where it goes, what it leaves alone, its variants, and their saving."""

from __future__ import annotations

import torchvision_shim

torchvision_shim.available()  # before transformers is imported, which looks for torchvision once

import inspect  # noqa: E402
import re  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import peft  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
import zoo  # noqa: E402
from peft import PeftModel  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from torch.testing import assert_close  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from mmft.config import LoraConfig, ModelConfig  # noqa: E402
from mmft.models.adapter_io import save_adapter  # noqa: E402
from mmft.models.anchor import Anchor  # noqa: E402
from mmft.models.lora import add_adapter, lora_targets, peft_config, trainability_kept  # noqa: E402
from mmft.models.policy import load_policy  # noqa: E402
from mmft.models.prompts import PromptBuilder, pad_prompts  # noqa: E402
from mmft.models.structure import context_length, language_model, language_parts, output_head  # noqa: E402
from mmft.types import UserError  # noqa: E402

# Where the layers go

# How the families name what is not language. The code under test reads no names.
PICTURE_SIDE = re.compile(
    r"vision|visual|image|video|audio|projector|projection|connector|qformer|perceiver|vqmodel|patch|enc_to_dec|aligner"
)
# Their encoder is the tower; that of others reads the prompt.
SEEING_ENCODERS = ("pix2struct", "pp_formulanet", "vision-encoder-decoder")

SOME = (
    "blip", "blip-2", "florence2", "gemma3", "git", "idefics", "idefics3", "janus", "kosmos-2", "llama4", "llava",
    "mllama", "paligemma", "pix2struct", "qwen2_5_vl", "qwen3_5", "t5gemma2", "vision-encoder-decoder",
)  # fmt: skip


def skeleton(kind: str) -> PreTrainedModel:
    """The family as its default config has it, but no deeper than 4 layers, and without weights."""
    config = AutoConfig.for_model(kind)
    for part in (config, config.get_text_config(), getattr(config, "vision_config", None)):
        for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "depth"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(getattr(part, name), 4))
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def on_picture_side(kind: str, name: str) -> bool:
    tower = kind in SEEING_ENCODERS and re.match(r"(model\.)?encoder\.", name)
    return bool(tower or PICTURE_SIDE.search(re.sub(r"per_layer_\w+", "", name)))


def attention_linears(model: nn.Module) -> set[str]:
    """Names of the linear layers that attention modules hold directly, told by their classes' names."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "Attention" in type(module).__name__
        for name, child in module.named_children()
        if type(child) in (nn.Linear, Conv1D)
    }


def check_targets(kind: str, model: PreTrainedModel) -> None:
    head = output_head(model)
    pattern, everything = lora_targets(model, "language"), lora_targets(model, "all-linear")
    found = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    assert not [name for name in found if on_picture_side(kind, name)], kind
    expected = {name for name in attention_linears(model) if not on_picture_side(kind, name)}
    assert expected and not expected - found, kind
    assert all(re.fullmatch(everything, name) for name in found), kind
    for name, module in model.named_modules():
        if re.fullmatch(everything, name):
            assert isinstance(module, nn.Linear | Conv1D) and module is not head, (kind, name)


@pytest.mark.parametrize("kind", SOME)
def test_a_family_is_adapted_on_its_language_side_alone(kind: str) -> None:
    """Layers are told by name here, by structure there."""
    check_targets(kind, skeleton(kind))


@pytest.mark.slow
def test_every_family_is_adapted_on_its_language_side_alone() -> None:
    """All that transformers can build from their default configs."""
    checked = []
    for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        try:
            model = skeleton(kind)
            output_head(model)
        except Exception:  # an incomplete default config, a library that isn't there, or a model that writes no text
            continue
        if kind != "udop":  # its layers read layout and text together: none is language alone
            check_targets(kind, model)
            checked.append(kind)
    assert len(checked) >= 70, f"only {len(checked)} could be built"


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("git", ["git.encoder"]),  # beside git.image_encoder and git.visual_projection
        ("idefics", ["model.layers", "model.gated_cross_attn_layers"]),  # beside tower and resampler
        ("t5gemma2", ["model.encoder.text_model.layers", "model.decoder"]),
        ("florence2", ["model.language_model"]),
        ("blip", ["text_decoder.bert"]),
        ("blip-2", ["language_model.model.decoder"]),
    ],
)
def test_language_parts_leave_the_tower_out(kind: str, parts: list[str]) -> None:
    assert language_parts(skeleton(kind)) == parts


def test_the_head_of_a_model_that_names_none() -> None:
    blip = skeleton("blip")
    assert blip.get_output_embeddings() is None
    assert output_head(blip) is blip.text_decoder.cls.predictions.decoder
    with pytest.raises(UserError, match="PI0ForConditionalGeneration has no output embedding"):
        output_head(skeleton("pi0"))


def test_a_router_that_is_a_linear_layer_is_left_alone() -> None:
    model = skeleton("llama4")
    routers = [name for name, module in model.named_modules() if type(module).__name__ == "Llama4Router"]
    pattern = lora_targets(model, "language")
    assert routers and not any(re.fullmatch(pattern, name) for name in routers)


def test_the_end_of_a_dotted_name_tells_self_from_cross_attention() -> None:
    model = skeleton("mllama")
    model.model.language_model.layers[1].cross_attn = model.model.language_model.layers[0].self_attn
    both = [n for n, _ in model.named_modules() if re.fullmatch(lora_targets(model, ["q_proj"]), n)]
    one = [n for n, _ in model.named_modules() if re.fullmatch(lora_targets(model, ["self_attn.q_proj"]), n)]
    assert set(one) < set(both) and all("self_attn" in name for name in one)


def test_a_weight_that_is_read_but_not_called_gets_no_adapter() -> None:
    """nn.MultiheadAttention in SigLIP's pooling head: `out_proj` beside layers that are named the same."""
    model = skeleton("cohere2_vision")
    pattern = lora_targets(model, "all-linear")
    found = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    assert "model.vision_tower.head.attention.out_proj" not in found
    assert any(name.endswith("self_attn.out_proj") for name in found)


@pytest.mark.parametrize(("kind", "length"), [("blip", 512), ("git", 1024), ("llava", 2048), ("pix2struct", None)])
def test_context_length(kind: str, length: int | None) -> None:
    assert context_length(skeleton(kind)) == length


# In the forward pass


def logits(folder: Path, family: zoo.Family, policy: Any) -> torch.Tensor:
    """Of a question about a picture; an encoder-decoder is given the beginning of an answer."""
    blocks = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(blocks.numpy()).resize((64, 48), Image.Resampling.NEAREST)
    text = family.marker + "What is there?"
    if family.chat:
        content = [{"type": "image"}, {"type": "text", "text": "What is there?"}]
        text = policy.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = dict(policy.processor(text=[text], images=[image], return_tensors="pt"))
    inputs.pop("labels", None)
    if policy.model.config.is_encoder_decoder:
        answer = policy.processor.tokenizer("the big picture", return_tensors="pt")["input_ids"]
        takes = inspect.signature(policy.model.get_base_model().forward).parameters
        inputs = {name: value for name, value in inputs.items() if name in takes}
        inputs["decoder_input_ids"] = answer
    with torch.no_grad():
        return policy.model(**inputs).logits


@pytest.mark.parametrize("name", list(zoo.FAMILIES))
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapter_off_and_a_fresh_adapter_are_the_base_to_the_bit(name: str, variant: Any, tmp_path: Path) -> None:
    if reason := zoo.missing(name):
        pytest.skip(reason)
    family, folder = zoo.FAMILIES[name], zoo.build(name, tmp_path / name)
    policy = load_policy(ModelConfig(path=str(folder), lora=LoraConfig(r=2, **variant)))
    fresh = logits(folder, family, policy)
    tiny.stirred(policy.model, 0.3)
    moved = logits(folder, family, policy)
    with policy.model.disable_adapter():
        base = logits(folder, family, policy)
    assert torch.equal(fresh, base)
    assert (moved - base).abs().max() > 1e-3


# Variants


def probe() -> dict[str, torch.Tensor]:
    builder = PromptBuilder(tiny.processor())
    return pad_prompts([builder(row) for row in tiny.rows(3)], builder.pad_id, "right")


def adapted(model: nn.Module | None = None, **options: Any) -> PeftModel:
    """A Llava with an adapter that has trained."""
    model = add_adapter(tiny.llava() if model is None else model, LoraConfig(r=4, alpha=6, **options))
    tiny.stirred(model, 0.2)
    return model.eval()


def merged_square(model: PeftModel) -> torch.Tensor:
    """||W_merged - W_pretrained||^2 by PEFT's own merge, weight by weight."""
    base = tiny.llava().state_dict()
    merged = model.merge_and_unload().state_dict()
    return sum((merged[name] - value).square().sum() for name, value in base.items())


VARIANTS = {
    "lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "gaussian": {"init": "gaussian"},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "saved": {"modules_to_save": ("lm_head", "multi_modal_projector")},
}  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_is_saved_and_reloaded_to_the_same_logits(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**options)
    with torch.no_grad():
        trained = model(**probe()).logits
        folder = save_adapter(model, tmp_path / "adapter", probe())
        assert torch.equal(model(**probe()).logits, trained)
        plain = PeftModel.from_pretrained(tiny.llava(), folder).eval()
        assert torch.equal(plain(**probe()).logits, trained)
        assert (trained - tiny.llava()(**probe()).logits).abs().max() > 1e-2


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_anchor_measures_every_variant(options: dict[str, Any]) -> None:
    model = adapted(**options)
    distance = Anchor(model, l2=1.0).penalty().loss
    assert_close(distance, merged_square(model))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_of_any_variant_is_the_identity(options: dict[str, Any], dtype: torch.dtype) -> None:
    base = tiny.llava().to(dtype)
    inputs = probe()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        expected = base(**inputs).logits
        model = add_adapter(base, LoraConfig(r=4, **options)).eval()
        assert torch.equal(model(**inputs).logits, expected)
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    assert not model.training and factors and all(p.requires_grad and p.dtype == torch.float32 for p in factors)
    assert Anchor(model, l2=1.0).distance() == pytest.approx(0.0, abs=1e-4)


def test_the_scale_of_rslora() -> None:
    layer = next(m for m in adapted(use_rslora=True).modules() if hasattr(m, "lora_A"))
    assert layer.scaling["default"] == pytest.approx(6 / 4**0.5)


def test_doras_distance_has_the_gradient_of_the_dense_one() -> None:
    """W' = m (W + sBA) / ||W + sBA||, written out densely, on one layer."""
    model = add_adapter(tiny.text_policy(), LoraConfig(r=2, use_dora=True, target_modules=("q_proj",)))
    tiny.stirred(model, 0.2)
    dense = torch.zeros(())
    for layer in (m for m in model.modules() if hasattr(m, "lora_A")):
        weight = layer.base_layer.weight
        moved = weight + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        magnitude = layer.lora_magnitude_vector["default"].weight
        dense = dense + (magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight).square().sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = Anchor(model, l2=1.0).penalty().loss
    assert_close(loss, dense)
    assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(dense, parameters), atol=1e-5, rtol=1e-4)


def test_doras_magnitudes_are_no_part_of_the_adapter_penalty() -> None:
    model = adapted(use_dora=True)
    phi = [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
    assert_close(Anchor(model, adapter_penalty=1.0).penalty().loss, sum(p.square().sum() for p in phi))


def test_dora_beside_another_active_adapter_is_refused() -> None:
    model = adapted(use_dora=True)
    model.add_adapter("other", peft_config(model.get_base_model(), LoraConfig(r=2)))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="anchor.l2 cannot be measured: .* several active adapters"):
        Anchor(model, l2=1.0)


def test_dora_on_an_embedding_is_refused() -> None:
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="embed_tokens uses DoraEmbeddingVariant"):
        Anchor(peft.get_peft_model(tiny.text_policy(), config), l2=1.0)


def test_modules_to_save_train_whole_and_only_known_ones_are_taken() -> None:
    model = add_adapter(tiny.llava(), LoraConfig(r=2, modules_to_save=("lm_head",)))
    whole = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert whole == [f"base_model.model.lm_head.modules_to_save.default.{kind}" for kind in ("weight", "bias")]
    assert output_head(model).weight is model.base_model.model.lm_head.modules_to_save["default"].weight
    assert peft_config(tiny.llava(), LoraConfig(modules_to_save=("norm",))).modules_to_save == [
        "model.language_model.norm"  # and no layernorm
    ]
    with pytest.raises(UserError, match="model.lora.modules_to_save: the model has no module named 'lmhead'"):
        add_adapter(tiny.llava(), LoraConfig(modules_to_save=("lmhead",)))


def test_gpt2s_layers_are_linear_too(recwarn: pytest.WarningsRecorder, tmp_path: Path) -> None:
    """Conv1D keeps its weight as (in, out); PEFT is told so, and says nothing. The anchor's dense arithmetic agrees."""
    folder = zoo.build("vision-encoder-decoder", tmp_path / "model")
    policy = load_policy(ModelConfig(path=str(folder), lora=LoraConfig(r=2, use_dora=True)))
    tiny.stirred(policy.model, 0.2)
    base = load_policy(ModelConfig(path=str(folder), lora=None)).model.state_dict()
    distance = Anchor(policy.model, l2=1.0).penalty().loss
    merged = policy.model.merge_and_unload().state_dict()
    assert_close(distance, sum((merged[name] - value).square().sum() for name, value in base.items()))
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]


def test_targets_of_a_model_that_has_an_adapter_are_the_same() -> None:
    plain = peft_config(tiny.llava(), LoraConfig())
    model = add_adapter(tiny.llava(), LoraConfig(r=2, modules_to_save=("lm_head",)))
    again = peft_config(model.get_base_model(), LoraConfig())
    assert again.target_modules == plain.target_modules
    assert language_model(model)[0] == "base_model.model.model.language_model"


def test_trainability_is_kept() -> None:
    model = tiny.text_policy()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    with trainability_kept(model):
        model.requires_grad_(True)
        model.lm_head.requires_grad_(False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"lm_head.weight", "lm_head.bias"}
