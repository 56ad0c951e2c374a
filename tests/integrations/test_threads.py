"""Threads and tasks that use one model with different adapters: each gets its own answers."""

import asyncio
import threading

import pytest
import torch

import fastadapter as fa
from tests.support.budget import same_bits
from tests.support.methods import CONFIGS
from tests.support.models import FAMILIES, build, output_of, token_ids

NAMED = {family.name: family for family in FAMILIES}
CALLS = 500
PATIENCE = 120.0


@pytest.fixture(autouse=True)
def one_thread(default_threads):
    torch.set_num_threads(1)


def adapted(family, names):
    model = build(NAMED[family])
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        fa.attach(model, CONFIGS[name], name)
        with torch.no_grad():
            for key, parameter in fa.trainable_parameters(model):
                if f".{name}." in key:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def answers(model, names, inputs):
    found = {}
    with torch.no_grad():
        for name in names:
            fa.set_active(model, name)
            found[name] = output_of(model, inputs)
    return found


def together(*works):
    """Run functions in threads of their own; the first error of any."""
    errors = []

    def guarded(work):
        try:
            with torch.no_grad():
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "threads wait for one another"
    if errors:
        raise errors[0]


# every method in a decoder, every pair of ways in an encoder and in images
FOUR = {
    "llama": [
        ["llama-adapter", "prefix", "soft-prompt", "houlsby"],
        ["v2-input", "parallel", "pfeiffer", None],
    ],
    "bert": [["soft-prompt", "parallel", "llama-adapter", "parallel-residual"]],
    "vit": [["soft-prompt", "v2-output", "parallel", None]],
}


@pytest.mark.parametrize(
    ("family", "names"), [(family, names) for family, sets in FOUR.items() for names in sets], ids=str
)
def test_every_thread_gets_the_answers_of_its_own_adapter(family, names):
    """Four threads, 500 calls in all a family, in turns by ``set_active`` and ``rows``, on one model."""
    model = adapted(family, [name for name in names if name])
    inputs = NAMED[family].inputs()
    inputs = {key: value[:, :4] if value.dtype == torch.long else value for key, value in inputs.items()}
    expected = answers(model, names, inputs)
    assert not any(same_bits(expected[a], expected[b]) for a in names for b in names if a != b)
    start = threading.Barrier(len(names))

    def work(name):
        start.wait(PATIENCE)
        for call in range(CALLS // len(names)):
            if call % 2:
                with fa.rows(model, [name, name]):
                    found = output_of(model, inputs)
            else:
                fa.set_active(model, name)
                found = output_of(model, inputs)
            assert same_bits(found, expected[name]), (name, call)

    together(*(lambda name=name: work(name) for name in names))


@torch.no_grad()
def test_generate_in_threads():
    names = ["llama-adapter", "prefix", "soft-prompt", "parallel"]
    model, ids = adapted("llama", names), token_ids(length=4)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
    expected = {}
    for name in names:
        fa.set_active(model, name)
        expected[name] = model.generate(ids, **options)
    other = [names[1], names[0]]
    with fa.rows(model, other):
        mixed = model.generate(ids, **options)

    def work(name):
        fa.set_active(model, name)
        for _ in range(5):
            assert torch.equal(model.generate(ids, **options), expected[name])

    def mixing():
        for _ in range(5):
            with fa.rows(model, other):
                assert torch.equal(model.generate(ids, **options), mixed)

    together(*(lambda name=name: work(name) for name in names), mixing)
    assert "_expand_inputs_for_generation" not in model.__dict__


@pytest.mark.filterwarnings("ignore:a thread that chose no adapter")
def test_adapters_come_and_go_beside_passes_that_do_not_use_them(tmp_path):
    """Load, replace and detach: a thread with another adapter sees nothing of it, chosen by itself or the default."""
    model = adapted("llama", ["llama-adapter", "parallel"])
    ids = token_ids(length=4)
    expected = answers(model, ["parallel", "llama-adapter"], {"input_ids": ids})
    fa.save(model, tmp_path, "parallel")
    fa.detach(model, "parallel")
    fa.set_active(model, "llama-adapter")
    done = threading.Event()

    def serve(choose):
        if choose:
            fa.set_active(model, "llama-adapter")
        while not done.is_set():
            assert same_bits(model(ids).logits, expected["llama-adapter"])

    def exchange():
        try:
            for _ in range(15):
                fa.load(model, tmp_path, "parallel")
                assert same_bits(model(ids).logits, expected["parallel"])
                fa.load(model, tmp_path, "quiet", activate=False)
                assert same_bits(model(ids).logits, expected["parallel"])
                fa.detach(model, "quiet")
                fa.detach(model, "parallel")
        finally:
            done.set()

    together(lambda: serve(True), lambda: serve(False), exchange)


def held_forward(model, ids):
    """A forward pass in a thread that stops in its second block until ``go_on`` is set."""
    inside, go_on = threading.Event(), threading.Event()

    def hold(module, args):
        if threading.current_thread().name == "held":
            inside.set()
            go_on.wait(PATIENCE)

    handle = model.model.layers[1].register_forward_pre_hook(hold)
    found = []

    def work():
        with torch.no_grad():
            found.append(model(ids).logits)

    thread = threading.Thread(target=work, name="held", daemon=True)
    thread.start()
    inside.wait(PATIENCE)
    return thread, go_on, found, handle


def test_detach_waits_for_passes():
    model, ids = adapted("llama", ["houlsby"]), token_ids(length=4)
    expected = answers(model, ["houlsby"], {"input_ids": ids})["houlsby"]
    thread, go_on, found, handle = held_forward(model, ids)
    leaving = threading.Thread(target=lambda: fa.detach(model, "houlsby"), daemon=True)
    leaving.start()
    leaving.join(0.2)
    assert leaving.is_alive() and any("fa_bottleneck" in name for name, _ in model.named_modules())
    go_on.set()
    thread.join(PATIENCE)
    leaving.join(PATIENCE)
    handle.remove()
    assert same_bits(found[0], expected)
    assert not any("fa_" in name for name, _ in model.named_modules())


def test_detach_gives_up_after_a_while(monkeypatch):
    from fastadapter.integrations.passes import traffic

    monkeypatch.setattr(traffic, "PATIENCE", 0.1)
    model, ids = adapted("llama", ["houlsby"]), token_ids(length=4)
    thread, go_on, _, handle = held_forward(model, ids)
    with pytest.raises(RuntimeError, match="other threads have been using it"):
        fa.detach(model, "houlsby")
    go_on.set()
    thread.join(PATIENCE)
    handle.remove()
    fa.detach(model, "houlsby")


def test_from_inside_a_pass_nothing_is_changed():
    model, ids = adapted("llama", ["houlsby"]), token_ids(length=4)
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: fa.detach(model) and None)
    with pytest.raises(RuntimeError, match="from inside one of its forward passes"):
        model(ids)
    handle.remove()
    model(ids)
    fa.detach(model)


