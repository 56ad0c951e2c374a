"""``fastadapter generate``: answer prompts with a model and an adapter, token by token, or with many in one batch."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastadapter.checkpoints import load
from fastadapter.cli.data_options import unescape
from fastadapter.cli.loading import add_any_base, add_model_arguments, device_and_dtype, load_model
from fastadapter.integrations.verbs.choose import rows
from fastadapter.training import UserError, write_json
from fastadapter.training.data import context_length, encode_prompt, read_records, require_template
from fastadapter.training.report import require_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--adapter", metavar="PATH", help="file or folder of an adapter; the bare model if not given"
    )
    which.add_argument(
        "--adapters",
        nargs="+",
        metavar="NAME=PATH",
        help="several; each record of --file FILE.jsonl says which in its field adapter, null for the bare model",
    )
    add_any_base(parser)
    parser.add_argument(
        "--batch-size", type=int, default=8, help="prompts that are answered together with --adapters"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt")
    source.add_argument("--file", help="one prompt per line; or .jsonl or .csv with a field prompt")
    parser.add_argument(
        "--template", type=unescape, help=r"put each prompt in place of {text}; \n is a new line"
    )
    parser.add_argument(
        "--parse-special-tokens",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="special tokens such as </s> in a prompt are tokens; otherwise they are text",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="per prompt")
    parser.add_argument("--do-sample", action="store_true", help="draw tokens; otherwise the most likely one")
    parser.add_argument("--temperature", type=float, help="of the drawing; 1 if not given")
    parser.add_argument(
        "--top-p", type=float, help="draw from the most likely tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument(
        "--cache-implementation",
        choices=("dynamic", "static"),
        default="dynamic",
        help="static: of a fixed size; transformers then compiles the model on a GPU",
    )
    parser.add_argument("--json", metavar="FILE", help="write prompts and completions to this file, too")


def run(args: argparse.Namespace) -> int:
    sampling = _sampling(args)
    paths = _adapter_paths(args)
    prompts = _prompts(args)
    names = _names(args, paths) if paths else []
    if args.json:
        require_writable(Path(args.json).parent)
    device = device_and_dtype(args)
    model, tokenizer = load_model(args.model, args.gguf_file, args.dtype)
    if args.adapter is not None:
        load(model, args.adapter, strict_base=not args.any_base)
    for name, path in paths.items():
        load(model, path, name, strict_base=not args.any_base)
    model.to(device)
    encoded = [
        (source, prompt, encode_prompt(tokenizer, prompt, parse_special_tokens=args.parse_special_tokens))
        for source, prompt in prompts
    ]
    context = context_length(model)
    for source, _, ids in encoded:
        if not ids:
            raise UserError(f"{source}: the prompt has no tokens")
        if context is not None and len(ids) + args.max_new_tokens > context:
            raise UserError(
                f"{source}: the prompt has {len(ids)} tokens; with {args.max_new_tokens} new ones "
                f"(--max-new-tokens) that is more than the model's context of {context}"
            )
    torch.manual_seed(args.seed)
    options = {"max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.eos_token_id, **sampling}
    if args.cache_implementation != "dynamic":
        options["cache_implementation"] = args.cache_implementation
    if paths:
        records = _answer_together(model, tokenizer, encoded, names, args.batch_size, options)
    else:
        records = _answer_one_by_one(model, tokenizer, encoded, options)
    if args.json:
        write_json(
            args.json,
            {"model": args.model, "adapter": args.adapter, "adapters": paths, "completions": records},
        )
    return 0


def _answer_one_by_one(model, tokenizer, encoded, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens appear as they are made."""
    from transformers import TextStreamer

    records = []
    for source, prompt, ids in encoded:
        if len(encoded) > 1:
            print(f"[{source}]", file=sys.stderr)
        started = time.perf_counter()
        inputs = torch.tensor([ids], device=model.device)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **options,
        )
        records.append(_record(tokenizer, prompt, ids, output[0, len(ids) :], time.perf_counter() - started))
    return records


