"""Check and measure everything on a GPU in one command: `python3 -m bench.gpu --out DIR --archive FILE`.

The parts run in the order of importance, each in a process of its own. A part that hangs, crashes or runs out
of time loses only itself; results are written, and the archive is rewritten, after every part.

    environment   driver, device, versions, ptxas: before anything is measured
    smoke-*       one kernel each against plain jnp in float32, then 50 runs of one program compared bit by bit
    parity-*      the tests at tensor-core sizes: attention, grouped matmul, experts, decoding
    time-*        the main workloads of each kernel, with XLA, cuDNN, tokamax and Triton where installed
    block-sizes   the grouped kernels at every block width, and a fit of the cost model's constants
    *-kernel-times, trace   the time of each kernel in one mixture, one attention, one training step
    parity-all    every parity test
    bench-*       every benchmark case of this device
    ablations, model   each feature of the model changed; tokens per second, milliseconds per decoded token

The command needs Python's standard library; its parts need jax and numpy, the parity parts pytest, the last two parts
flax, optax and orbax. On a CPU the same command is a rehearsal: tiny sizes, the kernels in the GPU interpreter.
"""
