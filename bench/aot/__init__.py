"""What did the compiler make of it? Kernels compiled for accelerators that are not there.

__main__    the command line
cases       which programs: rows of `dantinox.kernels.workloads` x implementations x directions
programs    a function and abstract arguments for each; `baselines` has the public kernels
worker_pool the parent's side of the worker processes
worker      a process that compiles for one target and reads what the compiler wrote
gpu, tpu    how to compile for the one and the other
ptx, tpu_schedule    parsers of what ptxas, cuobjdump and libtpu print
attention_bundles    how often a TPU runs each part of an attention kernel; `gmm_bundles` of a grouped matmul
profile     profiles/aot/<target>.json: written, read, compared
report      the table
readme_tables    the table in profiles/aot/README.md
"""
