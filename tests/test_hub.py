"""push, pull and merge through huggingface_hub's own client against a hub on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import loopback_hub
import pytest
import torch
from loopback_hub import TOKEN, LoopbackHub
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mmft import run
from mmft.cli import main
from mmft.config import ModelConfig, load_recipe, resolve
from mmft.hub import CardFacts, Hub, is_local, kind_of, model_card, stage
from mmft.hub.client import size_of
from mmft.hub.contents import KINDS, published
from mmft.hub.scrub import check_clean, without_paths
from mmft.models.merging import logits_of, merged
from mmft.models.policy import Policy, load_adapter, load_policy
from mmft.types import Row, UserError

SMALL = (
    "train.steps=1", "train.batch=4", "train.samples_per_prompt=2", "eval.samples=4", "data.samples=20",
    "generation.max_new_tokens=6", "model.lora.r=2", "train.lr=5e-3",
)  # fmt: skip
REPO = "ada/captions"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short run of the default recipe; tests that read it leave it as it is."""
    return run.train(load_recipe("caption_ppo", [*SMALL, f"logging.dir={tmp_path_factory.mktemp('secret-project')}"]))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with loopback_hub.running() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
        monkeypatch.setattr("mmft.cli._quiet_libraries", lambda: None)
        huggingface_hub.utils.disable_progress_bars()
        yield server


@pytest.fixture
def row() -> Row:
    return Row("x", Image.new("RGB", (96, 64), (200, 40, 30)), "Describe the picture.")


def pull(repo: str, out: Path) -> Path:
    Hub().pull(repo, out)
    return out


def logits(adapter: Path, row: Row) -> torch.Tensor:
    return logits_of(load_adapter(ModelConfig(), adapter, torch.float32), row)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_push_pull_and_plain_peft_give_the_same_logits(
    hub: LoopbackHub, finished: Path, tmp_path: Path, row: Row, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(finished), "--repo", REPO]) == 0
    said = capsys.readouterr().err
    assert "pushed README.md, adapter_config.json, adapter_model.safetensors, eval.json, recipe.yaml" in said
    assert f"{hub.url}/{REPO} answers as {finished} does" in said
    assert hub.repos[REPO].private and len(hub.repos[REPO].commits) == 1
    out = tmp_path / "pulled"
    assert main(["pull", REPO, str(out)]) == 0
    assert {path.name for path in out.rglob("*")} == set(hub.repos[REPO].head[1])
    assert torch.equal(logits(out, row), logits(finished / "adapter", row))
    base = AutoModelForImageTextToText.from_pretrained(resolve("builtin:tiny-vlm"), dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(out)).eval()
    processor = load_policy(ModelConfig()).processor
    assert torch.equal(logits_of(Policy(plain, processor), row), logits(finished / "adapter", row))
    picture = tmp_path / "p.png"
    row.image.save(picture)  # type: ignore[union-attr]
    assert run.generate(str(out), [picture]) == run.generate(str(finished), [picture])


