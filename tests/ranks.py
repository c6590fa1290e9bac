"""A tiny training run in as many processes as the environment says; the first writes what came of it.

python tests/ranks.py OUT SETTINGS, with RANK, WORLD_SIZE, ... set
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def launch(
    processes: int, out: Path, settings: dict[str, Any], timeout: float = 150, **environment: str
) -> dict[str, Any]:
    """Trains with `settings` of `tiny.trainer` in so many processes: {"logs": [...], "weights": {...}}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
        "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
    } | environment  # fmt: skip
    command = [sys.executable, str(HERE / "ranks.py"), str(out), json.dumps(settings)]
    children = [
        subprocess.Popen(
            command, env=common | {"RANK": str(i), "LOCAL_RANK": str(i)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    try:
        said = [child.communicate(timeout=timeout)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert not any(child.returncode for child in children), "\n".join(text[-3000:] for text in said)
    return json.loads(out.read_text())


def comes_back(trainer: Any) -> bool:
    """Whether what a checkpoint holds undoes any change of weights and optimizer."""
    import torch

    from mmft.train import trainer_state

    kept = trainer_state.tensors_of(trainer)
    trainer_state.load_tensors(trainer, {name: torch.ones_like(tensor) for name, tensor in kept.items()})
    changed = trainer_state.tensors_of(trainer)
    trainer_state.load_tensors(trainer, kept)
    back = trainer_state.tensors_of(trainer)
    assert all((tensor == 1).all() for tensor in changed.values())
    return kept.keys() == back.keys() and all(torch.equal(tensor, back[name]) for name, tensor in kept.items())


def main(out: Path, settings: dict[str, Any]) -> None:
    import tiny
    import torch

    from mmft.train.sharding import full
    from mmft.types import RewardOutput

    torch.set_num_threads(1)
    rows = tiny.rows(24)
    for i in settings.pop("without_picture", []):
        rows[i] = type(rows[i])(rows[i].id, None, rows[i].prompt, rows[i].references)
    policy = tiny.vision_policy(eos_bias=settings.pop("eos_bias", 4.0))
    if settings.pop("train_tower", False):
        policy = type(policy)(tiny.with_lora(tiny.llava(0, 4.0), "all-linear"), tiny.processor())
    tiny.stirred(policy.model, 0.05)  # a fresh adapter's B is 0, and the gradient of A with it
    trainer = tiny.trainer(policy, out.parent / "trainer", rows, **settings)

    def reward(captions: list[str], rows: list[Any], finished: list[bool]) -> RewardOutput:
        raw = tiny.letters_reward(captions, rows, finished).total
        seen = trainer.ranks.gather_list(raw)  # as a normaliser does
        mean = sum(seen) / len(seen)
        return RewardOutput([value - mean for value in raw], {"letters": raw}, {"letters": raw}, {"letters": raw})

    trainer.reward_model.function = reward
    drawn: list[list[str]] = []
    trainer.on_rollout = lambda step, rollout: drawn.append([row.id for row in rollout.rows])
    trainer.train()
    logs = [{k: v for k, v in log.items() if not k.startswith("time/")} for log in tiny.logs_of(trainer)]
    module = trainer.accelerator.unwrap_model(trainer.model)
    weights = {n: full(p.detach()).double().flatten().tolist() for n, p in module.named_parameters() if p.requires_grad}
    restored = comes_back(trainer)
    digests = trainer.ranks.gather_list([hashlib.sha256(json.dumps(weights).encode()).hexdigest()])
    if trainer.ranks.is_main:
        record = {"logs": logs, "weights": weights, "drawn": drawn, "processes": trainer.ranks.count}
        record |= {"sharded": bool(trainer.sharding), "restored": restored}
        out.write_text(json.dumps(record | {"same_everywhere": len(set(digests)) == 1}))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
