"""How much memory the recipes for hub models need at full size, counted by `mmft plan` without a weight of theirs.

    python scripts/plan_hub_recipes.py            # those that need torchvision: MMFT_TORCHVISION, see tests/

Each family's tiny checkpoint (tests/zoo.py) gets the sizes of the real one in its config and its processor, which are
public, and pictures of 500 x 375. Words are the tiny tokenizer's, so prompts are a little longer than the real ones.
Weights in bf16. Copies that a CPU makes of them for its own libraries are left out: the recipes are for GPUs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torchvision_shim

torchvision_shim.available()  # before transformers is imported, which looks for torchvision once

import zoo  # noqa: E402
from PIL import Image  # noqa: E402

SQUARE = {"height": 224, "width": 224}
LARGE_SQUARE = {"height": 384, "width": 384}
# Recipe -> family, then what of config.json and processor_config.json differs from the tiny one.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "blip_base_caption": (
        "blip",
        {
            "vision_config": {
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                "image_size": 384, "patch_size": 16,
            },
            "text_config": {
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                "encoder_hidden_size": 768, "vocab_size": 30524,
            },
        },
        {"image_processor": {"size": LARGE_SQUARE}},
    ),
    "smolvlm_256m_caption": (
        "smolvlm",
        {
            "vision_config": {
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                "image_size": 512, "patch_size": 16,
            },
            "text_config": {
                "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280, "max_position_embeddings": 8192,
                "tie_word_embeddings": True,
            },
            "scale_factor": 4,
            "tie_word_embeddings": True,
        },
        {
            "image_processor": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
            "image_seq_len": 64,
        },
    ),
    "paligemma_3b_caption": (
        "paligemma",
        {
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                "image_size": 224, "patch_size": 14, "projection_dim": 2048,
            },
            "text_config": {
                "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
                "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 257216, "num_image_tokens": 256,
                "layer_types": ["full_attention"] * 18, "query_pre_attn_scalar": 256,
            },
            "hidden_size": 2048,
            "projection_dim": 2048,
        },
        {"image_processor": {"size": SQUARE, "image_seq_length": 256}},
    ),
    "qwen2_5_vl_3b_vqa": (
        "qwen2_5_vl",
        {
            "vision_config": {
                "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
                "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            },
            "text_config": {
                "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000,
                "layer_types": ["full_attention"] * 36, "tie_word_embeddings": True,
                "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default"},
            },
            "tie_word_embeddings": True,
        },
        {"image_processor": {"patch_size": 14, "size": {"shortest_edge": 3136, "longest_edge": 12845056}}},
    ),
    "llava_1_5_7b_caption": (
        "llava",
        {
            "vision_config": {
                "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                "image_size": 336, "patch_size": 14, "projection_dim": 768,
            },
            "text_config": {
                "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32064, "max_position_embeddings": 4096,
            },
            "image_seq_length": 576,
        },
        {
            "image_processor": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
            "patch_size": 14,
        },
    ),
}  # fmt: skip


def main() -> int:
    print(f"{'recipe':<24}{'parameters':>14}{'weights':>11}{'peak':>11}  at")
    for recipe, (family, config, processor) in MODELS.items():
        if reason := zoo.missing(family):
            print(f"{recipe:<24}{reason}")
            continue
        with tempfile.TemporaryDirectory() as name:
            model, data = zoo.build(family, Path(name) / "model"), rows(Path(name) / "data")
            for file, changes in (("config.json", config), ("processor_config.json", processor)):
                whole = json.loads((model / file).read_text(encoding="utf-8"))
                (model / file).write_text(json.dumps(merged(whole, changes)), encoding="utf-8")
            print(line(recipe, plan(recipe, model, data)), flush=True)
    return 0


def rows(folder: Path) -> Path:
    """Pictures with captions and questions, as many as a plan looks at."""
    folder.mkdir()
    lines = []
    for i in range(40):
        Image.new("RGB", (500, 375), (6 * i, 90, 120)).save(folder / f"{i:02}.png")
        asked = {"question": "what is there in this picture?", "answer": "a cat"}
        lines.append({"file_name": f"{i:02}.png", "caption": ["a man and a dog run on the beach"] * 5, **asked})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def merged(whole: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The nested dictionary with the changes in it."""
    found = dict(whole)
    for key, value in changes.items():
        inner = isinstance(value, dict) and isinstance(found.get(key), dict) and key.endswith(("_config", "_processor"))
        found[key] = merged(found[key], value) if inner else value
    return found


def plan(recipe: str, model: Path, data: Path) -> dict[str, Any]:
    code = "import torchvision_shim; torchvision_shim.available(); from mmft.cli import main; raise SystemExit(main())"
    command = [
        sys.executable, "-c", code, "plan", recipe, "--json", "--no-probe", "--memory", "1000GB",
        f"model.path={model}", "data.type=imagefolder", f"data.path={data}", "train.precision=bf16",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(zoo.__file__).parent)
    if done.returncode:
        raise SystemExit(f"{recipe}: {done.stderr}")
    return json.loads(done.stdout)


def line(recipe: str, record: dict[str, Any]) -> str:
    return f"{recipe:<24}{json.dumps(record)[:3000]}"


if __name__ == "__main__":
    sys.exit(main())
