"""Every family that transformers' auto classes know, times every method: does it attach, run, train, verify, detach?

    python scripts/family_table.py                     # writes docs/families.md
    python scripts/family_table.py llama gemma4_text   # prints these alone

Small random models, one thread. A method is "ok" where a fresh adapter (with a neutral start) leaves the outputs bit
for bit as they are, a moved one changes them, every gradient is finite, ``fa.verify`` passes and ``detach`` gives the
base's bits back. For LLaMA-Adapter, the keys and values that a prompt gets must also be those that the layer itself
gives the same row at position 0.
"""

import argparse
import collections
import json
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers as tf  # noqa: E402

import fastadapter as fa  # noqa: E402
from fastadapter.integrations.parts import discovery  # noqa: E402
from tests.support.budget import same_bits  # noqa: E402
from tests.support.family_checks import Wrong, check_method  # noqa: E402
from tests.support.tiny_models import model_classes, output_of, tiny_model  # noqa: E402

TABLE = ROOT / "docs" / "families.md"
SECONDS = 20  # of one processor, for one family
METHODS = {
    "LLaMA-Adapter": fa.LlamaAdapterConfig(prefix_len=3),
    "V2": fa.LlamaAdapterV2Config(prefix_len=3),
    "prefix": fa.PrefixTuningConfig(prefix_len=3),
    "soft prompt": fa.SoftPromptConfig(prompt_len=3, init="random"),
    "bottleneck": fa.BottleneckConfig(bottleneck_size=4),
}


def outcomes(model_type):
    """What each method comes to, by its name: "ok", or a word and the reason; or one reason for the family."""
    if not may_use_the_interface(model_type):
        return "none"
    try:
        model, inputs = tiny_model(model_type)
    except TimeoutError:
        return "not built: it takes too long"
    except Exception as error:
        return f"not built: {short(error)}"
    if not discovery.self_attentions(model):
        return "none"
    with torch.no_grad():
        base = output_of(model, inputs)
        if not base.isfinite().all() or not same_bits(output_of(model, inputs), base):
            return "not built: its random model's outputs are not finite, or differ from call to call"
    found = {}
    for method in METHODS:
        try:
            check_method(model, inputs, METHODS[method])
            found[method] = "ok"
        except Wrong as error:
            found[method] = f"wrong: {short(error)}"
            model, inputs = tiny_model(model_type)
        except (TypeError, ValueError) as error:
            found[method] = f"refused: {short(error)}"
        except TimeoutError:
            raise
        except Exception as error:
            found[method] = f"wrong: attach raises {type(error).__name__}: {short(error)}"
            model, inputs = tiny_model(model_type)
    return found


def may_use_the_interface(model_type):
    """Whether the family's file names transformers' attention functions, or its parts come from other families."""
    if tf.CONFIG_MAPPING[model_type].sub_configs:
        return True
    files = {sys.modules[kind.__module__] for kind in model_classes(model_type)}
    return any(hasattr(file, discovery.LOOKUP) for file in files)


def short(error):
    text = " ".join(str(error).split()).partition("; tested architectures")[0]
    return text[:300].replace("|", "/")


def limited(model_type):
    def expired(signum, frame):
        raise TimeoutError

    signal.signal(signal.SIGPROF, expired)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return outcomes(model_type)
    except TimeoutError:
        return "not built: it takes too long"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def without_names(reason):
    """A reason without what differs from family to family: paths, class names in brackets, sizes."""
    reason = re.sub(r"^[\w.]*\.[\w.]* \((\w+)\) ", "", reason)
    reason = re.sub(r"^[\w.]*\.\d[\w.]*: ", "", reason)
    reason = re.sub(r"no bottleneck points are known for .*", "no bottleneck points are known for it", reason)
    return re.sub(r"\b[A-Z]\w*(Attention|Model|LM|Generation|Decoder|Encoder|MLA)\w*\b", "the model", reason)


def page(found):
    """The text of docs/families.md."""
    reasons: dict[str, int] = {}
    rows, apart, missing = [], [], collections.defaultdict(list)
    for family, outcome in sorted(found.items()):
        if outcome == "none":
            apart.append(family)
        elif isinstance(outcome, str):
            missing[family] = outcome.removeprefix("not built: ")
        else:
            cells = []
            for result in outcome.values():
                word, _, reason = result.partition(": ")
                if reason:
                    number = reasons.setdefault(without_names(reason), len(reasons) + 1)
                    word = f"{word} {number}"
                cells.append(word)
            rows.append(f"| {family} | {' | '.join(cells)} |")
    counts = {m: sum(isinstance(o, dict) and o[m] == "ok" for o in found.values()) for m in METHODS}
    lines = [
        "# Families of models",
        "",
        "Made by `python scripts/family_table.py` (what is checked stands there) with small random models, "
        f"transformers {tf.__version__}, torch {torch.__version__.partition('+')[0]}. "
        "Names are transformers' model types.",
        "",
        f"Of {len(found)} families, {len(rows)} could be built and have a self-attention that goes through the "
        "attention interface. Attached and working: "
        + ", ".join(f"{method} on {count}" for method, count in counts.items())
        + ".",
        "",
        "**Blocks** are the members of a list that hold a self-attention; `layers=n` means the top `n` of them. "
        "Where a list of blocks is in a list of stages (Swin) the blocks of all stages are counted as one stack. Lists "
        "inside a block (experts, T5's parts) count for nothing, and neither does an attention outside the blocks "
        "(pooling heads). A model with two stacks has `n` adapted blocks in each.",
        "",
        "**Refused** means that attach raises a TypeError or ValueError with the reason and changes nothing. "
        "A bottleneck is placed by name in the families whose parts are known; in all others it goes where "
        "`BottleneckConfig(modules=(...))` says. **Wrong** means that it attaches and then one of the checks fails.",
        "",
        f"| family | {' | '.join(METHODS)} |",
        f"| --- |{' --- |' * len(METHODS)}",
        *rows,
        "",
        "Reasons:",
        "",
        *(f"{number}. {reason}" for reason, number in reasons.items()),
        "",
        f"No self-attention through the interface, so refused ({len(apart)}): {', '.join(apart)}.",
        "",
        f"No small model could be built by shrinking the configuration, so nothing is known ({len(missing)}): "
        f"{', '.join(missing)}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; all, and the page is written, unless given")
    parser.add_argument(
        "--results", type=Path, help="a file of results, one per line: those in it are not run again"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    if args.results and args.results.exists():
        for line in args.results.read_text(encoding="utf-8").splitlines():
            found |= json.loads(line)
    for model_type in args.families or sorted(each for each in tf.CONFIG_MAPPING if model_classes(each)):
        if model_type in found:
            continue
        started = time.monotonic()
        found[model_type] = limited(model_type)
        print(f"{model_type} ({time.monotonic() - started:.1f} s): {found[model_type]}", flush=True)
        if args.results:
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({model_type: found[model_type]}) + "\n")
    if not args.families:
        TABLE.write_text(page(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
