"""Real clients against `quaver serve`: OpenAI's own, LangChain, lm-evaluation-harness, Prometheus' parser, and Chromium
with the chat page. Usage: check.py PATH-OF-QUAVER."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from typing import Annotated

import harness
import lm_eval
import openai
import page
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.utils import check_remote_tokenizer_support
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, Field

KEY = "sk-test"

QUESTION = [{"role": "user", "content": "Who is Captain Hook?"}]
ANSWER = "Captain Hook is a pirate, and the great enemy of Peter Pan."
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


# What tests/outside/lm_evaluation_harness.py gives of the bf16 fixture, as in tests/eval.rs.
SCORES = {
    "choices acc": 0.4375,
    "choices acc_norm": 0.8125,
    "truths mc2": 0.6265936382387493,
    "contexts acc": 0.8333333333333334,
    "answers-first exact_match": 0.75,
    "answers-last exact_match": 0.5,
}


@contextlib.contextmanager
def serving(quaver, *flags):
    """A server's address; at the end it must go as it is told to."""
    args = [quaver, "serve", "--port", "0", "--served-model-name", "demo", "--api-key", KEY, *flags]
    server = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
    try:
        url = None
        for line in server.stderr:
            url = url or (found := re.search(r"http://[\d.:]+", line)) and found.group()
            if line.rstrip().endswith("ready"):
                break
        else:
            sys.exit("the server did not start")
        # Its log must not fill the pipe.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield url
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()


def chat(client):
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    assert whole.choices[0].message.content == ANSWER and whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    scored = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, max_completion_tokens=4
    )
    content = scored.choices[0].logprobs.content
    assert len(content) == 4 and all(t.top_logprobs[0].logprob == t.logprob and len(t.top_logprobs) == 3 for t in content)
    assert bytes(b for t in content for b in t.bytes).decode() == scored.choices[0].message.content


def completions(client):
    one = client.completions.create(model="demo", prompt="It was a", temperature=0, max_tokens=6)
    two = client.completions.create(model="demo", prompt=["The", "It was a"], temperature=0, max_tokens=6, n=2, logprobs=2)
    assert [c.index for c in two.choices] == [0, 1, 2, 3]
    assert two.choices[3].text == one.choices[0].text and len(two.choices[3].logprobs.tokens) == 6
    stream = client.completions.create(model="demo", prompt="It was a", temperature=0, max_tokens=6, stream=True)
    assert "".join(c.choices[0].text for c in stream) == one.choices[0].text


def tools(client):
    made = client.chat.completions.create(
        model="demo", messages=QUESTION, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    call = made.choices[0].message.tool_calls[0]
    assert call.function.name == "weather" and "city" in json.loads(call.function.arguments)
    assert made.choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(
        model="demo", messages=QUESTION, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}}
    ) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert "city" in json.loads(final.choices[0].message.tool_calls[0].function.arguments)
    told = [*QUESTION, made.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert client.chat.completions.create(model="demo", messages=told, tools=[WEATHER], max_tokens=4).choices


def structure(client):
    class Person(BaseModel):
        name: str = Field(max_length=10)
        age: int = Field(ge=0, le=99)

    parsed = client.chat.completions.parse(model="demo", messages=QUESTION, response_format=Person)
    assert isinstance(parsed.choices[0].message.parsed, Person)
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert client.chat.completions.create(model="demo", messages=QUESTION, extra_body=extra).choices[0].message.content in ("yes", "no")


def responses(client):
    whole = client.responses.create(model="demo", input=QUESTION[0]["content"], temperature=0)
    assert whole.output_text == ANSWER and whole.status == "completed"
    events = list(client.responses.create(model="demo", input=QUESTION, temperature=0, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == ANSWER
    assert events[-1].response.output_text == ANSWER


def errors(client, url):
    for call, error in [
        (lambda: client.chat.completions.create(model="other", messages=QUESTION), openai.NotFoundError),
        (lambda: client.chat.completions.create(model="demo", messages=[]), openai.BadRequestError),
        (lambda: client.chat.completions.create(model="demo", messages=QUESTION, temperature=-1), openai.BadRequestError),
        (lambda: client.embeddings.create(model="demo", input="a"), openai.NotFoundError),
        (lambda: openai.OpenAI(base_url=f"{url}/v1", api_key="no").models.list(), openai.AuthenticationError),
        (lambda: client.completions.create(model="demo", prompt=["a"] * 100), openai.BadRequestError),
    ]:
        try:
            call()
        except error as e:
            assert e.body["message"], e
        else:
            sys.exit(f"{error.__name__} was expected")


def metrics(url):
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    families = {f.name: f for f in text_string_to_metric_families(urllib.request.urlopen(request).read().decode())}
    for name in ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens", "generation_tokens"]:
        assert families[f"vllm:{name}"].samples[0].labels == {"model_name": "demo", "engine": "0"}, name
    first = families["vllm:time_to_first_token_seconds"]
    assert first.type == "histogram" and next(s.value for s in first.samples if s.name.endswith("_count")) > 10
    assert families["quaver:kv_pages_used"].samples[0].value == 0


@tool
def weather(city: Annotated[str, Field(max_length=10)]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


def langchain(url):
    model = ChatOpenAI(model="demo", base_url=f"{url}/v1", api_key=KEY, temperature=0, max_retries=0)
    assert model.invoke(QUESTION).content == ANSWER
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == ANSWER
    assert [answer.content for answer in model.batch([QUESTION, QUESTION])] == [ANSWER, ANSWER]
    [call] = model.bind_tools([weather], tool_choice="weather", strict=True).invoke(QUESTION).tool_calls
    assert call["name"] == "weather" and isinstance(call["args"], dict)


def evaluation(url, model):
    assert check_remote_tokenizer_support(f"{url}/v1/completions", auth_token=KEY)
    os.environ["OPENAI_API_KEY"] = KEY
    lm = LocalCompletionsAPI(
        model="demo",
        base_url=f"{url}/v1/completions",
        tokenizer=model,
        tokenizer_backend="huggingface",
        add_bos_token=True,
        num_concurrent=4,
        max_length=1024,
    )
    scores = harness.scores(lm)
    assert scores.keys() == SCORES.keys() and all(abs(scores[name] - SCORES[name]) < 1e-4 for name in SCORES), scores


def bf16_model(folder):
    """The bf16 fixture, which the tests in Rust have made, with the demo's tokenizer, which is its own."""
    root = pathlib.Path(__file__).parent.parent.parent
    for source in root / "target/tmp/checkpoints/tiny-llama", root / "tools/demo":
        for file in source.iterdir():
            if not (to := pathlib.Path(folder) / file.name).exists():
                to.symlink_to(file)
    return folder


quaver = sys.argv[1]
with serving(quaver, "--max-queue", "8") as url:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)
    assert [m.id for m in client.models.list()] == ["demo"] and client.models.retrieve("demo").id == "demo"
    for check in [chat, completions, tools, structure, responses]:
        check(client)
    errors(client, url)
    langchain(url)
    page.check(url, KEY, QUESTION[0]["content"], ANSWER)
    metrics(url)
with tempfile.TemporaryDirectory() as folder:
    model = bf16_model(folder)
    with serving(quaver, "--model", model, "--profile", "exact") as url:
        evaluation(url, model)
print(f"openai {openai.__version__}, langchain, chromium, lm_eval {lm_eval.__version__} and prometheus_client agree with the server")
