"""``baton bench-cache``: the command."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from app.bench.client import find_card, find_version, new_client, parse_url, use_key
from app.bench.output import check_files
from app.bench.prefix_cache import (
    ANSWER_TIMEOUT_S,
    COMPLETION_TOKENS,
    CacheReport,
    Pair,
    PromptClient,
    TimedAnswer,
    converse,
    find_problems,
    repeat_prompts,
    share_system_prompt,
    summarize,
)
from app.bench.report import TABLE_WIDTH, markdown_table, this_run
from app.cli.options import ApiKey
from app.errors import ConfigError


def bench_cache(
    url: Annotated[str, typer.Argument(help="What to measure.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="By default the first of GET /v1/models.")] = None,
    tokens: Annotated[int, typer.Option(min=128, help="Of the prompts that are sent twice.")] = 2000,
    repeat: Annotated[int, typer.Option(min=1, help="How many prompts are sent twice.")] = 9,
    turns: Annotated[int, typer.Option(min=2, help="Of the conversation.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
    api_key: ApiKey = None,
) -> None:
    """Show what the prefix cache of an OpenAI endpoint gives: TTFT and cached tokens, one request at a time.

    The exit code is 1 if the server does not report cached tokens where it should have some.
    """
    use_key(api_key)
    check_files(json, None)
    _, base_url = parse_url("URL", url)
    with new_client(base_url, ANSWER_TIMEOUT_S) as client:
        card = find_card("URL", client, model)
        _check_length(tokens, card.get("max_model_len"))
        server = PromptClient(client, card["id"], random.Random())
        report = CacheReport(
            **msgspec.structs.asdict(this_run()),
            url=base_url,
            model=card["id"],
            server_version=find_version(client),
            prompts_are=server.prompts_are,
        )
        _measure(server, report, tokens, repeat, turns)
    report.problems = find_problems(report)
    for problem in report.problems:
        typer.echo(problem)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    if report.problems:
        raise typer.Exit(1)


def _check_length(tokens: int, max_model_len: int | None) -> None:
    if max_model_len is not None and tokens + COMPLETION_TOKENS > max_model_len:
        raise ConfigError(
            "--tokens", f"{tokens} and {COMPLETION_TOKENS} of output are more than the {max_model_len} of the model"
        )


def _measure(server: PromptClient, report: CacheReport, tokens: int, repeat: int, turns: int) -> None:
    """Fill the report, and print each part as soon as it is complete."""
    console = Console(width=TABLE_WIDTH, highlight=False, markup=False, soft_wrap=True)
    version = f", version {report.server_version}" if report.server_version else ""
    console.print(f"\n{report.date}, {report.model} at {report.url}{version}\n{report.command}\n")
    report.repeated = repeat_prompts(server, tokens, repeat)
    report.summary = summarize(report.repeated)
    console.print(_pairs_table(report.repeated, f"{repeat} prompts of {tokens} tokens as {report.prompts_are}"))
    console.print(f"\nTTFT uncached/cached: {report.summary.uncached_to_cached:.2f} (of medians)\n")
    report.conversation = converse(server, turns)
    console.print(_answers_table("turn", report.conversation, "A conversation"))
    report.shared_system_prompt = share_system_prompt(server, tokens // 2)
    console.print()
    console.print(_answers_table("question", report.shared_system_prompt, "A shared system prompt"))
    console.print()


def _pairs_table(pairs: list[Pair], what: str) -> Table:
    columns = ["sent", "TTFT p50 ms", "min", "max", "prompt tokens p50", "cached tokens p50"]
    table = markdown_table(columns, title=f"Cached against uncached: {what}")
    for sent, answers in {"first": [p.uncached for p in pairs], "again": [p.cached for p in pairs]}.items():
        times = [answer.ttft_ms for answer in answers]
        table.add_row(
            sent,
            *(f"{value:.1f}" for value in (median(times), min(times), max(times))),
            _median([answer.prompt_tokens for answer in answers]),
            _median([answer.cached_tokens for answer in answers]),
        )
    return table


def _median(counts: list[int | None]) -> str:
    known = [count for count in counts if count is not None]
    return f"{median(known):.0f}" if known else "-"


def _answers_table(what: str, answers: list[TimedAnswer], title: str) -> Table:
    table = markdown_table([what, "prompt tokens", "cached tokens", "share", "TTFT ms"], title=title)
    for number, answer in enumerate(answers, start=1):
        prompt, cached = answer.prompt_tokens, answer.cached_tokens
        share = f"{cached / prompt:.0%}" if prompt and cached is not None else "-"
        table.add_row(str(number), _median([prompt]), _median([cached]), share, f"{answer.ttft_ms:.1f}")
    return table
