"""Tiny language models that run in real engines without a GPU and without a download.

It has the shape of a Qwen3 (4 million bfloat16 parameters, 8 MB), random weights, a byte-level BPE tokenizer
of 2048 tokens, and a ChatML template with tools in the form of Hermes and Qwen. Its text is noise, but noise
that depends on the whole prompt: an engine that loses, swaps or misplaces KV gives other tokens.

The *small* model is the same with 50 million parameters: a prompt takes seconds on a CPU instead of milliseconds, so
that what a cache saves is not lost in what a request costs anyway.

``python -m app.models.tiny [DIR]`` makes the tiny one and prints its path.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

CORPUS = Path(__file__).with_name("tiny_corpus.txt")

VOCAB_SIZE = 2048
MAX_LENGTH = 8192
SEED = 0
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Not special, as in Qwen3: they stay in the text, where the tool call and reasoning parsers look for them.
MARKUP_TOKENS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
PAD_ID, EOS_ID = 0, 2

Size = Literal["tiny", "small"]
SOURCES: dict[str, Size] = {"baton:tiny": "tiny", "baton:small": "small"}
"""What a configuration gives as the `source` of each model that is made here."""
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SHAPES: dict[Size, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, **_HEADS},
    "small": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, **_HEADS},
}
"""Both have 2 key and value heads of 64, so a layer's KV is 512 bytes a token.  The small one is wide for its few
heads, as large models are: most of a prompt's work is matrices, which a cached prefix saves, and not attention, of
which SGLang's torch backend repeats the prefix's part."""

CHAT_TEMPLATE = """\
{%- set system = messages[0].content if messages and messages[0].role == "system" else "" %}
{%- if tools %}
    {{- "<|im_start|>system\\n" }}
    {{- system + "\\n\\n" if system }}
    {{- "You may call functions. Their signatures are within <tools></tools>:\\n<tools>\\n" }}
    {%- for tool in tools %}{{- tool | tojson + "\\n" }}{%- endfor %}
    {{- "</tools>\\nFor each call, return a JSON object within <tool_call></tool_call>:\\n<tool_call>\\n" }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif system %}
    {{- "<|im_start|>system\\n" + system + "<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- "<|im_start|>user\\n<tool_response>\\n" + message.content + "\\n</tool_response><|im_end|>\\n" }}
    {%- elif not (loop.first and message.role == "system") %}
        {{- "<|im_start|>" + message.role + "\\n" + (message.content or "") }}
        {%- for call in message.tool_calls or [] %}
            {%- set arguments = call.function.arguments %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- arguments if arguments is string else arguments | tojson }}
            {{- "}\\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{{- "<|im_start|>assistant\\n" if add_generation_prompt }}
"""


def ensure_tiny_model(directory: Path | None = None, size: Size = "tiny") -> Path:
    """Return the model's folder, ``<directory>/<size>-<hash of the recipe>``; make it if it is missing.

    ``directory`` is as for `make_once`. The same versions of torch, transformers and tokenizers make the same bytes.

    Raises ``ImportError`` where no engine is installed (torch and transformers come with it), and ``OSError``
    where the folder cannot be written.
    """

    def build(folder: Path) -> None:
        save_tokenizer(folder)
        _save_model(folder, size)

    return make_once(f"{size}-{recipe_hash(Path(__file__), CORPUS)}", build, directory)


def make_once(name: str, build: Callable[[Path], None], directory: Path | None = None) -> Path:
    """Return the folder ``<directory>/<name>``; have `build` make it if it is missing.

    ``directory`` defaults to ``$BATON_HOME``, else ``~/.cache/baton``. Any number of processes may call this at
    once: each builds beside the target, the first rename wins and the others drop their copy, so nobody ever sees
    half a model. Raises ``OSError`` where the folder cannot be written.
    """
    parent = directory or Path(os.environ.get("BATON_HOME") or Path.home() / ".cache" / "baton")
    target = parent.absolute() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
        built = Path(scratch) / "model"
        build(built)
        try:
            built.rename(target)
        except OSError:
            if not target.exists():  # else another process was first, and its copy is as good
                raise
    return target


def recipe_hash(*recipe: Path) -> str:
    """Return a hash of the files that a model is made by: with another recipe it is another folder."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in recipe)).hexdigest()[:12]


def save_tokenizer(folder: Path, max_length: int = MAX_LENGTH) -> None:
    """Train and save the tokenizer: ids 0 to 2 special, then 256 bytes, then merges, the last four markup.

    No normalizer and the whole byte alphabet, so any text comes back from decode as it went into encode.
    `max_length` is the most tokens of a text, as the tokenizer tells them to others.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKUP_TOKENS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The numbers fill up what the small corpus leaves of the vocabulary.
    bpe.train_from_iterator([CORPUS.read_text(encoding="utf-8"), " ".join(map(str, range(1000)))], trainer)
    bpe.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKUP_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def _save_model(folder: Path, size: Size) -> None:
    """Make and save the model; the tiny one: 4 layers between embeddings [2048, 256] and a head [2048, 256] of its own.

    A layer has query [256, 256] (4 heads of 64), key and value [128, 256] (2 heads) and an MLP of width 768.

    With the usual ``initializer_range`` of 0.02 a random model repeats one token whatever the prompt, which
    hides every KV error. At 0.12, 40 greedy tokens are nearly all different, and another 6th token in a
    prompt of 300 changes them: half the time within 3 tokens, in all of 24 trials within 10.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        **SHAPES[size],
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        initializer_range=0.12,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(SEED)
        model: Any = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


if __name__ == "__main__":
    print(ensure_tiny_model(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