def test_what_is_pushed_holds_no_path_and_no_secret(
    hub: LoopbackHub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    run.push(str(finished), REPO, private=False)
    assert not hub.repos[REPO].private
    forbidden = [str(Path.home()) + "/", "/home/", str(Path.cwd()), str(finished), "secret-project", "/tmp", TOKEN]
    for name, data in hub.repos[REPO].head[1].items():
        text = data.decode("utf-8", "replace")
        assert not [word for word in [*forbidden, "0123456789abcdef", "assets/"] if word in text], name
    config = json.loads(hub.repos[REPO].head[1]["adapter_config.json"])
    assert config["base_model_name_or_path"] is None, "the bundled base is on no hub"
    recipe = hub.repos[REPO].head[1]["recipe.yaml"].decode()
    assert "path: builtin:tiny-vlm" in recipe and "dir:" not in recipe


def test_the_card_tells_what_the_run_knows(hub: LoopbackHub, finished: Path) -> None:
    hub.licences["org/base"] = "apache-2.0"
    run.push(str(finished), REPO, base="org/base")
    files = hub.repos[REPO].head[1]
    card = files["README.md"].decode()
    front = card.split("---\n")[1]
    for line in (
        "base_model: org/base",
        "license: apache-2.0",
        "library_name: peft",
        "pipeline_tag: image-text-to-text",
    ):
        assert line in front
    after = json.loads((finished / "eval.json").read_text())["after"]["reward"]["mean"]
    assert re.search(rf"type: reward\n\s+value: {round(after, 4)}\n", front)
    for words in (
        "PPO with a trained critic", "| Reward |", "learned reward model builtin:caption-reward", "L2 anchor: 0.001",
        'from_pretrained("org/base")', f'PeftModel.from_pretrained(base, "{REPO}")', "## Limits", "under apache-2.0",
        "Measured on 4 held-out pictures", "Trained on synthetic scenes",
    ):  # fmt: skip
        assert words in card, words
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert b"path: org/base" in files["recipe.yaml"]


def test_a_second_push_is_a_commit_and_a_repeated_one_uploads_nothing(hub: LoopbackHub, finished: Path) -> None:
    first = run.push(str(finished), REPO)
    hub.seen.clear()
    again = run.push(str(finished), REPO)
    assert again.files == first.files
    assert not [path for method, path in hub.seen if method == "PUT"], "the weights are there already"


def test_refusals_are_one_line_each(
    hub: LoopbackHub, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push = ("push", str(finished), "--repo", REPO)
    hub.refusals = {("POST", "/api/repos/create"): 403}
    assert f"{REPO}: the token may not do that; it needs the right to write" in complaint(capsys, *push)
    hub.refusals = {("POST", "/commit/"): 409}
    said = complaint(capsys, *push)
    assert "in conflict with what is there" in said and "(409 from" in said
    assert "uploaded so far: adapter_model.safetensors, not committed. The same command goes on" in said
    hub.refusals = {("POST", "/preupload/"): 404}
    assert "no such repository, or a private one that the token may not see (404" in complaint(capsys, *push)
    hub.refusals = {("POST", "/preupload/"): 500}
    assert "the hub refused (500" in complaint(capsys, *push)
    hub.refusals = {}
    assert "no such repository" in complaint(capsys, "pull", "ada/nothing", str(finished / "out"))
    assert "'not a name'" in complaint(capsys, "push", str(finished), "--repo", "not a name")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 8)
    assert "not logged in, or the token is not valid" in complaint(capsys, *push)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "no connection to http://127.0.0.1:9" in complaint(capsys, *push)
    assert not (finished / "out").exists()


def test_a_push_that_breaks_off_goes_on(
    hub: LoopbackHub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Row
) -> None:
    push = ("push", str(finished), "--repo", REPO)
    hub.cuts = {("PUT", "/lfs/"): 1000}
    assert "no connection to" in complaint(capsys, *push) and not hub.repos[REPO].commits
    hub.cuts = {("POST", "/commit/"): 10}
    said = complaint(capsys, *push)
    assert "or it broke off" in said and "uploaded so far: adapter_model.safetensors" in said
    assert not hub.repos[REPO].commits
    hub.cuts = {}
    hub.seen.clear()
    assert main(push) == 0
    assert not [path for method, path in hub.seen if method == "PUT"] and len(hub.repos[REPO].commits) == 1


def test_a_pull_that_breaks_off_goes_on_and_damage_is_told(
    hub: LoopbackHub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.push(str(finished), REPO)
    out = tmp_path / "pulled"
    hub.cuts = {("GET", "/resolve/.*safetensors"): 1000}
    assert "broke off" in complaint(capsys, "pull", REPO, str(out)) and not out.exists()
    hub.cuts, hub.spoil = {}, b"\0" * 64
    assert "adapter_model.safetensors is damaged" in complaint(capsys, "pull", REPO, str(out)) and not out.exists()
    hub.spoil = None
    assert main(["pull", REPO, str(out)]) == 0
    files = hub.repos[REPO].head[1]
    assert {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    assert "is there already" in complaint(capsys, "pull", REPO, str(out))


def test_a_private_push_never_lands_in_a_public_repository(
    hub: LoopbackHub, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.push(str(finished), REPO, private=False)
    said = complaint(capsys, "push", str(finished), "--repo", REPO, "--private")
    assert "is a public repository; nothing was pushed" in said and len(hub.repos[REPO].commits) == 1


def test_pull_takes_no_code(hub: LoopbackHub, finished: Path, tmp_path: Path) -> None:
    run.push(str(finished), REPO)
    hub.repos[REPO].commit({**hub.repos[REPO].head[1], "modeling.py": b"import os", "a/config.json": b"{}"})
    pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out" / "modeling.py").exists() and not (tmp_path / "out" / "a").exists()
    hub.repos["ada/code"] = loopback_hub.Repo(False)
    hub.repos["ada/code"].commit({"modeling.py": b"import os"})
    with pytest.raises(UserError, match="holds neither an adapter nor a model"):
        pull("ada/code", tmp_path / "code")


def test_push_of_a_reward_model(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = resolve("builtin:caption-reward")
    run.push(folder, "ada/reward")
    files = hub.repos["ada/reward"].head[1]
    assert {"config.json", "model.safetensors", "terms.json", "vision/preprocessor_config.json"} <= set(files)
    card = files["README.md"].decode()
    assert "held-out pairwise accuracy: 89.2% [87.7, 90.8]" in card and "model: ada/reward" in card
    out = pull("ada/reward", tmp_path / "reward")
    scored = [next(iter(run.score_captions(str(path), "scenes", 1))) for path in (folder, out)]
    assert scored[0] == scored[1]


def test_what_is_staged_leaves_its_source_as_it_was(tmp_path: Path) -> None:
    source = shutil.copytree(resolve("builtin:caption-reward"), tmp_path / "source")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    text = (source / "recipe.yaml").read_text().replace("builtin:tiny-vlm", "/data/ada/tower")
    staged = stage(source, KINDS["reward"], tmp_path / "staged", "card", {"recipe.yaml": text})
    assert "vision: tower" in (staged / "recipe.yaml").read_text()
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


def test_a_push_takes_the_place_of_one_of_another_kind(hub: LoopbackHub, finished: Path, tmp_path: Path) -> None:
    run.push(str(finished), REPO, as_merged=True)
    hub.repos[REPO].commit({**hub.repos[REPO].head[1], "notes.txt": b"mine"})
    files = run.push(str(finished), REPO).files
    assert set(hub.repos[REPO].head[1]) == {*files, "notes.txt"}


def test_push_merged(hub: LoopbackHub, finished: Path, tmp_path: Path, row: Row) -> None:
    run.push(str(finished), "ada/whole", as_merged=True)
    out = pull("ada/whole", tmp_path / "whole")
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml"} <= {
        path.name for path in out.iterdir()
    }
    picture = tmp_path / "p.png"
    row.image.save(picture)  # type: ignore[union-attr]
    assert run.generate(str(out), [picture]) == run.generate(str(finished), [picture])
    with pytest.raises(UserError, match="no adapter to merge"):
        run.push(str(out), "ada/twice", as_merged=True)


def test_merge_needs_no_mmft(finished: Path, tmp_path: Path) -> None:
    """Another process, without mmft, agrees with base and adapter to 1e-5."""
    out = tmp_path / "merged"
    run.merge(str(finished), out)
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    policy = load_adapter(ModelConfig(), finished / "adapter", torch.float32)
    with torch.no_grad():
        mine = policy.model(input_ids=ids).logits
        off = AutoModelForImageTextToText.from_pretrained(resolve("builtin:tiny-vlm"), dtype=torch.float32).eval()
        assert (off(input_ids=ids).logits - mine).abs().max() > 1e-3, "the adapter does something"
    script = (
        "import sys, torch; sys.modules['mmft'] = None\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "from safetensors.torch import save_file\n"
        "AutoProcessor.from_pretrained(sys.argv[1])\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()\n"
        "assert model.dtype == torch.float32\n"
        "with torch.no_grad(): logits = model(input_ids=torch.tensor([[1, 5, 6, 7, 8]])).logits\n"
        "save_file({'logits': logits.contiguous()}, sys.argv[2])\n"
    )
    answer = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", script, str(out), str(answer)], check=True, cwd=tmp_path)
    assert (load_file(answer)["logits"] - mine).abs().max() < 1e-5


def test_merge_in_bf16_says_how_far_it_is(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(finished), str(tmp_path / "m"), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().err
    assert float(re.search(r"within (\S+)", said)[1]) > 1e-5  # type: ignore[index]
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.get_tensor(next(iter(file.keys()))).dtype == torch.bfloat16
    assert "is there already" in complaint(capsys, "merge", str(finished), str(tmp_path / "m"))


def test_merging_unties_a_head_that_was_trained(tmp_path: Path, row: Row) -> None:
    """modules_to_save on a model whose head is its embedding: loading must not tie them again."""
    tied = load_policy(ModelConfig(lora=None), "cpu", torch.float32)
    for config in (tied.model.config, tied.model.config.text_config):
        config.tie_word_embeddings = True
    tied.model.tie_weights()
    tied.model.save_pretrained(tmp_path / "tied")
    tied.processor.save_pretrained(tmp_path / "tied")
    config = ModelConfig(path=str(tmp_path / "tied"), lora={"modules_to_save": ["lm_head"], "r": 2})  # type: ignore[arg-type]
    policy = load_policy(config, "cpu", torch.float32)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    expected = logits_of(policy, row)
    plain = merged(policy)
    plain.model.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (logits_of(Policy(again, plain.processor), row) - expected).abs().max() < 1e-4


def test_what_is_refused_before_anything_goes(
    hub: LoopbackHub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such folder" in complaint(capsys, "push", "nowhere", "--repo", REPO)
    assert "--repo: where to?" in complaint(capsys, "push", str(finished))
    (tmp_path / "empty").mkdir()
    assert "holds neither an adapter nor a model" in complaint(capsys, "push", str(tmp_path / "empty"), "--repo", REPO)
    (tmp_path / "empty" / "recipe.yaml").write_bytes((finished / "recipe.yaml").read_bytes())
    assert "did the training end?" in complaint(capsys, "push", str(tmp_path / "empty"), "--repo", REPO)
    assert not hub.seen
    assert "has no adapter to merge" in complaint(capsys, "merge", resolve("builtin:tiny-vlm"), str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("hf_" + "a" * 34, "a token"),
        ("ghp_" + "b" * 36, "a token"),
        ("https://ada:hunter2@host/data", "a password in an address"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("see /home/ada/pictures", "the path /home/ada"),
        (r"C:\\Users\\ada\\x", "the path"),
        ("key = sw0rdfish-value", "the value of MY_SECRET"),
    ],
)
def test_secrets_stop_a_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, kind: str) -> None:
    monkeypatch.setenv("MY_SECRET", "sw0rdfish-value")
    (tmp_path / "recipe.yaml").write_text("prompt: " + content)
    with pytest.raises(UserError, match=f"recipe.yaml: holds {re.escape(kind)}") as raised:
        check_clean(tmp_path)
    assert "sw0rdfish" not in str(raised.value) and "hunter2" not in str(raised.value)
    (tmp_path / "recipe.yaml").unlink()
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors", {"note": content})
    with pytest.raises(UserError, match=r"w\.safetensors: holds"):
        check_clean(tmp_path)


def test_words_of_a_vocabulary_are_no_paths(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"/home/user": 1, f"{Path.home()}/": 2}))
    check_clean(tmp_path)


def test_paths_are_cut_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "cats").mkdir()
    recipe = {
        "model": {"path": "org/name"},
        "data": {"path": "/data/ada/cats", "prompt": "/What?"},
        "x": [{"dir": "~/r"}],
    }
    keys = frozenset({"path", "dir"})
    assert without_paths(recipe, keys) == {
        "model": {"path": "org/name"}, "data": {"path": "cats", "prompt": "/What?"}, "x": [{"dir": "r"}]
    }  # fmt: skip
    assert [is_local(p) for p in ("my/cats", "org/name", "builtin:x", r"D:\x", "../x", "file:///x", "")] == [
        True, False, False, True, True, True, False,
    ]  # fmt: skip


def test_kinds(tmp_path: Path, finished: Path) -> None:
    assert kind_of(finished / "adapter").name == "adapter"
    assert kind_of(Path(resolve("builtin:caption-reward"))).name == "reward"
    assert kind_of(Path(resolve("builtin:tiny-vlm"))).name == "model"
    names = [
        "model-00001-of-00002.safetensors",
        "optimizer.pt",
        "checkpoints/model.safetensors",
        "samples.jsonl",
        "x.py",
    ]
    assert published(KINDS["model"], names) == names[:1]
    assert [size_of(n) for n in (7, 1500, 2_500_000, 3_100_000_000)] == ["7 bytes", "1.5 kB", "2.5 MB", "3.1 GB"]


def test_a_card_without_numbers_and_with_odd_names() -> None:
    card = model_card(CardFacts("ada/x", "adapter", table=[("a|b<script>", "1", "2", "+1", "")]))
    assert "a\\|b&lt;script>" in card and "model-index" not in card and "license" not in card
    assert "library_name: transformers" in model_card(CardFacts("ada/x", "model"))


def test_a_recipe_that_publishes(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """hub.repo: asked for before training, pushed after it; a push that fails leaves the run whole."""
    common = ["train", "caption_ppo", *SMALL, f"logging.dir={tmp_path}", f"hub.repo={REPO}", "eval.samples=2"]
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 8)
    assert "hub.repo" in complaint(capsys, *common) and not list(tmp_path.iterdir())
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refusals = {("POST", "/commit/"): 403}
    said = complaint(capsys, *common)
    assert (
        f"to push it again: mmft push {tmp_path}/caption_ppo" in said
        and (tmp_path / "caption_ppo" / "eval.json").is_file()
    )
    hub.refusals = {}
    assert main(["push", str(tmp_path / "caption_ppo")]) == 0
    assert hub.repos[REPO].private and "adapter_model.safetensors" in hub.repos[REPO].head[1]


def test_the_endpoint_is_the_environments(hub: LoopbackHub, finished: Path, tmp_path: Path) -> None:
    run.push(str(finished), REPO)
    env: dict[str, Any] = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "mmft", "pull", REPO, str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Hub(hub.url, TOKEN).user() == "ada"
