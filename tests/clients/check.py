"""Real clients against `quaver serve`: OpenAI's own, and Prometheus' parser. Usage: check.py PATH-OF-QUAVER."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import openai
from prometheus_client.parser import text_string_to_metric_families

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


def start(quaver):
    args = [quaver, "serve", "--port", "0", "--served-model-name", "demo", "--api-key", "sk-test", "--max-queue", "8"]
    server = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
    url = None
    for line in server.stderr:
        url = url or (found := re.search(r"http://[\d.:]+", line)) and found.group()
        if line.rstrip().endswith("ready"):
            return server, url
    sys.exit("the server did not start")


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
    made = client.chat.completions.create(model="demo", messages=QUESTION, tools=[WEATHER], tool_choice="required")
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
    from pydantic import BaseModel, Field

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
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": "Bearer sk-test"})
    families = {f.name: f for f in text_string_to_metric_families(urllib.request.urlopen(request).read().decode())}
    for name in ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens", "generation_tokens"]:
        assert families[f"vllm:{name}"].samples[0].labels == {"model_name": "demo"}, name
    first = families["vllm:time_to_first_token_seconds"]
    assert first.type == "histogram" and next(s.value for s in first.samples if s.name.endswith("_count")) > 10
    assert families["quaver:kv_pages_used"].samples[0].value == 0


server, url = start(sys.argv[1])
try:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0, timeout=120)
    assert [m.id for m in client.models.list()] == ["demo"] and client.models.retrieve("demo").id == "demo"
    for check in [chat, completions, tools, structure, responses]:
        check(client)
    errors(client, url)
    metrics(url)
    server.send_signal(signal.SIGTERM)
    server.stderr.read()
    assert server.wait(60) == 0
finally:
    server.kill()
print(f"openai {openai.__version__} and prometheus_client agree with the server")
