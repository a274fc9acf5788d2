"""Everything worth knowing about a GPU in one bounded command: `python3 -m bench.gpu --out DIR --archive FILE`.

Parts run in order of what only hardware can tell, each in a process of its own. A part that hangs, crashes or runs out
of time loses only itself; results are written, and the archive is rewritten, after every part.

    environment   driver, device, versions, ptxas: before anything is measured
    smoke-*       one kernel each against plain jnp in float32, then 50 runs of one program compared bit by bit
    parity-*      the tests at tensor-core sizes: attention, grouped matmul, experts, decoding
    time-*        the rows that each kernel is judged by, beside XLA, cuDNN, tokamax and Triton where installed
    block-sizes   the grouped kernels at every block width, and the constants of the cost model that fit best
    *-kernel-times, trace   kernels with their times: one mixture, one attention, one training step
    parity-all    every row of the parity table
    bench-*       the bench rows of this device
    ablations, model   each feature of the model toggled; tokens per second, milliseconds per decoded token

The command needs Python's standard library; its parts need jax and numpy, the parity parts pytest, the last two parts
flax, optax and orbax. On a CPU the same command is a rehearsal: tiny sizes, the kernels in the GPU interpreter.
"""
