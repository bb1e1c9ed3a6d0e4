"""The README's table of figures, made from benchmarks/results/*.json: nobody types a figure.

python -m benchmarks.readme           rewrite the table
python -m benchmarks.readme --check   exit 1 when it is not what the results say
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.report import RESULTS, ROOT

README = ROOT / "README.md"
NAMES = (
    *("kernels", "kv_restore", "kv_quality", "retrieval", "documents", "records"),
    *("adapters", "parametric", "adapter_merges"),
    *("versions", "memcube", "governance", "lifecycle"),
    *("scheduler", "compose"),
)
BEGIN, END = "<!-- figures: make bench -->", "<!-- end of figures -->"


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def pick(name: str, **wanted: Any) -> dict[str, Any]:
    """The one row of a result with these values."""
    rows = [r for r in load(name)["rows"] if all(r.get(k) == v for k, v in wanted.items())]
    if len(rows) != 1:
        raise SystemExit(f"{name}: one row with {wanted} wanted, got {len(rows)}")
    return rows[0]


def share(op: str, codec: str = "", threads: int = 1) -> str:
    row = pick("kernels", op=op, codec=codec, threads=threads, case="8x128", layout="transformers",
               backend="cpu", isa=load("kernels")["machine"]["isa"], call="kernel")  # fmt: skip
    return f"{row['share_of_copy']:.0%}"


def restore(context: int, codec: str, dtype: str = "bfloat16") -> dict[str, Any]:
    return pick("kv_restore", context=context, codec=codec, dtype=dtype)


def retrieval() -> list[str]:
    """LoCoMo, by system; the project's own pages beside it."""
    lines = [
        "| retrieval, percent | recall@5 | recall@10 | all evidence@10 | pooled recall@10 "
        "| own pages@5 | ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in ("memos", "without token vectors", "fusion alone", "BM25 alone", "dense alone"):
        one = pick("retrieval", system=system, store="conversations")
        all_ = pick("retrieval", system=system, store="pooled")
        page = pick("documents", system=system)
        lines.append(
            f"| {system} | {one['recall_at_5']:.1f} | {one['recall_at_10']:.1f} "
            f"| {one['all_at_10']:.1f} | {all_['recall_at_10']:.1f} | {page['recall_at_5']:.1f} "
            f"| {one['ms_per_query']:.1f} |"
        )
    for system in ("Chroma", "mem0"):
        row = pick("retrieval", system=system)
        lines.append(
            f"| {system} {row['version']} | {row['recall_at_5']:.1f} | {row['recall_at_10']:.1f} "
            f"| {row['all_at_10']:.1f} | | | {row['ms_per_query']:.1f} |"
        )
    return lines


def records() -> list[str]:
    """The record store by its size."""
    lines = [
        "| units | text p95 | vector p95 | hybrid p50 | hybrid p95 | adds in bulk | open |",
        "|---|---|---|---|---|---|---|",
    ]
    for units in (1_000, 10_000, 100_000, 300_000):
        text, vector, hybrid, bulk, opened = (
            pick("records", units=units, kind=kind)
            for kind in ("text", "vector", "hybrid", "add_many", "open")
        )
        lines.append(
            f"| {units:,} | {text['p95_ms']:.1f} ms | {vector['p95_ms']:.1f} ms "
            f"| {hybrid['p50_ms']:.1f} ms | {hybrid['p95_ms']:.1f} ms "
            f"| {bulk['adds_per_s']:,.0f}/s | {opened['open_s']:.2f} s |"
        )
    return lines


def adapters() -> list[str]:
    """Adapters beside PEFT."""
    lines = ["| adapters, rank 16, bf16 | memos | PEFT 0.21 |", "|---|---|---|"]
    for case, what in (
        ("1 token, 1 adapter", "one layer of h = 1024, 1 token: added"),
        ("64 tokens, 8 adapters", "the same, 64 tokens of 8 adapters: added"),
    ):
        row = pick("adapters", level="kernel", case=case, dtype="bfloat16")
        lines.append(
            f"| {what} | {row['added_us']:.0f} us | {row['peft_added_us']:,.0f} us "
            f"({row['ratio']:.0f}x) |"
        )
    for case, what in (
        ("decode step", "a decode step of 84 layers, h = 512: added"),
        ("8 rows, 8 adapters", "the same, 8 rows of 8 adapters: added"),
    ):
        row = pick("parametric", case=case, dtype="bfloat16")
        lines.append(
            f"| {what} | {row['added_percent']:+.0f}% | {row['peft_added_percent']:+.0f}% |"
        )
    row = pick("parametric", case="activate")
    lines.append(
        f"| switching to a ready adapter | {row['memos_ms']:.2f} ms | {row['peft_ms']:.0f} ms |"
    )
    for case, what in (("load from disk", "from disk"), ("load", "from the page cache")):
        row = pick("parametric", case=case)
        lines.append(
            f"| loading {row['file_bytes'] / 1e6:.1f} MB {what}, verified (a plain read: "
            f"{row['read_ms']:.1f} ms) | {row['memos_ms']:.1f} ms | {row['peft_ms']:.0f} ms |"
        )
    row = pick(
        "adapter_merges", case="best of rank 16; PEFT: full matrices, its default", adapters=2
    )
    lines.append(
        f"| merging two by svd, 84 layers | {row['ms']:.0f} ms | {row['peft_ms'] / 1000:.1f} s |"
    )
    return lines


def cubes() -> list[str]:
    """Versions, branches, files, rights and sweeps."""
    update, merge, past = (pick("versions", case=case) for case in ("update", "merge", "as_of"))
    sweep = pick("lifecycle", kind="sweep, all hot")
    day = pick("lifecycle", kind="a day")
    rights = [r["overhead"] for r in load("governance")["rows"] if "overhead" in r]
    audit = next(r for r in load("governance")["rows"] if "append_us" in r)
    files = load("memcube")["rows"]
    rate = {
        step: [r["mb_per_s"] for r in files if r["step"] == step and not r["encrypted"]]
        for step in ("export", "import")
    }
    return [
        "| cubes | |",
        "|---|---|",
        f"| new versions | {update['versions_per_s']:,.0f}/s |",
        f"| a history of 1,000 versions | {update['history_ms']:.0f} ms |",
        f"| a branch of 10,000 cubes | {merge['branch_s']:.2f} s |",
        f"| merging 1,000 changes of two branches of 10,000 | {merge['merge_s']:.1f} s |",
        f"| 10,000 cubes as they were: first query | {past['first_s']:.2f} s |",
        f"| a query of a principal who may read 1 % to all of 100,000: added "
        f"| {min(rights):+.0%} to {max(rights):+.0%} |",
        f"| an audit record | {audit['append_us']:.0f} us |",
        f"| a sweep of 100,000 cubes, 81,000 of which leave | {sweep['sweep_s']:.1f} s |",
        f"| a day of use in 96 sweeps: the slowest | {day['sweep_s']:.2f} s |",
        f"| .memcube files: written, read | {min(rate['export']):.0f} to "
        f"{max(rate['export']):.0f} MB/s, {min(rate['import']):.0f} to "
        f"{max(rate['import']):.0f} MB/s |",
    ]


def learning() -> list[str]:
    """Facts learnt, with and without the guard; half an hour of make bench."""
    if not (RESULTS / "learning.json").exists():
        return []
    lines = ["", "| 30 made-up facts learnt | recall | far wordings | KL to the base model "]
    lines[-1] += "| old facts | minutes |"
    lines.append("|---|---|---|---|---|---|")
    for row in load("learning")["rows"]:
        cut_off = f", cut off after {row['steps']} steps" if row["stopped"] == "minutes" else ""
        lines.append(
            f"| {row['case']}{cut_off} | {row['recall']:.0%} | {row['recall_reworded']:.0%} "
            f"| {row['anchor_kl']:.3f} | {-100 * row['old_fact_drop']:+.1f} points "
            f"| {row['minutes']:.1f} |"
        )
    return lines


def scheduled() -> list[str]:
    """One budget for many users, and which blocks of a trace were held."""
    lines = ["| 60 users, host memory for a quarter of their caches | first token p50 | p95 |"]
    lines.append("|---|---|---|")
    users = {r["policy"]: r for r in load("scheduler")["rows"] if "users" in r}
    names = {
        "resident": "all of them in memory",
        "none": "nothing kept",
        "lru": "lru, no disk",
        "lru, disk": "lru, a disk behind it",
        "memos": "`mos.schedule`, a disk behind it",
    }
    for policy, name in names.items():
        row = users[policy]
        lines.append(f"| {name} | {row['ttft_p50_s']:.2f} s | {row['ttft_p95_s']:.2f} s |")
    shares = (0.01, 0.05, 0.2)
    lines += ["", "| prefix hits on an hour of a chat service, blocks held | 1 % | 5 % | 20 % |"]
    lines.append("|---|---|---|---|")
    rates = {
        (r["policy"], r["capacity"]): r["hit_rate"]
        for r in load("scheduler")["rows"]
        if "hit_rate" in r
    }
    for policy in ("lru", "lfu", "s3fifo", "arc", "memos", "clairvoyant"):
        cells = (f"{rates[policy, share]:.1%}" for share in shares)
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return lines


def composed() -> list[str]:
    """Memories as KV in any order, beside a full prefill."""
    rows = [r for r in load("compose")["rows"] if "kl" in r]
    times = {r["share"]: r for r in load("compose")["rows"] if r["case"] == "time, raw"}
    lines = ["| 4 memories of 256 tokens, in another order | KL to a prefill | top-1 | time |"]
    lines.append("|---|---|---|---|")
    for row in rows:
        name, took = row["case"], ""
        if name == "composed":
            name += f", {row['share']:.0%} computed anew"
            found = times.get(round(row["share"], 2))
            took = "" if found is None else f"{found['share_of_prefill']:.0%}"
        elif name not in ("no memory", "joined", "re-rotated"):
            continue
        lines.append(f"| {name} | {row['kl']:.3f} | {row['top1']:.0%} | {took} |")
    return lines


def table() -> str:
    lines = [
        "| | cold | warm in memory | restored | cut |",
        "|---|---|---|---|---|",
    ]
    for context in (1024, 4096):
        for codec in ("int4", "raw"):
            r = restore(context, codec)
            lines.append(
                f"| first logits, {context:,} tokens, {codec} | {r['ttft_cold_s']:.2f} s "
                f"| {1000 * r['ttft_warm_s']:.0f} ms | {1000 * r['ttft_restored_s']:.0f} ms "
                f"| {r['cut']:.1%} |"
            )
    lines += ["", "| codec | bits, all overhead | beside bf16 | KL to the exact cache | top-1 |"]
    lines += ["|---|---|---|---|---|"]
    for r in load("kv_quality")["rows"]:
        lines.append(
            f"| {r['codec']} | {r['bits']:.2f} | {r['ratio']:.2f}x smaller | {r['kl']:.2g} "
            f"| {r['top1']:.1%} |"
        )
    lines += ["", "| one thread, AVX-512, share of memcpy | raw | int8 | int4 | int4, rotated |"]
    lines += ["|---|---|---|---|---|"]
    for op in ("pack_kv", "unpack_kv"):
        cells = [share(op, c) for c in ("raw", "int8-g64", "int4-g64", "int4-g64-rot")]
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
    for op in ("gather_blocks", "write_blocks"):
        lines.append(f"| `{op}` | {share(op)} | | | |")
    lines += ["", *retrieval(), "", *records(), "", *adapters(), *learning(), "", *cubes()]
    lines += ["", *scheduled(), "", *composed()]
    names = [*NAMES, *(["learning"] if (RESULTS / "learning.json").exists() else [])]
    results = [load(name) for name in names]
    machine = results[0]["machine"]
    commits = ", ".join(dict.fromkeys(str(r["commit"])[:10] for r in results))
    lines += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; "
        f"torch {results[0]['versions']['torch']}, "
        f"transformers {results[0]['versions']['transformers']}; "
        f"commit {commits}; {results[0]['date'][:10]}.",
    ]
    return "\n".join(lines)


def rendered(readme: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    have = README.read_text(encoding="utf-8")
    want = rendered(have)
    if "--check" in sys.argv:
        if have != want:
            print("README.md: its figures are not those of benchmarks/results; run without --check")
        return int(have != want)
    README.write_text(want, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
