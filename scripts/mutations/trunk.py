"""Mistakes in the trunk cache."""

from .record import of_file

RUNS = "tests/training/test_trunk.py"
FILES = "tests/training/test_trunk_store.py"

TRUNK = [
    *of_file(
        "fastadapter/training/trunk/find.py",
        f"{RUNS} -k refused",
        chance_is_not_seen=("Behind(hidden.requires_grad, random,", "Behind(hidden.requires_grad, False,"),
        a_block_of_the_adapter_is_frozen=(
            "    size = min(frozen, steady)\n",
            "    size = min(frozen + 1, steady)\n",
            f"{RUNS} -k 'losses and adapter-llama'",
        ),
        no_weights_are_digested=("through >= size]", "through >= 0]", f"{FILES} -k another_base"),
        weights_above_are_digested=("through >= size]", "through > 99]", f"{FILES} -k another_base"),
    ),
    *of_file(
        "fastadapter/training/trunk/prove.py",
        f"{RUNS} -k hand_each_other",
        nothing_is_proven=("    if not (loss <= tolerance and gradient <= tolerance):", "    if loss < 0:"),
    ),
    *of_file(
        "fastadapter/training/trunk/start.py",
        f"{RUNS} -k 'no_pass_takes or as_it_was'",
        states_may_be_left=("    if run.used != 1:", "    if run.used > 1:"),
        what_was_there_is_lost=("            if before is not None:\n", "            if False:\n"),
    ),
    *of_file(
        "fastadapter/training/trunk/store.py",
        FILES,
        another_trunk_will_do=(' or metadata.get("trunk") != self.digest', "", f"{FILES} -k foreign"),
        tokens_do_not_count=(
            "digest_sequences(self.digest, each)[:32] for each in cut)",
            "digest_sequences(self.digest, [(n,)])[:32] for n in range(len(cut)))",
            f"{FILES} -k changed_record",
        ),
        the_newest_go_first=(
            "key=lambda entry: (entry.used, entry.path))",
            "key=lambda entry: (-entry.used, entry.path))",
            f"{FILES} -k last_use",
        ),
        nobody_waits=(
            "            if not try_lock(descriptor):",
            "            if False:",
            f"{FILES} -k waited_for",
        ),
    ),
    *of_file(
        "fastadapter/training/trunk/prepare.py",
        f"{RUNS} -k bits",
        proving_moves_the_generators=(
            "    finally:\n        restore_random(random, run.accelerator.device)\n",
            "    finally:\n        pass\n",
        ),
        a_resumed_run_decides_anew=(
            "pays=not asked and not before",
            "pays=not asked",
        ),
    ),
]
