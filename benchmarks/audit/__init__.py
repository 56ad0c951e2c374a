"""What the Triton kernels compile to on GPUs that are not there, and what they move: ``fastadapter bench audit``.

The launchers themselves are called, with tensors that have shapes but no memory, while Triton's launch is replaced
by one that notes kernel, arguments and grid (:mod:`.capture`). So tiles and routes are those of a real call, and
Triton's own code derives the signature. Every noted launch is compiled for the architecture that was assumed, and
registers, spills, shared memory and instructions are read from the machine code (:mod:`.machine`), widths of offset
arithmetic from the intermediate code (:mod:`.offsets`). How long a launch would take is estimated from the same machine
code (:mod:`.estimate`), by constants that measured rows decide (:mod:`.calibrate`). :mod:`.cases` holds what is
audited, with bytes and operations per call; :mod:`.chips` what the chips can do.
"""