def test_an_interrupted_pass_is_over():
    """Ctrl-C in a notebook: torch runs no hook then."""
    model, ids = adapted("llama", ["houlsby", "prefix"]), token_ids(length=4)
    expected = answers(model, ["prefix", "houlsby"], {"input_ids": ids})

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids)
    handle.remove()
    fa.set_active(model, "prefix")
    with torch.no_grad():
        assert same_bits(model(ids).logits, expected["prefix"])
    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids)
    handle.remove()
    fa.detach(model)


def test_a_choice_that_was_detached_elsewhere_is_an_error():
    model, ids = adapted("llama", ["houlsby", "prefix"]), token_ids(length=4)
    fa.set_active(model, "houlsby")
    together(lambda: fa.detach(model, "houlsby"))
    with pytest.raises(RuntimeError, match="'houlsby', which this thread or task chose, was detached"):
        model(ids)
    fa.set_active(model, "prefix")
    model(ids)


def test_a_thread_that_chose_nothing_is_told_which_it_uses():
    """Such as one that streams what ``generate`` gives."""
    model, ids = adapted("llama", ["houlsby", "prefix"]), token_ids(length=4)
    expected = answers(model, ["prefix", "houlsby"], {"input_ids": ids})
    fa.attach(model, CONFIGS["parallel"], "third")
    found = []
    with pytest.warns(
        UserWarning, match="uses 'houlsby', the model's default; 'third' was attached or loaded"
    ):
        together(lambda: found.append(model(ids).logits))
    assert same_bits(found[0], expected["houlsby"])
    fa.set_active(model, "prefix")
    together(lambda: found.append(model(ids).logits))
    assert same_bits(found[1], expected["prefix"])


def test_tasks_choose_for_themselves():
    """Two tasks of one thread, each in ``rows`` across an ``await``."""
    names = ["houlsby", "prefix"]
    model, ids = adapted("llama", names), token_ids(length=4)
    expected = answers(model, names, {"input_ids": ids})

    async def task(name):
        with fa.rows(model, [name, name]):
            for _ in range(3):
                await asyncio.sleep(0)
                with torch.no_grad():
                    assert same_bits(model(ids).logits, expected[name])

    async def both():
        await asyncio.gather(*(task(name) for name in names))

    asyncio.run(both())


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not"])
def test_recomputation_takes_the_adapters_of_its_forward(use_reentrant):
    """Backward in another thread, as on a GPU, after the context that chose them is left."""
    names = ["llama-adapter", "parallel"]
    model, ids = adapted("llama", names).train(), token_ids(length=4)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            options = {"use_reentrant": use_reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.zero_grad()
        with fa.rows(model, names):
            loss = model(ids, use_cache=False).logits.square().sum()
        fa.set_active(model, None)

        def backward(loss=loss):
            with torch.enable_grad():
                loss.backward()

        together(backward)
        gradients.append({key: p.grad for key, p in fa.trainable_parameters(model) if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and all(grad.abs().max() > 0 for grad in plain.values())
    for key in plain:
        assert torch.equal(plain[key], recomputed[key]), key


def test_recomputation_refuses_adapters_that_are_gone():
    model, ids = adapted("llama", ["houlsby", "prefix"]).train(), token_ids(length=4)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fa.set_active(model, "houlsby")
    loss = model(ids, use_cache=False).logits.sum()
    fa.detach(model, "houlsby")
    with pytest.raises(
        RuntimeError, match="was detached or replaced between a forward pass and its backward"
    ):
        loss.backward()


def test_a_copy_is_a_model_of_its_own():
    import copy

    model, ids = adapted("llama", ["houlsby", "prefix"]), token_ids(length=4)
    expected = answers(model, ["prefix", "houlsby"], {"input_ids": ids})
    with fa.rows(model, ["prefix", "prefix"]):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            assert same_bits(model(ids).logits, expected["prefix"])
            assert same_bits(twin(ids).logits, expected["houlsby"])  # the default
    fa.attach(model, CONFIGS["pfeiffer"], "newest")
    with torch.no_grad():
        assert same_bits(copy.deepcopy(model)(ids).logits, model(ids).logits)  # what acts here
    fa.set_active(model, "houlsby")
    fa.set_active(twin, "prefix")
    with torch.no_grad():
        assert same_bits(model(ids).logits, expected["houlsby"])
        assert same_bits(twin(ids).logits, expected["prefix"])
