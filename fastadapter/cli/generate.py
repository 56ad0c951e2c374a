"""``fastadapter generate``: answer prompts with a model and adapters: one prompt, a file of them, or a conversation."""

import argparse
import contextlib
import sys
from typing import Any

from tqdm import tqdm

from fastadapter.checkpoints import load
from fastadapter.cli.answers import Answerer, Prompt
from fastadapter.cli.chat import converse
from fastadapter.cli.loading import add_any_base, add_model_arguments, device_and_dtype
from fastadapter.cli.options import require_number, unescape
from fastadapter.cli.records import RecordFile, add_output_arguments, line, require_output, show
from fastadapter.cli.runs import (
    GENERATION,
    Known,
    complete,
    load_base,
    parses_special_tokens,
    read_known,
    resolve_template,
)
from fastadapter.cli.sampling import add_sampling_arguments, sampling
from fastadapter.cli.texts import field, is_records, read_file, read_stdin, require_text
from fastadapter.integrations.verbs.attach import require_adapter_name
from fastadapter.training import UserError
from fastadapter.training.data import Message, require_template
from fastadapter.training.data.chat import conversation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, known=True)
    adapter = parser.add_argument_group("adapter")
    which = adapter.add_mutually_exclusive_group()
    which.add_argument(
        "--adapter", metavar="PATH", help="file or folder of an adapter; the bare model if not given"
    )
    which.add_argument(
        "--adapters",
        nargs="+",
        metavar="NAME=PATH",
        help="several; each record of --file FILE.jsonl says which in its field adapter, null for the bare model",
    )
    add_any_base(adapter)
    given = parser.add_argument_group("prompts")
    source = given.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="one prompt; the lines of stdin if none is given")
    source.add_argument(
        "--file",
        help="one prompt per line; or .jsonl, .csv and the like with a field prompt, text, messages or conversations",
    )
    source.add_argument(
        "--chat",
        action="store_true",
        help="a conversation: a turn per line of stdin; /exit ends, /reset starts anew",
    )
    given.add_argument(
        "--template",
        type=unescape,
        help=r"put each prompt in place of {text}; \n is a new line; if not given, what the adapter was trained with",
    )
    given.add_argument(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        help="give each prompt as a user's message, in the tokenizer's chat template; if not given, as in training",
    )
    given.add_argument(
        "--system-prompt",
        metavar="TEXT",
        help="message before all others; if not given, that of the training",
    )
    given.add_argument(
        "--parse-special-tokens",
        action=argparse.BooleanOptionalAction,
        help="special tokens such as </s> in a prompt are tokens, otherwise text; if not given, as in training",
    )
    given.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts answered together")
    add_sampling_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    options = sampling(args)
    require_number("--batch-size", args.batch_size, 1)
    require_output(args)
    if args.template is not None:
        require_template("--template", args.template, "text")
    known = _adapters(args)
    complete(args, list(known.values()))
    _complete_chat(args, list(known.values()))
    mixed = args.adapters is not None
    entries = [] if args.chat else _entries(args, known if mixed else {})
    templates = _templates(args, known)
    device = device_and_dtype(args)
    output = None
    if args.output is not None:
        output = RecordFile(args.output, _settings(args, known, options, templates), resume=args.resume)
    model, tokenizer = load_base(args, next(iter(known.values()), None))
    for name, each in known.items():
        load(model, each.path, name, strict_base=not args.any_base)
    answerer = Answerer(
        model.to(device),
        tokenizer,
        options,
        stop=args.stop or (),
        mixed=mixed,
        seed=args.seed,
        parse_special_tokens=args.parse_special_tokens,
    )
    if args.chat:
        if output is not None:
            output.start()
        with contextlib.closing(output) if output is not None else contextlib.nullcontext():
            converse(answerer, args.system_prompt, output, args.json)
        return 0
    names = [name if mixed else "default" for _, _, name in entries]
    prompts = [
        _encode(args, answerer, source, content, templates.get(name), name if mixed else None)
        for (source, content, _), name in zip(entries, names, strict=True)
    ]
    if output is not None:
        fields = ({"prompt": p.text, **({"adapter": p.adapter} if mixed else {})} for p in prompts)
        inputs = [each for each in fields for _ in range(options["num_return_sequences"])]
        output.require_at_most(len(inputs))
        output.require_same(inputs)
        output.start()
    _answer_all(args, answerer, prompts, output)
    return 0


