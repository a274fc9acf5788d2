"""What did the compiler make of it? Kernels compiled for accelerators that are not there.

__main__    the command line
plan        which programs: rows of `kernels.specs` x implementations x directions
programs    a function and abstract arguments for each; `peers` has the public kernels
pool        the parent's side of the worker processes
worker      a process that compiles for one target and reads what the compiler wrote
gpu, tpu    how to compile for the one and the other
ptx, bundles    parsers of what ptxas, cuobjdump and libtpu print
executed    how often a TPU runs each part of an attention kernel; `rows_executed` of a grouped matmul
profile     profiles/aot/<target>.json: written, read, compared
report      the table
summary     the table in profiles/aot/README.md
"""