def _answer_together(
    model, tokenizer, encoded, names: list[str | None], batch_size: int, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Batches whose rows have adapters of their own, padded on the left."""
    records = []
    for start in range(0, len(encoded), batch_size):
        batch, chosen = encoded[start : start + batch_size], names[start : start + batch_size]
        width = max(len(ids) for _, _, ids in batch)
        inputs = torch.tensor([[0] * (width - len(ids)) + ids for _, _, ids in batch], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for _, _, ids in batch], device=model.device
        )
        started = time.perf_counter()
        with rows(model, chosen):
            output = model.generate(inputs, attention_mask=mask, **options)
        seconds = (time.perf_counter() - started) / len(batch)
        for (source, prompt, ids), name, row in zip(batch, chosen, output, strict=True):
            record = _record(tokenizer, prompt, ids, row[width:], seconds)
            print(f"[{source}, {name or 'bare model'}]", file=sys.stderr)
            print(record["completion"])
            records.append({**record, "adapter": name})
    return records


def _record(tokenizer, prompt: str, ids: list[int], new: torch.Tensor, seconds: float) -> dict[str, Any]:
    stop = (new == tokenizer.eos_token_id).nonzero()
    count = int(stop[0]) + 1 if len(stop) else len(new)
    return {
        "prompt": prompt,
        "completion": tokenizer.decode(new[:count], skip_special_tokens=True),
        "prompt_tokens": len(ids),
        "new_tokens": count,
        "seconds": seconds,
    }


def _adapter_paths(args: argparse.Namespace) -> dict[str, str]:
    paths: dict[str, str] = {}
    for each in args.adapters or []:
        name, equals, path = each.partition("=")
        if not (name and equals and path):
            raise UserError(f"--adapters must be NAME=PATH, got {each!r}")
        if name in paths:
            raise UserError(f"--adapters names {name!r} twice")
        paths[name] = path
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    return paths


def _names(args: argparse.Namespace, paths: dict[str, str]) -> list[str | None]:
    """The adapter of every record of the file."""
    if args.file is None or Path(args.file).suffix.lower() != ".jsonl":
        raise UserError("--adapters needs --file FILE.jsonl, whose records name their adapter")
    names = []
    for source, record in read_records(args.file):
        if "adapter" not in record:
            raise UserError(f"{source}: field 'adapter' is missing (null for the bare model)")
        name = record["adapter"]
        if name is not None and name not in paths:
            raise UserError(f"{source}: no adapter {name!r}; --adapters names {', '.join(paths)}")
        names.append(name)
    return names


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for ``generate``; ``None`` overrides what a model's own generation settings say."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if not args.do_sample:
        for option in ("temperature", "top_p"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} needs --do-sample")
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    temperature = 1.0 if args.temperature is None else args.temperature
    if not 0 < temperature < float("inf"):
        raise UserError(f"--temperature must be above 0, got {temperature}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p must be above 0, at most 1, got {args.top_p}")
    return {"do_sample": True, "temperature": temperature, "top_p": args.top_p, "top_k": None}


def _prompts(args: argparse.Namespace) -> list[tuple[str, str]]:
    if args.template is not None:
        require_template("--template", args.template, "text")
    if args.prompt is not None:
        found = [("--prompt", args.prompt)]
    elif Path(args.file).suffix.lower() in (".jsonl", ".csv"):
        found = []
        for source, record in read_records(args.file):
            prompt = record.get("prompt")
            if not isinstance(prompt, str):
                raise UserError(f"{source}: field 'prompt' must be a string, got {type(prompt).__name__}")
            found.append((source, prompt))
    else:
        try:
            text = Path(args.file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{args.file}: not UTF-8: {error.reason}") from None
        found = [
            (f"{args.file} line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    if not found:
        raise UserError(f"{args.file}: holds no prompts")
    if args.template is None:
        return found
    return [(source, args.template.format(text=prompt)) for source, prompt in found]