def _adapters(args: argparse.Namespace) -> dict[str, Known]:
    """The adapters by name, looked at before the model is loaded."""
    if args.adapters is None:
        found = {"default": args.adapter} if args.adapter is not None else {}
    else:
        if args.chat:
            raise UserError("--chat goes with one --adapter, not with --adapters")
        if args.file is None or not is_records(args.file):
            raise UserError("--adapters needs --file FILE.jsonl, whose records name their adapter")
        found = {}
        for word in args.adapters:
            name, equals, path = word.partition("=")
            if not equals or not name or not path:
                raise UserError(f"--adapters must be NAME=PATH, got {word!r}")
            if name in found:
                raise UserError(f"--adapters names {name!r} twice")
            require_adapter_name(name, f"--adapters {word}: name")
            found[name] = path
    known = {name: read_known(path, name) for name, path in found.items()}
    for each in known.values():
        if each.task != GENERATION:
            raise UserError(f"{each.path} was trained for {each.task}; `fastadapter classify` uses it")
    return known


def _complete_chat(args: argparse.Namespace, known: list[Known]) -> None:
    """What the command line does not say about the form of the prompts."""
    if args.parse_special_tokens is None:
        args.parse_special_tokens = parses_special_tokens(known)
    trained = {bool(each.of_run("chat")) for each in known}
    if args.apply_chat_template is None and not args.chat:
        if len(trained) > 1:
            raise UserError(
                "some of the adapters were trained on conversations, others were not; say --apply-chat-template or "
                "--no-apply-chat-template"
            )
        args.apply_chat_template = trained == {True}
    if args.chat and args.apply_chat_template is False:
        raise UserError("--chat needs the chat template that --no-apply-chat-template leaves away")
    if args.system_prompt is None and (args.chat or args.apply_chat_template):
        found = {each.of_run("system_prompt") for each in known}
        if len(found) > 1:
            raise UserError("the adapters were trained with different system prompts; say --system-prompt")
        args.system_prompt = found.pop() if found else None
    elif args.system_prompt is not None:
        if not args.chat and not args.apply_chat_template:
            raise UserError("--system-prompt needs --chat or --apply-chat-template")
        require_text("--system-prompt", args.system_prompt)
    if args.chat and args.template is not None:
        raise UserError("--template does not go with --chat")
    if args.chat and args.resume:
        raise UserError("--resume does not go with --chat: a conversation cannot be taken up again")


def _templates(args: argparse.Namespace, known: dict[str, Known]) -> dict[str | None, str | None]:
    """The template of each adapter's prompts, and of the bare model's."""
    if args.chat:
        return {}
    found: dict[str | None, str | None] = {
        name: resolve_template(args.template, each) for name, each in known.items()
    }
    found.setdefault(None, resolve_template(args.template, None))
    found.setdefault("default", found[None])
    if args.template is None:
        for name, template in found.items():
            if name is not None and template is not None:
                print(
                    f"fastadapter: prompts are put into {template!r}, as {known[name].path} was trained; "
                    "--template '{text}' takes them as they are",
                    file=sys.stderr,
                )
    return found


def _entries(args: argparse.Namespace, adapters: dict[str, Known]) -> list[tuple[str, Any, str | None]]:
    """Origin of each prompt, its text or its messages, and its adapter by name."""
    if args.prompt is not None:
        return [("--prompt", require_text("--prompt", args.prompt), None)]
    entries: list[tuple[str, Any, str | None]] = []
    for source, record in read_file(args.file) if args.file is not None else read_stdin():
        name = None
        if not isinstance(record, dict):
            entries.append((source, record, None))
            continue
        if adapters:
            if "adapter" not in record:
                raise UserError(f"{source}: field 'adapter' is missing (null for the bare model)")
            name = record["adapter"]
            if name is not None and name not in adapters:
                raise UserError(f"{source}: no adapter {name!r}; --adapters names {', '.join(adapters)}")
        turns = next((each for each in ("messages", "conversations") if each in record), None)
        if turns is not None:
            entries.append((source, _messages(source, record, turns), name))
        else:
            entries.append((source, field(source, record, ("prompt", "text")), name))
    if not entries:
        raise UserError(f"{args.file or 'stdin'}: holds no prompts")
    return entries


