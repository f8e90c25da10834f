"""The tiny model: the same bytes every time, safe to make at once, and a text that shows errors in the KV."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from app.models import tiny as tiny_model
from app.models.tiny import CORPUS, EOS_ID, PAD_ID, VOCAB_SIZE, ensure_tiny_model

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Weather?"}

Render = Callable[..., str]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_tiny_model(tmp_path_factory.mktemp("here"))


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """On a busy machine several threads wait for each other in every product: minutes instead of a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def render(tokenizer: PreTrainedTokenizerBase) -> Render:
    def render(messages: list[dict[str, Any]], **options: Any) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text

    return render


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_at_once_make_one_model_with_the_same_bytes(model_dir: Path, tmp_path: Path) -> None:
    """This one and another, which waits with all its imports done so that both really begin at once."""
    code = """
import pathlib, sys, torch, transformers
from app.models.tiny import ensure_tiny_model
print("ready", flush=True)
sys.stdin.readline()
print(ensure_tiny_model(pathlib.Path(sys.argv[1])))
"""
    root = Path(tiny_model.__file__).parents[2]
    command, pipe = [sys.executable, "-c", code, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        made = ensure_tiny_model(tmp_path)
        printed = other.communicate()[0].strip()

    assert other.returncode == 0
    assert [str(path) for path in tmp_path.iterdir()] == [printed] == [str(made)]  # no scratch folder left
    assert contents(made) == contents(model_dir)


def test_the_loser_of_a_race_returns_the_winners_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def win_the_race(folder: Path) -> None:
        folder.mkdir()
        winner = tmp_path / f"tiny-{tiny_model.recipe_hash(Path(tiny_model.__file__), CORPUS)}"
        winner.mkdir()
        (winner / "config.json").write_text("the winner's")

    monkeypatch.setattr(tiny_model, "save_tokenizer", win_the_race)
    monkeypatch.setattr(tiny_model, "_save_model", lambda folder, size: None)
    assert contents(ensure_tiny_model(tmp_path)) == {"config.json": b"the winner's"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("step", [(tiny_model, "_save_model"), (Path, "rename")])
def test_a_failed_build_says_so_and_leaves_nothing_behind(
    step: tuple[object, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tiny_model, "save_tokenizer", lambda folder: folder.mkdir())
    monkeypatch.setattr(tiny_model, "_save_model", lambda folder, size: None)
    monkeypatch.setattr(*step, fail)
    with pytest.raises(OSError, match="disk full"):
        ensure_tiny_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_it_is_made_once_per_recipe(model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiny_model, "save_tokenizer", lambda folder: pytest.fail("made again"))
    monkeypatch.setenv("BATON_HOME", str(model_dir.parent))
    assert ensure_tiny_model() == model_dir

    changed = tmp_path / CORPUS.name
    changed.write_bytes(CORPUS.read_bytes() + b"!")
    monkeypatch.setattr(tiny_model, "CORPUS", changed)
    with pytest.raises(pytest.fail.Exception, match="made again"):
        ensure_tiny_model()


def test_making_it_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(tiny_model.SEED + 1)
    before = torch.get_rng_state()
    tiny_model._save_model(tmp_path / "model", "tiny")
    assert torch.equal(torch.get_rng_state(), before)


def test_model_and_tokenizer_agree_on_the_vocabulary(model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = AutoConfig.from_pretrained(model_dir)
    assert config.vocab_size == len(tokenizer) == VOCAB_SIZE
    assert (config.eos_token_id, config.pad_token_id) == (EOS_ID, PAD_ID)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS_ID, PAD_ID)
    assert all(tokenizer.decode([token]) for token in range(VOCAB_SIZE))


def test_special_and_markup_tokens_are_one_token_each(tokenizer: PreTrainedTokenizerBase) -> None:
    special, markup = tiny_model.SPECIAL_TOKENS, tiny_model.MARKUP_TOKENS
    ids = tokenizer.encode("".join(special + markup))
    assert tokenizer.convert_ids_to_tokens(ids) == special + markup
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(markup)


@given(text=st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_normalisation_or_clean_up_would_change_survives(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "  e\u0301 \u00e9 don 't , yes !\t\r\n<|im_end|> <think> \U0001f642\u200d "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_template_renders_chatml(render: Render) -> None:
    system, user = "<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>user\nWeather?<|im_end|>\n"
    assert render([USER]) == user
    assert render([SYSTEM, USER], add_generation_prompt=True) == system + user + "<|im_start|>assistant\n"


def test_the_template_lists_the_tools_in_the_system_message(render: Render) -> None:
    for messages in ([SYSTEM, USER], [USER]):
        system, user = render(messages, tools=[TOOL]).removesuffix("<|im_end|>\n").split("<|im_end|>\n")
        assert system.startswith("<|im_start|>system\n")
        assert ("Be brief." in system) == (SYSTEM in messages)
        assert json.loads(system.split("<tools>\n")[1].split("\n</tools>")[0]) == TOOL
        assert user == "<|im_start|>user\nWeather?"


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_the_template_renders_tool_calls_and_their_answers(render: Render, arguments: str | dict[str, str]) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    assistant = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
    turns = render([USER, assistant, answer]).split("<|im_end|>\n")
    rendered = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    assert turns[1] == f"<|im_start|>assistant\n\n<tool_call>\n{rendered}\n</tool_call>"
    assert turns[2:] == ["<|im_start|>user\n<tool_response>\nsunny\n</tool_response>", ""]


@pytest.mark.usefixtures("one_torch_thread")
def test_greedy_text_varies_and_depends_on_an_early_token(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    prompts = torch.randint(3, VOCAB_SIZE, (8, 200), generator=torch.Generator().manual_seed(1))
    changed = prompts.clone()
    changed[:, 5] = 3 + (changed[:, 5] + 1) % (VOCAB_SIZE - 3)

    ids = torch.cat([prompts, changed])
    length = {"max_new_tokens": 40, "min_new_tokens": 40}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)[:, 200:]

    assert all(len(set(tokens)) >= 20 for tokens in output.tolist())
    assert (output[:8, :16] != output[8:, :16]).any(dim=1).all()
