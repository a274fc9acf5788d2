"""Compile kernels for accelerators without having them, and read what the compilers made of them.

__main__      the command line
cases         which programs: workloads x implementations x directions
programs      a function and abstract arguments for each case; `baselines` has the public kernels
hardware      the accelerators: peak rates, memory, units
worker_pool   the parent's side of the worker processes
worker        a process that compiles for one target and reads what the compiler wrote
gpu/          compiles for NVIDIA GPUs; reads ptxas (`ptx`) and machine code (`sass`); checks PTX (`ptx_rules`)
tpu/          compiles for TPUs; reads libtpu's schedules; counts executed bundles and bytes moved
profile       profiles/aot/<target>.json: read, written, compared
report/       the table in the terminal, and those of profiles/aot/README.md
memory_traffic, locate    programs of their own: bytes moved, and where a kernel hangs
"""
