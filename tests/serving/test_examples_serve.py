"""The serving examples run as they stand."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.serving.server import ENVIRONMENT, Pair, assert_alike, at_once, end, free_port
from tests.serving.serving_requests import CHAT, chats
from tests.tiers import exhaustive

EXAMPLES = Path(__file__).parents[2] / "examples"
# `python` and `vllm` of this environment come first.
RUN_IN = os.environ | ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def python(name: str, *arguments: str) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], env=RUN_IN, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@exhaustive
def test_serve_with_two_api_servers(pair: Pair, tmp_path: Path) -> None:
    """The script, kept up, with an option passed on to vLLM: two API server processes in front of the engine."""
    port, printed = free_port(), tmp_path / "printed"
    with printed.open("wb") as output:
        script = subprocess.Popen(
            ["bash", str(EXAMPLES / "04_serve.sh"), str(port), "--api-server-count", "2"],
            env=RUN_IN | {"KEEP": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own
        )
    try:
        deadline = time.monotonic() + 400
        while "Ctrl-C stops it" not in (text := printed.read_text()):
            assert script.poll() is None, text[-3000:]
            assert time.monotonic() < deadline, text[-3000:]
            time.sleep(0.5)
        assert "24" in text.split("--- an answer\n")[1].splitlines()[0]
        counted = dict(re.findall(r"^vllm:spec_decode_num_(\w+)_total\{.*\} ([\d.]+)$", text, re.M))
        assert 0 < float(counted["accepted_tokens"]) < float(counted["draft_tokens"])
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:

            def check(case: tuple[int, list[dict[str, str]]]) -> None:
                seed, messages = case
                body = {"messages": messages, "seed": seed, "temperature": seed % 2, "max_tokens": 40, "return_token_ids": True}
                [found] = http.post(CHAT, json={"model": "demo", **body}).json()["choices"]
                assert_alike(pair.plain.answer(CHAT, body)["choices"], [found])

            at_once(check, list(enumerate(chats(12))))
        time.sleep(2)  # our metrics are a second old at most
        for _ in range(4):  # one server or the other
            text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
            counted = dict(
                re.findall(r"^(vllm_eagle_nodes|vllm:spec_decode_num)_accepted(?:_tokens)?_total\{.*\} ([\d.]+)$", text, re.M)
            )
            assert float(counted["vllm_eagle_nodes"]) >= float(counted["vllm:spec_decode_num"]) > 0
        script.terminate()
        script.wait(60)
        # Its server has stopped.
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health")
    finally:
        end(script)


def test_openai_client(pair: Pair) -> None:
    output = python("05_openai_client.py", f"{pair.trees.url}/v1")
    assert output.count("the same answer") == 4
    assert "ANOTHER" not in output


def test_structured_output(pair: Pair) -> None:
    output = python("06_structured_output.py", f"{pair.trees.url}/v1")
    assert re.search(r"^json_schema: buyer='.*' items=\[Item\(kind=", output, re.M)
    assert re.search(r"^regex: +\d+ pencils in \d+ boxes$", output, re.M)
    assert re.search(r"^choice: +(yes, enough|no, too few)$", output, re.M)


def test_load_test(pair: Pair, tmp_path: Path) -> None:
    tau = r"^tau +(\d+\.\d\d)"
    output = python("07_load_test.py", "--url", pair.trees.url, "--clients", "3", "--seconds", "2")
    assert float(re.search(tau, output, re.M).group(1)) > 2  # type: ignore[union-attr]
    numbers = re.search(r"^3 clients, [\d.]+ s, (\d+) answers, (\d+) tokens$", output, re.M)
    assert numbers is not None
    assert int(numbers[2]) > int(numbers[1]) >= 3
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": chats(1)[0][0]["content"]}))
    output = python("07_load_test.py", "--url", pair.plain.url, "--clients", "1", "--seconds", "1", "--prompts", str(prompts))
    assert re.search(tau, output, re.M).group(1) == "1.00"  # type: ignore[union-attr]
