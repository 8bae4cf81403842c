"""A packed language model continues a text as transformers does, tells it as it comes, and says what it cannot."""

import json

import pytest
import torch
from kits.language_checkpoint import text
from typer.testing import CliRunner

from sqs_pyro import load
from sqs_pyro.cli import app
from sqs_pyro.errors import DataError, RecipeError
from sqs_pyro.integrations import save_pretrained
from sqs_pyro.runs.files import opened
from sqs_pyro.runs.generation import generate_file
from sqs_pyro.runs.kinds import kind_of

transformers = pytest.importorskip("transformers")

PROMPT = " ".join(text(3).split()[:4])


@pytest.fixture(scope="module")
def parts(tiny_language_run, tiny_language_recipe):
    path = tiny_language_recipe.network.path
    net = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    return load(tiny_language_run / "packed.safetensors", net), transformers.AutoTokenizer.from_pretrained(path)


def likeliest(net, ids, count):
    """Token after token, without a cache."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, net(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def test_the_likeliest_tokens_as_they_come(parts, tiny_language_run):
    net, tokenizer = parts
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    said = likeliest(net, ids, 12)[0, ids.shape[1] :]
    if (ends := (said == net.config.eos_token_id).nonzero()).numel():
        said = said[: int(ends[0]) + 1]
    pieces = []
    found = generate_file(tiny_language_run, PROMPT, tokens=12, tell=pieces.append)
    expected = tokenizer.decode(said, skip_special_tokens=True)
    assert found["text"] == "".join(pieces) == expected and len(pieces) > 3
    assert (found["prompt_tokens"], found["tokens"]) == (ids.shape[1], len(said))
    assert found["first_token_seconds"] > 0 and found["tokens_per_second"] > 0
    assert generate_file(tiny_language_run / "packed.safetensors", PROMPT, tokens=1)["tokens_per_second"] is None


def test_draws_are_of_the_networks_probabilities_and_of_their_seed(tiny_language_run):
    texts = [
        generate_file(tiny_language_run, PROMPT, tokens=8, temperature=t, seed=seed)["text"]
        for t, seed in ((3.0, 1), (3.0, 1), (3.0, 2), (1e-4, 1), (0, 5))
    ]
    assert texts[0] == texts[1] != texts[2] and texts[3] == texts[4] != texts[0]


def test_a_directory_with_a_chat_template(parts, tmp_path):
    net, tokenizer = parts
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    save_pretrained(net, tmp_path / "packed", tokenizer)
    told, plain = (generate_file(tmp_path / "packed", "Hey", tokens=2, chat=chat) for chat in (None, False))
    assert told["prompt_tokens"] == len(tokenizer("<Hey>!")["input_ids"])
    assert plain["prompt_tokens"] == len(tokenizer("Hey")["input_ids"])


def test_dtypes(tiny_language_run):
    """Draws at one seed tell of every logit's bits: they are those of the network in that dtype."""
    said = generate_file(tiny_language_run, PROMPT, tokens=12, temperature=1.0, dtype="bfloat16")
    assert said["dtype"] == "bfloat16"
    source = opened(tiny_language_run)
    kind = kind_of(source.document)
    net, tokenizer = kind.network(source).to(torch.bfloat16).eval(), kind.tokenizer(source)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 12}
    with torch.inference_mode():
        drawn = net.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, **options
        )
    assert said["text"] == tokenizer.decode(drawn[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"tokens": 0}, RecipeError, "--tokens is 0, but must be at least 1"),
        ({"temperature": -1}, RecipeError, "--temperature is -1, but must be a number of at least 0"),
        ({"temperature": float("nan")}, RecipeError, "--temperature is nan"),
        ({"dtype": "int4"}, RecipeError, "--dtype is 'int4', but should be one of float32, bfloat16, float16"),
        ({"prompt": " "}, DataError, "The prompt is empty"),
        ({"tokens": 64}, DataError, "and 64 new ones are more than the 64 that .* takes: shorten the prompt"),
        ({"chat": True}, RecipeError, "the tokenizer has no chat template: leave it out"),
    ],
)
def test_what_is_refused(options, error, sentence, tiny_language_run):
    with pytest.raises(error, match=sentence):
        generate_file(tiny_language_run, **{"prompt": PROMPT, **options})


def test_other_networks_are_refused(small_run):
    with pytest.raises(DataError, match="but text is continued by language models"):
        generate_file(small_run, "Once")


def test_the_command(tiny_language_run):
    said = CliRunner().invoke(app, ["generate", str(tiny_language_run), "-", "--tokens", "5"], input=PROMPT)
    found = CliRunner().invoke(app, ["generate", str(tiny_language_run), PROMPT, "--tokens", "5", "--json"])
    assert said.exit_code == found.exit_code == 0, said.output + found.output
    document = json.loads(found.stdout)
    assert said.stdout == document["text"] + "\n" and "tokens, the first after" in said.stderr


@pytest.mark.slow
def test_compiled_it_says_the_same(tiny_language_run):
    found = [generate_file(tiny_language_run, PROMPT, tokens=8, compiled=compiled) for compiled in (True, False)]
    assert found[0]["text"] == found[1]["text"]
