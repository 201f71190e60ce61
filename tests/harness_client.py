"""The evaluation harness, unchanged, on a server: python harness_client.py URL FOLDER_OF_TASKS MAX_LENGTH.

Prints every sample's arguments and what the harness made of the server's answers.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager


def main(url: str, folder: str, max_length: str) -> list[dict[str, Any]]:
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "base_url": f"{url}/v1/completions",
            "model": "shipped",
            "max_length": int(max_length),
            "num_concurrent": 3,
            "max_retries": 1,
        },
        tasks=["scored", "shots", "choices", "rolling", "written"],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
        log_samples=True,
    )
    return [
        {"task": task, "arguments": arguments, "response": response[0]}
        for task, samples in results["samples"].items()
        for sample in samples
        for arguments, response in zip(arguments_of(sample), sample["resps"], strict=True)
    ]


def arguments_of(sample: dict[str, Any]) -> list[Any]:
    arguments = sample["arguments"]
    return list(arguments.values()) if isinstance(arguments, dict) else list(arguments)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