def _messages(source: str, record: dict[str, Any], name: str) -> list[Message]:
    """A conversation up to a turn of the user's; the assistant's last turn is left away, for that is to be made."""
    system = record.get("system")
    if system is not None:
        system = require_text(f"{source}: field 'system'", system)
    messages = list(conversation(record[name], name, source, system))
    if messages[-1].role == "assistant":
        messages.pop()
    if not messages or messages[-1].role != "user":
        raise UserError(f"{source}: field {name!r} has no turn of the user's to answer")
    return messages


def _encode(
    args: argparse.Namespace,
    answerer: Answerer,
    source: str,
    content: Any,
    template: str | None,
    name: str | None,
) -> Prompt:
    system = [Message("system", args.system_prompt)] if args.system_prompt else []
    if isinstance(content, list):
        own = any(each.role == "system" for each in content)
        return answerer.encode_chat(source, content if own else [*system, *content], name)
    text = template.format(text=content) if template is not None else content
    if args.apply_chat_template:
        return answerer.encode_chat(source, [*system, Message("user", text)], name)
    return answerer.encode(source, text, name)


def _settings(
    args: argparse.Namespace,
    known: dict[str, Known],
    options: dict[str, Any],
    templates: dict[str | None, str | None],
) -> dict[str, Any]:
    """All but the prompts that decides what the answers are."""
    digests = {name: each.digest for name, each in known.items()}
    drawing = {"seed": args.seed, "batch_size": args.batch_size} if args.do_sample else {}
    model = {key: getattr(args, key) for key in ("model", "revision", "gguf_file", "dtype")}
    keys = ("apply_chat_template", "system_prompt", "parse_special_tokens")
    form = {key: getattr(args, key) for key in keys}
    return {
        **model, **options, **form, **drawing, "stop": args.stop, "adapters": digests,
        "templates": {str(name): template for name, template in templates.items()},
    }  # fmt: skip


def _answer_all(
    args: argparse.Namespace, answerer: Answerer, prompts: list[Prompt], output: RecordFile | None
) -> None:
    """Batch after batch, each told of when it is there. Records that were there already are not made again."""
    each = answerer.options["num_return_sequences"]
    done = len(output.found) if output is not None else 0
    written = done
    # stdout shows on a terminal how far it is
    bar = tqdm(total=len(prompts), initial=done // each, unit="prompt",
               disable=None if output is not None or not sys.stdout.isatty() else True)  # fmt: skip
    with bar:
        try:
            for start in range(0, len(prompts), args.batch_size):
                batch = prompts[start : start + args.batch_size]
                last = (start + len(batch)) * each
                if last <= done:
                    continue
                plain = output is None and not args.json
                head = len(prompts) > 1
                tell = None
                if plain and len(batch) == 1 and answerer.streams:
                    tell = show
                    _show_head(batch[0], answerer.mixed, head)
                answers = answerer.answer(batch, draw=start, tell=tell)
                records = [answer for one in answers for answer in one]
                if output is not None:
                    output.write(records[max(0, done - start * each) :])
                elif args.json:
                    show("".join(map(line, records)))
                elif tell is not None:
                    show("\n")
                else:
                    for prompt, one in zip(batch, answers, strict=True):
                        for answer in one:
                            _show_head(prompt, answerer.mixed, head or each > 1)
                            show(f"{answer['completion']}\n")
                written = last
                bar.update(start + len(batch) - bar.n)
        except KeyboardInterrupt:
            if output is None:
                raise
            raise KeyboardInterrupt(
                f"{written // each} of {len(prompts)} prompts are answered in {output.path}; --resume goes on"
            ) from None
        finally:
            if output is not None:
                output.close()


def _show_head(prompt: Prompt, mixed: bool, wanted: bool) -> None:
    """Where the prompt came from, on stderr: for a reader, not for a program."""
    if wanted:
        who = f", {prompt.adapter or 'bare model'}" if mixed else ""
        print(f"[{prompt.source}{who}]", file=sys.stderr, flush=True)
